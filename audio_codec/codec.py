"""What a codec is, and how one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.encodec import EncodecCodec, load_encodec, names_encodec
from audio_codec.errors import UserError
from audio_codec.spectral import SpectralCodec, SpectralConfig
from audio_codec.state import State


class Codec(Protocol):
    """Sound ↔ codes, whole or frame by frame.

    Codebook 0 is semantic, 1 … K−1 acoustic. `State` is the codec's own; None means from silence.
    """

    sample_rate: int
    frame_size: int
    """Samples a frame."""
    delay: int
    """Samples that the output lags behind the input, beyond the frame itself."""

    @property
    def codebooks(self) -> tuple[tuple[int, ...], ...]:
        """Factor sizes of each of the K codebooks; their product is the codebook's size."""

    def encode(self, pcm: Tensor, state: Any = None) -> Tensor:
        """Waveform [B, 1, S], S in whole frames → codes int64 [B, K, T]."""

    def decode(self, codes: Tensor, state: Any = None) -> Tensor:
        """Codes [B, K, T] → waveform [B, 1, S]."""

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> State:
        """Encoder state of `batch` streams for chunks of up to `max_chunk` frames."""

    def new_decoder_state(self, batch: int, max_chunk: int = 1) -> State:
        """Decoder state likewise."""


def is_codec(name_or_path: str | Path) -> bool:
    """Whether a name is that of a codec, rather than of a model with a codec inside.

    Raises UserError when there is nothing of that name.
    """
    if names_encodec(name_or_path):
        return True
    config = checkpoints.load(name_or_path).config
    return "kind" in config or config.get("model_type") == "encodec"


def load_codec(name_or_path: str | Path) -> SpectralCodec | EncodecCodec:
    """A codec in inference mode from a shipped name, a directory or `hf://organisation/name`.

    `encodec[:KBPS]` and what else `load_encodec` takes give EnCodec. Raises UserError when there is
    no such codec or it is broken.
    """
    if names_encodec(name_or_path):
        return load_encodec(name_or_path)
    found = checkpoints.load(name_or_path)
    if found.config.get("model_type") == "encodec":
        return load_encodec(name_or_path)
    kind = found.config.get("kind")
    if kind != "spectral":
        raise UserError(f"config of '{found.path}': kind '{kind}' is unknown; choices: spectral.")
    codec = SpectralCodec(checkpoints.parse_config(SpectralConfig, found))
    checkpoints.restore(codec, found)
    return codec.eval().requires_grad_(False)
