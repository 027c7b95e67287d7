"""Train the spectral codec.

Random crops of single-channel sound, weighted by folder (the assistant's voice counts most: it is
the one that is heard), are coded and decoded. The criteria, and when they hold:

    step 0                                   adversarial.begin   + alone          run.steps
    ├── multi-scale mel, commitment [, distillation] ───────────────────────────────────┤
                                             ├── discriminators learn ──────────────────┤
                                                                 ├── and are listened to ┤

What is listened to is balanced by its gradient on the decoded sound. Codebook 0 comes from a frozen
semantic tokenizer, or, with `model.semantic` and `teacher`, by distillation. Rows keep a random
number of codebooks at times, so that one codec serves any bitrate. With `learn: decoder` the codes
of a finished codec stay, and the sound that is made of them gets better; further codebooks may join
them. The numbers of an
evaluation, and the checkpoint at the end, are those of a moving average of the weights.

    speechlm train codec configs/codec/tiny.yaml [run.steps=…]

Shapes: B batch, S samples, T frames, K codebooks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, Pcm
from audio_codec.discriminators import DiscriminatorConfig, Discriminators
from audio_codec.errors import UserError
from audio_codec.losses import (
    AdversarialLoss,
    Balancer,
    Distillation,
    MultiScaleMel,
    discriminator_loss,
    feature_matching,
    generator_loss,
)
from audio_codec.quantize import entropy_bits
from audio_codec.spectral import SpectralCodec, SpectralConfig, SpectralOutput
from speechlm import config as configs
from speechlm.convert import codec_folder, load_speech_tokenizer_of
from speechlm.evaluation import fidelity
from speechlm.training.run import Average, OptimizerConfig, Run, RunConfig, clip_gradients
from speechlm.training.teacher import Teacher, TeacherConfig, load_teacher
from synth_data import shards

Waveform = np.ndarray[Any, np.dtype[np.int16]]


class SourceConfig(BaseModel):
    """A folder of shards and how often it is drawn from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    weight: float = Field(1.0, gt=0)


class AdversarialConfig(BaseModel):
    """The second phase: discriminators, and how much they are listened to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: float = Field(0.5, ge=0)
    """When it begins: below 1 a share of the run's steps, else the number of a step."""
    alone: int = Field(100, ge=0)
    """Steps at the beginning in which the discriminators learn and are not listened to yet."""
    update_share: float = Field(1.0, gt=0, le=1)
    """Share of the steps after those in which the discriminators learn."""
    loss: AdversarialLoss = "hinge"
    mel: float = Field(2.0, gt=0)
    """Weight of the mel distance among the three; each is what it adds to the gradient's norm."""
    adversarial: float = Field(1.0, gt=0)
    features: float = Field(2.0, gt=0)
    """Of the distance between the discriminators' features."""
    discriminators: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, betas=(0.8, 0.99), weight_decay=0.0)
    """The discriminators'; its steps are those of this phase."""

    def first_step(self, steps: int) -> int:
        """The first step of the phase in a run of `steps`; ValueError when that is past its end."""
        first = int(self.begin * steps if self.begin < 1 else self.begin)
        if first >= steps:
            raise ValueError(f"adversarial.begin is step {first}, but run.steps ends at {steps}")
        return first


class TrainConfig(BaseModel):
    """A codec run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    tokenizer: str | None = None
    """The tokenizer that gives codebook 0: a checkpoint of it, or of a codec or model around it."""
    model: SpectralConfig = SpectralConfig()
    """`model.tokenizer` is taken from the tokenizer's checkpoint."""
    teacher: TeacherConfig | None = None
    """Who teaches codebook 0 where `model.semantic` is set; it takes the tokenizer's place."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: Path
    """Shards in the assistant's voice, with text."""
    validation_utterances: int = Field(24, gt=0)
    validation_codebooks: tuple[int, ...] = ()
    """Numbers of codebooks, codebook 0 among them, to measure beside all of them."""
    samples: int = Field(2, ge=0)
    """Held-out utterances whose sound and spectrogram go to TensorBoard."""
    batch: int = Field(16, gt=0)
    crop_frames: int = Field(15, gt=0)
    """Length of a crop in frames of 80 ms."""
    gain_db: tuple[float, float] = (-15.0, 3.0)
    mel_weight: float = 15.0
    envelope_weight: float = Field(0.0, ge=0)
    """Within the mel distance that is minimized, not in `mel_validation`: how much the error of
    each band's envelope counts; see `MultiScaleMel`."""
    commitment_weight: float = 1.0
    dropout_share: float = Field(0.25, ge=0, le=1)
    """Share of rows that keep only a random number of the residual codebooks, from none."""
    dropout_codebooks: tuple[int, ...] = ()
    """Numbers of codebooks, codebook 0 among them, of which such a row keeps one; a number that is
    there twice is drawn twice as often. Empty: all numbers alike."""
    bypass_share: float = Field(0.0, ge=0, le=1)
    """Share of rows that go around the residual quantizers."""
    adversarial: AdversarialConfig | None = None
    """None: the mel distance is the only criterion of the sound to the end."""
    ema: float = Field(0.99, ge=0, lt=1)
    """Decay of an average of the weights that is evaluated and saved in their place; 0: none."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-4, betas=(0.8, 0.99), weight_decay=0.01)
    init_from: str | None = None
    """A checkpoint of a codec, or of a model around one, to start from; where `model.codebooks` has
    more than it, those that it lacks are placed by the first batch, for a higher bitrate."""
    learn: Literal["all", "decoder"] = "all"
    """`decoder`: the codes of `init_from` stay as they are, so that a language model of them stays
    valid, and only what makes sound of them learns. `tokenizer`, `model`: those of `init_from`."""
    more_codebooks: tuple[PositiveInt, ...] = ()
    """With `learn: decoder`, sizes of residual codebooks beyond those of `init_from`, for a higher
    bitrate: placed by the first batch, they learn beside the decoder."""
    dtype: checkpoints.StoredType = "fp32"
    """How the weights of the finished checkpoint are stored."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `codec` in the run directory."""

    @model_validator(mode="after")
    def _one_semantic_source(self) -> TrainConfig:
        if self.learn == "decoder":
            return self  # What gives codebook 0 is in `init_from`.
        if self.model.semantic is None and self.tokenizer is None:
            raise ValueError(
                "tokenizer is missing: name one, or set model.semantic and teacher.model to "
                "distil codebook 0"
            )
        if self.model.semantic is None and self.teacher is not None:
            raise ValueError("teacher has nothing to teach: set model.semantic, or remove teacher")
        if self.model.semantic is not None and self.teacher is None:
            raise ValueError("model.semantic needs a teacher: set teacher.model, or remove it")
        if self.model.semantic is not None and self.tokenizer is not None:
            raise ValueError("tokenizer and model.semantic both give codebook 0: remove one")
        return self

    @model_validator(mode="after")
    def _codes_to_keep(self) -> TrainConfig:
        if self.learn == "decoder" and self.init_from is None:
            raise ValueError("learn: decoder keeps the codes of a codec; name it in init_from")
        for name in ("tokenizer", "teacher"):
            if self.learn == "decoder" and getattr(self, name) is not None:
                raise ValueError(f"learn: decoder takes {name} from init_from; leave {name} out")
        if self.more_codebooks and self.learn != "decoder":
            raise ValueError(
                "more_codebooks belongs to learn: decoder; else model.codebooks names them all"
            )
        return self

    @model_validator(mode="after")
    def _within_reach(self) -> TrainConfig:
        """Of a shape that `init_from` brings, `check_reach` is asked when it is known."""
        if self.learn == "all":
            self.check_reach()
        if self.adversarial is not None:
            self.adversarial.first_step(self.run.steps)
        return self

    def check_reach(self) -> None:
        """ValueError when the codec has fewer codebooks than are to be measured."""
        codebooks = 1 + len(self.model.codebooks)
        for name in ("validation_codebooks", "dropout_codebooks"):
            for number in getattr(self, name):
                if not 1 <= number <= codebooks:
                    raise ValueError(f"{name} has {number}, but the codec has 1 to {codebooks}")


def load_voiced(folder: Path, field: str = "sources") -> list[tuple[Waveform, str]]:
    """Every channel of every sample of a shard folder, as 16-bit sound, and whose voice it is.

    Raises UserError, which names the `field` of the folder, when there is none.
    """
    found = []
    for sample in shards.read(folder):
        if sample.pcm is not None:
            channels = [(channel.clip(-1, 1) * 32767).astype(np.int16) for channel in sample.pcm]
            found += list(zip(channels, sample.voices, strict=True))
    if not found:
        raise UserError(f"{field}: no sound in the shards of '{folder}'.")
    return found


def load_waveforms(folder: Path, field: str = "sources") -> list[Waveform]:
    """Every channel of every sample of a shard folder, as 16-bit sound."""
    return [sound for sound, _ in load_voiced(folder, field)]


def draw_crop(
    sound: Waveform, size: int, gain_db: tuple[float, float], rng: np.random.Generator
) -> Pcm:
    """A random crop [size] at a random level; a short sound gets silence around it."""
    # The crop may hang over either end: silence, onset and release are part of speech.
    first = int(rng.integers(-size // 4, max(1, len(sound) - 3 * size // 4)))
    piece = sound[max(0, first) : first + size].astype(np.float32) / 32768
    gain = 10 ** (rng.uniform(*gain_db) / 20)
    start = max(0, -first)
    crop = np.zeros(size, np.float32)
    crop[start : start + len(piece)] = piece * gain
    return crop


def draw_crops(
    sources: Sequence[tuple[float, list[Waveform]]], config: TrainConfig, rng: np.random.Generator
) -> Tensor:
    """A batch of random crops [B, 1, S]; short sounds get silence around them."""
    size = config.crop_frames * FRAME_SIZE
    weights = np.array([weight for weight, _ in sources])
    rows = []
    for _ in range(config.batch):
        sounds = sources[rng.choice(len(sources), p=weights / weights.sum())][1]
        sound = sounds[rng.integers(len(sounds))]
        rows.append(draw_crop(sound, size, config.gain_db, rng))
    return torch.from_numpy(np.stack(rows)[:, None])


@dataclass
class Batch:
    """What one step sees."""

    pcm: Tensor  # [B, 1, S]
    heard: Tensor | None  # what `Teacher.prepare` made of it


def draw_rows(config: TrainConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """How each row passes the residual quantizers.

    Returns how many of them it keeps [B] int, and whether it goes around all of them [B] bool.
    """
    residual = len(config.model.codebooks)
    kept = config.dropout_codebooks or range(1, residual + 2)
    depth = rng.choice(np.asarray(kept), config.batch) - 1
    depth[rng.random(config.batch) >= config.dropout_share] = residual
    return torch.from_numpy(depth), torch.from_numpy(rng.random(config.batch) < config.bypass_share)


class CodeCounts:
    """How often each code of each codebook was used since the last look."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.counts = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]

    def add(self, codes: Tensor) -> None:
        """Count codes [B, K, T]."""
        for counts, level in zip(self.counts, codes.unbind(1), strict=True):
            flat = level.flatten()
            counts.index_add_(0, flat, torch.ones_like(flat))

    def read(self) -> dict[str, float]:
        """Share of the codes in use, and perplexity, a codebook; starts anew."""
        found = {}
        for level, counts in enumerate(self.counts):
            found[f"usage/{level}"] = float((counts > 0).float().mean())
            found[f"perplexity/{level}"] = 2 ** entropy_bits(counts)
            counts.zero_()
        return found

    def load(self, counts: Sequence[Tensor]) -> None:
        """Go on from the `counts` of another."""
        for mine, theirs in zip(self.counts, counts, strict=True):
            mine.copy_(theirs)


class Objective(nn.Module):
    """Codec and distillation as one module, the way data-parallel wrappers want it."""

    def __init__(self, codec: SpectralCodec, teacher_width: int | None) -> None:
        super().__init__()
        self.codec = codec
        self.distillation: Distillation | None = None
        if teacher_width is not None:
            assert codec.config.semantic is not None, "a teacher needs a codebook to teach"
            self.distillation = Distillation(codec.config.semantic.dim, teacher_width)

    def forward(
        self, pcm: Tensor, depth: Tensor, bypass: Tensor, taught: Tensor | None
    ) -> tuple[SpectralOutput, Tensor]:
        """One pass over [B, 1, S], and how far codebook 0 is from the teacher's `taught`."""
        output = self.codec(pcm, depth, bypass)
        if self.distillation is None:
            return output, pcm.new_zeros(())
        return output, self.distillation(output.semantic, taught)


class Adversary:
    """The discriminators: how they learn, and what they tell the codec."""

    def __init__(self, config: AdversarialConfig, run: Run, strength: float) -> None:
        """`strength`: weight of the mel distance before this phase, see `Balancer`."""
        self.config, self.run = config, run
        self.begin = config.first_step(run.config.steps)
        self.bare = Discriminators(config.discriminators).to(run.device)
        weights = {
            "mel": config.mel, "adversarial": config.adversarial, "features": config.features
        }  # fmt: skip
        self.balancer = Balancer(weights, "mel", strength).to(run.device)
        optimizer = config.optimizer.build(self.bare)
        run.restore(self.bare, optimizer, "adversary")
        if (saved := run.load()) is not None and "adversary" in saved:
            self.balancer.load_state_dict(saved["adversary"]["balancer"])
        self.discriminators, self.optimizer = run.accelerator.prepare(self.bare, optimizer)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
        }

    def pull(
        self, step: int, decoded: Tensor, original: Tensor, mel: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The balanced gradient on `decoded` [B, S], a leaf, and numbers to log.

        `mel` is the distance of the two. Each discriminator hears either sound once: one pass both
        tells the codec and teaches the discriminator.
        """
        config, seed = self.config, self.run.config.seed
        alone = step < self.begin + config.alone
        drawn = np.random.default_rng((seed, 4, step)).random()
        learns = alone or drawn < config.update_share
        with torch.set_grad_enabled(learns):
            real = self.discriminators(original)
        made = self.discriminators(decoded)
        losses = {"mel": mel}
        if not alone:
            losses["adversarial"] = generator_loss(made, config.loss)
            losses["features"] = feature_matching(real, made)
        gradient = self.balancer(losses, decoded)
        del losses["mel"]
        if learns:
            losses["discriminator"] = discriminator_loss(real, made, config.loss)
            losses["discriminator_norm"] = self._learn(step, losses["discriminator"])
        return gradient, {name: value.detach() for name, value in losses.items()}

    def _learn(self, step: int, loss: Tensor) -> Tensor:
        rate = self.config.optimizer.rate(step - self.begin, self.run.config.steps - self.begin)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.run.accelerator.backward(loss, inputs=list(self.bare.parameters()))
        norm = clip_gradients(self.discriminators, self.config.optimizer.clip)
        self.run.update(self.optimizer, norm)
        return norm


def judge_sound(
    step: int,
    decoded: Tensor,
    original: Tensor,
    criterion: MultiScaleMel,
    strength: float,
    adversary: Adversary | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What to minimize about sound [B, S] at a step, and numbers to log: `mel` is the distance.

    `strength`: weight of the mel distance before the adversary's phase.
    """
    if adversary is None or step < adversary.begin:
        mel = criterion(decoded, original)
        return strength * mel, {"mel": mel.detach()}
    leaf = decoded.detach().requires_grad_()
    mel = criterion(leaf, original)
    gradient, told = adversary.pull(step, leaf, original, mel)
    # The sum is of no meaning, but of the right gradient.
    return (decoded * gradient).sum(), {"mel": mel.detach(), **told}


@torch.inference_mode()
def round_trips(
    codec: SpectralCodec, sounds: Sequence[Waveform], codebooks: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(original, decoded) of each sound, cut to whole frames, [S]; the codec must be in eval."""
    device, pairs = codec.up.weight.device, []
    for sound in sounds:
        samples = len(sound) // FRAME_SIZE * FRAME_SIZE
        pcm = torch.from_numpy(sound[:samples].astype(np.float32) / 32768).to(device)
        decoded = codec.decode(codec.encode(pcm[None, None])[:, :codebooks])
        pairs.append((pcm, decoded[0, 0]))
    return pairs


def mean_stoi(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean short-time objective intelligibility of decoded utterances (Taal et al., 2011), by this
    name; of those long enough for it, and nothing where none is.
    """
    found = [fidelity.stoi(a.cpu().numpy(), b.cpu().numpy()) for a, b in pairs]
    known = [value for value in found if value is not None]
    return {name: float(np.mean(known))} if known else {}


@torch.inference_mode()
def evaluate(
    codec: SpectralCodec, sounds: Sequence[Waveform], criterion: MultiScaleMel, config: TrainConfig
) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
    """Numbers on held-out utterances, and the (original, decoded) behind them."""
    pairs = round_trips(codec, sounds)
    found = mean_stoi("stoi_validation", pairs)
    found["mel_validation"] = float(np.mean([criterion(b[None], a[None]).item() for a, b in pairs]))
    for number in config.validation_codebooks:
        found |= mean_stoi(f"stoi_validation_{number}", round_trips(codec, sounds, number))
    return found, pairs


def picture(criterion: MultiScaleMel, sounds: Sequence[Tensor]) -> Tensor:
    """Log-mel spectrograms of sounds [S] of one length, below each other: [1, height, width]."""
    spectra = criterion.spectra(torch.stack(list(sounds)).float())[-1].transpose(1, 2).flip(1)
    rows = [(row / 11.5 + 1).clamp(0, 1) for row in spectra]  # e^−11.5: 100 dB below full scale
    line = torch.ones_like(rows[0][:2])
    return torch.cat([part for row in rows for part in (line, row)][1:])[None]


def show(
    run: Run, step: int, pairs: Sequence[tuple[Tensor, Tensor]], criterion: MultiScaleMel
) -> None:
    """Put (original, decoded) sounds [S] and their spectrograms into TensorBoard."""
    if run.tensorboard is None:
        return
    for number, pair in enumerate(pairs):
        for kind, pcm in zip(("original", "decoded"), pair, strict=True):
            pcm = pcm.clamp(-1, 1)[None]
            run.tensorboard.add_audio(f"sound/{number}/{kind}", pcm, step, SAMPLE_RATE)
        run.tensorboard.add_image(f"mel/{number}", picture(criterion, pair), step)


def _whole(config: TrainConfig) -> TrainConfig:
    """The config with the shape written out that a codec brings whose codes are kept."""
    if config.learn == "all":
        return config
    source = str(config.init_from)
    shape = configs.build(checkpoints.load(codec_folder(source)).config, SpectralConfig, source)
    codebooks = (*shape.codebooks, *config.more_codebooks)
    shape = shape.model_copy(update={"codebooks": codebooks})
    if "model" in config.model_fields_set and config.model != shape:  # a run's config.json has it
        raise UserError(
            "model is not that of init_from, which learn: decoder keeps; leave model out."
        )
    whole = config.model_copy(update={"model": shape})
    try:
        whole.check_reach()
    except ValueError as error:
        raise UserError(f"{error}.") from error
    return whole


def _further(codec: SpectralCodec, found: checkpoints.Checkpoint) -> dict[str, Tensor]:
    """The codec's own codebooks beyond those of a checkpoint."""
    there = len(checkpoints.parse_config(SpectralConfig, found).codebooks)
    return {
        f"quantizer.levels.{name}": tensor
        for name, tensor in codec.quantizer.levels.state_dict().items()
        if int(name.partition(".")[0]) >= there
    }


def _build(config: TrainConfig) -> SpectralCodec:
    shape, tokenizer = config.model, None
    if config.tokenizer is not None:
        tokenizer = load_speech_tokenizer_of(config.tokenizer)
        heard = {**shape.model_dump(), "tokenizer": tokenizer.config.model_dump()}
        shape = configs.build(heard, SpectralConfig, f"tokenizer '{config.tokenizer}'")
    codec = SpectralCodec(shape)
    if config.init_from is not None:
        found = checkpoints.load(codec_folder(config.init_from))
        found = dataclasses.replace(found, tensors={**_further(codec, found), **found.tensors})
        checkpoints.restore(codec, found)
    if codec.tokenizer is not None:
        if tokenizer is not None:
            codec.tokenizer.load_state_dict(tokenizer.state_dict())
        codec.tokenizer.requires_grad_(False)
    if config.learn == "decoder":
        codec.freeze_codes(len(shape.codebooks) - len(config.more_codebooks))
    return codec


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output_dir = config.output or config.run.dir / "codec"
    checkpoints.check_replaceable(output_dir)
    config = _whole(config)
    run = Run("codec", config.run, config, resume)
    codec = _build(config).to(run.device)
    teacher: Teacher | None = None
    if config.teacher is not None:
        teacher = load_teacher(config.teacher.model).to(run.device)
    # First what is soon read: a mistake in it shows before minutes are spent on the rest.
    held_out = load_waveforms(config.validation, "validation")[: config.validation_utterances]
    for source in config.sources:
        shards.shard_paths(source.path)
    sources = [(source.weight, load_waveforms(source.path)) for source in config.sources]
    criterion = MultiScaleMel(envelopes=config.envelope_weight).to(run.device)
    plain = MultiScaleMel().to(run.device)  # whose numbers compare with those of any run
    bare = Objective(codec, None if teacher is None else teacher.width).to(run.device)
    optimizer = config.optimizer.build(bare)
    run.restore(bare, optimizer)
    average = Average(codec, config.ema) if config.ema > 0 else None
    counts = CodeCounts([math.prod(factors) for factors in codec.codebooks], run.device)
    if (saved := run.load()) is not None:
        counts.load(saved["counts"])
        if average is not None and saved["average"]:
            average.load(saved["average"])
    adversary = None
    if config.adversarial is not None:
        adversary = Adversary(config.adversarial, run, config.mel_weight)
    objective, optimizer = run.accelerator.prepare(bare, optimizer)

    def state() -> dict[str, Any]:
        parts: dict[str, Any] = {
            "model": bare.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": {} if average is None else average.weights,
            "counts": counts.counts,
        }
        return parts if adversary is None else {**parts, "adversary": adversary.state()}

    def validate(step: int) -> dict[str, float]:
        if average is not None:
            average.swap(codec)
        codec.eval()
        found, pairs = evaluate(codec, held_out, plain, config)
        codec.train()
        if average is not None:
            average.swap(codec)
        show(run, step, pairs[: config.samples], criterion)
        return found

    def batch_of(step: int) -> Batch:
        # A process of its own stream each; the first has that of a run of one.
        rank = run.accelerator.process_index
        rng = np.random.default_rng((config.run.seed, step, rank)) if rank else run.rng(step)
        pcm = draw_crops(sources, config, rng)
        return Batch(pcm, None if teacher is None else teacher.prepare(pcm))

    def train_step(step: int, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; numbers to log."""
        rate = config.optimizer.rate(step, config.run.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pcm, taught = batch.pcm.to(run.device), None
        if teacher is not None and batch.heard is not None:
            with run.accelerator.autocast():
                taught = teacher(batch.heard.to(run.device), pcm.shape[-1])
        rows = draw_rows(config, np.random.default_rng((config.run.seed, 3, step)))
        depth, bypass = (row.to(run.device) for row in rows)
        output, distance = objective(pcm, depth, bypass, taught)
        decoded = output.pcm[:, 0]
        sound, told = judge_sound(step, decoded, pcm[:, 0], criterion, config.mel_weight, adversary)
        told["commitment"] = output.commitment.detach()
        loss = sound + config.commitment_weight * output.commitment
        if config.teacher is not None:
            loss = loss + config.teacher.weight * distance
            told["distillation"] = distance.detach()
        run.accelerator.backward(loss)
        norm = clip_gradients(objective, config.optimizer.clip)
        if run.update(optimizer, norm) and average is not None:
            average.update(codec, step)
        counts.add(output.codes)
        return {**told, "norm": norm}

    objective.train()
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batch_of, run.first_step)
        for step in run.steps(state, validate):
            batch = coming.result()
            coming = ahead.submit(batch_of, step + 1)
            told = train_step(step, batch)
            if (step + 1) % config.run.log_every == 0:
                numbers = {name: value.item() for name, value in told.items()}
                rate = config.optimizer.rate(step, config.run.steps)
                numbers |= {"lr": rate, "bad_gradients": run.bad_gradients}
                run.log(step, {**numbers, **counts.read()})
    if average is not None:
        average.swap(codec)
    card = {
        "trainee": "codec",
        "steps": run.done,
        "adversarial_steps": 0 if adversary is None else max(0, run.done - adversary.begin),
        "batch": config.batch,
        "crop_frames": config.crop_frames,
        "ema": config.ema,
        "learn": config.learn,
    }
    if run.main:
        weights = codec.state_dict()
        checkpoints.save(output_dir, codec.config, weights, dtype=config.dtype, card=card)
    run.accelerator.wait_for_everyone()
    return output_dir
