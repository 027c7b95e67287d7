"""Discriminators: networks that learn to tell recorded sound from decoded sound, to train a codec.

Several judge at once, each on a complex spectrogram of its own resolution: long windows hear
harmonics that smear, short ones onsets that blur (EnCodec, arXiv 2210.13438, sec. 3.4; DAC,
arXiv 2306.06546). Each is a stack of 2-D convolutions that halves the number of bins again and
again while it looks ever further along time; its last layer says for every patch of the
spectrogram how real that patch sounds, and every layer before it is a feature to be matched.

    pcm ─ STFT, window w, hop w/4 ─ real, imaginary ─ conv ─ conv ─ conv ─ conv ─ conv ─ logits
                                          bins: w/2    w/4    w/8   w/16   w/32
                                          dilation:     1      1      2      4

Shapes: B batch, S samples, C channels, N frames of a spectrogram, F bins (fewer at each layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class DiscriminatorConfig(BaseModel):
    """How many discriminators, and how wide; 0.25 M parameters by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: tuple[Annotated[int, Field(ge=64, multiple_of=4)], ...] = Field(
        (2048, 1024, 512), min_length=1
    )
    """Samples of the STFT window of each; all cost about the same."""
    channels: PositiveInt = 32
    """Width of the convolutions; a CPU's matrix units want multiples of 16."""


@dataclass
class Verdict:
    """What one discriminator makes of a batch of sounds."""

    logits: Tensor  # [B, N, F], high where it sounds real
    features: list[Tensor]  # [B, C, N, F], one a layer


class SpectrogramDiscriminator(nn.Module):
    """A discriminator of one resolution."""

    window: Tensor

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.size = window
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [nn.Conv2d(2, channels, (3, 9), (1, 2), padding=(1, 4))]
        for dilation in (1, 2, 4):
            layers.append(
                nn.Conv2d(
                    channels,
                    channels,
                    (3, 9),
                    stride=(1, 2),
                    dilation=(dilation, 1),
                    padding=(dilation, 4),
                )
            )
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.head = weight_norm(nn.Conv2d(channels, 1, (3, 3), padding=(1, 1)))

    def spectrogram(self, pcm: Tensor) -> Tensor:
        """[B, S] → [B, 2, N, F], magnitudes to the power 0.3 as the codec's encoder has them.

        Without that only the loudest bins would be judged. The floor of −80 dB bounds what the
        compression does to the gradient of silence.
        """
        with torch.autocast(pcm.device.type, enabled=False):
            spectrum = torch.stft(
                pcm.float(),
                self.size,
                self.size // 4,
                window=self.window,
                return_complex=True,
                pad_mode="constant",
            )
            parts = torch.view_as_real(spectrum * (2 / self.window.sum())).permute(0, 3, 2, 1)
            power = parts.square().sum(1, keepdim=True)
            return parts * (power + 1e-8) ** -0.35

    def forward(self, pcm: Tensor) -> Verdict:
        """Judge sounds [B, S]."""
        x = self.spectrogram(pcm)
        if x.is_cuda:  # the layout that its tensor cores read; a CPU is as fast with either
            x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return Verdict(self.head(x)[:, 0].float(), features)


class Discriminators(nn.Module):
    """Discriminators of several resolutions."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.judges = nn.ModuleList(
            SpectrogramDiscriminator(window, config.channels) for window in config.windows
        )

    def forward(self, pcm: Tensor) -> list[Verdict]:
        """Judge sounds [B, S]; one verdict a resolution."""
        return [judge(pcm) for judge in self.judges]
