"""A state is a value: rows can be reset, copied, moved and frozen without a trace on the others."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from audio_codec.state import State, advance, all_active, keep


@dataclass(slots=True)
class Leaf(State):
    ring: Tensor  # [B, 4]
    count: Tensor  # [B] int64


@dataclass(slots=True)
class Tree(State):
    first: Leaf
    rest: list[Leaf]
    flag: Tensor  # [B] bool


def leaf(batch: int) -> Leaf:
    return Leaf(
        all_active(batch), torch.randn(batch, 4), torch.randint(1, 9, (batch,), dtype=torch.int64)
    )


def tree(batch: int = 3) -> Tree:
    return Tree(all_active(batch), leaf(batch), [leaf(batch), leaf(batch)], torch.ones(batch) > 0)


def rows(state: State, slot: int) -> list[Tensor]:
    return [tensor[slot].clone() for tensor in state.tensors()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_node_of_the_tree_shares_one_mask() -> None:
    state = tree()
    state.active[1] = False
    for node in (state.first, *state.rest):
        assert node.active is state.active
    assert state.batch == 3
    assert len(list(state.tensors())) == 7
    assert all(tensor is not state.active for tensor in state.tensors())


def test_a_mask_reaches_nodes_below_nodes() -> None:
    @dataclass(slots=True)
    class Root(State):
        below: Tree

    state = Root(all_active(3), tree())
    assert state.below.rest[1].active is state.active


def test_reset_zeroes_the_rows_it_is_given_and_wakes_them() -> None:
    state = tree()
    state.active.fill_(False)
    others = rows(state, 0), rows(state, 2)
    state.reset([1])
    assert state.active.tolist() == [False, True, False]
    assert all(not row.any() for row in rows(state, 1))
    assert same(rows(state, 0), others[0]) and same(rows(state, 2), others[1])


@pytest.mark.parametrize(
    "slots",
    [(0, 2), torch.tensor([0, 2]), torch.tensor([True, False, True])],
    ids=["sequence", "indices", "mask"],
)
def test_reset_takes_numbers_or_a_mask(slots: tuple[int, ...] | Tensor) -> None:
    state = tree()
    middle = rows(state, 1)
    state.reset(slots)
    assert all(not row.any() for slot in (0, 2) for row in rows(state, slot))
    assert same(rows(state, 1), middle)


def test_reset_of_no_slot_does_nothing_and_of_none_everything() -> None:
    state = tree()
    before = [rows(state, slot) for slot in range(3)]
    state.reset([])
    assert all(same(rows(state, slot), before[slot]) for slot in range(3))
    state.reset()
    assert not any(bool(tensor.any()) for tensor in state.tensors())


def test_a_clone_is_deep_and_shares_its_own_mask() -> None:
    state = tree()
    twin = state.clone()
    kept = [rows(state, slot) for slot in range(3)]
    assert same(rows(twin, 1), kept[1])
    twin.reset()
    twin.active[0] = False
    assert all(same(rows(state, slot), kept[slot]) for slot in range(3))
    assert state.active.all()
    for node in (twin.first, *twin.rest):
        assert node.active is twin.active


def test_extract_copies_one_row_and_insert_puts_it_anywhere() -> None:
    state, other = tree(3), tree(5)
    state.active[2] = False
    session = state.extract(2)
    assert session.batch == 1 and all(len(tensor) == 1 for tensor in session.tensors())
    assert all(node.active is session.active for node in session.children())
    taken = rows(state, 2)
    state.reset()  # the copy is the session's own
    before = [rows(other, slot) for slot in range(5)]
    other.insert(4, session)
    assert same(rows(other, 4), taken) and not other.active[4]
    assert all(same(rows(other, slot), before[slot]) for slot in range(4))
    assert other.active[:4].all()
    with pytest.raises(AssertionError, match="one slot"):
        other.insert(0, tree(2))


def test_take_copies_rows_in_the_order_asked_for() -> None:
    state = tree(4)
    state.active[3] = False
    taken = state.take(torch.tensor([3, 1]))
    assert taken.batch == 2 and taken.active.tolist() == [False, True]
    assert all(node.active is taken.active for node in taken.children())
    assert same(rows(taken, 0), rows(state, 3)) and same(rows(taken, 1), rows(state, 1))
    kept = rows(taken, 0)
    state.reset()
    assert same(rows(taken, 0), kept)


def test_advance_writes_the_active_rows_in_place_and_lets_no_garbage_through() -> None:
    state = torch.zeros(3, 2)
    address = state.data_ptr()
    new = torch.full((3, 2), torch.nan, requires_grad=True)
    new.data[1] = 5.0
    advance(state, new, torch.tensor([False, True, False]))
    assert state.tolist() == [[0, 0], [5, 5], [0, 0]] and state.data_ptr() == address
    assert not state.requires_grad


def test_keep_picks_rows_and_lets_no_garbage_through() -> None:
    old, new = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    new[1] = float("nan")
    assert keep(torch.tensor([True, False]), new, old)[1].eq(0).all()
    assert keep(torch.tensor([True, False]), new, old)[0].eq(1).all()
