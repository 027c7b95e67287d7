"""Train the language model, in one stage or in several that start from each other's checkpoint.

A step takes one batch of each source (conversations, the facts as text, …), in fixed shares; its
loss is the mean of theirs, weighted by share.

    speechlm train lm configs/lm/shipped.yaml [run.steps=…] [init_from=…]
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, SAMPLE_RATE
from audio_codec.codec import load_codec
from audio_codec.errors import UserError
from audio_codec.files import replacing
from audio_codec.transformer import TransformerConfig
from speechlm import convert, generate
from speechlm.data import (
    Mixture,
    Placed,
    Source,
    TextTokenizer,
    WeightConfig,
    together,
    train_text_tokenizer,
)
from speechlm.model import Batch, LMConfig, LMSampling, LossConfig, SpeechLM
from speechlm.streams import ABSENT, Streams
from speechlm.training import distributed
from speechlm.training.loader import Loader
from speechlm.training.objective import Meter, Objective, cut, masses, summed
from speechlm.training.optimize import Average, OptimizerConfig, clip_gradients, recompute
from speechlm.training.run import Run, RunConfig
from speechlm.training.work import Counts, body_parameters, peak_flops, work
from synth_data import quiz
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
    average_from: float | None = Field(None, ge=0, lt=1)
    """Share of the steps from which on the weights at every save are averaged evenly; the mean is
    evaluated and saved in their place. For a curriculum, whose best data comes last: a rate that
    has decayed by then wastes it, a mean of checkpoints does what the decay is for."""
    accumulate: PositiveInt = 1
    """Pieces in which the rows of a source are gone through, for less memory; the numbers stay."""
    recompute: bool = False
    """Compute activations of the temporal transformer again in the backward pass."""
    lookahead: NonNegativeInt = 0
    """Documents to choose from when a row has little room left."""
    ahead: NonNegativeInt = 2
    """Batches that are made in the background; 0 makes each when it is asked for."""
    listen_every: NonNegativeInt = 0
    """Steps between sounds in TensorBoard, an answer to a held-out user; 0 makes none."""
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

    @model_validator(mode="after")
    def _one_average(self) -> TrainConfig:
        if self.ema > 0 and self.average_from is not None:
            raise ValueError("ema and average_from are two averages of the weights; choose one")
        return self

    def averages(self, step: int) -> bool:
        """Whether the weights after a step go into the even mean."""
        done = step + 1
        return (
            self.average_from is not None
            and done % self.run.save_every == 0
            and done > self.average_from * self.run.steps
        )


LISTEN_FRAMES = 100


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


def build(
    config: TrainConfig,
    run_dir: Path,
    resume: bool,
    scattered: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[SpeechLM, TextTokenizer]:
    """The model to train and its text pieces; it is made inside `scattered()`.

    Raises UserError when codec and model disagree.
    """
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
        with scattered():
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
    with scattered():
        return SpeechLM(shape), tokenizer


def _named(sources: Sequence[Source]) -> list[str]:
    """A name for the numbers of each source: its kind, told apart where there are several."""
    kinds = [source.kind for source in sources]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:place].count(kind)}"
        for place, kind in enumerate(kinds)
    ]


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data.

    Under `torchrun` or `accelerate launch` with several processes the model is sharded over them
    (FSDP2); the numbers stay those of one process.
    """
    output = config.output or config.run.dir / "lm"
    checkpoints.check_replaceable(output)
    run = Run("lm", config.run, config, resume, sharded=True)
    if config.listen_every and run.mesh is not None:
        raise UserError("listen_every is for runs of one process; leave it 0.")
    model, tokenizer = build(config, run.dir, resume, run.scattered)
    streams, amount = model.streams, work(model, config.length)
    schedule = config.optimizer.proposed(body_parameters(model))
    run.record(config.model_copy(update={"optimizer": schedule}))

    def mixture(sources: Sequence[Source], rank: int, world: int) -> Mixture:
        return Mixture(
            sources,
            streams,
            tokenizer,
            config.weights,
            length=config.length,
            seed=config.run.seed,
            rank=rank,
            world=world,
            lookahead=config.lookahead,
        )

    source = mixture(config.sources, run.rank, run.world)
    exposures = source.exposures(config.run.steps)
    if run.main:
        for one in exposures:
            run.console.print(f"{one.path}: {one.samples} samples, seen {one.epochs:.2g} times")
    names, held_out_names = _named(config.sources), _named(config.validation)
    held_out = []
    if config.validation:
        unseen = mixture(config.validation, 0, 1)
        held_out = [unseen.next() for _ in range(config.validation_batches)]
    listener = _listener(model, config, held_out) if config.listen_every else None

    model.to(run.device)  # before anything copies its weights
    if config.recompute:
        recompute(model.temporal.blocks)
    objective = Objective(model, config.loss, sharded=run.mesh is not None)
    if run.mesh is not None:
        distributed.shard(objective, [*model.temporal.blocks], run.mesh)
    optimizer = schedule.build(model)
    average = None
    if config.ema > 0 or config.average_from is not None:
        average = Average(model, config.ema)
    if config.compile:
        for block in (*model.temporal.blocks, *model.depth.transformer.blocks):
            block.compile()
    loader = Loader(source, config.ahead)
    counts = {"averaged": 0, "bad_gradients": 0}

    def go_on() -> None:
        """Take up the state of the last checkpoint, if there is one."""
        run.restore(model, optimizer)
        if (saved := run.load()) is not None:
            loader.load_state_dict(saved["data"])
            counts.update(saved.get("counts", {}))
            if average is not None:
                begun = {name: p.detach() for name, p in model.named_parameters()}
                average.load(saved["average"] or begun)

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "data": together(distributed.collect(loader.state_dict())),
            "average": {} if average is None else average.weights,
            "counts": dict(counts),
        }

    def averaged() -> bool:
        return average is not None and (config.ema > 0 or counts["averaged"] > 0)

    def evaluate(step: int) -> dict[str, float]:
        meter = Meter()
        if average is not None and averaged():
            average.swap(model)
        objective.eval()
        # Compiling the forward alone would take longer than this does.
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            run.accelerator.autocast(),
        ):
            for batches in held_out:
                total = 0.0
                for name, (share, batch) in zip(held_out_names, batches, strict=True):
                    loss, parts = objective(batch.to(run.device))
                    meter.add(f"validation/{name}", parts)
                    total += share * float(loss)
                meter.add("validation", {"loss": total})
        objective.train()
        if average is not None and averaged():
            average.swap(model)
        return meter.read()

    def train_step(step: int) -> tuple[float, float, dict[str, dict[str, float]], Counts]:
        """One update of the weights; gradient norm, loss, numbers of each source, what it saw."""
        rate, rng = schedule.rate(step, config.run.steps), run.rng(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = loader.next()
        saw = sum((Counts.of(batch, streams) for _, batch in batches), Counts())
        if run.passes_over(step):
            return 0.0, math.nan, {}, saw
        own = [masses(batch, streams) for _, batch in batches]
        whole = [summed(parts) for parts in zip(*distributed.collect(own), strict=True)]
        numbers: dict[str, dict[str, float]] = {}
        for name, (share, batch), mass in zip(names, batches, whole, strict=True):
            seen = mask_heard(batch, streams, config.heard_mask, rng)
            seen = mask_user(seen, streams, config.user_mask, rng)
            found = numbers[name] = {"loss": 0.0}
            for piece in cut(seen, config.accumulate):
                has = masses(piece, streams)
                shares = {kind: has[kind] / mass[kind] if mass[kind] else 0.0 for kind in mass}
                with run.accelerator.autocast():
                    loss, parts = objective(piece.to(run.device), shares)
                if loss.requires_grad:
                    (share * loss).backward()
                for key, value in {"loss": loss.detach(), **parts}.items():
                    found[key] = found.get(key, 0.0) + float(value)
        if run.mesh is not None:
            distributed.drop_untouched(objective)
        norm = clip_gradients(objective, schedule.clip).item()
        if math.isfinite(norm):
            optimizer.step()
        else:
            counts["bad_gradients"] += 1
        optimizer.zero_grad()
        shares_of = zip(names, batches, strict=True)
        mean = sum(share * numbers[name]["loss"] for name, (share, _) in shares_of)
        return norm, sum(distributed.collect(mean)), numbers, saw

    meter, began, saw = Meter(), time.monotonic(), Counts()
    go_on()
    objective.train()
    with loader:
        for step in run.steps(state, evaluate if held_out else None):
            norm, loss, numbers, seen = train_step(step)
            if not run.passes_over(step):
                if run.spiked(step, loss):
                    go_on()
                    meter, began, saw = Meter(), time.monotonic(), Counts()
                    continue
                if average is not None and config.ema > 0 and math.isfinite(norm):
                    average.update(model, step)
                for name, found in numbers.items():
                    meter.add(name, found)
            if average is not None and config.averages(step):
                counts["averaged"] += 1
                average.add(model, counts["averaged"])
            saw = saw + seen
            if (step + 1) % config.run.log_every == 0:
                spent = time.monotonic() - began
                done = amount.training(saw.columns, saw.frames)
                share = done / spent / peak_flops(run.device, config.run.precision)
                pace = run.world / spent  # every rank counts its own rows
                run.log(
                    step,
                    {
                        "loss": loss,
                        **meter.read(together=run.mesh is not None),
                        "norm": norm,
                        "lr": schedule.rate(step, config.run.steps),
                        "bad_gradients": counts["bad_gradients"],
                        "columns_per_second": saw.columns * pace,
                        "tokens_per_second": saw.tokens * pace,
                        "audio_hours_per_second": saw.audio / FRAME_RATE / 3600 * pace,
                        "mfu": share,
                        "loader_busy": loader.busy(),
                    },
                )
                began, saw = time.monotonic(), Counts()
            if listener is not None and (step + 1) % config.listen_every == 0:
                with torch.compiler.set_stance("force_eager"):
                    run.play(step, "validation/voice", listener(), SAMPLE_RATE)
    if average is not None and averaged():
        average.swap(model)
    card = {
        "trainee": "lm",
        "steps": run.done,
        "parameters": sum(p.numel() for p in model.parameters()),
        "body_parameters": body_parameters(model),
        "codec": config.codec,
        "init_from": config.init_from,
        "sources": [source.model_dump(mode="json") for source in config.sources],
        "rows": sum(source.rows for source in config.sources),
        "length": config.length,
    }
    if run.mesh is not None:
        model = _whole(model)
    if run.main:
        convert.save(output, model, tokenizer, dtype=config.dtype, card=card)
    run.accelerator.wait_for_everyone()
    return output


def _whole(model: SpeechLM) -> SpeechLM:
    """A sharded model on the CPU of rank 0; elsewhere an empty one."""
    weights = distributed.gather(model)
    with torch.device("meta"):
        whole = SpeechLM(model.config)
    if weights:
        whole.load_state_dict(weights, assign=True)
    return whole


def _listener(
    model: SpeechLM, config: TrainConfig, held_out: Sequence[Sequence[tuple[float, Batch]]]
) -> Callable[[], Tensor]:
    """What lets one hear how the model answers the first held-out conversation: float32 [S].

    Raises UserError when there is none.
    """
    streams = model.streams
    batches = [batch for _, batch in held_out[0]] if held_out else []
    rows = [row for batch in batches for row in batch.targets if (row[streams.user] >= 0).any()]
    if not rows:
        raise UserError("listen_every: validation has no conversation to listen to.")
    limit = torch.tensor(streams.code_sizes)[:, None] - 1
    user = streams.undelay(rows[0])[streams.user, :LISTEN_FRAMES].clamp(min=0).minimum(limit)
    codec = load_codec(config.codec)

    def listen() -> Tensor:
        model.eval()
        state, frames = generate.new_state(model, 1), []
        for frame in user.T.to(model.text_head.weight.device):
            drawn = generate.step(model, frame[None], state)
            if bool(drawn.ready[0]):
                frames.append(drawn.codes[0])
        model.train()
        with torch.inference_mode():
            return codec.decode(torch.stack(frames, dim=-1)[None].cpu())[0, 0]

    return listen


def samples(config: TrainConfig, step: int) -> list[tuple[str, Placed]]:
    """What step `step` of a run sees, by source, in the order of rows.

    A kept checkpoint before that step saves reading from the beginning.
    """
    with planned(config) as (model, tokenizer):
        mixture = Mixture(
            config.sources,
            model.streams,
            tokenizer,
            config.weights,
            length=config.length,
            seed=config.run.seed,
            lookahead=config.lookahead,
        )
    begin = 0
    kept = {
        int(path.stem.partition("-")[2]): path for path in config.run.dir.glob("checkpoint-*.pt")
    }
    if before := [number for number in kept if number <= step]:
        begin = max(before)
        saved = torch.load(kept[begin], map_location="cpu", weights_only=True, mmap=True)
        mixture.load_state_dict(saved["state"]["data"])
    for _ in range(begin, step + 1):
        mixture.next()
    return [
        (name, placed)
        for name, packer in zip(_named(config.sources), mixture.packers, strict=True)
        for placed in packer.placed
    ]


@contextmanager
def planned(config: TrainConfig) -> Iterator[tuple[SpeechLM, TextTokenizer]]:
    """The model that a config would train, without its weights, and its text pieces."""
    begun = (config.run.dir / convert.TEXT_MODEL).exists()
    with tempfile.TemporaryDirectory() as nowhere, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        with init_empty_weights(include_buffers=False):
            made = build(config, config.run.dir if begun else Path(nowhere), resume=begun)
        yield made
