"""Training criteria of the codecs.

Shapes: B batch, S samples, T frames of the codec, N frames of whatever else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from audio_codec.audio import SAMPLE_RATE, mel_filterbank
from audio_codec.discriminators import Verdict

AdversarialLoss = Literal["hinge", "lsgan"]
"""Hinge (arXiv 1705.02894) or least squares (arXiv 1611.04076)."""


class MultiScaleMel(nn.Module):
    """L1 distance of log-mel spectra at several resolutions.

    Coarse windows see harmonics, fine ones see onsets; the logarithm makes quiet sounds count. What
    listeners understand hangs on the course of each band's loud parts (Taal et al., 2011), of which
    a logarithm tells little: hence, with `envelopes`, another term, the error of a band's
    magnitudes relative to their norm, as spectral convergence (arXiv 1808.06719) is that of all
    bands together.
    """

    def __init__(
        self,
        scales: Sequence[tuple[int, int]] = ((256, 20), (512, 40), (1024, 80), (2048, 160)),
        floor: float = 1e-5,
        envelopes: float = 0.0,
    ) -> None:
        """`scales`: (FFT size, mel bands) of each resolution; a hop is a quarter of a window.

        `envelopes`: weight of their error beside that of the logarithms.
        """
        super().__init__()
        self.floor = floor
        self.envelopes = envelopes
        self.sizes = [size for size, _ in scales]
        for size, bands in scales:
            self.register_buffer(f"window{size}", torch.hann_window(size), persistent=False)
            self.register_buffer(
                f"filters{size}",
                mel_filterbank(SAMPLE_RATE, size, bands, 0.0, SAMPLE_RATE / 2),
                persistent=False,
            )

    def spectra(self, pcm: Tensor) -> list[Tensor]:
        """Log-mel spectra of [B, S], one [B, frames, bands] a scale."""
        found = []
        for size in self.sizes:
            window, filters = getattr(self, f"window{size}"), getattr(self, f"filters{size}")
            spectrum = torch.stft(
                pcm, size, size // 4, window=window, return_complex=True, pad_mode="constant"
            )
            magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()
            mel = magnitude.transpose(1, 2) @ filters / window.sum()
            found.append((mel + self.floor).log())
        return found

    def forward(self, decoded: Tensor, original: Tensor) -> Tensor:
        """Mean distance of two waveforms [B, S]."""
        with torch.autocast(decoded.device.type, enabled=False):
            pairs = zip(self.spectra(decoded.float()), self.spectra(original.float()), strict=True)
            return torch.stack([self._distance(a, b) for a, b in pairs]).mean()

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Of log-mel spectra [B, frames, bands], the second of which is the original."""
        distance = (a - b).abs().mean()
        if not self.envelopes:
            return distance
        whole = b.exp()
        error = (a.exp() - whole).square().sum(1)
        # The floor is in both, so that a silent band's norm is that of the floor.
        relative = (error / whole.square().sum(1) + 1e-8).sqrt()
        return distance + self.envelopes * relative.mean()


def discriminator_loss(
    real: Sequence[Verdict], decoded: Sequence[Verdict], kind: AdversarialLoss
) -> Tensor:
    """How badly the discriminators tell the two apart, mean over them."""
    losses = []
    for yes, no in zip(real, decoded, strict=True):
        if kind == "hinge":
            losses.append(F.relu(1 - yes.logits).mean() + F.relu(1 + no.logits).mean())
        else:
            losses.append((yes.logits - 1).square().mean() + no.logits.square().mean())
    return torch.stack(losses).mean()


def generator_loss(decoded: Sequence[Verdict], kind: AdversarialLoss) -> Tensor:
    """How little the discriminators take decoded sound for real, mean over them."""
    gaps = [1 - verdict.logits for verdict in decoded]
    losses = [F.relu(gap) if kind == "hinge" else gap.square() for gap in gaps]
    return torch.stack([loss.mean() for loss in losses]).mean()


def feature_matching(real: Sequence[Verdict], decoded: Sequence[Verdict]) -> Tensor:
    """L1 distance of the discriminators' features, each relative to its size on real sound.

    The mean over layers and discriminators (EnCodec, arXiv 2210.13438, eq. 2). The features of the
    real sound are a target: no gradient goes there.
    """
    distances = []
    for target, found in zip(real, decoded, strict=True):
        for a, b in zip(target.features, found.features, strict=True):
            size = a.detach().abs().mean(dtype=torch.float32)
            gap = (b - a.detach()).abs().mean(dtype=torch.float32)
            distances.append(gap / size.clamp(min=1e-5))
    return torch.stack(distances).mean()


class Balancer(nn.Module):
    """Losses on one output pull with set shares, whatever their own scales.

    The loss balancer of EnCodec (arXiv 2210.13438, sec. 3.4). With g_i the gradient of loss i on
    the output and n_i its average norm over the last steps, the output gets

        R · Σ_i  w_i / Σ_j w_j  ·  g_i / n_i

    where R is `strength` · n of the `reference` loss: the sum pulls about as hard as that loss
    alone would with weight `strength`, so a training that begins with it alone goes on smoothly.
    """

    norms: Tensor
    trust: Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        reference: str,
        strength: float = 1.0,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        assert reference in weights, f"reference {reference} is none of {', '.join(weights)}"
        self.weights, self.reference = dict(weights), reference
        self.strength, self.decay = strength, decay
        # Moving sums that start from nothing; their quotient is an average from the first step on.
        self.register_buffer("norms", torch.zeros(len(weights)))
        self.register_buffer("trust", torch.zeros(len(weights)))

    def forward(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The balanced gradient on `output` [B, ...]; the graphs of the losses stay.

        A loss may be absent: the others then share what there is. The reference may not.
        """
        assert self.reference in losses, f"no {self.reference} among {', '.join(losses)}"
        names = list(self.weights)
        gradients = {
            name: torch.autograd.grad(loss, output, retain_graph=True)[0].float()
            for name, loss in losses.items()
        }
        with torch.no_grad():
            for name, gradient in gradients.items():
                norm = gradient.flatten(1).norm(dim=1).mean()
                if dist.is_initialized():
                    dist.all_reduce(norm)
                    norm /= dist.get_world_size()
                place = names.index(name)
                # One that is not finite must not stay in the average for ever.
                weight = (1 - self.decay) * norm.isfinite()
                self.norms[place].lerp_(norm.nan_to_num(0.0, 0.0), weight)
                self.trust[place].lerp_(torch.ones_like(norm), weight)
            average = (self.norms / self.trust.clamp(min=1e-12)).clamp(min=1e-12)
            total = sum(self.weights[name] for name in gradients)
            pull = self.strength * average[names.index(self.reference)]
            balanced = torch.zeros_like(output, dtype=torch.float32)
            for name, gradient in gradients.items():
                share = pull * self.weights[name] / total
                balanced += share / average[names.index(name)] * gradient
            return balanced


def pool_frames(features: Tensor, frames: int) -> Tensor:
    """A teacher's features [B, N, C] at the codec's rate: [B, T, C], T = `frames`.

    Each frame is the mean over twice its own length, centred on it (as in Mimi, arXiv 2410.00037,
    sec. 3.3.3): at N = 4 T a kernel of 8 and a stride of 4. Other rates, and encoders that give a
    frame too few, are interpolated to that first.
    """
    x = F.interpolate(features.float().transpose(1, 2), size=4 * frames, mode="linear")
    pooled = F.avg_pool1d(x, kernel_size=8, stride=4, padding=2, count_include_pad=False)
    return pooled.transpose(1, 2)


class Distillation(nn.Module):
    """Cosine distance between a teacher's features and a projection of the semantic vectors.

    Mimi's way to a semantic codebook (arXiv 2410.00037, sec. 3.3.3). The projection serves training
    alone.
    """

    def __init__(self, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, teacher_dim)

    def forward(self, semantic: Tensor, taught: Tensor) -> Tensor:
        """Mean of 1 − cosine: semantic [B, T, dim], taught [B, N, teacher_dim] at any rate."""
        target = pool_frames(taught, semantic.shape[1])
        return (1 - F.cosine_similarity(self.project(semantic).float(), target, dim=-1)).mean()
