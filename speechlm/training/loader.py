"""Makes batches in the background, and says how long the trainer had to wait for them.

    worker    │ batch 1 │ batch 2 │ batch 3 │ …            ahead by at most `ahead` batches
    trainer   │ wait │ step on 1 ──────│ step on 2 ──────│ step on 3 …

What is read ahead is nobody's position: `state_dict` is that of the batch last handed out, so a
resumed run makes again what lay waiting when it was killed.
"""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

Batches = TypeVar("Batches", covariant=True)


class Resumable(Protocol[Batches]):
    """What can be read ahead of: `speechlm.data.Mixture`."""

    def next(self) -> Batches:
        """The next batches."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches last given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""


class Loader(Generic[Batches]):
    """Reads a source in a thread of its own; with `ahead` 0, when asked, in the caller's.

    A context manager: on leaving it the thread ends.
    """

    def __init__(self, source: Resumable[Batches], ahead: int = 2) -> None:
        assert ahead >= 0, ahead
        self.source, self.ahead = source, ahead
        self._state = source.state_dict()
        self._ready: queue.Queue[tuple[Any, Any]] = queue.Queue(max(1, ahead))
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._waited, self._since = 0.0, time.monotonic()

    def next(self) -> Batches:
        """The next batches, in the source's order. Raises what the source raises."""
        began = time.monotonic()
        if self.ahead == 0:
            item = self._make()
        else:
            if self._thread is None:
                self._stop.clear()
                self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
                self._thread.start()
            item = self._ready.get()
        self._waited += time.monotonic() - began
        batches, state = item
        if isinstance(batches, BaseException):
            self.close()
            raise batches
        self._state = state
        return batches

    def busy(self) -> float:
        """Share of the time since the last look in which the trainer did not wait for data."""
        now = time.monotonic()
        share = 1 - self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return max(0.0, share)

    def state_dict(self) -> dict[str, Any]:
        """The position of the trainer: after the batches last handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; what was read ahead is forgotten."""
        self.close()
        self.source.load_state_dict(state)
        self._state = self.source.state_dict()

    def close(self) -> None:
        """End the thread. Reading on starts another, after what this one had read."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():
            try:  # it may stand before a full queue
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread = None
        self._ready = queue.Queue(max(1, self.ahead))

    def __enter__(self) -> Loader[Batches]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self) -> tuple[Any, Any]:
        return self.source.next(), self.source.state_dict()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._make()
            except BaseException as error:  # handed on to who asks for the batch
                self._ready.put((error, None))
                return
            self._ready.put(item)
