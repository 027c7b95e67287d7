"""What a codec is, and how one is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.errors import UserError
from audio_codec.mimi import MimiCodec, read_hf, read_kyutai
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


Kind = Literal["spectral", "hf", "kyutai"]
"""Whose format a codec's checkpoint is in: our own, or Mimi's in either public one."""


def kind_of(path: Path) -> Kind | None:
    """What codec a directory or file holds; None when it is no codec's.

    Raises UserError when a file that would tell is broken, or tells of a codec not known here.
    """
    if path.is_file():
        return "kyutai" if _kyutai_file(path) else None
    if (path / "config.json").exists():
        config = checkpoints.read_json(path / "config.json")
        if config.get("model_type") == "mimi":
            return "hf"
        if config.get("kind") == "spectral":
            return "spectral"
        if "kind" in config:
            raise UserError(
                f"config of '{path}': kind '{config['kind']}' is unknown; choices: spectral."
            )
    return "kyutai" if any(map(_kyutai_file, path.glob("*.safetensors"))) else None


def _kyutai_file(file: Path) -> bool:
    return any(name.startswith("quantizer.rvq_first.") for name in checkpoints.tensor_names(file))


def load_codec(name_or_path: str | Path, codebooks: int | None = None) -> SpectralCodec | MimiCodec:
    """A codec in inference mode: ours, or Mimi in either public format (see `mimi`).

    `name_or_path`: a shipped name, a directory, `hf://organisation/name`, or a file of Kyutai's.
    `codebooks`: keep only the first so many, for a lower bitrate; None keeps all.
    Raises UserError when there is no such codec, it is broken, or it has not so many codebooks.
    """
    is_file = os.path.isfile(name_or_path)
    path = Path(name_or_path) if is_file else checkpoints.resolve(name_or_path)
    kind = kind_of(path)
    codec: SpectralCodec | MimiCodec
    if kind == "spectral":
        found = checkpoints.load(path)
        codec = SpectralCodec(checkpoints.parse_config(SpectralConfig, found))
        checkpoints.restore(codec, found)
    elif kind == "hf":
        codec = read_hf(path)
    elif kind == "kyutai":
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        codec = read_kyutai(next(filter(_kyutai_file, files)))
    else:
        raise UserError(
            f'codec \'{path}\' is unknown; choices: config.json with "kind": "spectral" or '
            '"model_type": "mimi", or a safetensors file of Mimi in Kyutai\'s naming.'
        )
    if codebooks is not None:
        if not 1 <= codebooks <= len(codec.codebooks):
            raise UserError(
                f"codebooks={codebooks}, but codec '{path}' has {len(codec.codebooks)}; "
                f"choices: 1 … {len(codec.codebooks)}."
            )
        codec.keep_codebooks(codebooks)
    return codec.eval().requires_grad_(False)
