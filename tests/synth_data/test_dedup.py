"""Duplicates: all of them found, nothing else dropped, in no more memory than was allowed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth_data import bench
from synth_data.dedup import (
    EXACT,
    KEPT,
    NEAR,
    DedupConfig,
    Heldout,
    banding,
    deduplicate,
    duplicates,
    jaccard,
    shingles,
    sketch,
)

WORDS = st.text(alphabet="abc ", max_size=40)
LONG = [f"w{i}" for i in range(100)]
CLOSE = [*LONG[:50], "other", *LONG[51:]]  # Three of 98 shingles of three words differ.


def test_shingles() -> None:
    assert shingles("One two, THREE four", "word", 3) == {"one two three", "two three four"}
    assert shingles("one", "word", 3) == {"one"}
    assert shingles("?!", "word", 3) == frozenset()
    assert shingles("a bc", "character", 2) == {"a ", " b", "bc"}


@given(WORDS, WORDS)
def test_jaccard_is_a_similarity(a: str, b: str) -> None:
    one, other = shingles(a, "word", 2), shingles(b, "word", 2)
    assert 0 <= jaccard(one, other) == jaccard(other, one) <= 1
    assert (jaccard(one, other) == 1) == (one == other)


@given(st.floats(0.05, 1), st.integers(1, 256))
def test_bands_find_a_pair_at_the_threshold(threshold: float, permutations: int) -> None:
    bands, rows = banding(threshold, permutations)
    assert 1 <= bands * rows <= permutations
    assert rows == 1 or 1 - (1 - threshold**rows) ** bands >= 0.99
    assert banding(0.87, 128) == (14, 9)


def test_a_key_depends_on_its_text_alone() -> None:
    texts = [" ".join(LONG), "short", "", " ".join(CLOSE)]
    together = sketch(texts, DedupConfig())
    apart = np.concatenate([sketch([text], DedupConfig()) for text in texts], axis=1)
    np.testing.assert_array_equal(together, apart)


def test_the_first_of_a_crowd_stays() -> None:
    texts = [
        " ".join(LONG),
        "Something else entirely here",
        " ".join(CLOSE),
        " ".join(LONG).upper(),
    ]
    texts += [" ".join(CLOSE), "something else, entirely: here!"]
    assert deduplicate(texts, DedupConfig()).tolist() == [KEPT, KEPT, NEAR, EXACT, EXACT, EXACT]
    exact = deduplicate(texts, DedupConfig(threshold=None)).tolist()
    assert exact == [KEPT, KEPT, KEPT, EXACT, EXACT, EXACT]


def test_the_threshold_is_a_setting() -> None:
    texts = [" ".join(LONG), " ".join(CLOSE)]
    similarity = jaccard(*(shingles(text, "word", 3) for text in texts))
    assert deduplicate(texts, DedupConfig(threshold=similarity)).tolist() == [KEPT, NEAR]
    assert deduplicate(texts, DedupConfig(threshold=similarity + 1e-6)).tolist() == [KEPT, KEPT]


def test_equal_keys_are_not_enough() -> None:
    """Texts that merely collide are compared, and stay."""
    config = DedupConfig()
    texts = ["one two three four", "five six seven eight", "one two three four"]
    keys = np.zeros_like(sketch(texts, config))
    assert duplicates(keys, texts.__getitem__, config).tolist() == [KEPT, KEPT, EXACT]


@pytest.mark.parametrize("count", [0, 1])
def test_few_texts(count: int) -> None:
    assert deduplicate(["a b c"] * count, DedupConfig()).tolist() == [KEPT] * count


class _Numbered:
    """Texts that differ where their originals do."""

    def __init__(self, originals: npt.NDArray[np.int64]) -> None:
        self.originals = originals

    def __call__(self, number: int) -> str:
        return f"text {self.originals[number]}"


def test_bounded_memory_and_the_same_verdicts() -> None:
    """Four times the texts, no more memory but the byte a text; parts change nothing."""
    config = DedupConfig(threshold=None, memory_mb=1)
    peaks = {}
    for total in (60_000, 240_000):
        # Keys of a made-up corpus: each third text repeats an earlier one.
        numbers = np.arange(total)
        originals = np.where(numbers % 3 == 2, numbers // 9 * 3, numbers)
        keys = (originals.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))[None]
        text = _Numbered(originals)
        tracemalloc.start()
        verdicts = duplicates(keys, text, config)
        peaks[total] = tracemalloc.get_traced_memory()[1] - total
        tracemalloc.stop()
        assert (verdicts == EXACT).sum() == total // 3
        if total == 60_000:
            ample = duplicates(keys, text, DedupConfig(threshold=None))
            np.testing.assert_array_equal(verdicts, ample)
    assert max(peaks.values()) < 2**20 + 2**18, peaks


# --- Held-out text --------------------------------------------------------------------------------


def test_overlap_is_the_share_of_held_out_ngrams() -> None:
    heldout = Heldout.of([" ".join(LONG), "hello there"], 8)
    assert heldout.overlap(" ".join(LONG[10:40])) == 1
    assert heldout.overlap(" ".join(LONG[:8]) + " and more") == pytest.approx(1 / 3)
    assert heldout.overlap("one two three four five six seven eight nine") == 0
    # Shorter than the n-gram: only the whole text counts.
    assert heldout.overlap("Hello, there!") == 1
    assert heldout.overlap("Hello there you") == 0
    assert heldout.overlap("") == 0
    assert Heldout.of([], 8).overlap("hello there") == 0


# --- The bench ------------------------------------------------------------------------------------


def test_the_bench_finds_what_it_planted() -> None:
    figures = bench.measure_dedup(documents=160)
    assert figures["dedup_recall"].value >= 0.99
    assert figures["dedup_false_drop"].value <= 0.001
    assert (figures["dedup_recall"].n or 0) >= 20 and (figures["dedup_false_drop"].n or 0) >= 60
    curve = [figures[f"dedup_recall_edit_{percent}"].value for percent in bench.EDITS]
    near = [figures[f"dedup_similarity_edit_{percent}"].value for percent in bench.EDITS]
    assert curve[0] > 0.95 > 0.05 > curve[-1]
    assert near == sorted(near, reverse=True)


def test_exact_comparison_finds_no_edited_copy() -> None:
    strict = bench.measure_dedup(documents=60, config=DedupConfig(threshold=None))
    assert strict["dedup_recall"].value == 0 and strict["dedup_false_drop"].value == 0


@given(st.lists(WORDS, max_size=6))
def test_nearest_neighbours_are_exact(texts: list[str]) -> None:
    sets = [shingles(text, "word", 1) for text in texts]
    slow = [
        max((jaccard(a, b) for j, b in enumerate(sets) if j != i and a & b), default=0.0)
        for i, a in enumerate(sets)
    ]
    assert bench.nearest(sets).tolist() == slow
