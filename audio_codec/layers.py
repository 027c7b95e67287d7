"""Causal building blocks on channels-last signals [B, T, C] (batch, time, channels).

Channels-last because the heavy work is then matrix products, which a CPU does several times faster
than a small `Conv1d`; a depthwise convolution becomes one multiply-add a tap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_codec.state import State, advance, all_active


def lay_out(module: nn.Module) -> None:
    """Make a loaded model ready for products of few rows, as a live stream has them.

    Matrices lie in memory with long lines, whichever side of them that is; what they hold and what
    shape they say they have stay the same. Layers that `kernels` know of pack their weights for
    them: float32 on a CPU, and of matrices those that were stored in int8.
    """
    for part in module.modules():
        matrices: list[Tensor] = []
        if isinstance(part, nn.Linear):
            matrices = [part.weight]
        elif isinstance(part, nn.ParameterList):
            matrices = [matrix for matrix in part if matrix.dim() == 2]
        for matrix in matrices:
            if matrix.shape[0] > matrix.shape[1]:
                matrix.data = matrix.data.T.contiguous().T
    for part in reversed(list(module.modules())):  # a block packs what its matrices have packed
        if isinstance(part, Packing):
            part.pack()


FEW = 64
"""Rows [B, T] up to which the loops of `kernels` are faster than torch; sound [B, S] has B."""


def few_rows(x: Tensor) -> bool:
    """Whether `x` [..., C] is what `kernels` are for: few rows of float32 on a CPU, untrained."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() <= FEW * x.shape[-1]
        and not torch.is_grad_enabled()
    )


def array(tensor: Tensor) -> Any:
    """A tensor as `kernels` take it."""
    return tensor.detach().contiguous().numpy()


class Packing(nn.Module, ABC):
    """A layer that `kernels` know of, or that has a table of what it would compute.

    Once packed it holds its weights as they are taken, until they change or are about to: who
    trains a loaded model, moves it, or puts an adapter on it, gets torch's way until it is laid out
    anew. So does a copy.
    """

    packed: tuple[Any, ...] | None = None
    _packed_of: Sequence[Tensor] = ()
    _versions: Sequence[int] = ()

    def pack(self) -> None:
        """Pack the weights where that is possible."""
        held = self._held()
        self.packed = None
        self.packed = self.weights() if all(map(_loaded, held)) else None
        # Tensors of inference mode count no versions.
        self._packed_of = [tensor for tensor in held if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._packed_of]
        if self.packed is not None:
            import audio_codec.kernels  # noqa: F401  compiled now, not in a conversation's first frame

    @abstractmethod
    def weights(self) -> tuple[Any, ...] | None:
        """What is taken of them; None where one is not what a kernel computes with."""

    def takes(self, x: Tensor) -> bool:
        """Whether a kernel may be given `x` [B, T, C]."""
        return self.packed is not None and few_rows(x) and self.unchanged()

    def unchanged(self) -> bool:
        """Whether what is packed still is what the layer holds."""
        if self.packed is None:
            return False
        return [tensor._version for tensor in self._packed_of] == self._versions

    def train(self, mode: bool = True) -> Self:
        """As of any module; a fused optimizer changes weights without counting versions."""
        if mode:
            self.packed = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to`, `double` and their like come through here, also where there is nothing to do.
        before = [(id(tensor), tensor.data_ptr()) for tensor in self._held()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before != [(id(tensor), tensor.data_ptr()) for tensor in self._held()]:
            self.packed = None
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        # `load_state_dict(…, assign=True)` puts other tensors in place of those that are counted.
        self.packed = None
        super()._load_from_state_dict(*arguments, **options)

    def _held(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not packed: its weights count their changes anew."""
        kept = dict(self.__dict__)
        for name in ("packed", "_packed_of", "_versions"):
            kept.pop(name, None)
        return kept


def unpack(module: nn.Module) -> None:
    """Undo the packing of `lay_out`, before something that no version tells of."""
    for part in module.modules():
        if isinstance(part, Packing):
            part.packed = None


def _loaded(weight: Tensor) -> bool:
    single = weight.dtype == torch.float32 or not weight.is_floating_point()
    return single and weight.device.type == "cpu"


def rows_of(linear: nn.Module) -> tuple[Any, ...] | None:
    """A matrix as it was stored: rows int8 [N, K], scale [N], bias [N].

    None if that was not in int8, or it is more than a matrix (one with an adapter).
    """
    if type(linear) is not Linear:
        return None
    if linear.packed is not None:
        return linear.packed
    weight = linear.weight.detach()
    scale = weight.abs().amax(1) / 127
    rows = (weight / scale.clamp(min=1e-30)[:, None]).round()
    if not torch.allclose(rows * scale[:, None], weight, rtol=1e-6, atol=0):
        return None
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias
    return array(rows.to(torch.int8)), array(scale), array(bias)


class Linear(nn.Linear, Packing):
    """Torch's linear map; see `lay_out` for what it does with few rows."""

    def weights(self) -> tuple[Any, ...] | None:
        """The matrix."""
        return rows_of(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        if not self.takes(x):
            return super().forward(x)
        from audio_codec import kernels

        assert self.packed is not None and x.shape[-1] == self.in_features, x.shape
        y = x.new_empty(*x.shape[:-1], self.out_features)
        flat = y.numpy().reshape(-1, self.out_features)
        kernels.dense(array(x).reshape(-1, self.in_features), *self.packed, flat)
        return y


class LayerNorm(nn.LayerNorm, Packing):
    """Torch's norm of the last axis."""

    def weights(self) -> tuple[Any, ...] | None:
        """Scale and shift, and what keeps a division from 0."""
        if self.weight is None or self.bias is None or len(self.normalized_shape) > 1:
            return None
        return array(self.weight), array(self.bias), self.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        if not self.takes(x):
            return super().forward(x)
        from audio_codec import kernels

        assert self.packed is not None and x.shape[-1:] == self.normalized_shape, x.shape
        y, width = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1]
        flat = y.numpy().reshape(-1, width)
        kernels.normalize(array(x).reshape(-1, width), *self.packed, True, flat)
        return y


@dataclass(slots=True)
class TailState(State):
    """The last inputs of a layer with a finite past."""

    tail: Tensor  # [B, P, ...]


def with_past(x: Tensor, past: int, state: TailState | None) -> Tensor:
    """Put the `past` positions before a chunk in front of it: [B, T, ...] → [B, past + T, ...].

    Without a state they are silence; with one they are what came before, and the state moves on.
    """
    if state is None:
        padded = torch.cat((x.new_zeros(x.shape[0], past, *x.shape[2:]), x), dim=1)
    else:
        padded = torch.cat((state.tail.to(x.dtype), x), dim=1)
        advance(state.tail, padded[:, padded.shape[1] - past :], state.active)
    return padded


def windows(x: Tensor, shape: Tensor, hop: int, tail: Tensor, active: Tensor) -> Tensor:
    """Windows of sound [B, S] that end with their hop, shaped by [W]: [B, S / hop, W].

    tail [B, W − hop]: the samples before, which move on where `active` [B].
    """
    assert tail.shape == (len(x), len(shape) - hop) and len(active) == len(x), (x.shape, tail.shape)
    if few_rows(x) and tail.dtype == torch.float32 and not tail.requires_grad:
        from audio_codec import kernels

        y = x.new_empty(len(x), x.shape[1] // hop, len(shape))
        rest = (tail.numpy(), active.numpy(), shape.numpy(), hop, y.numpy())
        kernels.windows(array(x), *rest)
        return y
    padded = torch.cat((tail.to(x.dtype), x), dim=1)
    advance(tail, padded[:, x.shape[1] :].to(tail.dtype), active)
    return padded.unfold(1, len(shape), hop) * shape


_SHORT = 2**16
"""Numbers [B, T, C] up to which a convolution costs what its calls cost."""


class _Depthwise(torch.autograd.Function):
    """y[t] = b + Σ_k w[k] · x[t + k] on [B, T + K − 1, C], accumulated in place both ways.

    Left to autograd, each tap's slice would get a gradient of full size, filled with zeros, copied
    and added: nearly half the time of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        time = x.shape[1] - len(weight) + 1
        y = torch.addcmul(bias, x[:, :time], weight[0])
        for tap in range(1, len(weight)):
            y.addcmul_(x[:, tap : tap + time], weight[tap])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        time = grad.shape[1]
        wide = torch.promote_types(weight.dtype, torch.float32)  # long sums of small numbers
        grad_x = torch.zeros_like(x)
        grad_weight = []
        for tap in range(len(weight)):
            grad_x[:, tap : tap + time].addcmul_(grad, weight[tap])
            grad_weight.append((x[:, tap : tap + time] * grad).sum((0, 1), dtype=wide))
        stacked = torch.stack(grad_weight).to(weight.dtype)
        return grad_x, stacked, grad.sum((0, 1), dtype=wide).to(weight.dtype)


class DepthwiseConv(nn.Module):
    """Causal depthwise convolution: each output sees its own position and the kernel−1 before."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.randn(kernel, dim) * kernel**-0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, state: TailState | None = None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        padded = with_past(x, self.kernel - 1, state)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if x.numel() < _SHORT and not torch.is_grad_enabled():
            return (padded.unfold(1, self.kernel, 1) * weight.T).sum(-1).add_(bias)
        y: Tensor = _Depthwise.apply(padded, weight, bias)  # type: ignore[no-untyped-call]
        return y

    def new_state(self, batch: int) -> TailState:
        """State of a stream that begins in silence."""
        tail = self.weight.new_zeros(batch, self.kernel - 1, self.weight.shape[1])
        return TailState(all_active(batch, tail.device), tail)


class ConvNeXtBlock(Packing):
    """Causal ConvNeXt block (arXiv 2201.03545) with a learned scale on its residual branch."""

    def __init__(self, dim: int, kernel: int = 7, expansion: int = 3, scale: float = 0.1) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, kernel)
        self.norm = nn.LayerNorm(dim)
        self.up = Linear(dim, expansion * dim)
        self.down = Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, state: TailState | None = None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        if state is not None and self.takes(x):
            y = x.clone(memory_format=torch.contiguous_format)
            self.live(y.numpy(), state, state.active.numpy())
            return y
        y = self.norm(self.depthwise(x, state))
        y = self.down(F.gelu(self.up(y)))
        return torch.addcmul(x, self.scale.to(x.dtype), y.to(x.dtype))

    def weights(self) -> tuple[Any, ...] | None:
        """All of the block."""
        up, down = rows_of(self.up), rows_of(self.down)
        if up is None or down is None:
            return None
        taps, norm = self.depthwise, self.norm
        vectors = (taps.weight, taps.bias, norm.weight, norm.bias)
        return (*map(array, vectors), norm.eps, *up, *down, array(self.scale))

    def live(self, x: Any, state: TailState, active: Any) -> None:
        """`forward` where `takes` holds, in place on x [B, T, C], a numpy array as `active` is."""
        from audio_codec import kernels

        assert self.packed is not None
        assert x.shape[::2] == state.tail.shape[::2], (x.shape, state.tail.shape)
        kernels.convnext(x, state.tail.numpy(), active, *self.packed, x)

    def new_state(self, batch: int) -> TailState:
        """State of a stream that begins in silence."""
        return self.depthwise.new_state(batch)


@dataclass(slots=True)
class StackState(State):
    """State of a stack of convolutional blocks."""

    blocks: list[TailState]


class ConvNeXtStack(nn.Module):
    """Blocks in a row at one rate."""

    def __init__(self, dim: int, blocks: int, kernel: int = 7, expansion: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, kernel, expansion) for _ in range(blocks))

    def forward(self, x: Tensor, state: StackState | None = None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        blocks = cast("Sequence[ConvNeXtBlock]", self.blocks)
        if state is not None and few_rows(x) and all(block.unchanged() for block in blocks):
            y = x.clone(memory_format=torch.contiguous_format)
            rows, active = y.numpy(), state.active.numpy()
            for block, past in zip(blocks, state.blocks, strict=True):
                block.live(rows, past, active)
            return y
        for index, block in enumerate(blocks):
            x = block(x, None if state is None else state.blocks[index])
        return x

    def new_state(self, batch: int) -> StackState:
        """State of a stream that begins in silence."""
        blocks = cast("Iterable[ConvNeXtBlock]", self.blocks)
        states = [block.new_state(batch) for block in blocks]
        device = next(self.parameters()).device if states else None
        return StackState(all_active(batch, device), states)
