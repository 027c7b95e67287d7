"""Exact and near duplicates, removed from corpora larger than memory; overlap with held-out text.

Two texts are near duplicates when the Jaccard similarity of their sets of shingles (runs of words)
reaches a threshold. MinHash (Broder, 1997) finds candidates: a text has P hash values of which two
texts share, in expectation, the fraction that is their similarity; B bands of R values each make a
key, and texts that share one key are compared. The comparison is of the true sets, so a text is
never dropped for a chance agreement of hashes.

            text 0   text 1   text 2   …         keys [1 + B, N] uint64, on disk
    exact    9c01     77aa     9c01              one row at a time, sorted in parts that fit in
    band 0   12ef     5b3d     12ef              memory; equal keys are a bucket
    band 1   a000     a000     31c4
     …                                           in a bucket: the later text of a pair is dropped

Memory: ``memory_mb`` plus one byte a text. A text's verdict does not depend on how many parts there
were. Dropped texts leave the later rows, so a crowd of copies is compared once, not once a band.

Letters: N texts, B bands, R rows of a band.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from datasketch import MinHash
from pydantic import BaseModel, ConfigDict, Field

Keys = npt.NDArray[np.uint64]
Verdicts = npt.NDArray[np.uint8]

KEPT: Final = 0
EXACT: Final = 1
NEAR: Final = 2

# A pair at the threshold is found with this probability, a closer one with a greater.
_RECALL = 0.99
# A key and its text's number, gathered and joined; their order, and the keys in it.
_BYTES_A_KEY = 64
# Texts, and sets of shingles, at hand: the members of a bucket meet again in the next row.
_TEXTS_KEPT = 128
_WORD = re.compile(r"\w+(?:'\w+)*")


class DedupConfig(BaseModel):
    """What a duplicate is, and how it is looked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float | None = Field(default=0.87, gt=0, le=1)
    """Least Jaccard similarity of near duplicates (0.87 as Pythia's); null drops exact ones
    alone."""
    unit: Literal["word", "character"] = "word"
    """What a shingle is made of."""
    size: int = Field(default=3, ge=1)
    """Units a shingle. Spoken texts are short: a longer shingle lets one changed word count for
    more."""
    permutations: int = Field(default=128, ge=1, le=4096)
    """Hash values of a text."""
    memory_mb: int = Field(default=1024, ge=1)
    """For the keys that are sorted at once; the verdicts do not depend on it."""


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation: what two equal texts share."""
    return _WORD.findall(text.lower())


def shingles(text: str, unit: Literal["word", "character"], size: int) -> frozenset[str]:
    """Every run of ``size`` units; a shorter text is one shingle, an empty one has none."""
    words = words_of(text)
    units: Sequence[str] = words if unit == "word" else " ".join(words)
    joint = " " if unit == "word" else ""
    if not units:
        return frozenset()
    last = max(1, len(units) - size + 1)
    return frozenset(joint.join(units[start : start + size]) for start in range(last))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over the size of the union; 1 for two empty sets."""
    shared = len(a & b)
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def banding(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows a band: the longest rows that find a pair at the threshold 99 times in 100.

    A pair of similarity s shares a band's key with probability s^R, and so at least one of B with
    1 − (1 − s^R)^B. Longer rows mean fewer pairs compared in vain.

    >>> banding(0.87, 128)
    (14, 9)
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return permutations, 1


def key_rows(config: DedupConfig) -> int:
    """Keys of a text: one of its words, and one a band."""
    return 1 if config.threshold is None else 1 + banding(config.threshold, config.permutations)[0]


def sketch(texts: Sequence[str], config: DedupConfig) -> Keys:
    """Keys of texts: uint64 [1 + B, N]. Pure, whatever else is in the batch."""
    keys = np.empty((key_rows(config), len(texts)), np.uint64)
    for column, text in enumerate(texts):
        keys[0, column] = _hash64(" ".join(words_of(text)).encode())
    if config.threshold is None:
        return keys
    bands, rows = banding(config.threshold, config.permutations)
    empty = MinHash(config.permutations)
    for column, text in enumerate(texts):
        signature = empty.copy()
        signature.update_batch([s.encode() for s in shingles(text, config.unit, config.size)])
        for band in range(bands):
            values = signature.hashvalues[band * rows : (band + 1) * rows]
            keys[1 + band, column] = _hash64(values.tobytes())
    return keys


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def duplicates(
    keys: Keys,
    text: Callable[[int], str],
    config: DedupConfig,
    row_done: Callable[[], object] = lambda: None,
) -> Verdicts:
    """Verdict on every text, uint8 [N]: ``KEPT``, ``EXACT`` or ``NEAR`` duplicate of an earlier.

    Args:
        keys: uint64 [1 + B, N] of ``sketch``; a memory-mapped array is read row by row.
        text: the text of a number, for comparing; called for members of buckets alone.
        config: as that of ``sketch``.
        row_done: called after each of the 1 + B rows.
    """
    assert keys.shape[0] == key_rows(config), (keys.shape, config)
    total = keys.shape[1]
    verdicts = np.zeros(total, np.uint8)
    most = max(1, config.memory_mb * 2**20 // _BYTES_A_KEY)
    parts = -(-total // most)

    @functools.lru_cache(maxsize=_TEXTS_KEPT)
    def words(number: int) -> list[str]:
        return words_of(text(number))

    @functools.lru_cache(maxsize=_TEXTS_KEPT)
    def grams(number: int) -> frozenset[str]:
        return shingles(text(number), config.unit, config.size)

    def same(a: int, b: int) -> bool:
        return words(a) == words(b)

    def near(a: int, b: int) -> bool:
        assert config.threshold is not None
        return jaccard(grams(a), grams(b)) >= config.threshold

    for row in range(keys.shape[0]):
        alike, verdict = (same, EXACT) if row == 0 else (near, NEAR)
        for part in range(parts):
            for bucket in _buckets(keys[row], verdicts, part, parts, most):
                first: list[int] = []
                for number in bucket:
                    if any(alike(earlier, number) for earlier in first):
                        verdicts[number] = verdict
                    else:
                        first.append(number)
        row_done()
    return verdicts


def _buckets(
    row: Keys, verdicts: Verdicts, part: int, parts: int, most: int
) -> Iterator[list[int]]:
    """Numbers, ascending, of undropped texts that share a key of this part."""
    found: list[tuple[Keys, npt.NDArray[np.int64]]] = []
    for start in range(0, len(row), most):
        slab = np.asarray(row[start : start + most])
        chosen = slab % np.uint64(parts) == part
        chosen &= verdicts[start : start + most] == KEPT
        numbers = np.flatnonzero(chosen)
        found.append((slab[numbers], numbers + start))
    keys = np.concatenate([keys for keys, _ in found])
    numbers = np.concatenate([numbers for _, numbers in found])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    edges = np.flatnonzero(np.diff(keys, prepend=~keys[:1], append=~keys[-1:]))
    for index in np.flatnonzero(np.diff(edges) > 1):
        yield numbers[order[edges[index] : edges[index + 1]]].tolist()


def deduplicate(texts: Sequence[str], config: DedupConfig) -> Verdicts:
    """``duplicates`` of texts that are at hand."""
    return duplicates(sketch(texts, config), texts.__getitem__, config)


# --- Held-out text --------------------------------------------------------------------------------


class Heldout:
    """Word n-grams of text that must not be trained on.

    As GPT-3 (arXiv 2005.14165, appendix C) and PaLM (2204.02311) looked for it. A text shorter than
    the n-gram is compared whole. Eight bytes an n-gram.
    """

    def __init__(self, hashes: Keys, size: int) -> None:
        """Take sorted hashes of n-grams of ``size`` words."""
        self.hashes = hashes
        self.size = size

    @classmethod
    def of(cls, texts: Iterable[str], size: int) -> Heldout:
        """Collect the n-grams of ``texts``."""
        batches = [_ngrams(text, size) for text in texts]
        return cls(np.unique(np.concatenate([*batches, np.empty(0, np.uint64)])), size)

    def overlap(self, text: str) -> float:
        """The share of a text's n-grams that are held out, 0..1."""
        grams = _ngrams(text, self.size)
        if not len(grams) or not len(self.hashes):
            return 0.0
        places = np.searchsorted(self.hashes, grams).clip(max=len(self.hashes) - 1)
        return float((self.hashes[places] == grams).mean())


def _ngrams(text: str, size: int) -> Keys:
    return np.array([_hash64(gram.encode()) for gram in shingles(text, "word", size)], np.uint64)
