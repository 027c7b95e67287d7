"""Streaming state as a value: a tree of preallocated tensors that mirrors the module tree.

Nothing hides on a module. A conversation is the rows that it owns in such a tree, so it can be
snapshotted, moved to another slot or machine, and restored by copying those rows.

Rules that every streaming module of the project keeps:

* axis 0 of every tensor is the session slot;
* all zeros means "from silence", so a reset is a fill with zeros;
* tensors are written in place, so that their addresses never change (a CUDA graph can be captured);
* `active` ([B] bool, one tensor shared by the whole tree) freezes the rows that have no input this
  tick: what such a row later says is as if the tick had not been. Its input may be anything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(slots=True)
class State:
    """Base of every streaming state; subclasses add tensors, states, or lists of states."""

    active: Tensor  # [B] bool, shared by the tree

    def __post_init__(self) -> None:
        for child in self.children():
            child._share(self.active)

    def children(self) -> Iterator[State]:
        """The states directly below this one."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, State):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, State))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the tree but `active`, in a fixed order."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "active":
                yield value
        for child in self.children():
            yield from child.tensors()

    @property
    def batch(self) -> int:
        """Number of slots."""
        return self.active.shape[0]

    def _share(self, active: Tensor) -> None:
        self.active = active
        for child in self.children():
            child._share(active)

    def reset(self, slots: Sequence[int] | Tensor | None = None) -> None:
        """Put the given slots (all when None) back to silence and wake them."""
        rows: slice | Tensor = slice(None)
        if isinstance(slots, Tensor):  # numbers or a mask
            rows = slots.to(self.active.device)
        elif slots is not None:
            # The type said: an empty list would become a float tensor, which cannot index.
            rows = torch.tensor(slots, dtype=torch.int64, device=self.active.device)
        for tensor in self.tensors():
            tensor[rows] = 0
        self.active[rows] = True

    def clone(self) -> State:
        """A deep copy that keeps the sharing of `active`."""
        return copy.deepcopy(self)

    def extract(self, slot: int) -> State:
        """The state of one session: a copy with a batch of one."""
        return self.take(torch.tensor([slot], device=self.active.device))

    def take(self, slots: Tensor) -> State:
        """A copy that holds the given slots (int64 [N]) alone, in that order."""
        taken = self._gather(slots)
        taken._share(self.active[slots])
        return taken

    def _gather(self, slots: Tensor) -> State:
        gathered = copy.copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, State):
                setattr(gathered, field.name, value._gather(slots))
            elif isinstance(value, (list, tuple)):
                items = [x._gather(slots) if isinstance(x, State) else x for x in value]
                setattr(gathered, field.name, type(value)(items))
            elif isinstance(value, Tensor) and field.name != "active":
                setattr(gathered, field.name, value[slots])
        return gathered

    def insert(self, slot: int, session: State) -> None:
        """Write a session taken by `extract` into a slot of this batch."""
        assert session.batch == 1, f"a session has one slot, this state has {session.batch}"
        for mine, theirs in zip(self.tensors(), session.tensors(), strict=True):
            mine[slot] = theirs[0]
        self.active[slot] = session.active[0]


def all_active(batch: int, device: torch.device | str | None = None) -> Tensor:
    """The mask of a batch in which every slot has input: [B] bool."""
    return torch.ones(batch, dtype=torch.bool, device=device)


def keep(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where the slot is active, rows of `old` elsewhere; shapes [B, ...]."""
    return torch.where(active.view(-1, *([1] * (new.dim() - 1))), new, old)


def advance(state: Tensor, new: Tensor, active: Tensor) -> None:
    """Write `new` into a tensor of a state, in the rows whose slot is active; shapes [B, ...]."""
    if state.requires_grad:  # a state in training, as of padding that is learned through
        state.copy_(keep(active, new, state))
    else:
        rows = active.view(-1, *([1] * (new.dim() - 1)))
        torch.where(rows, new.detach(), state, out=state)
