"""EnCodec (arXiv 2210.13438) at 24 kHz, the public baseline: the package `encodec` as a `Codec`.

    pcm ─ SEANet, stride 320 ─ LSTM ─ 128 numbers at 75 Hz ─ residual VQ, 32 × 1024 ═ codes
    pcm ─ SEANet, ×320 ────── LSTM ───────────────────────── sum of codebooks ───────┘

Its own frame is 320 samples; six of them fill the 80 ms of this project's clock, so that what is
said with K codebooks a frame here takes 6·K codes there. Every codebook has 10 bits at 75 Hz: a
bandwidth of 1.5, 3, 6, 12 or 24 kbit/s is the first 2, 4, 8, 16 or 32 of them. None is semantic.

The package has no streaming state: its convolutions mirror what they hear at the edges of the input
and its LSTMs start from zero. So each call is coded alone, whether a state is given or not. Whole
sounds are coded as the package codes them; chunks (80 ms, say) are independent of one another,
which costs quality at their seams and is all that the package can do live.

Shapes: B batch, S samples, T frames of 320 samples, K codebooks.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from audio_codec import checkpoint as checkpoints
from audio_codec.checkpoint import Checkpoint
from audio_codec.errors import Unreachable, UserError
from audio_codec.state import State, all_active

NAME: Final = "encodec"
"""Names the weights that the package itself fetches: `encodec`, or `encodec:KBPS`."""

BANDWIDTHS: Final = (1.5, 3.0, 6.0, 12.0, 24.0)  # kbit/s
_KBPS_A_CODEBOOK = 0.75  # 10 bits, 75 times a second


class EncodecCodec(nn.Module):
    """The package's 24 kHz model as a `Codec`, with random weights until others are put in.

    Stride: one frame of 320 samples. No delay beyond it.
    """

    sample_rate = 24_000
    frame_size = 320
    delay = 0

    def __init__(self, bandwidth: float = 6.0) -> None:
        super().__init__()
        if bandwidth not in BANDWIDTHS:
            choices = ", ".join(f"{choice:g}" for choice in BANDWIDTHS)
            raise UserError(f"bandwidth {bandwidth:g} is none of EnCodec's; choices: {choices}.")
        self.bandwidth = bandwidth
        with warnings.catch_warnings():
            # The package builds on a form of weight normalization that torch calls deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            from encodec.model import EncodecModel

            self.model = EncodecModel.encodec_model_24khz(pretrained=False)
        self.model.set_target_bandwidth(bandwidth)
        for level in self.model.quantizer.vq.layers:
            level._codebook.embed.normal_()  # zeros, until somebody trains them
            level._codebook.inited.fill_(1)

    @property
    def codebooks(self) -> tuple[tuple[int, ...], ...]:
        """Factor sizes of each of the K codebooks."""
        return ((self.model.quantizer.bins,),) * round(self.bandwidth / _KBPS_A_CODEBOOK)

    def keep_codebooks(self, count: int) -> None:
        """Lower the bandwidth to the first `count` codebooks; UserError where EnCodec has none."""
        self.bandwidth = count * _KBPS_A_CODEBOOK
        if self.bandwidth not in BANDWIDTHS:
            choices = ", ".join(f"{choice / _KBPS_A_CODEBOOK:g}" for choice in BANDWIDTHS)
            raise UserError(f"codebooks {count} is none of EnCodec's; choices: {choices}.")
        self.model.set_target_bandwidth(self.bandwidth)

    def fold_weight_norm(self) -> EncodecCodec:
        """Work out every normalized weight once and for all: same numbers, less work a frame."""
        for module in self.model.modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and hasattr(module, "weight_g"):
                remove_weight_norm(module)
        return self

    def encode(self, pcm: Tensor, state: State | None = None) -> Tensor:
        """Waveform [B, 1, S], S a multiple of 320 → codes int64 [B, K, T]; each call alone."""
        assert pcm.shape[1] == 1 and pcm.shape[2] % self.frame_size == 0, tuple(pcm.shape)
        ((codes, _),) = self.model.encode(pcm)
        return codes

    def decode(self, codes: Tensor, state: State | None = None) -> Tensor:
        """Codes [B, K' ≤ K, T] → waveform [B, 1, S]; each call alone."""
        return self.model.decode([(codes, None)])

    def embed_semantic(self, codes: Tensor) -> Tensor:
        """Codes of codebook 0 [B, T] → what they stand for [B, T, 128]."""
        return self.model.quantizer.decode(codes.unsqueeze(0)).transpose(1, 2)

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> State:
        """A state that remembers nothing: see the module docstring."""
        return State(all_active(batch, next(self.parameters()).device))

    def new_decoder_state(self, batch: int, max_chunk: int = 1) -> State:
        """Likewise."""
        return self.new_encoder_state(batch, max_chunk)


def random_encodec(bandwidth: float = 6.0) -> EncodecCodec:
    """The true architecture with random weights, in inference mode: for benches."""
    return EncodecCodec(bandwidth).fold_weight_norm().eval().requires_grad_(False)


def load_encodec(weights: str | Path = NAME, bandwidth: float = 6.0) -> EncodecCodec:
    """EnCodec in inference mode with trained weights, at `bandwidth` kbit/s.

    `weights`: `encodec` (what the package itself fetches and keeps), `encodec:KBPS` for another
    bandwidth, a `.th` file of the package, or a checkpoint in the layout of transformers'
    `EncodecModel` (a directory or `hf://facebook/encodec_24khz`).

    Raises UserError when they cannot be had, are broken or are of another model.
    """
    name, _, kbps = str(weights).partition(":")
    if name == NAME:
        codec = EncodecCodec(_kbps(kbps) if kbps else bandwidth)
        found = _from_package()
    else:
        codec = EncodecCodec(bandwidth)
        if os.path.isfile(weights):  # never raises; Path.is_file does when a name is too long
            found = _from_file(Path(weights))
        else:
            found = _renamed(checkpoints.load(weights), codec.model)
    checkpoints.restore(codec.model, found)
    return codec.fold_weight_norm().eval().requires_grad_(False)


def names_encodec(name_or_path: str | Path) -> bool:
    """Whether a name is one that only `load_encodec` understands: `encodec[:KBPS]`, `….th`."""
    text = str(name_or_path)
    return text.partition(":")[0] == NAME or text.endswith(".th")


def _kbps(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"model '{NAME}:{text}' must name a bandwidth, as in {NAME}:6.") from None


def _from_package() -> Checkpoint:
    from encodec.model import EncodecModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tensors = EncodecModel.encodec_model_24khz(pretrained=True).state_dict()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network; a broken file
        raise Unreachable(
            f"model '{NAME}': its weights could not be fetched ({error}); give a .th file of the "
            "package, or a folder or hf:// address of EnCodec in the layout of transformers."
        ) from error
    return Checkpoint(Path(NAME), {}, tensors)


def _from_file(path: Path) -> Checkpoint:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(f"weights '{path}' are truncated or corrupt: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"weights '{path}' must hold a table of tensors, as the package's do.")
    return Checkpoint(path, {}, tensors)


def _renamed(found: Checkpoint, model: nn.Module) -> Checkpoint:
    """A checkpoint in the layout of transformers, under the package's names."""
    names = {_transformers_name(name): name for name in model.state_dict()}
    tensors = {}
    for name, tensor in found.tensors.items():
        # The one form of weight normalization or the other, as transformers was when it saved.
        plain = re.sub(
            r"parametrizations\.weight\.original([01])", lambda m: "weight_" + "gv"[int(m[1])], name
        )
        tensors[names.get(plain, name)] = tensor
    return replace(found, tensors=tensors)


def _transformers_name(name: str) -> str:
    """encoder.model.0.conv.conv.weight_g → encoder.layers.0.conv.weight_g, and so on."""
    name = re.sub(r"\b(?:conv|convtr)\.(?:conv|convtr)\.", "conv.", name)
    name = re.sub(r"^(encoder|decoder)\.model\.", r"\1.layers.", name)
    return re.sub(
        r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook.", name
    )


__all__ = ["BANDWIDTHS", "NAME", "EncodecCodec", "load_encodec", "names_encodec", "random_encodec"]
