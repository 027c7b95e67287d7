"""Which words of a text are heard and which are read: the plan of an interleaved document.

Pure: word counts in, segments out. A reader of shards turns a text segment into pieces and a speech
segment into codec frames. Speech and text alternate in one sequence, so that a language model
learns both to read and to listen from the same next-token loss ("Scaling speech-text pre-training
with synthetic interleaved data", arXiv 2411.17607). Between two segments stands a switch token::

    the quick [brown fox jumped] over the lazy dog and [ran] into the dark ...
    text      speech             text                  speech text

Spans of speech are whole words or whole sentences (*units*), and cover a share η of them. Lengths
in words are Poisson distributed with a mean λ; a sentence is a span of its own. No two spans
overlap or touch, so that each change of modality is a real one. The placement is either *random*,
uniform among all placements there are, with exactly the share asked for; or *alternate*, where text
and speech take turns at an even rate, with the share asked for on average ("strict alternation").

Other shapes of a document make up the mixture: everything in speech and then in text (ASR), the
other way round (TTS), one change in the middle (continuation), a question and its answer each in
one modality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from synth_data.tts import Word

Modality = Literal["text", "speech"]

SpanRule = Literal["speech_first", "text_first"]
QuestionRule = Literal[
    "question_speech_answer_text",
    "question_text_answer_speech",
    "question_speech_answer_speech",
    "question_text_answer_text",
]
Rule = Literal[SpanRule, "asr", "tts", "continuation", QuestionRule]
"""How a document was laid out: in spans, of which the first is speech or text; wholly in speech and
then in text (asr), or the reverse (tts); its first part in one modality and the rest in the other;
or as two utterances, a question and its answer."""

SPAN_RULES: tuple[SpanRule, ...] = get_args(SpanRule)
QUESTION_RULES: tuple[QuestionRule, ...] = get_args(QuestionRule)
_QUESTION_ANSWER: dict[QuestionRule, tuple[Modality, Modality]] = {
    "question_speech_answer_text": ("speech", "text"),
    "question_text_answer_speech": ("text", "speech"),
    "question_speech_answer_speech": ("speech", "speech"),
    "question_text_answer_text": ("text", "text"),
}


class InterleaveConfig(BaseModel):
    """How documents are laid out in spans."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["word", "sentence"] = "word"
    """What a span is made of."""
    order: Literal["random", "alternate"] = "random"
    """Spans anywhere, or text and speech in strict turns."""
    mean_words: float = Field(default=10.0, gt=0)
    """Mean λ of the Poisson distributed length of a speech span, in words."""
    speech_ratio: float = Field(default=0.3, ge=0, le=1)
    """Fraction η of the words, or of the sentences, that are speech."""
    min_gap: int = Field(default=1, ge=1)
    """Words, or sentences, between two spans of speech at least."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Words ``start..end`` (end exclusive) of an utterance, in one modality."""

    modality: Modality
    start: int
    end: int
    utterance: int = 0
    """Which utterance of the document: 0, or 1 for the answer to a question."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The segments of a document in order; all words are in them, once each (asr, tts: twice)."""

    segments: tuple[Segment, ...]
    rule: Rule
    """Recorded with every sample, so that mixtures can be told apart afterwards."""


class WrittenSegment(BaseModel):
    """A segment as it stands in a sample: what it says, and where its codes are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modality: Modality
    text: str
    """In spoken form; of speech, too."""
    utterance: int = 0
    first: int = 0
    last: int = 0
    """Frames ``first..last`` (exclusive) of the sample's codes; none for text."""


def read_segments(meta: Mapping[str, Any]) -> list[WrittenSegment]:
    """The segments of an interleaved sample, from its ``meta``.

    Between two of different modality a language model puts a switch token.
    """
    return [WrittenSegment.model_validate(segment) for segment in meta["segments"]]


def interleave(
    rng: np.random.Generator,
    words: int,
    config: InterleaveConfig,
    sentences: Sequence[int] = (),
    first: Modality | None = None,
) -> Layout:
    """Lay out a text of so many words in spans.

    Args:
        rng: the source of every choice.
        words: number of words in the text, at least 1.
        config: unit, order, length and share of speech spans.
        sentences: where each sentence ends, in words, rising up to ``words``; needed where the
            unit is a sentence.
        first: what the document begins with, where its share leaves room for that; None: whatever
            comes.
    """
    if config.unit == "sentence":
        assert sentences and sentences[-1] == words, (sentences, words)
        bounds = [0, *sentences]
        mean: float | None = None
    else:
        bounds = list(range(words + 1))
        mean = config.mean_words
    units, ratio = len(bounds) - 1, config.speech_ratio
    if config.order == "random":
        spans = speech_spans(rng, units, mean, ratio, config.min_gap, first)
    else:
        spans = alternating_spans(rng, units, mean, ratio, config.min_gap, first)
    segments: list[Segment] = []
    position = 0
    for start, end in ((bounds[a], bounds[b]) for a, b in spans):
        if position < start:
            segments.append(Segment("text", position, start))
        segments.append(Segment("speech", start, end))
        position = end
    if position < words:
        segments.append(Segment("text", position, words))
    return Layout(
        tuple(segments), "speech_first" if segments[0].modality == "speech" else "text_first"
    )


def _length(rng: np.random.Generator, mean: float | None) -> int:
    """Units of one span: Poisson, at least 1; without a mean a single one."""
    return 1 if mean is None else max(1, int(rng.poisson(mean)))


def speech_spans(
    rng: np.random.Generator,
    units: int,
    mean: float | None,
    ratio: float,
    min_gap: int = 1,
    first: Modality | None = None,
) -> list[tuple[int, int]]:
    """Draw spans ``(start, end)`` that cover ``round(ratio * units)`` of the units, in order.

    Lengths are drawn until the share is reached, the last being cut to it; then they are placed
    uniformly among all placements with at least ``min_gap`` units between neighbours. Where there
    is no room for that (``ratio`` near 1), spans are joined until there is.

    Args:
        rng: the source of every choice.
        units: words or sentences, at least 1.
        mean: of a span's length; None: every span is one unit long.
        ratio: share of the units.
        min_gap: units between two spans.
        first: "speech": the first span begins at 0; "text": it does not; None: it may. Without
            speech, or without anything else, there is nothing to choose.
    """
    assert units >= 1, units
    wanted = round(ratio * units)
    lengths: list[int] = []
    covered = 0
    while covered < wanted:
        length = min(_length(rng, mean), wanted - covered)
        lengths.append(length)
        covered += length
    lead = int(first == "text" and 0 < wanted < units)
    while len(lengths) > 1 and (len(lengths) - 1) * min_gap + lead > units - wanted:
        lengths.append(lengths.pop() + lengths.pop())
    # Give each span but the last the gap that follows it; what is left are `slack` free units and
    # the spans, in any order: choose which of these places are spans.
    count = len(lengths)
    slack = units - wanted - max(0, count - 1) * min_gap - lead
    if first == "speech" and count:
        places = [0, *(1 + np.sort(rng.choice(slack + count - 1, size=count - 1, replace=False)))]
    else:
        places = [*np.sort(rng.choice(slack + count, size=count, replace=False))]
    order = rng.permutation(count)
    spans: list[tuple[int, int]] = []
    taken = lead
    for index, (place, which) in enumerate(zip(places, order, strict=True)):
        # Free units before it, plus the spans before it, each with the gap that follows.
        start = int(place) - index + taken
        spans.append((start, start + lengths[which]))
        taken += lengths[which] + min_gap
    return spans


def alternating_spans(
    rng: np.random.Generator,
    units: int,
    mean: float | None,
    ratio: float,
    min_gap: int = 1,
    first: Modality | None = None,
) -> list[tuple[int, int]]:
    """Spans and gaps in turns from the first unit on, both random in length, ``ratio`` on average.

    Gaps are Poisson distributed like spans, or, where a span is one unit, as even as they can be:
    with ``ratio`` 0.5 every other sentence is speech. Arguments as of ``speech_spans``; without a
    ``first``, speech begins in ``ratio`` of the documents.
    """
    assert units >= 1, units
    if ratio == 0:
        return []
    if ratio == 1:
        return [(0, units)]
    # Beyond the end is beyond the end: a share of nearly nothing must not overflow.
    gap_mean = min((1 if mean is None else mean) * (1 - ratio) / ratio, 1000.0 * units)
    spans: list[tuple[int, int]] = []

    def gap() -> int:
        drawn = math.floor(gap_mean + rng.random()) if mean is None else rng.poisson(gap_mean)
        return max(min_gap, int(drawn))

    speaks = first == "speech" or (first is None and bool(rng.random() < ratio))
    position = 0 if speaks else gap()
    while position < units:
        end = min(position + _length(rng, mean), units)
        spans.append((position, end))
        position = end + gap()
    return spans


def continuation(rng: np.random.Generator, words: int) -> Layout:
    """The first part in one modality, the rest, from any word on, in the other; either first."""
    assert words >= 2, words
    cut = int(rng.integers(1, words))
    kinds: tuple[Modality, Modality] = ("speech", "text")
    before, after = kinds if rng.random() < 0.5 else kinds[::-1]
    return Layout((Segment(before, 0, cut), Segment(after, cut, words)), "continuation")


def repetition(words: int, rule: Literal["asr", "tts"]) -> Layout:
    """All words in speech and then as text, as in recognition, or the other way round."""
    kinds: tuple[Modality, Modality] = ("speech", "text")
    before, after = kinds if rule == "asr" else kinds[::-1]
    return Layout((Segment(before, 0, words), Segment(after, 0, words)), rule)


def question_answer(question_words: int, answer_words: int, rule: QuestionRule) -> Layout:
    """A question (utterance 0) and its answer (utterance 1), each wholly in one modality."""
    asked, answered = _QUESTION_ANSWER[rule]
    segments = (Segment(asked, 0, question_words, 0), Segment(answered, 0, answer_words, 1))
    return Layout(segments, rule)


def choose(
    rng: np.random.Generator, weights: Mapping[Rule, float], among: Sequence[Rule]
) -> Rule | None:
    """Draw one of the rules ``among`` by their weights; None where all of them weigh nothing."""
    shares = np.array([weights.get(rule, 0.0) for rule in among])
    if not shares.any():
        return None
    return among[int(rng.choice(len(among), p=shares / shares.sum()))]


def frame_range(
    words: Sequence[Word], segment: Segment, frame_rate: float, frames: int
) -> tuple[int, int]:
    """The codec frames ``first..last`` (exclusive) that hold a segment's words.

    A frame belongs to the words that it overlaps; half of the silence to either neighbour is taken
    along (all of it at the ends of the utterance), since it carries the rhythm. Segments that do
    not touch have frames in common at most at their borders.

    Args:
        words: all words of the utterance, with their times.
        segment: which of them.
        frame_rate: frames a second.
        frames: length T of the utterance's codes.
    """
    assert 0 <= segment.start < segment.end <= len(words), segment
    start, end = 0.0, frames / frame_rate
    if segment.start > 0:
        start = (words[segment.start - 1].end + words[segment.start].start) / 2
    if segment.end < len(words):
        end = (words[segment.end - 1].end + words[segment.end].start) / 2
    first = min(math.floor(start * frame_rate), frames - 1)
    return first, min(max(math.ceil(end * frame_rate), first + 1), frames)
