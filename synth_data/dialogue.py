"""Two speakers in time: scripted turns as two aligned channels with every event labelled.

The turns are questions of the quiz and their answers, or a dialogue that somebody wrote. Pure:
``script`` draws everything that chance decides, ``arrange`` lays it out in time with a synthesizer
handed in. No file, no clock, no engine is touched here.

A conversation, with the events that are labelled (``A`` assistant, ``U`` user)::

    U  what is | seven plus five?        mm-hm              how do you spell ...
       ^turn.....pause          ^turn_end ^backchannel      ^interruption
    A                            Seven plus five is twelve.  Cat is sp          S, P, ...
                             gap~^answer                              ^stops: fade, text cut too

Human turn-taking sets the numbers: answers follow a question after about 200 ms in all languages
(Stivers et al., PNAS 2009), which is shorter than many pauses inside a sentence, so silence alone
never says that it is the assistant's turn; what was said has to. Between people, four turns in ten
begin before the last has ended (Heldner and Edlund, J. Phonetics 2010), and six words in a hundred
are fillers, repetitions or restarts (Shriberg, 1994).

Letters: S samples. Times are seconds from the start of the conversation, on both channels alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from synth_data import quiz
from synth_data.quiz import Question, Split
from synth_data.shards import Event
from synth_data.text import tokenize
from synth_data.tts import Utterance, Word

ASSISTANT, USER = 0, 1
"""Channel numbers."""

UNTRANSCRIBED = "untranscribed"
"""In a sample's `meta`: the channels of which nobody has written down the words."""

BACKCHANNELS = ("Um hum.", "Uh huh.", "Yeah.", "Okay.", "Right.")
"""What a listener says without taking the turn. "Mm-hm" is written "um hum", because the engines
spell the former letter by letter."""

_FADE_SECONDS = (
    0.02  # A cut voice fades this fast: shorter clicks, longer sounds like trailing off.
)
_MARGIN_SECONDS = 0.03  # Kept around the words of an utterance: breath and release of the last.
_DISFLUENCIES: tuple[Literal["filler", "repetition", "restart"], ...]
_DISFLUENCIES = ("filler", "repetition", "restart")
_FILLERS = ("um,", "uh,", "well,", "you know,")
_LONG_ANSWERS = ("counting", "spelling", "repeat", "identity")  # Long enough to be interrupted.
_MIN_INTERRUPTED_SECONDS = 0.8  # An answer that ends sooner than this anyway is not interrupted.
_SILENCE_SECONDS = 2.0  # From here on, nobody speaking is an event.


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"{ends[0]:g} is more than {ends[1]:g}; write the smaller end first")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Both ends of what is drawn uniformly."""


class DialogueConfig(BaseModel):
    """How conversations go. Times are in seconds, shares are probabilities."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(default=60.0, gt=1)
    """Length of a conversation; it ends there, in the middle of a word if need be."""
    split: Split = "train"
    """Which questions are asked."""
    categories: quiz.CategoryWeights | None = None
    """Weights of the quiz categories; None weighs all alike."""
    unknown: float = Field(default=0.12, ge=0, le=1)
    """Share of questions from outside the quiz world."""
    greeting: float = Field(default=0.0, ge=0, le=1)
    """Share of conversations that the assistant opens."""
    lead: Range = (0.3, 2.5)
    """Silence before the first word: uniform."""
    gap_median: float = Field(default=0.22, gt=0)
    """From the end of a question to its answer: log-normal with this median ..."""
    gap_sigma: float = Field(default=0.3, ge=0)
    """... this standard deviation of its logarithm ..."""
    gap_range: Range = (0.08, 0.7)
    """... and clipped to this."""
    silence_mean: float = Field(default=0.9, ge=0)
    """Between an answer and the next question: 0.25 s plus an exponential of this mean."""
    long_silence: float = Field(default=0.08, ge=0, le=1)
    """Share of turns before which nobody speaks for long ..."""
    long_silence_range: Range = (3.0, 9.0)
    """... namely for this long: uniform."""
    pause: float = Field(default=0.2, ge=0, le=1)
    """Share of questions with a pause inside (of those that can have one, and do not interrupt)
    ..."""
    pause_range: Range = (0.5, 1.5)
    """... of this length: uniform."""
    interruption: float = Field(default=0.12, ge=0, le=1)
    """Share of answers that the next question interrupts ..."""
    interruption_at: Range = (0.15, 0.7)
    """... after this fraction of the answer: uniform ..."""
    stop_range: Range = (0.16, 0.40)
    """... and the assistant is silent this long after the user began: uniform, 2 to 5 frames."""
    backchannel: float = Field(default=0.15, ge=0, le=1)
    """Share of answers during which the user says "mm-hm" or the like."""
    noise: float = Field(default=0.3, ge=0, le=1)
    """Share of conversations with noise on the user's channel throughout."""
    noise_snr_db: Range = (5.0, 30.0)
    """Its signal-to-noise ratio: uniform."""
    noise_burst: float = Field(default=0.5, ge=0, le=1)
    """Share of long silences that a noise fills ..."""
    noise_burst_dbfs: Range = (-50.0, -25.0)
    """... of this level: uniform."""
    echo: float = Field(default=0.3, ge=0, le=1)
    """Share of conversations in which the assistant's voice returns on the user's channel ..."""
    echo_gain_db: Range = (-30.0, -10.0)
    """... at this gain ..."""
    echo_delay: Range = (0.05, 0.3)
    """... and after this delay: both uniform."""
    overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of answers that begin before the question has ended (of questions without a pause that
    do not interrupt) ..."""
    overlap_range: Range = (0.08, 0.5)
    """... by this much: uniform, and half of the question at most."""
    disfluency: float = Field(default=0.0, ge=0, le=1)
    """Share of questions with a filler, a repetition or a restart (of those without a pause that do
    not interrupt)."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A hesitation before word ``word`` (index into the whitespace-separated question)."""

    word: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Disfluency:
    """``text`` is said before word ``word`` (index into the whitespace-separated question)."""

    word: int
    kind: Literal["filler", "repetition", "restart"]
    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """What somebody wrote that one says and the other replies; no quiz judges it."""

    text: str
    answer: str
    keys: tuple[str, ...] = ()
    category: str = "script"
    fact: str = ""

    @property
    def pause(self) -> tuple[int, int] | tuple[()]:
        """A speaker may pause before any word but the first, see ``Question.pause``."""
        words = len(tokenize(self.text))
        return (1, words - 1) if words > 1 else ()


@dataclass(frozen=True, slots=True)
class Interruption:
    """The next question starts at fraction ``at`` of this answer, which ends ``stop`` later."""

    at: float
    stop: float


@dataclass(frozen=True, slots=True)
class Backchannel:
    """The user says ``text`` at fraction ``at`` of the answer, which goes on."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    question: Question | Exchange
    silence: float
    """Seconds between the previous answer and this question; void where it interrupts."""
    gap: float
    """Seconds between the question's end and the answer; negative where they overlap."""
    pause: Pause | None = None
    interruption: Interruption | None = None
    """How the *next* turn cuts this answer."""
    backchannel: Backchannel | None = None
    noise_dbfs: float | None = None
    """Level of a noise that fills the silence before the question."""
    disfluency: Disfluency | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """All that chance decides about a conversation, before anything is spoken."""

    seconds: float
    lead: float
    turns: tuple[Turn, ...]
    greeting: str | None = None
    noise_snr_db: float | None = None
    echo: tuple[float, float] | None = None
    """Gain (dB) and delay (seconds) at which the user's microphone hears the assistant."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Two aligned channels and what happens on them.

    Events, in order of their start (``channel`` is who causes it):

    ============ ========= ==================================================================
    kind         channel   start .. end; meta
    ============ ========= ==================================================================
    turn_end     USER      the end of a question (start = end); ``start`` (of the question),
                           ``question``, ``answer``, ``keys``, ``category``, ``fact``
    answer       ASSISTANT the answer; ``text`` as written, ``cut``: whether an interruption ended
                           it (the channel's words are those that were said)
    overlap      ASSISTANT both speak: from the answer's start to the question's end
    pause        USER      a pause inside a question
    disfluency   USER      what a question has too much; ``kind``, ``text``
    interruption USER      from the user's first word to the assistant's last sound
    backchannel  USER      the backchannel; ``text``
    silence      USER      nobody speaks for 2 s or more
    noise        USER      noise to add: ``snr_db`` (throughout) or ``dbfs`` (in a silence)
    echo         ASSISTANT echo to add to the user's channel: ``gain_db``, ``delay``
    room         USER      a reverberant room, throughout: ``rt60``, ``direct_db``
    telephone    USER      the band of a telephone, throughout
    ============ ========= ==================================================================

    Noise and echo are labelled here and mixed in by who owns the sounds (``build_dialogues``), who
    adds the room and the telephone, with their labels.
    """

    user: npt.NDArray[np.float32]
    """float32 [S]."""
    assistant: npt.NDArray[np.float32]
    """float32 [S]."""
    sample_rate: int
    user_words: tuple[Word, ...]
    assistant_words: tuple[Word, ...]
    events: tuple[Event, ...]


Synthesize = Callable[[str, int], Utterance]
"""Speaks a text on a channel (``ASSISTANT`` or ``USER``); always the same sample rate."""


# --- Script ---------------------------------------------------------------------------------------


def script(
    rng: np.random.Generator,
    config: DialogueConfig,
    exchanges: Sequence[Exchange] | None = None,
    opening: str | None = None,
) -> Script:
    """Draw a conversation: questions, answers and their timing.

    More turns are drawn than ``config.seconds`` can hold; ``arrange`` stops where time is up.

    Args:
        rng: decides all.
        config: how often, and how long.
        exchanges: what is said, in this order; None draws it from the quiz.
        opening: what the assistant says before the first of them.
    """
    turns: list[Turn] = []
    # No turn takes less than about 2 s, the shortest question and answer being a word each.
    wanted = math.ceil(config.seconds / 2.0) if exchanges is None else len(exchanges)
    interrupts = False
    while len(turns) < wanted:
        interrupted = rng.random() < config.interruption
        question: Question | Exchange
        if exchanges is None:
            question = _question(rng, config, long_answer=interrupted, interrupts=interrupts)
        else:
            question = exchanges[len(turns)]
        long = rng.random() < config.long_silence
        silence = (
            rng.uniform(*config.long_silence_range)
            if long
            else 0.25 + rng.exponential(config.silence_mean)
        )
        gap = config.gap_median * math.exp(config.gap_sigma * rng.standard_normal())
        gap = float(np.clip(gap, *config.gap_range))
        pause = backchannel = interruption = disfluency = None
        # Who interrupts does not hesitate: the assistant may not be silent yet.
        if question.pause and not interrupts and rng.random() < config.pause:
            first, last = question.pause
            pause = Pause(int(rng.integers(first, last + 1)), rng.uniform(*config.pause_range))
        if interrupted:
            interruption = Interruption(
                rng.uniform(*config.interruption_at), rng.uniform(*config.stop_range)
            )
        elif rng.random() < config.backchannel:
            text = BACKCHANNELS[int(rng.integers(len(BACKCHANNELS)))]
            backchannel = Backchannel(rng.uniform(0.1, 0.6), text)
        burst = (
            rng.uniform(*config.noise_burst_dbfs)
            if long and rng.random() < config.noise_burst
            else None
        )
        # Chance is asked only for what is switched on: a recipe without it keeps its sound.
        flows = pause is None and not interrupts
        if flows and config.overlap and rng.random() < config.overlap:
            gap = -rng.uniform(*config.overlap_range)
        if flows and config.disfluency and rng.random() < config.disfluency:
            disfluency = _disfluency(rng, question.text.split())
        turns.append(
            Turn(question, silence, gap, pause, interruption, backchannel, burst, disfluency)
        )
        interrupts = interrupted
    lead = rng.uniform(*config.lead)
    if exchanges is None and rng.random() < config.greeting:
        opening = quiz.greeting()
    return Script(
        config.seconds,
        lead,
        tuple(turns),
        opening,
        rng.uniform(*config.noise_snr_db) if rng.random() < config.noise else None,
        (rng.uniform(*config.echo_gain_db), rng.uniform(*config.echo_delay))
        if rng.random() < config.echo
        else None,
    )


def _disfluency(rng: np.random.Generator, words: Sequence[str]) -> Disfluency:
    """Something too much before one of the words; kinds equally often, where they are possible.

    ::

        what is um, the capital ...      filler
        what is the the capital ...      repetition: of the next word
        what is, what is the capital ... restart: of all words so far
    """
    kind = _DISFLUENCIES[int(rng.integers(len(_DISFLUENCIES)))]
    # A restart has said something; late ones are rare.
    first, last = (1, min(4, len(words) - 1)) if kind == "restart" else (0, len(words) - 1)
    if first > last:
        kind, first, last = "filler", 0, 0
    word = int(rng.integers(first, last + 1))
    if kind == "filler":
        text = _FILLERS[int(rng.integers(len(_FILLERS)))]
    elif kind == "repetition":
        text = words[word].strip(".,?!;:")
    else:
        text = " ".join(words[:word]).strip(".,?!;:") + ","
    return Disfluency(word, kind, text)


def _question(
    rng: np.random.Generator, config: DialogueConfig, *, long_answer: bool, interrupts: bool
) -> Question:
    may = config.categories
    long_ones = [name for name in _LONG_ANSWERS if may is None or name in may]
    if long_answer and long_ones:
        category = long_ones[int(rng.integers(len(long_ones)))]
    elif rng.random() < config.unknown:
        category = quiz.UNKNOWN
    else:
        weights = config.categories or dict.fromkeys(quiz.CATEGORIES, 1.0)
        shares = np.array(list(weights.values())) / sum(weights.values())
        category = list(weights)[int(rng.choice(len(shares), p=shares))]
    # "Okay" and "Right" begin backchannels: an interruption that began with one could not be told
    # from it in the two to five frames in which the assistant has to stop.
    return quiz.draw(rng, config.split, category, opener=0.0 if interrupts else 0.12)


# --- Arrangement ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Track:
    """One channel while it is filled."""

    pcm: npt.NDArray[np.float32]
    sample_rate: int
    words: list[Word] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return len(self.pcm) / self.sample_rate

    def place(self, utterance: Utterance, start: float) -> None:
        """Add an utterance whose first sample stands at ``start``; what is too long is cut."""
        first = round(start * self.sample_rate)
        room = max(0, len(self.pcm) - first)
        part = utterance.pcm[:room]
        self.pcm[first : first + len(part)] += part
        for word in utterance.words:
            if start + word.start < self.seconds:
                self.words.append(
                    Word(word.text, start + word.start, min(start + word.end, self.seconds))
                )


def arrange(script: Script, synthesize: Synthesize, sample_rate: int = 24_000) -> Dialogue:
    """Speak a script and lay it out in time; the same arguments give the same sound.

    Args:
        script: what is said, and when.
        synthesize: speaks a text on a channel, at ``sample_rate``.
        sample_rate: of both channels.

    Returns:
        Channels of exactly ``round(script.seconds * sample_rate)`` samples; speech that would run
        over the end is cut there, with its words.
    """
    samples = round(script.seconds * sample_rate)
    user = _Track(np.zeros(samples, np.float32), sample_rate)
    assistant = _Track(np.zeros(samples, np.float32), sample_rate)
    events: list[Event] = []
    if script.noise_snr_db is not None:
        meta = {"snr_db": script.noise_snr_db}
        events.append(Event(kind="noise", channel=USER, start=0, end=script.seconds, meta=meta))
    if script.echo is not None:
        gain, delay = script.echo
        meta = {"gain_db": gain, "delay": delay}
        events.append(Event(kind="echo", channel=ASSISTANT, start=0, end=script.seconds, meta=meta))

    quiet_since = 0.0  # End of the last sound of either channel.
    begin = script.lead  # Of the next thing said.
    if script.greeting is not None:
        utterance = _trim(synthesize(script.greeting, ASSISTANT))
        assistant.place(utterance, begin)
        quiet_since = begin + utterance.seconds
        events.append(_answer_event(begin, utterance, script.greeting, cut=False))
        begin = quiet_since + script.turns[0].silence
    interrupts: float | None = None  # When the assistant falls silent, where this turn interrupts.
    for turn, following in zip(script.turns, [*script.turns[1:], None], strict=True):
        if begin >= script.seconds:
            break
        if interrupts is None:
            events += _silence_events(quiet_since, begin, turn.noise_dbfs)
        question = _trim(synthesize(spoken(turn), USER))
        # Where words begin is a guess with some engines: a pause might fall into one.
        if turn.pause is not None and not question.estimated:
            question, (start, end) = _with_pause(question, turn.pause)
            events.append(Event(kind="pause", channel=USER, start=begin + start, end=begin + end))
        user.place(question, begin)
        first_word, end_of_turn = begin + question.words[0].start, begin + question.words[-1].end
        if interrupts is not None:
            events.append(
                Event(kind="interruption", channel=USER, start=first_word, end=interrupts)
            )
        events.append(_turn_event(turn.question, first_word, end_of_turn))
        if turn.disfluency is not None:
            events.append(_disfluency_event(turn, turn.disfluency, question, begin))

        answer = _trim(synthesize(turn.question.answer, ASSISTANT))
        answer_start = max(end_of_turn + turn.gap, (first_word + end_of_turn) / 2)
        if interrupts is not None:
            # Not before it has let go of what it was saying.
            answer_start = max(answer_start, interrupts + _MARGIN_SECONDS)
        if answer_start < end_of_turn:
            events.append(
                Event(kind="overlap", channel=ASSISTANT, start=answer_start, end=end_of_turn)
            )
        onset, interrupts = None, None
        if turn.interruption is not None and following is not None:
            # Who asked has finished before they ask again.
            at = max(
                turn.interruption.at * answer.seconds,
                end_of_turn + 2 * _MARGIN_SECONDS - answer_start,
            )
            if answer.seconds - at >= _MIN_INTERRUPTED_SECONDS:
                onset = answer_start + at
                # The user's channel starts a margin before the first word is heard.
                interrupts = onset + _MARGIN_SECONDS + turn.interruption.stop
                answer = truncate(answer, interrupts - answer_start)
        elif turn.backchannel is not None:
            events += _place_backchannel(
                turn.backchannel, user, synthesize, answer, answer_start, end_of_turn
            )
        assistant.place(answer, answer_start)
        cut = interrupts is not None
        events.append(_answer_event(answer_start, answer, turn.question.answer, cut=cut))
        quiet_since = max(end_of_turn, answer_start + answer.seconds)
        if onset is not None:
            begin = onset
        elif following is not None:
            begin = quiet_since + following.silence
    else:
        begin = script.seconds
    events += _silence_events(quiet_since, min(begin, script.seconds), None)
    kept = (_clip(event, script.seconds) for event in events)
    return Dialogue(
        user.pcm,
        assistant.pcm,
        sample_rate,
        tuple(user.words),
        tuple(assistant.words),
        tuple(sorted((e for e in kept if e is not None), key=lambda e: (e.start, e.end, e.kind))),
    )


def spoken(turn: Turn) -> str:
    """What the user says: the question, and what they stumble over."""
    slip = turn.disfluency
    if slip is None:
        return turn.question.text
    words = turn.question.text.split()
    return " ".join([*words[: slip.word], slip.text, *words[slip.word :]])


def _disfluency_event(turn: Turn, slip: Disfluency, utterance: Utterance, begin: float) -> Event:
    """Over the words of the slip, which a synthesizer gives as ``text.tokenize`` does."""
    first = len(tokenize(" ".join(turn.question.text.split()[: slip.word])))
    said = utterance.words[first : first + len(tokenize(slip.text))]
    return Event(
        kind="disfluency",
        channel=USER,
        start=begin + said[0].start,
        end=begin + said[-1].end,
        meta={"kind": slip.kind, "text": slip.text},
    )


def _clip(event: Event, seconds: float) -> Event | None:
    """The part of an event before the end; the end of a turn that never comes is no event."""
    if event.start >= seconds:
        return None
    return event if event.end <= seconds else event.model_copy(update={"end": seconds})


def _turn_event(question: Question | Exchange, start: float, end: float) -> Event:
    meta = {
        "start": start,
        "question": question.text,
        "answer": question.answer,
        "keys": list(question.keys),
        "category": question.category,
        "fact": question.fact,
    }
    return Event(kind="turn_end", channel=USER, start=end, end=end, meta=meta)


def _answer_event(start: float, utterance: Utterance, text: str, *, cut: bool) -> Event:
    return Event(
        kind="answer",
        channel=ASSISTANT,
        start=start,
        end=start + utterance.seconds,
        meta={"text": text, "cut": cut},
    )


def _silence_events(start: float, end: float, noise_dbfs: float | None) -> list[Event]:
    if end - start < _SILENCE_SECONDS:
        return []
    events = [Event(kind="silence", channel=USER, start=start, end=end)]
    if noise_dbfs is not None:
        # Away from both neighbours, so that the noise hides neither an answer nor a question.
        meta = {"dbfs": noise_dbfs}
        events.append(
            Event(kind="noise", channel=USER, start=start + 0.3, end=end - 0.3, meta=meta)
        )
    return events


def _place_backchannel(
    backchannel: Backchannel,
    user: _Track,
    synthesize: Synthesize,
    answer: Utterance,
    answer_start: float,
    end_of_turn: float,
) -> list[Event]:
    """Say it within the answer, or not at all.

    It would be too much where it outlasts the answer, or meets a question that the answer overlaps.
    """
    utterance = _trim(synthesize(backchannel.text, USER))
    offset = backchannel.at * answer.seconds
    start = answer_start + offset
    if offset + utterance.seconds + 0.2 > answer.seconds or start < end_of_turn + _MARGIN_SECONDS:
        return []
    user.place(utterance, start)
    return [
        Event(
            kind="backchannel",
            channel=USER,
            start=start + utterance.words[0].start,
            end=start + utterance.words[-1].end,
            meta={"text": backchannel.text},
        )
    ]


# --- Sound ----------------------------------------------------------------------------------------


def truncate(utterance: Utterance, seconds: float) -> Utterance:
    """Stop an utterance at ``seconds``: the voice fades out over 20 ms and is then gone.

    Words that had not begun are dropped, the one being said ends there.
    """
    length = min(round(seconds * utterance.sample_rate), len(utterance.pcm))
    pcm = utterance.pcm[:length].copy()
    fade = min(round(_FADE_SECONDS * utterance.sample_rate), length)
    pcm[length - fade :] *= _ramp(fade)[::-1]
    # A word of which only the faded onset would remain was never said.
    words = tuple(
        Word(word.text, word.start, min(word.end, seconds))
        for word in utterance.words
        if word.start < seconds - 2 * _FADE_SECONDS
    )
    return replace(utterance, pcm=pcm, words=words)


def _ramp(samples: int) -> npt.NDArray[np.float32]:
    """A raised cosine from 0 to 1, float32 [samples]."""
    return (0.5 - 0.5 * np.cos(np.pi * (np.arange(samples) + 0.5) / max(samples, 1))).astype(
        np.float32
    )


def _trim(utterance: Utterance) -> Utterance:
    """Cut the silence that engines put around an utterance: its ends are those of speech."""
    rate = utterance.sample_rate
    start = max(0.0, utterance.words[0].start - _MARGIN_SECONDS)
    first = round(start * rate)
    last = min(round((utterance.words[-1].end + _MARGIN_SECONDS) * rate), len(utterance.pcm))
    pcm = utterance.pcm[first:last].copy()
    fade = min(round(_FADE_SECONDS / 2 * rate), len(pcm) // 2)
    ramp = _ramp(fade)
    pcm[:fade] *= ramp
    pcm[len(pcm) - fade :] *= ramp[::-1]
    words = tuple(
        Word(word.text, word.start - first / rate, word.end - first / rate)
        for word in utterance.words
    )
    return replace(utterance, pcm=pcm, words=words)


def _with_pause(utterance: Utterance, pause: Pause) -> tuple[Utterance, tuple[float, float]]:
    """Insert silence before a word.

    The sentence keeps its intonation, so that the part before the pause sounds as unfinished as it
    is. Returns the utterance, and the start and end of the pause in it.
    """
    rate = utterance.sample_rate
    before, word = utterance.words[pause.word - 1], utterance.words[pause.word]
    cut = round((before.end + word.start) / 2 * rate)
    fade = min(round(_FADE_SECONDS / 2 * rate), cut, len(utterance.pcm) - cut)
    ramp = _ramp(fade)
    head, tail = utterance.pcm[:cut].copy(), utterance.pcm[cut:].copy()
    head[cut - fade :] *= ramp[::-1]
    tail[:fade] *= ramp
    silence = np.zeros(round(pause.seconds * rate), np.float32)
    shift = len(silence) / rate
    words = [*utterance.words[: pause.word]]
    words += [Word(w.text, w.start + shift, w.end + shift) for w in utterance.words[pause.word :]]
    longer = Utterance(np.concatenate([head, silence, tail]), rate, tuple(words))
    return longer, (before.end, word.start + shift)


# --- Cutting long conversations -------------------------------------------------------------------


def cut_words(words: Sequence[Word], start: float, end: float) -> tuple[Word, ...]:
    """The words that begin in ``start..end``, on a clock that starts at ``start``."""
    return tuple(
        Word(word.text, word.start - start, min(word.end, end) - start)
        for word in words
        if start <= word.start < end
    )


def cut_events(events: Sequence[Event], start: float, end: float) -> tuple[Event, ...]:
    """The events that overlap ``start..end``, clipped to it, on a clock that starts at ``start``.

    An instant belongs to the interval in which it lies, its start included.
    """
    kept = []
    for event in events:
        instant = event.start == event.end and start <= event.start < end
        if instant or (event.start < end and event.end > start):
            moved = {"start": max(event.start, start) - start, "end": min(event.end, end) - start}
            meta = dict(event.meta)
            if "start" in meta:
                meta["start"] = meta["start"] - start
            kept.append(event.model_copy(update={**moved, "meta": meta}))
    return tuple(kept)
