"""From text straight to semantic codes: a small language model in the place of TTS and tokenizer.

Trained on pairs of a text and the codes of its sound in many voices, it says what the tokenizer
would have heard, without anybody speaking ("Scaling speech-text pre-training with synthetic
interleaved data", arXiv 2411.17607). One decoder reads the text, then writes the codes:

    text, a cell of 2 characters a position        speech, a step of 2 frames a position
    ┌────┬────┬────┬────┬────┬────┬─────────┬────────┬────────┬────────┐
    │ ·t │ he │ ·c │ at │ ·s │ at │    ▷    │ f0  f1 │ f2  f3 │ f4  f5 │      inputs
    └────┴────┴────┴────┴────┴────┴─────────┴────────┴────────┴────────┘
                                       │         │        │        │
                                    f0  f1    f2  f3   f4  f5   f6  end      predictions

What makes it fast on a processor is that it has few positions: a word begins a cell, so that it
looks the same wherever it stands, and the transformer runs once a step (three characters and three
frames are the default). Within a step a head draws
digit after digit of the codes (NADE, Larochelle and Murray, 2011): one hidden layer that adds up
what the transformer said and the digits before. Of a code of (7, 5, 5, 5, 5) levels these are five
draws among seven or five instead of one among 4375, whose softmax and candidates alone cost more
than all the rest.

*Clock.* How long a text takes is well told by its letters, words and marks (`fit_length`). So every
cell has a time at which it is expected, and every step one at which it is said, and both stand on
one clock to the rotary positions of the transformer: what a step says is found where the distance
is about nothing, from the first day of training (after the position rates of Deep Voice 3, arXiv
1710.07654). The *pace*, how many times as long as expected a text takes, stretches its clock.

*Length.* A text that ends too early, goes on too long or gets stuck is detected and drawn again
with other noise.

Each line draws its own noise by its seed: what it says does not depend on who shares its batch, but
for the rounding of matrix kernels of another size.

Shapes: B rows, P positions, W table rows a position adds up, C width, N frames a step, F factors of
the codebook, D = N·F digits of a step, H width of the head, M steps picked from a batch, T frames.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.codec import load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.memory import tune_allocator
from audio_codec.precision import Precision, Settled, lowered, settle
from audio_codec.sampling import Sampling, sample
from audio_codec.speech_tokenizer import ALPHABET, SpeechTokenizer, greedy_text
from audio_codec.transformer import Transformer, TransformerConfig, TransformerState
from synth_data.text import spell_out

Ids = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint16]

CHARACTERS = ALPHABET + ".,;:?!"
"""What it reads. Marks are pauses; a space stands before every word."""

_LETTERS = np.array([character.isalpha() for character in CHARACTERS])
_MARKS = np.array([character in ".,;:?!" for character in CHARACTERS])

# Rows of the embedding table that hold no character and no digit.
_ABSENT, _START, _SPECIAL = 0, 1, 2
# Digits of codes that are not there, as targets and as what stands before them.
NO_DIGIT = -1
# Positions of text that are read at once: what a layer leaves behind, the next one still finds in
# the processor's cache.
_PREFILL = 2048
# Texts are padded to so many positions, for the reason of _ROWS.
_POSITIONS = 4
# Rows leave in such numbers: a CPU's kernels are compiled for each size of a batch anew.
_ROWS = 32
# Steps that the cache is lengthened by at a time.
_GROWTH = 8
# Loops of up to so many frames are looked for.
_PERIODS = 4
# Added to a line's seed when it is drawn again.
_AGAIN = 0x5851F42D4C957F2D


class ShapeConfig(BaseModel):
    """Shape of the model, apart from what the tokenizer decides; by default 3.0 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: PositiveInt = 3
    """Characters a position of text."""
    step: PositiveInt = 3
    """Frames N a position of speech."""
    transformer: TransformerConfig = TransformerConfig(
        dim=256, layers=4, heads=4, kv_heads=1, gated=False, norm="layer", window=1024
    )
    """One key/value head: keys and values are what a step has to read from memory. Wide rather than
    deep, and without a gate: all that is not a matrix product costs as much as one."""
    head: PositiveInt = 256
    """Width H of the layer that draws the digits."""

    @field_validator("transformer")
    @classmethod
    def _streams(cls, transformer: TransformerConfig) -> TransformerConfig:
        if transformer.window is None or not transformer.causal:
            raise ValueError("transformer must be causal and have a window")
        return transformer


class TextToTokenConfig(ShapeConfig):
    """A trained model: its shape, the codes that it speaks, how long texts take."""

    codebook: tuple[PositiveInt, ...] = Field(min_length=1)
    """Factor sizes of the tokenizer's codebook; the first digit varies fastest."""
    rate: float = Field(gt=0)
    """Codes a second."""
    length: tuple[float, float, float, float]
    """Expected frames a letter, a word, a mark and a text; see `fit_length`."""
    tokenizer: str = ""
    """The tokenizer of the codes that it was trained on, by name ..."""
    coded_by: tuple[float, ...] | None = None
    """... and by its fingerprint."""


class GenerationConfig(BaseModel):
    """How codes are drawn, and what is not accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling: Sampling = Sampling(temperature=0.5, top_p=0.9)
    batch: PositiveInt = 512
    """Rows at once."""
    shortest: float = Field(0.4, ge=0)
    """A line that ends before so many times its expected length is at fault."""
    longest: float = Field(2.0, gt=0)
    """So is one that has not ended after so many times."""
    stuck: PositiveInt = 16
    """So is one that repeats itself for so many frames."""
    attempts: PositiveInt = 2
    """A line at fault is drawn so many times in all."""


Fault = Literal["early", "endless", "stuck", "long"]
"""Ended too early; did not end; repeated the same few frames on and on; is longer than the model
can hold and was not said at all."""


class Line(NamedTuple):
    """What is to be said."""

    text: str
    seed: int
    pace: float = 1.0
    """How many times as long as expected it may take."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """What was said."""

    codes: Codes  # [T]
    fault: Fault | None


# --- Text and codes as numbers --------------------------------------------------------------------


def cells(text: str, size: int) -> Ids:
    """Text as characters in cells: int64 [cells, size], −1 where a cell is not full.

    Numbers and symbols are spelled out, case is dropped; every word begins a cell with a space.
    """
    found: list[list[int]] = []
    for word in spell_out(text).lower().split():
        ids = [CHARACTERS.index(character) for character in " " + word]
        ids += [NO_DIGIT] * (-len(ids) % size)
        found += [ids[at : at + size] for at in range(0, len(ids), size)]
    return np.array(found, np.int64).reshape(-1, size)


def digits(codes: npt.NDArray[np.integer], codebook: Sequence[int]) -> Ids:
    """Codes [T] → digits int64 [T, F]."""
    strides = list(accumulate(codebook[:-1], lambda a, b: a * b, initial=1))
    return codes.astype(np.int64)[:, None] // strides % np.array(codebook)


def _features(text: str) -> tuple[int, int, int, int]:
    spelled = spell_out(text)
    letters = sum(character.isalpha() for character in spelled)
    return letters, len(spelled.split()), sum(spelled.count(mark) for mark in ".,;:?!"), 1


def fit_length(pairs: Iterable[tuple[str, int]]) -> tuple[float, float, float, float]:
    """Least squares of the frames that texts take on their letters, words, marks, and one."""
    found = [(_features(text), frames) for text, frames in pairs]
    features, frames = np.array([f for f, _ in found]), np.array([n for _, n in found])
    letters, words, marks, one = np.linalg.lstsq(features, frames, rcond=None)[0].tolist()
    return letters, words, marks, one


def expected_frames(text: str, config: TextToTokenConfig) -> float:
    """How many frames a text takes at a pace of 1, about; at least one."""
    weighed = zip(_features(text), config.length, strict=True)
    return max(1.0, math.fsum(feature * weight for feature, weight in weighed))


def clock(characters: Ids, config: TextToTokenConfig) -> Times:
    """When each cell [P, cell] is expected to be said, at a pace of 1: its middle, in frames [P].

    All of them together take `expected_frames`, of which what every text takes is half before.
    """
    letter, word, mark, one = config.length
    there = characters >= 0
    frames = letter * (_LETTERS[characters] & there).sum(1)
    frames += mark * (_MARKS[characters] & there).sum(1)
    frames += word * (characters[:, 0] == CHARACTERS.index(" "))
    times: Times = one / 2 + frames.cumsum() - frames / 2
    return times


# --- The model ------------------------------------------------------------------------------------


class TextToToken(nn.Module):
    """Rows of characters and digits in, digits of the next step out."""

    slots: Tensor
    strides: Tensor

    def __init__(self, config: TextToTokenConfig) -> None:
        super().__init__()
        self.config = config
        codebook, dim = config.codebook, config.transformer.dim
        self.factors = len(codebook)
        self.width = max(config.cell, config.step * self.factors)
        """Rows W of the table that a position adds up, at most."""
        # The first digit has one value more: there is no such frame, the text is over.
        self.end = codebook[0]
        self._first_digit = _SPECIAL + config.cell * len(CHARACTERS)
        table = torch.randn(self._first_digit + config.step * sum(codebook), dim) * 0.1
        table[_ABSENT] = 0
        self.table = nn.Parameter(table)
        self.transformer = Transformer(config.transformer)
        self.context = nn.Linear(dim, config.step * config.head, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.step, self.factors, config.head))
        self.before = nn.Parameter(torch.randn(config.step * sum(codebook), config.head) * 0.1)
        sizes = (codebook[0] + 1, *codebook[1:])
        self.heads = nn.ModuleList(nn.Linear(config.head, size) for size in sizes)
        places = list(accumulate(codebook * config.step, initial=0))[:-1]
        self.register_buffer("slots", torch.tensor(places), persistent=False)  # [D]
        strides = list(accumulate(codebook[:-1], lambda a, b: a * b, initial=1))
        self.register_buffer("strides", torch.tensor(strides), persistent=False)  # [F]

    def text_rows(self, characters: Ids) -> Ids:
        """Cells int64 [P, cell] → table rows [P, W]."""
        place = _SPECIAL + np.arange(characters.shape[1]) * len(CHARACTERS)
        rows = np.full((len(characters), self.width), _ABSENT, np.int64)
        rows[:, : characters.shape[1]] = np.where(characters < 0, _ABSENT, characters + place)
        return rows

    def start_row(self) -> Ids:
        """Table rows [W] of the position between text and speech."""
        row = np.full(self.width, _ABSENT, np.int64)
        row[0] = _START
        return row

    def speech_rows(self, steps: Tensor) -> Tensor:
        """Digits of whole steps int64 [..., D] → table rows [..., W]."""
        rows = steps + (self.slots.to(steps.device) + self._first_digit)
        return F.pad(rows, (0, self.width - rows.shape[-1]), value=_ABSENT)

    def forward(self, rows: Tensor, clock: Tensor, state: TransformerState | None = None) -> Tensor:
        """Table rows int64 [B, P, W], their times in frames [B, P] → what is said next, [B, P, C].

        Of a cell it is the time at which it is expected (`clock`), from the start on that of the
        step that comes next. Streaming with a state; offline, a row may be padded behind its end.
        """
        x = F.embedding_bag(rows.flatten(0, 1), self.table, mode="sum", padding_idx=_ABSENT)
        x = x.view(*rows.shape[:2], -1)
        inner = next(self.transformer.parameters()).dtype
        return self.transformer(x.to(inner), state, clock=clock).to(x.dtype)

    def logits(self, hidden: Tensor, steps: Tensor) -> list[Tensor]:
        """Teacher-forced: hidden [M, C], digits int64 [M, D] → for each factor [M, N, its size].

        A digit that is not there (NO_DIGIT, or the end) adds nothing to those behind it.
        """
        config = self.config
        sizes = torch.tensor(config.codebook * config.step, device=steps.device)
        there = (steps >= 0) & (steps < sizes)
        added = F.embedding((steps + self.slots).masked_fill(~there, 0), self.before)
        added = (added * there[..., None]).cumsum(1)
        earlier = F.pad(added[:, :-1], (0, 0, 1, 0))  # what stands before each digit
        shape = (len(hidden), config.step, self.factors, config.head)
        said = self.context(hidden).view(len(hidden), config.step, 1, config.head)
        inner = F.silu(said + self.bias + earlier.view(shape))
        return [head(inner[:, :, factor]) for factor, head in enumerate(self.heads)]

    def loss(self, rows: Tensor, clock: Tensor, index: Tensor, steps: Tensor) -> Tensor:
        """Mean nats a frame, its end included.

        rows [B, P, W], clock [B, P]; index int64 [M]: where in B·P steps are predicted; steps int64
        [M, D]: their digits, NO_DIGIT where there is nothing to learn.
        """
        hidden = self(rows, clock).flatten(0, 1)[index]
        wanted = steps.view(len(steps), self.config.step, self.factors)
        total = hidden.new_zeros((), dtype=torch.float32)
        for factor, logits in enumerate(self.logits(hidden, steps)):
            target = wanted[:, :, factor].flatten()
            total = total + F.cross_entropy(
                logits.float().flatten(0, 1), target, ignore_index=NO_DIGIT, reduction="sum"
            )
        return total / (wanted[:, :, 0] >= 0).sum().clamp(min=1)

    def draw(self, hidden: Tensor, seed: Tensor, first: int, sampling: Sampling) -> Tensor:
        """Draw the digits of a step, one after the other: hidden [B, C] → int64 [B, D].

        `first`: number of the step's first digit among all digits of the line, which with the
        `seed` [B] makes its noise. A digit may be `end`; what stands behind it means nothing.
        """
        said = self.context(hidden).view(len(hidden), self.config.step, self.config.head)
        added = torch.zeros_like(said[:, 0])
        drawn: list[Tensor] = []
        for slot, place in enumerate(self.slots.tolist()):
            frame, factor = divmod(slot, self.factors)
            inner = F.silu(said[:, frame] + self.bias[frame, factor] + added)
            digit = sample(
                self.heads[factor](inner),
                seed,
                torch.full_like(seed, first + slot),
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
            )
            drawn.append(digit)
            added += self.before[place + digit.clamp(max=self.config.codebook[factor] - 1)]
        return torch.stack(drawn, dim=1)

    def frames(self, steps: Tensor) -> Tensor:
        """Digits int64 [B, D], none of them the end → codes [B, N]."""
        apart = steps.view(len(steps), self.config.step, self.factors)
        return (apart * self.strides).sum(-1)


def load_text_to_token(name_or_path: str | Path, precision: Settled = "fp32") -> TextToToken:
    """A model in inference mode from a checkpoint directory; UserError when it is broken.

    bf16 is for its transformer, where nearly all products are; the digits are drawn in float32.
    """
    found = checkpoints.load(name_or_path)
    model = TextToToken(checkpoints.parse_config(TextToTokenConfig, found))
    checkpoints.restore(model, found)
    if precision == "bf16":
        model.transformer.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


@functools.cache
def kept_model(name: str, precision: Precision, device: str) -> TextToToken:
    """A model that a worker process loads once and keeps."""
    tune_allocator()
    return load_text_to_token(name, settle(precision, device)).to(device)


@functools.cache
def kept_tokenizer(name: str, device: str) -> SpeechTokenizer:
    """A tokenizer that a worker process loads once and keeps."""
    tune_allocator()
    return load_tokenizer_of(name).to(device)


@functools.cache
def kept_fingerprint(name: str, device: str) -> tuple[float, ...]:
    """That of `kept_tokenizer`."""
    return kept_tokenizer(name, device).fingerprint()


# --- Generation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A line as numbers."""

    line: Line
    rows: Ids  # [P, W] of its text
    clock: Times  # [P]
    limit: int
    """Frames after which it is endless."""
    least: float
    """Frames before which its end is early."""


def _plan(model: TextToToken, line: Line, config: GenerationConfig) -> _Plan | None:
    """None for a line that the model cannot hold."""
    characters = cells(line.text, model.config.cell)
    assert len(characters), f"nothing to say in {line.text!r}"
    expected = expected_frames(line.text, model.config) * line.pace
    limit, window = math.ceil(config.longest * expected), model.config.transformer.window
    assert window is not None
    if len(characters) + 2 + limit // model.config.step >= window:
        return None
    times = line.pace * clock(characters, model.config)
    return _Plan(line, model.text_rows(characters), times, limit, config.shortest * expected)


def generate(
    model: TextToToken, lines: Sequence[Line], config: GenerationConfig | None = None
) -> list[Spoken]:
    """Say lines, as many at once as `config.batch`; those at fault are drawn again."""
    config = config or GenerationConfig()
    plans: dict[int, _Plan] = {}
    spoken: dict[int, Spoken] = {}
    for at, line in enumerate(lines):
        if (planned := _plan(model, line, config)) is not None:
            plans[at] = planned
        else:
            spoken[at] = Spoken(np.zeros(0, np.uint16), "long")
    # Lines of about the same length in a batch: the shorter ones wait for the longest.
    todo = sorted(plans, key=lambda at: (plans[at].limit, at))
    for attempt in range(config.attempts):
        for start in range(0, len(todo), config.batch):
            chosen = todo[start : start + config.batch]
            found = _generate(model, [plans[at] for at in chosen], config, attempt)
            spoken.update(zip(chosen, found, strict=True))
        todo = [at for at in todo if spoken[at].fault]
    return [spoken[at] for at in range(len(lines))]


@torch.inference_mode()
def _generate(
    model: TextToToken, plans: Sequence[_Plan], config: GenerationConfig, attempt: int
) -> list[Spoken]:
    """One batch, by one attempt. Rows that are done leave once they are a quarter of those left."""
    device = model.table.device
    step = model.config.step
    limits = torch.tensor([plan.limit for plan in plans], device=device)
    steps = -(-int(limits.max()) // step)
    texts = torch.tensor([len(plan.rows) for plan in plans], device=device)
    room = _padded(plans) + _GROWTH
    state = model.transformer.new_state(len(plans), length=room)
    seeds = _seeds(plans, attempt).to(device)
    _read(model, plans, state)
    # A shorter text was read past its end, into entries that come into sight only once they are
    # written anew.
    state.offset.copy_(texts)
    longest = int(texts.max())

    codes = torch.zeros(len(plans), steps * step, dtype=torch.int64, device=device)
    lengths = limits.clone()
    origin = torch.arange(len(plans), device=device)  # which plan each row is
    open_ = torch.ones(len(plans), dtype=torch.bool, device=device)
    rows = torch.from_numpy(model.start_row()).to(device).expand(len(plans), 1, -1)
    for number in range(steps):
        if longest + number == room:
            _lengthen(state, _GROWTH)
            room += _GROWTH
        now = torch.full((len(rows), 1), number * step, device=device)
        hidden = model(rows, now, state)[:, 0]
        first = number * step * model.factors
        drawn = model.draw(hidden, seeds, first, config.sampling)
        for frame in range(step):
            ends = drawn[:, frame * model.factors] == model.end
            at = number * step + frame
            over = open_ & (ends | (at >= limits[origin]))
            lengths[origin[over]] = torch.minimum(limits[origin[over]], torch.tensor(at))
            open_ &= ~over
        drawn[:, :: model.factors].clamp_(max=model.end - 1)
        codes[origin, number * step : (number + 1) * step] = model.frames(drawn)
        left = int(open_.sum())
        if left == 0:
            break
        rows = model.speech_rows(drawn)[:, None]
        size = -(-left // _ROWS) * _ROWS
        if size <= 0.75 * len(open_):
            # Those that go on, and as many that are done as make up the number.
            kept = torch.argsort(open_, descending=True, stable=True)[:size]
            taken = state.take(kept)
            assert isinstance(taken, TransformerState)
            state, rows, seeds = taken, rows[kept], seeds[kept]
            origin, open_ = origin[kept], open_[kept]
    return _judge(codes.cpu().numpy(), lengths.cpu().numpy(), plans, config)


def _lengthen(state: TransformerState, entries: int) -> None:
    """Make room for more positions. The rings have not wrapped and never will, so that an entry is
    a position; attention costs as much as a ring is long, whether or not it is full.
    """
    for layer in state.layers:
        layer.key = F.pad(layer.key, (0, 0, 0, entries))
        layer.value = F.pad(layer.value, (0, 0, 0, entries))


def _seeds(plans: Sequence[_Plan], attempt: int) -> Tensor:
    """[B] int64; seeds go round in 64 bits."""
    numbers = [(plan.line.seed + attempt * _AGAIN) % 2**64 for plan in plans]
    return torch.from_numpy(np.array(numbers, np.uint64).view(np.int64))


def _read(model: TextToToken, plans: Sequence[_Plan], state: TransformerState) -> None:
    """Let the texts into the state: a few rows at a time, each whole, padded to the longest."""
    device = state.active.device
    rows = np.full((len(plans), _padded(plans), model.width), _ABSENT, np.int64)
    times = np.zeros(rows.shape[:2])
    for row, time, plan in zip(rows, times, plans, strict=True):
        row[: len(plan.rows)] = plan.rows
        time[: len(plan.rows)] = plan.clock
    count = max(1, _PREFILL // rows.shape[1])
    for begin in range(0, len(plans), count):
        end = min(begin + count, len(plans))
        size = _padded(plans[begin:end])
        part = model.transformer.new_state(end - begin, length=size)
        read, at = (torch.from_numpy(x[begin:end, :size]).to(device) for x in (rows, times))
        model(read, at, part)
        for whole, piece in zip(state.layers, part.layers, strict=True):
            whole.key[begin:end, :, :size] = piece.key
            whole.value[begin:end, :, :size] = piece.value


def _padded(plans: Sequence[_Plan]) -> int:
    """Positions of the longest text, rounded up: few sizes, as of rows."""
    return -(-max(len(plan.rows) for plan in plans) // _POSITIONS) * _POSITIONS


def _judge(
    codes: Ids, lengths: Ids, plans: Sequence[_Plan], config: GenerationConfig
) -> list[Spoken]:
    repeats = stuck(codes, lengths, config.stuck)
    spoken = []
    for row, plan in enumerate(plans):
        fault: Fault | None = None
        if repeats[row]:
            fault = "stuck"
        elif lengths[row] >= plan.limit:
            fault = "endless"
        elif lengths[row] < max(1.0, plan.least):
            fault = "early"
        spoken.append(Spoken(codes[row, : lengths[row]].astype(np.uint16), fault))
    return spoken


def stuck(codes: Ids, lengths: Ids, limit: int) -> npt.NDArray[np.bool_]:
    """Whether a row repeats its last 1, 2, 3 or 4 frames `limit` frames long: [B, T], [B] → [B]."""
    found = np.zeros(len(codes), bool)
    for period in range(1, _PERIODS + 1):
        if codes.shape[1] <= period:
            break
        same = codes[:, period:] == codes[:, :-period]
        time = np.arange(1, same.shape[1] + 1)
        same &= time + period <= lengths[:, None]
        # Length of the run of repeats that ends at each frame.
        run = time - np.maximum.accumulate(np.where(same, 0, time), axis=1)
        found |= run.max(axis=1) >= limit
    return found


@torch.inference_mode()
def generate_slowly(
    model: TextToToken, line: Line, config: GenerationConfig | None = None
) -> Spoken:
    """The same as `generate` of one line by one attempt: alone, everything anew for every digit."""
    config = config or GenerationConfig()
    plan = _plan(model, line, config)
    assert plan is not None, f"{line.text!r} is too long"
    step, factors = model.config.step, model.factors
    rows = np.concatenate((plan.rows, model.start_row()[None]))
    seed = _seeds([plan], 0)
    said: list[int] = []
    while len(said) < plan.limit * factors:
        # Digits of a step that are not drawn yet are not there.
        drawn = torch.full((1, step * factors), NO_DIGIT)
        speech = torch.tensor(said, dtype=torch.int64).view(-1, step * factors)
        whole = torch.cat((torch.from_numpy(rows), model.speech_rows(speech)))
        times = np.concatenate((plan.clock, np.arange(len(speech) + 1) * step))
        hidden = model(whole[None], torch.from_numpy(times)[None])[:, -1]
        for slot in range(step * factors):
            frame, factor = divmod(slot, factors)
            logits = model.logits(hidden, drawn)[factor][:, frame]
            at = torch.tensor([len(said) + slot])
            sampling = config.sampling
            drawn[:, slot] = sample(
                logits, seed, at, sampling.temperature, sampling.top_k, sampling.top_p
            )
            if factor == 0 and drawn[0, slot] == model.end:
                return _whole(model, [*said, *drawn[0, :slot].tolist()], plan, config)
        said += drawn[0].tolist()
    return _whole(model, said[: plan.limit * factors], plan, config)


def _whole(
    model: TextToToken, said: Sequence[int], plan: _Plan, config: GenerationConfig
) -> Spoken:
    apart = torch.tensor(said, dtype=torch.int64).view(-1, model.factors)
    codes = (apart * model.strides).sum(-1).numpy()
    return _judge(codes[None], np.array([len(codes)]), [plan], config)[0]


# --- Listening ------------------------------------------------------------------------------------


@torch.inference_mode()
def transcribe(
    tokenizer: SpeechTokenizer,
    spoken: Sequence[npt.NDArray[np.integer]],
    batch: int = 64,
    precision: Precision = "fp32",
) -> list[str]:
    """What the tokenizer's own CTC head reads off codes [T] of any lengths; "" where T is 0.

    Raises UserError when it has none.
    """
    if tokenizer.head is None:
        raise UserError("The tokenizer has no CTC head (ctc) to read its codes with.")
    device = tokenizer.head.weight.device
    texts = [""] * len(spoken)
    order = sorted(
        (at for at in range(len(spoken)) if len(spoken[at])), key=lambda i: len(spoken[i])
    )
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        frames = max(len(spoken[at]) for at in chosen)
        codes = np.zeros((len(chosen), frames), np.int64)
        for row, at in zip(codes, chosen, strict=True):
            row[: len(spoken[at])] = spoken[at]  # it is causal: what follows changes nothing
        with lowered(precision, device):
            logits = tokenizer.characters(tokenizer.embed(torch.from_numpy(codes).to(device)))
        per_frame = logits.shape[1] // frames
        for row, at in zip(logits.argmax(-1).cpu(), chosen, strict=True):
            texts[at] = greedy_text(row[: per_frame * len(spoken[at])])
    return texts
