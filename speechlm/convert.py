"""Checkpoints of the whole model, in and out.

A checkpoint directory holds

    config.json          LMConfig
    model.safetensors    the language model
    text.model           its text pieces
    card.json            what it was trained on, its measured scores
    codec/               the codec of its codes, a checkpoint of its own
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from audio_codec import checkpoint as checkpoints
from audio_codec.codec import AnyCodec, kind_of, load_codec, load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from speechlm.data import TextTokenizer
from speechlm.duplex import Duplex
from speechlm.model import LMConfig, SpeechLM

TEXT_MODEL = "text.model"

checkpoints.register_shipped("tiny", Path(__file__).parent / "pretrained" / "tiny")


def load_tokenizer(path: Path) -> TextTokenizer:
    """The text pieces in a checkpoint directory. Raises UserError when there are none."""
    try:
        return TextTokenizer((path / TEXT_MODEL).read_bytes())
    except OSError as error:
        raise UserError(f"model '{path}' has no {TEXT_MODEL}: {error.strerror}.") from error


def load_lm(name_or_path: str | Path) -> tuple[SpeechLM, TextTokenizer]:
    """Language model and text pieces, without the codec.

    Raises UserError when there is no such model or it is broken.
    """
    found = checkpoints.load(name_or_path)
    model = SpeechLM(checkpoints.parse_config(LMConfig, found))
    checkpoints.restore(model, found)
    return model.eval(), load_tokenizer(found.path)


def find_codec(name_or_path: str | Path) -> str:
    """Where the codec of a model is: the folder in its checkpoint, or what its config names."""
    found = checkpoints.load(name_or_path)
    named = checkpoints.parse_config(LMConfig, found).codec
    inside = found.path / named
    return str(inside) if inside.is_dir() else named


def codec_folder(name_or_path: str | Path) -> str | Path:
    """The checkpoint of a model's codec, or `name_or_path` itself when it is a codec's."""
    return name_or_path if kind_of(name_or_path) else find_codec(name_or_path)


def load_codec_of(name_or_path: str | Path) -> AnyCodec:
    """The codec of a model, or the one that `load_codec` finds by that name.

    Raises UserError when there is none or it is broken.
    """
    return load_codec(codec_folder(name_or_path))


def load_speech_tokenizer_of(name_or_path: str | Path) -> SpeechTokenizer:
    """The speech tokenizer of a model or codec, or the one in its own checkpoint directory.

    Raises UserError when there is none or it is broken.
    """
    if "levels" in checkpoints.load(name_or_path).config:
        return load_tokenizer_of(name_or_path)
    return load_tokenizer_of(codec_folder(name_or_path))


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> Duplex:
    """The whole model, ready to talk: `"tiny"` (shipped), a directory or `hf://org/name`.

    Raises UserError when there is no such model or it is broken.
    """
    model, tokenizer = load_lm(name_or_path)
    codec = load_codec(find_codec(name_or_path))
    return Duplex(codec.to(device), model.to(device).requires_grad_(False), tokenizer)


def save(
    directory: str | Path,
    model: SpeechLM,
    tokenizer: TextTokenizer,
    *,
    dtype: checkpoints.StoredType = "bf16",
    card: Mapping[str, Any] | None = None,
    bundle: bool = True,
) -> Path:
    """Write a checkpoint directory; with `bundle` the codec that its config names is copied in."""
    target = Path(directory)
    config = model.config
    codec = checkpoints.resolve(config.codec) if bundle else None
    if codec is not None:
        config = config.model_copy(update={"codec": "codec"})
    fresh = checkpoints.save(
        target.with_name(f".{target.name}.{os.getpid()}.tmp"),
        config,
        model.state_dict(),
        dtype=dtype,
        files={TEXT_MODEL: tokenizer.model},
        card=card,
    )
    try:
        if codec is not None:
            shutil.copytree(codec, fresh / "codec")
        checkpoints.replace_directory(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target
