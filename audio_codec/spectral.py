"""Our own fast codec: spectrum in, causal ConvNeXt, spectrum out (after Vocos, arXiv 2306.00814).

Codebook 0 is the code of the semantic tokenizer; what it does not say about the sound (voice,
pitch, loudness, background) is coded by residual vector quantizers.

    24 kHz ─┬─ SpeechTokenizer ════════════ code 0 ─ embed ───┬──────────┐
            │                                                 −          +
            └─ STFT, 100 Hz ─ ConvNeXt ─ ×8 → 12.5 Hz ─ latent ─ residual VQ ═ codes 1…7
                                                                         │
                    24 kHz ─ overlap-add ─ inverse STFT, 100 Hz ─ ConvNeXt ─ ×8 ─ ConvNeXt

Or codebook 0 is a quantizer of the codec's own, which a teacher of speech has taught what matters
(Mimi, arXiv 2410.00037, sec. 3.3.3). It then stands beside the residual quantizers, not before
them, so that what it must not forget for the teacher's sake does not burden the sound:

    … ConvNeXt ─ ×8 → 12.5 Hz ─┬─ semantic VQ ═ code 0 ─ embed ─┐
                               └─ latent ─ residual VQ ═ 1…7 ── + ─ decoder

Algorithmic delay: none beyond the frame of 1920 samples (80 ms). An analysis window *ends* with its
hop; a synthesis window *begins* with its hop, so that all windows over a sample of a frame exist
once the frame's code is there, and what hangs over is kept and added to the next frame:

    frame t         |0 ──── 1920 samples ──── |                  hop 240, window 960
    windows of t    [──────]                  |
                        [──────]      …       |
                                         [────|──]  ← overhang, completed by the windows of t+1

Shapes: B batch, S samples, T frames, N hops (8 T), K codebooks, D latent width, E encoder width at
12.5 Hz, Q numbers of a semantic vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.fft
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE
from audio_codec.layers import (
    ConvNeXtStack,
    LayerNorm,
    Linear,
    Packing,
    StackState,
    TailState,
    array,
    few_rows,
    windows,
    with_past,
)
from audio_codec.quantize import EMAVQ, ResidualVQ
from audio_codec.speech_tokenizer import EncoderState as TokenizerState
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig, projections
from audio_codec.state import State, all_active

HOP = 240
HOPS = FRAME_SIZE // HOP


class SemanticConfig(BaseModel):
    """A semantic codebook of the codec's own, taught by `losses.Distillation`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: PositiveInt = 2048
    """Codes."""
    dim: PositiveInt = 256
    """Width Q of what is quantized."""


class SpectralConfig(BaseModel):
    """Shape of the codec; the defaults are the shipped one's, about 13 M parameters + tokenizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["spectral"] = "spectral"
    tokenizer: TokenizerConfig = TokenizerConfig()
    semantic: SemanticConfig | None = None
    """Codebook 0 by distillation; None: it is the tokenizer's. With it there is no tokenizer."""
    window: int = Field(960, ge=2 * HOP, multiple_of=HOP)
    """Samples of an STFT window, a multiple of the hop of 240."""
    encoder_dim: PositiveInt = 160
    """Encoder width at 100 Hz."""
    encoder_blocks: int = Field(3, ge=0)
    encoder_latent_dim: PositiveInt = 384
    """Encoder width at 12.5 Hz."""
    encoder_latent_blocks: int = Field(2, ge=0)
    latent: PositiveInt = 64
    """Width D of what is quantized."""
    codebooks: tuple[PositiveInt, ...] = Field((1024,) * 7, min_length=1)
    """Sizes of the residual codebooks after the semantic one."""
    decoder_latent_dim: PositiveInt = 512
    decoder_latent_blocks: int = Field(3, ge=0)
    decoder_dim: PositiveInt = 352
    decoder_blocks: int = Field(6, ge=0)

    @model_validator(mode="after")
    def _one_code_a_frame(self) -> SpectralConfig:
        heard = self.tokenizer
        causal = heard.causal and (heard.whisper is None or heard.whisper.causal)
        now = (heard.rate, heard.frame_size, heard.lookahead_ms, causal)
        if now != (12.5, FRAME_SIZE, 0, True):
            raise ValueError(
                "tokenizer must give a code a frame at once: rate=12.5, causal=true, "
                "lookahead_ms=0, no block_ms above 80, and hear 24 kHz"
            )
        if heard.bottleneck == "none":
            raise ValueError("tokenizer.bottleneck=none has no codes: choose fsq or vq")
        return self


@dataclass(slots=True)
class SpectralEncoderState(State):
    """What the encoder has heard."""

    tokenizer: TokenizerState | None  # None where codebook 0 is the codec's own
    samples: TailState  # the past of an analysis window
    front: StackState
    latent: StackState


@dataclass(slots=True)
class SpectralDecoderState(State):
    """What the decoder has said."""

    latent: StackState
    back: StackState
    overhang: TailState  # the last synthesis windows, [B, window/hop − 1, window]


class Analysis(nn.Module):
    """Causal STFT with compressed magnitudes: [B, S] → [B, N, 2 · (window/2 + 1)]."""

    shape: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        assert window % HOP == 0, f"window={window} must be a multiple of {HOP}"
        self.window = window
        self.features = 2 * (window // 2 + 1)
        self.register_buffer("shape", torch.hann_window(window), persistent=False)

    def forward(self, pcm: Tensor, state: TailState | None = None) -> Tensor:
        """Real and imaginary parts, magnitudes to the power 0.3 (evens out the dynamics)."""
        with torch.autocast(pcm.device.type, enabled=False):
            state = self.new_state(len(pcm)) if state is None else state
            frames = windows(pcm.float(), self.shape, HOP, state.tail, state.active)
            if few_rows(frames):
                return self._few(frames)
            spectrum = torch.fft.rfft(frames) * (2 / self.window)
            scale = (spectrum.abs() + 1e-6) ** -0.7
            return torch.cat((spectrum.real * scale, spectrum.imag * scale), dim=-1)

    def _few(self, frames: Tensor) -> Tensor:
        """Of some windows [B, N, W] without torch, whose other threads a live frame must not wake.

        They would wait for each other, and spin for more to do, longer than all of this takes.
        """
        from audio_codec import kernels

        y = frames.new_empty(*frames.shape[:2], self.features)
        spectrum = scipy.fft.rfft(frames.numpy()).reshape(-1, self.features // 2)
        kernels.compress(spectrum, 2 / self.window, y.numpy().reshape(-1, self.features))
        return y

    def new_state(self, batch: int) -> TailState:
        """State of a stream that begins in silence."""
        tail = self.shape.new_zeros(batch, self.window - HOP)
        return TailState(all_active(batch, tail.device), tail)


_LOUDEST = 6.0
"""Log-magnitude that keeps an untrained or derailed head from overflowing."""


class Synthesis(nn.Module):
    """Inverse STFT by overlap-add; a window begins with its hop: [B, N, window + 2] → [B, S]."""

    shape: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.overlap = window // HOP
        # Hann windows a quarter apart add up to 2, so half of one keeps the level.
        self.register_buffer(
            "shape", torch.hann_window(window) / (self.overlap / 2), persistent=False
        )

    def forward(self, head: Tensor, state: TailState | None = None) -> Tensor:
        """Log-magnitudes and phases of each hop's window → samples."""
        with torch.autocast(head.device.type, enabled=False):
            if state is not None and few_rows(head):
                return self._live(head, state)
            magnitude, phase = head.float().chunk(2, dim=-1)
            magnitude = magnitude.clamp(max=_LOUDEST).exp()
            spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
            frames = torch.fft.irfft(spectrum, self.window)
            padded = with_past(frames * self.shape, self.overlap - 1, state)
            hops = frames.shape[1]
            # Piece r of a window falls on the hop r places later.
            pieces = padded.unflatten(-1, (self.overlap, HOP))
            last = self.overlap - 1
            late = [pieces[:, last - r : last - r + hops, r] for r in range(self.overlap)]
            return sum(late[1:], late[0]).flatten(1)

    def _live(self, head: Tensor, state: TailState) -> Tensor:
        from audio_codec import kernels

        batch, hops, width = head.shape
        past = (batch, self.overlap - 1, self.window)
        assert width == self.window + 2 and state.tail.shape == past, (head.shape, past)
        spectrum = np.empty((batch, hops, width // 2), np.complex64)
        kernels.polar(array(head).reshape(-1, width), _LOUDEST, spectrum.reshape(-1, width // 2))
        frames = scipy.fft.irfft(spectrum, self.window, overwrite_x=True)
        y = head.new_empty(batch, hops * HOP)
        tail, active = state.tail.numpy(), state.active.numpy()
        kernels.overlap_add(frames, tail, active, self.shape.numpy(), y.numpy())
        return y

    def new_state(self, batch: int) -> TailState:
        """State of a stream that begins in silence."""
        tail = self.shape.new_zeros(batch, self.overlap - 1, self.window)
        return TailState(all_active(batch, tail.device), tail)


def spectrum_head(dim: int, window: int) -> nn.Sequential:
    """What makes of a hop [..., dim] the log-magnitudes and phases that `Synthesis` takes."""
    spectrum = Linear(dim, window + 2)
    # Start near silence: the log-magnitudes of speech lie well below 0.
    bins = window // 2 + 1
    nn.init.normal_(spectrum.weight, std=0.02)
    nn.init.constant_(spectrum.bias[:bins], -1.0)
    nn.init.uniform_(spectrum.bias[bins:], -torch.pi, torch.pi)
    return nn.Sequential(LayerNorm(dim), spectrum)


@dataclass
class SpectralOutput:
    """One training forward."""

    pcm: Tensor  # [B, 1, S]
    codes: Tensor  # [B, K, T]
    commitment: Tensor  # []
    semantic: Tensor | None  # [B, T, Q] vectors of a codebook 0 of the codec's own


class SemanticVQ(nn.Module):
    """Codebook 0 of the codec's own: [B, T, E] → one of `size` vectors of width Q."""

    def __init__(self, width: int, config: SemanticConfig) -> None:
        super().__init__()
        self.project = nn.Sequential(LayerNorm(width), Linear(width, config.dim))
        self.vq = EMAVQ(config.dim, config.size)

    def encode(self, hidden: Tensor) -> Tensor:
        """[B, T, E] → int64 [B, T]."""
        return self.vq.nearest(self.project(hidden).float())

    def decode(self, codes: Tensor) -> Tensor:
        """int [B, T] → [B, T, Q]."""
        return self.vq.decode(codes)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, E] → (vectors [B, T, Q] straight-through, codes [B, T], commitment loss)."""
        x = self.project(hidden).float()
        vectors, codes, commitment = self.vq(x)
        return x + (vectors - x).detach(), codes, commitment


_LISTED = 2**16
"""Codes up to which a table is made of what they add to the latent."""

_DECODER = ("from_latent", "decoder_latent", "up", "back", "head", "synthesis")


class SpectralCodec(Packing):
    """The `Codec` of this project. Stride: one frame of 1920 samples; see the module docstring."""

    sample_rate = SAMPLE_RATE
    frame_size = FRAME_SIZE
    delay = 0

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen_levels: int | None = None
        self.tokenizer = SpeechTokenizer(config.tokenizer) if config.semantic is None else None
        self.analysis = Analysis(config.window)
        self.front_in = Linear(self.analysis.features, config.encoder_dim)
        self.front = ConvNeXtStack(config.encoder_dim, config.encoder_blocks)
        self.down = Linear(HOPS * config.encoder_dim, config.encoder_latent_dim)
        self.latent = ConvNeXtStack(
            config.encoder_latent_dim, config.encoder_latent_blocks, kernel=5
        )
        self.to_latent = nn.Sequential(
            LayerNorm(config.encoder_latent_dim),
            Linear(config.encoder_latent_dim, config.latent),
        )
        if config.semantic is not None:
            self.semantic_vq = SemanticVQ(config.encoder_latent_dim, config.semantic)
            numbers = config.semantic.dim
        else:
            numbers = config.tokenizer.numbers
        self.semantic = nn.Sequential(Linear(numbers, 256), nn.GELU(), Linear(256, config.latent))
        self.quantizer = ResidualVQ(config.latent, config.codebooks)
        self.from_latent = Linear(config.latent, config.decoder_latent_dim)
        self.decoder_latent = ConvNeXtStack(
            config.decoder_latent_dim, config.decoder_latent_blocks, kernel=5
        )
        self.up = Linear(config.decoder_latent_dim, HOPS * config.decoder_dim)
        self.back = ConvNeXtStack(config.decoder_dim, config.decoder_blocks)
        self.head = spectrum_head(config.decoder_dim, config.window)
        self.synthesis = Synthesis(config.window)

    @property
    def codebooks(self) -> tuple[tuple[int, ...], ...]:
        """Factor sizes of each of the K codebooks."""
        semantic = self.config.semantic
        first = self.config.tokenizer.codebook if semantic is None else (semantic.size,)
        return (first, *((size,) for size in self.config.codebooks))

    def keep_codebooks(self, count: int) -> None:
        """Forget all but the first `count` codebooks, 1 … K."""
        self.quantizer.keep(count - 1)
        kept = self.config.codebooks[: count - 1]
        self.config = self.config.model_copy(update={"codebooks": kept})

    def train(self, mode: bool = True) -> SpectralCodec:
        """As of any module, but what is frozen keeps its running statistics too."""
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        if self.frozen_levels is not None:
            for name, part in self.named_children():
                part.train(mode and name in _DECODER)
            for level in list(self.quantizer.levels)[self.frozen_levels :]:
                level.train(mode)
        return self

    def freeze_codes(self, levels: int | None = None) -> None:
        """From here on training moves the decoder alone: whoever learned the codes keeps them.

        Residual codebooks beyond the first `levels` learn too; None freezes all.
        """
        self.frozen_levels = len(self.config.codebooks) if levels is None else levels
        for name, part in self.named_children():
            part.requires_grad_(name in _DECODER)
        self.train(self.training)

    def fingerprint(self) -> tuple[float, ...]:
        """Numbers that tell the weights that its acoustic codes depend on from others.

        Those of the tokenizer aside, and the codebooks, of which more may follow.
        """
        aside = tuple(f"{name}." for name in (*_DECODER, "tokenizer", "quantizer"))
        weights = sorted(self.state_dict().items())
        return projections(tensor for name, tensor in weights if not name.startswith(aside))

    def _encode_hidden(self, pcm: Tensor, state: SpectralEncoderState | None) -> Tensor:
        x = self.front_in(self.analysis(pcm[:, 0], None if state is None else state.samples))
        x = self.front(x, None if state is None else state.front)
        x = self.down(x.reshape(x.shape[0], x.shape[1] // HOPS, -1))
        return self.latent(x, None if state is None else state.latent)

    def _decode_latent(self, latent: Tensor, state: SpectralDecoderState | None) -> Tensor:
        x = self.from_latent(latent)
        x = self.decoder_latent(x, None if state is None else state.latent)
        x = self.up(x).reshape(x.shape[0], x.shape[1] * HOPS, -1)
        x = self.head(self.back(x, None if state is None else state.back))
        return self.synthesis(x, None if state is None else state.overhang).unsqueeze(1)

    def encode(self, pcm: Tensor, state: SpectralEncoderState | None = None) -> Tensor:
        """Waveform [B, 1, S], S a multiple of 1920 → codes int64 [B, K, T]."""
        hidden = self._encode_hidden(pcm, state)
        latent = self.to_latent(hidden).float()
        if self.tokenizer is None:
            semantic, rest = self.semantic_vq.encode(hidden), latent
        else:
            semantic = self.tokenizer.encode(pcm, None if state is None else state.tokenizer)
            rest = latent - self._embed(semantic).float()
        return torch.cat((semantic.unsqueeze(1), self.quantizer.encode(rest)), dim=1)

    def _embed(self, semantic: Tensor) -> Tensor:
        """Codes of codebook 0 [B, T] → their part of the latent [B, T, D]."""
        if self.unchanged() and not torch.is_grad_enabled():
            assert self.packed is not None
            return nn.functional.embedding(semantic, self.packed[0])
        return self.semantic(self.embed_semantic(semantic))

    def _held(self) -> list[Tensor]:
        coder = self.semantic_vq.vq if self.tokenizer is None else self.tokenizer.coder()
        return [*self.semantic.parameters(), *coder.buffers()]

    @torch.inference_mode()
    def weights(self) -> tuple[Any, ...] | None:
        """What each code of codebook 0 adds to the latent, [L, D]; None of too many."""
        count = math.prod(self.codebooks[0])
        if count > _LISTED:
            return None
        codes = torch.arange(count, device=self.up.weight.device)
        return (self.semantic(self.embed_semantic(codes)).float(),)

    def embed_semantic(self, codes: Tensor) -> Tensor:
        """Codes of codebook 0 [B, T] → the numbers that they stand for [B, T, Q]."""
        if self.tokenizer is None:
            return self.semantic_vq.decode(codes)
        return self.tokenizer.embed(codes)

    def decode(self, codes: Tensor, state: SpectralDecoderState | None = None) -> Tensor:
        """Codes [B, K' ≤ K, T] → waveform [B, 1, S]; fewer codebooks give a coarser sound."""
        latent = self._embed(codes[:, 0])
        if codes.shape[1] > 1:
            latent = latent + self.quantizer.decode(codes[:, 1:])
        return self._decode_latent(latent, state)

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> SpectralEncoderState:
        """Encoder state for chunks of up to `max_chunk` frames."""
        return SpectralEncoderState(
            all_active(batch, self.up.weight.device),
            None if self.tokenizer is None else self.tokenizer.new_state(batch, max_chunk),
            self.analysis.new_state(batch),
            self.front.new_state(batch),
            self.latent.new_state(batch),
        )

    def new_decoder_state(self, batch: int, max_chunk: int = 1) -> SpectralDecoderState:
        """Decoder state; its layers are convolutions, so any chunk length will do."""
        return SpectralDecoderState(
            all_active(batch, self.up.weight.device),
            self.decoder_latent.new_state(batch),
            self.back.new_state(batch),
            self.synthesis.new_state(batch),
        )

    def forward(
        self, pcm: Tensor, depth: Tensor | None = None, bypass: Tensor | None = None
    ) -> SpectralOutput:
        """One training pass over [B, 1, S]; the tokenizer is frozen.

        `depth` [B] int: residual codebooks that each row keeps (quantizer dropout), 0 for none;
        `bypass` [B] bool: rows that go around the residual quantizers, whatever their depth.
        """
        hidden = self._encode_hidden(pcm, None)
        latent = self.to_latent(hidden).float()
        if self.tokenizer is None:
            said, semantic, commitment = self.semantic_vq(hidden)
            base = self.semantic(said).float()
            rest = latent
        else:
            with torch.no_grad():
                semantic = self.tokenizer.encode(pcm)
                numbers = self.tokenizer.embed(semantic)
            said, commitment = None, latent.new_zeros(())
            base = self.semantic(numbers).float()
            rest = latent - base
        quantized, codes, residual_commitment = self.quantizer(rest, depth)
        if depth is not None:
            # Where nothing of it is kept, nothing can be learned about it: straight through, the
            # gradient would reach what was left out, and would miss what was not.
            quantized = torch.where(depth.view(-1, 1, 1) > 0, quantized, 0.0)
        if bypass is not None:
            quantized = torch.where(bypass.view(-1, 1, 1), rest, quantized)
        return SpectralOutput(
            self._decode_latent(base + quantized, None),
            torch.cat((semantic.unsqueeze(1), codes), dim=1),
            commitment + residual_commitment,
            said,
        )
