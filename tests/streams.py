"""What every streaming module promises, as properties that any of them can be held to.

A module streams in *strides*: the smallest chunk it takes. The promises (see `audio_codec.state`):

* chunks of any number of strides give what one pass over the whole gives;
* what comes later never changes what came out before;
* each slot of a batch lives alone: neighbours may be frozen, reset, moved or overwritten.

`assert_streams` checks all of them along a random script; nothing in it knows the module's inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from audio_codec.state import State

SLOTS = 3
MAX_CHUNK = 4

# Derandomized: a float32 sum in another order may move a number across a quantizer's border. That
# is no bug, it is very rare, and it must not strike at random.
streaming_settings = settings(max_examples=8, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Tick:
    """One step of a batch."""

    strides: int
    active: tuple[bool, ...]
    """Slots that have input; the others get garbage that nobody may look at."""
    reset: tuple[int, ...] = ()
    """Slots put back to silence before the step."""
    move: tuple[int, int] | None = None
    """The session in the first slot is copied over the second before the step."""
    clone: bool = False
    """Go on with a clone; the original is spoilt."""


def chunkings(strides: int, most: int = MAX_CHUNK) -> st.SearchStrategy[list[int]]:
    """Ways to cut a stream of `strides` into chunks of at most `most`."""

    def cut(sizes: list[int]) -> list[int]:
        chunks, left = [], strides
        for size in sizes:
            chunks.append(min(size, left))
            left -= chunks[-1]
            if not left:
                break
        return chunks

    # Enough sizes to fill the stream even if all of them are 1.
    return st.lists(st.integers(1, most), min_size=strides, max_size=strides).map(cut)


def scripts(ticks: int = 12) -> st.SearchStrategy[list[Tick]]:
    """Random lives of a batch of `SLOTS` sessions."""
    slot = st.integers(0, SLOTS - 1)
    often = st.sampled_from([True, True, False])
    seldom = st.sampled_from([False, False, False, True])
    tick = st.builds(
        Tick,
        strides=st.integers(1, MAX_CHUNK),
        active=st.tuples(*[often] * SLOTS),
        reset=seldom.flatmap(lambda yes: st.tuples(slot) if yes else st.just(())),
        move=seldom.flatmap(lambda yes: st.tuples(slot, slot) if yes else st.none()),
        clone=seldom,
    )
    return st.lists(tick, min_size=ticks // 2, max_size=ticks)


@dataclass
class Session:
    """What went into a slot since silence, and what came out."""

    heard: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)

    def copy(self) -> Session:
        return Session(list(self.heard), list(self.said))


@dataclass(frozen=True)
class Streaming:
    """A module under test."""

    forward: Callable[[Tensor, Any], Tensor]
    """(input, state or None) → output."""
    new_state: Callable[[int, int], State]
    """(batch, strides in the longest chunk) → state."""
    source: Callable[[int], Tensor]
    """Random input of so many strides, batch 1."""
    axis: int = 1
    """Time in the input."""
    out_axis: int = 1
    """Time in the output."""
    tolerance: float = 1e-9

    def close(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Codes must be equal, numbers close."""
        assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
        if not found.is_floating_point():
            assert torch.equal(found, expected), f"{what}: {(found != expected).sum()} codes differ"
            return
        worst = float((found - expected).abs().max())
        assert worst <= self.tolerance, f"{what}: off by {worst}"  # also when it is NaN

    def garbage(self, like: Tensor) -> Tensor:
        """What lies in a buffer that nobody filled."""
        if like.is_floating_point():
            return torch.full_like(like, float("nan"))
        return like.flip(-1)


def _split(x: Tensor, chunks: Sequence[int], axis: int) -> Sequence[Tensor]:
    stride = x.shape[axis] // sum(chunks)
    return x.split([stride * chunk for chunk in chunks], axis)


@torch.no_grad()
def assert_chunks_equal_offline(module: Streaming, chunks: Sequence[int]) -> None:
    """Chunk after chunk gives what one pass gives, and a state from silence what None gives."""
    rows = [module.source(sum(chunks)) for _ in range(2)]
    x = torch.cat(rows)
    whole = module.forward(x, None)
    state = module.new_state(2, max(chunks))
    assert not any(bool(tensor.any()) for tensor in state.tensors()), "silence is not all zeros"
    addresses = [tensor.data_ptr() for tensor in state.tensors()]
    parts = [module.forward(part, state) for part in _split(x, chunks, module.axis)]
    module.close(torch.cat(parts, module.out_axis), whole, f"chunks {list(chunks)}")
    moved = addresses != [tensor.data_ptr() for tensor in state.tensors()]
    assert not moved, "state is replaced, not written in place"


@torch.no_grad()
def assert_causal(module: Streaming, strides: int, change: int) -> None:
    """New input from stride `change` on leaves the output before it, and does reach the rest."""
    x, other = module.source(strides), module.source(strides)
    size = x.shape[module.axis] // strides * change
    head = x.narrow(module.axis, 0, size)
    tail = other.narrow(module.axis, size, other.shape[module.axis] - size)
    before = module.forward(x, None)
    after = module.forward(torch.cat((head, tail), module.axis), None)
    out = before.shape[module.out_axis] // strides * change
    module.close(
        after.narrow(module.out_axis, 0, out),
        before.narrow(module.out_axis, 0, out),
        f"output before a change at stride {change}",
    )
    rest = before.shape[module.out_axis] - out
    assert not torch.equal(
        after.narrow(module.out_axis, out, rest), before.narrow(module.out_axis, out, rest)
    ), "the change is not heard at all"


@torch.no_grad()
def assert_slots_live_alone(module: Streaming, script: Sequence[Tick]) -> None:
    """Whatever happens to its neighbours, a session's output is that of its own input alone."""
    state = module.new_state(SLOTS, MAX_CHUNK)
    sessions = [Session() for _ in range(SLOTS)]
    finished: list[Session] = []
    for tick in script:
        if tick.clone:
            old, state = state, state.clone()
            for tensor in old.tensors():
                tensor.fill_(1)
            old.active.fill_(False)
        if tick.reset:
            state.reset(tick.reset)
        for slot in tick.reset:
            finished.append(sessions[slot])
            sessions[slot] = Session()
        if tick.move is not None:
            source, target = tick.move
            state.insert(target, state.extract(source))
            if source != target:
                finished.append(sessions[target])
                sessions[target] = sessions[source].copy()
        state.active.copy_(torch.tensor(tick.active))
        rows = []
        for session, active in zip(sessions, tick.active, strict=True):
            row = module.source(tick.strides)
            rows.append(row if active else module.garbage(row))
            if active:
                session.heard.append(row)
        out = module.forward(torch.cat(rows), state)
        for slot, session in enumerate(sessions):
            if tick.active[slot]:
                session.said.append(out[slot : slot + 1])
    for session in (*finished, *sessions):
        if session.heard:
            alone = module.forward(torch.cat(session.heard, module.axis), None)
            module.close(torch.cat(session.said, module.out_axis), alone, "a session among others")


def assert_streams(module: Streaming, chunks: Sequence[int], script: Sequence[Tick]) -> None:
    """Every promise of a streaming module at once."""
    strides = sum(chunks)
    assert_chunks_equal_offline(module, chunks)
    assert_causal(module, strides, strides // 2)
    assert_slots_live_alone(module, script)
