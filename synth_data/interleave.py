"""Which words of a text are heard and which are read: the plan of an interleaved document.

Pure: word counts in, segments out. A reader of shards turns a text segment into pieces and a speech
segment into the codec frames of its words (``frame_range``). Speech and text spans alternate in one
sequence, so that a language model learns both to read and to listen from the same next-token loss
("Scaling speech-text pre-training with synthetic interleaved data", arXiv 2411.17607)::

    the quick [brown fox jumped] over the lazy dog and [ran] into the dark ...
    text      speech             text                  speech text

Lengths of speech spans are Poisson distributed with a mean of ten words, and cover 30% of the text.
No two overlap or touch, so that each change of modality is a real one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from synth_data.tts import Word

Modality = Literal["text", "speech"]

Rule = Literal[
    "poisson",
    "question_speech_answer_text",
    "question_text_answer_speech",
    "question_speech_answer_speech",
    "question_text_answer_text",
]
"""How a document was laid out. The last four have two utterances, a question and its answer."""

_QUESTION_ANSWER: dict[Rule, tuple[Modality, Modality]] = {
    "question_speech_answer_text": ("speech", "text"),
    "question_text_answer_speech": ("text", "speech"),
    "question_speech_answer_speech": ("speech", "speech"),
    "question_text_answer_text": ("text", "text"),
}


class InterleaveConfig(BaseModel):
    """How documents are laid out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_words: float = Field(default=10.0, gt=0)
    """Mean λ of the Poisson distributed length of a speech span, in words."""
    speech_ratio: float = Field(default=0.3, ge=0, le=1)
    """Fraction η of the words that are speech."""


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
    """The segments of a document in order; all words are in them, once each."""

    segments: tuple[Segment, ...]
    rule: Rule
    """Recorded with every sample, so that mixtures can be told apart afterwards."""


def interleave(rng: np.random.Generator, words: int, config: InterleaveConfig) -> Layout:
    """Lay out a text of so many words.

    Args:
        rng: the source of every choice.
        words: number of words in the text, at least 1.
        config: length and share of speech spans.
    """
    segments: list[Segment] = []
    position = 0
    for start, end in speech_spans(rng, words, config.mean_words, config.speech_ratio):
        if position < start:
            segments.append(Segment("text", position, start))
        segments.append(Segment("speech", start, end))
        position = end
    if position < words:
        segments.append(Segment("text", position, words))
    return Layout(tuple(segments), "poisson")


def speech_spans(
    rng: np.random.Generator, words: int, mean_words: float, ratio: float
) -> list[tuple[int, int]]:
    """Draw spans ``(start, end)`` that cover ``round(ratio * words)`` of the words, in order.

    Lengths are drawn until the share is reached, the last being cut to it; then they are placed
    uniformly among all placements with at least one word between neighbours. Where there is no
    room for that (``ratio`` near 1), spans are joined until there is.
    """
    assert words >= 1, words
    wanted = round(ratio * words)
    lengths: list[int] = []
    covered = 0
    while covered < wanted:
        length = min(max(1, int(rng.poisson(mean_words))), wanted - covered)
        lengths.append(length)
        covered += length
    while len(lengths) - 1 > words - wanted:
        lengths.append(lengths.pop() + lengths.pop())
    # Give each span but the last the word that follows it; what is left are `slack` free words and
    # the spans, in any order: choose which of these places are spans.
    slack = words - wanted - max(0, len(lengths) - 1)
    places = np.sort(rng.choice(slack + len(lengths), size=len(lengths), replace=False))
    order = rng.permutation(len(lengths))
    spans: list[tuple[int, int]] = []
    taken = 0
    for index, (place, which) in enumerate(zip(places, order, strict=True)):
        # Free words before it, plus the spans before it, each with the word that follows.
        start = int(place) - index + taken
        spans.append((start, start + lengths[which]))
        taken += lengths[which] + 1
    return spans


def question_answer(
    rng: np.random.Generator,
    question_words: int,
    answer_words: int,
    weights: Mapping[Rule, float],
) -> Layout:
    """Lay out a question and its answer, each wholly in one modality.

    Args:
        rng: the source of every choice.
        question_words: words of utterance 0.
        answer_words: words of utterance 1.
        weights: relative frequency of each rule; rules that are not named do not occur.
    """
    rules = list(weights)
    assert rules and set(rules) <= set(_QUESTION_ANSWER), rules
    shares = np.array([weights[rule] for rule in rules], dtype=float)
    rule = rules[int(rng.choice(len(rules), p=shares / shares.sum()))]
    asked, answered = _QUESTION_ANSWER[rule]
    segments = (Segment(asked, 0, question_words, 0), Segment(answered, 0, answer_words, 1))
    return Layout(segments, rule)


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
