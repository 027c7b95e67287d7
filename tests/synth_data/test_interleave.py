"""Interleaved layouts: every word once, no two speech spans touching, the asked-for share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth_data.interleave import (
    QUESTION_RULES,
    InterleaveConfig,
    Layout,
    Modality,
    Segment,
    WrittenSegment,
    alternating_spans,
    choose,
    continuation,
    frame_range,
    interleave,
    question_answer,
    read_segments,
    repetition,
    speech_spans,
)
from synth_data.tts import Word

seeds = st.integers(0, 2**32 - 1)
firsts = st.sampled_from([None, "speech", "text"])
means = st.one_of(st.none(), st.floats(0.5, 30))


def words_of(layout: Layout) -> list[int]:
    return [word for s in layout.segments for word in range(s.start, s.end)]


@given(seeds, st.integers(1, 400), means, st.floats(0, 1), st.integers(1, 5), firsts)
def test_spans_cover_their_share_and_never_touch(
    seed: int,
    units: int,
    mean: float | None,
    ratio: float,
    gap: int,
    first: Modality | None,
) -> None:
    spans = speech_spans(np.random.default_rng(seed), units, mean, ratio, gap, first)
    wanted = round(ratio * units)
    assert sum(end - start for start, end in spans) == wanted
    assert all(0 <= start < end <= units for start, end in spans)
    assert all(a[1] + gap <= b[0] for a, b in itertools.pairwise(spans))
    if 0 < wanted < units and first is not None:
        assert (spans[0][0] == 0) == (first == "speech")


@given(seeds, st.integers(1, 400), means, st.floats(0, 1), st.integers(1, 5), firsts)
def test_alternating_spans_never_touch(
    seed: int,
    units: int,
    mean: float | None,
    ratio: float,
    gap: int,
    first: Modality | None,
) -> None:
    spans = alternating_spans(np.random.default_rng(seed), units, mean, ratio, gap, first)
    assert all(0 <= start < end <= units for start, end in spans)
    assert all(a[1] + gap <= b[0] for a, b in itertools.pairwise(spans))
    if 0 < ratio < 1 and first is not None:
        assert bool(spans and spans[0][0] == 0) == (first == "speech")
    assert (spans == []) if ratio == 0 else (ratio < 1 or spans == [(0, units)])


@given(
    seeds,
    st.lists(st.integers(1, 30), min_size=1, max_size=30),
    st.floats(0, 1),
    st.sampled_from(["word", "sentence"]),
    st.sampled_from(["random", "alternate"]),
    firsts,
)
def test_every_word_is_in_one_segment(
    seed: int, sizes: list[int], ratio: float, unit: str, order: str, first: Modality | None
) -> None:
    config = InterleaveConfig.model_validate(
        {"speech_ratio": ratio, "unit": unit, "order": order, "mean_words": 5}
    )
    ends = list(itertools.accumulate(sizes))
    layout = interleave(np.random.default_rng(seed), ends[-1], config, ends, first)
    assert words_of(layout) == list(range(ends[-1]))
    changes = [(a.modality, b.modality) for a, b in itertools.pairwise(layout.segments)]
    assert all(before != after for before, after in changes)
    assert layout.rule == f"{layout.segments[0].modality}_first"
    if unit == "sentence":
        assert {s.end for s in layout.segments} <= set(ends)
    assert interleave(np.random.default_rng(seed), ends[-1], config, ends, first) == layout


def test_lengths_are_poisson_with_the_configured_mean() -> None:
    rng = np.random.default_rng(0)
    lengths = [end - start for start, end in speech_spans(rng, 60_000, 10.0, 0.3)]
    assert np.mean(lengths) == pytest.approx(10, abs=0.4)
    assert np.var(lengths) == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("mean", [10.0, None])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_alternation_keeps_the_share_on_average(mean: float | None, ratio: float) -> None:
    spans = alternating_spans(np.random.default_rng(0), 60_000, mean, ratio)
    assert sum(end - start for start, end in spans) / 60_000 == pytest.approx(ratio, abs=0.01)


def test_half_of_the_sentences_alternate_strictly() -> None:
    spans = alternating_spans(np.random.default_rng(0), 9, None, 0.5, first="speech")
    assert spans == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


def test_spans_lie_anywhere() -> None:
    rng = np.random.default_rng(0)
    starts = [speech_spans(rng, 20, 3.0, 0.15)[0][0] for _ in range(4000)]
    counts = np.bincount(starts, minlength=18)
    # Three of twenty words, nearly always as one span: every start from 0 to 17 is as likely.
    assert counts[:18].min() > 120


@given(seeds, st.integers(2, 50))
def test_a_continuation_changes_once(seed: int, words: int) -> None:
    layout = continuation(np.random.default_rng(seed), words)
    assert words_of(layout) == list(range(words)) and layout.rule == "continuation"
    assert {s.modality for s in layout.segments} == {"speech", "text"}


def test_a_continuation_begins_either_way_and_anywhere() -> None:
    rng = np.random.default_rng(0)
    found = {(s[0].modality, s[0].end) for s in (continuation(rng, 4).segments for _ in range(200))}
    assert found == {(kind, cut) for kind in ("speech", "text") for cut in (1, 2, 3)}


def test_recognition_and_synthesis_say_everything_twice() -> None:
    for rule, kinds in (("asr", ["speech", "text"]), ("tts", ["text", "speech"])):
        layout = repetition(7, rule)  # type: ignore[arg-type]
        assert [s.modality for s in layout.segments] == kinds and layout.rule == rule
        assert [(s.start, s.end) for s in layout.segments] == [(0, 7), (0, 7)]


@pytest.mark.parametrize("rule", QUESTION_RULES)
def test_question_and_answer(rule: str) -> None:
    layout = question_answer(3, 5, rule)  # type: ignore[arg-type]
    question, answer = layout.segments
    assert layout.rule == rule == f"question_{question.modality}_answer_{answer.modality}"
    assert (question.start, question.end, question.utterance) == (0, 3, 0)
    assert (answer.start, answer.end, answer.utterance) == (0, 5, 1)


def test_rules_are_drawn_by_weight_among_those_that_fit() -> None:
    rng = np.random.default_rng(0)
    weights = {"asr": 3.0, "tts": 1.0, "question_text_answer_text": 90.0}
    drawn = [choose(rng, weights, ("asr", "tts", "continuation")) for _ in range(400)]  # type: ignore[arg-type]
    assert drawn.count("asr") / 400 == pytest.approx(0.75, abs=0.08)
    assert set(drawn) == {"asr", "tts"}
    assert choose(rng, weights, ("continuation",)) is None  # type: ignore[arg-type]


def test_segments_come_back_from_a_sample() -> None:
    written = [
        WrittenSegment(modality="text", text="the cat"),
        WrittenSegment(modality="speech", text="sat", first=0, last=4),
    ]
    assert read_segments({"segments": [s.model_dump() for s in written]}) == written


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
