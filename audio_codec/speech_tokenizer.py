"""The semantic tokenizer: a speech recognizer with a discrete bottleneck in its middle.

The bottleneck learns to pass what a recognizer needs, so its codes say *what* was said, 12.5 times
a second. What comes after it, and the heads that read characters off it (CTC, Graves et al., 2006;
an attention decoder), serve training and the live transcript; the codec and the language model need
the codes alone. After the published tokenizer of arXiv 2411.17607; the shipped one is causal:

    24 kHz ─ log-mel, 100 Hz ─ ConvNeXt ─ stack ×4 ─ 25 Hz transformer ─ pool ×2 ─ FSQ ═ codes,
                                                                                    ║    12.5 Hz
                               characters, 25 Hz ─ CTC head ─ 12.5 Hz transformer ──╝

What the config chooses:

* the encoder: the one drawn, or Whisper's (`whisper.py`), with its public weights if wanted:
  log-mel, 100 Hz ─ two convolutions ─ 50 Hz transformer ─ pool ─ …;
* how far a code sees beyond its own end:

      causal          |··············▪|          nothing
      lookahead_ms    |··············▪▫▫|        so much: code t comes out that much later (`delay`)
      block_ms        |·······|▪▪▪▪▪▪▪|          to the end of its block; a block comes at a time

* the rate of the codes, and how many of the layers before the bottleneck run at it already;
* the bottleneck: finite scalars (FSQ), the nearest of learned vectors (EMA-VQ), or none: the twin
  of another tokenizer, which reads its characters off all that the encoder says and has no codes.

A causal encoder may use any of its past, so look-ahead is time to answer: the code of frame t is
the one that comes out `lookahead_ms` after it, and training reads the characters off these.

Stride of both halves: `frame_size`, one frame of 1920 samples (80 ms), more where codes or blocks
are longer. Algorithmic delay: none beyond it but `delay`.

Shapes: B batch, S samples, M mel frames (100 Hz), T codes, H positions of the encoder (25 or 50
Hz), N positions of the CTC head, Q numbers of the bottleneck, V characters, U text pieces, L of the
vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, LogMel, LogMelState
from audio_codec.errors import UserError
from audio_codec.layers import ConvNeXtStack, Linear, StackState
from audio_codec.quantize import EMAVQ, FSQ
from audio_codec.sampling import normal
from audio_codec.state import State, all_active
from audio_codec.transformer import Transformer, TransformerConfig, TransformerState
from audio_codec.whisper import SAMPLE_RATE as PUBLIC_RATE
from audio_codec.whisper import (
    DecoderConfig,
    Public,
    PublicConfig,
    PublicMel,
    Stem,
    StemConfig,
    StemState,
    TextDecoder,
    from_public,
    sinusoids,
    with_positions,
)

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"
"""What the CTC head writes; its class 0 is the blank, class i+1 is ALPHABET[i]."""

MEL_RATE = 100
SILENCE = (math.log(LogMel.FLOOR) - LogMel.MEAN) / LogMel.DEVIATION
"""The features of digital silence."""


class TokenizerConfig(BaseModel):
    """Shape of the tokenizer; the defaults are the shipped one's, about 8 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    front_dim: PositiveInt = 160
    """Width at the mel rate, 100 Hz."""
    front_blocks: int = Field(2, ge=0)
    dim: PositiveInt = 288
    heads: PositiveInt = 6
    hidden: PositiveInt | None = None
    """Width of the transformers' MLPs; None means 4·dim."""
    layers_before: PositiveInt = 4
    """Transformer layers before the pooling, at 25 Hz (50 for codes at 50 Hz and for Whisper)."""
    layers_pooled: int = Field(0, ge=0)
    """Between pooling and bottleneck, at the rate of the codes."""
    layers_after: int = Field(4, ge=0)
    """After the bottleneck, at that rate; 0: the codes are all there is, and no head."""
    window_seconds: float = Field(4.0, ge=0.08)
    """How far any of the transformers looks back."""
    mels: int = Field(80, ge=1, le=255)
    """Bands of the features; of more, some would hold no bin of the spectrum."""
    whisper: StemConfig | None = None
    """The encoder is Whisper's; None: the one drawn above, to which the `front_` fields belong."""
    rate: float = FRAME_RATE
    """Codes a second: 50, 25, 12.5 or 6.25."""
    pooling: Literal["linear", "avg", "max"] = "linear"
    """How positions of the encoder become one of the codes'."""
    causal: bool = True
    """False: every code sees the whole sound, as in a public Whisper; nothing streams."""
    lookahead_ms: int = Field(0, ge=0)
    """How much later than its own end a code comes out; a multiple of its duration."""
    block_ms: PositiveInt | None = None
    """Block-causal attention: a code sees to the end of its block of so long, a multiple of its
    duration (80 ms to 4 s are usual)."""
    bottleneck: Literal["fsq", "vq", "none"] = "fsq"
    """`none`: what the encoder says goes on as it is, as wide as it is, and there are no codes."""
    levels: tuple[PositiveInt, ...] = Field((7, 5, 5, 5, 5), min_length=1)
    """FSQ levels; their product is the size of the codebook (4375)."""
    codes: PositiveInt = 4096
    """VQ: size of the codebook."""
    code_dim: PositiveInt | None = 32
    """VQ: width of a code; None quantizes the encoder's own numbers, unprojected."""
    ctc: bool = True
    """A CTC head reads characters."""
    decoder: DecoderConfig | None = None
    """An attention decoder reads characters, or the pieces of a Whisper."""
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must give an even size to each of {self.heads} heads")
        if self.rate not in (50, 25, 12.5, 6.25):
            raise ValueError(f"rate={self.rate} must be 50, 25, 12.5 or 6.25")
        for name in ("lookahead_ms", "block_ms"):
            if (value := getattr(self, name) or 0) * self.rate % 1000:
                raise ValueError(
                    f"{name}={value} must be a multiple of a code's {1000 / self.rate:g} ms"
                )
        if self.lookahead_ms and (self.block_ms is not None or not self.causal):
            raise ValueError(
                f"lookahead_ms={self.lookahead_ms} is for causal=true without block_ms"
            )
        if self.block_ms is not None and not self.causal:
            raise ValueError(f"block_ms={self.block_ms} needs causal=true")
        if bool(self.layers_after) != (self.ctc or self.decoder is not None):
            raise ValueError(
                f"layers_after={self.layers_after} must be above 0 with ctc or a decoder, and 0 "
                "without"
            )
        if self.decoder is not None and self.dim % (2 * self.decoder.heads):
            raise ValueError(
                f"dim={self.dim} must give an even size to each of decoder.heads="
                f"{self.decoder.heads}"
            )
        return self

    @property
    def codebook(self) -> tuple[int, ...]:
        """Factor sizes of the codebook; none where there are no codes."""
        if self.bottleneck == "none":
            return ()
        return self.levels if self.bottleneck == "fsq" else (self.codes,)

    @property
    def numbers(self) -> int:
        """Q, how many a code stands for, or go on where there is none."""
        if self.bottleneck == "fsq":
            return len(self.levels)
        if self.bottleneck == "none" or self.code_dim is None:
            return self.dim
        return self.code_dim

    @property
    def projected(self) -> bool:
        """Whether a bottleneck has maps of its own, into it and out of it."""
        return self.bottleneck == "fsq" or (self.bottleneck == "vq" and self.code_dim is not None)

    @property
    def encoder_rate(self) -> int:
        """Positions a second before the pooling."""
        return 50 if self.whisper is not None or self.rate == 50 else 25

    @property
    def sample_rate(self) -> int:
        """Of the sound that it hears, in Hz."""
        public = self.whisper is not None and self.whisper.public_features
        return PUBLIC_RATE if public else SAMPLE_RATE

    @property
    def code_size(self) -> int:
        """Samples a code."""
        return round(self.sample_rate / self.rate)

    @property
    def frame_size(self) -> int:
        """Samples of the smallest chunk: whole frames, whole codes, whole blocks."""
        block = self.sample_rate * (self.block_ms or 0) // 1000
        return math.lcm(round(self.sample_rate / FRAME_RATE), self.code_size, block or 1)


@dataclass(slots=True)
class EncoderState(State):
    """What the tokenizer has heard."""

    mel: LogMelState | None  # None where a stream begins at the features
    front: StackState | StemState
    before: TransformerState
    pooled: TransformerState | None


@dataclass
class TokenizerOutput:
    """One training forward; codes and all else are those *of* the frames, after the look-ahead."""

    logits: Tensor | None  # [B, N, V + 1] characters of the CTC head
    pieces: Tensor | None  # [B, U, L] of the attention decoder, if it was asked
    codes: Tensor | None  # [B, T], where there are any
    before: Tensor  # [B, H, dim] the encoder's last layer before the pooling
    after: Tensor | None  # [B, T, dim] the last layer, which both heads read
    commitment: Tensor  # [] how far the encoder is from the codes; 0 for FSQ


class SpeechTokenizer(nn.Module):
    """Waveform → semantic codes → characters."""

    sample_rate = SAMPLE_RATE
    frame_size = FRAME_SIZE
    """Samples of the smallest chunk."""
    delay = 0
    """Samples that the codes lag behind the sound, beyond that."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate, self.frame_size = config.sample_rate, config.frame_size
        self.delay = config.sample_rate * config.lookahead_ms // 1000
        self._pool = round(config.encoder_rate / config.rate)
        """Positions of the encoder a code."""
        self.per_code = max(1, round(25 / config.rate))
        """Characters a code: 25 a second, or one each."""
        self._late = round(config.lookahead_ms * config.rate / 1000)
        """Codes that come before those of the first frame."""
        self.mel: LogMel | PublicMel
        if config.whisper is None:
            self.mel = LogMel(n_mels=config.mels)
            self.front_in = Linear(config.mels, config.front_dim)
            self.front = ConvNeXtStack(config.front_dim, config.front_blocks)
            self._stacked = MEL_RATE // config.encoder_rate
            self.stack = Linear(self._stacked * config.front_dim, config.dim)
        else:
            public = config.whisper.public_features
            self.mel = PublicMel(config.mels) if public else LogMel(n_mels=config.mels)
            self.stem = Stem(config.whisper, config.mels, config.dim)
        self.before = Transformer(self._transformer(config.layers_before, config.encoder_rate))
        width = config.dim * (self._pool if config.pooling == "linear" else 1)
        # The map into the bottleneck pools by itself, where nothing stands between.
        self.pool: Linear | None = None
        if config.pooling == "linear" and (
            config.layers_pooled or (self._pool > 1 and not config.projected)
        ):
            self.pool, width = Linear(width, config.dim), config.dim
        self.pooled: Transformer | None = None
        if config.layers_pooled:
            self.pooled = Transformer(self._transformer(config.layers_pooled, config.rate))
        projected = config.projected
        self.to_bottleneck = Linear(width, config.numbers) if projected else nn.Identity()
        self.quantizer: FSQ | EMAVQ | None = None
        if config.bottleneck == "fsq":
            self.quantizer = FSQ(config.levels)
        elif config.bottleneck == "vq":
            self.quantizer = EMAVQ(config.numbers, config.codes)
        self.after: Transformer | None = None
        if config.layers_after:
            self.from_bottleneck = (
                nn.Linear(config.numbers, config.dim) if projected else nn.Identity()
            )
            if config.whisper is not None:
                places = math.ceil(config.whisper.positions / self._pool)
                self.after_positions = nn.Parameter(sinusoids(places, config.dim))
            self.after = Transformer(self._transformer(config.layers_after, config.rate, last=True))
        self.head: nn.Linear | None = None
        if config.ctc:
            self.head = Linear(config.dim, self.per_code * (len(ALPHABET) + 1))
        self.decoder: TextDecoder | None = None
        if config.decoder is not None:
            pieces = config.decoder.vocabulary or len(ALPHABET) + 1
            self.decoder = TextDecoder(config.decoder, config.dim, pieces, config.dropout)

    def _transformer(self, layers: int, rate: float, last: bool = False) -> TransformerConfig:
        config = self.config
        return TransformerConfig(
            dim=config.dim,
            layers=layers,
            heads=config.heads,
            hidden=config.hidden,
            norm="layer",
            gated=False,
            window=max(1, round(config.window_seconds * rate)) if config.causal else None,
            rope=config.whisper is None,
            causal=config.causal,
            block=round((config.block_ms or 0) * rate / 1000) or 1,
            final_norm=last or config.whisper is None,
            dropout=config.dropout,
            bias=config.whisper is not None,
        )

    @property
    def bottleneck(self) -> Literal["fsq", "vq", "none"]:
        """The kind of its quantizer."""
        return self.config.bottleneck

    @property
    def codebook(self) -> tuple[int, ...]:
        """Factor sizes of the codebook. Raises UserError when there is none."""
        self.coder()
        return self.config.codebook

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.codebook)

    @property
    def rate(self) -> float:
        """Codes a second."""
        return self.config.rate

    @property
    def lookahead_ms(self) -> float:
        """The most that a code sees beyond its own end; infinite where nothing is causal."""
        config = self.config
        if not config.causal:
            return math.inf
        # A convolution of Whisper's that is not causal hears a frame of features ahead.
        stem = 10.0 * (config.whisper is not None and not config.whisper.causal)
        if config.block_ms is not None:
            return config.block_ms - 1000 / config.rate + stem
        return config.lookahead_ms + stem

    @property
    def past_seconds(self) -> float:
        """Sound so long before a code's own end, or longer, says nothing about it.

        Each layer looks a window further back; a second holds all the convolutions.
        """
        layers = self.config.layers_before + self.config.layers_pooled
        return layers * self.config.window_seconds + 1.0 if self.config.causal else math.inf

    @property
    def streams(self) -> bool:
        """Whether it codes a sound that is still going on."""
        whisper = self.config.whisper
        causal = self.config.causal and (whisper is None or whisper.causal)
        return causal and isinstance(self.mel, LogMel)

    def coder(self) -> FSQ | EMAVQ:
        """What makes codes; UserError where nothing does."""
        if self.quantizer is None:
            raise UserError(
                "bottleneck=none has no codes: choose a tokenizer whose bottleneck is fsq or vq."
            )
        return self.quantizer

    def fingerprint(self) -> tuple[float, ...]:
        """Numbers that tell the weights that its codes depend on from others; see `projections`."""
        weights = sorted(self.state_dict().items())
        return projections(tensor for name, tensor in weights if not name.startswith(_UNCODED))

    @property
    def reads(self) -> bool:
        """Whether it writes down what it hears by itself: characters, which need no vocabulary."""
        decoder = self.config.decoder
        return self.config.ctc or (decoder is not None and decoder.vocabulary is None)

    def hidden(self, mel: Tensor, state: EncoderState | None = None) -> Tensor:
        """Features [B, M, mels] → what the encoder makes of them before pooling, [B, H, dim]."""
        if self.config.whisper is not None:
            assert state is None or isinstance(state.front, StemState)
            x = self.stem(mel, None if state is None else state.front)
        else:
            x = self.front(self.front_in(mel), None if state is None else state.front)
            batch, frames, _ = x.shape
            x = self.stack(x.reshape(batch, frames // self._stacked, -1))
        return self.before(x, None if state is None else state.before)

    def features(self, mel: Tensor, state: EncoderState | None = None) -> Tensor:
        """Features [B, M, mels] → bottleneck numbers before quantization [B, T, Q]."""
        return self._narrow(self.hidden(mel, state), None if state is None else state.pooled)

    def _narrow(self, hidden: Tensor, state: TransformerState | None = None) -> Tensor:
        """[B, H, dim] → [B, T, Q]: some positions of the encoder become one code's."""
        batch, positions, _ = hidden.shape
        if self.config.pooling == "linear":
            x = hidden.reshape(batch, positions // self._pool, -1)
        else:
            x = hidden.unflatten(1, (-1, self._pool))
            x = x.mean(2) if self.config.pooling == "avg" else x.amax(2)
        if self.pool is not None:
            x = self.pool(x)
        if self.pooled is not None:
            x = self.pooled(x, state)
        return self.to_bottleneck(x)

    def encode(self, pcm: Tensor, state: EncoderState | None = None) -> Tensor:
        """Waveform [B, 1, S] → codes int64 [B, T]; S in whole codes, or `frame_size`s of a stream.

        With public features: in pieces of 30 s, each as if it were all, as its publisher does.
        """
        size = self.config.code_size if state is None else self.frame_size
        assert pcm.shape[-1] % size == 0, f"{pcm.shape[-1]} samples are not whole frames of {size}"
        if isinstance(self.mel, LogMel):
            mel = self.mel(pcm, None if state is None else state.mel)
            return self.discretize(self.features(mel, state))
        assert state is None, "public features need the whole sound: stream `features`"
        longest = len(self.stem.positions) // self._pool * self._pool * 2 * self.mel.stride
        pieces = [self.features(self.mel(piece)) for piece in pcm.split(longest, dim=-1)]
        return self.discretize(torch.cat(pieces, dim=1))

    def discretize(self, numbers: Tensor) -> Tensor:
        """Bottleneck numbers [B, T, Q] → codes int64 [B, T]; UserError where there are none."""
        coder = self.coder()
        if isinstance(coder, FSQ):
            return coder.codes(coder.digits(coder.bound(numbers)))
        return coder.nearest(numbers)

    def new_state(self, batch: int, max_chunk: int = 1) -> EncoderState:
        """Encoder state for chunks of up to `max_chunk` strides of `frame_size` samples."""
        codes = max_chunk * self.frame_size // self.config.code_size
        device = next(self.parameters()).device
        return EncoderState(
            all_active(batch, device),
            self.mel.new_state(batch) if isinstance(self.mel, LogMel) else None,
            (self.front if self.config.whisper is None else self.stem).new_state(batch),
            self.before.new_state(batch, codes * self._pool),
            None if self.pooled is None else self.pooled.new_state(batch, codes),
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [B, T] → the bottleneck numbers [B, T, Q] they stand for; FSQ's lie in (−1, 1)."""
        return self.coder().decode(codes)

    def read(self, numbers: Tensor, state: TransformerState | None = None) -> Tensor:
        """Bottleneck numbers [B, T, Q] → the last layer [B, T, dim], which both heads read."""
        assert self.after is not None, "this tokenizer ends with its codes"
        x = self.from_bottleneck(numbers)
        if self.config.whisper is not None:
            offset = None if state is None else state.offset
            x = with_positions(x, self.after_positions, offset)
        return self.after(x, state)

    def characters(self, numbers: Tensor, state: TransformerState | None = None) -> Tensor:
        """Bottleneck numbers [B, T, Q] → CTC logits [B, N, V + 1], two a frame of 80 ms or more."""
        return self._spell(self.read(numbers, state))

    def _spell(self, after: Tensor) -> Tensor:
        assert self.head is not None, "this tokenizer has no CTC head"
        return self.head(after).view(len(after), self.per_code * after.shape[1], -1)

    def new_character_state(self, batch: int, max_chunk: int = 1) -> TransformerState:
        """State of `characters`, for a live transcript; `max_chunk` strides as in `new_state`."""
        assert self.after is not None, "this tokenizer ends with its codes"
        return self.after.new_state(batch, max_chunk * self.frame_size // self.config.code_size)

    def of_frames(self, frames: Tensor, rate: float) -> Tensor:
        """How many steps of `rate` Hz so many frames of 80 ms [B] take, the last perhaps begun."""
        return torch.ceil(frames * (rate / FRAME_RATE)).long()

    def forward(
        self,
        mel: Tensor,
        frames: Tensor | None = None,
        quantized: Tensor | None = None,
        pieces: Tensor | None = None,
    ) -> TokenizerOutput:
        """One pass over features [B, M, mels] of whole sounds.

        `frames` [B]: how many frames of 80 ms are sound (the rest is padding); `quantized` [B]
        bool: rows that pass the rounding, see `FSQ.forward`; `pieces` [B, U]: what the attention
        decoder has read so far, for its scores of what follows.
        """
        late = self._late
        if late:  # codes of the last frames come out in the silence after them
            mel = F.pad(mel, (0, 0, 0, round(late * MEL_RATE / self.rate)), value=SILENCE)
        hidden = self.hidden(mel)
        numbers = self._narrow(hidden)
        valid = None
        if frames is not None:
            at = torch.arange(numbers.shape[1], device=mel.device) - late
            valid = (at >= 0) & (at < self.of_frames(frames, self.rate).unsqueeze(1))
        values, codes, commitment = self._quantize(numbers, valid, quantized)
        logits = scores = after = None
        if self.after is not None:
            after = self.read(values)[:, late:]
            if self.head is not None:
                logits = self._spell(after)
            if self.decoder is not None and pieces is not None:
                sound = None if valid is None else valid[:, late:]
                scores = self.decoder(pieces, after, sound)
        before = hidden[:, late * self._pool :]
        if codes is not None:
            codes = codes[:, late:]
        return TokenizerOutput(logits, scores, codes, before, after, commitment)

    def _quantize(
        self, numbers: Tensor, valid: Tensor | None, quantized: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """[B, T, Q] → values that the rest reads [B, T, Q], codes [B, T], commitment loss."""
        if self.quantizer is None:
            return numbers, None, numbers.new_zeros(())
        if isinstance(self.quantizer, FSQ):
            return *self.quantizer(numbers, valid, quantized), numbers.new_zeros(())
        free = numbers.float()
        vectors, codes, commitment = self.quantizer(free, valid=valid)
        values = free + (vectors - free).detach()
        if quantized is not None:
            values = torch.where(quantized.view(-1, 1, 1), values, free)
        return values, codes, commitment

    def transcribe(self, codes: Tensor) -> list[str]:
        """Greedy CTC transcript of codes [B, T], one string a row."""
        best = self.characters(self.embed(codes)).argmax(-1)
        return [greedy_text(row) for row in best]


_UNCODED = (
    *("from_bottleneck.", "after", "head.", "decoder."),
    *("quantizer.usage", "quantizer.total", "quantizer.ready"),
)
"""Tensors that no code depends on."""


_NUMBERS = 16


def projections(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    """Sixteen numbers that tell some weights, in this order, from others.

    Random projections of all tensors, each at unit length, so that weights that were stored in
    fewer bits stay close, as those of a codec in int8 to those of its tokenizer in float32, whose
    hashes would differ; see `near`.
    """
    numbers = torch.zeros(_NUMBERS, dtype=torch.float64)
    for index, tensor in enumerate(tensors):
        flat = tensor.detach().cpu().double().flatten()
        at = torch.arange(len(flat))
        unit = flat / flat.norm().clamp(min=1e-12)
        numbers.index_add_(0, at % _NUMBERS, unit * normal(torch.tensor(index), at))
    return tuple(round(number, 4) for number in numbers.tolist())


def near(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights, however either was stored.

    Of the shipped weights, int8 moves it by 0.005 of its length, bfloat16 by 0.001; noise of 3% on
    all matrices by 0.02, and one code in ten is then another. Weights of another seed: by 1.4.
    """
    return math.dist(one, other) < 0.02 * math.hypot(*one)


def same_coder(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether codes may be of one coder, by what two say of it (`codec.coded_by`).

    What only one of them tells is not compared: a tokenizer says nothing of the codec around it.
    """
    if one is None or other is None:
        return True
    known = range(0, min(len(one), len(other)), _NUMBERS)
    return all(near(one[at : at + _NUMBERS], other[at : at + _NUMBERS]) for at in known)


def encode_whole(tokenizer: SpeechTokenizer, pcm: Tensor) -> Tensor:
    """Codes [B, T] *of* a whole sound [B, 1, S], at the tokenizer's sample rate and in whole codes.

    Codes come `delay` after what they are of: the first ones are of nothing and left out, the last
    ones come out in silence after the sound.
    """
    late = round(tokenizer.delay * tokenizer.rate / tokenizer.sample_rate)
    return tokenizer.encode(F.pad(pcm, (0, tokenizer.delay)))[:, late:]


def ctc_loss(
    logits: Tensor, frames: Tensor, targets: Tensor, lengths: Tensor, per_frame: int = 2
) -> Tensor:
    """Mean CTC loss a character: logits [B, N, V + 1], targets [B, U], lengths [B].

    `frames` [B] of 80 ms are sound, with `per_frame` logits each.
    """
    log_p = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    steps = per_frame * frames
    loss = F.ctc_loss(log_p, targets, steps, lengths, reduction="none", zero_infinity=True)
    return loss.sum() / lengths.sum().clamp(min=1)


def spell(text: str) -> list[int]:
    """Characters as CTC classes; what the alphabet lacks is left out."""
    return [ALPHABET.index(c) + 1 for c in text.lower() if c in ALPHABET]


def greedy_text(classes: Tensor) -> str:
    """Collapse a row of CTC classes [N]: repeats merge, blanks vanish."""
    text = CTCText()
    return text.push(classes.tolist())


class CTCText:
    """Collapses CTC classes as they come, for a live transcript."""

    def __init__(self) -> None:
        self.last = 0

    def push(self, classes: list[int]) -> str:
        """The new characters that these classes add."""
        out = []
        for label in classes:
            if label not in (0, self.last):
                out.append(ALPHABET[label - 1])
            self.last = label
        return "".join(out)


Kind = Literal["own", "whisper_vq", "whisper"]
"""Whose layout a checkpoint is in: our tokenizer's, that of GLM-4-Voice, or a plain Whisper's."""


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """What a checkpoint's config.json describes; None when it is neither tokenizer nor Whisper."""
    if config.get("quantize_vocab_size") is not None:
        return "whisper_vq"
    if config.get("model_type") == "whisper":
        return "whisper"
    return "own" if "levels" in config else None


def load_tokenizer(name_or_path: str | Path, *, streaming: bool = False) -> SpeechTokenizer:
    """A tokenizer in inference mode from a checkpoint directory: ours, or GLM-4-Voice's.

    Theirs gives the published tokens, of sound at 16 kHz and 30 s at a time. With `streaming` it
    hears `LogMel` at 24 kHz in place of features that no stream can make; ours does so anyway.
    Raises UserError when there is no such checkpoint, it is broken, or of another kind.
    """
    found = checkpoints.load(name_or_path)
    kind = kind_of(found.config)
    if kind == "whisper_vq":
        config = _of_public(found, streaming)
        found = dataclasses.replace(found, tensors=_public_tensors(found, config))
    elif kind == "own":
        config = checkpoints.parse_config(TokenizerConfig, found)
    else:
        raise UserError(
            f"config of '{found.path}' is no speech tokenizer's; choices: ours (config.json with "
            '"levels") or GLM-4-Voice\'s (with "quantize_vocab_size"); a plain Whisper becomes one '
            "by training from it, see init_from."
        )
    model = SpeechTokenizer(config)
    checkpoints.restore(model, found)
    return model.eval().requires_grad_(False)


def initialize(model: SpeechTokenizer, found: checkpoints.Checkpoint) -> None:
    """Start from a public checkpoint, Whisper's or GLM-4-Voice's; what it lacks stays as it is.

    Its encoder's layers fill ours in order, its decoder one for Whisper's pieces, its codebook one
    of unprojected vectors. Raises UserError that names what does not fit.
    """
    if model.config.whisper is None:
        raise UserError(
            f"'{found.path}' is a Whisper, but the model has another encoder: set model.whisper, "
            "as in model.whisper.causal=true."
        )
    public = checkpoints.parse_config(PublicConfig, found)
    check_heads(model.config.heads, public.encoder_attention_heads, found.path)
    decoder = model.config.decoder
    if decoder is not None and decoder.vocabulary is not None:
        check_heads(decoder.heads, public.decoder_attention_heads, found.path, "decoder.heads")
    tensors = _public_tensors(found, model.config)
    expected = {name: own for name, own in model.state_dict().items() if name in tensors}
    checkpoints.check(expected, dataclasses.replace(found, tensors=tensors))
    model.load_state_dict(tensors, strict=False)


def check_heads(own: int, theirs: int | None, path: Path, name: str = "heads") -> None:
    """Raise UserError unless weights to start from have as many heads: their shapes do not tell."""
    if theirs is not None and own != theirs:
        raise UserError(
            f"model.{name}={own}, but the attention in '{path}' has {theirs} heads: set "
            f"model.{name}={theirs}."
        )


def _public_tensors(found: checkpoints.Checkpoint, config: TokenizerConfig) -> dict[str, Tensor]:
    """What a public checkpoint has for a tokenizer of this shape."""
    assert config.whisper is not None
    stacks = {
        "before": config.layers_before,
        "pooled": config.layers_pooled,
        "after": config.layers_after,
    }
    decoder = config.decoder
    return from_public(
        Public(found.path, found.tensors),
        config.whisper,
        stacks,
        decoder_layers=decoder.layers if decoder and decoder.vocabulary is not None else 0,
        codebook=config.bottleneck == "vq" and config.code_dim is None,
    )


def _of_public(found: checkpoints.Checkpoint, streaming: bool) -> TokenizerConfig:
    """The shape of GLM-4-Voice's tokenizer, up to its codes."""
    public = checkpoints.parse_config(PublicConfig, found)
    pool, before = public.pooling_kernel_size or 1, public.pooling_position or 0
    if pool == 1 or before == 0:
        pool, before = 1, public.quantize_position
    causal = public.encoder_causal_attention or public.quantize_causal_encoder
    block = None if causal else public.quantize_causal_block_size
    fields = {
        "dim": public.d_model,
        "heads": public.encoder_attention_heads,
        "hidden": public.encoder_ffn_dim,
        "layers_before": before,
        "layers_pooled": public.quantize_position - before,
        "layers_after": 0,
        "window_seconds": public.max_source_positions / 50,
        "mels": public.num_mel_bins,
        "whisper": StemConfig(
            positions=public.max_source_positions,
            causal=public.encoder_causal_convolution,
            public_features=not streaming,
        ),
        "rate": 50 / pool,
        "pooling": public.pooling_type,
        "causal": causal or block is not None,
        "block_ms": None if block is None else 20 * block,
        "bottleneck": "vq",
        "codes": public.quantize_vocab_size,
        "code_dim": None,
        "ctc": False,
    }
    return checkpoints.parse_config(TokenizerConfig, dataclasses.replace(found, config=fields))
