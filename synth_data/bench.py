"""How good the making of data is: what de-duplication finds, and what it wrongly drops.

    speechlm bench synth

Each figure is measured on texts made here, of which everything is known: no corpus is needed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import resources

import numpy as np

from audio_codec.bench import Figure
from synth_data.dedup import KEPT, DedupConfig, deduplicate, jaccard, shingles

EDITS = tuple(range(1, 11))
"""Percent of the words of a copy that are changed, for the recall curve."""

# A planted pair is a duplicate from here on, and a text with no neighbour beyond there is none.
_DUPLICATE, _DISTINCT = 0.92, 0.75


# --- De-duplication -------------------------------------------------------------------------------


def measure_dedup(
    documents: int = 4000, seed: int = 0, config: DedupConfig | None = None
) -> dict[str, Figure]:
    """Find planted near duplicates among texts of 20 to 400 words.

    Words follow Zipf's law. Half of the texts have a copy in which words were replaced, deleted or
    inserted; a corpus is all texts, then all copies. Similarities are the true ones, in the
    configured shingles; a text's nearest neighbour is found by comparing it with all.

    Gives ``dedup_recall``: of the copies with a similarity of at least 0.92, the share found.
    ``dedup_false_drop``: of texts and copies whose nearest neighbour is at most 0.75, the share
    dropped. And for copies with N% of the words edited, ``dedup_recall_edit_N``, the share found,
    with ``dedup_similarity_edit_N``, their mean true similarity.
    """
    assert documents >= 20, documents
    config = config or DedupConfig()
    rng = np.random.default_rng(seed)
    vocabulary = _vocabulary()
    texts = [_words(rng, vocabulary, int(rng.integers(20, 401))) for _ in range(documents)]
    # Light edits make duplicates, heavy ones make neighbours that must stay.
    rates = rng.choice([0.002, 0.005, 0.01, 0.1, 0.2, 0.3], size=documents // 2)
    copies = [
        _edited(rng, vocabulary, words, rate) for words, rate in zip(texts, rates, strict=False)
    ]
    corpus = [" ".join(words) for words in (*texts, *copies)]
    verdicts = deduplicate(corpus, config)
    sets = [shingles(text, config.unit, config.size) for text in corpus]
    planted = [
        documents + i
        for i in range(len(copies))
        if jaccard(sets[i], sets[documents + i]) >= _DUPLICATE
    ]
    distinct = np.flatnonzero(nearest(sets) <= _DISTINCT)
    figures = {
        "dedup_recall": _share([verdicts[i] != KEPT for i in planted]),
        "dedup_false_drop": _share([verdicts[i] != KEPT for i in distinct]),
    }
    for percent in EDITS:
        edited = [_edited(rng, vocabulary, words, percent / 100) for words in texts[:500]]
        pairs = [" ".join(words) for words in (*texts[:500], *edited)]
        verdicts = deduplicate(pairs, config)
        near = [
            jaccard(shingles(a, config.unit, config.size), shingles(b, config.unit, config.size))
            for a, b in zip(pairs, pairs[len(edited) :], strict=False)
        ]
        figures[f"dedup_recall_edit_{percent}"] = _share(list(verdicts[len(edited) :] != KEPT))
        figures[f"dedup_similarity_edit_{percent}"] = Figure(float(np.mean(near)), n=len(near))
    return figures


def nearest(sets: Sequence[frozenset[str]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Similarity of each set's nearest neighbour, by an index from shingles to sets: exact."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for number, grams in enumerate(sets):
        for gram in grams:
            holders[gram].append(number)
    best = np.zeros(len(sets))
    for number, grams in enumerate(sets):
        shared = Counter(other for gram in grams for other in holders[gram])
        for other, count in shared.items():
            if other != number:
                union = len(grams) + len(sets[other]) - count
                best[number] = max(best[number], count / union)
    return best


def _vocabulary() -> list[str]:
    words = resources.files("synth_data").joinpath("quiz_data", "words.txt").read_text()
    return list(dict.fromkeys(re.findall(r"[a-z]+", words)))


def _words(rng: np.random.Generator, vocabulary: Sequence[str], count: int) -> list[str]:
    """Words of which the n-th is drawn with a chance of about 1/n."""
    ranks = (len(vocabulary) ** rng.random(count)).astype(int) - 1
    return [vocabulary[rank] for rank in ranks]


def _edited(
    rng: np.random.Generator, vocabulary: Sequence[str], words: Sequence[str], rate: float
) -> list[str]:
    """A copy in which a share of the words, and at least one, is replaced, deleted or doubled."""
    copy: list[str] = list(words)
    count = max(1, round(rate * len(copy)))
    for place in sorted(rng.choice(len(copy), size=count, replace=False), reverse=True):
        new = _words(rng, vocabulary, 1)
        copy[place : place + 1] = ([*new], [], [copy[place], *new])[int(rng.integers(3))]
    return copy


def _share(hits: Sequence[bool]) -> Figure:
    """A share of trials with Wilson's interval (1927), which stays honest near 0 and 1."""
    n, z = len(hits), 1.959964
    share = sum(map(bool, hits)) / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Figure(share, float(max(0.0, centre - half)), float(min(1.0, centre + half)), n)
