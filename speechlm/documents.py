"""From a sample to a document: columns of ids, with what is to be learned from each.

A *document* is a matrix of columns with loss weights: a conversation, questions and answers in
text, a sentence, a monologue, speech and text by turns, a task. Shards name no vocabulary: ids are
given here, when they are loaded.

Shapes: S streams, K codebooks, T frames or columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from audio_codec.audio import FRAME_RATE
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import same_coder
from speechlm.streams import ABSENT, BOS, EOS, EPAD, PAD, SPEECH, TEXT, Streams
from speechlm.text_tokenizer import TextTokenizer
from synth_data import shards
from synth_data.dialogue import ASSISTANT, UNTRANSCRIBED, USER
from synth_data.interleave import Modality
from synth_data.text import normalize, spell_out
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
    text = place(said, frames, tokenizer, at="start", offset=-config.lead)
    heard = place(asked, frames, tokenizer, at="end", offset=config.heard_delay, epad=False)
    near = np.stack([speaking_frames(w, frames, config.margin) for w in (said, asked)])
    for channel, row in ((ASSISTANT, text), (USER, heard)):
        if channel in sample.meta.get(UNTRANSCRIBED, ()):
            row[:] = ABSENT  # PAD would teach that nothing was said
            near[channel] = True  # and no word tells speech from silence
    return Dialogue(codes=sample.codes, text=text, heard=heard, near=near, name=sample.id)


def check_codes(sample: shards.Sample, streams: Streams) -> None:
    """Raise UserError when a sample's codes are not of this model's codebooks."""
    assert sample.codes is not None
    k = sample.codes.shape[1]
    if k > streams.k:
        raise UserError(
            f"sample '{sample.id}' has codes of {k} codebooks, but the model has {streams.k}."
        )
    if not same_coder(sample.coded_by, streams.coded_by):
        raise UserError(
            f"sample '{sample.id}' has codes of another tokenizer or codec than the model's: make "
            "its shards anew with that codec."
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
    missing = [USER if c == ASSISTANT else ASSISTANT for c in sample.meta.get(UNTRANSCRIBED, ())]
    meta = {**sample.meta, UNTRANSCRIBED: missing}
    update = {"codes": codes, "words": words, "voices": voices, "meta": meta}
    return sample.model_copy(update=update)


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
    if config.jitter == 0 or (row == ABSENT).all():
        return row
    most = round(config.jitter * FRAME_RATE)
    by = int(rng.integers(-most, most + 1))
    moved = np.full_like(row, PAD)
    if by < 0:
        moved[:by] = row[-by:]
    else:
        moved[by:] = row[: max(0, len(row) - by)]
    return moved


def _code_weights(codes: Ids, streams: Streams, config: WeightConfig) -> Weights:
    """Weights of one speaker's codes [K, T]: none in the delay gap."""
    sizes = np.array(streams.code_sizes)[:, None]
    weights = np.ones(codes.shape, np.float32)
    weights[0] = config.semantic
    return np.where((codes >= 0) & (codes < sizes), weights, np.float32(0))


# Frames after an answer in which nothing more is said, where that is learned without time.
_AFTER = 4


def question_document(
    turns: Sequence[tuple[str, str]],
    streams: Streams,
    tokenizer: TextTokenizer,
    config: WeightConfig,
    pace: Callable[[int], int] | None = None,
    timed: bool = True,
) -> Document:
    """Questions and answers without sound: the question is heard, the answer said.

    Without a `pace` a piece takes a frame; with one, a word of n pieces takes `pace(n)` frames, so
    that PADs stand between the words as in a real conversation. A model without a `heard` stream
    reads the question on its text stream. An answer whose question is empty stands alone.

    What is not `timed` teaches what is said and where it ends, but not when: of the assistant's
    frames without a piece only those right after an answer are learned.
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

    ends: list[int] = []
    for question, answer in turns:
        say("heard" if streams.heard else "text", question, config.question)
        rows["text"].append(EPAD)
        weights["text"].append(1.0)
        rows["heard"].append(PAD)
        weights["heard"].append(config.pad)
        say("text", answer, 1.0)
        ends.append(1 + max(at for at, piece in enumerate(rows["text"]) if piece != PAD))
    rows["text"].append(PAD)
    weights["text"].append(config.pad)
    rows["heard"].append(PAD)
    weights["heard"].append(config.pad)
    if not timed:
        after = {end + frame for end in ends for frame in range(_AFTER)}
        for at, piece in enumerate(rows["text"]):
            if piece in (PAD, EPAD):
                weights["text"][at] = float(piece == PAD and at in after)
    frames = np.full((streams.count, len(rows["text"])), ABSENT, np.int32)
    loss = np.zeros(frames.shape, np.float32)
    frames[streams.text_index] = rows["text"]
    loss[streams.text_index] = weights["text"]
    if streams.heard:
        frames[streams.heard_index] = rows["heard"]
        loss[streams.heard_index] = weights["heard"]
    return Document(_silent(streams, frames), loss, whole=True)


def laid_over(
    document: Document, streams: Streams, codes: Codes, sides: Sequence[Role]
) -> Document:
    """The document over codes [sides, K, T] of sides that it has none of; they are not learned.

    What a model knows where no sound is, it need not know where there is some: all codes of a
    column are embedded into one vector with its text.

    With more codes than the document has columns it begins in the middle of them: not with a start
    column, from which every real conversation begins. Else short documents that lie over sound
    would say of all beginnings that sound and text have nothing to do with each other.
    """
    columns = document.columns.copy()
    before = codes.shape[2] - document.weights.shape[1]
    for role, over in zip(sides, codes, strict=True):
        side = streams.own if role == "own" else streams.user
        frames = np.full((streams.count, over.shape[1]), ABSENT, np.int32)
        frames[side] = over
        columns[side] = _assemble(streams, frames)[side, before:]
    if before:
        texts = [streams.text_index, *([streams.heard_index] if streams.heard else [])]
        columns[texts, 0] = PAD
    return replace(document, columns=columns)


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
_PAUSE = 0.5  # Seconds of silence after which somebody begins anew, where no event says so.
_EDGE = 1e-3

Turn: TypeAlias = tuple[int, tuple[Word, ...]]
"""Who speaks, and their words."""


def exchanges(sample: shards.Sample, streams: Streams) -> list[tuple[Spoken, Spoken]]:
    """The questions of a conversation with the answers that follow, each cut out of its channel.

    A question is what its `turn_end` says, and its answer the `answer` event that begins next; one
    that was cut short is none. Without such events whoever speaks next has the turn, and keeps it
    until a silence; a backchannel takes none. What the sample's ends cut is left out where events
    tell. Raises UserError when the codes are not for this model.
    """
    if sample.codes is None or len(sample.codes) != 2:
        return []
    check_codes(sample, streams)
    told = any(event.kind == "turn_end" for event in sample.events)

    def cut(channel: int, words: Sequence[Word]) -> Spoken:
        assert sample.codes is not None
        first = max(0, math.floor((words[0].start - _BREATH) * FRAME_RATE))
        last = math.ceil((words[-1].end + _BREATH) * FRAME_RATE)
        begin = first / FRAME_RATE
        here = [replace(w, start=w.start - begin, end=w.end - begin) for w in words]
        text = tuple(word.text for word in words)
        return Spoken(sample.codes[channel, :, first:last], tuple(here), text, sample.id)

    pairs = _told_exchanges(sample) if told else pairwise(_guessed_turns(sample))
    return [(cut(*asked), cut(*answered)) for asked, answered in pairs if asked[0] == USER]


def _told_exchanges(sample: shards.Sample) -> Iterator[tuple[Turn, Turn]]:
    """Questions and whole answers by the events of a conversation."""

    def words(channel: int, start: float, end: float) -> Turn:
        held = (w for w in sample.words[channel] if start - _EDGE <= w.start < end - _EDGE)
        return channel, tuple(held)

    asked = sorted(
        (float(event.meta["start"]), event.end)
        for event in sample.events
        if event.kind == "turn_end" and "start" in event.meta
    )
    answers = sorted(
        (event for event in sample.events if event.kind == "answer"), key=lambda event: event.start
    )
    for (start, end), (following, _) in pairwise([*asked, (math.inf, math.inf)]):
        answer = next((event for event in answers if event.start > start), None)
        if answer is None or answer.start >= following or answer.meta.get("cut"):
            continue
        if start < -_EDGE or answer.end > sample.seconds - _EDGE:  # part of it lies beyond
            continue
        turns = words(USER, start, end), words(ASSISTANT, answer.start, answer.end)
        if all(said for _, said in turns):
            yield turns


def _guessed_turns(sample: shards.Sample) -> list[Turn]:
    """Who speaks in turn, where words alone tell."""
    aside = [(e.start, e.end) for e in sample.events if e.kind == "backchannel"]
    held: list[tuple[float, int, list[Word]]] = []
    for channel, words in enumerate(sample.words):
        last = -math.inf
        for word in words:
            if channel == USER and any(a <= word.start + 1e-6 < b for a, b in aside):
                continue
            if word.start - last > _PAUSE:
                held.append((word.start, channel, []))
            held[-1][2].append(word)
            last = word.end
    turns: list[tuple[int, list[Word]]] = []
    for _, channel, said in sorted(held, key=lambda part: part[:2]):
        if not turns or turns[-1][0] != channel:
            turns.append((channel, []))
        turns[-1][1].extend(said)
    return [(channel, tuple(said)) for channel, said in turns]


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
