"""The loss of a step as one sum, however its rows are cut into pieces and over processes.

A kind of prediction (text, heard, audio) counts as a weighted mean over all that a step has of it.
A piece of the step, some rows on some process, knows but its own mean; weighed by its share of the
weights, and summed over all pieces, the means of the pieces are the mean of the whole:

    Σ w·nll / Σ w   =   Σ over pieces p of  (Σ_p w / Σ w) · (Σ_p w·nll / Σ_p w)

So gradients are summed, never averaged, and no number depends on how the rows were shared out.
Those that are only looked at are put together from their sums and counts.

Shapes: B rows, S streams, T columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from speechlm.model import Batch, LossConfig, SpeechLM
from speechlm.streams import Streams
from speechlm.training import distributed

Masses = dict[str, float]
"""Sum of the loss weights of each kind of prediction."""


def _rows(streams: Streams) -> dict[str, int | slice]:
    """Which streams each kind of prediction in `LossConfig` is about."""
    voices = slice(streams.own.start, streams.user.stop)  # the user's weigh nothing unless learned
    rows: dict[str, int | slice] = {"text": streams.text_index, "audio": voices}
    return {**rows, "heard": streams.heard_index} if streams.heard else rows


def masses(batch: Batch, streams: Streams) -> Masses:
    """What a batch has of each kind."""
    weights = batch.weights.double()
    return {kind: float(weights[:, rows].sum()) for kind, rows in _rows(streams).items()}


def summed(parts: Sequence[Masses]) -> Masses:
    """The masses of several batches together."""
    return {kind: sum(part[kind] for part in parts) for kind in parts[0]}


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """A batch as at most so many pieces of some rows each."""
    segments = repeat(None) if batch.segments is None else batch.segments.chunk(pieces)
    return [
        Batch(*tensors)
        for tensors in zip(
            batch.inputs.chunk(pieces),
            batch.targets.chunk(pieces),
            batch.weights.chunk(pieces),
            segments,
            strict=False,
        )
    ]


class Objective(nn.Module):
    """Model and loss as one module, the way wrappers want it."""

    def __init__(self, model: SpeechLM, config: LossConfig, sharded: bool = False) -> None:
        """`sharded` says that this module's parameters lie on several ranks."""
        super().__init__()
        self.model, self.config, self.sharded = model, config, sharded

    def forward(
        self, batch: Batch, shares: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss of a batch, or its part in that of a larger one of which it is these shares.

        With it come the means of `Losses.parts` and their counts. (A tuple, for FSDP2 looks for
        tensors in nothing but containers: with a dataclass it would not notice the backward pass
        begin.)
        """
        batch = replace(batch, weights=batch.weights.to(self.model.text_head.weight.dtype))
        config = self.config
        if shares is not None:
            update = {kind: getattr(config, kind) * share for kind, share in shares.items()}
            config = config.model_copy(update=update)
        losses = self.model.loss(batch, config)
        total = losses.total
        if self.sharded and torch.is_grad_enabled():
            total = total + distributed.touch(self)
        return total, losses.parts, losses.counts


Tally = dict[str, tuple[float, float]]
"""Sums, and how much was summed up."""


def tally(parts: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tally:
    """Means and their counts as sums and counts, which add up."""
    return {name: (float(parts[name] * count), float(count)) for name, count in counts.items()}


class Meter:
    """Means of what was measured since the last look."""

    def __init__(self) -> None:
        self.sums: Tally = {}

    @classmethod
    def of(cls, measured: Iterable[Tally]) -> Meter:
        """What several have measured, in one."""
        whole = cls()
        for sums in measured:
            whole.add("", sums)
        return whole

    def add(self, prefix: str, numbers: Tally) -> None:
        """Take in sums and counts, as of one piece of a step."""
        for key, (value, count) in numbers.items():
            name = f"{prefix}/{key}" if prefix else key
            sum_, of = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (sum_ + value, of + count)

    def read(self, together: bool = False) -> dict[str, float]:
        """The means; starts anew. `together` takes in what all ranks have measured."""
        whole = Meter.of(distributed.collect(self.sums) if together else [self.sums])
        self.sums = {}
        return {name: value / count for name, (value, count) in whole.sums.items()}
