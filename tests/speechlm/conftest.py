"""A process of its own for every test, and a model that does what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from audio_codec.audio import FRAME_SIZE, Pcm
from speechlm.duplex import DuplexOutput
from speechlm.training import run


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps one precision a process; each test stands for a process.

    How memory is kept would outlast the test.
    """
    monkeypatch.setattr(run, "tune_allocator", lambda: None)
    yield
    AcceleratorState._reset_state(True)


Behaviour = Callable[[Pcm], tuple[Pcm, str, str]]
"""A frame of the user's → a frame of the assistant's, what it says, what it heard."""


class PuppetState:
    """What the slots of a puppet do."""

    def __init__(self, batch: int) -> None:
        self.active = torch.ones(batch, dtype=torch.bool)
        self.rows: list[Behaviour | None] = [None] * batch

    def reset(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.rows[slot] = None
            self.active[slot] = True


@dataclass
class Puppet:
    """A model of which every talk behaves as `make(seed)` does."""

    make: Callable[[int], Behaviour]

    def __post_init__(self) -> None:
        self.pieces = [""]

    def new_state(self, batch: int) -> PuppetState:
        return PuppetState(batch)

    def configure(self, state: PuppetState, slot: int, *, seed: int) -> None:
        assert state.rows[slot] is None, "a slot is reset before it is configured"
        state.rows[slot] = self.make(seed)

    def step(self, pcm: torch.Tensor, state: PuppetState) -> DuplexOutput:
        batch = len(state.rows)
        assert pcm.shape == (batch, 1, FRAME_SIZE) and pcm.dtype == torch.float32
        sound = torch.zeros_like(pcm)
        tokens = torch.zeros(2, batch, dtype=torch.int64)
        for slot, row in enumerate(state.rows):
            if state.active[slot]:
                assert row is not None
                said, *texts = row(pcm[slot, 0].numpy().copy())
                sound[slot, 0] = torch.from_numpy(said)
                for kind, text in enumerate(texts):
                    if text:
                        self.pieces.append(text)
                        tokens[kind, slot] = len(self.pieces) - 1
        return DuplexOutput(sound, tokens[0], tokens[1])

    def piece(self, token: int) -> str:
        return self.pieces[token]


@pytest.fixture
def puppet() -> Callable[[Callable[[int], Behaviour]], Puppet]:
    """Makes a model from what each of its talks does."""
    return Puppet


@pytest.fixture
def silent() -> Puppet:
    """A model that never says anything."""
    return Puppet(lambda seed: lambda frame: (np.zeros_like(frame), "", ""))
