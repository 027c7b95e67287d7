"""From documents to packed batches of columns, exactly resumable.

Each row of a batch (a *lane*) reads its own endless sequence of documents (`speechlm.sources`), one
after the other. So the whole position in the data is two numbers a lane, and a resumed run sees
what an uninterrupted one would have seen.

    lane 0   │ dialogue 17 ────────────┬ dialogue 4 ─────── … │  goes on in the next row, its first
    lane 1   │ dialogue 9 ──────┬ dialogue 30 ───────────── … │  input there the column before
    lane 2   │ text ┬ text ┬ text ┬ text ┬ (padding)          │  text is never cut

Lanes are numbered over all processes: any number of them reads the same rows, each its share.

Shapes: S streams, T columns, B rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from audio_codec.errors import UserError
from speechlm.documents import Document, WeightConfig
from speechlm.model import Batch
from speechlm.sources import Documents, Exposure, Pool, Source, open_source
from speechlm.streams import ABSENT, Streams
from speechlm.text_tokenizer import TextTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """Part of a document in a row of a batch."""

    lane: int
    number: int
    """Of the document in its lane."""
    name: str
    first: int
    """Column of the row that it begins in."""
    columns: int


@dataclass(slots=True)
class _Lane:
    """Where a lane stands."""

    number: int = 0
    """The next document."""
    used: int = 0
    """Columns of it that are used already."""
    held: list[int] = field(default_factory=list)
    """Earlier documents that did not fit, and wait for a row with room."""


_HOPELESS = 1000


class Packer:
    """Fills rows of one source, a lane each."""

    def __init__(
        self,
        documents: Documents,
        streams: Streams,
        rows: int,
        length: int,
        first_lane: int = 0,
        lookahead: int = 0,
        name: str = "source",
    ) -> None:
        """`length` is the number of columns in a row; lanes count from `first_lane`.

        A whole document longer than a row is left out; the first such is told of by this `name`.
        Where a whole document does not fit, the longest that does of the `lookahead` next ones
        takes its place; it waits itself, for the beginning of the next row at the latest.
        """
        self.documents, self.streams, self.length = documents, streams, length
        self.lookahead, self.name = lookahead, name
        self.left_out = 0
        """Documents in a row that were too long."""
        self.lanes = range(first_lane, first_lane + rows)
        # Each lane starts at another point of its first document: were all conversations some rows
        # long, all would be cut alike.
        self.places = [_Lane(used=self._phase(lane)) for lane in self.lanes]
        self.placed: list[Placed] = []
        """What the last batch is made of."""
        self._made: dict[tuple[int, int], Document] = {}
        self._told = False

    def _phase(self, lane: int) -> int:
        document = self.documents.document(lane, 0)
        golden = (lane * (math.sqrt(5) - 1) / 2) % 1  # spread evenly, however many lanes
        return 0 if document.whole else int(golden * document.weights.shape[1])

    def _document(self, lane: int, number: int) -> Document:
        if self.lookahead == 0:
            return self.documents.document(lane, number)
        if (lane, number) not in self._made:  # it may be looked at in several rows
            self._made[lane, number] = self.documents.document(lane, number)
        return self._made[lane, number]

    def _choose(self, lane: int, place: _Lane, room: int) -> int | None:
        """The number of the document that comes next into a row with so much room left."""
        if place.used:
            return place.number
        fresh = range(place.number, place.number + self.lookahead + 1 - len(place.held))
        waiting = [*place.held, *fresh]
        if room == self.length:
            return waiting[0]
        best, longest = None, 0
        for number in waiting:
            document = self._document(lane, number)
            size = document.weights.shape[1]
            if not document.whole:  # it fits into any room, and is never passed over
                return number if best is None else best
            if longest < size <= room:
                best, longest = number, size
        return best

    def next(self) -> Batch:
        """The next batch: every lane moves on by one row.

        Raises UserError when next to no document fits into a row.
        """
        rows, count = len(self.lanes), self.streams.count
        inputs = np.full((rows, count, self.length), ABSENT, np.int64)
        targets = np.full_like(inputs, ABSENT)
        weights = np.zeros(inputs.shape, np.float32)
        segments = np.zeros((rows, self.length), np.int64)
        self.placed = []
        for row, lane in enumerate(self.lanes):
            place = self.places[row]
            filled = segment = 0
            while filled < self.length:
                number = self._choose(lane, place, self.length - filled)
                if number is None:
                    break
                document = self._document(lane, number)
                used = place.used if number == place.number else 0
                size = document.weights.shape[1]
                if document.whole and size > self.length:
                    self._leave_out(document)
                    self._done(lane, place, number)
                    continue
                self.left_out = 0
                take = min(self.length - filled, size - used)
                into, taken = slice(filled, filled + take), slice(used, used + take)
                inputs[row, :, into] = document.columns[:, taken]
                targets[row, :, into] = document.columns[:, 1:][:, taken]
                weights[row, :, into] = document.weights[:, taken]
                segments[row, into] = segment
                self.placed.append(Placed(lane, number, document.name, filled, take))
                filled, segment = filled + take, segment + 1
                if used + take == size:
                    self._done(lane, place, number)
                else:
                    place.held += range(place.number, number)
                    place.number, place.used = number, used + take
                    self._made.pop((lane, number), None)
            segments[row, filled:] = segment
        packed = bool((segments[:, 0] != segments[:, -1]).any())
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(weights),
            torch.from_numpy(segments) if packed else None,
        )

    def _done(self, lane: int, place: _Lane, number: int) -> None:
        """Go on to the document after one, or back to those that wait."""
        if number < place.number:
            place.held.remove(number)
        else:
            place.held += range(place.number, number)
            place.number, place.used = number + 1, 0
        self._made.pop((lane, number), None)

    def _leave_out(self, document: Document) -> None:
        columns = document.weights.shape[1]
        self.left_out += 1
        if self.left_out > _HOPELESS:
            raise UserError(
                f"{self.name}: {_HOPELESS} documents one after the other are longer than a row, "
                f"{self.length} columns (the last, '{document.name}', has {columns}); make length "
                "larger or max_words smaller."
            )
        if not self._told:
            self._told = True
            log.warning(
                "%s: '%s' has %d columns and a row %d: such long documents are left out",
                *(self.name, document.name, columns, self.length),
            )


def check_shared(sources: Sequence[Source], world: int) -> None:
    """Raise UserError where so many processes cannot share the rows of each source evenly."""
    for number, source in enumerate(sources):
        if source.rows % world:
            raise UserError(
                f"sources.{number}.rows is {source.rows}; it must be a multiple of the number "
                f"of processes, {world}."
            )


class Mixture:
    """Several sources in fixed shares: each step has one batch of each."""

    def __init__(
        self,
        sources: Sequence[Source],
        streams: Streams,
        tokenizer: TextTokenizer,
        weights: WeightConfig,
        *,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lookahead: int = 0,
    ) -> None:
        """`rank` is the number of this process among `world`; each reads its share of the lanes.

        Raises UserError on data that is missing or unfit, and where lanes cannot be shared evenly.
        """
        check_shared(sources, world)
        total = sum(source.rows for source in sources)
        self.sources, self.length = sources, length
        self.shares = [source.rows / total for source in sources]
        self.packers = []
        for number, source in enumerate(sources):
            rows = source.rows // world
            opened = open_source(source, streams, tokenizer, weights, seed + 1000 * number)
            first, name = rank * rows, f"sources.{number}"
            self.packers.append(Packer(opened, streams, rows, length, first, lookahead, name))

    def next(self) -> list[tuple[float, Batch]]:
        """One batch a source, with its share of the rows."""
        return [(share, p.next()) for share, p in zip(self.shares, self.packers, strict=True)]

    def exposures(self, steps: int) -> list[Exposure]:
        """How often so many steps see the samples of each folder.

        Raises UserError where that is more often than the folder's `epochs` allow.
        """
        found: list[Exposure] = []
        for source, packer in zip(self.sources, self.packers, strict=True):
            pool = getattr(packer.documents, "pool", None)
            if isinstance(pool, Pool):
                found += pool.exposures(steps * source.rows * self.length)
        for one in found:
            if one.limit is not None and one.epochs > one.limit:
                raise UserError(
                    f"sources: the samples of '{one.path}' would be seen {one.epochs:.2g} times in "
                    f"{steps} steps; its epochs allow {one.limit:g}."
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position in the data of this process's lanes; `together` makes it that of all."""
        return {
            "places": [
                [[lane.number, lane.used, *lane.held] for lane in packer.places]
                for packer in self.packers
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position of all lanes; this process takes its own.

        Raises UserError when it is one of other sources.
        """
        rows = [len(places) for places in state["places"]]
        if rows != [source.rows for source in self.sources]:
            raise UserError(
                f"sources: their rows are {[source.rows for source in self.sources]}, but the run "
                f"to go on with has {rows}."
            )
        for packer, places in zip(self.packers, state["places"], strict=True):
            packer.places = [
                _Lane(int(number), int(used), [int(waiting) for waiting in held])
                for number, used, *held in (places[lane] for lane in packer.lanes)
            ]


def together(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of all lanes, from those of each process in the order of ranks."""
    by_source = zip(*(state["places"] for state in states), strict=True)
    return {"places": [[place for part in parts for place in part] for parts in by_source]}
