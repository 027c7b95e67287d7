"""Whisper's parts (arXiv 2212.04356), and the public layouts that their weights come in.

    log-mel, 100 Hz ─ conv ─ conv ÷2 ─ + positions ─ 50 Hz ─ blocks of the encoder ─┐
                                                                                    │ memory
    text pieces ─ embed ─ + positions ─ blocks of the decoder, each attending to it ┘ ─ pieces

The blocks are those of `transformer`; here are what stands before them (`Stem`), the decoder, and
the names and shapes of two public layouts: that of `transformers.WhisperModel`, and that of the
tokenizer of GLM-4-Voice (`WhisperVQEncoder`, arXiv 2412.02612), which is a Whisper encoder with
causal convolutions, block-causal attention, a pooling and a vector quantizer in its middle.

Shapes: B batch, S samples, M mel frames (100 Hz), T positions (50 Hz), C width, U text pieces,
N positions of the memory, L pieces of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from audio_codec.audio import LogMel
from audio_codec.errors import UserError
from audio_codec.layers import TailState, with_past
from audio_codec.state import State, all_active
from audio_codec.transformer import Transformer, TransformerConfig

SAMPLE_RATE = 16_000
"""Of the sound that the public features are made of."""


class StemConfig(BaseModel):
    """What stands before the blocks of a Whisper encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positions: PositiveInt = 1500
    """Positions told apart (30 s); a longer sound begins the table anew."""
    causal: bool = True
    """The convolutions see nothing ahead of them."""
    public_features: bool = False
    """Hear the public features of sound at 16 kHz (`PublicMel`) and not `LogMel` at 24 kHz."""


class DecoderConfig(BaseModel):
    """Shape of an attention decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: PositiveInt = 2
    heads: PositiveInt = 6
    hidden: PositiveInt | None = None
    """Width of the MLPs; None means four times that of the encoder."""
    vocabulary: PositiveInt | None = None
    """Text pieces L of a checkpoint of Whisper; None: characters."""
    positions: PositiveInt = 448
    """Longest text."""


def sinusoids(count: int, dim: int) -> Tensor:
    """Whisper's table of positions [count, dim]: sines of falling frequency, then their cosines."""
    half = dim // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / max(1, half - 1))
    angle = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rates
    return torch.cat((angle.sin(), angle.cos()), dim=1).float()


def with_positions(x: Tensor, table: Tensor, offset: Tensor | None) -> Tensor:
    """Add to [B, T, C] its rows of the table [P, C], which repeats; `offset` [B] came before."""
    at = torch.arange(x.shape[1], device=x.device)
    if offset is not None:
        at = offset.unsqueeze(1) + at
    return x + table[at % len(table)]


class Convolution(nn.Module):
    """Three taps and a GELU, [B, stride · T, C] → [B, T, D]; weights as in `nn.Conv1d`."""

    def __init__(self, dim_in: int, dim_out: int, stride: int, causal: bool) -> None:
        super().__init__()
        self.stride, self.causal = stride, causal
        bound = (3 * dim_in) ** -0.5
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x: Tensor, state: TailState | None = None) -> Tensor:
        """The taps end with, or, where not causal, lie around the first of each `stride` inputs."""
        padded = with_past(x, 2, state) if self.causal else F.pad(x, (0, 0, 1, 1))
        windows = padded.unfold(1, 3, self.stride).flatten(2)
        return F.gelu(F.linear(windows, self.weight.flatten(1), self.bias))

    def new_state(self, batch: int) -> TailState:
        """State of a stream that has not begun."""
        assert self.causal, "a convolution that is not causal cannot stream"
        tail = self.weight.new_zeros(batch, 2, self.weight.shape[1])
        return TailState(all_active(batch, tail.device), tail)


@dataclass(slots=True)
class StemState(State):
    """What the stem has heard."""

    first: TailState
    second: TailState
    offset: Tensor  # [B] int64 positions so far


class Stem(nn.Module):
    """Features [B, M, n_mels] → [B, M / 2, C], where a Whisper encoder's blocks begin."""

    positions: Tensor

    def __init__(self, config: StemConfig, mels: int, dim: int) -> None:
        super().__init__()
        self.first = Convolution(mels, dim, 1, config.causal)
        self.second = Convolution(dim, dim, 2, config.causal)
        self.register_buffer("positions", sinusoids(config.positions, dim))

    def forward(self, mel: Tensor, state: StemState | None = None) -> Tensor:
        """Any even number of mel frames."""
        assert mel.shape[1] % 2 == 0, f"{mel.shape[1]} mel frames are an odd number"
        if state is None:
            return with_positions(self.second(self.first(mel)), self.positions, None)
        x = self.second(self.first(mel, state.first), state.second)
        x = with_positions(x, self.positions, state.offset)
        state.offset.add_(state.active * x.shape[1])
        return x

    def new_state(self, batch: int) -> StemState:
        """State of a stream that has not begun."""
        first, second = self.first.new_state(batch), self.second.new_state(batch)
        offset = torch.zeros(batch, dtype=torch.int64, device=self.positions.device)
        return StemState(all_active(batch, offset.device), first, second, offset)


class PublicMel(nn.Module):
    """Whisper's own features: sound [B, 1, S] at 16 kHz → [B, S / 160, n_mels].

    Each is clipped 80 dB below the loudest of the whole sound, and its window reaches 2.5 ms ahead:
    no stream can make them, and `LogMel` takes their place where one must (see `from_public`).
    """

    stride = 160

    def __init__(self, n_mels: int) -> None:
        super().__init__()
        from transformers import WhisperFeatureExtractor  # seconds, for those who use it

        self.n_mels = n_mels
        self.extract: Any = WhisperFeatureExtractor(feature_size=n_mels)  # type: ignore[no-untyped-call]

    def forward(self, pcm: Tensor) -> Tensor:
        """On whatever device `pcm` is; made on the CPU."""
        rows = list(pcm[:, 0].float().cpu().numpy())
        made = self.extract(
            rows,
            sampling_rate=SAMPLE_RATE,
            padding="longest",
            truncation=False,
            return_tensors="pt",
        )
        return made["input_features"].transpose(1, 2).to(pcm.device)


class TextDecoder(nn.Module):
    """Reads text off a memory, piece by piece; what follows each piece is scored against all."""

    def __init__(self, config: DecoderConfig, dim: int, pieces: int, dropout: float) -> None:
        """`dim`: width C, here and of the memory; `pieces`: L."""
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(pieces, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.positions = nn.Parameter(0.01 * torch.randn(config.positions, dim))
        self.transformer = Transformer(
            TransformerConfig(
                dim=dim,
                layers=config.layers,
                heads=config.heads,
                hidden=config.hidden,
                norm="layer",
                gated=False,
                window=config.positions,
                rope=False,
                bias=True,
                memory=dim,
                dropout=dropout,
            )
        )

    def forward(
        self,
        pieces: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Pieces [B, U], memory [B, N, C], what of it is sound [B, N] → logits [B, U, L]."""
        offset = None if state is None else state.offset  # type: ignore[attr-defined]
        x = with_positions(self.embed(pieces), self.positions, offset)
        x = self.transformer(x, state, memory=memory, memory_mask=mask)
        return F.linear(x, self.embed.weight)

    @torch.no_grad()
    def greedy(
        self, memory: Tensor, mask: Tensor | None, prompt: Sequence[int], end: int
    ) -> list[list[int]]:
        """The likeliest piece after piece, from `prompt` up to `end`, both left out."""
        batch, device = len(memory), memory.device
        state = self.transformer.new_state(batch, len(prompt))
        pieces = torch.tensor(prompt, device=device).expand(batch, -1)
        rows: list[list[int]] = [[] for _ in range(batch)]
        for _ in range(len(self.positions) - len(prompt)):
            pieces = self(pieces, memory, mask, state)[:, -1:].argmax(-1)
            for row, piece in zip(rows, pieces[:, 0].tolist(), strict=True):
                if row[-1:] != [end]:
                    row.append(piece)
            if all(row[-1:] == [end] for row in rows):
                break
        return [row[:-1] if row[-1:] == [end] else row for row in rows]


# --- Public layouts -------------------------------------------------------------------------------

_KINDS = ("weight", "bias")


class PublicConfig(BaseModel):
    """`config.json` of a Whisper, under the public names; what does not shape it is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    d_model: PositiveInt
    num_mel_bins: PositiveInt = 80
    encoder_layers: PositiveInt
    encoder_attention_heads: PositiveInt
    decoder_attention_heads: PositiveInt | None = None
    encoder_ffn_dim: PositiveInt
    max_source_positions: PositiveInt = 1500
    activation_function: Literal["gelu"] = "gelu"
    scale_embedding: Literal[False] = False
    pooling_kernel_size: PositiveInt | None = None
    pooling_type: Literal["max", "avg"] = "max"
    pooling_position: int | None = 0
    """Layers before the pooling; 0 and None: there is none."""
    quantize_vocab_size: PositiveInt | None = None
    quantize_position: PositiveInt = 16
    """Layers before the quantizer."""
    quantize_causal_block_size: PositiveInt | None = None
    """Positions of a block, at 50 Hz."""
    quantize_causal_encoder: bool = False
    encoder_causal_attention: bool = False
    encoder_causal_convolution: bool = False


@dataclass(frozen=True)
class Public:
    """The tensors of a public checkpoint, whichever way it was saved."""

    path: Path
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        # `WhisperForConditionalGeneration` puts model. before the names of `WhisperModel`, and an
        # encoder saved alone leaves encoder. out.
        named = {name.removeprefix("model."): tensor for name, tensor in self.tensors.items()}
        if "conv1.weight" in named:
            named = {f"encoder.{name}": tensor for name, tensor in named.items()}
        object.__setattr__(self, "tensors", named)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"weights in '{self.path}': tensor '{name}' is missing.")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def joined(self, prefix: str, parts: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Projections as one: weights [sum, C], biases [sum], zeros where there are none."""
        weights = [self[f"{prefix}.{part}_proj.weight"] for part in parts]
        biases = [
            self.tensors.get(f"{prefix}.{part}_proj.bias", weight.new_zeros(len(weight)))
            for part, weight in zip(parts, weights, strict=True)
        ]
        return torch.cat(weights), torch.cat(biases)

    def block(self, name: str, own: str) -> dict[str, Tensor]:
        """One block of the encoder or the decoder under our names."""
        taken: dict[str, Tensor] = {}

        def take(mine: str, theirs: str) -> None:
            for kind in ("weight", "bias"):
                taken[f"{own}.{mine}.{kind}"] = self[f"{name}.{theirs}.{kind}"]

        def join(mine: str, theirs: str, parts: str) -> None:
            weight, bias = self.joined(f"{name}.{theirs}", parts)
            taken[f"{own}.{mine}.weight"], taken[f"{own}.{mine}.bias"] = weight, bias

        take("attention_norm", "self_attn_layer_norm")
        join("attention.qkv", "self_attn", "qkv")
        take("attention.out", "self_attn.out_proj")
        if f"{name}.encoder_attn.q_proj.weight" in self:
            take("cross_norm", "encoder_attn_layer_norm")
            join("cross.query", "encoder_attn", "q")
            join("cross.kv", "encoder_attn", "kv")
            take("cross.out", "encoder_attn.out_proj")
        take("mlp_norm", "final_layer_norm")
        take("mlp.up", "fc1")
        take("mlp.down", "fc2")
        return taken


def from_public(
    found: Public,
    stem: StemConfig,
    stacks: Mapping[str, int],
    *,
    decoder_layers: int,
    codebook: bool,
) -> dict[str, Tensor]:
    """Tensors of a public checkpoint under the names of `SpeechTokenizer`.

    `stacks`: its transformers in order, and how many of the encoder's layers each takes;
    `decoder_layers`: how many of the decoder's, 0 for no decoder; `codebook`: take it, where there
    is one.
    Raises UserError that names the tensor that is missing.
    """
    weight, bias = found["encoder.conv1.weight"], found["encoder.conv1.bias"]
    if not stem.public_features:
        scale, shift = _LOG_MEL_TO_PUBLIC
        weight, bias = weight * scale, bias + weight.sum((1, 2)) * shift
    own = {
        "stem.first.weight": weight,
        "stem.first.bias": bias,
        "stem.second.weight": found["encoder.conv2.weight"],
        "stem.second.bias": found["encoder.conv2.bias"],
        "stem.positions": found["encoder.embed_positions.weight"],
    }
    layer = 0
    for name, count in stacks.items():
        for index in range(count):
            own |= found.block(f"encoder.layers.{layer}", f"{name}.blocks.{index}")
            layer += 1
    if stacks.get("after"):
        own |= {f"after.norm.{kind}": found[f"encoder.layer_norm.{kind}"] for kind in _KINDS}
        if (places := "encoder.embed_positions2.weight") in found:
            own["after_positions"] = found[places]
    if codebook and "encoder.codebook.weight" in found:
        vectors = found["encoder.codebook.weight"]
        usage = found.tensors.get("encoder.ema_count", vectors.new_ones(len(vectors)))
        own |= {
            "quantizer.codebook": vectors,
            "quantizer.usage": usage,
            "quantizer.total": vectors * usage.unsqueeze(1),
            "quantizer.ready": torch.tensor(True),
        }
    if decoder_layers:
        own["decoder.embed.weight"] = found["decoder.embed_tokens.weight"]
        own["decoder.positions"] = found["decoder.embed_positions.weight"]
        for index in range(decoder_layers):
            own |= found.block(f"decoder.layers.{index}", f"decoder.transformer.blocks.{index}")
        own |= {
            f"decoder.transformer.norm.{kind}": found[f"decoder.layer_norm.{kind}"]
            for kind in _KINDS
        }
    return own


def _log_mel_to_public() -> tuple[float, float]:
    """How `LogMel`, u = (ln p − mean) / deviation, becomes Whisper's (log10 q + 4) / 4.

    p is the mean power in a band of a spectrum in which white noise has its own power, of which
    16 kHz leave 16 parts in 24. Whisper's window of 400 samples has the energy 150, and the weights
    of its filters sum to 1 / 40 Hz, the distance of its bins: q = 150 / 40 · 16 / 24 · p. Hop
    (10 ms), window (25 ms) and bands are the same.
    """
    scale = 1 / (4 * math.log(10))
    return LogMel.DEVIATION * scale, (LogMel.MEAN + math.log(150 / 40 * 16 / 24)) * scale + 1


_LOG_MEL_TO_PUBLIC = _log_mel_to_public()
