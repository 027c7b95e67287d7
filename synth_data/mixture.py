"""What a data set is made of, and what it must not lack.

    shards ─┬─> Summary     samples, hours, words and codes: in all, and by source, licence, ...
            └─> Diversity   entropy of what is said, beside that of the texts it was made from
    summaries of a mixture ──> Guard   refuses one with too little that people made

A model that learns from what models made forgets what is rare, generation after generation
(Shumailov et al., "AI models collapse when trained on recursively generated data", Nature 2024);
where enough of what people made stays in the mixture, it does not (Gerstgrasser et al., arXiv
2404.01413). So a mixture declares the least share of recorded speech and of human text, and is
refused below it. What is synthetic, and whose words they are, is written in every sample.

Letters: C channels, K codebooks, T frames.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from upath import UPath

from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data.shards import Location, Reader, Sample, shard_paths
from synth_data.text import normalize

INDEX = "index.json"
"""Stands beside the shards of a finished build."""

RECORDED, SYNTHETIC, HUMAN, MADE = "recorded", "synthetic", "human", "made"
"""Kinds of speech and of text."""

# Entropies are of this much at most: they grow with the size of what they are measured on, so only
# equal sizes compare, and these take seconds.
_MAX_WORDS, _MAX_FRAMES = 50_000, 200_000


# --- Counts ---------------------------------------------------------------------------------------


class Count(BaseModel):
    """How much of something there is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = 0
    seconds: float = 0.0
    words: int = 0
    tokens: int = 0
    """Codes: channels × codebooks × frames."""

    def __add__(self, other: Count) -> Count:
        """Both together."""
        return Count(
            samples=self.samples + other.samples,
            seconds=self.seconds + other.seconds,
            words=self.words + other.words,
            tokens=self.tokens + other.tokens,
        )


class Summary(BaseModel):
    """Counts of some samples: in all, and by where they come from.

    ========= ============================================================================
    ``by``    names
    ========= ============================================================================
    source    of the text, or of the recording
    licence
    speech    ``recorded``, ``synthetic``
    text      ``human``, ``made``
    engine    of synthesized speech (``espeak``, ``flite``, …)
    voice     a voice without its settings, or ``set/speaker``
    ========= ============================================================================

    Engines and voices are counted a channel, so a conversation counts once for each of its two.
    """

    model_config = ConfigDict(extra="forbid")

    total: Count = Count()
    by: dict[str, dict[str, Count]] = Field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Summary:
        """Count samples."""
        summary = cls()
        for sample in samples:
            summary.add(sample)
        return summary

    def add(self, sample: Sample) -> None:
        """Count one sample more."""
        said = [len(words) for words in sample.words]
        tokens = 0 if sample.codes is None else sample.codes.size
        # Where nobody knows when the words are said, the text knows how many they are.
        words = sum(said) or len(sample.text.split())
        whole = Count(samples=1, seconds=sample.seconds, words=words, tokens=tokens)
        self.total += whole
        self._count("source", sample.source, whole)
        self._count("licence", sample.licence, whole)
        self._count("speech", SYNTHETIC if sample.synthetic else RECORDED, whole)
        self._count("text", HUMAN if sample.human_text else MADE, whole)
        for voice, count in zip(sample.voices, said, strict=True):
            channels = len(sample.voices)
            part = whole.model_copy(
                update={
                    "words": words if channels == 1 else count,
                    "tokens": tokens // channels,
                }
            )
            if sample.synthetic:
                self._count("engine", voice.partition(":")[0], part)
            self._count("voice", voice.partition("@")[0], part)

    def _count(self, axis: str, name: str, count: Count) -> None:
        names = self.by.setdefault(axis, {})
        names[name] = names.get(name, Count()) + count

    def __iadd__(self, other: Summary) -> Summary:
        """Count what another summary counted too."""
        self.total += other.total
        for axis, names in other.by.items():
            for name, count in names.items():
                self._count(axis, name, count)
        return self

    def count(self, axis: str, name: str) -> Count:
        """What is counted under a name; nothing where there is none."""
        return self.by.get(axis, {}).get(name, Count())


# --- The guard ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of a mixture people made; None where it has no speech, or no text."""

    recorded_speech: float | None
    """Of the seconds of speech."""
    human_text: float | None
    """Of the words."""


def shares(parts: Iterable[tuple[float, Summary]]) -> Shares:
    """The shares of a mixture of parts, each with its weight.

    A part counts by its weight, however large it is: a mixture may repeat a small one.
    """
    speech = _Mean()
    text = _Mean()
    for weight, summary in parts:
        total = summary.total
        if total.seconds:
            speech.add(summary.count("speech", RECORDED).seconds / total.seconds, weight)
        if total.words:
            text.add(summary.count("text", HUMAN).words / total.words, weight)
    return Shares(speech.value, text.value)


@dataclass(slots=True)
class _Mean:
    weighted: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> None:
        self.weighted += value * weight
        self.weight += weight

    @property
    def value(self) -> float | None:
        return self.weighted / self.weight if self.weight else None


class GuardConfig(BaseModel):
    """The least that people must have made of a mixture; nothing is asked for by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recorded_speech: float = Field(default=0.0, ge=0, le=1)
    """Share of the seconds of speech that is recorded."""
    human_text: float = Field(default=0.0, ge=0, le=1)
    """Share of the words that people chose."""

    @property
    def asks(self) -> bool:
        """Whether there is anything to check."""
        return self.recorded_speech > 0 or self.human_text > 0

    def check(self, found: Shares, what: str) -> None:
        """Refuse a mixture that lacks what people made; `what` names it.

        Raises:
            UserError: a share is too small.
        """
        for name, least, share, remedy in (
            ("recorded_speech", self.recorded_speech, found.recorded_speech, "recordings"),
            ("human_text", self.human_text, found.human_text, "text that people wrote"),
        ):
            if share is not None and share < least - 1e-9:
                raise UserError(
                    f"{what}: {name} is {share:.1%}, and guard.{name} asks for at least "
                    f"{least:.1%}; add {remedy}, or make less of the rest."
                )


# --- Diversity ------------------------------------------------------------------------------------


class Diversity(BaseModel):
    """Shannon entropies in bits; the more alike what is said, the lower."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: int
    """Measured on so many."""
    unigrams: float
    bigrams: float
    trigrams: float
    frames: int
    """Measured on so many (0: there are no codes)."""
    codes: float
    """Of codebook 0, the semantic one, a frame."""
    code_pairs: float
    """Of two frames in a row."""


@dataclass(slots=True)
class Material:
    """Beginning of a data set or text, as much as diversity is measured on."""

    texts: list[list[str]] = field(default_factory=list)
    """Words of each utterance."""
    codes: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    """Codebook 0 [T] of each channel."""

    @classmethod
    def of(cls, items: Iterable[Sample | str]) -> Material:
        """Take the beginning of some samples or texts; no more is read than is needed."""
        found = cls()
        words = frames = 0
        for item in items:
            for text in _texts(item):
                if text and words < _MAX_WORDS:
                    found.texts.append(text)
                    words += len(text)
            if isinstance(item, Sample) and item.codes is not None and frames < _MAX_FRAMES:
                found.codes += list(item.codes[:, 0])
                frames += item.codes.shape[0] * item.codes.shape[2]
            if words >= _MAX_WORDS and (frames >= _MAX_FRAMES or not frames):
                break
        return found

    @property
    def words(self) -> int:
        """How many there are."""
        return sum(map(len, self.texts))

    @property
    def frames(self) -> int:
        """How many there are, of all channels."""
        return sum(map(len, self.codes))

    def diversity(self, words: int | None = None, frames: int | None = None) -> Diversity:
        """Entropies over the first `words` and `frames`; None takes all."""
        texts = list(_first(self.texts, self.words if words is None else words))
        rows = [row.tolist() for row in self.codes]
        codes = list(_first(rows, self.frames if frames is None else frames))
        return Diversity(
            words=sum(map(len, texts)),
            unigrams=_entropy(texts, 1),
            bigrams=_entropy(texts, 2),
            trigrams=_entropy(texts, 3),
            frames=sum(map(len, codes)),
            codes=_entropy(codes, 1),
            code_pairs=_entropy(codes, 2),
        )


def contrast(one: Material, other: Material) -> tuple[Diversity, Diversity]:
    """The diversity of both, over equally much of each (where one has none, over all)."""
    words = min(one.words, other.words) or None
    frames = min(one.frames, other.frames) or None
    return one.diversity(words, frames), other.diversity(words, frames)


def _texts(item: Sample | str) -> Iterator[list[str]]:
    if isinstance(item, str):
        yield normalize(item).split()
    elif any(item.words):
        yield from ([word.text for word in words] for words in item.words)
    else:
        yield normalize(item.text).split()


def _first(rows: Iterable[Sequence[Any]], count: int) -> Iterator[Sequence[Any]]:
    """Rows until `count` elements; the last one is cut there."""
    for row in rows:
        if count <= 0:
            return
        yield row[:count]
        count -= len(row)


def _entropy(rows: Sequence[Sequence[Hashable]], n: int) -> float:
    """Entropy in bits of the n-grams within the rows; 0 where there is none."""
    grams = Counter(
        chain.from_iterable(zip(*(row[i:] for i in range(n)), strict=False) for row in rows)
    )
    total = sum(grams.values())
    # Exactly rounded, so that the order of counting does not show in an index.
    return math.fsum(-c / total * math.log2(c / total) for c in grams.values())


# --- The index ------------------------------------------------------------------------------------


class Index(BaseModel):
    """What a finished build holds; the same however often it was interrupted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: dict[str, int]
    """Bytes of each shard, by file name."""
    summary: Summary
    diversity: Diversity
    source: Diversity | None = None
    """Of the texts that it was made from, over as many words; None where they were not given."""


def read_index(folder: Location) -> dict[str, Index]:
    """The index of each build in a folder, by prefix; empty where there is none that can be read.

    An index can always be made again from the shards, so a broken one is no error.
    """
    try:
        stored = (UPath(folder) / INDEX).read_bytes()
        return _Indexes.model_validate_json(stored).builds
    except (OSError, ValidationError):
        return {}


def write_index(folder: Location, prefix: str, index: Index) -> None:
    """Write the index of the build `prefix`; those of other builds in the folder stay."""
    builds = {**read_index(folder), prefix: index}
    with replacing(UPath(folder) / INDEX) as temporary:
        text = _Indexes(builds=dict(sorted(builds.items()))).model_dump_json(indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


class _Indexes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    builds: dict[str, Index]


def unchanged(paths: Iterable[UPath], known: Mapping[str, int]) -> bool:
    """Whether shards are there with the sizes that an index knows."""
    return all(
        path.name in known and path.exists() and path.stat().st_size == known[path.name]
        for path in paths
    )


def summarize(source: Location) -> tuple[Summary, int]:
    """What shards hold, and how many samples or ends of shards could not be read.

    A folder's index is believed where the sizes of its shards are those it knows; else every
    sample is read.

    Raises:
        UserError: there is no shard.
    """
    paths = shard_paths(source)
    summary, skipped = Summary(), 0
    builds = read_index(source) if UPath(source).is_dir() else {}
    known = {name: size for index in builds.values() for name, size in index.shards.items()}
    if len(known) == len(paths) and unchanged(paths, known):
        for index in builds.values():
            summary += index.summary
        return summary, 0
    for path in paths:
        reader = Reader(path, audio=False)
        summary += Summary.of(reader)
        skipped += reader.skipped
    return summary, skipped
