"""Train the semantic tokenizer: speech recognition through a discrete bottleneck.

Utterances with transcripts (shards of `speechlm synth speech`) are held in memory as log-mel
features, grouped by length into batches of a fixed amount of sound, disturbed (speed, gain, rooms,
noise, band limits, SpecAugment), and recognized by CTC. The bottleneck warms up: at first every row
bypasses the rounding, then a growing share of rows passes through it, then all. A vector
quantizer's codes are moved by what they catch, and the encoder towards them by a commitment loss.

An attention decoder may read the codes beside the CTC head (arXiv 1609.06773), or alone. Two more
CTC heads, before the bottleneck and after it, recognize phones: English spelling is a harder lesson
than what was heard, and hides it (hierarchical CTC, Sanabria and Metze, 2018, arXiv 1807.06234).

Every shape of `TokenizerConfig` can be trained, from nothing, from another tokenizer, or from a
public checkpoint of Whisper (`init_from`), whose decoder then reads its own text pieces.

What disturbs is applied to the mel powers, where a gain is a product, a band limit a cut, noise a
sum and a room's echo a decaying average: less work than the same on the waveform. Of several
processes each takes a batch of its own at every step.

    speechlm train tokenizer configs/tokenizer/tiny.yaml [run.steps=…]

Shapes: B batch, S samples, M mel frames, U characters, W text pieces.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.signal import lfilter
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, LogMel, Pcm
from audio_codec.errors import UserError
from audio_codec.quantize import FSQ
from audio_codec.speech_tokenizer import (
    ALPHABET,
    SpeechTokenizer,
    TokenizerConfig,
    check_heads,
    ctc_loss,
    greedy_text,
    initialize,
    kind_of,
    spell,
)
from audio_codec.speech_tokenizer import (
    SILENCE as _SILENCE,
)
from speechlm.convert import load_speech_tokenizer_of
from speechlm.training.run import OptimizerConfig, Run, RunConfig, clip_gradients
from synth_data import shards
from synth_data.phones import PHONES, phones_of
from synth_data.text import normalize
from synth_data.verify import word_errors

log = logging.getLogger(__name__)

Mel = npt.NDArray[np.float16]
Power = npt.NDArray[np.float32]

MELS = LogMel().n_mels
"""Bands of the features, unless the tokenizer says otherwise."""

_STRIDE = LogMel().stride
_FRAMES = FRAME_SIZE // _STRIDE  # mel frames in a frame
_PER_SECOND = SAMPLE_RATE // _STRIDE


@cache
def _extract(mels: int) -> LogMel:
    return LogMel(n_mels=mels)


class DataConfig(BaseModel):
    """What is trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[Path, ...]
    """Shard folders of utterances with text."""
    validation: tuple[Path, ...]
    noise: tuple[Path, ...] = ()
    """Shard folders of noise clips, mixed under the speech beside white noise."""
    batch_seconds: float = Field(128.0, gt=0)
    """Sound in a batch, padding included."""
    max_seconds: float = Field(12.0, gt=0)
    """Longer utterances are left out."""
    validation_utterances: int = Field(200, gt=0)


class AugmentConfig(BaseModel):
    """How speech is disturbed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speed_share: float = Field(0.0, ge=0, le=1)
    speed: tuple[float, float] = (0.87, 1.15)
    """Played so many times as fast, pitch and formants with it: a voice becomes many."""
    warp: tuple[float, float] = (1.0, 1.0)
    """Frequencies alone times so much, where the speed changes: another vocal tract, same tempo."""
    gain_db: tuple[float, float] = (-20.0, 6.0)
    echo_share: float = Field(0.0, ge=0, le=1)
    echo_seconds: tuple[float, float] = (0.2, 0.8)
    """In which a room's echo falls by 60 dB."""
    echo_db: tuple[float, float] = (-12.0, 0.0)
    """Energy of all of the echo beside that of the voice itself."""
    noise_share: float = Field(0.5, ge=0, le=1)
    noise_db: tuple[float, float] = (5.0, 35.0)
    """Signal-to-noise ratio."""
    band_share: float = Field(0.25, ge=0, le=1)
    band_hz: tuple[float, float] = (3400.0, 8000.0)
    """Upper cut-off."""
    delay_seconds: float = Field(0.24, ge=0)
    """Up to so much silence before an utterance, so that no phase of the frame is special."""
    time_masks: int = Field(3, ge=0)
    time_width: int = Field(24, ge=0)
    """Widest mask, in mel frames of 10 ms."""
    mel_masks: int = Field(2, ge=0)
    mel_width: int = Field(16, ge=0)


class TrainConfig(BaseModel):
    """A tokenizer run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    model: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    quantize_from: float = Field(0.1, ge=0, le=1)
    """Share of the steps in which every row bypasses the rounding."""
    quantize_full: float = Field(0.3, ge=0, le=1)
    """Share of the steps after which every row is quantized."""
    phones: float = Field(0.0, ge=0, lt=1)
    """Share of the loss that the two heads for phones have; the finished model is without them."""
    attention_weight: float = Field(0.3, ge=0, le=1)
    """Of the rest, the attention decoder's share beside a CTC head; alone it gets all."""
    commitment_weight: float = Field(0.25, ge=0)
    """Of a vector quantizer's squared distance from encoder to code."""
    unquantized: bool = False
    """Train the model without its bottleneck (`shape`): the twin that says what that costs."""
    init_from: str | None = None
    """A checkpoint of a tokenizer, or of a codec or model around one, to start from; or a public
    one of Whisper or GLM-4-Voice's tokenizer, which gives what it has. An unquantized twin takes
    all of a quantized tokenizer but its bottleneck."""
    encoder_from: str | None = None
    """A checkpoint of a tokenizer, of whatever rate and bottleneck, whose encoder to start from:
    the features up to the pooling. What comes after that begins anew."""
    dtype: checkpoints.StoredType = "fp32"
    """How the weights of the finished checkpoint are stored."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `tokenizer` in the run directory."""

    @model_validator(mode="after")
    def _teachable(self) -> TrainConfig:
        if not (self.model.ctc or self.model.decoder):
            raise ValueError("model needs ctc=true or a decoder: no head, no lesson")
        if self.model.whisper is not None and self.model.whisper.public_features:
            raise ValueError("model.whisper.public_features=true cannot be trained on: set false")
        if self.augment.mel_width >= self.model.mels:
            raise ValueError(
                f"augment.mel_width is {self.augment.mel_width}: a mask must be narrower than "
                f"model.mels, {self.model.mels}"
            )
        if self.quantize_from > self.quantize_full and not self.unquantized:
            raise ValueError(
                f"quantize_from is {self.quantize_from:g}, quantize_full {self.quantize_full:g}: "
                "the first row must not be rounded later than all are"
            )
        if self.init_from is not None and self.encoder_from is not None:
            raise ValueError("init_from and encoder_from both give the encoder: remove one")
        if self.model.bottleneck == "none":
            raise ValueError(
                "model.bottleneck=none is what unquantized=true makes of it: choose fsq or vq"
            )
        return self

    @property
    def shape(self) -> TokenizerConfig:
        """The model that is trained: `model`, of an unquantized twin without the bottleneck."""
        left_out = {"bottleneck": "none"} if self.unquantized else {}
        return self.model.model_copy(update=left_out)


@dataclass(frozen=True)
class Utterance:
    """One training example."""

    mel: Mel  # [M, n_mels] log-mel at 100 Hz
    text: str
    voice: str
    phones: tuple[int, ...] = ()
    """CTC classes of its phones; none when a word's are not known."""

    @property
    def frames(self) -> int:
        """Length in frames of 80 ms, the last one perhaps not whole."""
        return -(-len(self.mel) // _FRAMES)


class Vocabulary(Protocol):
    """What an attention decoder reads and writes."""

    @property
    def prompt(self) -> Sequence[int]:
        """Pieces that every text begins with."""

    @property
    def end(self) -> int:
        """The piece that ends it."""

    def encode(self, text: str) -> list[int]:
        """A normalized text as pieces, prompt and end included."""

    def decode(self, pieces: Sequence[int]) -> str:
        """The text of what stands between them."""


class Characters:
    """Those of `ALPHABET`, 1 and up; 0 stands before and after them."""

    prompt, end = (0,), 0

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return [0, *spell(text), 0]

    def decode(self, pieces: Sequence[int]) -> str:
        """See `Vocabulary`."""
        return "".join(ALPHABET[piece - 1] for piece in pieces if piece)


class WhisperPieces:
    """The text pieces of a checkpoint of Whisper."""

    def __init__(self, folder: Path, size: int) -> None:
        """Raises UserError when `folder` has none, or more than the decoder's `size`."""
        # They go with the finished checkpoint, which may be trained on.
        self.files = {
            name: (folder / name).read_bytes() for name in _PIECE_FILES if (folder / name).exists()
        }
        if not self.files.keys() & _PIECES:
            raise UserError(
                f"init_from '{folder}' has no text pieces of Whisper (tokenizer.json) for "
                "model.decoder.vocabulary; without that field the decoder reads characters."
            )
        from transformers import WhisperTokenizer  # seconds, for those who use it

        spoken: dict[str, Any] = {}
        if size >= _MULTILINGUAL:
            spoken = {"language": "english", "task": "transcribe"}
        self.pieces: Any = WhisperTokenizer.from_pretrained(folder, local_files_only=True, **spoken)
        if len(self.pieces) > size:
            raise UserError(
                f"model.decoder.vocabulary={size}, but '{folder}' has {len(self.pieces)} pieces."
            )
        self.prompt = list(self.pieces.prefix_tokens)
        self.end = int(self.pieces.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        said = self.pieces(f" {text}", add_special_tokens=False).input_ids
        return [*self.prompt, *said, self.end]

    def decode(self, pieces: Sequence[int]) -> str:
        """See `Vocabulary`."""
        return normalize(self.pieces.decode(list(pieces), skip_special_tokens=True))


_MULTILINGUAL = 51_865
"""Pieces of a Whisper of many languages, whose texts begin with theirs; fewer are English alone."""
_PIECES = {"tokenizer.json", "vocab.json"}
"""Of these, either has them; the others tell more."""
_PIECE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def log_mel(pcm: Pcm, mels: int = MELS) -> Mel:
    """Features [M, mels] of a waveform [S], as the tokenizer takes them."""
    # Two hops more, in which the window slides off the last sample.
    padded = np.pad(pcm.astype(np.float32), (0, -len(pcm) % _STRIDE + 2 * _STRIDE))
    features: Tensor = _extract(mels)(torch.from_numpy(padded)[None, None])
    return features[0].to(torch.float16).numpy()


def phones(text: str) -> tuple[int, ...]:
    """CTC classes of a sentence's phones; none when a word's are not known."""
    return tuple(PHONES.index(phone) + 1 for phone in phones_of(text) or ())


def mel_power(mel: Mel) -> Power:
    """Features [M, n_mels] → mean power in each band."""
    logarithm = mel.astype(np.float32) * np.float32(LogMel.DEVIATION) + np.float32(LogMel.MEAN)
    return np.maximum(np.exp(logarithm) - np.float32(LogMel.FLOOR), 0)


def power_mel(power: Power) -> Power:
    """The inverse of `mel_power`, in float32."""
    logarithm = np.log(power + np.float32(LogMel.FLOOR))
    return (logarithm - np.float32(LogMel.MEAN)) / np.float32(LogMel.DEVIATION)


def load_utterances(
    folders: Sequence[Path], max_seconds: float, mels: int = MELS
) -> list[Utterance]:
    """All single-channel utterances with a text that fit, in the order of the shards."""

    def load(folder: Path) -> list[Utterance]:
        return [
            Utterance(
                log_mel(sample.pcm[0], mels),
                normalize(sample.text),
                sample.voices[0],
                phones(sample.text),
            )
            for sample in shards.read(folder)
            if sample.pcm is not None and sample.text and sample.seconds <= max_seconds
        ]

    # A folder a thread, one core each: small transforms gain nothing from more.
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(max(1, len(folders))) as pool:
        found = [utterance for part in pool.map(load, folders) for utterance in part]
    torch.set_num_threads(cores)
    if not found:
        where = ", ".join(map(str, folders))
        raise UserError(f"data: no utterance with text of up to {max_seconds} s in {where}.")
    return found


def load_noise(folders: Sequence[Path], mels: int = MELS) -> list[Power]:
    """Mel powers of the noise clips in the shards."""
    clips = [s.pcm[0] for folder in folders for s in shards.read(folder) if s.pcm is not None]
    powers = [mel_power(log_mel(clip, mels)) for clip in clips]
    return [power for power in powers if power.any()]


def epoch_batches(
    utterances: Sequence[Utterance], batch_seconds: float, rng: np.random.Generator
) -> list[list[int]]:
    """Indices of one epoch's batches: equals in length together, batches in random order."""
    sizes = np.array([_rounded(utterance.frames) for utterance in utterances])
    # Shuffled first, so that an utterance meets other neighbours in every epoch.
    order = rng.permutation(len(utterances))
    order = order[np.argsort(-sizes[order], kind="stable")]
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, int(batch_seconds * FRAME_RATE / sizes[order[start]]))
        batches.append(order[start : start + rows].tolist())
        start += rows
    return [batches[i] for i in rng.permutation(len(batches))]


def _rounded(frames: int) -> int:
    """Frames that a batch is padded to.

    Few lengths instead of every length: a CPU's matrix kernels are compiled for each shape anew,
    which took a quarter of a training step.
    """
    return -(-frames // 4) * 4


def _stretch(power: Power, speed: float, warp: float = 1.0) -> Power:
    """Mel powers of the sound played `speed` times as fast and its frequencies scaled by `warp`."""
    size = max(1, round(len(power) / speed))
    at = np.linspace(0, len(power) - 1, size)
    # A band shows what lay at so much less than its frequency.
    centers = _centers(power.shape[1])
    bands = np.interp(centers / (speed * warp), centers, np.arange(len(centers)))
    return _between(_between(power, at, 0), bands, 1)


def _echo(power: Power, seconds: float, decibel: float) -> Power:
    """Mel powers in a room whose echo holds `decibel` and falls by 60 dB in so many seconds.

    Late reverberation is noise of a decaying level (Polack's model; `synth_data.augment.room` draws
    it as sound), so that its powers add up: frame t hears (1 − a) Σ_k a^(k−1) of frame t − k.
    """
    decay = 10 ** (-6 / (seconds * _PER_SECOND))
    share = 10 ** (decibel / 10) * (1 - decay)
    echo = lfilter([0.0, share], [1.0, -decay], power, axis=0)
    return power + echo.astype(np.float32)


def _between(power: Power, at: npt.NDArray[np.float64], axis: Literal[0, 1]) -> Power:
    """Linear interpolation of the rows or columns at fractional places, the last one held."""
    last = power.shape[axis] - 1
    below = np.minimum(at.astype(np.int64), last)
    share = np.clip(at - below, 0, 1).astype(np.float32)
    share = share[:, None] if axis == 0 else share
    low = power.take(below, axis)
    return low + share * (power.take(np.minimum(below + 1, last), axis) - low)


@cache
def _centers(mels: int = MELS) -> npt.NDArray[np.float64]:
    """Center frequency of each band in Hz: [mels]."""
    extract = _extract(mels)
    filters = extract.filters.double().numpy()  # [bins, mels]
    hertz = np.arange(len(filters)) * SAMPLE_RATE / extract.n_fft
    return np.asarray(hertz @ filters / filters.sum(0))


def disturb(
    mel: Mel, noise: Sequence[Power], config: AugmentConfig, rng: np.random.Generator
) -> Power:
    """Speed, room, band limit, noise and gain on features [M, n_mels].

    The speed changes their number.
    """
    power = mel_power(mel)
    if rng.random() < config.speed_share:
        power = _stretch(power, rng.uniform(*config.speed), rng.uniform(*config.warp))
    if config.echo_share and rng.random() < config.echo_share:
        power = _echo(power, rng.uniform(*config.echo_seconds), rng.uniform(*config.echo_db))
    if rng.random() < config.band_share:
        power[:, _centers(power.shape[1]) > rng.uniform(*config.band_hz)] = 0
    if rng.random() < config.noise_share:
        if noise and rng.random() < 0.7:
            clip = noise[int(rng.integers(len(noise)))]
            start = int(rng.integers(len(clip)))
            hiss = clip[(start + np.arange(len(power))) % len(clip)]
        else:
            # White noise: a band's power is a mean over about ten exponentials.
            hiss = rng.standard_gamma(10.0, power.shape, dtype=np.float32)
        ratio = 10 ** (-rng.uniform(*config.noise_db) / 10)
        level = float(power.mean()) / max(float(hiss.mean()), 1e-12)
        power += hiss * np.float32(ratio * level)
    return power_mel(power * np.float32(10 ** (rng.uniform(*config.gain_db) / 10)))


@dataclass
class Classes:
    """What a head is to write, one sequence a row."""

    classes: Tensor  # [B, U] padded
    lengths: Tensor  # [B]

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> Classes:
        """Pad the rows."""
        padded = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return Classes(torch.from_numpy(padded), torch.tensor([len(row) for row in rows]))

    def to(self, device: torch.device) -> Classes:
        """The same there."""
        return Classes(self.classes.to(device), self.lengths.to(device))


@dataclass
class Batch:
    """Padded utterances."""

    mel: Tensor  # [B, M, n_mels], M in whole frames
    frames: Tensor  # [B] frames that are sound
    characters: Classes
    phones: Classes
    pieces: Classes | None = None
    """For an attention decoder."""

    def to(self, device: torch.device) -> Batch:
        """The same batch there."""
        return Batch(
            self.mel.to(device),
            self.frames.to(device),
            self.characters.to(device),
            self.phones.to(device),
            None if self.pieces is None else self.pieces.to(device),
        )


def collate(
    utterances: Sequence[Utterance],
    noise: Sequence[Power],
    config: AugmentConfig | None,
    rng: np.random.Generator,
    vocabulary: Vocabulary | None = None,
) -> Batch:
    """Pad with silence to whole frames; `config` None leaves the features as they are.

    With a `vocabulary` the texts are there as its pieces too.
    """
    features: list[npt.NDArray[np.floating[Any]]] = []
    for utterance in utterances:
        if config is None:
            features.append(utterance.mel)
            continue
        lead = int(rng.uniform(0, config.delay_seconds) * _PER_SECOND)
        silence = np.full((lead, utterance.mel.shape[1]), _SILENCE, np.float16)
        delayed = np.concatenate((silence, utterance.mel))
        features.append(disturb(delayed, noise, config, rng))
    frames = [-(-len(mel) // _FRAMES) for mel in features]
    size = (len(features), _rounded(max(frames)) * _FRAMES, features[0].shape[1])
    padded = np.full(size, _SILENCE, np.float32)
    for index, mel in enumerate(features):
        padded[index, : len(mel)] = mel
    pieces = None
    if vocabulary is not None:
        pieces = Classes.of([vocabulary.encode(utterance.text) for utterance in utterances])
    return Batch(
        torch.from_numpy(padded),
        torch.tensor(frames),
        Classes.of([spell(utterance.text) for utterance in utterances]),
        Classes.of([utterance.phones for utterance in utterances]),
        pieces,
    )


def mask_mel(mel: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """SpecAugment (arXiv 1904.08779) on [B, M, n_mels], in place."""
    for row in mel:
        for _ in range(config.time_masks):
            width = int(rng.integers(config.time_width + 1))
            start = int(rng.integers(max(1, len(row) - width)))
            row[start : start + width] = 0
        for _ in range(config.mel_masks):
            width = int(rng.integers(config.mel_width + 1))
            start = int(rng.integers(row.shape[1] - width))
            row[:, start : start + width] = 0
    return mel


def evaluate_wer(
    model: SpeechTokenizer,
    utterances: Sequence[Utterance],
    *,
    quantized: bool,
    seconds: float,
    vocabulary: Vocabulary | None = None,
) -> float:
    """Word error rate of the greedy transcripts."""
    device = next(model.parameters()).device
    errors = words = 0
    model.eval()
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        for indices in epoch_batches(utterances, seconds, rng):
            chosen = [utterances[i] for i in indices]
            batch = collate(chosen, (), None, rng)
            batch = batch.to(device)
            said = transcribe(
                model, batch.mel, batch.frames, quantized=quantized, vocabulary=vocabulary
            )
            for utterance, text in zip(chosen, said, strict=True):
                score = word_errors(utterance.text, text)
                errors, words = errors + score.errors, words + score.words
    model.train()
    return errors / max(1, words)


def transcribe(
    model: SpeechTokenizer,
    mel: Tensor,
    frames: Tensor,
    *,
    quantized: bool = True,
    vocabulary: Vocabulary | None = None,
) -> list[str]:
    """Greedy transcripts of padded features, through the bottleneck or past its rounding.

    Those of the CTC head; of the attention decoder, in its `vocabulary`, where there is no other.
    Raises UserError when the tokenizer reads no text.
    """
    decoder = model.decoder
    if vocabulary is None and decoder is not None and decoder.config.vocabulary is None:
        vocabulary = Characters()
    if model.head is None and (decoder is None or vocabulary is None):
        raise UserError(
            "The tokenizer reads no characters: choose one that was trained with model.ctc=true."
        )
    passed = torch.full_like(frames, quantized, dtype=torch.bool)
    output = model(mel, frames, passed)
    if output.logits is not None:
        best = output.logits.argmax(-1)
        steps = (per_frame(model) * frames).tolist()
        return [greedy_text(row[:n]) for row, n in zip(best, steps, strict=True)]
    assert decoder is not None and output.after is not None and vocabulary is not None
    sound = torch.arange(output.after.shape[1], device=mel.device)
    mask = sound < model.of_frames(frames, model.rate).unsqueeze(1)
    found = decoder.greedy(output.after, mask, vocabulary.prompt, vocabulary.end)
    return [vocabulary.decode(row) for row in found]


def per_frame(model: SpeechTokenizer) -> int:
    """CTC logits in a frame of 80 ms."""
    return max(2, round(model.rate / FRAME_RATE))


class Trainee(nn.Module):
    """A tokenizer with the heads for phones that only its training needs."""

    def __init__(
        self,
        tokenizer: SpeechTokenizer,
        share: float,
        attention: float = 0.0,
        commitment: float = 0.0,
    ) -> None:
        """Weights as in `TrainConfig`; `share` is that of the phones."""
        super().__init__()
        self.tokenizer, self.share = tokenizer, share
        self.attention, self.commitment = attention, commitment
        if share > 0:
            dim, classes = tokenizer.config.dim, len(PHONES) + 1
            self.before = nn.Linear(dim, classes)
            self.after = nn.Linear(dim, tokenizer.per_code * classes)

    def forward(self, batch: Batch, quantized: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses, `loss` their weighted mean, and codes [B, T], where there are any.

        `quantized` [B] bool: rows that pass the rounding.
        """
        tokenizer, pieces, steps = self.tokenizer, batch.pieces, per_frame(self.tokenizer)
        output = tokenizer(
            batch.mel, batch.frames, quantized, None if pieces is None else pieces.classes[:, :-1]
        )
        losses: dict[str, Tensor] = {}
        if output.logits is not None:
            spelled = batch.characters
            losses["loss"] = ctc_loss(
                output.logits, batch.frames, spelled.classes, spelled.lengths, steps
            )
        if pieces is not None:
            read = piece_loss(output.pieces, pieces)
            losses["attention"] = read
            losses["loss"] = torch.lerp(losses.get("loss", read), read, self.attention)
        known = (batch.phones.lengths > 0).nonzero()[:, 0]
        if self.share > 0 and len(known):
            rows, frames = batch.phones, batch.frames[known]
            target = rows.classes[known], rows.lengths[known]
            positions = round(tokenizer.config.encoder_rate / FRAME_RATE)
            early = ctc_loss(self.before(output.before[known]), frames, *target, positions)
            x = self.after(output.after[known])
            late = ctc_loss(
                x.view(len(x), tokenizer.per_code * x.shape[1], -1), frames, *target, steps
            )
            losses |= {"characters": losses["loss"], "phones_before": early, "phones_after": late}
            losses["loss"] = torch.lerp(losses["loss"], (early + late) / 2, self.share)
        elif self.share > 0:
            # Other processes wait for a gradient of every weight, be it nothing.
            heads = (*self.before.parameters(), *self.after.parameters())
            losses["loss"] = losses["loss"] + sum(0.0 * weight.sum() for weight in heads)
        if tokenizer.bottleneck == "vq":
            losses["commitment"] = output.commitment
            losses["loss"] = losses["loss"] + self.commitment * output.commitment
        return losses, output.codes


def piece_loss(logits: Tensor, pieces: Classes) -> Tensor:
    """Mean cross-entropy a piece: logits [B, W − 1, L] of all pieces [B, W] but the first."""
    at = torch.arange(logits.shape[1], device=logits.device)
    told = pieces.classes[:, 1:].masked_fill(at >= pieces.lengths.unsqueeze(1) - 1, -1)
    return F.cross_entropy(logits.float().flatten(0, 1), told.flatten(), ignore_index=-1)


def check_lengths(
    utterances: Sequence[Utterance], vocabulary: Vocabulary | None, shape: TokenizerConfig
) -> None:
    """Raise UserError when a text is longer than the attention decoder has positions."""
    if vocabulary is None or shape.decoder is None:
        return
    longest = max(utterances, key=lambda utterance: len(utterance.text))
    needed, positions = len(vocabulary.encode(longest.text)) - 1, shape.decoder.positions
    if needed > positions:
        raise UserError(
            f"model.decoder.positions is {positions}, but a text has {needed} pieces "
            f"({longest.text[:40]!r} …); raise it, or lower data.max_seconds."
        )


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output_dir = config.output or config.run.dir / "tokenizer"
    checkpoints.check_replaceable(output_dir)
    run = Run("tokenizer", config.run, config, resume)
    mels = config.model.mels
    utterances = load_utterances(config.data.train, config.data.max_seconds, mels)
    held_out = load_utterances(config.data.validation, config.data.max_seconds, mels)
    picks = np.random.default_rng(0).permutation(len(held_out))
    held_out = [held_out[i] for i in sorted(picks[: config.data.validation_utterances])]
    noise = load_noise(config.data.noise, mels)
    vocabulary = make_vocabulary(config)
    check_lengths(utterances, vocabulary, config.shape)
    tokenizer = SpeechTokenizer(config.shape)
    if config.init_from is not None:
        start_from(tokenizer, config.init_from)
    if config.encoder_from is not None:
        start_encoder_from(tokenizer, config.encoder_from)
    model = Trainee(tokenizer, config.phones, config.attention_weight, config.commitment_weight)
    optimizer = config.optimizer.build(model)
    run.restore(model, optimizer)
    model, optimizer = run.accelerator.prepare(model, optimizer)
    bare: Trainee = run.accelerator.unwrap_model(model)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    order = _Order(utterances, config, noise, vocabulary, rank, world)

    def state() -> dict[str, Any]:
        return {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}

    def evaluate(step: int) -> dict[str, float]:
        quantized = step >= config.quantize_from * config.run.steps
        wer = evaluate_wer(
            tokenizer,
            held_out,
            quantized=quantized,
            seconds=config.data.batch_seconds,
            vocabulary=vocabulary,
        )
        return {"wer_validation": wer}

    model.train()
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(order.batch, run.first_step)
        for step in run.steps(state, evaluate):
            batch = coming.result()
            coming = ahead.submit(order.batch, step + 1)
            rate = config.optimizer.rate(step, config.run.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # A process of its own stream each; the first has that of a run of one.
            rng = np.random.default_rng((config.run.seed, step, rank)) if rank else run.rng(step)
            mask_mel(batch.mel, config.augment, rng)
            quantized = torch.from_numpy(rng.random(len(batch.mel)) < _share(config, step))
            losses, codes = model(batch.to(run.device), quantized.to(run.device))
            run.accelerator.backward(losses["loss"])
            norm = clip_gradients(model, config.optimizer.clip)
            run.update(optimizer, norm)
            if (step + 1) % config.run.log_every == 0:
                numbers = {name: loss.item() for name, loss in losses.items()}
                numbers |= {"norm": norm.item(), "lr": rate, "bad_gradients": run.bad_gradients}
                if codes is not None:
                    used = codes.unique().numel()
                    numbers |= {"codes": used, "batch_usage": used / tokenizer.codebook_size}
                run.log(step, numbers)
    card = {
        "trainee": "tokenizer",
        "seed": config.run.seed,
        "unquantized": config.unquantized,
        "steps": run.done,
        "utterances": len(utterances),
        "config": config.model_dump(mode="json"),
    }
    if run.main:
        checkpoints.save(
            output_dir,
            config.shape,
            tokenizer.state_dict(),
            dtype=config.dtype,
            files=vocabulary.files if isinstance(vocabulary, WhisperPieces) else None,
            card=card,
        )
    run.accelerator.wait_for_everyone()
    return output_dir


def make_vocabulary(config: TrainConfig) -> Vocabulary | None:
    """What the attention decoder reads; None when there is no such decoder."""
    decoder = config.model.decoder
    if decoder is None:
        return None
    if decoder.vocabulary is None:
        return Characters()
    if config.init_from is None:
        raise UserError(
            f"model.decoder.vocabulary={decoder.vocabulary} needs init_from, a checkpoint with the "
            "text pieces of Whisper; without that field it reads characters."
        )
    return WhisperPieces(checkpoints.resolve(config.init_from), decoder.vocabulary)


def kept_vocabulary(tokenizer: SpeechTokenizer, folder: Path) -> Vocabulary | None:
    """The text pieces beside a finished tokenizer, in which its attention decoder reads.

    None where it reads characters or nothing, or its pieces were left behind, as in a codec.
    """
    decoder = tokenizer.config.decoder
    if decoder is None or decoder.vocabulary is None:
        return None
    if not any((folder / name).exists() for name in _PIECES):
        return None
    return WhisperPieces(folder, decoder.vocabulary)


def start_from(tokenizer: SpeechTokenizer, name_or_path: str) -> None:
    """Take over the weights that `init_from` names; UserError when they do not fit."""
    found = checkpoints.load(name_or_path)
    if kind_of(found.config) in ("whisper", "whisper_vq"):
        initialize(tokenizer, found)
        return
    start = load_speech_tokenizer_of(name_or_path)
    check_heads(tokenizer.config.heads, start.config.heads, Path(name_or_path))
    taken = start.state_dict()
    if tokenizer.quantizer is None:
        taken = {name: taken[name] for name in taken if not name.startswith(_BOTTLENECK)}
        if tokenizer.pool is not None and start.pool is None:
            taken |= _pool_past_bottleneck(start)
    checkpoints.restore(tokenizer, checkpoints.Checkpoint(Path(name_or_path), {}, taken))


def _pool_past_bottleneck(start: SpeechTokenizer) -> dict[str, Tensor]:
    """The pooling that a bottleneck's two maps do as one, where the map into it has to pool.

    So a twin's later layers go on from what they know, as the tokenizer's do: after a pooling drawn
    anew they would have to learn again what they are then compared in. In place of the bound
    between the maps it has the line nearest to erf(x / √2) for a Gaussian x, of slope 1 / √π.
    """
    into, out = start.to_bottleneck, start.from_bottleneck
    assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
    slope, mean = torch.ones_like(into.bias), torch.zeros_like(into.bias)
    if isinstance(start.quantizer, FSQ):
        slope, mean = (math.pi * (start.quantizer.variance + 1e-5)).rsqrt(), start.quantizer.mean
    return {
        "pool.weight": out.weight @ (slope[:, None] * into.weight),
        "pool.bias": out.weight @ (slope * (into.bias - mean)) + out.bias,
    }


_BOTTLENECK = ("to_bottleneck.", "quantizer.", "from_bottleneck.")
_ENCODER = ("front_in.", "front.", "stack.", "stem.", "before.")


def start_encoder_from(tokenizer: SpeechTokenizer, name_or_path: str) -> None:
    """Take over the encoder that `encoder_from` names; UserError when it is of another shape.

    Where it steps at another rate, the projection of stacked features to a step begins anew.
    """
    start = load_speech_tokenizer_of(name_or_path)
    check_heads(tokenizer.config.heads, start.config.heads, Path(name_or_path))
    same = start.config.encoder_rate == tokenizer.config.encoder_rate

    def encoder(model: SpeechTokenizer) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(_ENCODER) and (same or not name.startswith("stack."))
        }

    taken = encoder(start)
    checkpoints.check(encoder(tokenizer), checkpoints.Checkpoint(Path(name_or_path), {}, taken))
    tokenizer.load_state_dict(taken, strict=False)


def _share(config: TrainConfig, step: int) -> float:
    """Share of rows that pass the rounding at a step."""
    begin, full = (x * config.run.steps for x in (config.quantize_from, config.quantize_full))
    return min(1.0, max(0.0, (step - begin) / max(1.0, full - begin)))


class _Order:
    """Which utterances each step sees: a function of the seed, so a resume needs no state.

    Several processes take batches in turn.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        config: TrainConfig,
        noise: Sequence[Power],
        vocabulary: Vocabulary | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.utterances, self.config, self.noise = utterances, config, noise
        self.vocabulary, self.rank, self.world = vocabulary, rank, world
        self.epoch, self.first = -1, 0
        self.batches: list[list[int]] = []

    def batch(self, step: int) -> Batch:
        """This process's batch of a step; steps must be asked for in rising order."""
        number = step * self.world + self.rank
        while number >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            rng = np.random.default_rng((self.config.run.seed, 1, self.epoch))
            self.batches = epoch_batches(self.utterances, self.config.data.batch_seconds, rng)
        chosen = [self.utterances[i] for i in self.batches[number - self.first]]
        rng = np.random.default_rng((self.config.run.seed, 2, number))
        return collate(chosen, self.noise, self.config.augment, rng, self.vocabulary)
