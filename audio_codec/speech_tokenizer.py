"""The semantic tokenizer: a causal speech recognizer with a discrete bottleneck in its middle.

The bottleneck learns to pass what a recognizer needs, so its codes say *what* was said at 12.5 a
second. The layers after it, and a CTC head (Graves et al., 2006), serve training and the live
transcript; the codec and the language model need the codes alone. After the published tokenizer of
arXiv 2411.17607, but strictly causal: it streams, and it has no look-ahead.

    24 kHz ─ log-mel, 100 Hz ─ ConvNeXt ─ stack ×4 ─ 25 Hz transformer ─ pool ×2 ─ FSQ ═ codes,
                                                                                    ║    12.5 Hz
                               characters, 25 Hz ─ CTC head ─ 12.5 Hz transformer ──╝

Algorithmic delay: none beyond the frame of 1920 samples (80 ms). Stride of both halves: one frame.

Shapes: B batch, S samples, T frames, M mel frames (8 T), Q numbers of the bottleneck, V characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, LogMel, LogMelState
from audio_codec.layers import ConvNeXtStack, StackState
from audio_codec.quantize import FSQ
from audio_codec.state import State, all_active
from audio_codec.transformer import Transformer, TransformerConfig, TransformerState

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"
"""What the CTC head writes; its class 0 is the blank, class i+1 is ALPHABET[i]."""


class TokenizerConfig(BaseModel):
    """Shape of the tokenizer; the defaults are the shipped one's, about 8 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    front_dim: PositiveInt = 160
    """Width at the mel rate, 100 Hz."""
    front_blocks: int = Field(2, ge=0)
    dim: PositiveInt = 288
    heads: PositiveInt = 6
    layers_before: PositiveInt = 4
    """Transformer layers before the bottleneck, at 25 Hz."""
    layers_after: PositiveInt = 4
    """Transformer layers after it, at 12.5 Hz."""
    window_seconds: float = Field(4.0, ge=0.08)
    """How far either transformer looks back."""
    levels: tuple[PositiveInt, ...] = Field((7, 5, 5, 5, 5), min_length=1)
    """FSQ levels; their product is the size of the codebook (4375)."""
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> TokenizerConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must give an even size to each of {self.heads} heads")
        return self


@dataclass(slots=True)
class EncoderState(State):
    """What the tokenizer has heard."""

    mel: LogMelState
    front: StackState
    before: TransformerState


@dataclass
class TokenizerOutput:
    """One training forward."""

    logits: Tensor  # [B, 2 T, V + 1] characters at 25 Hz
    codes: Tensor  # [B, T]
    before: Tensor  # [B, 2 T, dim] last layer before the bottleneck, at 25 Hz
    after: Tensor  # [B, T, dim] last layer after it


class SpeechTokenizer(nn.Module):
    """Waveform → semantic codes → characters."""

    sample_rate = SAMPLE_RATE
    frame_size = FRAME_SIZE
    delay = 0

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = LogMel()
        self.front_in = nn.Linear(self.mel.n_mels, config.front_dim)
        self.front = ConvNeXtStack(config.front_dim, config.front_blocks)
        self.stack = nn.Linear(4 * config.front_dim, config.dim)
        self.before = Transformer(self._transformer(config.layers_before, 25.0))
        self.to_bottleneck = nn.Linear(2 * config.dim, len(config.levels))
        self.quantizer = FSQ(config.levels)
        self.from_bottleneck = nn.Linear(len(config.levels), config.dim)
        self.after = Transformer(self._transformer(config.layers_after, 12.5))
        self.head = nn.Linear(config.dim, 2 * (len(ALPHABET) + 1))

    def _transformer(self, layers: int, rate: float) -> TransformerConfig:
        config = self.config
        return TransformerConfig(
            dim=config.dim,
            layers=layers,
            heads=config.heads,
            norm="layer",
            gated=False,
            window=round(config.window_seconds * rate),
            dropout=config.dropout,
        )

    @property
    def codebook(self) -> tuple[int, ...]:
        """Factor sizes of the codebook."""
        return self.config.levels

    @property
    def rate(self) -> float:
        """Codes a second."""
        return FRAME_RATE

    def hidden(self, mel: Tensor, state: EncoderState | None = None) -> Tensor:
        """Log-mel [B, M, n_mels] → what the encoder makes of it, [B, 2 T, dim] at 25 Hz."""
        x = self.front(self.front_in(mel), None if state is None else state.front)
        batch, frames, _ = x.shape
        x = self.stack(x.reshape(batch, frames // 4, -1))
        return self.before(x, None if state is None else state.before)

    def features(self, mel: Tensor, state: EncoderState | None = None) -> Tensor:
        """Log-mel [B, M, n_mels] → bottleneck numbers before quantization [B, T, Q]."""
        return self._narrow(self.hidden(mel, state))

    def _narrow(self, hidden: Tensor) -> Tensor:
        """[B, 2 T, dim] → [B, T, Q]: two steps of the encoder become one frame."""
        return self.to_bottleneck(hidden.reshape(hidden.shape[0], hidden.shape[1] // 2, -1))

    def encode(self, pcm: Tensor, state: EncoderState | None = None) -> Tensor:
        """Waveform [B, 1, S], S a multiple of 1920 → codes int64 [B, T]."""
        assert pcm.shape[-1] % FRAME_SIZE == 0, f"{pcm.shape[-1]} samples are not whole frames"
        mel = self.mel(pcm, None if state is None else state.mel)
        return self.discretize(self.features(mel, state))

    def discretize(self, numbers: Tensor) -> Tensor:
        """Bottleneck numbers [B, T, Q] → codes int64 [B, T]."""
        return self.quantizer.codes(self.quantizer.digits(self.quantizer.bound(numbers)))

    def new_state(self, batch: int, max_chunk: int = 1) -> EncoderState:
        """Encoder state for chunks of up to `max_chunk` frames of 1920 samples."""
        return EncoderState(
            all_active(batch, self.head.weight.device),
            self.mel.new_state(batch),
            self.front.new_state(batch),
            self.before.new_state(batch, 2 * max_chunk),
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [B, T] → their bottleneck numbers in (−1, 1), [B, T, Q]."""
        return self.quantizer.decode(codes)

    def characters(self, numbers: Tensor, state: TransformerState | None = None) -> Tensor:
        """Bottleneck numbers [B, T, Q] → CTC logits [B, 2 T, V + 1], two a frame."""
        return self._spell(self.after(self.from_bottleneck(numbers), state))

    def _spell(self, after: Tensor) -> Tensor:
        return self.head(after).view(len(after), 2 * after.shape[1], -1)

    def new_character_state(self, batch: int, max_chunk: int = 1) -> TransformerState:
        """State of `characters`, for a live transcript."""
        return self.after.new_state(batch, max_chunk)

    def forward(
        self,
        mel: Tensor,
        frames: Tensor | None = None,
        quantized: Tensor | None = None,
    ) -> TokenizerOutput:
        """One training pass over log-mel [B, M, n_mels].

        `frames` [B]: how many of the T frames are sound (the rest is padding); `quantized` [B]
        bool: rows that pass the rounding, see `FSQ.forward`.
        """
        hidden = self.hidden(mel)
        numbers = self._narrow(hidden)
        valid = None
        if frames is not None:
            valid = torch.arange(numbers.shape[1], device=mel.device) < frames.unsqueeze(1)
        values, codes = self.quantizer(numbers, valid, quantized)
        after = self.after(self.from_bottleneck(values))
        return TokenizerOutput(self._spell(after), codes, hidden, after)

    def transcribe(self, codes: Tensor) -> list[str]:
        """Greedy CTC transcript of codes [B, T], one string a row."""
        best = self.characters(self.embed(codes)).argmax(-1)
        return [greedy_text(row) for row in best]


def ctc_loss(logits: Tensor, frames: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Mean CTC loss a character: logits [B, 2 T, V + 1], targets [B, U], lengths [B]."""
    log_p = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    loss = F.ctc_loss(log_p, targets, 2 * frames, lengths, reduction="none", zero_infinity=True)
    return loss.sum() / lengths.sum().clamp(min=1)


def spell(text: str) -> list[int]:
    """Characters as CTC classes; what the alphabet lacks is left out."""
    return [ALPHABET.index(c) + 1 for c in text.lower() if c in ALPHABET]


def greedy_text(classes: Tensor) -> str:
    """Collapse a row of CTC classes [2 T]: repeats merge, blanks vanish."""
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


def load_tokenizer(name_or_path: str | Path) -> SpeechTokenizer:
    """A tokenizer in inference mode from a checkpoint directory; UserError when it is broken."""
    found = checkpoints.load(name_or_path)
    model = SpeechTokenizer(checkpoints.parse_config(TokenizerConfig, found))
    checkpoints.restore(model, found)
    return model.eval().requires_grad_(False)
