"""Turn taking: does it answer, wait, stop and keep silent when it should?

Users talk to the model by script and note what happened when; each event is then judged by sound
alone: *speech* is at least 240 ms above −40 dBFS (`conversation.find_speech`).

    turn_tor                 of turns that end: an answer starts 0–2 s after the end
    response_latency_ms      from the end of the turn to that start, median
    pause_tor                of pauses inside a question: there is speech
    silence_tor              of stretches in which nobody speaks, every other one with noise: there
                             is speech
    backchannel_tor          of "mm-hm"s while it speaks: speech starts, up to 2 s after, and does
                             not in the plain twin
    backchannel_stop_rate    of the same: its answer ends 0.5 s or more before the twin's
    echo_stop_rate           of answers during which its own voice comes back (−30…−10 dB,
                             50–300 ms later): the answer ends 0.5 s or more before the twin's
    echo_tor                 of the same: speech starts, up to 2 s after the answer, and not so in
                             the twin
    …_longer_rate            of either: the answer ends as much *later*
    interruption_stop_rate   of interruptions: silent within 480 ms, and for the 400 ms after
    interruption_stop_ms     from the user's first sound to that silence, median
    interruption_tor         of interruptions: the question that interrupted is answered (0–2 s)

(TOR: takeover rate, the term of Full-Duplex-Bench, arXiv 2503.04721, whose own definitions differ:
a takeover there takes 1 s of speech or more than 3 words.)

What would have happened otherwise is known, not guessed: every trial is held several times at once,
with the same model seed and the same question, and differs only from the event on:

    plain         what is | five ...         Five, six, seven, eight, nine, ten.
    interrupted   what is | five ...         Five, six, se~          ^ how do you spell ...
    backchannel   what is | five ...         Five, six, seven, eight, nine, ten.    ^ mm-hm
    echo          what is | five ...         Five, six, seven, eight, nine, ten.    ^ its own voice

An interruption counts as a trial when the plain one goes on for 1.5 s or longer from there; a
backchannel when it ends within the plain answer; an echo when the plain answer is 1.5 s or longer.
Trials that were not alike up to their event are left out.

What is drawn after an event is drawn anew, so an answer may differ from its twin's for no other
reason, and be shorter: what is chance in a stop rate, its `…_longer_rate` shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from audio_codec.audio import SAMPLE_RATE, Pcm, normalize
from speechlm.convert import load
from speechlm.evaluation.conversation import (
    FRAME_SECONDS,
    Call,
    Model,
    Script,
    Talk,
    converse,
    find_speech,
    silent_after,
)
from speechlm.evaluation.report import Metric, bootstrap_median, proportion
from synth_data import augment, dialogue, quiz
from synth_data.dialogue import ASSISTANT, USER
from synth_data.quiz import Question
from synth_data.shards import Event
from synth_data.tts import Utterance, Voice, speak, user_voices

ANSWER_WITHIN: Final = 2.0
"""Seconds after a turn's end in which its answer starts."""
STOP_WITHIN: Final = 0.48
"""Seconds after the start of an interruption within which the assistant is silent."""
GOES_ON: Final = 1.5
"""Seconds that an uninterrupted answer goes on for, for an interruption to count."""
EARLY: Final = 0.5
"""Seconds by which an answer ends before its plain twin when it was cut."""

_LONG_ANSWERS = ("counting", "spelling", "repeat", "identity")
_LONG_WORDS = 6  # Of an answer long enough to break into: 2 s and more.
_UNKNOWN = 0.12  # Share of the turns from outside the world.
_PAUSE_SECONDS = (0.5, 1.5)
_SILENCE_SECONDS = (3.0, 8.0)
_NOISE_DBFS = (-50.0, -25.0)
_AFTER_NOISE = 1.2  # Seconds of silence after a noise.
_ECHO_DB = (-30.0, -10.0)
_ECHO_SECONDS = (0.05, 0.3)
_LEVEL_DBFS = (-30.0, -20.0)  # Of the user's voice.
_LEAD_SECONDS = (0.3, 1.0)
_AFTERMATH = 1.2  # Seconds after an answer that is over: with `listen`'s, more than ANSWER_WITHIN.
_MARGIN = 0.03  # Seconds kept around the words that a user says.
_FADE = 0.01  # Seconds in which a voice that pauses fades: shorter clicks.
_INTO_ANSWER = (0.4, 1.0)  # Seconds from the start of an answer to what the user does during it.


# --- Verdicts -------------------------------------------------------------------------------------
#
# pcm: what sounded from the assistant, [S], on the clock of the times.


def response_time(pcm: Pcm, end: float) -> float | None:
    """Seconds from the end of a turn to the first speech that starts within 2 s of it."""
    return next(
        (s.start - end for s in find_speech(pcm) if 0 <= s.start - end <= ANSWER_WITHIN), None
    )


def speaks(pcm: Pcm, start: float, end: float) -> bool:
    """Whether there is speech in `start..end`, be it that it began before or ends after."""
    return any(speech.start < end and speech.end > start for speech in find_speech(pcm))


def starts(pcm: Pcm, start: float, end: float) -> bool:
    """Whether speech starts in `start..end`."""
    return any(start <= speech.start <= end for speech in find_speech(pcm))


def stops(pcm: Pcm, at: float) -> float | None:
    """Seconds from an interruption to the assistant's silence, if it stops as it should."""
    after = silent_after(pcm, at)
    return after if after <= STOP_WITHIN else None


def ends_early(pcm: Pcm, plain: Pcm, at: float) -> bool:
    """Whether what sounds at `at` falls silent (for 400 ms) well before its plain twin."""
    return silent_after(pcm, at) < silent_after(plain, at) - EARLY


def ends_late(pcm: Pcm, plain: Pcm, at: float) -> bool:
    """Whether it does so as much after its plain twin: nothing but chance makes it go on longer."""
    return ends_early(plain, pcm, at)


def alike(one: Pcm, other: Pcm, end: float) -> bool:
    """Whether two twins were the same up to `end`, to within rounding: their slots differ."""
    last = round(end * SAMPLE_RATE)
    return np.allclose(one[:last], other[:last], rtol=0, atol=1e-3)


# --- What users say -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """Something a user says: its sound, and in it, in seconds, where the words are."""

    pcm: Pcm  # [S]
    start: float
    """Of the first word."""
    end: float
    """Of the last word."""
    pause: tuple[float, float] | None = None
    """Start and end of the hesitation in it."""


def spoken(
    utterance: Utterance, dbfs: float, offset: float, pause: dialogue.Pause | None = None
) -> Line:
    """An utterance as a user says it: `offset` seconds of silence, then the words at a level.

    What an engine puts around the words is cut off; so is the voice at a pause, with short fades.
    """
    words, rate = utterance.words, utterance.sample_rate
    first = max(0, round((words[0].start - _MARGIN) * rate))
    last = round((words[-1].end + _MARGIN) * rate)
    parts = [normalize(utterance.pcm[first:last], dbfs)]
    added, hesitation = 0, None
    if pause is not None:
        before, after = words[pause.word - 1].end, words[pause.word].start
        cut = round((before + after) / 2 * rate) - first
        added = round(pause.seconds * rate)
        head, tail = parts[0][:cut].copy(), parts[0][cut:].copy()
        fade = min(round(_FADE * rate), len(head), len(tail))
        ramp = np.linspace(0, 1, fade, endpoint=False, dtype=np.float32)
        head[len(head) - fade :] *= ramp[::-1]
        tail[:fade] *= ramp
        parts = [head, np.zeros(added, np.float32), tail]
    lead = round(offset * rate)
    shift = (lead - first) / rate
    if pause is not None:
        hesitation = (before + shift, after + shift + added / rate)
    return Line(
        np.concatenate([np.zeros(lead, np.float32), *parts]),
        words[0].start + shift,
        words[-1].end + shift + added / rate,
        hesitation,
    )


@dataclass(frozen=True, slots=True)
class Take:
    """One talk as it went."""

    events: tuple[Event, ...]
    assistant: Pcm  # [S] on the clock of the events

    def event(self, kind: str) -> Event | None:
        """The first event of a kind."""
        return next((event for event in self.events if event.kind == kind), None)


def _say(call: Call, line: Line, kind: str, events: list[Event]) -> Script[None]:
    """Say a line; note it as an event of that kind, and a pause in it as another."""
    began = call.now
    yield from call.say(line.pcm)
    events.append(Event(kind=kind, channel=USER, start=began + line.start, end=began + line.end))
    if line.pause is not None:
        start, end = (began + edge for edge in line.pause)
        events.append(Event(kind="pause", channel=USER, start=start, end=end))


def _say_nothing(call: Call, room: Pcm, events: list[Event]) -> Script[None]:
    """Let the room be heard, [S]."""
    began = call.now
    yield from call.say(room)
    events.append(Event(kind="silence", channel=USER, start=began, end=call.now))


def _calm(line: Line, before: Pcm, after: Pcm) -> Script[Take]:
    """Silence, a question, its answer, silence."""
    call, events = Call(), list[Event]()
    yield from _say_nothing(call, before, events)
    yield from _say(call, line, "turn", events)
    yield from call.listen()
    yield from _say_nothing(call, after, events)
    return Take(tuple(events), call.assistant)


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What happens to an answer, and how long after its start."""

    kind: str  # "interruption" or "backchannel"
    line: Line
    after: float


def _busy(
    line: Line, lead: float, disturbance: Disturbance | None, echo: tuple[float, float] | None
) -> Script[Take]:
    """A question, and something that happens while it is answered."""
    call, events = Call(echo), list[Event]()
    yield from call.wait(lead)
    yield from _say(call, line, "turn", events)
    onset = yield from call.await_speech()
    if onset is not None:
        events.append(Event(kind="answer", channel=ASSISTANT, start=onset, end=onset))
        if disturbance is not None:
            yield from call.wait(onset + disturbance.after - call.now)
            yield from _say(call, disturbance.line, disturbance.kind, events)
    yield from call.listen()
    yield from call.wait(_AFTERMATH)
    return Take(tuple(events), call.assistant)


# --- Trials ---------------------------------------------------------------------------------------

VARIANTS: Final = ("plain", "interruption", "backchannel", "echo")
"""In which a trial of what happens during an answer is held."""


def _line(
    rng: np.random.Generator, text: str, voice: Voice, pause: dialogue.Pause | None = None
) -> Line:
    # Users do not wait for the start of a frame.
    offset = rng.uniform(0, FRAME_SECONDS)
    return spoken(speak(text, voice), rng.uniform(*_LEVEL_DBFS), offset, pause)


def _room(rng: np.random.Generator, noisy: bool) -> Pcm:
    """Some seconds of nobody speaking, [S]. Noise leaves the end free: some models answer it."""
    samples = round(rng.uniform(*_SILENCE_SECONDS) * SAMPLE_RATE)
    room = np.zeros(samples, np.float32)
    if noisy:
        draw = augment.white if rng.random() < 0.5 else augment.pink
        noise = draw(samples - round(_AFTER_NOISE * SAMPLE_RATE), rng)
        room[: len(noise)] = normalize(noise, rng.uniform(*_NOISE_DBFS))
    return room


def _draw(rng: np.random.Generator, opener: float = 0.12) -> Question:
    category = quiz.UNKNOWN if rng.random() < _UNKNOWN else _pick(rng, quiz.CATEGORIES)
    return quiz.draw(rng, "heldout", category, opener=opener)


def _draw_hesitant(rng: np.random.Generator) -> Question:
    """One whose beginning is no question yet."""
    while not (question := _draw(rng)).pause:
        pass
    return question


def _draw_long(rng: np.random.Generator) -> Question:
    """One with an answer long enough to break into."""
    while True:
        question = quiz.draw(rng, "heldout", _pick(rng, _LONG_ANSWERS))
        if len(question.answer.split()) >= _LONG_WORDS:
            return question


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _calm_talk(rng: np.random.Generator, voice: Voice, index: int) -> Script[Take]:
    # The first silence of every even talk has noise in it, the last of every odd one.
    before, after = _room(rng, index % 2 == 0), _room(rng, index % 2 == 1)
    return _calm(_line(rng, _draw(rng).text, voice), before, after)


def _hesitant_talk(rng: np.random.Generator, voice: Voice) -> Script[Take]:
    question = _draw_hesitant(rng)
    assert question.pause
    first, last = question.pause
    pause = dialogue.Pause(int(rng.integers(first, last + 1)), rng.uniform(*_PAUSE_SECONDS))
    return _busy(_line(rng, question.text, voice, pause), rng.uniform(*_LEAD_SECONDS), None, None)


def _busy_talks(rng: np.random.Generator, voice: Voice) -> list[Script[Take]]:
    """The same trial in each of its variants."""
    line, lead = _line(rng, _draw_long(rng).text, voice), rng.uniform(*_LEAD_SECONDS)
    # An opener ("Okay, ...") would sound like a backchannel until it is too late to stop.
    said = {
        "interruption": _line(rng, _draw(rng, opener=0.0).text, voice),
        "backchannel": _line(rng, _pick(rng, dialogue.BACKCHANNELS), voice),
    }
    disturbances = {
        kind: Disturbance(kind, words, rng.uniform(*_INTO_ANSWER)) for kind, words in said.items()
    }
    echo = (rng.uniform(*_ECHO_DB), rng.uniform(*_ECHO_SECONDS))
    return [
        _busy(line, lead, disturbances.get(variant), echo if variant == "echo" else None)
        for variant in VARIANTS
    ]


# --- The measurement ------------------------------------------------------------------------------


def evaluate(
    model: str = "tiny",
    *,
    seed: int = 0,
    trials: int = 60,
    slots: int = 32,
    engines: tuple[str, ...] = ("espeak", "flite"),
    progress: bool = True,
) -> dict[str, Metric]:
    """Measure a model; the same numbers for the same seed, options and machine.

    Args:
        model: `"tiny"`, a directory or `hf://org/name`.
        seed: of what the users say and do, and of the model's own draws.
        trials: of each kind: calm talks, hesitant questions, answers with something happening.
        slots: talks at a time.
        engines: speech engines of the users' voices.
        progress: show on the terminal how far it has come.

    Raises:
        UserError: there is no such model, or a speech engine is not installed.
    """
    users = user_voices("heldout", engines)
    for voice in users:
        speak("one", voice)  # An engine that is not installed shows here.
    return measure(load(model), users, seed=seed, trials=trials, slots=slots, progress=progress)


def measure(
    model: Model,
    voices: Sequence[Voice],
    *,
    seed: int,
    trials: int,
    slots: int,
    progress: bool,
) -> dict[str, Metric]:
    """`evaluate` for a model and voices at hand."""
    rng = np.random.default_rng(seed)
    turns = rng.permutation(np.resize(np.arange(len(voices)), trials))
    speakers = [voices[int(turn)] for turn in turns]
    talks: list[Talk[Take]] = []

    def add(number: int, script: Script[Take], seconds: float) -> None:
        # Below 2^63 for any seed; the same for the variants of a trial.
        talks.append(Talk(script, (seed * 1_000_003 + number) % 2**63, seconds))

    for index, voice in enumerate(speakers):
        add(3 * index, _calm_talk(rng, voice, index), 17)
    for index, voice in enumerate(speakers):
        add(3 * index + 1, _hesitant_talk(rng, voice), 9)
    for index, voice in enumerate(speakers):
        for script in _busy_talks(rng, voice):
            add(3 * index + 2, script, 10)
    takes = converse(model, talks, slots, "taking turns", progress)
    busy = takes[2 * trials :]
    groups = [
        dict(zip(VARIANTS, busy[start : start + len(VARIANTS)], strict=True))
        for start in range(0, len(busy), len(VARIANTS))
    ]
    # Of the variants of a trial only the plain one is a turn of its own.
    turns_taken = [*takes[: 2 * trials], *(group["plain"] for group in groups)]
    return (
        judge_turns(turns_taken)
        | judge_interruptions([(group["plain"], group["interruption"]) for group in groups])
        | judge_backchannels([(group["plain"], group["backchannel"]) for group in groups])
        | judge_echoes([(group["plain"], group["echo"]) for group in groups])
    )


def _share(verdicts: Sequence[bool]) -> Metric:
    return proportion(sum(verdicts), len(verdicts))


def judge_turns(takes: Sequence[Take]) -> dict[str, Metric]:
    """What it does at the ends of turns, in pauses and in silence."""
    times = [
        response_time(take.assistant, event.end)
        for take in takes
        for event in take.events
        if event.kind == "turn"
    ]
    spoke = {
        kind: [
            speaks(take.assistant, event.start, event.end)
            for take in takes
            for event in take.events
            if event.kind == kind
        ]
        for kind in ("pause", "silence")
    }
    return {
        "turn_tor": _share([time is not None for time in times]),
        "response_latency_ms": bootstrap_median(
            [1000 * time for time in times if time is not None], "ms"
        ),
        "pause_tor": _share(spoke["pause"]),
        "silence_tor": _share(spoke["silence"]),
    }


def judge_interruptions(twins: Sequence[tuple[Take, Take]]) -> dict[str, Metric]:
    """(plain, interrupted) takes."""
    times: list[float | None] = []
    answered: list[bool] = []
    for plain, take in twins:
        event = take.event("interruption")
        if event is None or not alike(plain.assistant, take.assistant, event.start):
            continue
        if silent_after(plain.assistant, event.start) < GOES_ON:
            continue
        times.append(stops(take.assistant, event.start))
        answered.append(response_time(take.assistant, event.end) is not None)
    stopped = [time for time in times if time is not None]
    return {
        "interruption_stop_rate": proportion(len(stopped), len(times)),
        "interruption_stop_ms": bootstrap_median([1000 * time for time in stopped], "ms"),
        "interruption_tor": _share(answered),
    }


def judge_backchannels(twins: Sequence[tuple[Take, Take]]) -> dict[str, Metric]:
    """(plain, backchanneled) takes."""
    started: list[bool] = []
    stopped: list[bool] = []
    longer: list[bool] = []
    for plain, take in twins:
        event = take.event("backchannel")
        if event is None or not alike(plain.assistant, take.assistant, event.start):
            continue
        rest = silent_after(plain.assistant, event.start)
        if rest < event.end - event.start:
            continue
        one, other = (
            starts(who.assistant, event.start, event.end + ANSWER_WITHIN) for who in (take, plain)
        )
        started.append(one and not other)
        if rest > EARLY:  # else it cannot end so early
            stopped.append(ends_early(take.assistant, plain.assistant, event.start))
            longer.append(ends_late(take.assistant, plain.assistant, event.start))
    return {
        "backchannel_tor": _share(started),
        "backchannel_stop_rate": _share(stopped),
        "backchannel_longer_rate": _share(longer),
    }


def judge_echoes(twins: Sequence[tuple[Take, Take]]) -> dict[str, Metric]:
    """(plain, echoed) takes."""
    started: list[bool] = []
    stopped: list[bool] = []
    longer: list[bool] = []
    for plain, take in twins:
        # The plain one's: an answer that its echo silences at once is none in the other take.
        answer = plain.event("answer")
        if answer is None or not alike(plain.assistant, take.assistant, answer.start):
            continue
        if silent_after(plain.assistant, answer.start) < GOES_ON:
            continue
        one, other = (_starts_again(who.assistant, answer.start) for who in (take, plain))
        started.append(one and not other)
        stopped.append(ends_early(take.assistant, plain.assistant, answer.start))
        longer.append(ends_late(take.assistant, plain.assistant, answer.start))
    return {
        "echo_stop_rate": _share(stopped),
        "echo_tor": _share(started),
        "echo_longer_rate": _share(longer),
    }


def _starts_again(pcm: Pcm, at: float) -> bool:
    """Whether there is speech soon after what sounds at `at` has ended."""
    end = at + silent_after(pcm, at)
    return starts(pcm, end, end + ANSWER_WITHIN)
