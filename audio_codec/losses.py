"""Training criteria of the codecs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from audio_codec.audio import SAMPLE_RATE, mel_filterbank


class MultiScaleMel(nn.Module):
    """L1 distance of log-mel spectra at several resolutions, and of their frame-to-frame change.

    Coarse windows see harmonics, fine ones see onsets; the logarithm makes quiet sounds count.
    """

    def __init__(
        self,
        scales: Sequence[tuple[int, int]] = ((256, 20), (512, 40), (1024, 80), (2048, 160)),
        floor: float = 1e-5,
    ) -> None:
        """`scales`: (FFT size, mel bands) of each resolution; a hop is a quarter of a window."""
        super().__init__()
        self.floor = floor
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
            return torch.stack([(a - b).abs().mean() for a, b in pairs]).mean()
