"""Interleaved layouts: every word once, no two speech spans touching, the asked-for share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth_data.interleave import (
    InterleaveConfig,
    Segment,
    frame_range,
    interleave,
    question_answer,
    speech_spans,
)
from synth_data.tts import Word

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 400), st.floats(0.5, 30), st.floats(0, 1))
def test_spans_cover_their_share_and_never_touch(
    seed: int, words: int, mean: float, ratio: float
) -> None:
    spans = speech_spans(np.random.default_rng(seed), words, mean, ratio)
    assert sum(end - start for start, end in spans) == round(ratio * words)
    assert all(0 <= start < end <= words for start, end in spans)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))


@given(seeds, st.integers(1, 300), st.floats(0, 1))
def test_every_word_is_in_one_segment(seed: int, words: int, ratio: float) -> None:
    config = InterleaveConfig(speech_ratio=ratio)
    layout = interleave(np.random.default_rng(seed), words, config)
    assert layout.rule == "poisson"
    assert [w for s in layout.segments for w in range(s.start, s.end)] == list(range(words))
    changes = [(a.modality, b.modality) for a, b in itertools.pairwise(layout.segments)]
    assert all(before != after for before, after in changes)
    again = interleave(np.random.default_rng(seed), words, config)
    assert again == layout


def test_lengths_are_poisson_with_the_configured_mean() -> None:
    rng = np.random.default_rng(0)
    lengths = [end - start for start, end in speech_spans(rng, 60_000, 10.0, 0.3)]
    assert np.mean(lengths) == pytest.approx(10, abs=0.4)
    assert np.var(lengths) == pytest.approx(10, rel=0.2)


def test_spans_lie_anywhere() -> None:
    rng = np.random.default_rng(0)
    starts = [speech_spans(rng, 20, 3.0, 0.15)[0][0] for _ in range(4000)]
    counts = np.bincount(starts, minlength=18)
    # Three of twenty words, nearly always as one span: every start from 0 to 17 is as likely.
    assert counts[:18].min() > 120


@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_question_and_answer(seed: int, asked: int, answered: int) -> None:
    layout = question_answer(
        np.random.default_rng(seed),
        asked,
        answered,
        {"question_speech_answer_text": 1.0, "question_text_answer_speech": 1.0},
    )
    question, answer = layout.segments
    assert {question.modality, answer.modality} == {"text", "speech"}
    assert layout.rule == f"question_{question.modality}_answer_{answer.modality}"
    assert (question.start, question.end, question.utterance) == (0, asked, 0)
    assert (answer.start, answer.end, answer.utterance) == (0, answered, 1)


def test_question_and_answer_weights() -> None:
    rng = np.random.default_rng(0)
    weights = {"question_speech_answer_speech": 3.0, "question_text_answer_text": 1.0}
    rules = [question_answer(rng, 2, 3, weights).rule for _ in range(400)]
    assert rules.count("question_speech_answer_speech") / 400 == pytest.approx(0.75, abs=0.08)


def test_frames_of_words() -> None:
    words = [Word("a", 0.1, 0.4), Word("b", 0.5, 1.0), Word("c", 1.2, 1.9)]
    rate, frames = 12.5, 25
    assert frame_range(words, Segment("speech", 0, 3), rate, frames) == (0, 25)
    assert frame_range(words, Segment("speech", 1, 2), rate, frames) == (5, 14)
    assert frame_range(words, Segment("speech", 2, 3), rate, frames) == (13, 25)


@given(seeds, st.integers(1, 30))
def test_frame_ranges_are_valid_and_in_order(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    edges = np.cumsum(rng.uniform(0.01, 0.5, size=2 * count))
    words = [Word(str(i), float(edges[2 * i]), float(edges[2 * i + 1])) for i in range(count)]
    frames = int(np.ceil(edges[-1] * 12.5))
    layout = interleave(rng, count, InterleaveConfig(mean_words=2, speech_ratio=0.5))
    ranges = [frame_range(words, s, 12.5, frames) for s in layout.segments]
    assert all(0 <= first < last <= frames for first, last in ranges)
    assert ranges[0][0] == 0 and ranges[-1][1] == frames
    # Neighbours share the frame at their border at most, and leave none out.
    assert all(a[1] - 1 <= b[0] <= a[1] for a, b in itertools.pairwise(ranges))
