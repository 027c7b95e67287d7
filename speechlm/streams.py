"""What the streams of a conversation are, and the delay pattern between them.

The model reads and writes one *column* of S streams every 80 ms:

    index        stream
    0            text      what the assistant says, pieces of words (inner monologue)
    1 … K        own       the assistant's codes, codebook 0 semantic, 1 … K−1 acoustic
    K+1 … 2K     user      the user's codes, in the same order
    2K+1         heard     what the user says, pieces of words (optional)

The acoustic codes of a frame stand one column (the *acoustic delay*) behind its semantic code, so
that a column's semantic code is chosen before any detail of it must be. Frames t0 … t3, delay 1,
K = 3; `▷` is the stream's start id, `·` is absent (−1):

    column          -1    0    1    2    3    4
                  ┌────┬────┬────┬────┬────┬────┐
    text          │ ▷  │ t0 │ t1 │ t2 │ t3 │ ·  │
    own 0         │ ▷  │ s0 │ s1 │ s2 │ s3 │ ·  │   semantic
    own 1         │ ▷  │ ▷  │ a0 │ a1 │ a2 │ a3 │   acoustic
    own 2         │ ▷  │ ▷  │ b0 │ b1 │ b2 │ b3 │
    user 0        │ ▷  │ u0 │ u1 │ u2 │ u3 │ ·  │
    user 1        │ ▷  │ ▷  │ v0 │ v1 │ v2 │ v3 │
    user 2        │ ▷  │ ▷  │ w0 │ w1 │ w2 │ w3 │
    heard         │ ▷  │ h0 │ h1 │ h2 │ h3 │ ·  │
                  └────┴────┴────┴────┴────┴────┘

Column −1 is the start column, the first input of every document. From column c the model predicts
column c+1; frame t of its voice is whole, and can be played, once column t + delay is there.

Shapes: B batch, S streams, K codebooks, T frames, D longest delay.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

ABSENT = -1
"""As input: no token here, its embedding is zero. As a target: nothing to learn."""

# Ids of the special text pieces, the same in every text vocabulary of ours.
PAD, UNKNOWN, BOS, EOS, EPAD, SPEECH, TEXT = range(7)
"""PAD: nothing is being said; EPAD: a word begins in the next frame; SPEECH and TEXT: the switch
tokens `<speech>` and `<text>` around a span of speech in an interleaved document."""


class Streams(BaseModel):
    """Which streams a model has, how large their vocabularies are and how they are delayed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_size: PositiveInt
    """Number of text pieces, special pieces included."""
    codebooks: tuple[tuple[PositiveInt, ...], ...]
    """For each codebook its factor sizes, as in `Codec.codebooks`."""
    coded_by: tuple[float, ...] | None = None
    """What tells its codes from those of another tokenizer or codec, where known."""
    heard: bool = True
    """Whether the transcript of the user is a stream of its own."""
    acoustic_delay: NonNegativeInt | tuple[NonNegativeInt, ...] = 1
    """Columns that acoustic codes stand behind the semantic one, on both sides: one number for all,
    or one for each acoustic codebook. How far the text streams stand before or behind the voices is
    a matter of where words are put (`data.WeightConfig`: `lead`, `heard_delay`)."""

    @model_validator(mode="after")
    def _a_delay_for_each(self) -> Streams:
        delay = self.acoustic_delay
        if isinstance(delay, tuple) and len(delay) != self.k - 1:
            raise ValueError(
                f"acoustic_delay={list(delay)} must be one number, or one for each of the "
                f"{self.k - 1} acoustic codebooks"
            )
        return self

    @property
    def k(self) -> int:
        """Number of codebooks K of one side."""
        return len(self.codebooks)

    @property
    def count(self) -> int:
        """Number of streams S."""
        return 1 + 2 * self.k + self.heard

    @property
    def text_index(self) -> int:
        """Where the assistant's text stands in a column."""
        return 0

    @property
    def heard_index(self) -> int:
        """Where the user's transcript stands in a column; only where there is one."""
        assert self.heard, "this model has no 'heard' stream"
        return 1 + 2 * self.k

    @property
    def own(self) -> slice:
        """The assistant's codes in a column."""
        return slice(1, 1 + self.k)

    @property
    def user(self) -> slice:
        """The user's codes in a column."""
        return slice(1 + self.k, 1 + 2 * self.k)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Number of codes of each codebook."""
        return tuple(math.prod(factors) for factors in self.codebooks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each of the S streams; the start id of a stream equals its size."""
        text = (self.text_size,)
        return text + 2 * self.code_sizes + (text if self.heard else ())

    @property
    def code_delays(self) -> tuple[int, ...]:
        """Delay of each codebook, in columns."""
        delay = self.acoustic_delay
        return (0, *(delay if isinstance(delay, tuple) else (delay,) * (self.k - 1)))

    @property
    def longest_delay(self) -> int:
        """D, the columns until a frame is whole."""
        return max(self.code_delays)

    @property
    def delays(self) -> tuple[int, ...]:
        """Delay of each of the S streams, in columns."""
        return (0,) + 2 * self.code_delays + ((0,) if self.heard else ())

    def start(self, device: torch.device | None = None) -> Tensor:
        """The start column, int64 [S]."""
        return torch.tensor(self.sizes, device=device)

    def delay(self, frames: Tensor) -> Tensor:
        """Frames [..., S, T] → columns [..., S, T + D].

        The gap that opens at the front of a delayed stream holds its start id, the one that opens
        behind an undelayed stream holds ABSENT.
        """
        time, depth = frames.shape[-1], max(self.delays)
        columns = frames.new_full((*frames.shape[:-1], time + depth), ABSENT)
        for stream, delay in enumerate(self.delays):
            columns[..., stream, :delay] = self.sizes[stream]
            columns[..., stream, delay : delay + time] = frames[..., stream, :]
        return columns

    def undelay(self, columns: Tensor) -> Tensor:
        """Columns [..., S, T + D] → frames [..., S, T]; the inverse of `delay`."""
        time = columns.shape[-1] - max(self.delays)
        assert time >= 0, "fewer columns than the delay leave no frame whole"
        frames = [
            columns[..., stream, delay : delay + time] for stream, delay in enumerate(self.delays)
        ]
        return torch.stack(frames, dim=-2)
