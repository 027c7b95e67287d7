"""From shards and text to packed batches of columns, exactly resumable.

A *document* is a matrix of columns with loss weights. Each row of a batch (a *lane*) reads its own
endless sequence of documents, one after the other; document n of a lane is a pure function of the
seed, the lane and n. So the whole position in the data is two numbers a lane, and a resumed run
sees what an uninterrupted one would have seen.

    lane 0   │ dialogue 17 ────────────┬ dialogue 4 ─────── … │  goes on in the next row, its first
    lane 1   │ dialogue 9 ──────┬ dialogue 30 ───────────── … │  input there the column before
    lane 2   │ text ┬ text ┬ text ┬ text ┬ (padding)          │  text is never cut

Lanes are numbered over all processes: any number of them reads the same rows, each its share.

Shards name no vocabulary: ids are given here, when they are loaded.

Shapes: S streams, K codebooks, T frames or columns, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, field_validator

from audio_codec.audio import FRAME_RATE
from audio_codec.errors import UserError
from speechlm.model import Batch
from speechlm.streams import ABSENT, BOS, EOS, EPAD, PAD, SPEECH, TEXT, Streams
from speechlm.text_tokenizer import TextTokenizer
from synth_data import quiz, shards
from synth_data.dialogue import ASSISTANT, USER
from synth_data.interleave import (
    QUESTION_RULES,
    InterleaveConfig,
    Modality,
    frame_range,
    interleave,
    read_segments,
)
from synth_data.mixture import HUMAN, MADE, Count, Shares, Summary, shares, summarize
from synth_data.text import normalize, sentences_from, spell_out
from synth_data.tts import Word

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Codes = npt.NDArray[np.integer[Any]]


def place(
    words: Sequence[Word],
    frames: int,
    tokenizer: TextTokenizer,
    *,
    at: Literal["start", "end"],
    offset: int = 0,
    epad: bool = True,
) -> Ids:
    """Pieces of words on the frames: int32 [T].

    The first piece of a word stands `offset` frames from the frame its start falls into, or from
    the one after its end; the word's other pieces follow frame by frame, and a word whose place is
    taken waits until it is free. All else is PAD, but EPAD in a free frame right before a word.
    """
    row = np.full(frames, PAD, np.int32)
    free = 0
    for word in words:
        if at == "start":
            anchor = math.floor(word.start * FRAME_RATE + 1e-6)
        else:
            anchor = math.ceil(word.end * FRAME_RATE - 1e-6)
        first = max(anchor + offset, free)
        if epad and free < first <= frames:
            row[first - 1] = EPAD
        pieces = tokenizer.word(word.text)[: max(0, frames - first)]
        row[first : first + len(pieces)] = pieces
        free = first + len(pieces)
    return row


# -------------------------------------------------------------------------------------- documents


class WeightConfig(BaseModel):
    """What is learned how much, and where words stand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pad: float = Field(0.5, ge=0)
    """Weight of PAD on a text stream, beside 1 of a piece."""
    semantic: float = Field(3.0, ge=0)
    """Weight of a semantic code, beside 1 of an acoustic one."""
    question: float = Field(0.2, ge=0)
    """Weight of the pieces that are given: of a question without sound, since what a user asks is
    free, and of what is to be read aloud."""
    silence: float = Field(0.15, ge=0, le=1)
    """Share of the assistant's silent frames whose codes are learned, far from its speech."""
    margin: float = Field(1.0, ge=0)
    """Seconds around its speech in which all are."""
    lead: int = 0
    """Frames that the assistant's text runs ahead of its voice."""
    jitter: float = Field(0.0, ge=0)
    """Seconds by which that text is moved at most, forth or back, another time in each document: so
    that the model learns to take text that is not quite in time (Moshi pre-trains with 0.6)."""
    heard_delay: int = Field(2, ge=0)
    """Frames after the end of a user's word before it is written down."""
    speech: bool = True
    """Whether the codes inside interleaved documents are learned, or their text alone (as in
    InSerter, arXiv 2503.02769)."""
    user: float = Field(0.0, ge=0)
    """Weight of the user's codes, beside the assistant's; only for a model that predicts them."""


@dataclass(frozen=True, slots=True)
class Document:
    """Columns with what is to be learned from each."""

    columns: Ids  # [S, T + 1]; the first is input only
    weights: Weights  # [S, T], of the columns 1 … T as targets
    whole: bool = False
    """Never cut in two."""
    name: str = ""
    """Of the sample it was made of, or what it says."""


def _assemble(streams: Streams, frames: Ids) -> Ids:
    """Frames [S, T] → start column and T columns [S, T + 1]."""
    time = frames.shape[1]
    columns = streams.delay(torch.from_numpy(frames)).numpy()[:, :time]
    return np.concatenate((np.array(streams.sizes, np.int32)[:, None], columns), axis=1)


def _text_weights(row: Ids, piece: float, pad: float) -> Weights:
    weights = np.where(row == PAD, np.float32(pad), np.float32(piece))
    return np.where(row == ABSENT, np.float32(0), weights)


def speaking_frames(words: Sequence[Word], frames: int, margin: float) -> npt.NDArray[np.bool_]:
    """Frames within `margin` seconds of a word: bool [T]."""
    near = np.zeros(frames, bool)
    for word in words:
        begin = max(0, math.floor((word.start - margin) * FRAME_RATE))
        near[begin : max(begin, math.ceil((word.end + margin) * FRAME_RATE))] = True
    return near


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation in ids, as it is held in memory."""

    codes: npt.NDArray[np.uint16]  # [2, K, T], assistant and user
    text: Ids  # [T]
    heard: Ids  # [T]
    near: npt.NDArray[np.bool_]  # [2, T] at or around each speaker's speech
    name: str = ""


def encode_dialogue(
    sample: shards.Sample, streams: Streams, tokenizer: TextTokenizer, config: WeightConfig
) -> Dialogue:
    """Give ids to a two-channel sample. Raises UserError when its codes are not for this model."""
    if sample.codes is None:
        raise UserError(f"sample '{sample.id}' has no codes; build its shards with a codec.")
    channels, k, frames = sample.codes.shape
    if channels != 2 or k != streams.k:
        raise UserError(
            f"sample '{sample.id}' has codes of {channels} channels × {k} codebooks; "
            f"expected 2 × {streams.k}."
        )
    check_codes(sample, streams)
    said, asked = sample.words[ASSISTANT], sample.words[USER]
    delay = config.heard_delay
    return Dialogue(
        codes=sample.codes,
        text=place(said, frames, tokenizer, at="start", offset=-config.lead),
        heard=place(asked, frames, tokenizer, at="end", offset=delay, epad=False),
        near=np.stack([speaking_frames(w, frames, config.margin) for w in (said, asked)]),
        name=sample.id,
    )


def check_codes(sample: shards.Sample, streams: Streams) -> None:
    """Raise UserError when a sample's codes are not of this model's codebooks."""
    assert sample.codes is not None
    k = sample.codes.shape[1]
    if k > streams.k:
        raise UserError(
            f"sample '{sample.id}' has codes of {k} codebooks, but the model has {streams.k}."
        )
    for book, size in enumerate(streams.code_sizes[:k]):
        if sample.codes[:, book].size and (largest := int(sample.codes[:, book].max())) >= size:
            raise UserError(
                f"sample '{sample.id}' has the code {largest} in codebook {book}, which has but "
                f"{size}: its shards were made with another codec."
            )


def exchanged(sample: shards.Sample) -> shards.Sample:
    """A two-channel sample in which the speakers have changed roles."""
    codes = None if sample.codes is None else sample.codes[::-1]
    voices, words = sample.voices[::-1], sample.words[::-1]
    return sample.model_copy(update={"codes": codes, "words": words, "voices": voices})


def dialogue_document(
    dialogue: Dialogue, streams: Streams, config: WeightConfig, rng: np.random.Generator
) -> Document:
    """A duplex document; `rng` moves the text and picks the silent frames that are learned."""
    text = _moved(dialogue.text, config, rng)
    frames = np.empty((streams.count, len(text)), np.int32)
    frames[streams.text_index] = text
    frames[streams.own] = dialogue.codes[ASSISTANT]
    frames[streams.user] = dialogue.codes[USER]
    if streams.heard:
        frames[streams.heard_index] = dialogue.heard
    columns = _assemble(streams, frames)
    targets = columns[:, 1:]
    weights = np.zeros(targets.shape, np.float32)
    weights[streams.text_index] = _text_weights(text, 1.0, config.pad)
    if streams.heard:
        weights[streams.heard_index] = _text_weights(dialogue.heard, 1.0, config.pad)
    kept = dialogue.near[ASSISTANT] | (rng.random(len(text)) < config.silence)
    weights[streams.own] = _code_weights(targets[streams.own], streams, config) * kept
    if config.user > 0:
        kept = dialogue.near[USER] | (rng.random(len(text)) < config.silence)
        learned = _code_weights(targets[streams.user], streams, config) * kept
        weights[streams.user] = config.user * learned
    return Document(columns, weights, name=dialogue.name)


def _moved(row: Ids, config: WeightConfig, rng: np.random.Generator) -> Ids:
    """A row of text, earlier or later by chance; what leaves its frames is dropped."""
    if config.jitter == 0:
        return row
    most = round(config.jitter * FRAME_RATE)
    by = int(rng.integers(-most, most + 1))
    moved = np.full_like(row, PAD)
    if by < 0:
        moved[:by] = row[-by:]
    else:
        moved[by:] = row[: len(row) - by]
    return moved


def _code_weights(codes: Ids, streams: Streams, config: WeightConfig) -> Weights:
    """Weights of one speaker's codes [K, T]: none in the delay gap."""
    sizes = np.array(streams.code_sizes)[:, None]
    weights = np.ones(codes.shape, np.float32)
    weights[0] = config.semantic
    return np.where((codes >= 0) & (codes < sizes), weights, np.float32(0))


def question_document(
    turns: Sequence[tuple[str, str]],
    streams: Streams,
    tokenizer: TextTokenizer,
    config: WeightConfig,
    pace: Callable[[int], int] | None = None,
) -> Document:
    """Questions and answers without sound: the question is heard, the answer said.

    Without a `pace` a piece takes a frame; with one, a word of n pieces takes `pace(n)` frames, so
    that PADs stand between the words as in a real conversation. A model without a `heard` stream
    reads the question on its text stream.
    """
    rows: dict[str, list[int]] = {"heard": [], "text": []}
    weights: dict[str, list[float]] = {"heard": [], "text": []}

    def say(name: str, text: str, weight: float) -> None:
        other = "text" if name == "heard" else "heard"
        for word in normalize(spell_out(text)).split():
            pieces = tokenizer.word(word)
            gap = max(0, pace(len(pieces)) - len(pieces)) if pace else 0
            # In a conversation the piece comes once a word was heard, but as a word is begun.
            run = [PAD] * gap + [*pieces] if name == "heard" else [*pieces] + [PAD] * gap
            rows[name] += run
            weights[name] += [weight if piece != PAD else weight * config.pad for piece in run]
            rows[other] += [PAD] * len(run)
            weights[other] += [config.pad] * len(run)

    for question, answer in turns:
        say("heard" if streams.heard else "text", question, config.question)
        rows["text"].append(EPAD)
        weights["text"].append(1.0)
        rows["heard"].append(PAD)
        weights["heard"].append(config.pad)
        say("text", answer, 1.0)
    rows["text"].append(PAD)
    weights["text"].append(config.pad)
    rows["heard"].append(PAD)
    weights["heard"].append(config.pad)
    frames = np.full((streams.count, len(rows["text"])), ABSENT, np.int32)
    loss = np.zeros(frames.shape, np.float32)
    frames[streams.text_index] = rows["text"]
    loss[streams.text_index] = weights["text"]
    if streams.heard:
        frames[streams.heard_index] = rows["heard"]
        loss[streams.heard_index] = weights["heard"]
    return Document(_silent(streams, frames), loss, whole=True)


def _silent(streams: Streams, columns: Ids) -> Ids:
    """A start column in front of columns [S, T] that stand as they are."""
    return np.concatenate((np.array(streams.sizes, np.int32)[:, None], columns), axis=1)


def sentence_document(sentence: str, streams: Streams, tokenizer: TextTokenizer) -> Document:
    """Plain text on the text stream, between BOS and EOS."""
    row = np.array([BOS, *tokenizer.encode(sentence), EOS], np.int32)
    frames = np.full((streams.count, len(row)), ABSENT, np.int32)
    frames[streams.text_index] = row
    weights = np.zeros(frames.shape, np.float32)
    weights[streams.text_index] = 1.0
    return Document(_silent(streams, frames), weights, whole=True)


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one person says: codes, and the words in them."""

    codes: Codes  # [K or fewer, T]; a text-to-token model writes the semantic ones alone
    words: tuple[Word, ...]
    """Empty where their times are unknown."""
    text: tuple[str, ...]
    """The words without times; empty where they are unknown too."""
    name: str = ""
    """Of the sample that it comes from."""


def spoken(sample: shards.Sample, streams: Streams) -> list[Spoken]:
    """The channels of a sample with codes. Raises UserError when they are not for this model."""
    if sample.codes is None:
        return []
    check_codes(sample, streams)
    found = []
    for codes, words in zip(sample.codes, sample.words, strict=True):
        text = tuple(word.text for word in words)
        if not text and len(sample.words) == 1:
            text = tuple(normalize(spell_out(sample.text)).split())
        found.append(Spoken(codes, words, text, sample.id))
    return found


_BREATH = 0.1  # Seconds of sound kept around a turn.


def exchanges(sample: shards.Sample, streams: Streams) -> list[tuple[Spoken, Spoken]]:
    """The questions of a conversation with the answers that follow, each cut out of its channel.

    Whoever speaks next has the turn; a backchannel takes none. Raises UserError when the codes are
    not for this model.
    """
    if sample.codes is None or len(sample.codes) != 2:
        return []
    check_codes(sample, streams)
    aside = [(e.start, e.end) for e in sample.events if e.kind == "backchannel"]
    said = [
        (word, channel)
        for channel, words in enumerate(sample.words)
        for word in words
        if channel != USER or not any(a <= word.start + 1e-6 < b for a, b in aside)
    ]
    turns: list[tuple[int, list[Word]]] = []
    for word, channel in sorted(said, key=lambda pair: pair[0].start):
        if not turns or turns[-1][0] != channel:
            turns.append((channel, []))
        turns[-1][1].append(word)

    def cut(channel: int, words: Sequence[Word]) -> Spoken:
        assert sample.codes is not None
        first = max(0, math.floor((words[0].start - _BREATH) * FRAME_RATE))
        last = math.ceil((words[-1].end + _BREATH) * FRAME_RATE)
        begin = first / FRAME_RATE
        here = [replace(w, start=w.start - begin, end=w.end - begin) for w in words]
        text = tuple(word.text for word in words)
        return Spoken(sample.codes[channel, :, first:last], tuple(here), text, sample.id)

    return [
        (cut(*asked), cut(*answered)) for asked, answered in pairwise(turns) if asked[0] == USER
    ]


Role = Literal["own", "user"]
"""Who speaks."""


def monologue_document(
    said: Spoken,
    streams: Streams,
    tokenizer: TextTokenizer,
    config: WeightConfig,
    rng: np.random.Generator,
    role: Role = "own",
) -> Document:
    """One person's speech with its words in time: in the role `own` as the inner monologue of a
    voice, in the role `user` as the transcript of what is heard. The other side is absent.

    `rng` moves the monologue. Without word times, speech is learned alone.
    """
    time = said.codes.shape[1]
    frames = np.full((streams.count, time), ABSENT, np.int32)
    side = streams.own if role == "own" else streams.user
    frames[side][: len(said.codes)] = said.codes
    if role == "user":
        frames[streams.text_index] = PAD  # who listens is silent
        if streams.heard:
            delay = config.heard_delay
            frames[streams.heard_index] = place(
                said.words, time, tokenizer, at="end", offset=delay, epad=False
            )
    elif said.words:
        text = place(said.words, time, tokenizer, at="start", offset=-config.lead)
        frames[streams.text_index] = _moved(text, config, rng)
    columns = _assemble(streams, frames)
    # Where nobody is there are no start ids either, but for the first column's.
    columns[:, 1:][(frames == ABSENT).all(axis=1)] = ABSENT
    targets = columns[:, 1:]
    weights = np.zeros(targets.shape, np.float32)
    if role == "own":
        weights[streams.text_index] = _text_weights(targets[streams.text_index], 1.0, config.pad)
        weights[streams.own] = _code_weights(targets[streams.own], streams, config)
    else:
        if streams.heard:
            heard = targets[streams.heard_index]
            weights[streams.heard_index] = _text_weights(heard, 1.0, config.pad)
        learned = _code_weights(targets[streams.user], streams, config)
        weights[streams.user] = config.user * learned
    return Document(columns, weights)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a document in one modality."""

    content: Sequence[int] | Codes  # pieces, or codes [K or fewer, T]
    role: Role = "own"
    """Whose codes they are."""
    text: float = 1.0
    """Weight of its pieces; of speech, of the switch tokens around it and the PADs inside."""
    codes: bool = True
    """Whether its codes are learned: the assistant's wholly, the user's as `weights.user` says."""


def span_document(spans: Sequence[Span], streams: Streams, config: WeightConfig) -> Document:
    """Text and speech in turn, between BOS and EOS.

    `<speech>` opens a span of frames whose text is PAD; delays apply within it and its trailing
    columns come before the `<text>` that closes it:

        text     <s>  the  quick  <speech>  ·  ·  ·  ·  <text>  jumped  </s>
        own 0                               s0 s1 s2
        own 1                               ▷  a0 a1 a2                        · is PAD
    """
    parts: list[Ids] = []
    losses: list[Weights] = []

    def text(pieces: Sequence[int], weight: float) -> None:
        part = np.full((streams.count, len(pieces)), ABSENT, np.int32)
        part[streams.text_index] = pieces
        loss = np.zeros(part.shape, np.float32)
        loss[streams.text_index] = weight
        parts.append(part)
        losses.append(loss)

    def speech(span: Span, codes: Codes) -> None:
        side = streams.own if span.role == "own" else streams.user
        frames = np.full((streams.count, codes.shape[1]), ABSENT, np.int32)
        frames[side][: len(codes)] = codes
        part = streams.delay(torch.from_numpy(frames)).numpy()
        # Codes that are not there take no column to come late in.
        part = part[:, : codes.shape[1] + max(streams.code_delays[: len(codes)])]
        absent = np.ones(streams.count, bool)
        absent[side.start : side.start + len(codes)] = False
        part[absent] = ABSENT  # no start ids there either
        part[streams.text_index] = PAD
        loss = np.zeros(part.shape, np.float32)
        loss[streams.text_index] = config.pad * span.text
        if span.codes:
            weight = 1.0 if span.role == "own" else config.user
            loss[side] = weight * _code_weights(part[side], streams, config)
        parts.append(part)
        losses.append(loss)

    text([BOS], 1.0)
    for span in spans:
        if isinstance(span.content, np.ndarray):
            text([SPEECH], span.text)
            speech(span, span.content)
            text([TEXT], span.text)
        else:
            text(span.content, span.text)
    text([EOS], 1.0)
    columns, weights = np.concatenate(parts, axis=1), np.concatenate(losses, axis=1)
    return Document(_silent(streams, columns), weights, whole=True)


def interleaved_document(
    spans: Sequence[Sequence[int] | Codes],
    streams: Streams,
    config: WeightConfig,
    role: Role | Sequence[Role] = "own",
) -> Document:
    """Spans of pieces and of codes [K or fewer, T] in turn; see `span_document`.

    `role` is one for all, or one a span.
    """
    roles = [role] * len(spans) if isinstance(role, str) else role
    made = [Span(span, who, codes=config.speech) for span, who in zip(spans, roles, strict=True)]
    return span_document(made, streams, config)


def _pieces(text: Sequence[str], tokenizer: TextTokenizer) -> list[int]:
    return [piece for word in text for piece in tokenizer.word(word)]


def asr_document(
    said: Spoken, streams: Streams, tokenizer: TextTokenizer, config: WeightConfig, prompt: str
) -> Document:
    """A prompt, speech, and its words: these alone are learned."""
    spans = [
        Span(tokenizer.encode(prompt), text=0.0),
        Span(said.codes, "user", text=0.0),
        Span(_pieces(said.text, tokenizer)),
    ]
    return span_document(spans, streams, config)


def tts_document(
    said: Spoken, streams: Streams, tokenizer: TextTokenizer, config: WeightConfig, prompt: str
) -> Document:
    """A prompt, words, and their speech: this is learned, and the words as `question` weighs."""
    spans = [
        Span(tokenizer.encode(prompt), text=0.0),
        Span(_pieces(said.text, tokenizer), text=config.question),
        Span(said.codes),
    ]
    return span_document(spans, streams, config)


def answer_document(
    question: Spoken,
    answer: Spoken,
    modalities: tuple[Modality, Modality],
    streams: Streams,
    tokenizer: TextTokenizer,
    config: WeightConfig,
    prompt: str,
) -> Document:
    """A prompt, a question and its answer, each in its modality; the answer is learned."""
    asked, answered = modalities
    spans = [Span(tokenizer.encode(prompt), text=0.0)]
    if asked == "speech":
        spans.append(Span(question.codes, "user", text=0.0))
    else:
        spans.append(Span(_pieces(question.text, tokenizer), text=config.question))
    if answered == "speech":
        spans.append(Span(answer.codes))
    else:
        spans.append(Span(_pieces(answer.text, tokenizer)))
    return span_document(spans, streams, config)


# ---------------------------------------------------------------------------------------- sources


class Part(BaseModel):
    """One folder of a mixture of shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    weight: float = Field(1.0, ge=0)
    """Times that each of its samples is seen in one pass over the mixture; 0.5 is half of them."""
    epochs: float | None = Field(None, gt=0)
    """Times that each may be seen in the whole run; one that would need more is refused. Up to
    four are almost as good as new data (arXiv 2305.16264)."""


def _some_weight(path: Path | tuple[Part, ...]) -> Path | tuple[Part, ...]:
    if isinstance(path, tuple) and sum(part.weight for part in path) == 0:
        names = ", ".join(str(part.path) for part in path) or "none"
        raise ValueError(f"the mixture sums to zero: give a weight above 0 to a folder ({names})")
    return path


Shards = Annotated[Path | tuple[Part, ...], AfterValidator(_some_weight)]
"""A shard folder, or several with weights."""

Order = Literal["shuffled", "quality"]
"""Anew in every pass; or from the samples that the recognizer understood worst to the best."""


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
    """Longer ones are left out, as a document is never cut."""


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
def _order(seed: int, lane: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, lane, epoch)).permutation(count)


def _shuffled(seed: int, lane: int, number: int, count: int) -> int:
    """Which of `count` items is number `number` of a lane: each once an epoch."""
    epoch, index = divmod(number, count)
    return int(_order(seed, lane, epoch, count)[index])


@dataclass(frozen=True, slots=True)
class Exposure:
    """How often a run sees the samples of a folder."""

    path: Path
    samples: int
    epochs: float
    limit: float | None


_JITTER = 0.1  # of a pass; lanes that went by quality alone would all read the same at a time


class _Pool:
    """Which sample of a mixture of shards a lane sees when."""

    def __init__(
        self,
        parts: Sequence[Part],
        found: Sequence[Sequence[tuple[int, float | None]]],
        order: Order,
        seed: int,
    ) -> None:
        """`found` has, for each part and sample, its columns and its word error rate."""
        self.parts, self.seed = parts, seed
        self.counts = [len(samples) for samples in found]
        self.columns = sum(
            part.weight * sum(columns for columns, _ in samples)
            for part, samples in zip(parts, found, strict=True)
        )
        worst_first = [-math.inf if wer is None else -wer for part in found for _, wer in part]
        ranks = np.argsort(np.argsort(worst_first, kind="stable"), kind="stable")
        self.ranks = ranks / max(1, len(ranks)) if order == "quality" else None
        self.order = lru_cache(maxsize=256)(self._order)

    def _order(self, lane: int, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, lane, epoch))
        items, first = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            here = np.arange(first, first + count)
            items.append(np.repeat(here, int(part.weight)))
            if extra := self._extra(part, count):
                items.append(rng.permutation(here)[:extra])
            first += count
        chosen = np.concatenate(items)
        if self.ranks is None:
            return rng.permutation(chosen)
        return chosen[np.argsort(self.ranks[chosen] + rng.uniform(0, _JITTER, len(chosen)))]

    @staticmethod
    def _extra(part: Part, count: int) -> int:
        return round(part.weight % 1 * count)

    def __len__(self) -> int:
        """Samples in one pass."""
        return sum(
            int(part.weight) * count + self._extra(part, count)
            for part, count in zip(self.parts, self.counts, strict=True)
        )

    def index(self, lane: int, number: int) -> int:
        """Which sample, counted over all parts, is number `number` of a lane."""
        epoch, place = divmod(number, len(self))
        return int(self.order(lane, epoch)[place])

    def exposures(self, columns: float) -> list[Exposure]:
        """How often each part is seen in so many columns, over all lanes."""
        passes = columns / max(1.0, self.columns)
        return [
            Exposure(part.path, count, passes * part.weight, part.epochs)
            for part, count in zip(self.parts, self.counts, strict=True)
        ]


def _parts(path: Path | tuple[Part, ...]) -> tuple[Part, ...]:
    return path if isinstance(path, tuple) else (Part(path=path),)


_Any = TypeVar("_Any")
_Item: TypeAlias = tuple[_Any, int, float | None]
"""What a document is made of, its columns, its word error rate."""


def _gather(
    config: DialogueSource | InterleavedSource | AudioSource | TaskSource,
    seed: int,
    read: Callable[[Path], Iterable[_Item[_Any]]],
    lack: str,
) -> tuple[list[_Any], _Pool]:
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
    return items, _Pool(parts, found, config.order, seed)


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
    seconds = 0.0
    for sample in samples:
        for channel, said in zip(words, sample.words, strict=True):
            channel += [replace(w, start=w.start + seconds, end=w.end + seconds) for w in said]
        seconds += sample.seconds
    codes = [sample.codes for sample in samples if sample.codes is not None]
    return first.model_copy(
        update={
            "words": tuple(map(tuple, words)),
            "seconds": seconds,
            "events": (),
            "codes": np.concatenate(codes, axis=2),
        }
    )


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

        def read(path: Path) -> Iterator[_Item[shards.Sample]]:
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

    def document(self, lane: int, number: int) -> Document:
        rng = np.random.default_rng((self.seed, lane, number))
        turns = []
        for _ in range(int(rng.integers(1, self.config.turns + 1))):
            strange = rng.random() < self.config.unknown
            category = quiz.CATEGORIES[int(rng.integers(len(quiz.CATEGORIES)))]
            question = quiz.draw(rng, "train", quiz.UNKNOWN if strange else category)
            turns.append((question.text, question.answer))
        paced = rng.random() < self.config.paced

        def pace(pieces: int) -> int:
            return int(rng.integers(2, 6)) + pieces - 1

        made = question_document(
            turns, self.streams, self.tokenizer, self.weights, pace if paced else None
        )
        return replace(made, name=" ".join(question for question, _ in turns))


class _Sentences:
    def __init__(
        self, config: SentenceSource, streams: Streams, tokenizer: TextTokenizer, seed: int
    ) -> None:
        self.streams, self.tokenizer, self.seed = streams, tokenizer, seed
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
        index = _shuffled(self.seed, lane, number, len(self.sentences))
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

        def read(path: Path) -> Iterator[_Item[_Utterance | _LaidOut]]:
            for sample in shards.read(path, audio=False):
                if "segments" in sample.meta:
                    laid = lay_out(sample, streams, tokenizer)
                    yield laid, laid.columns, sample.wer
                elif sample.codes is not None and sample.codes.shape[1] == streams.k:
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

        def read(path: Path) -> Iterator[_Item[Spoken]]:
            for sample in shards.read(path, audio=False):
                for said in spoken(sample, streams):
                    yield said, said.codes.shape[1], sample.wer

        lack = "no sample in '{}' has codes; build its shards with a codec"
        self.utterances, self.pool = _gather(config, seed, read, lack)

    def document(self, lane: int, number: int) -> Document:
        said = self.utterances[self.pool.index(lane, number)]
        rng = np.random.default_rng((self.seed, lane, number, 1))
        listens = bool(said.words) and rng.random() < self.config.listen
        made = monologue_document(
            said, self.streams, self.tokenizer, self.weights, rng, "user" if listens else "own"
        )
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

        def read(path: Path) -> Iterator[_Item[tuple[Spoken, ...]]]:
            for sample in shards.read(path, audio=False):
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


# ---------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, slots=True)
class Placed:
    """Part of a document in a row of a batch."""

    lane: int
    number: int
    """Of the document in its lane."""
    name: str
    first: int
    """Column of the row that it begins in."""
    columns: int


@dataclass(slots=True)
class _Lane:
    """Where a lane stands."""

    number: int = 0
    """The next document."""
    used: int = 0
    """Columns of it that are used already."""
    held: list[int] = field(default_factory=list)
    """Earlier documents that did not fit, and wait for a row with room."""


class Packer:
    """Fills rows of one source, a lane each."""

    def __init__(
        self,
        documents: Documents,
        streams: Streams,
        rows: int,
        length: int,
        first_lane: int = 0,
        lookahead: int = 0,
    ) -> None:
        """`length` is the number of columns in a row; lanes count from `first_lane`.

        Where a whole document does not fit, the longest that does of the `lookahead` next ones
        takes its place; it waits itself, for the beginning of the next row at the latest.
        """
        self.documents, self.streams, self.length = documents, streams, length
        self.lookahead = lookahead
        self.lanes = range(first_lane, first_lane + rows)
        # Each lane starts at another point of its first document: were all conversations some rows
        # long, all would be cut alike.
        self.places = [_Lane(used=self._phase(lane)) for lane in self.lanes]
        self.placed: list[Placed] = []
        """What the last batch is made of."""
        self._made: dict[tuple[int, int], Document] = {}

    def _phase(self, lane: int) -> int:
        document = self.documents.document(lane, 0)
        golden = (lane * (math.sqrt(5) - 1) / 2) % 1  # spread evenly, however many lanes
        return 0 if document.whole else int(golden * document.weights.shape[1])

    def _document(self, lane: int, number: int) -> Document:
        if self.lookahead == 0:
            return self.documents.document(lane, number)
        if (lane, number) not in self._made:  # it may be looked at in several rows
            self._made[lane, number] = self.documents.document(lane, number)
        return self._made[lane, number]

    def _choose(self, lane: int, place: _Lane, room: int) -> int | None:
        """The number of the document that comes next into a row with so much room left."""
        if place.used:
            return place.number
        fresh = range(place.number, place.number + self.lookahead + 1 - len(place.held))
        waiting = [*place.held, *fresh]
        if room == self.length:
            return waiting[0]
        best, longest = None, 0
        for number in waiting:
            document = self._document(lane, number)
            size = document.weights.shape[1]
            if not document.whole:  # it fits into any room, and is never passed over
                return number if best is None else best
            if longest < size <= room:
                best, longest = number, size
        return best

    def next(self) -> Batch:
        """The next batch: every lane moves on by one row."""
        rows, count = len(self.lanes), self.streams.count
        inputs = np.full((rows, count, self.length), ABSENT, np.int64)
        targets = np.full_like(inputs, ABSENT)
        weights = np.zeros(inputs.shape, np.float32)
        segments = np.zeros((rows, self.length), np.int64)
        self.placed = []
        for row, lane in enumerate(self.lanes):
            place = self.places[row]
            filled = segment = 0
            while filled < self.length:
                number = self._choose(lane, place, self.length - filled)
                if number is None:
                    break
                document = self._document(lane, number)
                used = place.used if number == place.number else 0
                size = document.weights.shape[1]
                take = min(self.length - filled, size - used)
                into, taken = slice(filled, filled + take), slice(used, used + take)
                inputs[row, :, into] = document.columns[:, taken]
                targets[row, :, into] = document.columns[:, 1:][:, taken]
                weights[row, :, into] = document.weights[:, taken]
                segments[row, into] = segment
                self.placed.append(Placed(lane, number, document.name, filled, take))
                filled, segment = filled + take, segment + 1
                if number < place.number:
                    place.held.remove(number)
                else:
                    place.held += range(place.number, number)
                    # A whole document longer than a row loses what does not fit.
                    done = used + take == size or document.whole
                    place.number, place.used = (number + 1, 0) if done else (number, used + take)
                self._made.pop((lane, number), None)
            segments[row, filled:] = segment
        packed = bool((segments[:, 0] != segments[:, -1]).any())
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(weights),
            torch.from_numpy(segments) if packed else None,
        )


class Mixture:
    """Several sources in fixed shares: each step has one batch of each."""

    def __init__(
        self,
        sources: Sequence[Source],
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        *,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lookahead: int = 0,
    ) -> None:
        """`rank` is the number of this process among `world`; each reads its share of the lanes.

        Raises UserError on data that is missing or unfit, and where lanes cannot be shared evenly.
        """
        total = sum(source.rows for source in sources)
        self.sources, self.length = sources, length
        self.shares = [source.rows / total for source in sources]
        self.packers = []
        for number, source in enumerate(sources):
            if source.rows % world:
                raise UserError(
                    f"sources.{number}.rows is {source.rows}; it must be a multiple of the number "
                    f"of processes, {world}."
                )
            rows = source.rows // world
            opened = open_source(source, streams, tokenizer, weights, seed + 1000 * number)
            self.packers.append(Packer(opened, streams, rows, length, rank * rows, lookahead))

    def next(self) -> list[tuple[float, Batch]]:
        """One batch a source, with its share of the rows."""
        return [(share, p.next()) for share, p in zip(self.shares, self.packers, strict=True)]

    def exposures(self, steps: int) -> list[Exposure]:
        """How often so many steps see the samples of each folder.

        Raises UserError where that is more often than the folder's `epochs` allow.
        """
        found: list[Exposure] = []
        for source, packer in zip(self.sources, self.packers, strict=True):
            pool = getattr(packer.documents, "pool", None)
            if isinstance(pool, _Pool):
                found += pool.exposures(steps * source.rows * self.length)
        for one in found:
            if one.limit is not None and one.epochs > one.limit:
                raise UserError(
                    f"sources: the samples of '{one.path}' would be seen {one.epochs:.2g} times in "
                    f"{steps} steps; its epochs allow {one.limit:g}."
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position in the data of this process's lanes; `together` makes it that of all."""
        return {
            "places": [
                [[lane.number, lane.used, *lane.held] for lane in packer.places]
                for packer in self.packers
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position of all lanes; this process takes its own.

        Raises UserError when it is one of other sources.
        """
        rows = [len(places) for places in state["places"]]
        if rows != [source.rows for source in self.sources]:
            raise UserError(
                f"sources: their rows are {[source.rows for source in self.sources]}, but the run "
                f"to go on with has {rows}."
            )
        for packer, places in zip(self.packers, state["places"], strict=True):
            packer.places = [
                _Lane(int(number), int(used), [int(waiting) for waiting in held])
                for number, used, *held in (places[lane] for lane in packer.lanes)
            ]


def together(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of all lanes, from those of each process in the order of ranks."""
    by_source = zip(*(state["places"] for state in states), strict=True)
    return {"places": [[place for part in parts for place in part] for parts in by_source]}
