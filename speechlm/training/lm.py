"""Train the language model, in one stage or in several that start from each other's checkpoint.

A step takes one batch of each source (conversations, the facts as text, …), in fixed shares; its
loss is the mean of theirs, weighted by share.

    speechlm train lm configs/lm/shipped.yaml [run.steps=…] [init_from=…]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.codec import load_codec
from audio_codec.errors import UserError
from audio_codec.files import replacing
from audio_codec.transformer import TransformerConfig
from speechlm import convert
from speechlm.data import (
    Mixture,
    Source,
    TextTokenizer,
    WeightConfig,
    shares_of,
    train_text_tokenizer,
)
from speechlm.model import Batch, LMConfig, LMSampling, LossConfig, Losses, SpeechLM
from speechlm.streams import ABSENT, Streams
from speechlm.training.run import Average, OptimizerConfig, Run, RunConfig, clip_gradients
from synth_data import quiz
from synth_data.mixture import GuardConfig
from synth_data.text import sentences_from


class ShapeConfig(BaseModel):
    """Shape of the model, apart from what the codec and the text pieces decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temporal: TransformerConfig = TransformerConfig(
        dim=512, layers=8, heads=8, hidden=1024, window=750
    )
    depth: TransformerConfig = TransformerConfig(dim=256, layers=4, heads=4, hidden=512)
    heard: bool = True
    """Whether it writes down what the user says."""
    acoustic_delay: int = Field(1, ge=0)
    """Frames of 80 ms; each adds as much to the latency."""


class TextConfig(BaseModel):
    """What the text pieces are learned from, when no checkpoint brings its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab: PositiveInt = 2000
    quiz: int = Field(40_000, ge=0)
    """Sentences of the quiz world."""
    files: tuple[Path, ...] = ()
    """Text files beside it, one sentence a line."""


class TrainConfig(BaseModel):
    """A language-model run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    codec: str
    """The codec of the shards; it says how many codes there are."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """What a step is made of; `rows` are the shares."""
    guard: GuardConfig = GuardConfig()
    """The least of the sources, by rows, that people must have made."""
    validation: tuple[Source, ...] = ()
    validation_batches: PositiveInt = 4
    length: PositiveInt = 750
    """Columns in a row."""
    model: ShapeConfig = ShapeConfig()
    text: TextConfig = TextConfig()
    weights: WeightConfig = WeightConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=8e-4, betas=(0.9, 0.95))
    heard_mask: float = Field(0.1, ge=0, le=1)
    """Share of the transcript that is hidden from the input where the user's voice is there too:
    what the model writes down may be wrong, so it must not lean on that alone."""
    user_mask: float = Field(0.0, ge=0, le=1)
    """Share of the rows in which of the user's voice only the semantic codes are seen: they are
    alike from one voice to the next, where the acoustic ones let a small corpus be memorized."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an average of the weights that is evaluated and saved in their place; 0: none."""
    compile: bool = False
    """Compile the transformer blocks: minutes at the start, about a quarter faster after it."""
    init_from: str | None = None
    """A language-model checkpoint to start from; brings shape and text pieces along."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `lm` in the run directory."""
    dtype: checkpoints.StoredType = "bf16"
    """How it is stored."""
    sampling: LMSampling = LMSampling()
    """How the finished model is drawn by default."""


class Objective(nn.Module):
    """Model and loss as one module, the way data-parallel wrappers want it."""

    def __init__(self, model: SpeechLM, config: LossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch) -> Losses:
        """Loss of a batch."""
        return self.model.loss(batch, self.config)


def mask_heard(batch: Batch, streams: Streams, share: float, rng: np.random.Generator) -> Batch:
    """Hide a share of the `heard` inputs in columns that have the user's codes."""
    if not streams.heard or share == 0:
        return batch
    inputs = batch.inputs.clone()
    heard, voiced = inputs[:, streams.heard_index], inputs[:, streams.user.start] != ABSENT
    hidden = torch.from_numpy(rng.random(heard.shape) < share).to(heard.device) & voiced
    inputs[:, streams.heard_index] = heard.masked_fill(hidden, ABSENT)
    return replace(batch, inputs=inputs)


def mask_user(batch: Batch, streams: Streams, share: float, rng: np.random.Generator) -> Batch:
    """Hide the user's acoustic codes in a share of the rows."""
    if share == 0:
        return batch
    inputs = batch.inputs.clone()
    hidden = torch.from_numpy(rng.random(len(inputs)) < share).to(inputs.device)
    acoustic = inputs[:, streams.user.start + 1 : streams.user.stop]
    acoustic[hidden] = ABSENT
    return replace(batch, inputs=inputs)


def make_tokenizer(config: TextConfig, seed: int) -> TextTokenizer:
    """Learn the text pieces of a new model. Raises UserError when there is no text."""
    texts = quiz.sentences("train", config.quiz, seed)
    for file in config.files:
        texts += sentences_from(file)
    if not texts:
        raise UserError(
            "text: quiz is 0 and files is empty; there is nothing to learn pieces from."
        )
    return train_text_tokenizer(texts, config.vocab)


def build(config: TrainConfig, run_dir: Path, resume: bool) -> tuple[SpeechLM, TextTokenizer]:
    """The model to train and its text pieces. Raises UserError when codec and model disagree."""
    codebooks = load_codec(config.codec).codebooks
    if config.init_from is not None:
        source, tokenizer = convert.load_lm(config.init_from)
        if source.streams.codebooks != codebooks:
            raise UserError(
                f"codec '{config.codec}' has codebooks {codebooks}, but init_from "
                f"'{config.init_from}' was trained on {source.streams.codebooks}."
            )
        shape = source.config.model_copy(
            update={"codec": config.codec, "sampling": config.sampling}
        )
        model = SpeechLM(shape)
        model.load_state_dict(source.state_dict())
        return model.train(), tokenizer
    kept = run_dir / convert.TEXT_MODEL
    if resume and kept.exists():
        tokenizer = TextTokenizer(kept.read_bytes())
    else:
        tokenizer = make_tokenizer(config.text, config.run.seed)
        with replacing(kept) as temporary:
            temporary.write_bytes(tokenizer.model)
    streams = Streams(
        text_size=tokenizer.size,
        codebooks=codebooks,
        heard=config.model.heard,
        acoustic_delay=config.model.acoustic_delay,
    )
    shape = LMConfig(
        streams=streams,
        temporal=config.model.temporal,
        depth=config.model.depth,
        codec=config.codec,
        sampling=config.sampling,
    )
    return SpeechLM(shape), tokenizer


def _named(sources: Sequence[Source]) -> list[str]:
    """A name for the numbers of each source: its kind, told apart where there are several."""
    kinds = [source.kind for source in sources]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:place].count(kind)}"
        for place, kind in enumerate(kinds)
    ]


class _Meter:
    """Means of what was measured since the last look."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, prefix: str, parts: dict[str, Tensor]) -> None:
        for key, value in parts.items():
            name = f"{prefix}/{key}"
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data."""
    output = config.output or config.run.dir / "lm"
    checkpoints.check_replaceable(output)
    if config.guard.asks:  # Shards without an index are read for it.
        config.guard.check(shares_of(config.sources), "sources")
    run = Run("lm", config.run, config, resume)
    model, tokenizer = build(config, run.dir, resume)

    def mixture(sources: Sequence[Source], rank: int) -> Mixture:
        return Mixture(
            sources,
            model.streams,
            tokenizer,
            config.weights,
            length=config.length,
            seed=config.run.seed,
            rank=rank,
        )

    data = mixture(config.sources, run.accelerator.process_index)
    names, held_out_names = _named(config.sources), _named(config.validation)
    held_out = []
    if config.validation:
        unseen = mixture(config.validation, 0)
        held_out = [unseen.next() for _ in range(config.validation_batches)]
    model.to(run.device)  # before anything copies its weights
    optimizer = config.optimizer.build(model)
    run.restore(model, optimizer)
    average = Average(model, config.ema) if config.ema > 0 else None
    if (saved := run.load()) is not None:
        data.load_state_dict(saved["data"])
        if average is not None and saved["average"]:
            average.load(saved["average"])
    if config.compile:
        for block in (*model.temporal.blocks, *model.depth.transformer.blocks):
            block.compile()
    objective, optimizer = run.accelerator.prepare(Objective(model, config.loss), optimizer)

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "data": data.state_dict(),
            "average": {} if average is None else average.weights,
        }

    def evaluate(step: int) -> dict[str, float]:
        meter = _Meter()
        if average is not None:
            average.swap(model)
        objective.eval()
        # Compiling the forward alone would take longer than this does.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batches in held_out:
                for name, (_, batch) in zip(held_out_names, batches, strict=True):
                    meter.add(f"validation/{name}", objective(batch.to(run.device)).parts)
        objective.train()
        if average is not None:
            average.swap(model)
        return meter.read()

    def train_step(step: int) -> tuple[float, dict[str, dict[str, Tensor]]]:
        """One update of the weights; the gradient's norm and the numbers of each source."""
        rate = config.optimizer.rate(step, config.run.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts, rng = {}, run.rng(step)
        for name, (share, batch) in zip(names, data.next(), strict=True):
            seen = mask_heard(batch.to(run.device), model.streams, config.heard_mask, rng)
            seen = mask_user(seen, model.streams, config.user_mask, rng)
            losses = objective(seen)
            run.accelerator.backward(share * losses.total)
            parts[name] = losses.parts
        norm = clip_gradients(objective, config.optimizer.clip).item()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(model, step)
        return norm, parts

    meter, began, columns = _Meter(), time.monotonic(), 0
    objective.train()
    for step in run.steps(state, evaluate if held_out else None):
        norm, parts = train_step(step)
        columns += config.length * sum(source.rows for source in config.sources)
        for name, numbers in parts.items():
            meter.add(name, numbers)
        if (step + 1) % config.run.log_every == 0:
            spent = time.monotonic() - began
            rate = config.optimizer.rate(step, config.run.steps)
            speed = columns / spent
            run.log(step, {**meter.read(), "norm": norm, "lr": rate, "columns_per_second": speed})
            began, columns = time.monotonic(), 0
    if average is not None:
        average.swap(model)
    card = {
        "trainee": "lm",
        "steps": run.done,
        "parameters": sum(p.numel() for p in model.parameters()),
        "codec": config.codec,
        "init_from": config.init_from,
        "sources": [source.model_dump(mode="json") for source in config.sources],
        "rows": sum(source.rows for source in config.sources),
        "length": config.length,
    }
    return convert.save(output, model, tokenizer, dtype=config.dtype, card=card)
