"""Held-out spoken questions: is the answer right, as text and as sound?

Questions that training never saw (see `synth_data.quiz`), from a panel of twelve (`panel`: ten
voices of training and two new speakers; or `--voices heldout`: the fourteen held-out voices, five
of them new speakers), are put to the model frame by frame, as in life: a little silence, the
question, silence until the answer is over. An answer is right when it names the key and no other
candidate of its kind (`quiz.score`). Judged are

    s2t_accuracy              what the model wrote that it says (inner monologue); also for each
                              category, for sums of held-out operands and for voices that are no
                              variant of a trained one
    s2s_accuracy              what pocketsphinx hears it say, with the language model `answers.arpa`
                              over all possible answers
    s2s_open_accuracy         the same with its own language model of general English
    s2s_reference_accuracy    what pocketsphinx with `answers.arpa` hears in the reference answers,
                              spoken by the assistant's TTS voice: the most that it can give
    s2s_chance_accuracy       the score of the spoken answers when each is held against the other
                              questions of its category: what a model that only knows the form gets
    unknown_accuracy          share of questions outside the world to which it says "I don't know"
    false_refusal             share of questions inside the world to which it does
    heard_wer                 word error rate of the model's own transcript of the questions
    heard_wer_ctc             the same of its tokenizer's, spelled letter by letter from the codes
    s2t_accuracy_first_minute, s2t_accuracy_tenth_minute
                              the same questions in the first and the last minute of ten-minute
                              conversations full of others
    digits_accuracy           recorded people say a digit; right = the next number (`recorded`)

`python -m speechlm.evaluation.spoken_qa` writes `answers.arpa` anew, after a change to the quiz
world; a test holds the two together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from audio_codec.audio import SAMPLE_RATE, Pcm, normalize
from audio_codec.audio import load as load_audio
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from speechlm.convert import load
from speechlm.evaluation.conversation import (
    Call,
    Model,
    Script,
    Talk,
    converse,
    find_speech,
    progress_bar,
)
from speechlm.evaluation.report import Metric, bootstrap_mean, proportion
from speechlm.evaluation.tokenizer import pad, pooled_wer, read
from synth_data import quiz
from synth_data.quiz import CATEGORIES, Question
from synth_data.recipes.speech import MANIFEST, read_manifest
from synth_data.tts import ASSISTANT, Voice, new_speakers, speak, user_voices
from synth_data.verify import Recognizer, save_language_model, word_errors

LANGUAGE_MODEL: Final = Path(__file__).with_name("answers.arpa")
"""Over all possible answers, for the recognizer: `arpa(quiz.all_answers())`."""

LONG_MINUTES: Final = 10
"""Length of a long conversation."""

DIGITS: Final = 200
"""Recorded digits that are put to a model."""

_KNOWN_VOICES = 10
_LEVEL_DBFS = (-30.0, -20.0)  # Of the user's voice.
_WAIT_SECONDS = (0.3, 1.5)  # Before a question.
_MARGIN_SECONDS = 0.2  # Kept around the speech that the recognizer is given.
_ARITHMETIC = ("plus", "minus", "times")
_MINUTE = 60.0  # Seconds.


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it will be put."""

    question: Question
    voice: Voice
    dbfs: float
    wait: float
    """Seconds of silence before it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a question."""

    asked: Asked
    at: float
    """Seconds from the start of the conversation to the question's first frame."""
    text: str
    """What the model wrote that it says."""
    heard: str
    """What it wrote that it heard."""
    pcm: Pcm
    """Its voice, [S], from the question's start until its answer was over."""


# --- What is asked --------------------------------------------------------------------------------


def draw_questions(
    count: int, rng: np.random.Generator, categories: Sequence[str] = CATEGORIES
) -> list[Question]:
    """Held-out questions, equally many of each category to within one, in random order.

    Half of the arithmetic, to within one, has held-out operands. A question that was drawn before
    is drawn again, up to a limit: some categories have few phrasings.
    """
    shares = {name: len(range(i, count, len(categories))) for i, name in enumerate(categories)}
    # Times tables are all trained, so that plus and minus carry the held-out half of all three.
    half = sum(shares.get(name, 0) for name in _ARITHMETIC) // 2
    bearers = [name for name in ("plus", "minus") if name in shares]
    heldout = {name: len(range(i, half, len(bearers))) for i, name in enumerate(bearers)}
    drawn: dict[Question, None] = {}
    chosen: list[Question] = []
    for category, share in shares.items():
        for index in range(share):
            wanted = index < heldout[category] if category in heldout else None
            attempts = 0
            while True:
                question = quiz.draw(rng, "heldout", category)
                attempts += 1
                fits = wanted is None or question.fact_heldout == wanted
                if fits and (question not in drawn or attempts > 100):
                    break
            drawn[question] = None
            chosen.append(question)
    return [chosen[int(i)] for i in rng.permutation(count)]


def assign(
    questions: Sequence[Question], voices: Sequence[Voice], rng: np.random.Generator
) -> list[Asked]:
    """Give each question a voice (all voices equally often, to within one), a level and a wait."""
    turns = np.resize(np.arange(len(voices)), len(questions))
    return [
        Asked(
            question,
            voices[int(voice)],
            float(rng.uniform(*_LEVEL_DBFS)),
            float(rng.uniform(*_WAIT_SECONDS)),
        )
        for question, voice in zip(questions, rng.permutation(turns), strict=True)
    ]


def asking(
    voices: Sequence[str] = ("panel",), engines: tuple[str, ...] = ("espeak", "flite")
) -> list[Voice]:
    """Who asks, each once: `panel`, `heldout` (all of those voices, by `engines`), voices by name.

    Raises UserError for an unknown voice, and as `user_voices` does.
    """
    found: list[Voice] = []
    for name in voices:
        if name == "panel":
            found += panel(engines)
        elif name == "heldout":
            found += user_voices("heldout", engines)
        elif ":" in name:
            found.append(Voice.parse(name))
        else:
            raise UserError(
                f"voices '{name}' are unknown; choices: panel, heldout, or voices by name, "
                "as 'espeak:en-us'."
            )
    return [*dict.fromkeys(found)]


def panel(engines: tuple[str, ...] = ("espeak", "flite")) -> list[Voice]:
    """Who asks: ten voices of training, spread over its list, and a new speaker of each engine.

    Raises UserError as `user_voices` does.
    """
    trained = user_voices("train", engines)
    known = [trained[i * (len(trained) - 1) // (_KNOWN_VOICES - 1)] for i in range(_KNOWN_VOICES)]
    new = {voice.engine: voice for voice in reversed(new_speakers(user_voices("heldout", engines)))}
    return [*dict.fromkeys(known), *(new[engine] for engine in sorted(new))]


# --- Asking ---------------------------------------------------------------------------------------


def _put(call: Call, asked: Asked) -> Script[Reply]:
    """Wait, ask, and listen until the answer is over."""
    yield from call.wait(asked.wait)
    call.forget()
    spoken = speak(asked.question.text, asked.voice)
    yield from call.say(normalize(spoken.pcm, asked.dbfs))
    yield from call.listen()
    return Reply(asked, call.since, call.text, call.heard, call.assistant)


def _ask_once(asked: Asked) -> Script[list[Reply]]:
    return [(yield from _put(Call(), asked))]


def _play(pcm: Pcm, wait: float) -> Script[str]:
    """Wait, play a recording, and listen until the answer is over; what was written as said."""
    call = Call()
    yield from call.wait(wait)
    yield from call.say(pcm)
    yield from call.listen()
    return call.text


def _ask_for_minutes(
    first: Sequence[Asked], between: Sequence[Asked], last: Sequence[Asked]
) -> Script[list[Reply]]:
    """Ask `first` in the first minute, `last` in the last, as many as there is time for.

    The answers in those two minutes are kept.
    """
    call = Call()
    replies: list[Reply] = []
    for questions, minute in ((first, 1), (between, LONG_MINUTES - 1), (last, LONG_MINUTES)):
        for asked in questions:
            if call.now + asked.wait >= minute * _MINUTE:
                break
            reply = yield from _put(call, asked)
            if questions is not between:
                replies.append(reply)
        yield from call.wait(minute * _MINUTE - call.now)
    return replies


def _seconds(asked: Asked) -> float:
    """Roughly how long a question, its answer and the silence around them take."""
    letters = len(asked.question.text) + len(asked.question.answer)
    return asked.wait + letters / 14 + 1.7


def recorded_digits(data: Path, count: int, rng: np.random.Generator) -> list[tuple[Pcm, Question]]:
    """Recordings [S] of people who say a digit, with the question that it is.

    Digits and speakers are drawn equally often, to within one. Raises UserError when `data` has no
    set of digits.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in read_manifest(data / MANIFEST, ("set", "text", "speaker", "path")):
        if row["set"] == "digits":
            groups[row["text"], row["speaker"]].append(row)
    if not groups:
        raise UserError(f"recorded '{data}': its manifest has no set 'digits'.")
    queues = [[rows[int(i)] for i in rng.permutation(len(rows))] for rows in groups.values()]
    order = [queues[int(i)] for i in rng.permutation(len(queues))]
    # In turn from each group, so that no digit and no speaker counts more than another.
    rows = [
        queue[place]
        for place in range(max(map(len, order)))
        for queue in order
        if place < len(queue)
    ]
    return [
        (
            normalize(load_audio(data / row["path"]), float(rng.uniform(*_LEVEL_DBFS))),
            quiz.number_alone(row["text"]),
        )
        for row in rows[:count]
    ]


# --- Judging --------------------------------------------------------------------------------------


def speech_of(pcm: Pcm) -> Pcm:
    """From the first to the last speech in `pcm` [S], with a margin; nothing where there is none.

    A recognizer that may only hear answers finds one in any noise.
    """
    found = find_speech(pcm)
    if not found:
        return pcm[:0]
    first = max(0.0, found[0].start - _MARGIN_SECONDS)
    return pcm[round(first * SAMPLE_RATE) : round((found[-1].end + _MARGIN_SECONDS) * SAMPLE_RATE)]


def chance_scores(questions: Sequence[Question], said: Sequence[str]) -> list[float]:
    """For each question, the share of the other answers of its category that would be right too.

    The expected score of answers shuffled within a category so that none stays in its place,
    computed over all of them instead of one shuffle. Left out: categories asked about once.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        members[question.category].append(index)
    return [
        float(
            np.mean(
                [quiz.score(said[other], questions[index]) for other in group if other != index]
            )
        )
        for group in members.values()
        if len(group) > 1
        for index in group
    ]


def _score(said: Sequence[str], questions: Sequence[Question]) -> Metric:
    right = sum(quiz.score(text, q) for text, q in zip(said, questions, strict=True))
    return proportion(right, len(questions))


def _text_score(replies: Sequence[Reply]) -> Metric:
    return _score([r.text for r in replies], [r.asked.question for r in replies])


def judge_text(
    inside: Sequence[Reply], outside: Sequence[Reply], categories: Sequence[str] = CATEGORIES
) -> dict[str, Metric]:
    """The metrics that need no recognizer: replies to questions of the world, and outside it."""
    new = set(new_speakers([r.asked.voice for r in inside]))
    refused = [sum(quiz.is_refusal(r.text) for r in replies) for replies in (outside, inside)]
    return {
        "s2t_accuracy": _text_score(inside),
        **{
            f"s2t_accuracy_{name}": _text_score(
                [r for r in inside if r.asked.question.category == name]
            )
            for name in categories
        },
        "s2t_accuracy_new_operands": _text_score(
            [
                r
                for r in inside
                if r.asked.question.fact_heldout and r.asked.question.category in _ARITHMETIC
            ]
        ),
        "s2t_accuracy_new_speakers": _text_score([r for r in inside if r.asked.voice in new]),
        "unknown_accuracy": proportion(refused[0], len(outside)),
        "false_refusal": proportion(refused[1], len(inside)),
        "heard_wer": pooled_wer(
            [word_errors(r.asked.question.text, r.heard) for r in (*inside, *outside)]
        ),
    }


def judge_minutes(replies: Sequence[Reply]) -> dict[str, Metric]:
    """Accuracy in the first and the tenth minute, by when the question was put."""
    return {
        f"s2t_accuracy_{name}_minute": _text_score(
            [reply for reply in replies if int(reply.at // _MINUTE) == minute]
        )
        for name, minute in (("first", 0), ("tenth", LONG_MINUTES - 1))
    }


def judge_speech(
    replies: Sequence[Reply], assistant: Voice = ASSISTANT, progress: bool = False
) -> dict[str, Metric]:
    """The metrics of an independent recognizer over the replies to questions of the world."""
    questions = [reply.asked.question for reply in replies]
    known, general = Recognizer(LANGUAGE_MODEL), Recognizer()
    said: list[str] = []
    said_openly: list[str] = []
    reference: list[str] = []
    with progress_bar(progress) as bar:
        for reply in bar.track(replies, description="recognizing"):
            speech = speech_of(reply.pcm)
            said.append(known.transcribe(speech))
            said_openly.append(general.transcribe(speech))
            spoken = speak(reply.asked.question.answer, assistant)
            reference.append(known.transcribe(spoken.pcm))
    return {
        "s2s_accuracy": _score(said, questions),
        "s2s_open_accuracy": _score(said_openly, questions),
        "s2s_reference_accuracy": _score(reference, questions),
        "s2s_chance_accuracy": bootstrap_mean(chance_scores(questions, said)),
    }


# --- The measurement ------------------------------------------------------------------------------


def evaluate(
    model: str = "tiny",
    *,
    seed: int = 0,
    questions: int = 300,
    unknown: int = 100,
    conversations: int = 8,
    slots: int = 16,
    voices: Sequence[str] = ("panel",),
    engines: tuple[str, ...] = ("espeak", "flite"),
    categories: Sequence[str] = CATEGORIES,
    assistant: str = str(ASSISTANT),
    recorded: Path | None = None,
    progress: bool = True,
) -> dict[str, Metric]:
    """Measure a model; the same numbers for the same seed, options and machine.

    Args:
        model: `"tiny"`, a directory or `hf://org/name`.
        seed: of the questions, of how they are put and of the model's own draws.
        questions: inside the world.
        unknown: outside the world.
        conversations: of ten minutes each, two or more; 0 leaves them out. They take about twice
            as long as all else.
        slots: conversations at a time.
        voices: who asks, see `asking`.
        engines: speech engines of `panel` and `heldout`.
        categories: what is asked about.
        assistant: the voice of the reference answers.
        recorded: a data folder with recorded digits, of which 200 are put to the model.
        progress: show on the terminal how far it has come.

    Raises:
        UserError: there is no such model, voice, category or recording, or a speech engine is not
            installed.
    """
    users = asking(voices, engines)
    categories = list(dict.fromkeys(categories))
    for category in categories:
        if category not in CATEGORIES:
            raise UserError(f"category '{category}' is unknown; choices: {', '.join(CATEGORIES)}.")
    digits = None
    if recorded is not None:
        digits = recorded_digits(recorded, DIGITS, np.random.default_rng([seed, 2]))
    reference = Voice.parse(assistant)
    for voice in (*users, reference):
        speak("one", voice)  # An engine that is not installed shows here, not after an hour.
    duplex = load(model)
    metrics = measure(
        duplex,
        users,
        reference,
        seed=seed,
        questions=questions,
        unknown=unknown,
        conversations=conversations,
        slots=slots,
        progress=progress,
        tokenizer=getattr(duplex.codec, "tokenizer", None),
        categories=categories,
    )
    if not duplex.model.streams.heard:
        reason = "the model writes no transcript of the user"
        metrics["heard_wer"] = Metric(None, reason=reason)
    reason = "no folder of recordings was given (--recorded)"
    metrics["digits_accuracy"] = (
        Metric(None, reason=reason)
        if digits is None
        else judge_digits(duplex, digits, seed=seed, slots=slots, progress=progress)
    )
    return metrics


@torch.inference_mode()
def judge_listening(tokenizer: SpeechTokenizer, asked: Sequence[Asked], batch: int = 16) -> Metric:
    """Word error rate of the tokenizer's own transcripts of questions."""
    errors = []
    for first in range(0, len(asked), batch):
        some = asked[first : first + batch]
        sounds = [normalize(speak(a.question.text, a.voice).pcm, a.dbfs) for a in some]
        said = read(tokenizer, *pad(tokenizer, sounds))
        errors += [word_errors(a.question.text, t) for a, t in zip(some, said, strict=True)]
    return pooled_wer(errors)


def judge_digits(
    model: Model,
    digits: Sequence[tuple[Pcm, Question]],
    *,
    seed: int,
    slots: int,
    progress: bool,
) -> Metric:
    """Share of recorded digits that are answered with the next number, as text."""
    talks = [
        Talk(_play(pcm, 0.5), _model_seed(seed, number), len(pcm) / SAMPLE_RATE + 3)
        for number, (pcm, _) in enumerate(digits)
    ]
    said = converse(model, talks, slots, "digits", progress)
    return _score(said, [question for _, question in digits])


def measure(
    model: Model,
    voices: Sequence[Voice],
    assistant: Voice = ASSISTANT,
    *,
    seed: int,
    questions: int,
    unknown: int,
    conversations: int,
    slots: int,
    progress: bool,
    tokenizer: SpeechTokenizer | None = None,
    categories: Sequence[str] = CATEGORIES,
) -> dict[str, Metric]:
    """`evaluate` for a model and voices at hand; `tokenizer` is the one that the model hears by."""
    rng = np.random.default_rng([seed, 0])
    inside = assign(draw_questions(questions, rng, categories), voices, rng)
    outside = assign(quiz.out_of_world("heldout", unknown, seed), voices, rng)
    talks = _long_talks(conversations, voices, seed, categories)
    talks += [
        Talk(_ask_once(asked), _model_seed(seed, conversations + index), _seconds(asked))
        for index, asked in enumerate((*inside, *outside))
    ]
    found = converse(model, talks, slots, "asking", progress)
    long, replies = found[:conversations], [reply for [reply] in found[conversations:]]
    metrics = judge_text(replies[:questions], replies[questions:], categories)
    metrics["heard_wer_ctc"] = (
        Metric(None, reason="the codec has no speech tokenizer in it")
        if tokenizer is None
        else judge_listening(tokenizer, (*inside, *outside))
    )
    if conversations:
        metrics |= judge_minutes([reply for talk in long for reply in talk])
    return metrics | judge_speech(replies[:questions], assistant, progress)


def _long_talks(
    count: int, voices: Sequence[Voice], seed: int, categories: Sequence[str] = CATEGORIES
) -> list[Talk[list[Reply]]]:
    """Ten-minute conversations, a voice each. What one is asked last, the next is asked first.

    So the two minutes differ in nothing but their place, and no model can remember the answer.
    """
    assert count != 1, "one conversation alone would be asked the same at both of its ends"
    rng = np.random.default_rng([seed, 1])
    # No question takes less than 2 s with its answer and the silence after it.
    ends = [draw_questions(30, rng, categories) for _ in range(count)]
    talks = []
    for index, voice in enumerate(np.resize(rng.permutation(len(voices)), count)):
        first, between, last = (
            assign(asked, [voices[int(voice)]], rng)
            for asked in (
                ends[index],
                draw_questions(240, rng, categories),
                ends[(index + 1) % count],
            )
        )
        script = _ask_for_minutes(first, between, last)
        talks.append(Talk(script, _model_seed(seed, index), LONG_MINUTES * _MINUTE))
    return talks


def _model_seed(seed: int, number: int) -> int:
    """A seed for each conversation, at most 2^63 − 1."""
    return (seed * 1_000_003 + number) % 2**63


if __name__ == "__main__":
    save_language_model(LANGUAGE_MODEL, quiz.all_answers())
