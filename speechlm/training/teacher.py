"""Teachers: frozen speech encoders whose features a codec's codebook 0 is held to.

    pcm, 24 kHz ─ prepare (CPU, ahead of the step) ─ what the network takes ─ forward ─ [B, N, C]

Either the encoder of our own speech tokenizer, or any speech encoder that the `AutoModel` and
`AutoFeatureExtractor` of the package `transformers` can read (WavLM as in Mimi, HuBERT, wav2vec 2,
w2v-BERT, the encoder of Whisper). A teacher hears the whole crop, its future too; the causal
student learns of it what can be told without (arXiv 2410.00037, sec. 3.3.3).

Shapes: B batch, S samples at 24 kHz, N frames of the teacher, C its width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, resample
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from speechlm.convert import load_speech_tokenizer_of


class TeacherConfig(BaseModel):
    """Who teaches codebook 0, and how strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A speech encoder of `transformers` (a folder or hf://organisation/name), or a checkpoint of
    our speech tokenizer, or of a codec or model around one."""
    weight: float = Field(10.0, gt=0)
    """Of the cosine distance in the loss."""


class TokenizerTeacher(nn.Module):
    """The encoder of our speech tokenizer, before its bottleneck: 25 Hz."""

    def __init__(self, tokenizer: SpeechTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.width = tokenizer.config.dim
        """Width C of the features."""

    def prepare(self, pcm: Tensor) -> Tensor:
        """Sound [B, 1, S] → what `forward` takes, both on the CPU; for any thread."""
        return pcm

    @torch.no_grad()
    def forward(self, heard: Tensor, samples: int) -> Tensor:
        """What `prepare` made of `samples`, on the teacher's device → features [B, N, C]."""
        assert heard.shape[-1] == samples, (heard.shape, samples)
        return self.tokenizer.hidden(self.tokenizer.mel(heard))


class TransformersTeacher(nn.Module):
    """The last hidden states of a speech encoder of `transformers`."""

    def __init__(self, encoder: Any, extractor: Any) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.extractor = extractor
        self.takes: str = encoder.main_input_name
        self.width: int = encoder.config.hidden_size
        """Width C of the features."""

    def prepare(self, pcm: Tensor) -> Tensor:
        """Sound [B, 1, S] → what `forward` takes, both on the CPU; for any thread.

        Resampled, and normalized or made a spectrum, as the encoder knows it.
        """
        rate = self.extractor.sampling_rate
        rows = list(resample(pcm[:, 0].numpy(), SAMPLE_RATE, rate))
        return self.extractor(rows, sampling_rate=rate, return_tensors="pt")[self.takes]

    @torch.no_grad()
    def forward(self, heard: Tensor, samples: int) -> Tensor:
        """What `prepare` made of `samples`, on the teacher's device → features [B, N, C]."""
        features = self.encoder(**{self.takes: heard}).last_hidden_state
        sound = samples * self.extractor.sampling_rate / SAMPLE_RATE
        # Whisper's input is always 30 s; what it says of the silence after the crop is no lesson.
        padded = max(sound, getattr(self.extractor, "n_samples", 0))
        return features[:, : math.ceil(features.shape[1] * sound / padded)]


Teacher = TokenizerTeacher | TransformersTeacher


def load_teacher(name_or_path: str) -> Teacher:
    """The teacher that a config names, in float32 on the CPU.

    Raises UserError when there is no such model, when it is broken, when it takes no sound, or when
    it gives no features of it.
    """
    path = checkpoints.resolve(name_or_path)
    if not _is_of_transformers(path):
        return TokenizerTeacher(load_speech_tokenizer_of(name_or_path)).eval()
    from transformers import AutoFeatureExtractor, AutoModel  # seconds, for those who use it

    try:
        network = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        if network.config.is_encoder_decoder:
            network = network.get_encoder()
        if network.main_input_name not in ("input_values", "input_features"):
            raise UserError(
                f"teacher.model '{name_or_path}' is a {network.config.model_type} and takes "
                f"{network.main_input_name}, no sound; choose a speech encoder."
            )
        extractor: Any = AutoFeatureExtractor.from_pretrained(path, local_files_only=True)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"teacher.model '{name_or_path}' cannot be loaded: {reason}") from error
    return _tried(network, extractor, name_or_path)


_TRIAL = 10 * FRAME_SIZE
"""Samples of the sound on which a teacher is tried."""


def _tried(network: Any, extractor: Any, name: str) -> TransformersTeacher:
    """The teacher, once it has taught a frame: what takes sound need not give features of it."""
    try:
        teacher = TransformersTeacher(network, extractor).eval()
        features = teacher(teacher.prepare(torch.zeros(1, 1, _TRIAL)), _TRIAL)
        if features.dim() != 3 or features.shape[2] != teacher.width:
            raise ValueError(f"features of shape {tuple(features.shape)}")
    except Exception as error:  # whatever a foreign network raises when it is used otherwise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"teacher.model '{name}' is a {network.config.model_type} and does not teach "
            f"({reason}); choose a speech encoder, as WavLM."
        ) from error
    return teacher


def _is_of_transformers(path: Path) -> bool:
    """Whether a checkpoint directory is one of `transformers`; a broken one is not."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
