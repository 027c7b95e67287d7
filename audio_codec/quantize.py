"""Quantizers: finite scalar (FSQ), exponential-moving-average vector (EMA-VQ), residual.

Shapes: N vectors, D width of a code, L codes of a codebook, K codebooks, B batch, T frames,
C width around a split quantizer.
Every quantizer returns what it can be decoded from (codes) beside what training needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from audio_codec import layers
from audio_codec.layers import Packing, array


def entropy_bits(counts: Tensor) -> float:
    """Entropy in bits of the distribution that the counts [L] are a sample of."""
    p = counts.double() / counts.sum().clamp(min=1)
    return float(-(p * p.clamp(min=1e-30).log2()).sum())


class FSQ(nn.Module):
    """Finite scalar quantization (arXiv 2309.15505) of vectors of len(levels) numbers.

    Each number is normalized to zero mean and unit variance (running statistics at inference),
    pushed through the normal distribution's own cumulative function, so that a Gaussian input
    falls on its levels evenly and the whole codebook is used, and rounded to one of its levels;
    the rounding's gradient is the identity (straight-through).
    """

    mean: Tensor
    variance: Tensor
    bases: Tensor
    sizes: Tensor

    def __init__(self, levels: Sequence[int], momentum: float = 0.01) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.momentum = momentum
        bases = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        self.register_buffer("sizes", torch.tensor(self.levels), persistent=False)
        self.register_buffer("bases", torch.tensor(bases), persistent=False)
        self.register_buffer("mean", torch.zeros(len(self.levels)))
        self.register_buffer("variance", torch.ones(len(self.levels)))

    @property
    def size(self) -> int:
        """Number of codes L."""
        return math.prod(self.levels)

    def bound(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[..., D] → (−1, 1) float32. In training, `valid` ([...] bool) picks what is counted."""
        x = x.float()
        if self.training:
            seen = x[valid] if valid is not None else x.flatten(0, -2)
            if seen.shape[0] > 1:
                mean, variance = seen.mean(0), seen.var(0)
                with torch.no_grad():
                    self.mean.lerp_(mean, self.momentum)
                    self.variance.lerp_(variance, self.momentum)
                return torch.erf((x - mean) * (2 * (variance + 1e-5)).rsqrt())
        return torch.erf((x - self.mean) * (2 * (self.variance + 1e-5)).rsqrt())

    def digits(self, bounded: Tensor) -> Tensor:
        """Level of each number: (−1, 1) [..., D] → int64 [..., D], 0 … levels−1."""
        scaled = ((bounded + 1) / 2 * self.sizes).floor().long()
        return torch.minimum(scaled.clamp(min=0), self.sizes - 1)

    def values(self, digits: Tensor) -> Tensor:
        """Middle of each level: int [..., D] → (−1, 1) [..., D]."""
        return (2 * digits + 1).float() / self.sizes - 1

    def codes(self, digits: Tensor) -> Tensor:
        """[..., D] digits → [...] code numbers; the first digit varies fastest."""
        return (digits * self.bases).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """[...] code numbers → [..., D] values in (−1, 1)."""
        return self.values(codes.unsqueeze(-1) // self.bases % self.sizes)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, quantized: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[..., D] → (values [..., D], codes [...]).

        Rows where `quantized` ([B] bool) is False pass the bound alone: a bottleneck's warm-up.
        """
        bounded = self.bound(x, valid)
        digits = self.digits(bounded)
        values = bounded + (self.values(digits) - bounded).detach()
        if quantized is not None:
            values = torch.where(quantized.view(-1, *([1] * (x.dim() - 1))), values, bounded)
        return values, self.codes(digits)


_norms = WeakTensorKeyDictionary()
"""Of each codebook in use: (its version when they were taken, the codes' squared norms)."""


def _squared_norms(codebook: Tensor) -> Tensor:
    """|c|² of each code, [L, D] → [L]; taken anew only once the codebook has changed.

    A codebook of Mimi is 2 MB, and to read it is all that a search in a live stream costs: norms
    taken in every search would make it five to nine times slower.
    """
    if codebook.is_inference():  # counts no versions
        return codebook.square().sum(1)
    known = _norms.get(codebook)
    if known is None or known[0] != codebook._version:
        with torch.inference_mode(False), torch.no_grad():
            known = (codebook._version, codebook.square().sum(1))
        _norms[codebook] = known
    squares: Tensor = known[1]
    return squares


class EMAVQ(nn.Module):
    """Vector quantizer whose codes are moving averages of what they catch (VQ-VAE, 1711.00937).

    The first batch of training places the codes by k-means. Codes whose usage falls below `dead`
    times an even share are restarted at random vectors of the batch, so that a codebook cannot
    collapse.
    """

    codebook: Tensor
    usage: Tensor
    total: Tensor
    ready: Tensor

    def __init__(
        self, dim: int, size: int, decay: float = 0.99, dead: float = 0.1, kmeans: int = 10
    ) -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.decay, self.dead, self.kmeans = decay, dead, kmeans
        self.register_buffer("codebook", torch.randn(size, dim) * dim**-0.5)
        self.register_buffer("usage", torch.ones(size))
        self.register_buffer("total", self.codebook.clone())
        self.register_buffer("ready", torch.tensor(False))

    def nearest(self, x: Tensor) -> Tensor:
        """Code of least Euclidean distance: [..., D] → int64 [...]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.search(x.reshape(-1, self.dim)).view(x.shape[:-1])

    def search(self, x: Tensor) -> Tensor:
        """`nearest` without what it takes to be called from anywhere: [N, D] → int64 [N]."""
        codebook = self.codebook
        # |x − c|² without |x|², which is the same for every code.
        flat = x.to(codebook.dtype)
        return torch.addmm(_squared_norms(codebook), flat, codebook.T, alpha=-2).argmin(1)

    def decode(self, codes: Tensor) -> Tensor:
        """int [...] → [..., D]."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> None:
        """Move the codes towards the vectors x [N, D] that fell on them (codes [N])."""
        hits = torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.total).index_add_(0, codes, x)
        if dist.is_initialized():
            dist.all_reduce(hits)
            dist.all_reduce(sums)
        self.usage.lerp_(hits, 1 - self.decay)
        self.total.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.total / self.usage.clamp(min=1e-5).unsqueeze(1))
        dead = self.usage < self.dead * self.usage.mean()
        if bool(dead.any()):
            self._place(dead, self._draw(x, int(dead.sum()), generator))

    def _draw(self, x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        picks = x[torch.randint(len(x), (count,), generator=generator, device=x.device)]
        if dist.is_initialized():
            dist.broadcast(picks, 0)
        return picks

    def _place(self, where: Tensor, vectors: Tensor) -> None:
        share = self.usage.mean().clamp(min=1e-5)
        self.codebook[where] = vectors
        self.usage[where] = share
        self.total[where] = vectors * share

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Place the codes by k-means on x [N, D]."""
        self.codebook.copy_(self._draw(x, self.size, generator))
        for _ in range(self.kmeans):
            codes = self.nearest(x)
            hits = torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(x[:, 0]))
            sums = torch.zeros_like(self.total).index_add_(0, codes, x)
            if dist.is_initialized():
                dist.all_reduce(hits)
                dist.all_reduce(sums)
            caught = hits > 0
            self.codebook[caught] = sums[caught] / hits[caught].unsqueeze(1)
        self.usage.fill_(len(x) / self.size)
        self.total.copy_(self.codebook * self.usage.unsqueeze(1))
        self.ready.fill_(True)

    def forward(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] → (nearest codes' vectors [..., D], codes [...], commitment loss).

        In training, `valid` ([...] bool) picks what the codes learn from and the loss is taken of.
        The vectors carry no gradient; put the straight-through estimator where it belongs (once
        around a whole residual stack).
        """
        if not self.training:
            codes = self.nearest(x)
            return self.decode(codes), codes, x.new_zeros(())
        seen = (x if valid is None else x[valid]).float().reshape(-1, self.dim)
        flat = seen.detach()
        if not bool(self.ready):
            self.initialize(flat, generator)
        codes = self.nearest(x.detach())
        vectors = self.decode(codes)
        caught, near = (codes, vectors) if valid is None else (codes[valid], vectors[valid])
        loss = F.mse_loss(seen, near.reshape(-1, self.dim))
        self.update(flat, caught.reshape(-1), generator)
        return vectors, codes, loss


class ResidualVQ(Packing):
    """Quantizers in a row, each coding what those before it left over (arXiv 2107.03312)."""

    def __init__(self, dim: int, sizes: Sequence[int], decay: float = 0.99) -> None:
        super().__init__()
        self.levels = nn.ModuleList(EMAVQ(dim, size, decay) for size in sizes)

    def _typed_levels(self) -> Iterable[EMAVQ]:
        return cast("Iterable[EMAVQ]", self.levels)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` levels, 0 … K."""
        assert 0 <= count <= len(self.levels), f"cannot keep {count} of {len(self.levels)} levels"
        self.levels = self.levels[:count]
        self.packed = None

    def weights(self) -> tuple[Any, ...] | None:
        """The codebooks, where all are of one size, and the squared norms of their codes."""
        codebooks = [level.codebook for level in self._typed_levels()]
        if len({len(codebook) for codebook in codebooks}) != 1:
            return None
        stacked = torch.stack(codebooks)
        return array(stacked), array(stacked.square().sum(-1))

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, D] → int64 [B, K, T]."""
        batch, time, dim = x.shape
        codes = x.new_empty(len(self.levels), batch * time, dtype=torch.int64)
        rest = x.reshape(-1, dim)
        if self.takes(x):
            from audio_codec import kernels

            assert self.packed is not None
            kernels.residual_codes(rest.numpy().copy(), *self.packed, codes.numpy())
            return codes.view(-1, batch, time).transpose(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            for level, found in zip(self._typed_levels(), codes, strict=True):
                found.copy_(level.search(rest))
                rest = rest - level.decode(found)
        return codes.view(-1, batch, time).transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """int [B, K' ≤ K, T] → [B, T, D]; fewer levels give a coarser vector."""
        batch, count, time = codes.shape
        few = 0 < batch * time <= layers.FEW and not torch.is_grad_enabled()
        if count and few and self.unchanged():
            return self._live(codes[:, : len(self.levels)])
        return torch.stack(
            [
                level.decode(c)
                for level, c in zip(self._typed_levels(), codes.unbind(1), strict=False)
            ]
        ).sum(0)

    def _live(self, codes: Tensor) -> Tensor:
        from audio_codec import kernels

        assert self.packed is not None
        codebooks, (batch, count, time) = self.packed[0], codes.shape
        assert count <= len(codebooks), (count, len(codebooks))
        y = torch.empty(batch, time, codebooks.shape[-1], dtype=torch.float32, device="cpu")
        rows = array(codes.transpose(0, 1).long()).reshape(count, batch * time)
        if not kernels.residual_sum(rows, codebooks, y.numpy().reshape(batch * time, -1)):
            raise IndexError(f"codes lie between 0 and {codebooks.shape[1] - 1}")
        return y

    def forward(
        self,
        x: Tensor,
        depth: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] → (quantized [B, T, D] straight-through, codes [B, K, T], commitment loss).

        `depth` ([B] int): how many levels each row keeps (quantizer dropout, for variable bitrate).
        """
        total, residual, codes, losses = torch.zeros_like(x), x, [], []
        for index, level in enumerate(self.levels):
            vectors, picked, loss = level(residual, generator)
            residual = residual - vectors
            used = vectors if depth is None else vectors * (depth > index).view(-1, 1, 1)
            total = total + used
            codes.append(picked)
            losses.append(loss)
        straight = x + (total - x).detach()
        return straight, torch.stack(codes, dim=1), torch.stack(losses).mean()


class _Projected(nn.Module):
    """A residual quantizer in a narrower space of its own: C wide outside, D inside."""

    def __init__(self, dim: int, code_dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.Linear(dim, code_dim, bias=False)
        self.quantizer = ResidualVQ(code_dim, sizes)
        self.up = nn.Linear(code_dim, dim, bias=False)

    def encode(self, x: Tensor) -> Tensor:
        return self.quantizer.encode(self.down(x))

    def decode(self, codes: Tensor) -> Tensor:
        return self.up(self.quantizer.decode(codes))


class SplitResidualVQ(nn.Module):
    """A semantic quantizer beside a residual stack of acoustic ones (arXiv 2410.00037).

            ┌─ down ─ VQ ═══ code 0 ═══════ up ─┐
        x ──┤                                   + ── C wide
            └─ down ─ VQ ─ … ─ VQ ═ codes 1… ═ up ─┘

    The acoustic side codes x itself, not what the semantic code left over: so the semantic code
    is free to say what was said and need not serve the sound. With one codebook that side is its
    projections alone, which nothing passes: the public formats have them too. It codes and decodes;
    nothing here trains one.
    """

    def __init__(self, dim: int, code_dim: int, sizes: Sequence[int]) -> None:
        """`dim`: width C outside; `code_dim`: of the codes, D; `sizes`: codes of each codebook."""
        super().__init__()
        self.semantic = _Projected(dim, code_dim, sizes[:1])
        self.acoustic = _Projected(dim, code_dim, sizes[1:])

    def keep(self, count: int) -> None:
        """Forget all but the first `count` codebooks, 1 … K."""
        self.acoustic.quantizer.keep(count - 1)

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, C] → int64 [B, K, T]."""
        codes = self.semantic.encode(x)
        if len(self.acoustic.quantizer.levels):
            codes = torch.cat((codes, self.acoustic.encode(x)), dim=1)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """int [B, 1 ≤ K' ≤ K, T] → [B, T, C]; fewer codebooks give a coarser vector."""
        has = 1 + len(self.acoustic.quantizer.levels)
        assert codes.shape[1] <= has, f"{codes.shape[1]} codebooks, but this one has {has}"
        x = self.semantic.decode(codes[:, :1])
        return x + self.acoustic.decode(codes[:, 1:]) if codes.shape[1] > 1 else x
