"""Mimi, the codec of Moshi (arXiv 2410.00037), and its two public checkpoint formats.

    24 kHz ─ SEANet encoder, 25 Hz ─ transformer ─ conv ÷2, 12.5 Hz ─┬─ VQ ══════════ code 0
                                                                     └─ residual VQ ═ codes 1…31
                                                                               │
    24 kHz ─ SEANet decoder, 25 Hz ─ transformer ─ transposed conv ×2, 12.5 Hz ┘ (sum of both)

Algorithmic delay: none beyond the frame of 1920 samples (80 ms). Every convolution pads on the left
alone and every transposed one keeps only what the frames so far complete, so a frame's codes need
no later sample and a frame's sound no later code.

The public formats are Kyutai's own file (`read_kyutai`) and the directory of the `transformers`
package (`read_hf`, `save_hf`). `_rows` is the one table that maps either to this module, both ways.

Shapes: B batch, S samples, T frames, K codebooks, C width of the latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.checkpoint import Checkpoint
from audio_codec.layers import TailState, with_past
from audio_codec.quantize import SplitResidualVQ
from audio_codec.seanet import (
    CausalConv,
    SEANetDecoder,
    SEANetEncoder,
    SEANetShape,
    SEANetState,
)
from audio_codec.state import State, all_active, keep
from audio_codec.transformer import Transformer, TransformerConfig, TransformerState

RESAMPLE = 2
"""Positions of the transformers, at 25 Hz, in a frame."""


class MimiConfig(BaseModel):
    """Shape of the codec; the defaults are the published one's, 79 M parameters.

    The names are those of the public `config.json`, so that one class reads it, shapes the model
    and writes it. Fields with one choice say what this implementation takes for granted; fields
    that say nothing about the shape are passed over.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["mimi"] = "mimi"
    architectures: tuple[str, ...] = ("MimiModel",)
    sampling_rate: PositiveInt = 24_000
    frame_rate: PositiveFloat | None = None
    """Frames a second; None, or what sampling rate and ratios come to."""
    audio_channels: Literal[1] = 1
    hidden_size: PositiveInt = 512
    """Width C of the latent and of the transformers."""
    num_filters: PositiveInt = 64
    num_residual_layers: int = Field(1, ge=0)
    upsampling_ratios: tuple[PositiveInt, ...] = Field((8, 6, 5, 4), min_length=1)
    kernel_size: PositiveInt = 7
    last_kernel_size: PositiveInt = 3
    residual_kernel_size: PositiveInt = 3
    dilation_growth_rate: PositiveInt = 2
    compress: PositiveInt = 2
    use_causal_conv: Literal[True] = True
    use_conv_shortcut: Literal[False] = False
    pad_mode: Literal["constant"] = "constant"
    trim_right_ratio: float = 1.0
    upsample_groups: PositiveInt = 512
    """Of the transposed convolution to 25 Hz; as many as `hidden_size`, one a channel."""
    num_hidden_layers: PositiveInt = 8
    num_attention_heads: PositiveInt = 8
    num_key_value_heads: PositiveInt = 8
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt = 2048
    hidden_act: Literal["gelu"] = "gelu"
    attention_bias: Literal[False] = False
    norm_eps: float = 1e-5
    sliding_window: PositiveInt = 250
    """Positions at 25 Hz that a query sees, itself among them (10 s)."""
    rope_theta: PositiveFloat = 10_000.0
    layer_scale_initial_scale: float = 0.01
    num_quantizers: PositiveInt = 32
    num_semantic_quantizers: Literal[1] = 1
    codebook_size: PositiveInt = 2048
    codebook_dim: PositiveInt = 256
    vector_quantization_hidden_dimension: PositiveInt = 256

    @model_validator(mode="before")
    @classmethod
    def _both_spellings(cls, fields: Any) -> Any:
        """Newer files put the base of the rotary positions into a table of its own."""
        if isinstance(fields, dict) and isinstance(table := fields.get("rope_parameters"), dict):
            if (kind := table.get("rope_type", "default")) != "default":
                raise ValueError(f"rope_parameters: rope_type={kind!r} must be 'default'")
            fields = {"rope_theta": table.get("rope_theta", 10_000.0), **fields}
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> MimiConfig:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must give an even size to each of "
                f"num_attention_heads={heads}"
            )
        if heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}"
            )
        if self.num_filters < self.compress:
            raise ValueError(
                f"num_filters={self.num_filters} must be at least compress={self.compress}"
            )
        for name, expected in {
            "head_dim": self.hidden_size // heads,
            "frame_rate": self.sampling_rate / self.frame_size,
            "trim_right_ratio": 1.0,
            "norm_eps": 1e-5,
            "upsample_groups": self.hidden_size,
            "vector_quantization_hidden_dimension": self.codebook_dim,
        }.items():
            if (found := getattr(self, name)) is not None and found != expected:
                raise ValueError(f"{name}={found} must be {expected}")
        if self.codebook_dim == self.hidden_size:
            # The public model then has no projections around its codebooks.
            raise ValueError(f"codebook_dim={self.codebook_dim} must differ from hidden_size")
        return self

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return RESAMPLE * math.prod(self.upsampling_ratios)

    @property
    def seanet(self) -> SEANetShape:
        """The convolutional halves."""
        return SEANetShape(
            dim=self.hidden_size,
            filters=self.num_filters,
            ratios=self.upsampling_ratios,
            kernel=self.kernel_size,
            last_kernel=self.last_kernel_size,
            residual_kernel=self.residual_kernel_size,
            residual_layers=self.num_residual_layers,
            dilation_growth=self.dilation_growth_rate,
            compress=self.compress,
        )

    @property
    def transformer(self) -> TransformerConfig:
        """Each of the two transformers."""
        return TransformerConfig(
            dim=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            hidden=self.intermediate_size,
            norm="layer",
            gated=False,
            window=self.sliding_window,
            rope_theta=self.rope_theta,
            layer_scale=self.layer_scale_initial_scale,
            final_norm=False,
        )


@dataclass(slots=True)
class DownsampleState(TailState):
    """The last inputs, and whether there were any."""

    begun: Tensor  # [B] bool


class Downsample(CausalConv):
    """25 → 12.5 Hz. Before a stream's beginning lies its first input, not silence."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 2 * RESAMPLE, stride=RESAMPLE, bias=False)

    def forward(self, x: Tensor, state: TailState | None = None) -> Tensor:
        """[B, 2 T, C] → [B, T, C]."""
        before = x[:, :1].repeat(1, self.past, self.stride)
        if state is None:
            state = TailState(all_active(len(x), x.device), before)
        else:
            assert isinstance(state, DownsampleState)
            state.tail.copy_(keep(state.active & ~state.begun, before, state.tail))
            state.begun.logical_or_(state.active)
        return super().forward(x, state)

    def new_state(self, batch: int) -> DownsampleState:
        """State of a stream that has not begun."""
        plain = super().new_state(batch)
        return DownsampleState(plain.active, plain.tail, torch.zeros_like(plain.active))


class Upsample(nn.Module):
    """12.5 → 25 Hz by a transposed convolution of each channel alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, RESAMPLE, dim) * 0.5)
        """[frame before or this one, position in the frame, C]."""

    def forward(self, x: Tensor, state: TailState | None = None) -> Tensor:
        """[B, T, C] → [B, 2 T, C]."""
        now = x.unsqueeze(2)
        before = with_past(x, 1, state)[:, :-1].unsqueeze(2)
        return torch.addcmul(before * self.weight[0], now, self.weight[1]).flatten(1, 2)

    def new_state(self, batch: int) -> TailState:
        """State of a stream that begins in silence."""
        tail = self.weight.new_zeros(batch, 1, self.weight.shape[2])
        return TailState(all_active(batch, tail.device), tail)


@dataclass(slots=True)
class MimiEncoderState(State):
    """What the encoder has heard."""

    seanet: SEANetState
    transformer: TransformerState
    down: DownsampleState


@dataclass(slots=True)
class MimiDecoderState(State):
    """What the decoder has said."""

    up: TailState
    transformer: TransformerState
    seanet: SEANetState


class MimiCodec(nn.Module):
    """Mimi as a `Codec`. Stride: one frame; see the module docstring."""

    delay = 0

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate = config.sampling_rate
        self.frame_size = config.frame_size
        self.encoder = SEANetEncoder(config.seanet)
        self.encoder_transformer = Transformer(config.transformer)
        self.down = Downsample(config.hidden_size)
        self.quantizer = SplitResidualVQ(
            config.hidden_size, config.codebook_dim, (config.codebook_size,) * config.num_quantizers
        )
        self.up = Upsample(config.hidden_size)
        self.decoder_transformer = Transformer(config.transformer)
        self.decoder = SEANetDecoder(config.seanet)

    @property
    def codebooks(self) -> tuple[tuple[int, ...], ...]:
        """Factor sizes of each of the K codebooks."""
        return ((self.config.codebook_size,),) * self.config.num_quantizers

    def encode_latent(self, pcm: Tensor, state: MimiEncoderState | None = None) -> Tensor:
        """Waveform [B, 1, S] → what is quantized, [B, T, C]."""
        x = self.encoder(pcm.transpose(1, 2), None if state is None else state.seanet)
        x = self.encoder_transformer(x, None if state is None else state.transformer)
        return self.down(x, None if state is None else state.down)

    def decode_latent(self, latent: Tensor, state: MimiDecoderState | None = None) -> Tensor:
        """What codes say, [B, T, C] → waveform [B, 1, S]."""
        x = self.up(latent, None if state is None else state.up)
        x = self.decoder_transformer(x, None if state is None else state.transformer)
        return self.decoder(x, None if state is None else state.seanet).transpose(1, 2)

    def encode(self, pcm: Tensor, state: MimiEncoderState | None = None) -> Tensor:
        """Waveform [B, 1, S], S in whole frames → codes int64 [B, K, T]."""
        assert pcm.shape[-1] % self.frame_size == 0, f"{pcm.shape[-1]} samples: not whole frames"
        return self.quantizer.encode(self.encode_latent(pcm, state))

    def decode(self, codes: Tensor, state: MimiDecoderState | None = None) -> Tensor:
        """Codes [B, K' ≤ K, T] → waveform [B, 1, S]; fewer codebooks give a coarser sound."""
        return self.decode_latent(self.quantizer.decode(codes), state)

    def embed_semantic(self, codes: Tensor) -> Tensor:
        """Codes of codebook 0 [B, T] → what they stand for [B, T, C]."""
        return self.quantizer.semantic.decode(codes.unsqueeze(1))

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> MimiEncoderState:
        """Encoder state for chunks of up to `max_chunk` frames."""
        seanet = self.encoder.new_state(batch)
        return MimiEncoderState(
            seanet.active,
            seanet,
            self.encoder_transformer.new_state(batch, RESAMPLE * max_chunk),
            self.down.new_state(batch),
        )

    def new_decoder_state(self, batch: int, max_chunk: int = 1) -> MimiDecoderState:
        """Decoder state likewise."""
        up = self.up.new_state(batch)
        return MimiDecoderState(
            up.active,
            up,
            self.decoder_transformer.new_state(batch, RESAMPLE * max_chunk),
            self.decoder.new_state(batch),
        )

    def keep_codebooks(self, count: int) -> None:
        """Forget all but the first `count` codebooks, 1 … K."""
        self.quantizer.keep(count)
        self.config = self.config.model_copy(update={"num_quantizers": count})


# --- The public formats ---------------------------------------------------------------------------


class _Layout(Protocol):
    """How a public tensor lies in this module."""

    def own(self, public: Tensor) -> Tensor:
        """The public tensor as this module keeps it."""

    def public(self, own: Tensor) -> Tensor:
        """And back."""


class _Same:
    def own(self, public: Tensor) -> Tensor:
        return public

    def public(self, own: Tensor) -> Tensor:
        return own


class _Pointwise:
    """A convolution of kernel 1, which is a linear layer: [D, C, 1] ↔ [D, C]."""

    def own(self, public: Tensor) -> Tensor:
        return public.squeeze(2)

    def public(self, own: Tensor) -> Tensor:
        return own.unsqueeze(2)


class _Flag:
    """A truth that is stored as a number: [1] ↔ []."""

    def own(self, public: Tensor) -> Tensor:
        return public[0] != 0

    def public(self, own: Tensor) -> Tensor:
        return own.float().view(1)


@dataclass(frozen=True)
class _Conv:
    """[D, C, K] ↔ [K / stride, stride · C, D], see `seanet`."""

    stride: int = 1

    def own(self, public: Tensor) -> Tensor:
        return public.unflatten(2, (-1, self.stride)).permute(2, 3, 1, 0).flatten(1, 2)

    def public(self, own: Tensor) -> Tensor:
        return own.unflatten(1, (self.stride, -1)).permute(3, 2, 0, 1).flatten(2)


@dataclass(frozen=True)
class _Transposed:
    """[C, D, K] ↔ [K / stride, C, stride · D]; the tap of the newest input is our last."""

    stride: int

    def own(self, public: Tensor) -> Tensor:
        blocks = public.unflatten(2, (-1, self.stride)).flip(2)
        return blocks.permute(2, 0, 3, 1).flatten(2)

    def public(self, own: Tensor) -> Tensor:
        blocks = own.unflatten(2, (self.stride, -1)).permute(1, 3, 0, 2)
        return blocks.flip(2).flatten(2)


class _Depthwise:
    """[C, 1, K] ↔ [K / stride, stride, C], oldest input first."""

    def own(self, public: Tensor) -> Tensor:
        return public[:, 0].unflatten(1, (-1, RESAMPLE)).flip(1).permute(1, 2, 0)

    def public(self, own: Tensor) -> Tensor:
        return own.permute(2, 0, 1).flip(1).flatten(1).unsqueeze(1)


Format = Literal["kyutai", "hf"]


@dataclass(frozen=True)
class _Row:
    """One tensor: its name here, in either public format, and how it lies there."""

    own: str
    kyutai: str
    hf: str
    layout: _Layout = _Same()


def _rows(config: MimiConfig) -> Iterator[_Row]:
    """The table of both formats.

    Codebooks are not in it, as the public formats keep only their running sums; nor are the three
    projections that `transformers` makes of the one for attention (`_split`, `_join`).
    """
    yield from _encoder_rows(config)
    yield from _transformer_rows(config, "encoder_transformer")
    yield _Row(
        "down.weight", "downsample.conv.conv.conv.weight", "downsample.conv.weight", _Conv(RESAMPLE)
    )
    yield from _quantizer_rows(config)
    yield _Row(
        "up.weight", "upsample.convtr.convtr.convtr.weight", "upsample.conv.weight", _Depthwise()
    )
    yield from _transformer_rows(config, "decoder_transformer")
    yield from _decoder_rows(config)


def _conv_rows(own: str, public: str, layout: _Layout, kind: str = "conv") -> Iterator[_Row]:
    kyutai = public.replace(".layers.", ".model.", 1) + f".{kind}.{kind}"
    yield _Row(f"{own}.weight", f"{kyutai}.weight", f"{public}.conv.weight", layout)
    yield _Row(f"{own}.bias", f"{kyutai}.bias", f"{public}.conv.bias")


def _block_rows(own: str, public: str) -> Iterator[_Row]:
    yield from _conv_rows(f"{own}.conv", f"{public}.block.1", _Conv())
    yield from _conv_rows(f"{own}.out", f"{public}.block.3", _Pointwise())


def _encoder_rows(config: MimiConfig) -> Iterator[_Row]:
    # The public encoder is one row of numbered layers; an activation takes a number too.
    yield from _conv_rows("encoder.first", "encoder.layers.0", _Conv())
    number = 1
    for stage, ratio in enumerate(reversed(config.upsampling_ratios)):
        for block in range(config.num_residual_layers):
            yield from _block_rows(
                f"encoder.stages.{stage}.blocks.{block}", f"encoder.layers.{number}"
            )
            number += 1
        own = f"encoder.stages.{stage}.resample"
        yield from _conv_rows(own, f"encoder.layers.{number + 1}", _Conv(ratio))
        number += 2
    yield from _conv_rows("encoder.last", f"encoder.layers.{number + 1}", _Conv())


def _decoder_rows(config: MimiConfig) -> Iterator[_Row]:
    yield from _conv_rows("decoder.first", "decoder.layers.0", _Conv())
    number = 1
    for stage, ratio in enumerate(config.upsampling_ratios):
        own = f"decoder.stages.{stage}.resample"
        yield from _conv_rows(own, f"decoder.layers.{number + 1}", _Transposed(ratio), "convtr")
        number += 2
        for block in range(config.num_residual_layers):
            yield from _block_rows(
                f"decoder.stages.{stage}.blocks.{block}", f"decoder.layers.{number}"
            )
            number += 1
    yield from _conv_rows("decoder.last", f"decoder.layers.{number + 1}", _Conv())


def _transformer_rows(config: MimiConfig, name: str) -> Iterator[_Row]:
    for layer in range(config.num_hidden_layers):
        for own, kyutai, hf in (
            ("attention_norm.weight", "norm1.weight", "input_layernorm.weight"),
            ("attention_norm.bias", "norm1.bias", "input_layernorm.bias"),
            ("attention.qkv.weight", "self_attn.in_proj_weight", "self_attn.qkv_proj.weight"),
            ("attention.out.weight", "self_attn.out_proj.weight", "self_attn.o_proj.weight"),
            ("scales.0", "layer_scale_1.scale", "self_attn_layer_scale.scale"),
            ("mlp_norm.weight", "norm2.weight", "post_attention_layernorm.weight"),
            ("mlp_norm.bias", "norm2.bias", "post_attention_layernorm.bias"),
            ("mlp.up.weight", "linear1.weight", "mlp.fc1.weight"),
            ("mlp.down.weight", "linear2.weight", "mlp.fc2.weight"),
            ("scales.1", "layer_scale_2.scale", "mlp_layer_scale.scale"),
        ):
            yield _Row(
                f"{name}.blocks.{layer}.{own}",
                f"{name}.transformer.layers.{layer}.{kyutai}",
                f"{name}.layers.{layer}.{hf}",
            )


def _quantizer_rows(config: MimiConfig) -> Iterator[_Row]:
    sides = (("semantic", "first", 1), ("acoustic", "rest", config.num_quantizers - 1))
    for side, kyutai_side, levels in sides:
        own = f"quantizer.{side}"
        kyutai = f"quantizer.rvq_{kyutai_side}"
        hf = f"quantizer.{side}_residual_vector_quantizer"
        for mine, theirs in (("down", "input_proj"), ("up", "output_proj")):
            yield _Row(
                f"{own}.{mine}.weight",
                f"{kyutai}.{theirs}.weight",
                f"{hf}.{theirs}.weight",
                _Pointwise(),
            )
        for level in range(levels):
            for mine, kyutais, hfs, layout in (
                ("ready", "_initialized", "initialized", _Flag()),
                ("usage", "cluster_usage", "cluster_usage", _Same()),
                ("total", "embedding_sum", "embed_sum", _Same()),
            ):
                yield _Row(
                    f"{own}.quantizer.levels.{level}.{mine}",
                    f"{kyutai}.vq.layers.{level}._codebook.{kyutais}",
                    f"{hf}.layers.{level}.codebook.{hfs}",
                    layout,
                )


_QKV, _SPLIT = ".qkv_proj.", (".q_proj.", ".k_proj.", ".v_proj.")


def _split(config: MimiConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The three projections of `transformers`, which rotates the halves of a head, not pairs."""
    size = config.hidden_size // config.num_attention_heads
    groups = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    for name, tensor in tensors.items():
        if _QKV not in name:
            yield name, tensor
            continue
        q, k, v = tensor.split([heads * size for heads in groups])
        q, k = (x.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2) for x in (q, k))
        for part, projection in zip(_SPLIT, (q, k, v), strict=True):
            yield name.replace(_QKV, part), projection


def _join(config: MimiConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`_split` undone."""
    size = config.hidden_size // config.num_attention_heads
    for name, tensor in tensors.items():
        if _SPLIT[0] in name:
            q, k, v = (tensors[name.replace(_SPLIT[0], part)] for part in _SPLIT)
            q, k = (
                x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2) for x in (q, k)
            )
            yield name.replace(_SPLIT[0], _QKV), torch.cat((q, k, v))
        elif not any(part in name for part in _SPLIT):
            yield name, tensor


def to_public(codec: MimiCodec, form: Format) -> dict[str, Tensor]:
    """The codec's tensors under the names and in the layouts of a public format."""
    own = codec.state_dict()
    public = {
        getattr(row, form): row.layout.public(own[row.own]).contiguous()
        for row in _rows(codec.config)
    }
    return dict(_split(codec.config, public)) if form == "hf" else public


def _from_public(
    config: MimiConfig, tensors: Mapping[str, Tensor], form: Format
) -> dict[str, Tensor]:
    """A state dict from tensors that are known to be all there and of the right shapes."""
    public = dict(_join(config, tensors)) if form == "hf" else tensors
    own = {
        row.own: row.layout.own(public[getattr(row, form)]).contiguous() for row in _rows(config)
    }
    for name in [name for name in own if name.endswith(".total")]:
        usage = own[name.replace(".total", ".usage")].clamp(min=1e-5).unsqueeze(1)
        own[name.replace(".total", ".codebook")] = own[name] / usage
    return own


def _read(config: MimiConfig, found: Checkpoint, form: Format) -> MimiCodec:
    with torch.device("meta"):  # shapes alone: every number comes from the file
        codec = MimiCodec(config)
    checkpoints.check(to_public(codec, form), found)
    codec.load_state_dict(_from_public(config, found.tensors, form), assign=True)
    return codec.eval().requires_grad_(False)


def read_hf(directory: Path) -> MimiCodec:
    """A codec in inference mode from the layout of `transformers.MimiModel`.

    `config.json` beside `model.safetensors`, or beside `model-00001-of-….safetensors` and so on.
    Raises UserError that names the field, or the tensor and what was expected.
    """
    found = checkpoints.load(directory, weights="model*.safetensors")
    return _read(checkpoints.parse_config(MimiConfig, found), found, "hf")


def save_hf(directory: str | Path, codec: MimiCodec) -> Path:
    """Write what `transformers.MimiModel.from_pretrained` and `read_hf` read, in float32.

    A codec of one codebook is for `read_hf` alone, as the config of `transformers` asks for two.
    Raises UserError when the directory holds something else than a checkpoint.
    """
    config = codec.config
    told = {
        "frame_rate": config.sampling_rate / config.frame_size,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    tensors = to_public(codec, "hf")
    return checkpoints.save(directory, config.model_copy(update=told), tensors, dtype="fp32")


def read_kyutai(file: Path, config: MimiConfig | None = None) -> MimiCodec:
    """A codec in inference mode from a file in Kyutai's own naming.

    Such a file says nothing of its shape: None means the published one.
    Raises UserError that names the tensor and what was expected.
    """
    # Their newer programs keep attention's projections in lists of one.
    tensors = {
        name.replace(".in_projs.0.weight", ".in_proj_weight").replace(
            ".out_projs.0.", ".out_proj."
        ): t
        for name, t in checkpoints.read_weights(file).items()
    }
    return _read(config or MimiConfig(), Checkpoint(file, {}, tensors), "kyutai")
