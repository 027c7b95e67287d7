"""Speech from semantic tokens alone: flow matching to a log-mel spectrum, and a vocoder.

The tokens say what is said and when; whose voice says it is chosen from a table, or by a short
prompt of that voice. After the decoder of CosyVoice 2 (arXiv 2412.10117):

    codes, 12.5 Hz ─ embed ─ transformer ─ ×4 ─┐                  prompt: sound and its codes
                                               + ─ condition ──┐           │
    voice: a row of the table, or ─────────────┘               │      ConvNeXt, mean
                                                               ▼           │ a voice
    noise of (seed, position) ─── x, 50 Hz ─┬──▶ ConvNeXt ─ transformer    ▼
                                            + ◀── velocity · step ──┘   K times
    24 kHz ─ overlap-add ─ inverse STFT, 100 Hz ─ ConvNeXt ─ log-mel, two frames a position ─ x

*Flow matching* (arXiv 2210.02747). From noise x₀ a straight path x_t = (1 − t) x₀ + t x₁, the
optimal transport, leads to a spectrum x₁. A network learns its velocity x₁ − x₀; K Euler steps
along what it learned lead from new noise to a new spectrum. The steps are short at first, where the
path is decided, and grow: t = 1 − cos(π u / 2) for even u. *Guidance* (arXiv 2207.12598) follows
the velocity v past what it would be without tokens and voice, v₀: v + g (v − v₀).

*Mean.* The condition holds the mean of the spectra that its tokens and voice let expect (the prior
of Grad-TTS, arXiv 2105.06337), which is learned directly; the flow adds what no mean can tell.

*Blocks.* Attention is block-causal: a position sees its own block whole, and a window back.

    tokens          |0 … 9|10 … 19|20 … 29|
    seen from 13     [─────────────]          window back, and to the end of its block

*No past is computed twice.* What step k makes of a position depends on what step k made of the
positions before it, and of nothing later: so each step (and each of its two passes, where there is
guidance) has keys, values and convolutions' past of its own, and streaming equals offline. For that
the noise of a position is the same either way: a hash of the stream's seed and the position.

Algorithmic delay: a block is spoken once its last token is there, 10 tokens or 0.8 s after its
first began; nothing is added to that. The spectrum beside hop j is centred on the synthesis window
that begins with hop j, two hops later than `LogMel` gives it: so it reaches 20 ms past the block's
end, which the flow foresees as it does all else, from the tokens. Stride: one block.

Shapes: B batch, S samples, T tokens, N positions (50 a second), M mel frames (2 N), P numbers of a
position (two mel frames), C width, K Euler steps.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, SAMPLE_RATE, LogMel
from audio_codec.errors import UserError
from audio_codec.layers import ConvNeXtStack, StackState, TailState
from audio_codec.sampling import normal
from audio_codec.spectral import HOP, Synthesis, spectrum_head
from audio_codec.speech_tokenizer import SpeechTokenizer, near
from audio_codec.state import State, all_active
from audio_codec.transformer import Transformer, TransformerConfig, TransformerState

log = logging.getLogger(__name__)

BANDS: Final = 80
PATCH: Final = 2
"""Mel frames of a position."""
POSITION_RATE: Final = SAMPLE_RATE / (PATCH * HOP)  # 50 Hz
AHEAD: Final = 2 * HOP
"""Samples after its last hop that a spectrum hears."""
WINDOW: Final = 4 * HOP
"""Samples of the vocoder's synthesis window."""


class TokenDecoderConfig(BaseModel):
    """Shape of the decoder; the defaults are the shipped one's, about 10 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["token_decoder"] = "token_decoder"
    codebook: tuple[PositiveInt, ...] = Field((7, 5, 5, 5, 5), min_length=1)
    """Factor sizes of the tokens' codebook: the levels of an FSQ, or the size of a VQ alone."""
    rate: float = Field(FRAME_RATE, ge=1, le=50)
    """Tokens a second: 50 over a whole number."""
    fingerprint: tuple[float, ...] | None = None
    """Of the tokenizer whose tokens these are; None in a checkpoint that was not told."""
    block: PositiveInt = 10
    """Tokens of a block."""
    voices: tuple[str, ...] = Field(("assistant",), min_length=1)
    """Names in the table of voices, the most heard in training first."""
    dim: PositiveInt = 256
    """Width C of token encoder, flow network and voices."""
    heads: PositiveInt = 4
    encoder_layers: PositiveInt = 2
    """Transformer layers over the tokens."""
    voice_blocks: int = Field(1, ge=0)
    """ConvNeXt blocks that listen to a prompt."""
    flow_blocks: int = Field(2, ge=0)
    """ConvNeXt blocks of the flow network, before its transformer."""
    flow_layers: PositiveInt = 6
    window_seconds: float = Field(2.4, gt=0)
    """How far either transformer looks back."""
    steps: int = Field(8, ge=1, le=100)
    """Euler steps K."""
    guidance: float = Field(0.7, ge=0)
    """Strength g of the guidance; 0 does without, in half the time."""
    temperature: float = Field(0.3, ge=0, le=1)
    """Standard deviation of the noise that the paths begin with; below 1 what is said lies nearer
    to its mean, which is plainer to hear, and less varied."""
    vocoder_dim: PositiveInt = 224
    vocoder_blocks: int = Field(5, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> TokenDecoderConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must give an even size to each of {self.heads} heads")
        if not (POSITION_RATE / self.rate).is_integer():
            raise ValueError(
                f"rate={self.rate:g} must be {POSITION_RATE:g} over a whole number, as 50, 25, "
                "12.5 or 6.25"
            )
        if twice := sorted({name for name in self.voices if self.voices.count(name) > 1}):
            raise ValueError(f"voices has '{twice[0]}' more than once")
        return self

    @property
    def ratio(self) -> int:
        """Positions of a token."""
        return round(POSITION_RATE / self.rate)

    @property
    def token_size(self) -> int:
        """Samples of a token."""
        return self.ratio * PATCH * HOP


@dataclass(slots=True)
class FlowState(State):
    """What one pass of one Euler step made of the past."""

    front: StackState
    transformer: TransformerState


@dataclass(slots=True)
class VocoderState(State):
    """What the vocoder has said."""

    back: StackState
    overhang: TailState


@dataclass(slots=True)
class TokenDecoderState(State):
    """What has been said, and how; the last two are settings, see `TokenDecoder.configure`."""

    encoder: TransformerState
    guided: list[FlowState]  # one an Euler step
    free: list[FlowState]  # likewise without tokens and voice; empty where there is no guidance
    vocoder: VocoderState
    voice: Tensor  # [B, C]
    seed: Tensor  # [B] int64


def path_time(u: Tensor) -> Tensor:
    """Where on the path, 0 … 1, a step at u of 0 … 1 is: dense near the noise."""
    return 1 - torch.cos(u * (torch.pi / 2))


class CodeEmbedding(nn.Module):
    """Codes as the sum of an embedding for each of their digits; the first varies fastest."""

    def __init__(self, factors: Sequence[int], dim: int) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.tables = nn.ParameterList(torch.randn(size, dim) * 0.3 for size in factors)

    def forward(self, codes: Tensor) -> Tensor:
        """int [B, T] → [B, T, C]."""
        parts = []
        for size, table in zip(self.factors, self.tables, strict=True):
            parts.append(F.embedding(codes % size, table))
            codes = codes // size
        return torch.stack(parts).sum(0)


class Flow(nn.Module):
    """The velocity at a point of the path, given what is to be said and by whom."""

    waves: Tensor

    def __init__(self, config: TokenDecoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.point = nn.Linear(PATCH * BANDS, dim)
        self.register_buffer("waves", torch.pi * 2 ** torch.linspace(0, 6, 32), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.front = ConvNeXtStack(dim, config.flow_blocks)
        self.transformer = Transformer(
            _transformer(config, config.flow_layers, config.ratio, POSITION_RATE)
        )
        self.velocity = nn.Linear(dim, PATCH * BANDS)
        nn.init.zeros_(self.velocity.weight)
        nn.init.zeros_(self.velocity.bias)

    def forward(
        self, x: Tensor, time: Tensor, condition: Tensor, state: FlowState | None = None
    ) -> Tensor:
        """x [B, N, P] at time [B] of the path, condition [B, N, C] → velocity [B, N, P].

        The network itself, f, sees x at unit variance and gives what cannot be told from x by a
        factor: noise that is part of the velocity need not pass through its width. With
        s² = t² + (1 − t)² the variance of x_t, the velocity is (2 t − 1) / s² · x + f / s
        (the preconditioning of arXiv 2206.00364 for this path).
        """
        t = time[:, None, None]
        variance = t.square() + (1 - t).square()
        angle = time[:, None] * self.waves
        when = self.time(torch.cat((angle.cos(), angle.sin()), dim=1))
        h = self.point(x * variance.rsqrt()) + condition + when[:, None]
        h = self.front(h, None if state is None else state.front)
        h = self.velocity(self.transformer(h, None if state is None else state.transformer))
        return (2 * t - 1) / variance * x + h.to(x.dtype) * variance.rsqrt()

    def new_state(self, batch: int, max_chunk: int) -> FlowState:
        """State for chunks of up to `max_chunk` positions."""
        return FlowState(
            all_active(batch, self.waves.device),
            self.front.new_state(batch),
            self.transformer.new_state(batch, max_chunk),
        )


class VoiceEncoder(nn.Module):
    """Whose voice a prompt is in: what its spectra are, given what it says."""

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        self.point = nn.Linear(PATCH * BANDS, dim)
        self.stack = ConvNeXtStack(dim, blocks)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        """Spectra [B, N, P] and encoded tokens [B, N, C] → [B, C]."""
        return self.out(self.stack(self.point(x) + said).mean(1))


class Vocoder(nn.Module):
    """Log-mel → sound, a hop a frame (after Vocos, arXiv 2306.00814; see `spectral`)."""

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(BANDS, dim)
        self.back = ConvNeXtStack(dim, blocks)
        self.head = spectrum_head(dim, WINDOW)
        self.synthesis = Synthesis(WINDOW)

    def forward(self, mel: Tensor, state: VocoderState | None = None) -> Tensor:
        """[B, M, bands] → [B, 1, S]."""
        x = self.back(self.inputs(mel), None if state is None else state.back)
        return self.synthesis(self.head(x), None if state is None else state.overhang).unsqueeze(1)

    def new_state(self, batch: int) -> VocoderState:
        """State of a stream that begins in silence."""
        back = self.back.new_state(batch)
        return VocoderState(back.active, back, self.synthesis.new_state(batch))


class TokenDecoder(nn.Module):
    """Codes → waveform. Stride: one block of tokens; see the module docstring."""

    sample_rate = SAMPLE_RATE

    def __init__(self, config: TokenDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = LogMel(n_mels=BANDS)
        self.embed = CodeEmbedding(config.codebook, config.dim)
        self.encoder = Transformer(_transformer(config, config.encoder_layers, 1, config.rate))
        self.up = nn.Linear(config.dim, config.ratio * config.dim)
        self.table = nn.Embedding(len(config.voices), config.dim)
        self.voice_encoder = VoiceEncoder(config.dim, config.voice_blocks)
        self.expected = nn.Linear(config.dim, PATCH * BANDS)
        self.recalled = nn.Linear(PATCH * BANDS, config.dim, bias=False)
        self.flow = Flow(config)
        self.vocoder = Vocoder(config.vocoder_dim, config.vocoder_blocks)

    def spectrum(self, pcm: Tensor) -> Tensor:
        """Sound [B, 1, S + 480], S in whole tokens → log-mel [B, M, bands] of the first S samples.

        The last frames hear the 480 samples too; where a sound ends, they are silence.
        """
        return self.mel(pcm)[:, AHEAD // HOP :]

    def encode(self, codes: Tensor, state: TransformerState | None = None) -> Tensor:
        """What is said where: codes [B, T] → [B, N, C]."""
        x = self.up(self.encoder(self.embed(codes), state))
        return x.reshape(x.shape[0], x.shape[1] * self.config.ratio, -1)

    def foresee(self, said: Tensor, voice: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded tokens [B, N, C] and a voice [B, C] → condition [B, N, C] and mean [B, N, P].

        The mean is that of the spectra which the two let expect; it is part of the condition.
        """
        condition = said + voice[:, None]
        mean = self.expected(condition)
        return condition + self.recalled(mean), mean

    def voice(self, name: str) -> Tensor:
        """A voice of the table: [C]. Raises UserError when there is none of that name."""
        if name not in self.config.voices:
            raise UserError(f"voice '{name}' is unknown; choices: {', '.join(self.config.voices)}.")
        return self.table.weight[self.config.voices.index(name)]

    def imitate(self, pcm: Tensor, codes: Tensor) -> Tensor:
        """The voice of a prompt: sound [B, 1, S] of T tokens and its codes [B, T] → [B, C]."""
        assert pcm.shape[-1] == codes.shape[1] * self.config.token_size, (pcm.shape, codes.shape)
        x = pack(self.spectrum(F.pad(pcm, (0, AHEAD))))
        return self.voice_encoder(x.to(self.table.weight.dtype), self.encode(codes))

    def generate(
        self,
        codes: Tensor,
        state: TokenDecoderState | None = None,
        *,
        voice: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """The spectrum that the codes [B, T] are spoken with: log-mel [B, M, bands].

        `voice` [B, C] and `seed` int64 [B] as for `decode`.
        """
        config, (batch, tokens) = self.config, codes.shape
        like = self.table.weight
        if state is not None:
            assert voice is None and seed is None, "a stream has its own: see configure"
            voice, seed, past = state.voice, state.seed, state.encoder.offset * config.ratio
        else:
            voice = like.new_zeros(batch, config.dim) if voice is None else voice
            past = torch.zeros(batch, dtype=torch.int64, device=like.device)
            seed = past if seed is None else seed
        # Before the encoder moves the offset on.
        place = past[:, None] + torch.arange(tokens * config.ratio, device=like.device)
        number = torch.arange(PATCH * BANDS, device=like.device)
        counter = place[:, :, None] * len(number) + number
        x = config.temperature * normal(seed[:, None, None], counter).to(like.dtype)
        said = self.encode(codes, None if state is None else state.encoder)
        condition, _ = self.foresee(said, voice)
        nothing = torch.zeros_like(condition)
        times = path_time(torch.linspace(0, 1, config.steps + 1, dtype=torch.float64)).tolist()
        for step, (now, then) in enumerate(zip(times, times[1:], strict=False)):
            time = like.new_full((batch,), now)
            velocity = self.flow(x, time, condition, None if state is None else state.guided[step])
            if config.guidance:
                free = self.flow(x, time, nothing, None if state is None else state.free[step])
                velocity = velocity + config.guidance * (velocity - free)
            x = x + (then - now) * velocity
        return unpack(x)

    def decode(
        self,
        codes: Tensor,
        state: TokenDecoderState | None = None,
        *,
        voice: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Codes [B, T] → waveform [B, 1, S].

        Offline any T will do, `voice` [B, C] (from `voice` or `imitate`; None: nobody's in
        particular) says who speaks, and `seed` int64 [B] (None: 0) chooses among the ways to say
        it. A stream comes in whole blocks and has its own two, see `configure`.
        """
        if state is not None:
            assert codes.shape[1] % self.config.block == 0, (
                f"{codes.shape[1]} tokens are no whole blocks of {self.config.block}: see flush"
            )
        mel = self.generate(codes, state, voice=voice, seed=seed)
        return self.vocoder(mel, None if state is None else state.vocoder)

    def flush(self, codes: Tensor, state: TokenDecoderState) -> Tensor:
        """The end of a stream: its last tokens [B, 0 < T ≤ block] → waveform [B, 1, S].

        The slots that were active then begin anew, as after a reset.
        """
        assert 0 < codes.shape[1] <= self.config.block, f"{codes.shape[1]} tokens are not the rest"
        pcm = self.vocoder(self.generate(codes, state), state.vocoder)
        state.reset(state.active.clone())
        return pcm

    def new_state(self, batch: int, max_chunk: int = 1) -> TokenDecoderState:
        """State for chunks of up to `max_chunk` blocks, in nobody's voice and with seed 0."""
        config, like = self.config, self.table.weight
        tokens = max_chunk * config.block
        guided, free = (
            [self.flow.new_state(batch, tokens * config.ratio) for _ in range(steps)]
            for steps in (config.steps, config.steps if config.guidance else 0)
        )
        return TokenDecoderState(
            all_active(batch, like.device),
            self.encoder.new_state(batch, tokens),
            guided,
            free,
            self.vocoder.new_state(batch),
            like.new_zeros(batch, config.dim),
            torch.zeros(batch, dtype=torch.int64, device=like.device),
        )

    def configure(
        self,
        state: TokenDecoderState,
        slot: int,
        *,
        voice: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        """Voice [C] and seed of one stream; what is not given stays. A reset forgets both.

        Raises UserError for a seed out of range.
        """
        if voice is not None:
            state.voice[slot] = voice
        if seed is not None:
            if not 0 <= seed < 2**63:
                raise UserError(f"seed is {seed}; it must be from 0 to 2^63 − 1.")
            state.seed[slot] = seed


def _transformer(
    config: TokenDecoderConfig, layers: int, ratio: int, rate: float
) -> TransformerConfig:
    """A stack at `rate` with `ratio` positions a token."""
    return TransformerConfig(
        dim=config.dim,
        layers=layers,
        heads=config.heads,
        norm="layer",
        gated=False,
        window=math.ceil(config.window_seconds * rate),
        block=config.block * ratio,
    )


def pack(mel: Tensor) -> Tensor:
    """Mel frames as positions: [B, M, bands] → [B, N, P]."""
    return mel.reshape(mel.shape[0], mel.shape[1] // PATCH, -1)


def unpack(x: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return x.reshape(x.shape[0], x.shape[1] * PATCH, -1)


def load_token_decoder(
    name_or_path: str | Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
) -> TokenDecoder:
    """A token decoder in inference mode from a checkpoint directory.

    What is given takes the place of that in its config: fewer steps, or no guidance, are quicker.
    Raises UserError when there is none, it is broken, or one of them is out of range.
    """
    found = checkpoints.load(name_or_path)
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
    given = {name: value for name, value in given.items() if value is not None}
    found = dataclasses.replace(found, config={**found.config, **given})
    model = TokenDecoder(checkpoints.parse_config(TokenDecoderConfig, found))
    checkpoints.restore(model, found)
    return model.eval().requires_grad_(False)


def check_match(tokenizer: SpeechTokenizer, decoder: TokenDecoder) -> None:
    """Raise UserError unless the decoder speaks the tokenizer's tokens, those of its very weights.

    A decoder that does not know whose tokens it speaks is taken at its shape, with a notice.
    """
    theirs, ours = (tuple(tokenizer.codebook), tokenizer.rate), decoder.config
    if theirs != (ours.codebook, ours.rate):
        raise UserError(
            f"decoder: it speaks tokens of codebook {ours.codebook} at {ours.rate:g} Hz, but the "
            f"tokenizer's are of {theirs[0]} at {theirs[1]:g} Hz."
        )
    if ours.fingerprint is None:
        log.warning("decoder: it does not say whose tokens it speaks; only their number fits.")
    elif not near(ours.fingerprint, tokenizer.fingerprint()):
        raise UserError(
            "decoder: it speaks the tokens of a tokenizer with other weights: choose that one, or "
            "a decoder that was trained on this one."
        )
