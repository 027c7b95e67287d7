"""The one transformer everybody uses: tokenizer, codec, text-to-token and language model.

Pre-norm blocks with rotary positions (RoFormer, arXiv 2104.09864), grouped-query heads
(arXiv 2305.13245), a gated or plain MLP, an optional sliding window, and, for a decoder, attention
to a second sequence, its memory.

Shapes: B batch (slots), T positions, C width, H query heads, G key/value heads, D head size,
R ring entries, N positions of the memory, E its width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec.attention import Documents, attend, attend_documents
from audio_codec.layers import LayerNorm, Linear, Packing, array, rows_of
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
    head_dim: PositiveInt | None = None
    """Size D of a head; None means dim / heads."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, as in Qwen 2."""
    qk_norm: bool = False
    """Normalize the query and the key of each head (RMSNorm), as in Qwen 3."""
    hidden: PositiveInt | None = None
    """Width of the MLP; None means 4·dim plain, 8/3·dim gated (rounded up to 32)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat | None = None
    """Added to the variance; None means 1e-6 (rms) or 1e-5 (layer)."""
    gated: bool = True
    """SwiGLU (arXiv 2002.05202) instead of a plain GELU MLP."""
    window: PositiveInt | None = None
    """A query sees itself and the window−1 positions before it; None means all."""
    rope: bool = True
    rope_theta: float = 10_000.0
    rope_frequencies: tuple[PositiveFloat, ...] | None = None
    """Radians a position, one for each pair of a head; None means powers of `rope_theta`."""
    causal: bool = True
    block: PositiveInt = 1
    """Block-causal where above 1: a query also sees what lies ahead of it in its own block of so
    many positions. Chunks of a stream are then whole blocks, all but its last."""
    layer_scale: float | None = None
    """Initial value of a learned per-channel scale on each residual branch."""
    final_norm: bool = True
    """Normalize what leaves the stack; Mimi does not."""
    dropout: float = 0.0
    bias: bool = False
    """On every projection, as in Whisper (its keys have none, but no softmax hears one)."""
    memory: PositiveInt | None = None
    """Width E of a second sequence that each block attends to as well; None: there is none."""

    @model_validator(mode="after")
    def _divisible(self) -> TransformerConfig:
        if (self.head_dim is None and self.dim % self.heads) or self.head_size % 2:
            raise ValueError(f"dim={self.dim} must give an even size to each of {self.heads} heads")
        if self.rope_frequencies is not None and 2 * len(self.rope_frequencies) != self.head_size:
            raise ValueError(
                f"rope_frequencies has {len(self.rope_frequencies)} numbers; heads of size "
                f"{self.head_size} need {self.head_size // 2}"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.block > 1 and not self.causal:
            raise ValueError(f"block={self.block} needs causal=true")
        return self

    @property
    def head_size(self) -> int:
        """Size D of a head after the default is filled in."""
        return self.head_dim or self.dim // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP after the default is filled in."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.dim // 3 // 32) * 32 if self.gated else 4 * self.dim


def make_norm(kind: Literal["rms", "layer"], dim: int, eps: float | None = None) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis."""
    return RMSNorm(dim, eps=eps or 1e-6) if kind == "rms" else LayerNorm(dim, eps=eps or 1e-5)


# --- What a CPU trains faster by hand -------------------------------------------------------------
#
# Left to autograd, each product of slices leaves a gradient of full size to be filled and added up.
# These give the same numbers in fewer passes over memory. A compiler makes its own of plain ones.


def _by_hand(x: Tensor) -> bool:
    return x.requires_grad and x.device.type == "cpu" and not torch.compiler.is_compiling()


class _Norm(torch.autograd.Function):
    """w · x / √(mean x² + ε) over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (size.square_().div_(x.shape[-1]) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        unit, width = x * inverse, x.shape[-1]
        weight_grad = x_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * unit).view(-1, width).sum(0)
        if ctx.needs_input_grad[0]:
            slope = grad * weight
            along = torch.linalg.vecdot(slope, unit).unsqueeze(-1).div_(-width)
            x_grad = slope.addcmul_(unit, along).mul_(inverse)
        return x_grad, weight_grad, None


class RMSNorm(nn.RMSNorm):
    """Torch's, in fewer passes where a CPU trains it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        if _by_hand(x) and x.dtype == self.weight.dtype and self.eps is not None:
            return _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return super().forward(x)


class _Gate(torch.autograd.Function):
    """silu(gate) · up of both side by side, [..., 2·hidden] → [..., hidden]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(both, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        both, opened = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        gate_grad, up_grad = found.chunk(2, dim=-1)
        torch.mul(grad, opened, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return found


class _Heads(torch.autograd.Function):
    """Queries, keys and values of [B, T, H + 2G, D], the first two turned, each [B, ·, T, D] and in
    one piece, as products of matrices want them.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, rotation: Tensor | None, count: int, groups: int
    ) -> tuple[Tensor, ...]:
        if rotation is not None:
            wide = heads.dtype if heads.dtype == torch.float64 else torch.float32
            rotation = rotation.to(wide.to_complex())
        ctx.rotation = rotation
        ctx.parts = (count, groups, groups)
        found = []
        for number, part in enumerate(heads.split(ctx.parts, dim=2)):
            piece = torch.empty_like(part.transpose(1, 2), memory_format=torch.contiguous_format)
            _turn(part, rotation if number < 2 else None, piece.transpose(1, 2))
            found.append(piece)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch, _, time, size = grads[0].shape
        found = grads[0].new_empty(batch, time, sum(ctx.parts), size)
        back = None if ctx.rotation is None else ctx.rotation.conj().resolve_conj()
        for number, (grad, part) in enumerate(
            zip(grads, found.split(ctx.parts, dim=2), strict=True)
        ):
            _turn(grad.transpose(1, 2), back if number < 2 else None, part)
        return found, None, None, None


def _turn(x: Tensor, rotation: Tensor | None, out: Tensor) -> None:
    """`rotate` into a given place, or a copy."""
    if rotation is None:
        out.copy_(x)
    elif x.dtype.itemsize < 4:
        out.copy_(rotate(x, rotation))
    else:
        pairs, place = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) for y in (x, out))
        torch.mul(pairs, rotation, out=place)


# --- Rotary positions -----------------------------------------------------------------------------


def rotary(
    positions: Tensor, head_dim: int, theta: float, frequencies: Sequence[float] | None = None
) -> Tensor:
    """Rotations e^{iφ}, complex128 [..., T, D/2], for positions [..., T], integer or not.

    Pair p turns by θ^(−2p/D) a position, or by what `frequencies` [D/2] say.
    The angle is taken in float64: after an hour at 100 positions a second a float32 angle would be
    wrong in its third digit, and tokens would drift with the length of a conversation.
    """
    chosen = None if frequencies is None else tuple(frequencies)
    angle = positions.unsqueeze(-1) * _turns(head_dim, theta, chosen, positions.device)
    return torch.polar(torch.ones_like(angle), angle)


@functools.lru_cache(maxsize=64)
def _turns(
    head_dim: int, theta: float, frequencies: tuple[float, ...] | None, device: torch.device
) -> Tensor:
    """Radians a position of each pair: float64 [D/2]."""
    with torch.inference_mode(False):  # whoever asks first, all may use it
        if frequencies is not None:
            return torch.tensor(frequencies, device=device, dtype=torch.float64)
        half = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
        return theta ** (-half / head_dim)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair of neighbours: x [B, T, H, D], rotation [B or 1, T, 1, D/2].

    As one complex product, which on a CPU trains three times faster than products of halves.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation.to(pairs.dtype)).flatten(-2).to(x.dtype)


# --- The stack ------------------------------------------------------------------------------------


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
    slots: tuple[Tensor, Tensor] | None  # row [B, 1] and ring entry [B, T] each new key goes to
    documents: Documents | None = None  # instead of a mask, for a kernel that knows documents
    window: int | None = None  # of that kernel
    memory: Tensor | None = None  # [B, N, E]
    memory_mask: Tensor | None = None  # [B, 1, 1, N] True may be seen


class Attention(nn.Module):
    """Multi-head self-attention with an optional ring cache."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.head_size
        self.qkv = Linear(
            config.dim,
            (self.heads + 2 * self.kv_heads) * self.head_dim,
            bias=config.bias or config.qkv_bias,
        )
        self.out = Linear(self.heads * self.head_dim, config.dim, bias=config.bias)
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps or 1e-6)
            self.key_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps or 1e-6)

    def forward(self, x: Tensor, where: _Positions, state: AttentionState | None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        batch, time, _ = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_dim)
        if _by_hand(heads) and self.query_norm is None:
            q, k, v = _Heads.apply(heads, where.rotation, self.heads, self.kv_heads)  # type: ignore[no-untyped-call]
        else:
            q, k, v = self._apart(heads, where.rotation)
        if state is not None:
            assert where.slots is not None
            # A frozen row writes too, but into entries that its unmoved offset keeps out of sight.
            # By index: a scatter of whole heads takes a CPU fifty times as long.
            for ring, new in ((state.key, k), (state.value, v)):
                ring.transpose(1, 2)[where.slots] = new.transpose(1, 2).to(ring.dtype)
            k, v = state.key.to(q.dtype), state.value.to(q.dtype)
        if where.documents is not None:
            y = attend_documents(q, k, v, where.documents, where.window)
        else:
            y = attend(q, k, v, where.mask, where.causal)
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))

    def _apart(self, heads: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (normalized and turned) and values of [B, T, H + 2G, D], T and heads
        swapped.
        """
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = qk.to(self.query_norm.weight.dtype).split((self.heads, self.kv_heads), dim=2)
            qk = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2).to(v.dtype)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.transpose(1, 2).split((self.heads, self.kv_heads), dim=1)
        return q, k, v.transpose(1, 2)

    def new_state(self, batch: int, ring: int, like: Tensor) -> AttentionState:
        """An empty ring for `batch` slots."""
        shape = (batch, self.kv_heads, ring, self.head_dim)
        return AttentionState(
            all_active(batch, like.device), like.new_zeros(shape), like.new_zeros(shape)
        )


class CrossAttention(nn.Module):
    """Multi-head attention to the memory."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.memory is not None, "there is no memory to attend to"
        self.heads = config.heads
        self.query = Linear(config.dim, config.dim, bias=config.bias)
        self.kv = Linear(config.memory, 2 * config.dim, bias=config.bias)
        self.out = Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, C], [B, N, E], bool [B, 1, 1, N] → [B, T, C]."""
        query, key, value = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(x), *self.kv(memory).chunk(2, dim=-1))
        )
        return self.out(attend(query, key, value, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU or plain GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.gated
        up = config.mlp_hidden * (2 if config.gated else 1)
        self.up = Linear(config.dim, up, bias=config.bias)
        self.down = Linear(config.mlp_hidden, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        if not self.gated:
            return self.down(F.gelu(self.up(x)))
        both = self.up(x)
        if _by_hand(both):
            return self.down(_Gate.apply(both))  # type: ignore[no-untyped-call]
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(Packing):
    """One pre-norm transformer block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.cross: CrossAttention | None = None
        if config.memory is not None:
            self.cross_norm = make_norm(config.norm, config.dim, config.norm_eps)
            self.cross = CrossAttention(config)
        self.mlp_norm = make_norm(config.norm, config.dim, config.norm_eps)
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
        if self.cross is not None:
            assert where.memory is not None, "a decoder needs its memory"
            x = x + self.dropout(self.cross(self.cross_norm(x), where.memory, where.memory_mask))
        y = self.mlp(self.mlp_norm(x))
        return x + self.dropout(y if self.scales is None else y * self.scales[1])

    def weights(self) -> tuple[Any, ...] | None:
        """All of the block, where it has no more than `kernels.block` knows of."""
        special = (self.cross, self.scales, self.attention.query_norm)
        matrices = (self.attention.qkv, self.attention.out, self.mlp.up, self.mlp.down)
        rows = [found for matrix in matrices if (found := rows_of(matrix)) is not None]
        if any(part is not None for part in special) or len(rows) < len(matrices):
            return None
        vectors = []
        for norm in (self.attention_norm, self.mlp_norm):
            assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
            centered = isinstance(norm, nn.LayerNorm)
            bias = norm.bias if isinstance(norm, nn.LayerNorm) else torch.zeros_like(norm.weight)
            vectors.append((array(norm.weight), array(bias)))
        heads, gated, eps = self.attention.heads, self.mlp.gated, norm.eps
        return (
            *(heads, gated, centered, eps),
            *(*vectors[0], *rows[0], *rows[1]),
            *(*vectors[1], *rows[2], *rows[3]),
        )

    def live(self, x: Tensor, where: tuple[Any, Any, Any], state: AttentionState) -> Tensor:
        """`forward` where `takes` holds; `where` as `kernels.positions` fills it in."""
        from audio_codec import kernels

        assert self.packed is not None
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.block(
            array(x), *where, state.key.numpy(), state.value.numpy(), *self.packed, y.numpy()
        )
        return y


class Transformer(nn.Module):
    """A stack of blocks and a final norm; over whole sequences, or streaming with a state."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm: nn.Module = nn.Identity()
        if config.final_norm:
            self.norm = make_norm(config.norm, config.dim, config.norm_eps)
        # GPT-2's rule: residual branches start small, so that depth does not blow the stream up.
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5)
            elif name.endswith(("qkv.weight", "up.weight")):
                nn.init.normal_(parameter, std=config.dim**-0.5 * 0.7)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        segments: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        clock: Tensor | None = None,
    ) -> Tensor:
        """[B, T, C] → [B, T, C].

        `clock` (float [B, T]): where each position stands to the rotations; by default they are
        counted. What may be seen is counted all the same.
        `memory` ([B, N, E]) is what a decoder also attends to, `memory_mask` ([B, N] bool) which of
        it may be seen; all when None.
        `segments` ([B, T] int, offline only) packs several documents into a row: attention never
        crosses from one number to another and positions start anew with each document.
        With a `state`, T may be any number up to the `max_chunk` it was made for.
        """
        if state is not None:
            # A frozen row's input is whatever lies in the buffer. A NaN of it would enter the ring,
            # and a mask keeps no NaN out (0 · NaN is NaN).
            x = x.masked_fill(~state.active.view(-1, 1, 1), 0)
            if clock is None and self._takes(x, state):
                return self._live(x, state)
        where = self._offline(x, segments) if state is None else self._streaming(x, state)
        if clock is not None:
            where.rotation = self._rotation(clock)
        if where.rotation is not None and x.dtype != torch.float64:
            where.rotation = where.rotation.to(torch.complex64)
        where.memory = memory
        where.memory_mask = None if memory_mask is None else memory_mask[:, None, None]
        for index, block in enumerate(self.blocks):
            x = block(x, where, None if state is None else state.layers[index])
        if state is not None:
            state.offset.add_(state.active * x.shape[1])
        return self.norm(x)

    def _takes(self, x: Tensor, state: TransformerState) -> bool:
        blocks = cast("Sequence[Block]", self.blocks)
        exact = state.layers[0].key.dtype == torch.float32
        return exact and not self.training and all(block.takes(x) for block in blocks)

    def _live(self, x: Tensor, state: TransformerState) -> Tensor:
        from audio_codec import kernels

        config, (batch, time, width) = self.config, x.shape
        assert (batch, width) == (state.batch, config.dim), x.shape
        ring = state.layers[0].key.shape[2]
        self._check(time, ring)
        assert config.window is not None
        turning = np.empty(0)
        if config.rope:
            chosen = (config.head_size, config.rope_theta, config.rope_frequencies)
            turning = _turns(*chosen, x.device).numpy()
        where = (
            np.empty((batch, time, len(turning)), np.complex64),
            np.empty((batch, time, ring), np.bool_),
            np.empty((batch, time), np.int64),
        )
        kernels.positions(
            *(state.offset.numpy(), state.active.numpy()),
            *(config.window, config.block, turning),
            *where,
        )
        for block, layer in zip(cast("Sequence[Block]", self.blocks), state.layers, strict=True):
            x = block.live(x, where, layer)
        return self.norm(x)

    def new_state(
        self, batch: int, max_chunk: int = 1, length: int | None = None
    ) -> TransformerState:
        """State for chunks of up to `max_chunk` positions.

        A ring of exactly `window` entries would be wrong once it has wrapped: the last key of a
        chunk overwrites one that the chunk's first query still sees. Hence window + max_chunk − 1.
        Without a window a stream has no end and the ring no size, so a window is required.

        `length`, less than the window: the stream ends after so many positions. A ring of that size
        never wraps and costs as little as what it holds; its chunks may be of any size. All its
        rows move together: what a frozen one still sees would be written over.
        """
        assert self.config.window is not None, "streaming needs a transformer with a window"
        assert self.config.causal, "a transformer that is not causal cannot stream"
        assert length is None or length < self.config.window, (length, self.config.window)
        blocks = cast("Sequence[Block]", self.blocks)
        like = blocks[0].attention.out.weight
        ring = self.config.window + max_chunk - 1 if length is None else length
        layers = [block.attention.new_state(batch, ring, like) for block in blocks]
        offset = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return TransformerState(all_active(batch, like.device), layers, offset)

    def _rotation(self, positions: Tensor) -> Tensor | None:
        if not self.config.rope:
            return None
        config = self.config
        turned = rotary(positions, config.head_size, config.rope_theta, config.rope_frequencies)
        return turned.unsqueeze(2)

    def _ahead(self, positions: Tensor) -> Tensor:
        """How many positions of its own block lie ahead of each."""
        return self.config.block - 1 - positions % self.config.block

    def _offline(self, x: Tensor, segments: Tensor | None) -> _Positions:
        time = x.shape[1]
        window = self.config.window
        positions = torch.arange(time, device=x.device)[None]  # [1, T]
        mask = documents = None
        blocks = self.config.block > 1
        within = segments is not None or blocks or (window is not None and window < time)
        half = torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2
        by_documents = within and self.config.causal and not blocks and half and x.is_cuda
        if within and not by_documents:
            back = positions[0, :, None] - positions[0, None, :]  # [T, T] query minus key
            mask = torch.ones_like(back, dtype=torch.bool)
            if self.config.causal:
                mask = back >= -self._ahead(positions[0])[:, None]
            if window is not None:
                mask = mask & ((back if self.config.causal else back.abs()) < window)
            mask = mask[None, None]
        if by_documents and segments is None:
            documents = Documents.of(torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device))
        if segments is not None:
            assert not blocks, "blocks of packed rows are not told"
            if mask is not None:
                mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
            fresh = torch.ones_like(segments, dtype=torch.bool)
            fresh[:, 1:] = segments[:, 1:] != segments[:, :-1]
            documents = Documents.of(fresh) if by_documents else None
            starts = torch.where(fresh, positions, torch.zeros_like(positions))
            positions = positions - starts.cummax(dim=1).values
        causal = self.config.causal and not blocks
        return _Positions(self._rotation(positions), mask, causal, None, documents, window)

    def _check(self, time: int, ring: int) -> None:
        assert self.config.window is not None
        # A ring smaller than the window holds its whole stream.
        limit = ring if ring < self.config.window else ring - self.config.window + 1
        assert time <= limit, f"a chunk of {time} positions, but the state was made for {limit}"

    def _streaming(self, x: Tensor, state: TransformerState) -> _Positions:
        time, ring = x.shape[1], state.layers[0].key.shape[2]
        self._check(time, ring)
        assert self.config.window is not None
        now = state.offset[:, None] + torch.arange(time, device=x.device)  # [B, T] query positions
        last = now[:, -1:]
        entry = torch.arange(ring, device=x.device)  # [R]
        # Entry r holds the newest position p ≤ last with p ≡ r (mod R); negative: nothing yet.
        held = last - (last - entry) % ring  # [B, R]
        near = held[:, None, :] > (now - self.config.window).clamp(min=-1)[:, :, None]  # [B, T, R]
        if time > 1:  # the last position of a chunk has nothing ahead of it
            near &= held[:, None, :] <= (now + self._ahead(now))[:, :, None]
        rows = torch.arange(len(now), device=x.device)[:, None]
        return _Positions(self._rotation(now), near.unsqueeze(1), False, (rows, now % ring))
