"""Train the token decoder: what was said, as tokens, and whose voice it was → sound.

Random crops of single-channel sound, weighted by folder (the assistant's voice counts most: it is
the one that will speak), go through a frozen tokenizer. From what it says of them the flow network
learns their spectra; the vocoder learns their sound from the true spectra, at the same time and
apart: neither sees a gradient of the other's.

    crop ─┬─ tokenizer, frozen ═ codes ─ condition ─┬─ mean spectrum             | mean square
          │  voice: table, or another crop ─────────┴─ flow network ─ velocity   | mean square
          └─ log-mel ─┬─ with noise, at a random time of the path ──┘            |
                      └─ vocoder ─ sound                                         | multi-scale mel

A row's voice is a row of the table, or is told from another crop of the same voice by the prompt's
encoder. Some rows get neither tokens nor voice, which is what guidance is measured from, and as
many get no voice. With `adversarial` the vocoder has discriminators too, as the codec does. The
numbers of an evaluation, and the checkpoint at the end, are those of a moving average.

    speechlm train token-decoder configs/token_decoder/tiny.yaml [run.steps=…]

Shapes: B batch, S samples, T tokens, N positions, P numbers of a position, Q samples of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import SAMPLE_RATE, resample
from audio_codec.losses import MultiScaleMel
from audio_codec.speech_tokenizer import SpeechTokenizer, check_heads, encode_whole
from audio_codec.token_decoder import (
    AHEAD,
    BANDS,
    PATCH,
    TokenDecoder,
    TokenDecoderConfig,
    pack,
    path_time,
)
from speechlm import config as configs
from speechlm.convert import load_speech_tokenizer_of
from speechlm.training.codec import (
    AdversarialConfig,
    Adversary,
    SourceConfig,
    Waveform,
    draw_crop,
    judge_sound,
    load_voiced,
    mean_stoi,
    show,
)
from speechlm.training.run import Average, OptimizerConfig, Run, RunConfig, clip_gradients
from synth_data import shards


class TrainConfig(BaseModel):
    """A token decoder's run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    tokenizer: str
    """Whose tokens are spoken: a tokenizer's checkpoint, or that of a codec or model around one."""
    model: TokenDecoderConfig = TokenDecoderConfig()
    """`codebook`, `rate` and `fingerprint` are the tokenizer's, `voices` those of the sources."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: Path
    """Shards, best in the assistant's voice."""
    validation_utterances: int = Field(12, gt=0)
    samples: int = Field(2, ge=0)
    """Held-out utterances whose sound and spectrogram go to TensorBoard."""
    batch: int = Field(8, gt=0)
    crop_tokens: int = Field(40, gt=0)
    """Longest crop; one of each number of tokens down to a block less, so that a stream may end
    anywhere in a block."""
    vocoder_tokens: int = Field(15, gt=0)
    """The vocoder learns from the last so many tokens of a crop: it needs less sound than the flow,
    and no long past."""
    mean_weight: float = Field(1.0, ge=0)
    """Of the error of the mean spectrum, beside the flow's."""
    prompt_tokens: int = Field(20, gt=0)
    gain_db: tuple[float, float] = (0.0, 0.0)
    """No token tells a level: one that varies would be spoken at random."""
    prompt_share: float = Field(0.3, ge=0, le=1)
    """Share of rows whose voice is told by a prompt."""
    drop_share: float = Field(0.1, ge=0, le=0.5)
    """Share of rows that get neither tokens nor voice; as many again get no voice."""
    adversarial: AdversarialConfig | None = None
    """None: the mel distance is the vocoder's only criterion to the end."""
    ema: float = Field(0.995, ge=0, lt=1)
    """Decay of an average of the weights that is evaluated and saved in their place; 0: none."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=8e-4, betas=(0.9, 0.98), weight_decay=0.01)
    init_from: str | None = None
    """A checkpoint of a token decoder to start from."""
    dtype: checkpoints.StoredType = "fp32"
    """How the weights of the finished checkpoint are stored."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `token_decoder` in the run directory."""

    @model_validator(mode="after")
    def _within_reach(self) -> TrainConfig:
        if self.crop_tokens < self.model.block:
            raise ValueError(
                f"crop_tokens={self.crop_tokens} must be at least model.block={self.model.block}"
            )
        if self.adversarial is not None:
            self.adversarial.first_step(self.run.steps)
        return self


class Source:
    """Sounds of a folder, and who speaks in each."""

    def __init__(self, weight: float, voiced: Sequence[tuple[Waveform, str]]) -> None:
        self.weight, self.voiced = weight, voiced
        self.alike: dict[str, list[Waveform]] = {}
        for sound, voice in voiced:
            self.alike.setdefault(voice, []).append(sound)

    def draw(self, rng: np.random.Generator) -> tuple[Waveform, Waveform, str]:
        """A sound, one in the same voice (itself, if there is no other), and the voice."""
        sound, voice = self.voiced[int(rng.integers(len(self.voiced)))]
        alike = self.alike[voice]
        return sound, alike[int(rng.integers(len(alike)))], voice


def voice_name(voice: str) -> str:
    """A voice as the table has it: without the speed and pitch of the day."""
    return voice.partition("@")[0]


def voice_names(sources: Sequence[Source]) -> tuple[str, ...]:
    """The voices of the sources, the one that is drawn most often first."""
    heard: defaultdict[str, float] = defaultdict(float)
    for source in sources:
        for voice, sounds in source.alike.items():
            heard[voice_name(voice)] += source.weight * len(sounds) / len(source.voiced)
    return tuple(sorted(heard, key=lambda name: (-heard[name], name)))


@dataclass
class Batch:
    """What one step sees."""

    pcm: Tensor  # [B, 1, S + AHEAD]
    prompt: Tensor  # [B, 1, Q]
    voice: Tensor  # [B] int64 rows of the table
    prompted: Tensor  # [B] bool: the voice is the prompt's
    named: Tensor  # [B] bool: there is a voice
    heard: Tensor  # [B] bool: there are tokens
    time: Tensor  # [B] on the path
    noise: Tensor  # [B, N, P]

    def to(self, device: torch.device) -> Batch:
        """The same batch there."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw_batch(
    sources: Sequence[Source],
    config: TrainConfig,
    shape: TokenDecoderConfig,
    rng: np.random.Generator,
) -> Batch:
    """A batch of random crops and what is random about learning from them."""
    tokens = config.crop_tokens - int(rng.integers(shape.block))
    size, prompt_size = (shape.token_size * n for n in (tokens, config.prompt_tokens))
    weights = np.array([source.weight for source in sources])
    crops, prompts, voices = [], [], []
    for index in rng.choice(len(sources), config.batch, p=weights / weights.sum()):
        sound, other, voice = sources[index].draw(rng)
        crops.append(draw_crop(sound, size + AHEAD, config.gain_db, rng))
        prompts.append(draw_crop(other, prompt_size, config.gain_db, rng))
        voices.append(shape.voices.index(voice_name(voice)))
    chance = torch.from_numpy(rng.random(config.batch))
    # Evenly over the rows (arXiv 2107.00630): the loss differs much along the path.
    spread = (rng.random() + np.arange(config.batch) / config.batch) % 1
    noise = rng.standard_normal((config.batch, tokens * shape.ratio, PATCH * BANDS), np.float32)
    return Batch(
        torch.from_numpy(np.stack(crops)[:, None]),
        torch.from_numpy(np.stack(prompts)[:, None]),
        torch.tensor(voices),
        torch.from_numpy(rng.random(config.batch) < config.prompt_share),
        chance >= 2 * config.drop_share,
        chance >= config.drop_share,
        path_time(torch.from_numpy(spread.astype(np.float32))),
        torch.from_numpy(noise),
    )


class Objective(nn.Module):
    """Flow matching and vocoding as one module, the way data-parallel wrappers want it."""

    def __init__(self, decoder: TokenDecoder, vocoder_tokens: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.frames = vocoder_tokens * decoder.config.ratio * PATCH

    def forward(self, batch: Batch, codes: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Errors of velocity and mean, and what the vocoder makes of each crop's end [B, 1, S'].

        `codes` [B, T] are those of the crops, `prompt` those of the prompts.
        """
        decoder = self.decoder
        mel = decoder.spectrum(batch.pcm)
        imitated = decoder.imitate(batch.prompt, prompt)
        voice = torch.where(batch.prompted[:, None], imitated, decoder.table(batch.voice))
        condition, mean = decoder.foresee(decoder.encode(codes), voice * batch.named[:, None])
        condition = condition * batch.heard[:, None, None]
        target = pack(mel)
        off = (mean - target).square().mean((1, 2))
        expected = (off * batch.heard).sum() / batch.heard.sum().clamp(min=1)
        x = torch.lerp(batch.noise, target, batch.time[:, None, None])
        velocity = decoder.flow(x, batch.time, condition)
        error = F.mse_loss(velocity, target - batch.noise)
        return error, expected, decoder.vocoder(mel[:, -self.frames :])


def tokenize(tokenizer: SpeechTokenizer, pcm: Tensor) -> Tensor:
    """Codes [B, T] of whole sounds [B, 1, S] at 24 kHz, in whole tokens."""
    heard = resample(pcm.cpu().numpy(), SAMPLE_RATE, tokenizer.sample_rate)
    return encode_whole(tokenizer, torch.from_numpy(heard).to(pcm.device))


@torch.inference_mode()
def speak_again(
    decoder: TokenDecoder, tokenizer: SpeechTokenizer, voiced: Sequence[tuple[Waveform, str]]
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(original, vocoder's) and (original, from tokens alone) of each sound, [S].

    The voice is the table's, or imitated from the sound itself where the table lacks it.
    """
    device, size = decoder.table.weight.device, decoder.config.token_size
    vocoded, spoken = [], []
    for sound, voice in voiced:
        samples = len(sound) // size * size
        pcm = torch.from_numpy(sound[:samples].astype(np.float32) / 32768).to(device)[None, None]
        codes = tokenize(tokenizer, pcm)
        name = voice_name(voice)
        known = name in decoder.config.voices
        speaker = decoder.voice(name)[None] if known else decoder.imitate(pcm, codes)
        vocoded.append((pcm[0, 0], decoder.vocoder(decoder.spectrum(F.pad(pcm, (0, AHEAD))))[0, 0]))
        spoken.append((pcm[0, 0], decoder.decode(codes, voice=speaker)[0, 0]))
    return vocoded, spoken


def start_from(decoder: TokenDecoder, name_or_path: str) -> None:
    """Take over the weights that `init_from` names, those of a voice where it has one of that name.

    Raises UserError when they do not fit.
    """
    found = checkpoints.load(name_or_path)
    theirs = checkpoints.parse_config(TokenDecoderConfig, found)
    check_heads(decoder.config.heads, theirs.heads, found.path)
    known = found.tensors.get("table.weight")
    if known is not None and known.shape[1] == decoder.config.dim:
        table = decoder.table.weight.detach().cpu().clone()
        for row, voice in enumerate(decoder.config.voices):
            if voice in theirs.voices:
                table[row] = known[theirs.voices.index(voice)]
        found = dataclasses.replace(found, tensors={**found.tensors, "table.weight": table})
    checkpoints.restore(decoder, found)


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output_dir = config.output or config.run.dir / "token_decoder"
    checkpoints.check_replaceable(output_dir)
    run = Run("token decoder", config.run, config, resume)
    tokenizer = load_speech_tokenizer_of(config.tokenizer).to(run.device)
    held_out = load_voiced(config.validation, "validation")[: config.validation_utterances]
    for source in config.sources:
        shards.shard_paths(source.path)
    sources = [Source(source.weight, load_voiced(source.path)) for source in config.sources]
    taken = {
        "codebook": tokenizer.codebook,
        "rate": tokenizer.rate,
        "fingerprint": tokenizer.fingerprint(),
        "voices": voice_names(sources),
    }
    shape = configs.build({**config.model.model_dump(), **taken}, TokenDecoderConfig, "model")
    decoder = TokenDecoder(shape).to(run.device)
    if config.init_from is not None:
        start_from(decoder, config.init_from)
    criterion = MultiScaleMel().to(run.device)
    bare = Objective(decoder, config.vocoder_tokens)
    optimizer = config.optimizer.build(bare)
    run.restore(bare, optimizer)
    average = Average(decoder, config.ema) if config.ema > 0 else None
    if (saved := run.load()) is not None and average is not None and saved["average"]:
        average.load(saved["average"])
    adversary = None
    if config.adversarial is not None:
        adversary = Adversary(config.adversarial, run, strength=1.0)
    objective, optimizer = run.accelerator.prepare(bare, optimizer)

    def state() -> dict[str, Any]:
        parts: dict[str, Any] = {
            "model": bare.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": {} if average is None else average.weights,
        }
        return parts if adversary is None else {**parts, "adversary": adversary.state()}

    def validate(step: int) -> dict[str, float]:
        if average is not None:
            average.swap(decoder)
        decoder.eval()
        found = {}
        vocoded, spoken = speak_again(decoder, tokenizer, held_out)
        for name, pairs in (("vocoder", vocoded), ("tokens", spoken)):
            distances = [criterion(b[None], a[None]).item() for a, b in pairs]
            found[f"mel_{name}_validation"] = float(np.mean(distances))
            found |= mean_stoi(f"stoi_{name}_validation", pairs)
        decoder.train()
        if average is not None:
            average.swap(decoder)
        show(run, step, spoken[: config.samples], criterion)
        return found

    def batch_of(step: int) -> Batch:
        # A process of its own stream each; the first has that of a run of one.
        rank = run.accelerator.process_index
        rng = np.random.default_rng((config.run.seed, step, rank)) if rank else run.rng(step)
        return draw_batch(sources, config, shape, rng)

    def train_step(step: int, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; numbers to log."""
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.rate(step, config.run.steps)
        batch = batch.to(run.device)
        pcm = batch.pcm[..., :-AHEAD]
        with torch.no_grad(), run.accelerator.autocast():
            codes, prompt = (tokenize(tokenizer, sound) for sound in (pcm, batch.prompt))
        flow, expected, decoded = objective(batch, codes, prompt)
        decoded, original = decoded[:, 0], pcm[:, 0, -decoded.shape[-1] :]
        sound, told = judge_sound(step, decoded, original, criterion, 1.0, adversary)
        run.accelerator.backward(flow + config.mean_weight * expected + sound)
        norm = clip_gradients(objective, config.optimizer.clip)
        if run.update(optimizer, norm) and average is not None:
            average.update(decoder, step)
        return {"flow": flow.detach(), "mean": expected.detach(), **told, "norm": norm}

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
                run.log(step, {**numbers, "lr": rate, "bad_gradients": run.bad_gradients})
    if average is not None:
        average.swap(decoder)
    card = {
        "trainee": "token decoder",
        "tokenizer": config.tokenizer,
        "steps": run.done,
        "adversarial_steps": 0 if adversary is None else max(0, run.done - adversary.begin),
        "batch": config.batch,
        "crop_tokens": config.crop_tokens,
        "ema": config.ema,
    }
    if run.main:
        checkpoints.save(output_dir, shape, decoder.state_dict(), dtype=config.dtype, card=card)
    run.accelerator.wait_for_everyone()
    return output_dir
