"""Where documents come from: each source of a mixture, as an endless sequence for each lane.

Document n of a lane is a pure function of the seed, the lane and n: folders of shards are shuffled
anew in every pass, or read in the order of their quality; the quiz world is drawn without end.

Shapes: S streams, K codebooks, T frames or columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)
from upath import UPath

from audio_codec.audio import FRAME_RATE
from audio_codec.errors import UserError
from speechlm.documents import (
    Codes,
    Dialogue,
    Document,
    Role,
    Spoken,
    WeightConfig,
    answer_document,
    asr_document,
    check_codes,
    dialogue_document,
    encode_dialogue,
    exchanged,
    exchanges,
    interleaved_document,
    laid_over,
    monologue_document,
    question_document,
    sentence_document,
    speaking_frames,
    spoken,
    tts_document,
)
from speechlm.streams import Streams
from speechlm.text_tokenizer import TextTokenizer
from synth_data import quiz, shards
from synth_data.dialogue import ASSISTANT, UNTRANSCRIBED
from synth_data.interleave import (
    QUESTION_RULES,
    InterleaveConfig,
    Modality,
    frame_range,
    interleave,
    read_segments,
)
from synth_data.mixture import HUMAN, MADE, Count, Shares, Summary, shares, summarize
from synth_data.text import sentences_from
from synth_data.tts import Word


class Part(BaseModel):
    """One folder of a mixture of shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: shards.Folder
    weight: float = Field(1.0, ge=0)
    """Times that each of its samples is seen in one pass over the mixture; 0.5 is half of them."""
    epochs: float | None = Field(None, gt=0)
    """Times that each may be seen in the whole run; one that would need more is refused. Up to
    four are almost as good as new data (arXiv 2305.16264)."""


def _some_weight(path: UPath | tuple[Part, ...]) -> UPath | tuple[Part, ...]:
    if isinstance(path, tuple) and sum(part.weight for part in path) == 0:
        names = ", ".join(str(part.path) for part in path) or "none"
        raise ValueError(f"the mixture sums to zero: give a weight above 0 to a folder ({names})")
    return path


def _one_or_many(path: object) -> str:
    return "parts" if isinstance(path, list | tuple) else "folder"


Shards = Annotated[
    Annotated[shards.Folder, Tag("folder")] | Annotated[tuple[Part, ...], Tag("parts")],
    Discriminator(_one_or_many),
    AfterValidator(_some_weight),
]
"""A shard folder, or several with weights."""

Order = Literal["shuffled", "quality"]
"""Anew in every pass; or from the samples that the recognizer understood worst to the best, where
it has judged some."""


class DialogueSource(BaseModel):
    """Two-channel conversations with codes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dialogues"]
    path: Shards
    rows: PositiveInt
    """Rows of every batch that come from here, over all processes: its share of the mixture."""
    order: Order = "shuffled"
    exchange: float = Field(0.0, ge=0, le=1)
    """Share of the conversations in which the two speakers change roles: where neither is the
    assistant, as in recorded ones, 0.5 learns from both."""


class QuizSource(BaseModel):
    """Questions and answers of the quiz world as text alone, drawn afresh without end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quiz"]
    rows: PositiveInt
    turns: PositiveInt = 4
    """Questions in a document, at most."""
    paced: float = Field(0.5, ge=0, le=1)
    """Share of the documents with the pace of speech, PADs and all."""
    unknown: float = Field(0.1, ge=0, le=1)
    """Share of the questions that lie outside the world."""
    categories: quiz.CategoryWeights | None = None
    """Weights of the quiz categories; None weighs all alike."""
    beyond: float = Field(0.0, ge=0, le=1)
    """Share of plus and minus with numbers above those of the world (`quiz.draw_beyond`), too many
    to be remembered."""
    alone: float = Field(0.0, ge=0, le=1)
    """Share of the documents of answers without their questions, of the categories whose answers
    say again what was asked and then its key ("seven plus five is twelve"): many more of them in
    a row."""
    under: shards.Folder | None = None
    """Conversations whose sound lies under all of it, though it says something else, so that the
    answer is found among the codes of a conversation too."""

    @property
    def restating(self) -> dict[str, float]:
        """Weights of the categories whose answers may stand `alone`."""
        weights = self.categories or dict.fromkeys(quiz.CATEGORIES, 1.0)
        return {name: weight for name, weight in weights.items() if name in quiz.RESTATING}

    @model_validator(mode="after")
    def _something_stands_alone(self) -> QuizSource:
        if self.alone and not self.restating:
            raise ValueError(
                f"alone is {self.alone:g}, but categories names none whose answers can stand "
                f"alone; choices: {', '.join(quiz.RESTATING)}"
            )
        return self


class SentenceSource(BaseModel):
    """Plain sentences of a text file, one a line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sentences"]
    path: Path
    human: bool = True
    """Whether people wrote them; false for what a language model wrote."""
    rows: PositiveInt
    max_words: PositiveInt = 60


class InterleavedSource(BaseModel):
    """Text and speech in one document: laid out by `speechlm synth interleave`, or only now.

    Of an utterance with codes and word times some words stay text and the others become speech.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["interleaved"]
    path: Shards
    """Of interleaved documents; or with codes and word times, where each channel is a speaker of
    its own."""
    rows: PositiveInt
    order: Order = "shuffled"
    layout: InterleaveConfig = InterleaveConfig()
    """How much of an utterance is speech; its unit must be the word."""
    max_words: PositiveInt = 60
    """Words of an utterance in a document."""

    @field_validator("layout")
    @classmethod
    def _words(cls, layout: InterleaveConfig) -> InterleaveConfig:
        if layout.unit != "word":
            raise ValueError("utterances with word times name no sentences; layout.unit is 'word'")
        return layout


class AudioSource(BaseModel):
    """Speech of one person with its words in time: inner monologue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["audio"]
    path: Shards
    """With codes; each channel is a speaker of its own."""
    rows: PositiveInt
    order: Order = "shuffled"
    listen: float = Field(0.0, ge=0, le=1)
    """Share of the documents that are heard and written down, instead of being said."""
    silence: shards.Folder | None = None
    """Conversations from which a listener takes the codes of its own silence; without, it has
    none, which in a conversation it always has."""


PROMPTS = {
    "asr": "write down what you hear",
    "tts": "read aloud",
    "spoken_qa": "answer the question",
}
"""What the documents of each task begin with, unless told otherwise."""


class TaskSource(BaseModel):
    """Tasks written as documents: recognize, read aloud, answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["asr", "tts", "spoken_qa"]
    path: Shards
    """With codes: of single speakers, or of conversations (spoken_qa)."""
    rows: PositiveInt
    order: Order = "shuffled"
    prompt: str | None = None
    """What a document begins with; None means the task's own (`PROMPTS`), "" nothing."""
    question: Modality = "speech"
    """How a question is put (spoken_qa)."""
    answer: Modality = "text"
    """How it is answered (spoken_qa)."""
    max_words: PositiveInt = 60
    """Longer ones are left out, as is every document longer than a row: none is ever cut."""


Source = Annotated[
    DialogueSource | QuizSource | SentenceSource | InterleavedSource | AudioSource | TaskSource,
    Field(discriminator="kind"),
]


def shares_of(sources: Iterable[Source]) -> Shares:
    """How much of a mixture people made; each source counts by its rows.

    Raises UserError when there are no shards where a source says.
    """
    return shares(part for source in sources for part in _summaries(source))


def _summaries(source: Source) -> Iterator[tuple[float, Summary]]:
    """What a source is made of, and how many of its rows come from each."""
    word = Count(words=1)
    match source:
        case QuizSource():
            yield source.rows, Summary(total=word, by={"text": {MADE: word}})
        case SentenceSource():
            by = {"text": {HUMAN if source.human else MADE: word}}
            yield source.rows, Summary(total=word, by=by)
        case _:
            found = [(part.weight, summarize(part.path)[0]) for part in _parts(source.path)]
            masses = [weight * summary.total.seconds for weight, summary in found]
            for mass, (_, summary) in zip(masses, found, strict=True):
                yield source.rows * mass / sum(masses), summary


class Documents(Protocol):
    """An endless, indexed sequence of documents for each lane."""

    def document(self, lane: int, number: int) -> Document:
        """Document `number` of a lane; a pure function."""


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _shuffled(seed: int, place: int, count: int) -> int:
    """Which of `count` items is the one in this place: each once an epoch."""
    epoch, index = divmod(place, count)
    return int(_order(seed, epoch, count)[index])


@dataclass(frozen=True, slots=True)
class Exposure:
    """How often a run sees the samples of a folder."""

    path: UPath
    samples: int
    epochs: float
    limit: float | None


class Pool:
    """Which sample of a mixture of shards a lane sees when.

    All lanes go through one order together, each taking its turn, so that a pass of the run is a
    pass over the data: each sample is seen once before any is seen again.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        found: Sequence[Sequence[tuple[int, float | None]]],
        order: Order,
        seed: int,
        lanes: int,
    ) -> None:
        """`found` has, for each part and sample, its columns and its word error rate."""
        self.parts, self.seed, self.lanes = parts, seed, lanes
        self.counts = [len(samples) for samples in found]
        self.columns = sum(
            part.weight * sum(columns for columns, _ in samples)
            for part, samples in zip(parts, found, strict=True)
        )
        self.quality = None
        if order == "quality":
            wers = np.array([math.nan if wer is None else wer for part in found for _, wer in part])
            # Who was never judged stands in the middle.
            self.quality = -np.where(np.isnan(wers), np.nanmedian(wers), wers)
        self.order = lru_cache(maxsize=4)(self._order)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, epoch))
        items, first = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            here = np.arange(first, first + count)
            items.append(np.repeat(here, int(part.weight)))
            if extra := self._extra(part, count):
                items.append(rng.permutation(here)[:extra])
            first += count
        chosen = rng.permutation(np.concatenate(items))  # equals in quality come by chance
        if self.quality is None:
            return chosen
        return chosen[np.argsort(self.quality[chosen], kind="stable")]

    @staticmethod
    def _extra(part: Part, count: int) -> int:
        share = part.weight % 1 * count
        return max(1, round(share)) if share else 0  # however small, not nothing

    def __len__(self) -> int:
        """Samples in one pass."""
        return sum(
            int(part.weight) * count + self._extra(part, count)
            for part, count in zip(self.parts, self.counts, strict=True)
        )

    def index(self, lane: int, number: int) -> int:
        """Which sample, counted over all parts, is number `number` of a lane."""
        epoch, place = divmod(number * self.lanes + lane, len(self))
        return int(self.order(epoch)[place])

    def exposures(self, columns: float) -> list[Exposure]:
        """How often each part is seen in so many columns, over all lanes."""
        passes = columns / max(1.0, self.columns)
        return [
            Exposure(part.path, count, passes * part.weight, part.epochs)
            for part, count in zip(self.parts, self.counts, strict=True)
        ]


def _parts(path: UPath | tuple[Part, ...]) -> tuple[Part, ...]:
    return path if isinstance(path, tuple) else (Part(path=path),)


_Any = TypeVar("_Any")
_Item: TypeAlias = tuple[_Any, int, float | None]
"""What a document is made of, its columns, its word error rate."""


def _gather(
    config: DialogueSource | InterleavedSource | AudioSource | TaskSource,
    seed: int,
    read: Callable[[UPath], Iterable[_Item[_Any]]],
    lack: str,
) -> tuple[list[_Any], Pool]:
    """What there is in a mixture of shards, and which of it a lane sees when.

    `lack` is what a folder ({}) without any is told. Raises UserError then.
    """
    items: list[_Any] = []
    found = []
    parts = _parts(config.path)
    for part in parts:
        here = list(read(part.path))
        if not here:
            raise UserError(f"data: {lack.format(part.path)}.")
        items += [item for item, _, _ in here]
        found.append([(columns, wer) for _, columns, wer in here])
    if config.order == "quality" and all(wer is None for part in found for _, wer in part):
        named = ", ".join(str(part.path) for part in parts)
        raise UserError(
            f"order is quality, but no recognizer has judged a sample of {named}: make them with "
            "verify, or leave order out."
        )
    return items, Pool(parts, found, config.order, seed, config.rows)


def join(samples: Iterable[shards.Sample]) -> Iterator[shards.Sample]:
    """Put conversations together again that were cut into samples one after the other.

    A cut would else look like the start of a conversation, which it is not.
    """
    held: list[shards.Sample] = []
    end = 0.0
    for sample in samples:
        follows = (
            bool(held)
            and "conversation" in sample.meta
            and sample.meta["conversation"] == held[0].meta.get("conversation")
            and sample.voices == held[0].voices
            and abs(sample.meta.get("start", 0.0) - end) < 1e-3
        )
        if held and not follows:
            yield _joined(held)
            held = []
        held.append(sample)
        end = float(sample.meta.get("start", 0.0)) + sample.seconds
    if held:
        yield _joined(held)


def _joined(samples: Sequence[shards.Sample]) -> shards.Sample:
    if len(samples) == 1 or any(sample.codes is None for sample in samples):
        return samples[0]
    first = samples[0]
    words: list[list[Word]] = [[] for _ in first.words]
    events: list[shards.Event] = []
    seconds = 0.0
    for sample in samples:
        for channel, said in zip(words, sample.words, strict=True):
            channel += [replace(w, start=w.start + seconds, end=w.end + seconds) for w in said]
        for event in sample.events:
            _add_event(events, event, seconds)
        seconds += sample.seconds
    codes = [sample.codes for sample in samples if sample.codes is not None]
    return first.model_copy(
        update={
            "words": tuple(map(tuple, words)),
            "seconds": seconds,
            "events": tuple(events),
            "codes": np.concatenate(codes, axis=2),
        }
    )


def _add_event(events: list[shards.Event], event: shards.Event, seconds: float) -> None:
    """Add an event of a sample that begins after `seconds`, to its first part where it has one."""
    meta = dict(event.meta)
    if "start" in meta:
        meta["start"] += seconds
    moved = {"start": event.start + seconds, "end": event.end + seconds, "meta": meta}
    event = event.model_copy(update=moved)
    for index, other in enumerate(events):
        same = (other.kind, other.channel, other.meta) == (event.kind, event.channel, event.meta)
        if same and abs(other.end - seconds) < 1e-6 and abs(event.start - seconds) < 1e-6:
            events[index] = other.model_copy(update={"end": event.end})
            return
    events.append(event)


class _Sound:
    """The sound of conversations, for what lies over it."""

    def __init__(self, path: UPath, streams: Streams) -> None:
        """Raises UserError when there is none that fits the model."""
        self.talks: list[npt.NDArray[np.uint16]] = []  # [2, K, T]
        self.silences: list[npt.NDArray[np.uint16]] = []  # [K, T]
        for sample in shards.read(path, audio=False):
            if sample.codes is None or sample.codes.shape[:2] != (2, streams.k):
                continue
            check_codes(sample, streams)
            self.talks.append(sample.codes)
            if ASSISTANT in sample.meta.get(UNTRANSCRIBED, ()):
                continue  # nobody knows where it is silent
            own = sample.codes[ASSISTANT]
            near = speaking_frames(sample.words[ASSISTANT], own.shape[1], _HUSH)
            edges = np.flatnonzero(np.diff(near)) + 1
            for part, speaks in zip(
                np.split(own, edges, axis=1), np.split(near, edges), strict=True
            ):
                if not speaks[0]:
                    self.silences.append(part)
        if not self.talks or not self.silences:
            raise UserError(
                f"data: no conversation with {streams.k} codebooks and silence in '{path}'."
            )

    def talk(self, rng: np.random.Generator, frames: int) -> npt.NDArray[np.uint16]:
        """Both sides of so much of a conversation, from anywhere in it: [2, K, frames]."""
        codes = self.talks[int(rng.integers(len(self.talks)))]
        first = int(rng.integers(codes.shape[2]))
        return codes.take(range(first, first + frames), axis=2, mode="wrap")

    def silence(self, rng: np.random.Generator, frames: int) -> npt.NDArray[np.uint16]:
        """So much silence of an assistant: [K, frames]."""
        parts: list[npt.NDArray[np.uint16]] = []
        while sum(part.shape[1] for part in parts) < frames:
            parts.append(self.silences[int(rng.integers(len(self.silences)))])
        return np.concatenate(parts, axis=1)[:, :frames]


_HUSH = 0.4  # Seconds around the assistant's words that are not silence.


class _Dialogues:
    def __init__(
        self,
        config: DialogueSource,
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        seed: int,
    ) -> None:
        self.config, self.streams, self.weights, self.seed = config, streams, weights, seed

        def read(path: UPath) -> Iterator[_Item[shards.Sample]]:
            for sample in join(shards.read(path, audio=False)):
                frames = 0 if sample.codes is None else sample.codes.shape[-1]
                yield sample, frames, sample.wer

        samples, self.pool = _gather(config, seed, read, "no dialogue in '{}'")
        self.dialogues = [encode_dialogue(s, streams, tokenizer, weights) for s in samples]
        self.exchanged: list[Dialogue] = []
        if config.exchange > 0:
            self.exchanged = [
                encode_dialogue(exchanged(s), streams, tokenizer, weights) for s in samples
            ]
        self._last: dict[int, tuple[int, Document]] = {}

    def document(self, lane: int, number: int) -> Document:
        # A dialogue spans many rows, one after the other: the one at hand is kept.
        if lane not in self._last or self._last[lane][0] != number:
            index = self.pool.index(lane, number)
            rng = np.random.default_rng((self.seed, lane, number, 1))
            dialogue = self.dialogues[index]
            if self.config.exchange > 0 and rng.random() < self.config.exchange:
                dialogue = self.exchanged[index]
            made = dialogue_document(dialogue, self.streams, self.weights, rng)
            self._last[lane] = (number, made)
        return self._last[lane][1]


class _Quiz:
    def __init__(
        self,
        config: QuizSource,
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        seed: int,
    ) -> None:
        self.config, self.streams, self.tokenizer = config, streams, tokenizer
        self.weights, self.seed = weights, seed
        self.restating = config.restating
        self.sound = None if config.under is None else _Sound(config.under, streams)

    def document(self, lane: int, number: int) -> Document:
        rng = np.random.default_rng((self.seed, lane, number))
        # Chance is asked only for what is switched on: a recipe without it keeps its documents.
        alone = self.config.alone > 0 and rng.random() < self.config.alone
        turns = []
        for _ in range(int(rng.integers(1, self.config.turns + 1))):
            question = self._draw(rng, self.restating if alone else None)
            turns.append(("" if alone else question.text, question.answer))
        paced = rng.random() < self.config.paced

        def pace(pieces: int) -> int:
            return int(rng.integers(2, 6)) + pieces - 1

        # Over sound nothing says when to speak: turns are where sound and text agree.
        made = question_document(
            turns,
            self.streams,
            self.tokenizer,
            self.weights,
            pace if paced else None,
            timed=self.sound is None,
        )
        if self.sound is not None:
            before = 1 + self.streams.longest_delay
            codes = self.sound.talk(rng, before + made.weights.shape[1])
            made = laid_over(made, self.streams, codes, ("own", "user"))
            if self.streams.heard:
                made.weights[self.streams.heard_index] = 0  # nobody can hear it in that
        return replace(made, name=" ".join(question or answer for question, answer in turns))

    def _draw(
        self, rng: np.random.Generator, only: Mapping[str, float] | None = None
    ) -> quiz.Question:
        if only is None and rng.random() < self.config.unknown:
            return quiz.draw(rng, "train", quiz.UNKNOWN)
        category = quiz.draw_category(rng, only or self.config.categories)
        if category in quiz.BEYOND and rng.random() < self.config.beyond:
            return quiz.draw_beyond(rng, category)
        return quiz.draw(rng, "train", category)


class _Sentences:
    def __init__(
        self, config: SentenceSource, streams: Streams, tokenizer: TextTokenizer, seed: int
    ) -> None:
        self.config, self.streams, self.tokenizer, self.seed = config, streams, tokenizer, seed
        self.sentences = [
            sentence
            for sentence in sentences_from(config.path)
            if 0 < len(sentence.split()) <= config.max_words
        ]
        if not self.sentences:
            raise UserError(
                f"data: no sentence of up to {config.max_words} words in '{config.path}'."
            )

    def document(self, lane: int, number: int) -> Document:
        place = number * self.config.rows + lane
        index = _shuffled(self.seed, place, len(self.sentences))
        sentence = self.sentences[index]
        return replace(sentence_document(sentence, self.streams, self.tokenizer), name=sentence)


@dataclass(frozen=True, slots=True)
class _Utterance:
    codes: npt.NDArray[np.uint16]  # [K, T]
    words: tuple[Word, ...]
    name: str


@dataclass(frozen=True, slots=True)
class _LaidOut:
    """A document of which somebody has decided what is speech."""

    spans: list[list[int] | Codes]
    roles: list[Role] | None
    """Of each span; None where any role will do, the same for all."""
    name: str

    @property
    def columns(self) -> int:
        """About how long it is."""
        return sum(
            span.shape[1] if isinstance(span, np.ndarray) else len(span) for span in self.spans
        )


def lay_out(sample: shards.Sample, streams: Streams, tokenizer: TextTokenizer) -> _LaidOut:
    """Give ids to an interleaved sample. Raises UserError when its codes are not for this model."""
    if sample.codes is None:
        raise UserError(f"interleaved sample '{sample.id}' has no codes.")
    check_codes(sample, streams)
    segments = read_segments(sample.meta)
    spans = [
        tokenizer.encode(segment.text)
        if segment.modality == "text"
        else sample.codes[0][:, segment.first : segment.last]
        for segment in segments
    ]
    rule, roles = sample.meta["rule"], None
    if rule in QUESTION_RULES:  # the user asks, the model answers
        roles = [_ROLES[segment.utterance] for segment in segments]
    elif rule in ("asr", "tts"):
        roles = [_ROLES[rule == "tts"]] * len(segments)
    return _LaidOut(spans, roles, sample.id)


_ROLES: tuple[Role, Role] = ("user", "own")


class _Interleaved:
    def __init__(
        self,
        config: InterleavedSource,
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        seed: int,
    ) -> None:
        self.config, self.streams, self.tokenizer = config, streams, tokenizer
        self.weights, self.seed = weights, seed

        def read(path: UPath) -> Iterator[_Item[_Utterance | _LaidOut]]:
            for sample in shards.read(path, audio=False):
                if "segments" in sample.meta:
                    laid = lay_out(sample, streams, tokenizer)
                    yield laid, laid.columns, sample.wer
                elif sample.codes is not None and sample.codes.shape[1] == streams.k:
                    check_codes(sample, streams)
                    for codes, words in zip(sample.codes, sample.words, strict=True):
                        if words:
                            yield _Utterance(codes, words, sample.id), codes.shape[1], sample.wer

        lack = f"no interleaved document and no utterance with {streams.k} codebooks in '{{}}'"
        self.found, self.pool = _gather(config, seed, read, lack)

    def document(self, lane: int, number: int) -> Document:
        found = self.found[self.pool.index(lane, number)]
        rng = np.random.default_rng((self.seed, lane, number, 1))
        spans: list[list[int] | Codes]
        roles: list[Role] | None
        if isinstance(found, _LaidOut):
            spans, roles = found.spans, found.roles
        else:
            spans, roles = self._spans(found, rng), None
        role = _ROLES[int(rng.random() < 0.5)]
        made = interleaved_document(spans, self.streams, self.weights, roles or role)
        return replace(made, name=found.name)

    def _spans(self, found: _Utterance, rng: np.random.Generator) -> list[list[int] | Codes]:
        words, codes = found.words, found.codes
        count = min(len(words), self.config.max_words)
        first = int(rng.integers(len(words) - count + 1))
        spans: list[list[int] | Codes] = []
        for segment in interleave(rng, count, self.config.layout).segments:
            here = replace(segment, start=segment.start + first, end=segment.end + first)
            if segment.modality == "speech":
                begin, end = frame_range(words, here, FRAME_RATE, codes.shape[1])
                spans.append(codes[:, begin:end])
            else:
                said = words[here.start : here.end]
                spans.append([piece for word in said for piece in self.tokenizer.word(word.text)])
        return spans


class _Audio:
    def __init__(
        self,
        config: AudioSource,
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        seed: int,
    ) -> None:
        self.config, self.streams, self.tokenizer = config, streams, tokenizer
        self.weights, self.seed = weights, seed

        def read(path: UPath) -> Iterator[_Item[Spoken]]:
            for sample in shards.read(path, audio=False):
                for said in spoken(sample, streams):
                    yield said, said.codes.shape[1], sample.wer

        if config.listen > 0 and not streams.heard and weights.user == 0:
            raise UserError(
                f"listen is {config.listen:g}, but the model neither writes down what it hears "
                "(model.heard) nor learns the user's codes (weights.user): nothing is learned."
            )
        self.sound = None if config.silence is None else _Sound(config.silence, streams)
        lack = "no sample in '{}' has codes; build its shards with a codec"
        self.utterances, self.pool = _gather(config, seed, read, lack)

    def document(self, lane: int, number: int) -> Document:
        said = self.utterances[self.pool.index(lane, number)]
        rng = np.random.default_rng((self.seed, lane, number, 1))
        listens = bool(said.words) and rng.random() < self.config.listen
        made = monologue_document(
            said, self.streams, self.tokenizer, self.weights, rng, "user" if listens else "own"
        )
        if listens and self.sound is not None:
            hush = self.sound.silence(rng, made.weights.shape[1])
            made = laid_over(made, self.streams, hush[None], ("own",))
        return replace(made, name=said.name)


class _Tasks:
    def __init__(
        self,
        config: TaskSource,
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        seed: int,
    ) -> None:
        self.config, self.streams, self.tokenizer = config, streams, tokenizer
        self.weights, self.seed = weights, seed
        self.prompt = PROMPTS[config.kind] if config.prompt is None else config.prompt
        answers, most = config.kind == "spoken_qa", config.max_words

        def read(path: UPath) -> Iterator[_Item[tuple[Spoken, ...]]]:
            samples = shards.read(path, audio=False)
            for sample in join(samples) if answers else samples:
                found: Sequence[tuple[Spoken, ...]]
                if answers:
                    found = exchanges(sample, streams)
                else:
                    found = [(said,) for said in spoken(sample, streams)]
                for item in found:
                    if all(1 <= len(said.text) <= most for said in item):
                        yield item, self._columns(item), sample.wer

        wanted = "question and answer" if answers else "utterance"
        lack = f"'{{}}' has no {wanted} with codes and 1 to {most} words"
        self.items, self.pool = _gather(config, seed, read, lack)

    def _columns(self, item: tuple[Spoken, ...]) -> int:
        """About how long a document is; a word counts as a piece."""
        modalities: tuple[Modality, ...] = (self.config.question, self.config.answer)
        if self.config.kind != "spoken_qa":
            item, modalities = item * 2, ("speech", "text")  # what is said, and its words
        return sum(
            said.codes.shape[1] if modality == "speech" else len(said.text)
            for said, modality in zip(item, modalities, strict=True)
        )

    def document(self, lane: int, number: int) -> Document:
        item = self.items[self.pool.index(lane, number)]
        return replace(self._document(item), name=item[0].name)

    def _document(self, item: tuple[Spoken, ...]) -> Document:
        if self.config.kind == "asr":
            make = asr_document
        elif self.config.kind == "tts":
            make = tts_document
        else:
            question, answer = item
            modalities = (self.config.question, self.config.answer)
            return answer_document(
                question,
                answer,
                modalities,
                self.streams,
                self.tokenizer,
                self.weights,
                self.prompt,
            )
        return make(item[0], self.streams, self.tokenizer, self.weights, self.prompt)


def open_source(
    config: Source, streams: Streams, tokenizer: TextTokenizer, weights: WeightConfig, seed: int
) -> Documents:
    """The documents that a source's config describes. Raises UserError on missing or unfit data."""
    match config:
        case DialogueSource():
            return _Dialogues(config, streams, tokenizer, weights, seed)
        case QuizSource():
            return _Quiz(config, streams, tokenizer, weights, seed)
        case SentenceSource():
            return _Sentences(config, streams, tokenizer, seed)
        case InterleavedSource():
            return _Interleaved(config, streams, tokenizer, weights, seed)
        case AudioSource():
            return _Audio(config, streams, tokenizer, weights, seed)
        case TaskSource():
            return _Tasks(config, streams, tokenizer, weights, seed)
