"""The one transformer everybody uses: tokenizer, codec, text-to-token and language model.

Pre-norm blocks with rotary positions (RoFormer, arXiv 2104.09864), grouped-query heads
(arXiv 2305.13245), a gated or plain MLP, and an optional sliding window.

Shapes: B batch (slots), T positions, C width, H query heads, G key/value heads, D head size,
R ring entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec.attention import Documents, attend, attend_documents
from audio_codec.state import State, all_active


class TransformerConfig(BaseModel):
    """Shape of a stack of transformer blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: PositiveInt
    """Width C of the residual stream."""
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    """Key/value heads G; None means as many as `heads`, 1 is multi-query."""
    hidden: PositiveInt | None = None
    """Width of the MLP; None means 4·dim plain, 8/3·dim gated (rounded up to 32)."""
    norm: Literal["rms", "layer"] = "rms"
    gated: bool = True
    """SwiGLU (arXiv 2002.05202) instead of a plain GELU MLP."""
    window: PositiveInt | None = None
    """A query sees itself and the window−1 positions before it; None means all."""
    rope: bool = True
    rope_theta: float = 10_000.0
    causal: bool = True
    layer_scale: float | None = None
    """Initial value of a learned per-channel scale on each residual branch."""
    final_norm: bool = True
    """Normalize what leaves the stack; Mimi does not."""
    dropout: float = 0.0

    @model_validator(mode="after")
    def _divisible(self) -> TransformerConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must give an even size to each of {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        return self

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP after the default is filled in."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.dim // 3 // 32) * 32 if self.gated else 4 * self.dim


def make_norm(kind: Literal["rms", "layer"], dim: int) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis."""
    return nn.RMSNorm(dim, eps=1e-6) if kind == "rms" else nn.LayerNorm(dim, eps=1e-5)


def rotary(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Rotations e^{iφ}, complex128 [..., T, D/2], for integer positions [..., T].

    The angle is taken in float64: after an hour at 100 positions a second a float32 angle would be
    wrong in its third digit, and tokens would drift with the length of a conversation.
    """
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angle = positions.to(torch.float64).unsqueeze(-1) * theta ** (-half / head_dim)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair of neighbours: x [B, T, H, D], rotation [B or 1, T, 1, D/2].

    As one complex product, which on a CPU trains three times faster than products of halves.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.to(pairs.dtype)).flatten(-2).to(x.dtype)


@dataclass(slots=True)
class AttentionState(State):
    """Ring of the last keys and values of one layer, keys already rotated."""

    key: Tensor  # [B, G, R, D]
    value: Tensor  # [B, G, R, D]


@dataclass(slots=True)
class TransformerState(State):
    """One ring a layer, and the number of positions each slot has seen."""

    layers: list[AttentionState]
    offset: Tensor  # [B] int64


@dataclass(slots=True)
class _Positions:
    """What every layer of one forward shares, computed once."""

    rotation: Tensor | None
    mask: Tensor | None  # True may be seen
    causal: bool
    slots: Tensor | None  # [B, T] ring entry each new key goes to
    documents: Documents | None = None  # instead of a mask, for a kernel that knows documents
    window: int | None = None  # of that kernel


class Attention(nn.Module):
    """Multi-head self-attention with an optional ring cache."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(
            config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, where: _Positions, state: AttentionState | None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        batch, time, _ = x.shape
        qk, v = (
            self.qkv(x)
            .view(batch, time, -1, self.head_dim)
            .split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        )
        if where.rotation is not None:
            qk = rotate(qk, where.rotation)
        q, k = qk.transpose(1, 2).split((self.heads, self.kv_heads), dim=1)
        v = v.transpose(1, 2)
        if state is not None:
            assert where.slots is not None
            # A frozen row writes too, but into entries that its unmoved offset keeps out of sight.
            index = where.slots[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            state.key.scatter_(2, index, k.to(state.key.dtype))
            state.value.scatter_(2, index, v.to(state.value.dtype))
            k, v = state.key.to(q.dtype), state.value.to(q.dtype)
        if where.documents is not None:
            y = attend_documents(q, k, v, where.documents, where.window)
        else:
            y = attend(q, k, v, where.mask, where.causal)
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))

    def new_state(self, batch: int, ring: int, like: Tensor) -> AttentionState:
        """An empty ring for `batch` slots."""
        shape = (batch, self.kv_heads, ring, self.head_dim)
        return AttentionState(
            all_active(batch, like.device), like.new_zeros(shape), like.new_zeros(shape)
        )


class MLP(nn.Module):
    """SwiGLU or plain GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.up = nn.Linear(config.dim, config.mlp_hidden * (2 if config.gated else 1), bias=False)
        self.down = nn.Linear(config.mlp_hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        if not self.gated:
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.dim)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config.norm, config.dim)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scales: nn.ParameterList | None = None
        if config.layer_scale is not None:
            self.scales = nn.ParameterList(
                nn.Parameter(torch.full((config.dim,), config.layer_scale)) for _ in range(2)
            )

    def forward(self, x: Tensor, where: _Positions, state: AttentionState | None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        y = self.attention(self.attention_norm(x), where, state)
        x = x + self.dropout(y if self.scales is None else y * self.scales[0])
        y = self.mlp(self.mlp_norm(x))
        return x + self.dropout(y if self.scales is None else y * self.scales[1])


class Transformer(nn.Module):
    """A stack of blocks and a final norm; over whole sequences, or streaming with a state."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config.norm, config.dim) if config.final_norm else nn.Identity()
        # GPT-2's rule: residual branches start small, so that depth does not blow the stream up.
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5)
            elif name.endswith(("qkv.weight", "up.weight")):
                nn.init.normal_(parameter, std=config.dim**-0.5 * 0.7)

    def forward(
        self, x: Tensor, state: TransformerState | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """[B, T, C] → [B, T, C].

        `segments` ([B, T] int, offline only) packs several documents into a row: attention never
        crosses from one number to another and positions start anew with each document.
        With a `state`, T may be any number up to the `max_chunk` it was made for.
        """
        if state is not None:
            # A frozen row's input is whatever lies in the buffer. A NaN of it would enter the ring,
            # and a mask keeps no NaN out (0 · NaN is NaN).
            x = x.masked_fill(~state.active.view(-1, 1, 1), 0)
        where = self._offline(x, segments) if state is None else self._streaming(x, state)
        for index, block in enumerate(self.blocks):
            x = block(x, where, None if state is None else state.layers[index])
        if state is not None:
            state.offset.add_(state.active * x.shape[1])
        return self.norm(x)

    def new_state(self, batch: int, max_chunk: int = 1) -> TransformerState:
        """State for chunks of up to `max_chunk` positions.

        A ring of exactly `window` entries would be wrong once it has wrapped: the last key of a
        chunk overwrites one that the chunk's first query still sees. Hence window + max_chunk − 1.
        Without a window a stream has no end and the ring no size, so a window is required.
        """
        assert self.config.window is not None, "streaming needs a transformer with a window"
        assert self.config.causal, "a transformer that is not causal cannot stream"
        blocks = cast("Sequence[Block]", self.blocks)
        like = blocks[0].attention.out.weight
        ring = self.config.window + max_chunk - 1
        layers = [block.attention.new_state(batch, ring, like) for block in blocks]
        offset = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return TransformerState(all_active(batch, like.device), layers, offset)

    def _rotation(self, positions: Tensor) -> Tensor | None:
        if not self.config.rope:
            return None
        head_dim = self.config.dim // self.config.heads
        return rotary(positions, head_dim, self.config.rope_theta).unsqueeze(2)

    def _offline(self, x: Tensor, segments: Tensor | None) -> _Positions:
        time = x.shape[1]
        window = self.config.window
        positions = torch.arange(time, device=x.device)[None]  # [1, T]
        mask = documents = None
        within = segments is not None or (window is not None and window < time)
        half = torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2
        by_documents = within and self.config.causal and half and x.is_cuda
        if within and not by_documents:
            back = positions[0, :, None] - positions[0, None, :]  # [T, T] query minus key
            mask = torch.ones_like(back, dtype=torch.bool)
            if self.config.causal:
                mask = back >= 0
            if window is not None:
                mask = mask & (back.abs() < window)
            mask = mask[None, None]
        if by_documents and segments is None:
            documents = Documents.of(torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device))
        if segments is not None:
            if mask is not None:
                mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
            fresh = torch.ones_like(segments, dtype=torch.bool)
            fresh[:, 1:] = segments[:, 1:] != segments[:, :-1]
            documents = Documents.of(fresh) if by_documents else None
            starts = torch.where(fresh, positions, torch.zeros_like(positions))
            positions = positions - starts.cummax(dim=1).values
        causal = self.config.causal and not within
        return _Positions(self._rotation(positions), mask, causal, None, documents, window)

    def _streaming(self, x: Tensor, state: TransformerState) -> _Positions:
        time, ring = x.shape[1], state.layers[0].key.shape[2]
        assert self.config.window is not None
        limit = ring - self.config.window + 1
        assert time <= limit, f"a chunk of {time} positions, but the state was made for {limit}"
        now = state.offset[:, None] + torch.arange(time, device=x.device)  # [B, T] query positions
        last = now[:, -1:]
        entry = torch.arange(ring, device=x.device)[None]  # [1, R]
        # Entry r holds the newest position p ≤ last with p ≡ r (mod R); negative: nothing yet.
        held = last - (last - entry) % ring  # [B, R]
        back = now[:, :, None] - held[:, None, :]  # [B, T, R]
        seen = (back >= 0) & (back < self.config.window) & (held >= 0)[:, None, :]
        return _Positions(self._rotation(now), seen.unsqueeze(1), False, now % ring)
