"""Drawing a conversation from the language model: one column every 80 ms.

`step` is the fast path: key/value caches, a state in place, any number of conversations at once.
`generate` is the slow obvious one: every column from the whole past, nothing remembered. A test
holds them to the same tokens.

*The clock of a conversation.* Tick n brings the user's frame n and gives column n. The input of
tick 0 is the start column, so the user's very first 80 ms are, to the model, in the past; from then
on the input is column n−1 with the user's frame just heard in it. The voice of frame n−D is whole
once column n is there (D the longest acoustic delay), hence `ready`.

Shapes: B conversations (slots), K codebooks, S streams, D longest delay, V vocabulary, R pieces
remembered by the repetition guard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from audio_codec.sampling import Sampling, sample
from audio_codec.state import State, all_active, keep
from audio_codec.transformer import TransformerState
from speechlm.model import LMSampling, SpeechLM
from speechlm.streams import EPAD, PAD, SPEECH, TEXT, UNKNOWN, Streams

MAX_TOP_K = 256
"""More candidates than this are never considered: a top-k is several times cheaper than a sort."""

_RECENT = 16


@dataclass(slots=True)
class LMState(State):
    """What the language model remembers of each conversation.

    The last five are settings. Zero means the default that `step` is given, so that a state of
    zeros is a fresh conversation; a negative temperature takes the likeliest token.
    """

    temporal: TransformerState
    depth: TransformerState
    tick: Tensor  # [B] int64 columns drawn so far
    text: Tensor  # [B] int64 of the last column
    heard: Tensor  # [B] int64 of the last column
    own: Tensor  # [B, K, D+1] int64, columns, newest last
    user: Tensor  # [B, K, D+1] int64, frames, newest last
    recent: Tensor  # [B, R] int64 text pieces, newest last, PAD where none
    seed: Tensor  # [B] int64
    text_temperature: Tensor  # [B] float32
    audio_temperature: Tensor  # [B] float32
    text_top_k: Tensor  # [B] int64
    audio_top_k: Tensor  # [B] int64


def new_state(model: SpeechLM, batch: int) -> LMState:
    """The state of `batch` conversations that have not begun."""
    streams = model.streams
    device = model.text_head.weight.device
    depth = 1 + streams.longest_delay

    def integers(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, dtype=torch.int64, device=device)

    return LMState(
        active=all_active(batch, device),
        temporal=model.new_state(batch),
        depth=model.depth.transformer.new_state(batch),
        tick=integers(),
        text=integers(),
        heard=integers(),
        own=integers(streams.k, depth),
        user=integers(streams.k, depth),
        recent=integers(_RECENT),
        seed=integers(),
        text_temperature=torch.zeros(batch, device=device),
        audio_temperature=torch.zeros(batch, device=device),
        text_top_k=integers(),
        audio_top_k=integers(),
    )


@dataclass(frozen=True, slots=True)
class LMOutput:
    """What one tick gives for each conversation."""

    codes: Tensor  # [B, K] int64, one undelayed frame of the assistant's voice
    ready: Tensor  # [B] bool: whether `codes` is a frame; not so in the first D ticks
    text: Tensor  # [B] int64, PAD and EPAD included
    heard: Tensor  # [B] int64; PAD for a model without that stream


@dataclass(frozen=True, slots=True)
class _Settings:
    """One stream's settings, a row each."""

    temperature: Tensor  # [B]
    top_k: Tensor  # [B]
    top_p: float


def _settings(default: Sampling, temperature: Tensor, top_k: Tensor) -> _Settings:
    heat = torch.where(temperature == 0, default.temperature, temperature.clamp(min=0))
    return _Settings(heat, torch.where(top_k == 0, default.top_k, top_k), default.top_p)


def _draw(logits: Tensor, settings: _Settings, seed: Tensor, counter: Tensor) -> Tensor:
    """[B, V] → int64 [B]."""
    how = (settings.temperature, settings.top_k, settings.top_p)
    return sample(logits, seed, counter, *how, most=MAX_TOP_K)


def _sayable(logits: Tensor) -> Tensor:
    """Rules out the special pieces that have no place in a conversation: [B, V], in place."""
    logits[:, UNKNOWN:EPAD] = -torch.inf
    logits[:, SPEECH : TEXT + 1] = -torch.inf
    return logits


def _draw_text(
    logits: Tensor, recent: Tensor, penalty: float, settings: _Settings, seed: Tensor, at: Tensor
) -> Tensor:
    logits = _sayable(logits.float().clone())
    if penalty > 1:
        spare = torch.zeros_like(logits).scatter_(1, recent, 1.0)
        spare[:, PAD] = 0
        logits -= spare * torch.tensor(penalty).log()
    return _draw(logits, settings, seed, at)


def _remember(recent: Tensor, text: Tensor) -> Tensor:
    """The guard's memory after one more token: [B, R], [B] → [B, R]."""
    said = (text != PAD) & (text != EPAD)
    return keep(said, torch.cat((recent[:, 1:], text[:, None]), dim=1), recent)


def _input_column(streams: Streams, state: LMState) -> Tensor:
    """[B, S]: the last column with the newest user frame in it; start ids before the beginning."""
    delays = torch.tensor(streams.code_delays, device=state.tick.device)
    newest = streams.longest_delay
    lane = torch.arange(streams.k, device=delays.device)
    parts = [state.text[:, None], state.own[:, :, newest], state.user[:, lane, newest - delays]]
    if streams.heard:
        parts.append(state.heard[:, None])
    # Column tick−1 holds frame tick−1−delay of the user, and nothing yet where that is negative.
    none = torch.zeros(streams.count, dtype=torch.int64, device=delays.device)
    none[streams.user] = delays
    return torch.where(
        state.tick[:, None] <= none, streams.start(delays.device), torch.cat(parts, dim=1)
    )


@torch.no_grad()
def step(
    model: SpeechLM, user: Tensor, state: LMState, sampling: LMSampling | None = None
) -> LMOutput:
    """One tick: the user's frame in (int64 [B, K]), the next column out; `state` moves on.

    Rows that are not active keep their state; what they give is meaningless.
    """
    sampling = sampling or model.config.sampling
    streams, k = model.streams, model.streams.k
    active, tick = state.active, state.tick

    newer = torch.cat((state.user[:, :, 1:], user[:, :, None]), dim=2)
    state.user.copy_(keep(active, newer, state.user))
    column = _input_column(streams, state)
    hidden = model(column[:, :, None], state.temporal)[:, 0]  # [B, C]

    voice = _settings(sampling.audio, state.audio_temperature, state.audio_top_k)
    words = _settings(sampling.text, state.text_temperature, state.text_top_k)
    counter = tick * (1 + k)
    text = _draw_text(
        model.text_head(hidden),
        state.recent,
        sampling.repetition_penalty,
        words,
        state.seed,
        counter,
    )
    heard = torch.zeros_like(text)
    if model.heard_head is not None:
        heard = _sayable(model.heard_head(hidden)).argmax(1)

    depth = model.depth
    state.depth.offset.zero_()  # a column begins anew
    inputs = depth.inputs(hidden).view(len(hidden), k, -1)
    previous = depth.text(text[:, None])
    codes: list[Tensor] = []
    for book in range(k):
        x = (inputs[:, book] + previous)[:, None]
        output = depth.transformer(x, state.depth)[:, 0]
        code = _draw(depth.logits(output, book), voice, state.seed, counter + 1 + book)
        if streams.code_delays[book]:
            gap = tick < streams.code_delays[book]
            code = code.masked_fill(gap, streams.code_sizes[book])
        codes.append(code)
        if depth.codes is not None and book + 1 < k:
            previous = depth.codes.one(code, book)
    own = torch.cat((state.own[:, :, 1:], torch.stack(codes, dim=1)[:, :, None]), dim=2)

    delays = torch.tensor(streams.code_delays, device=own.device)
    frame = own[:, torch.arange(k, device=own.device), delays]
    ready = active & (tick >= streams.longest_delay)
    state.own.copy_(keep(active, own, state.own))
    state.recent.copy_(keep(active, _remember(state.recent, text), state.recent))
    state.text.copy_(keep(active, text, state.text))
    state.heard.copy_(keep(active, heard, state.heard))
    state.tick.add_(active)
    return LMOutput(frame, ready, text, heard)


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole conversation, as `generate` gives it."""

    codes: Tensor  # [B, K, T−D] the assistant's frames
    text: Tensor  # [B, T]
    heard: Tensor  # [B, T]


@torch.no_grad()
def generate(
    model: SpeechLM, user: Tensor, seed: Tensor, sampling: LMSampling | None = None
) -> Generation:
    """The whole conversation with a user whose frames are known: int64 [B, K, T], seeds [B].

    The same tokens as T calls of `step`, without any cache: every column is computed from all that
    came before it.
    """
    sampling = sampling or model.config.sampling
    streams = model.streams
    batch, k, time = user.shape
    zero = torch.zeros(batch, device=user.device)
    words = _settings(sampling.text, zero, zero.long())
    voice = _settings(sampling.audio, zero, zero.long())
    recent = torch.zeros(batch, _RECENT, dtype=torch.int64, device=user.device)

    # The user's frame 0 is in the past (see the top of this file); frame 1 stands in column 0.
    frames = user.new_zeros(batch, streams.count, time)
    frames[:, streams.user, :-1] = user[:, :, 1:]
    columns = torch.cat(
        (streams.start(user.device).expand(batch, -1)[:, :, None], streams.delay(frames)), dim=2
    )  # column c stands at c + 1; its user rows are known, the rest is filled in as it is drawn
    for tick in range(time):
        hidden = model(columns[:, :, : tick + 1])[:, -1]
        counter = torch.full((batch,), tick * (1 + k), device=user.device)
        text = _draw_text(
            model.text_head(hidden), recent, sampling.repetition_penalty, words, seed, counter
        )
        recent = _remember(recent, text)
        codes = user.new_zeros(batch, k)
        for book in range(k):
            logits = model.depth.logits(model.depth(hidden, text, codes)[:, book], book)
            codes[:, book] = _draw(logits, voice, seed, counter + 1 + book)
            if tick < streams.code_delays[book]:
                codes[:, book] = streams.code_sizes[book]
        columns[:, streams.text_index, tick + 1] = text
        columns[:, streams.own, tick + 1] = codes
        if model.heard_head is not None:
            heard = _sayable(model.heard_head(hidden)).argmax(1)
            columns[:, streams.heard_index, tick + 1] = heard
    drawn = columns[:, :, 1 : time + 1]
    text = drawn[:, streams.text_index]
    heard = drawn[:, streams.heard_index] if streams.heard else torch.zeros_like(text)
    return Generation(streams.undelay(drawn)[:, streams.own], text, heard)
