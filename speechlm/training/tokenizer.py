"""Train the semantic tokenizer: speech recognition through a discrete bottleneck.

Utterances with transcripts (shards of `speechlm synth speech`) are held in memory, grouped by
length into batches of a fixed amount of sound, disturbed (gain, noise, band limits, SpecAugment),
and recognized by CTC. The bottleneck warms up: at first every row bypasses the rounding, then a
growing share of rows passes through it, then all.

    speechlm train tokenizer configs/tokenizer/tiny.yaml [run.steps=…]
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy import fft
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import (
    SpeechTokenizer,
    TokenizerConfig,
    ctc_loss,
    greedy_text,
    spell,
)
from speechlm.convert import load_speech_tokenizer_of
from speechlm.training.run import OptimizerConfig, Run, RunConfig, clip_gradients
from synth_data import shards
from synth_data.text import normalize
from synth_data.verify import word_errors

log = logging.getLogger(__name__)

Waveform = np.ndarray[Any, np.dtype[np.int16]]


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
    max_seconds: float = 12.0
    """Longer utterances are left out."""
    validation_utterances: int = Field(200, gt=0)


class AugmentConfig(BaseModel):
    """How speech is disturbed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speed_share: float = Field(0.0, ge=0, le=1)
    speed: tuple[float, float] = (0.87, 1.15)
    """Played so many times as fast, pitch and formants with it: a voice becomes many."""
    gain_db: tuple[float, float] = (-20.0, 6.0)
    noise_share: float = 0.5
    noise_db: tuple[float, float] = (5.0, 35.0)
    """Signal-to-noise ratio."""
    band_share: float = 0.25
    band_hz: tuple[float, float] = (3400.0, 8000.0)
    """Upper cut-off."""
    delay_seconds: float = 0.24
    """Up to so much silence before an utterance, so that no phase of the frame is special."""
    time_masks: int = 3
    time_width: int = 24
    """Widest mask, in mel frames of 10 ms."""
    mel_masks: int = 2
    mel_width: int = 16


class TrainConfig(BaseModel):
    """A tokenizer run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    model: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    quantize_from: float = 0.1
    """Share of the steps in which every row bypasses the rounding."""
    quantize_full: float = 0.3
    """Share of the steps after which every row is quantized."""
    unquantized: bool = False
    """Never quantize: the twin that says what the bottleneck costs."""
    init_from: str | None = None
    """A checkpoint of a tokenizer, or of a codec or model around one, to start from."""
    dtype: checkpoints.StoredType = "fp32"
    """How the weights of the finished checkpoint are stored."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `tokenizer` in the run directory."""


@dataclass(frozen=True)
class Utterance:
    """One training example."""

    pcm: Waveform  # [S] at 24 kHz
    text: str
    voice: str

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return len(self.pcm) / SAMPLE_RATE


def load_utterances(folders: Sequence[Path], max_seconds: float) -> list[Utterance]:
    """All single-channel utterances with a text that fit, in the order of the shards."""
    found = []
    for folder in folders:
        for sample in shards.read(folder):
            if sample.pcm is None or not sample.text or sample.seconds > max_seconds:
                continue
            pcm = (sample.pcm[0].clip(-1, 1) * 32767).astype(np.int16)
            found.append(Utterance(pcm, normalize(sample.text), sample.voices[0]))
    if not found:
        where = ", ".join(map(str, folders))
        raise UserError(f"data: no utterance with text of up to {max_seconds} s in {where}.")
    return found


def load_noise(folders: Sequence[Path]) -> list[Waveform]:
    """Noise clips, as they lie in the shards."""
    clips = [s.pcm[0] for folder in folders for s in shards.read(folder) if s.pcm is not None]
    return [(clip.clip(-1, 1) * 32767).astype(np.int16) for clip in clips]


def epoch_batches(
    utterances: Sequence[Utterance], batch_seconds: float, rng: np.random.Generator
) -> list[list[int]]:
    """Indices of one epoch's batches: neighbours in length together, batches in random order."""
    # Lengths are jittered, so that an utterance meets other neighbours in every epoch.
    lengths = np.array([u.seconds for u in utterances]) * rng.uniform(0.9, 1.1, len(utterances))
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0.0
    for index in np.argsort(lengths, kind="stable"):
        longest = max(longest, utterances[index].seconds)
        if current and longest * (len(current) + 1) > batch_seconds:
            batches.append(current)
            current, longest = [], utterances[index].seconds
        current.append(int(index))
    batches.append(current)
    return [batches[i] for i in rng.permutation(len(batches))]


def disturb(
    pcm: np.ndarray[Any, np.dtype[np.float32]],
    noise: Sequence[Waveform],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Speed, gain, band limit and noise on one utterance [S]; the speed changes its length."""
    if rng.random() < config.speed_share:
        size = int(len(pcm) / rng.uniform(*config.speed))
        at = np.linspace(0, len(pcm) - 1, size, dtype=np.float32)
        pcm = np.interp(at, np.arange(len(pcm), dtype=np.float32), pcm).astype(np.float32)
    if rng.random() < config.band_share:
        size = fft.next_fast_len(len(pcm), real=True)  # a prime length costs many times as much
        spectrum = fft.rfft(pcm, size)
        spectrum[int(rng.uniform(*config.band_hz) / SAMPLE_RATE * size) :] = 0
        pcm = fft.irfft(spectrum, size)[: len(pcm)]
    if rng.random() < config.noise_share:
        if noise and rng.random() < 0.7:
            clip = noise[int(rng.integers(len(noise)))]
            start = int(rng.integers(len(clip)))
            hiss = np.resize(np.roll(clip, -start), len(pcm)).astype(np.float32)
        else:
            hiss = rng.standard_normal(len(pcm)).astype(np.float32)
        ratio = 10 ** (-rng.uniform(*config.noise_db) / 20)
        level = np.sqrt(np.mean(pcm**2) / max(float(np.mean(hiss**2)), 1e-9))
        pcm = pcm + hiss * np.float32(ratio * level)
    return (pcm * np.float32(10 ** (rng.uniform(*config.gain_db) / 20))).clip(-1, 1)


@dataclass
class Batch:
    """Padded utterances."""

    pcm: Tensor  # [B, 1, S], S in whole frames
    frames: Tensor  # [B] frames that are sound
    targets: Tensor  # [B, U] CTC classes
    lengths: Tensor  # [B]


def collate(
    utterances: Sequence[Utterance],
    noise: Sequence[Waveform],
    config: AugmentConfig | None,
    rng: np.random.Generator,
) -> Batch:
    """Pad to whole frames; `config` None leaves the sound as it is."""
    sounds: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    for utterance in utterances:
        pcm = utterance.pcm.astype(np.float32) / np.float32(32768)
        if config is not None:
            lead = int(rng.uniform(0, config.delay_seconds) * SAMPLE_RATE)
            pcm = disturb(np.pad(pcm, (lead, 0)), noise, config, rng)
        sounds.append(pcm)
    frames = [-(-len(pcm) // FRAME_SIZE) for pcm in sounds]
    padded = np.zeros((len(sounds), 1, max(frames) * FRAME_SIZE), np.float32)
    for index, pcm in enumerate(sounds):
        padded[index, 0, : len(pcm)] = pcm
    spelled = [spell(utterance.text) for utterance in utterances]
    targets = np.zeros((len(sounds), max(map(len, spelled))), np.int64)
    for index, classes in enumerate(spelled):
        targets[index, : len(classes)] = classes
    return Batch(
        torch.from_numpy(padded),
        torch.tensor(frames),
        torch.from_numpy(targets),
        torch.tensor([len(s) for s in spelled]),
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
    model: SpeechTokenizer, utterances: Sequence[Utterance], *, quantized: bool, seconds: float
) -> float:
    """Word error rate of the greedy CTC transcripts."""
    device = next(model.parameters()).device
    errors = words = 0
    model.eval()
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        for indices in epoch_batches(utterances, seconds, rng):
            chosen = [utterances[i] for i in indices]
            batch = collate(chosen, (), None, rng)
            said = transcribe(model, batch.pcm.to(device), batch.frames, quantized=quantized)
            for utterance, text in zip(chosen, said, strict=True):
                score = word_errors(utterance.text, text)
                errors, words = errors + score.errors, words + score.words
    model.train()
    return errors / max(1, words)


def transcribe(
    model: SpeechTokenizer, pcm: Tensor, frames: Tensor, *, quantized: bool = True
) -> list[str]:
    """Greedy transcripts of padded sound [B, 1, S], through the bottleneck or past its rounding."""
    bounded = model.quantizer.bound(model.features(model.mel(pcm)))
    values = model.quantizer.values(model.quantizer.digits(bounded)) if quantized else bounded
    best = model.characters(values).argmax(-1)
    return [greedy_text(row[: 2 * n]) for row, n in zip(best, frames.tolist(), strict=True)]


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output_dir = config.output or config.run.dir / "tokenizer"
    checkpoints.check_replaceable(output_dir)
    run = Run("tokenizer", config.run, config, resume)
    utterances = load_utterances(config.data.train, config.data.max_seconds)
    held_out = load_utterances(config.data.validation, config.data.max_seconds)
    picks = np.random.default_rng(0).permutation(len(held_out))
    held_out = [held_out[i] for i in sorted(picks[: config.data.validation_utterances])]
    noise = load_noise(config.data.noise)
    model = SpeechTokenizer(config.model)
    if config.init_from is not None:
        start = load_speech_tokenizer_of(config.init_from).state_dict()
        checkpoints.restore(model, checkpoints.Checkpoint(Path(config.init_from), {}, start))
    optimizer = config.optimizer.build(model)
    run.restore(model, optimizer)
    model, optimizer = run.accelerator.prepare(model, optimizer)
    bare: SpeechTokenizer = run.accelerator.unwrap_model(model)
    order = _Order(utterances, config, noise, run)

    def state() -> dict[str, Any]:
        return {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}

    def evaluate(step: int) -> dict[str, float]:
        quantized = not config.unquantized and step >= config.quantize_from * config.run.steps
        wer = evaluate_wer(bare, held_out, quantized=quantized, seconds=config.data.batch_seconds)
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
            rng = run.rng(step)
            with torch.no_grad():
                mel = mask_mel(bare.mel(batch.pcm.to(run.device)), config.augment, rng)
            quantized = torch.from_numpy(rng.random(len(mel)) < _share(config, step))
            frames = batch.frames.to(run.device)
            output = model(mel, frames, quantized.to(run.device))
            loss = ctc_loss(
                output.logits,
                frames,
                batch.targets.to(run.device),
                batch.lengths.to(run.device),
            )
            run.accelerator.backward(loss)
            norm = clip_gradients(model, config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % config.run.log_every == 0:
                used = output.codes.unique().numel() / bare.quantizer.size
                run.log(
                    step,
                    {"loss": loss.item(), "norm": norm.item(), "lr": rate, "batch_usage": used},
                )
    card = {"trainee": "tokenizer", "steps": run.done, "utterances": len(utterances)}
    return checkpoints.save(
        output_dir, config.model, bare.state_dict(), dtype=config.dtype, card=card
    )


def _share(config: TrainConfig, step: int) -> float:
    """Share of rows that pass the rounding at a step."""
    if config.unquantized:
        return 0.0
    begin, full = (x * config.run.steps for x in (config.quantize_from, config.quantize_full))
    return min(1.0, max(0.0, (step - begin) / max(1.0, full - begin)))


class _Order:
    """Which utterances each step sees: a function of the seed, so a resume needs no state."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        config: TrainConfig,
        noise: Sequence[Waveform],
        run: Run,
    ) -> None:
        self.utterances, self.config, self.noise, self.run = utterances, config, noise, run
        self.epoch, self.first = -1, 0
        self.batches: list[list[int]] = []

    def batch(self, step: int) -> Batch:
        """The batch of a step; steps must be asked for in rising order."""
        while step >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            rng = np.random.default_rng((self.config.run.seed, 1, self.epoch))
            self.batches = epoch_batches(self.utterances, self.config.data.batch_seconds, rng)
        chosen = [self.utterances[i] for i in self.batches[step - self.first]]
        rng = np.random.default_rng((self.config.run.seed, 2, step))
        return collate(chosen, self.noise, self.config.augment, rng)
