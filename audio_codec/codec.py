"""What a codec is, and how one is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.encodec import EncodecCodec, load_encodec, names_encodec
from audio_codec.errors import UserError
from audio_codec.layers import lay_out
from audio_codec.mimi import MimiCodec, read_hf, read_kyutai
from audio_codec.spectral import SpectralCodec, SpectralConfig
from audio_codec.speech_tokenizer import SpeechTokenizer, load_tokenizer
from audio_codec.speech_tokenizer import kind_of as kind_of_tokenizer
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


AnyCodec = SpectralCodec | MimiCodec | EncodecCodec


def coded_by(codec: Codec) -> tuple[float, ...] | None:
    """What tells the codes of a codec from those of another: the fingerprint of the speech
    tokenizer in it, then that of what makes its acoustic codes (`same_coder` compares the two).

    None where there is no such tokenizer, or only its shape.
    """
    tokenizer = getattr(codec, "tokenizer", None)
    if not isinstance(tokenizer, SpeechTokenizer) or next(tokenizer.parameters()).is_meta:
        return None
    acoustic = codec.fingerprint() if isinstance(codec, SpectralCodec) else ()
    return tokenizer.fingerprint() + acoustic


Kind = Literal["spectral", "hf", "kyutai", "encodec"]
"""Whose format a codec's checkpoint is in: our own, Mimi's in either public one, or EnCodec's."""


def kind_of(name_or_path: str | Path) -> Kind | None:
    """What codec a name, directory or file holds; None when it is no codec's.

    Raises UserError when there is nothing of that name, when a file that would tell is broken, or
    tells of a codec not known here.
    """
    if names_encodec(name_or_path):
        return "encodec"
    if os.path.isfile(name_or_path):
        return "kyutai" if _kyutai_file(Path(name_or_path)) else None
    path = locate(name_or_path)
    if (path / "config.json").exists():
        config = checkpoints.read_json(path / "config.json")
        if config.get("model_type") == "mimi":
            return "hf"
        if config.get("model_type") == "encodec":
            return "encodec"
        if config.get("kind") == "spectral":
            return "spectral"
        if "kind" in config:
            raise UserError(
                f"config of '{path}': kind '{config['kind']}' is unknown; choices: spectral."
            )
    return "kyutai" if any(map(_kyutai_file, path.glob("*.safetensors"))) else None


_KYUTAIS = ("tokenizer-*.safetensors", "mimi-*.safetensors")
"""What Kyutai calls a codec's file, beside which a language model of gigabytes may lie."""


def locate(name_or_path: str | Path) -> Path:
    """The directory of a codec; from the hub comes no more than a codec is made of.

    Raises UserError where `checkpoint.resolve` does.
    """
    path = checkpoints.resolve(name_or_path, ("config.json", *_KYUTAIS))
    if any(file for pattern in _KYUTAIS for file in path.glob(pattern)):
        return path
    if not (path / "config.json").exists():
        return checkpoints.resolve(name_or_path, ("*.safetensors",))
    config = checkpoints.read_json(path / "config.json")
    if config.get("model_type") in ("mimi", "encodec") or "kind" in config:
        return checkpoints.resolve(name_or_path, ("config.json", "model*.safetensors"))
    return path


def _kyutai_file(file: Path) -> bool:
    return any(name.startswith("quantizer.rvq_first.") for name in checkpoints.tensor_names(file))


def load_codec(name_or_path: str | Path, codebooks: int | None = None) -> AnyCodec:
    """A codec in inference mode: ours, Mimi in either public format (see `mimi`), or EnCodec.

    `name_or_path`: a shipped name, a directory, `hf://organisation/name`, a file of Kyutai's, or
    what else `load_encodec` takes.
    `codebooks`: keep only the first so many, for a lower bitrate; None keeps all.
    Raises UserError when there is no such codec, it is broken, or it has not so many codebooks;
    Unreachable when its weights lie elsewhere and cannot be fetched.
    """
    kind = kind_of(name_or_path)
    codec: AnyCodec
    if kind == "spectral":
        found = checkpoints.load(locate(name_or_path))
        codec = SpectralCodec(checkpoints.parse_config(SpectralConfig, found))
        checkpoints.restore(codec, found)
    elif kind == "encodec":
        own = names_encodec(name_or_path)
        codec = load_encodec(name_or_path if own else locate(name_or_path))
    elif kind == "hf":
        codec = read_hf(locate(name_or_path))
    elif kind == "kyutai":
        single = os.path.isfile(name_or_path)
        files = (
            [Path(name_or_path)] if single else sorted(locate(name_or_path).glob("*.safetensors"))
        )
        codec = read_kyutai(next(filter(_kyutai_file, files)))
    else:
        raise UserError(
            f"codec '{name_or_path}' is unknown; choices: "
            'config.json with "kind": "spectral" or "model_type": "mimi" or "encodec", '
            "a safetensors file of Mimi in Kyutai's naming, or "
            "a .th file of EnCodec."
        )
    if codebooks is not None:
        if not 1 <= codebooks <= len(codec.codebooks):
            raise UserError(
                f"codebooks={codebooks}, but codec '{name_or_path}' has {len(codec.codebooks)}; "
                f"choices: 1 … {len(codec.codebooks)}."
            )
        codec.keep_codebooks(codebooks)
    lay_out(codec)
    return codec.eval().requires_grad_(False)


def load_tokenizer_of(name_or_path: str | Path) -> SpeechTokenizer:
    """The speech tokenizer inside a codec, or the one in its own checkpoint directory.

    Raises UserError when there is none or it is broken.
    """
    if kind_of(name_or_path) is None and kind_of_tokenizer(checkpoints.load(name_or_path).config):
        return load_tokenizer(name_or_path)
    codec = load_codec(name_or_path)
    if not isinstance(codec, SpectralCodec) or codec.tokenizer is None:
        raise UserError(
            f"The codec of '{name_or_path}' has no speech tokenizer inside: name a tokenizer, or a "
            "codec around one."
        )
    return codec.tokenizer
