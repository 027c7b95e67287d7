"""Train the language model, in one stage or in several that start from each other's checkpoint.

A step takes one batch of each source (conversations, the facts as text, …), in fixed shares; its
loss is the mean of theirs, weighted by share.

    speechlm train lm configs/lm/shipped.yaml [run.steps=…] [init_from=…]

The stages of a model from nothing each have a recipe in configs/lm/; any of them may begin at a
causal language model of Hugging Face instead (`init_from=DIRECTORY`), and any may train a small
difference alone (`lora={}`):

    text ─▶ interleaved ─▶ audio ─▶ post ─▶ duplex          asr, tts, spoken_qa: tasks, at any point
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import init_empty_weights
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, SAMPLE_RATE
from audio_codec.codec import coded_by, load_codec
from audio_codec.errors import UserError
from audio_codec.files import replacing
from audio_codec.speech_tokenizer import same_coder
from audio_codec.transformer import TransformerConfig
from speechlm import convert, generate, lora
from speechlm.data import Mixture, Placed, check_shared, together
from speechlm.documents import WeightConfig
from speechlm.lora import LoraConfig
from speechlm.model import Batch, LMConfig, LMSampling, LossConfig, SpeechLM
from speechlm.sources import Source, shares_of
from speechlm.streams import ABSENT, Streams
from speechlm.text_tokenizer import (
    SentencePieceTokenizer,
    TextTokenizer,
    load_text_tokenizer,
    train_text_tokenizer,
)
from speechlm.training import distributed
from speechlm.training.loader import Loader
from speechlm.training.objective import (
    Masses,
    Meter,
    Objective,
    Tally,
    cut,
    masses,
    summed,
    tally,
)
from speechlm.training.optimize import (
    Average,
    OptimizerConfig,
    Share,
    clip_gradients,
    load_optimizer,
    recompute,
)
from speechlm.training.run import Run, RunConfig
from speechlm.training.work import Counts, body_parameters, peak_flops, work
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
    acoustic_delay: NonNegativeInt | tuple[NonNegativeInt, ...] = 1
    """Frames of 80 ms, for all acoustic codebooks or for each; the longest adds to the latency."""
    predicts_user: bool = False
    """Whether it can learn the user's codes too (`weights.user`)."""

    @model_validator(mode="after")
    def _streams_live(self) -> ShapeConfig:
        for name, shape in (("temporal", self.temporal), ("depth", self.depth)):
            if not shape.causal or shape.block > 1:
                raise ValueError(f"{name} must be causal and have block=1: nobody hears ahead")
            if shape.memory is not None:
                raise ValueError(f"{name}.memory is {shape.memory}: it has nothing to read")
        if self.temporal.window is None and "window" in self.temporal.model_fields_set:
            raise ValueError(
                "temporal.window is null: a conversation has no end, so its past needs a bound"
            )
        return self


class TextConfig(BaseModel):
    """What the text pieces are learned from, when no checkpoint brings its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab: PositiveInt = 2000
    quiz: int = Field(40_000, ge=0)
    """Sentences of the quiz world."""
    files: tuple[Path, ...] = ()
    """Text files beside it, one sentence a line."""


class RatesConfig(BaseModel):
    """Learning rates of the parts of the model, as shares of `optimizer.lr`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temporal: float = Field(1.0, ge=0)
    """The transformer over frames."""
    depth: float = Field(1.0, ge=0)
    """The transformer inside a frame, with its embeddings and heads."""
    text: float = Field(1.0, ge=0)
    """Embedding and heads of the text pieces (Moshi: 0.75)."""
    codes: float = Field(1.0, ge=0)
    """Embeddings of codes and roles: what is new to a model that knew text alone."""


class LMOptimizerConfig(OptimizerConfig):
    """Its settings for a language model: what is not given, the model's size proposes."""

    lr: float | None = Field(None, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float | None = Field(None, ge=0)


Stage = Literal["text", "interleaved", "audio", "post", "duplex", "tasks"]

_TEXT = {"sentences", "quiz"}
_OWN: dict[Stage, set[str]] = {
    "text": _TEXT,
    "interleaved": {"interleaved"},
    "audio": {"audio"},
    "post": {"dialogues"},
    "duplex": {"dialogues"},
    "tasks": {"asr", "tts", "spoken_qa"},
}
"""What makes a stage: at least one source of these. Text may stand beside it everywhere, as it is
what keeps a model from forgetting what it read."""
_BESIDE: dict[Stage, set[str]] = {
    "interleaved": {"audio", "asr", "tts", "spoken_qa"},
    "tasks": {"interleaved", "audio"},
}


class TrainConfig(BaseModel):
    """A language-model run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    stage: Stage | None = None
    """What the run is for: sources that do not belong there are refused. None takes any."""
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
    optimizer: LMOptimizerConfig = LMOptimizerConfig()
    rates: RatesConfig = RatesConfig()
    separate_states: bool = False
    """Whether sources of text alone have an optimizer state of their own, and an update of their
    own in each step: their gradients are of another size than those of sound (as in Moshi)."""
    text_mask: float = Field(0.0, ge=0, le=1)
    """Share of the assistant's text that is hidden from the input where its voice is there too
    (Moshi pre-trains with 0.3)."""
    heard_mask: float = Field(0.1, ge=0, le=1)
    """Share of the transcript that is hidden from the input where the user's voice is there too:
    what the model writes down may be wrong, so it must not lean on that alone."""
    user_mask: float = Field(0.0, ge=0, le=1)
    """Share of the rows in which of the user's voice only the semantic codes are seen: they are
    alike from one voice to the next, where the acoustic ones let a small corpus be memorized."""
    user_spans: float = Field(0.0, ge=0, lt=0.5)
    """Share of the user's frames that are hidden, a few in a row: what was said is to be understood
    from its surroundings, and no stretch of codes to be known by heart."""
    audio_share: float = Field(1.0, gt=0, le=1)
    """Share of the columns whose codes are learned, drawn anew in each step. A quarter takes most
    of the depth transformer's work away, and is enough to keep or tune a voice."""
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
    """Compile the transformer blocks: minutes at the start, then about a quarter faster with bf16
    units, where passes over memory count; nothing in float32, which is bound by its products."""
    init_from: str | None = None
    """A checkpoint to start from, with its shape and text pieces: one of ours, or a causal language
    model of Hugging Face, which becomes the temporal transformer. `model` may change the window and
    the acoustic delay; nothing else, as no weight would fit."""
    lora: LoraConfig | None = None
    """Train a small difference to `init_from` instead of all weights; the output is an adapter."""
    output: Path | None = None
    """Checkpoint directory written at the end; None means `lm` in the run directory."""
    dtype: checkpoints.StoredType = "bf16"
    """How it is stored."""
    sampling: LMSampling = LMSampling()
    """How the finished model is drawn by default."""

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        kinds = {source.kind for source in self.sources}
        if self.stage is not None:
            own = _OWN[self.stage]
            if strange := kinds - own - _TEXT - _BESIDE.get(self.stage, set()):
                raise ValueError(
                    f"stage {self.stage} and data do not match: a source of kind {min(strange)} "
                    f"belongs to another stage than {self.stage}"
                )
            if not kinds & own:
                raise ValueError(
                    f"stage {self.stage} and data do not match: none of the sources is of kind "
                    f"{' or '.join(sorted(own))}"
                )
        if self.loss.text == self.loss.heard == self.loss.audio == 0:
            raise ValueError("loss.text, loss.heard and loss.audio are all 0; nothing is learned")
        if kinds <= _TEXT and self.loss.text == self.loss.heard == 0:
            raise ValueError(
                "loss.text and loss.heard are 0, and no source has sound; nothing is learned"
            )
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora is a difference to a model; name it in init_from")
        if self.separate_states and not (kinds & _TEXT and kinds - _TEXT):
            raise ValueError("separate_states needs sources of text alone and of sound")
        if self.ema > 0 and self.average_from is not None:
            raise ValueError("ema and average_from are two averages of the weights; choose one")
        every, steps = self.run.save_every, self.run.steps
        if self.average_from is not None and steps // every * every <= self.average_from * steps:
            raise ValueError(
                f"average_from is {self.average_from:g}, but no checkpoint follows: run.save_every "
                f"is {every} and run.steps {steps}"
            )
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
SPAN = 4
"""Frames of the user's that are hidden in a row, at most."""
SEEDS_APART = 10**6


def mask_heard(batch: Batch, streams: Streams, share: float, rng: np.random.Generator) -> Batch:
    """Hide a share of the `heard` inputs in columns that have the user's codes."""
    if not streams.heard:
        return batch
    return _mask(batch, streams.heard_index, streams.user.start, share, rng)


def mask_text(batch: Batch, streams: Streams, share: float, rng: np.random.Generator) -> Batch:
    """Hide a share of the text inputs in columns that have the assistant's codes."""
    return _mask(batch, streams.text_index, streams.own.start, share, rng)


def _mask(batch: Batch, text: int, voice: int, share: float, rng: np.random.Generator) -> Batch:
    """Hide a share of one stream's inputs in columns where another's are."""
    if share == 0:
        return batch
    inputs = batch.inputs.clone()
    written, voiced = inputs[:, text], inputs[:, voice] != ABSENT
    hidden = torch.from_numpy(rng.random(written.shape) < share).to(written.device) & voiced
    inputs[:, text] = written.masked_fill(hidden, ABSENT)
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


def mask_user_spans(
    batch: Batch, streams: Streams, share: float, rng: np.random.Generator
) -> Batch:
    """Hide about such a share of the user's columns, in stretches of 1 to `SPAN` frames.

    After SpecAugment's time masks (arXiv 1904.08779).
    """
    if share == 0:
        return batch
    inputs = batch.inputs.clone()
    starts = rng.random((len(inputs), inputs.shape[2])) < 2 * share / (SPAN + 1)
    lengths = 1 + (SPAN * rng.random(starts.shape)).astype(int)  # `random` knows rows of ranks
    left = np.where(starts, lengths, 0)
    for at in range(1, left.shape[1]):
        left[:, at] = np.maximum(left[:, at], left[:, at - 1] - 1)
    hidden = torch.from_numpy(left > 0)[:, None].to(inputs.device)
    inputs[:, streams.user] = inputs[:, streams.user].masked_fill(hidden, ABSENT)
    return replace(batch, inputs=inputs)


def thin_audio(batch: Batch, streams: Streams, share: float, rng: np.random.Generator) -> Batch:
    """Learn codes in a random share of the columns, so that the depth transformer sees no others.

    As in Sesame's CSM ("compute amortization"); the mean over what is left stays that over all.
    """
    if share == 1:
        return batch
    weights = batch.weights.clone()
    left_out = torch.from_numpy(rng.random((len(weights), 1, weights.shape[2])) >= share)
    codes = slice(streams.own.start, streams.user.stop)
    weights[:, codes] = weights[:, codes].masked_fill(left_out.to(weights.device), 0)
    return replace(batch, weights=weights)


def masked(
    config: TrainConfig,
    streams: Streams,
    batches: Sequence[tuple[float, Batch]],
    rng: np.random.Generator,
) -> list[tuple[float, Batch]]:
    """What is seen and learned of the batches of a step, one a source, each with its share.

    Of sound and its words some is hidden, see `TrainConfig`; of text alone nothing is.
    """
    found = []
    for source, (share, batch) in zip(config.sources, batches, strict=True):
        if source.kind not in _TEXT:
            batch = mask_heard(batch, streams, config.heard_mask, rng)
            batch = mask_user(batch, streams, config.user_mask, rng)
            batch = mask_text(batch, streams, config.text_mask, rng)
            batch = mask_user_spans(batch, streams, config.user_spans, rng)
            batch = thin_audio(batch, streams, config.audio_share, rng)
        found.append((share, batch))
    return found


def make_tokenizer(config: TextConfig, seed: int) -> SentencePieceTokenizer:
    """Learn the text pieces of a new model. Raises UserError when there is no text."""
    texts = quiz.sentences("train", config.quiz, seed)
    for file in config.files:
        texts += sentences_from(file)
    if not texts:
        raise UserError(
            "text: quiz is 0 and files is empty; there is nothing to learn pieces from."
        )
    return train_text_tokenizer(texts, config.vocab)


# No weight depends on these.
_FREE = {"acoustic_delay", "temporal.window"}


def resolve_shape(config: TrainConfig) -> TrainConfig:
    """The config with the shape written out that `init_from` brings.

    Raises UserError when `model` says another one, or there is no such checkpoint.
    """
    given = _with_window(config.model)
    if config.init_from is None:
        return config.model_copy(update={"model": given})
    if lora.base_of(checkpoints.resolve(config.init_from)) is not None:
        raise UserError(
            f"init_from '{config.init_from}' is an adapter; make it a model first: speechlm merge."
        )
    if convert.names_hf(config.init_from):
        if config.lora is not None:
            raise UserError(
                f"lora is a difference to a model that speaks; init_from '{config.init_from}' is a "
                "language model of text: train it whole first."
            )
        temporal = convert.hf_transformer(config.init_from, given.temporal.window)
        brought = given.model_copy(update={"temporal": temporal})
    else:
        source = convert.lm_config(config.init_from)
        delay = source.streams.acoustic_delay
        brought = ShapeConfig(
            temporal=source.temporal,
            depth=source.depth,
            heard=source.streams.heard,
            acoustic_delay=delay,
            predicts_user=source.predicts_user,
        )
        if "acoustic_delay" in given.model_fields_set:
            brought = brought.model_copy(update={"acoustic_delay": given.acoustic_delay})
        if "window" in given.temporal.model_fields_set and "temporal" in given.model_fields_set:
            changed = {"window": given.temporal.window}
            temporal = brought.temporal.model_copy(update=changed)
            brought = brought.model_copy(update={"temporal": temporal})
        if config.lora is not None:
            _check_adapter(config, brought, source)
    for name, wanted, found in _differences(given, brought):
        raise UserError(
            f"model.{name} is {wanted}, but init_from '{config.init_from}' has {found}; leave it "
            "out or train another model."
        )
    return config.model_copy(update={"model": brought})


def _with_window(shape: ShapeConfig) -> ShapeConfig:
    """The shape with the usual window where a recipe names others of its numbers alone."""
    if shape.temporal.window is not None:
        return shape
    usual = ShapeConfig.model_fields["temporal"].default.window
    temporal = shape.temporal.model_copy(update={"window": usual})
    temporal.model_fields_set.discard("window")  # nobody asked for it: `init_from` may have another
    return shape.model_copy(update={"temporal": temporal})


def _check_adapter(config: TrainConfig, brought: ShapeConfig, source: LMConfig) -> None:
    """Refuse what an adapter cannot hold: it is spoken with its base's config."""
    kept: dict[str, tuple[Any, Any]] = {
        "model.acoustic_delay": (brought.acoustic_delay, source.streams.acoustic_delay),
        "model.temporal.window": (brought.temporal.window, source.temporal.window),
    }
    if config.sampling != LMSampling():
        kept["sampling"] = (config.sampling, source.sampling)
    for name, (wanted, found) in kept.items():
        if wanted != found:
            raise UserError(
                f"{name} is {wanted}, but an adapter keeps that of init_from '{config.init_from}', "
                f"{found}; leave it out or train all weights."
            )


def _differences(given: BaseModel, brought: BaseModel, where: str = "") -> Iterator[Any]:
    """Name, value and other value of each field that was given and is another in `brought`."""
    for name in sorted(given.model_fields_set):
        one, other = getattr(given, name), getattr(brought, name)
        if isinstance(one, BaseModel):
            yield from _differences(one, other, f"{where}{name}.")
        elif one != other and f"{where}{name}" not in _FREE:
            yield f"{where}{name}", one, other


def build(
    config: TrainConfig,
    run_dir: Path,
    resume: bool,
    scattered: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[SpeechLM, TextTokenizer]:
    """The model to train and its text pieces, of a config with its shape resolved.

    It is made inside `scattered()`. Raises UserError when codec, losses and model disagree.
    """
    codec = load_codec(config.codec)
    codebooks = codec.codebooks
    if config.weights.user > 0 and not config.model.predicts_user:
        raise UserError(
            f"weights.user is {config.weights.user:g}, but the model does not predict the user's "
            "codes: set model.predicts_user from the first stage on."
        )
    if config.init_from is None:
        tokenizer = _own_tokenizer(config, run_dir, resume)
    else:
        tokenizer = load_text_tokenizer(checkpoints.resolve(config.init_from))
        if not convert.names_hf(config.init_from):
            streams = convert.lm_config(config.init_from).streams
            if streams.codebooks != codebooks:
                raise UserError(
                    f"codec '{config.codec}' has codebooks {codebooks}, but init_from "
                    f"'{config.init_from}' was trained on {streams.codebooks}."
                )
            if config.lora is not None and not same_coder(coded_by(codec), streams.coded_by):
                raise UserError(
                    f"codec '{config.codec}' gives other codes than that which init_from "
                    f"'{config.init_from}' and thus its adapter is of; name that one's codec."
                )
            if streams.text_size != tokenizer.size:
                raise UserError(
                    f"vocabulary of '{config.init_from}': {tokenizer.FILE} has {tokenizer.size} "
                    f"pieces, but the model was trained with {streams.text_size}."
                )
    shape = config.model
    try:
        streams = Streams(
            text_size=tokenizer.size,
            codebooks=codebooks,
            coded_by=coded_by(codec),
            heard=shape.heard,
            acoustic_delay=shape.acoustic_delay,
        )
    except ValidationError as error:  # how many delays there must be, the codec alone knows
        raise UserError(f"model.{error.errors()[0]['ctx']['error']}.") from error
    made = LMConfig(
        streams=streams,
        temporal=shape.temporal,
        depth=shape.depth,
        codec=config.codec,
        predicts_user=shape.predicts_user,
        sampling=config.sampling,
    )
    with scattered():
        model = SpeechLM(made)
        if config.init_from is not None:
            convert.fill(model, config.init_from)
    return model.train(), tokenizer


def _own_tokenizer(config: TrainConfig, run_dir: Path, resume: bool) -> TextTokenizer:
    """The text pieces of a model from nothing; a resumed run keeps its own."""
    kept = run_dir / SentencePieceTokenizer.FILE
    if resume and kept.exists():
        return load_text_tokenizer(run_dir)
    tokenizer = make_tokenizer(config.text, config.run.seed)
    with replacing(kept) as temporary:
        temporary.write_bytes(tokenizer.model)
    return tokenizer


_RATE_OF = {
    "temporal": "temporal",
    "depth": "depth",
    "text": "text",
    "text_head": "text",
    "heard_head": "text",
    "codes": "codes",
    "user_role": "codes",
    "heard_role": "codes",
}
"""Which of `RatesConfig` a part of the model follows."""


def set_rates(optimizer: torch.optim.Optimizer, model: SpeechLM, rates: RatesConfig) -> None:
    """Split an optimizer's groups by part of the model; `scale` is a group's share of the rate."""
    if rates == RatesConfig():
        return
    part = {id(p): _RATE_OF[name.split(".")[0]] for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for name, scale in rates.model_dump().items():
            members = [p for p in group["params"] if part[id(p)] == name]
            if members:
                groups.append({**group, "params": members, "scale": scale})
    optimizer.param_groups = groups


def _named(sources: Sequence[Source]) -> list[str]:
    """A name for the numbers of each source: its kind, told apart where there are several."""
    kinds = [source.kind for source in sources]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:place].count(kind)}"
        for place, kind in enumerate(kinds)
    ]


def mixture_of(
    config: TrainConfig,
    streams: Streams,
    tokenizer: TextTokenizer,
    sources: Sequence[Source] | None = None,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Mixture:
    """What a process of a run learns from; or other `sources`, in the order of another `seed`."""
    return Mixture(
        config.sources if sources is None else sources,
        streams,
        tokenizer,
        config.weights,
        length=config.length,
        seed=config.run.seed if seed is None else seed,
        rank=rank,
        world=world,
        lookahead=config.lookahead,
    )


def check(config: TrainConfig, world: int) -> None:
    """Raise UserError where a run of so many processes would stop before its data is opened."""
    checkpoints.check_replaceable(config.output or config.run.dir / "lm")
    for field, asked in (("listen_every", config.listen_every), ("lora", config.lora)):
        if asked and world > 1:
            raise UserError(f"{field} is for runs of one process; leave it out.")
    check_shared(config.sources, world)
    if config.guard.asks:  # Shards without an index are read for it.
        config.guard.check(shares_of(config.sources), "sources")


def held_out_of(config: TrainConfig, streams: Streams, tokenizer: TextTokenizer) -> Mixture:
    """What a run is judged by; sources without end draw others of their documents than it does."""
    seed = config.run.seed + SEEDS_APART
    return mixture_of(config, streams, tokenizer, config.validation, seed)


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train and write a checkpoint directory; returns its path. Raises UserError on bad data.

    Under `torchrun` or `accelerate launch` with several processes the model is sharded over them
    (FSDP2); the numbers stay those of one process.
    """
    output = config.output or config.run.dir / "lm"
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    config = resolve_shape(config)
    run = Run("lm", config.run, config, resume, sharded=True)
    model, tokenizer = build(config, run.dir, resume, run.scattered)
    streams, amount = model.streams, work(model, config.length)
    schedule = config.optimizer.proposed(body_parameters(model))
    run.record(config.model_copy(update={"optimizer": schedule}))
    adapted = None
    if config.lora is not None:
        assert config.init_from is not None
        adapted = lora.attach(model, config.lora, config.init_from)

    source = mixture_of(config, streams, tokenizer, rank=run.rank, world=run.world)
    exposures = source.exposures(config.run.steps)
    if run.main:
        for one in exposures:
            run.console.print(f"{one.path}: {one.samples} samples, seen {one.epochs:.2g} times")
    names, held_out_names = _named(config.sources), _named(config.validation)
    held_out = []
    if config.validation:
        unseen = held_out_of(config, streams, tokenizer)
        held_out = [unseen.next() for _ in range(config.validation_batches)]
    listener = _listener(model, config, held_out) if config.listen_every else None

    model.to(run.device)  # before anything copies its weights
    if config.recompute:
        recompute(model.temporal.blocks)
    objective = Objective(model, config.loss, sharded=run.mesh is not None)
    if run.mesh is not None:
        distributed.shard(objective, [*model.temporal.blocks], run.mesh)
    optimizer = schedule.build(model)
    set_rates(optimizer, model, config.rates)
    # An update is made of some of the sources: of all of them, or of text and of sound in turn.
    updates: list[tuple[torch.optim.Optimizer, Sequence[int]]] = [(optimizer, range(len(names)))]
    text_optimizer = None
    if config.separate_states:
        text_optimizer = schedule.build(model)
        set_rates(text_optimizer, model, config.rates)
        kinds = [source.kind in _TEXT for source in config.sources]
        alone = [number for number, text in enumerate(kinds) if text]
        sound = [number for number, text in enumerate(kinds) if not text]
        updates = [(text_optimizer, alone), (optimizer, sound)]
    average = None
    if config.ema > 0 or config.average_from is not None:
        average = Average(model, config.ema)
    if config.compile:
        for block in (*model.temporal.blocks, *model.depth.transformer.blocks):
            block.compile()
    loader, meter = Loader(source, config.ahead), Meter()
    counts = {"averaged": 0}

    def go_on() -> None:
        """Take up the state of the last checkpoint, if there is one."""
        run.restore(model, optimizer)
        if (saved := run.load()) is not None:
            if (saved["text_optimizer"] is None) != (text_optimizer is None):
                raise UserError(
                    f"separate_states is {config.separate_states}, but the run in '{run.dir}' was "
                    "begun with the other choice; resume with that one, or choose another folder."
                )
            if text_optimizer is not None:
                load_optimizer(text_optimizer, saved["text_optimizer"])
            loader.load_state_dict(saved["data"])
            counts.update(saved.get("counts", {}))
            # What all ranks had measured since the last line of the log, on one of them.
            meter.sums = dict(saved.get("meter", {})) if run.main else {}
            if average is not None:
                begun = {name: p.detach() for name, p in model.named_parameters()}
                average.load(saved["average"] or begun)

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "text_optimizer": None if text_optimizer is None else text_optimizer.state_dict(),
            "data": together(distributed.collect(loader.state_dict())),
            "average": {} if average is None else average.weights,
            "counts": dict(counts),
            "meter": Meter.of(distributed.collect(meter.sums)).sums,
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
                    loss, parts, counts = objective(batch.to(run.device))
                    found = {"loss": (float(loss), 1.0), **tally(parts, counts)}
                    meter.add(f"validation/{name}", found)
                    total += share * float(loss)
                meter.add("validation", {"loss": (total, 1.0)})
        objective.train()
        if average is not None and averaged():
            average.swap(model)
        return meter.read()

    def train_step(step: int) -> tuple[float, float, dict[str, Tally], Counts]:
        """A step's updates of the weights.

        The gradient's norm, the loss, the numbers of each source, what the step saw.
        """
        rate, rng = schedule.rate(step, config.run.steps), run.rng(step)
        batches = masked(config, streams, loader.next(), rng)
        saw = sum((Counts.of(batch, streams) for _, batch in batches), Counts())
        numbers: dict[str, Tally] = {}
        if run.passes_over(step):
            return 0.0, math.nan, numbers, saw
        own = [masses(batch, streams) for _, batch in batches]
        whole = [summed(parts) for parts in zip(*distributed.collect(own), strict=True)]
        norms, mean = [], 0.0
        for chosen, members in updates:
            for group in chosen.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            total = sum(batches[number][0] for number in members)
            for number in members:
                share, batch = batches[number]
                loss, found = learn(batch, share / total, whole[number])
                numbers[names[number]] = {"loss": (loss, 1 / run.world), **found}
                mean += share * loss
            distributed.drop_untouched(objective)
            norm = clip_gradients(objective, schedule.clip)
            norms.append(norm.item())
            run.update(chosen, norm)
        return math.hypot(*norms), sum(distributed.collect(mean)), numbers, saw

    def learn(batch: Batch, share: float, mass: Masses) -> tuple[float, Tally]:
        """Add the gradient of a source's batch, times its share of the update; loss and numbers.

        `mass` is what the batches of all ranks have of each kind of prediction, and the loss is
        this rank's part in theirs.
        """
        whole, found = 0.0, Meter()
        for piece in cut(batch, config.accumulate):
            has = masses(piece, streams)
            shares = {kind: has[kind] / mass[kind] if mass[kind] else 0.0 for kind in mass}
            with run.accelerator.autocast():
                loss, parts, counts = objective(piece.to(run.device), shares)
            if loss.requires_grad:
                (share * loss).backward()
            whole += float(loss.detach())
            found.add("", tally(parts, counts))
        return whole, found.sums

    began, saw = time.monotonic(), Counts()
    go_on()
    objective.train()
    with loader:
        for step in run.steps(state, evaluate if held_out else None):
            norm, loss, numbers, seen = train_step(step)
            if not run.passes_over(step):
                if run.spiked(step, loss):
                    go_on()
                    began, saw = time.monotonic(), Counts()
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
                share = done / spent / peak_flops(run.device, run.precision)
                pace = run.world / spent  # every rank counts its own rows
                run.log(
                    step,
                    {
                        "loss": loss,
                        **meter.read(together=run.mesh is not None),
                        "norm": norm,
                        "lr": schedule.rate(step, config.run.steps),
                        "bad_gradients": run.bad_gradients,
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
        "stage": config.stage,
        "steps": run.done,
        "parameters": sum(p.numel() for p in model.parameters()),
        "body_parameters": body_parameters(model),
        "codec": config.codec,
        "init_from": config.init_from,
        "sources": [source.model_dump(mode="json") for source in config.sources],
        "rows": sum(source.rows for source in config.sources),
        "length": config.length,
    }
    if adapted is not None:
        return lora.save(output, adapted, card)
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
        mixture = mixture_of(config, model.streams, tokenizer)
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
    begun = (config.run.dir / SentencePieceTokenizer.FILE).exists()
    with tempfile.TemporaryDirectory() as nowhere:
        with init_empty_weights(include_buffers=False):
            folder = config.run.dir if begun else Path(nowhere)
            made = build(resolve_shape(config), folder, resume=begun)
        yield made
