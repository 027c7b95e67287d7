"""Train the text-to-token model: what a text sounds like, in semantic codes.

Pairs of text and codes (shards of `speechlm synth pairs`) are held in memory, grouped by length and
learned by next-step prediction. Where word times are known, a share of the pairs is cut to a random
run of its words: the model will be asked for spans in the middle of a sentence. A share of what was
said so far is hidden from it, so that it learns to lean on the text.

    speechlm train text-to-token configs/text_to_token/tiny.yaml [run.steps=…]

Shapes: as in `synth_data.text_to_token`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer, same_coder
from speechlm.convert import load_speech_tokenizer_of
from speechlm.training.run import OptimizerConfig, Run, RunConfig, clip_gradients
from synth_data import shards
from synth_data.interleave import Segment, frame_range
from synth_data.text import Token, tokenize
from synth_data.text_to_token import (
    NO_DIGIT,
    GenerationConfig,
    Line,
    ShapeConfig,
    TextToToken,
    TextToTokenConfig,
    cells,
    clock,
    digits,
    expected_frames,
    fit_length,
    generate,
    transcribe,
)
from synth_data.tts import Word
from synth_data.verify import word_errors

_ROUND = 8  # positions; few lengths, since a CPU's kernels are compiled for each shape anew
_ROUND_STEPS = 256  # steps of a batch, likewise


class DataConfig(BaseModel):
    """What is trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[shards.Folder, ...] = Field(min_length=1)
    """Shard folders of pairs."""
    validation: tuple[shards.Folder, ...] = Field(min_length=1)
    batch_positions: PositiveInt = 8192
    """Positions in a batch, padding included."""
    max_seconds: float = Field(15.0, gt=0)
    """Longer pairs are left out."""
    cut: float = Field(0.5, ge=0, le=1)
    """Share of the pairs with word times of which only a run of words is learned."""
    cut_words: float = Field(10.0, ge=1)
    """Mean of the run's length, in words."""
    hide: float = Field(0.1, ge=0, lt=1)
    """Share of the steps that are hidden once they are said."""
    validation_pairs: PositiveInt = 128


class TrainConfig(BaseModel):
    """A text-to-token run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    tokenizer: str
    """The tokenizer of the pairs, or a codec or model around it: says how many codes there are, and
    reads back what the model says."""
    data: DataConfig
    model: ShapeConfig = ShapeConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, betas=(0.9, 0.95))
    generation: GenerationConfig = GenerationConfig()
    """How the validation texts are said."""
    dtype: checkpoints.StoredType = "bf16"
    """How the weights of the finished checkpoint are stored."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `text_to_token` in the run directory."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and its codes."""

    text: str
    codes: npt.NDArray[np.uint16]  # [T]
    tokens: tuple[Token, ...]
    """The text's words, to cut it at; none where their times are unknown."""
    words: tuple[Word, ...]

    def cut(self, first: int, last: int, rate: float) -> Pair:
        """The words `first..last` (exclusive) with the frames that hold them."""
        segment = Segment("speech", first, last)
        begin, end = frame_range(self.words, segment, rate, len(self.codes))
        text = self.text[self.tokens[first].start : self.tokens[last - 1].end]
        return Pair(text, self.codes[begin:end], (), ())


def load_pairs(
    folders: Sequence[shards.Location],
    size: int,
    max_seconds: float,
    tokenizer: tuple[float, ...] | None = None,
) -> list[Pair]:
    """All pairs that fit, in the order of the shards.

    Raises UserError where there is none, or codes of another tokenizer than one of `size` codes
    and, where it is known, this fingerprint.
    """
    found: list[Pair] = []
    for sample in (s for folder in folders for s in shards.read(folder, audio=False)):
        if sample.codes is None or not sample.text or sample.seconds > max_seconds:
            continue
        if not sample.codes.size:  # of text alone
            continue
        if sample.codes.shape[:2] != (1, 1) or int(sample.codes.max()) >= size:
            raise UserError(
                f"sample '{sample.id}' has codes of shape {sample.codes.shape} up to "
                f"{int(sample.codes.max())}; expected one channel and one codebook of {size}, as "
                "speechlm synth pairs makes them with the tokenizer of this run."
            )
        if not same_coder(sample.coded_by, tokenizer):
            raise UserError(
                f"sample '{sample.id}' has codes of another tokenizer than this run's: make its "
                "shards anew with speechlm synth pairs tokenizer=…"
            )
        tokens, words = tuple(tokenize(sample.text)), sample.words[0]
        if len(tokens) != len(words):
            tokens, words = (), ()
        found.append(Pair(sample.text, sample.codes[0, 0], tokens, words))
    if not found:
        where = ", ".join(map(str, folders))
        raise UserError(f"data: no pair of text and codes of up to {max_seconds} s in {where}.")
    return found


def cut_some(
    pairs: Sequence[Pair], config: DataConfig, rate: float, rng: np.random.Generator
) -> list[Pair]:
    """The pairs of an epoch: some whole, some cut to a run of their words."""
    chosen = []
    for pair in pairs:
        if pair.words and rng.random() < config.cut:
            count = min(len(pair.words), 1 + int(rng.poisson(config.cut_words - 1)))
            first = int(rng.integers(len(pair.words) - count + 1))
            pair = pair.cut(first, first + count, rate)
        chosen.append(pair)
    return chosen


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows, and the steps that are predicted from them."""

    rows: Tensor  # [B, P, W] int64
    clock: Tensor  # [B, P] float64
    index: Tensor  # [M] int64 into B·P
    steps: Tensor  # [M, D] int64

    def to(self, device: torch.device) -> Batch:
        """The same batch there."""
        return Batch(*(x.to(device) for x in (self.rows, self.clock, self.index, self.steps)))


def positions(pair: Pair, config: TextToTokenConfig) -> int:
    """Positions P that a pair takes: its cells, the start, its steps but the last."""
    return len(cells(pair.text, config.cell)) + 1 + len(pair.codes) // config.step


def collate(
    pairs: Sequence[Pair], model: TextToToken, hide: float, rng: np.random.Generator
) -> Batch:
    """Rows of pairs; a share `hide` of the steps stands in no input."""
    config, factors = model.config, model.factors
    longest = max(positions(pair, config) for pair in pairs)
    shape = (len(pairs), -(-longest // _ROUND) * _ROUND, model.width)
    rows = np.zeros(shape, np.int64)
    times = np.zeros(shape[:2])
    index: list[npt.NDArray[np.int64]] = []
    steps: list[npt.NDArray[np.int64]] = []
    for number, pair in enumerate(pairs):
        characters = cells(pair.text, config.cell)
        text = model.text_rows(characters)
        # The last step holds the end; nothing is learned behind it.
        count = len(pair.codes) // config.step + 1
        said = np.full((count * config.step, factors), NO_DIGIT, np.int64)
        said[: len(pair.codes)] = digits(pair.codes, config.codebook)
        said[len(pair.codes), 0] = model.end
        said = said.reshape(count, -1)
        heard = model.speech_rows(torch.from_numpy(said[:-1])).numpy()
        heard[rng.random(len(heard)) < hide] = 0
        start = len(text)
        rows[number, :start] = text
        rows[number, start] = model.start_row()
        rows[number, start + 1 : start + count] = heard
        pace = max(1, len(pair.codes)) / expected_frames(pair.text, config)
        times[number, :start] = pace * clock(characters, config)
        times[number, start : start + count] = np.arange(count) * config.step
        index.append(number * shape[1] + start + np.arange(count))
        steps.append(said)
    at, wanted = np.concatenate(index), np.concatenate(steps)
    more = -len(at) % _ROUND_STEPS
    return Batch(
        torch.from_numpy(rows),
        torch.from_numpy(times),
        torch.from_numpy(np.pad(at, (0, more))),
        torch.from_numpy(np.pad(wanted, ((0, more), (0, 0)), constant_values=NO_DIGIT)),
    )


class _Order:
    """Which pairs each step sees: a function of the seed, so a resume needs no state."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        config: TrainConfig,
        model: TextToToken,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pairs, self.config, self.model = pairs, config, model
        self.rank, self.world = rank, world
        self.epoch, self.first = -1, 0
        self.batches: list[list[Pair]] = []

    def batch(self, step: int) -> Batch:
        """This rank's batch of a step; steps must be asked for in rising order."""
        step = step * self.world + self.rank
        while step >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            rng = np.random.default_rng((self.config.run.seed, 1, self.epoch))
            data = self.config.data
            chosen = cut_some(self.pairs, data, self.model.config.rate, rng)
            self.batches = grouped(chosen, self.model.config, data.batch_positions, rng)
        rng = np.random.default_rng((self.config.run.seed, 2, step))
        return collate(self.batches[step - self.first], self.model, self.config.data.hide, rng)


def grouped(
    pairs: Sequence[Pair], config: TextToTokenConfig, budget: int, rng: np.random.Generator
) -> list[list[Pair]]:
    """Batches of up to `budget` positions: equals in length together, batches in random order."""
    sizes = np.array([-(-positions(pair, config) // _ROUND) * _ROUND for pair in pairs])
    # Shuffled first, so that a pair meets other neighbours in every epoch.
    order = rng.permutation(len(pairs))
    order = order[np.argsort(-sizes[order], kind="stable")]
    batches: list[list[Pair]] = []
    start = 0
    while start < len(order):
        count = max(1, budget // int(sizes[order[start]]))
        batches.append([pairs[at] for at in order[start : start + count]])
        start += count
    return [batches[at] for at in rng.permutation(len(batches))]


class Objective(nn.Module):
    """Model and loss as one module, the way data-parallel wrappers want it."""

    def __init__(self, model: TextToToken) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Mean nats a frame."""
        return self.model.loss(batch.rows, batch.clock, batch.index, batch.steps)


def evaluate(
    model: TextToToken,
    tokenizer: SpeechTokenizer,
    pairs: Sequence[Pair],
    config: TrainConfig,
) -> dict[str, float]:
    """Loss on held-out pairs; word error rate of what is said of their texts, read back."""
    device = model.table.device
    rng = np.random.default_rng(0)
    model.eval()
    losses, frames = 0.0, 0
    with torch.no_grad():
        for chosen in grouped(pairs, model.config, config.data.batch_positions, rng):
            batch = collate(chosen, model, 0.0, rng).to(device)
            count = sum(len(pair.codes) + 1 for pair in chosen)
            loss = model.loss(batch.rows, batch.clock, batch.index, batch.steps)
            losses, frames = losses + float(loss) * count, frames + count
    lines = [Line(pair.text, seed) for seed, pair in enumerate(pairs)]
    spoken = generate(model, lines, config.generation)
    model.train()
    texts = transcribe(tokenizer, [said.codes for said in spoken])
    errors = [word_errors(pair.text, text) for pair, text in zip(pairs, texts, strict=True)]
    return {
        "loss_validation": losses / frames,
        "wer_validation": sum(errors[1:], errors[0]).rate,
        "faults_validation": sum(said.fault is not None for said in spoken) / len(spoken),
    }


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output = config.output or config.run.dir / "text_to_token"
    checkpoints.check_replaceable(output)
    tokenizer = load_speech_tokenizer_of(config.tokenizer)
    transcribe(tokenizer, ())  # One that cannot read shows here, before the training.
    run = Run("text-to-token", config.run, config, resume)
    size, data = math.prod(tokenizer.codebook), config.data
    coder = tokenizer.fingerprint()
    pairs = load_pairs(data.train, size, data.max_seconds, coder)
    held_out = load_pairs(data.validation, size, data.max_seconds, coder)
    picks = np.random.default_rng(0).permutation(len(held_out))[: data.validation_pairs]
    held_out = [held_out[at] for at in sorted(picks)]
    # Of whole texts and of cut ones, in the shares in which they are learned.
    sample = cut_some(pairs, data, tokenizer.rate, np.random.default_rng(config.run.seed))
    shape = TextToTokenConfig(
        **config.model.model_dump(),
        codebook=tokenizer.codebook,
        rate=tokenizer.rate,
        length=fit_length((pair.text, len(pair.codes)) for pair in sample),
        tokenizer=config.tokenizer,
        coded_by=coder,
    )
    model = TextToToken(shape).to(run.device)
    tokenizer.to(run.device)
    optimizer = config.optimizer.build(model)
    run.restore(model, optimizer)
    objective, optimizer = run.accelerator.prepare(Objective(model), optimizer)
    order = _Order(pairs, config, model, run.rank, run.world)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    objective.train()
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(order.batch, run.first_step)
        for step in run.steps(state, lambda _: evaluate(model, tokenizer, held_out, config)):
            batch = coming.result()
            coming = ahead.submit(order.batch, step + 1)
            rate = config.optimizer.rate(step, config.run.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = objective(batch.to(run.device))
            run.accelerator.backward(loss)
            norm = clip_gradients(objective, config.optimizer.clip)
            run.update(optimizer, norm)
            if (step + 1) % config.run.log_every == 0:
                numbers = {"loss": loss.item(), "norm": norm.item(), "lr": rate}
                run.log(step, {**numbers, "bad_gradients": run.bad_gradients})
    card = {
        "trainee": "text-to-token",
        "steps": run.done,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs": len(pairs),
        "tokenizer": config.tokenizer,
    }
    if run.main:
        checkpoints.save(output, shape, model.state_dict(), dtype=config.dtype, card=card)
    run.accelerator.wait_for_everyone()
    return output
