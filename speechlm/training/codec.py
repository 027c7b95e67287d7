"""Train the spectral codec, the semantic tokenizer inside it frozen.

Random crops of single-channel sound, weighted by folder (the assistant's voice counts most: it is
the one that is heard), are coded and decoded; the criterion is a multi-scale log-mel distance and
the quantizers' commitment.

    speechlm train codec configs/codec/tiny.yaml [run.steps=…]
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from pystoi import stoi
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE
from audio_codec.errors import UserError
from audio_codec.losses import MultiScaleMel
from audio_codec.spectral import SpectralCodec, SpectralConfig
from speechlm.convert import codec_folder, load_speech_tokenizer_of
from speechlm.training.run import OptimizerConfig, Run, RunConfig, clip_gradients
from synth_data import shards

Waveform = np.ndarray[Any, np.dtype[np.int16]]


class SourceConfig(BaseModel):
    """A folder of shards and how often it is drawn from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    weight: float = Field(1.0, gt=0)


class TrainConfig(BaseModel):
    """A codec run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    tokenizer: str
    """The tokenizer that gives codebook 0: a checkpoint of it, or of a codec or model around it."""
    model: SpectralConfig = SpectralConfig()
    """`model.tokenizer` is taken from the tokenizer's checkpoint."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: Path
    """Shards in the assistant's voice, with text."""
    validation_utterances: int = Field(24, gt=0)
    batch: int = Field(16, gt=0)
    crop_frames: int = Field(15, gt=0)
    """Length of a crop in frames of 80 ms."""
    gain_db: tuple[float, float] = (-15.0, 3.0)
    mel_weight: float = 15.0
    commitment_weight: float = 1.0
    dropout_share: float = 0.25
    """Share of rows that keep only a random number of the residual codebooks."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-4, betas=(0.8, 0.99), weight_decay=0.01)
    init_from: str | None = None
    """A checkpoint of a codec, or of a model around one, to start from."""
    dtype: checkpoints.StoredType = "fp32"
    """How the weights of the finished checkpoint are stored."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `codec` in the run directory."""


def load_waveforms(folder: Path) -> list[Waveform]:
    """Every channel of every sample of a shard folder, as 16-bit sound."""
    found = []
    for sample in shards.read(folder):
        if sample.pcm is not None:
            found += [(channel.clip(-1, 1) * 32767).astype(np.int16) for channel in sample.pcm]
    if not found:
        raise UserError(f"sources: no sound in the shards of '{folder}'.")
    return found


def draw_crops(
    sources: Sequence[tuple[float, list[Waveform]]], config: TrainConfig, rng: np.random.Generator
) -> Tensor:
    """A batch of random crops [B, 1, S]; short sounds get silence around them."""
    size = config.crop_frames * FRAME_SIZE
    weights = np.array([weight for weight, _ in sources])
    batch = np.zeros((config.batch, 1, size), np.float32)
    for row in batch:
        sounds = sources[rng.choice(len(sources), p=weights / weights.sum())][1]
        sound = sounds[rng.integers(len(sounds))]
        # The crop may hang over either end: silence, onset and release are part of speech.
        first = int(rng.integers(-size // 4, max(1, len(sound) - 3 * size // 4)))
        piece = sound[max(0, first) : first + size].astype(np.float32) / 32768
        gain = 10 ** (rng.uniform(*config.gain_db) / 20)
        start = max(0, -first)
        row[0, start : start + len(piece)] = piece * gain
    return torch.from_numpy(batch)


@torch.inference_mode()
def evaluate_stoi(codec: SpectralCodec, sounds: Sequence[Waveform]) -> float:
    """Mean short-time objective intelligibility of decoded utterances (Taal et al., 2011)."""
    codec.eval()
    scores = []
    for sound in sounds:
        samples = len(sound) // FRAME_SIZE * FRAME_SIZE
        pcm = torch.from_numpy(sound[:samples].astype(np.float32) / 32768)[None, None]
        decoded = codec.decode(codec.encode(pcm.to(codec.up.weight.device))).cpu()
        scores.append(stoi(pcm[0, 0].numpy(), decoded[0, 0].numpy(), SAMPLE_RATE))
    codec.train()
    codec.tokenizer.eval()
    return float(np.mean(scores))


def _build(config: TrainConfig) -> SpectralCodec:
    tokenizer = load_speech_tokenizer_of(config.tokenizer)
    codec = SpectralCodec(config.model.model_copy(update={"tokenizer": tokenizer.config}))
    if config.init_from is not None:
        checkpoints.restore(codec, checkpoints.load(codec_folder(config.init_from)))
    codec.tokenizer.load_state_dict(tokenizer.state_dict())
    codec.tokenizer.requires_grad_(False)
    return codec


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output_dir = config.output or config.run.dir / "codec"
    checkpoints.check_replaceable(output_dir)
    run = Run("codec", config.run, config, resume)
    codec = _build(config)
    sources = [(source.weight, load_waveforms(source.path)) for source in config.sources]
    held_out = load_waveforms(config.validation)[: config.validation_utterances]
    criterion = MultiScaleMel().to(run.device)
    optimizer = config.optimizer.build(codec)
    run.restore(codec, optimizer)
    model, optimizer = run.accelerator.prepare(codec, optimizer)
    bare: SpectralCodec = run.accelerator.unwrap_model(model)
    residual = len(config.model.codebooks)

    def state() -> dict[str, Any]:
        return {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}

    def evaluate(step: int) -> dict[str, float]:
        return {"stoi_validation": evaluate_stoi(bare, held_out)}

    def batch_of(step: int) -> Tensor:
        return draw_crops(sources, config, run.rng(step))

    bare.train()
    bare.tokenizer.eval()
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batch_of, run.first_step)
        for step in run.steps(state, evaluate):
            pcm = coming.result().to(run.device)
            coming = ahead.submit(batch_of, step + 1)
            rate = config.optimizer.rate(step, config.run.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rng = np.random.default_rng((config.run.seed, 3, step))
            kept = rng.integers(1, residual + 1, len(pcm))
            kept[rng.random(len(pcm)) >= config.dropout_share] = residual
            output = model(pcm, torch.from_numpy(kept).to(run.device))
            distance = criterion(output.pcm[:, 0], pcm[:, 0])
            loss = config.mel_weight * distance + config.commitment_weight * output.commitment
            run.accelerator.backward(loss)
            norm = clip_gradients(model, config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % config.run.log_every == 0:
                used = [level.unique().numel() for level in output.codes[:, 1:].unbind(1)]
                run.log(
                    step,
                    {
                        "mel": distance.item(),
                        "commitment": output.commitment.item(),
                        "norm": norm.item(),
                        "lr": rate,
                        "codes_in_batch": float(np.mean(used)),
                    },
                )
    card = {"trainee": "codec", "steps": run.done, "batch": config.batch}
    return checkpoints.save(
        output_dir, bare.config, bare.state_dict(), dtype=config.dtype, card=card
    )
