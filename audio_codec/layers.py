"""Causal building blocks on channels-last signals [B, T, C] (batch, time, channels).

Channels-last because the heavy work is then matrix products, which a CPU does several times faster
than a small `Conv1d`; a depthwise convolution becomes one multiply-add a tap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_codec.state import State, advance, all_active


def lay_out(module: nn.Module) -> None:
    """Lay the matrices of linear maps out in memory as products of few rows read them fastest.

    That is with long lines, whichever side of a matrix they are; what it holds and what shape it
    says it has stay the same.
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


class ConvNeXtBlock(nn.Module):
    """Causal ConvNeXt block (arXiv 2201.03545) with a learned scale on its residual branch."""

    def __init__(self, dim: int, kernel: int = 7, expansion: int = 3, scale: float = 0.1) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, kernel)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, state: TailState | None = None) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        y = self.norm(self.depthwise(x, state))
        y = self.down(F.gelu(self.up(y)))
        return torch.addcmul(x, self.scale.to(x.dtype), y.to(x.dtype))

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
        for index, block in enumerate(self.blocks):
            x = block(x, None if state is None else state.blocks[index])
        return x

    def new_state(self, batch: int) -> StackState:
        """State of a stream that begins in silence."""
        blocks = cast("Iterable[ConvNeXtBlock]", self.blocks)
        states = [block.new_state(batch) for block in blocks]
        device = next(self.parameters()).device if states else None
        return StackState(all_active(batch, device), states)
