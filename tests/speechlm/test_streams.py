"""The delay pattern: what stands where, and that it can be undone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from speechlm.streams import ABSENT, Streams


@st.composite
def framed(draw: st.DrawFn) -> tuple[Streams, torch.Tensor]:
    factors = st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple)
    streams = Streams(
        text_size=draw(st.integers(8, 20)),
        codebooks=tuple(draw(st.lists(factors, min_size=1, max_size=4))),
        heard=draw(st.booleans()),
        acoustic_delay=draw(st.integers(0, 3)),
    )
    if draw(st.booleans()):  # a delay for each
        each = st.lists(st.integers(0, 3), min_size=streams.k - 1, max_size=streams.k - 1)
        streams = streams.model_copy(update={"acoustic_delay": tuple(draw(each))})
    time = draw(st.integers(0, 6))
    batch = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    noise = torch.rand(batch, streams.count, time, generator=generator)
    return streams, (noise * torch.tensor(streams.sizes)[:, None]).long()


@given(framed())
def test_undelay_inverts_delay(case: tuple[Streams, torch.Tensor]) -> None:
    streams, frames = case
    columns = streams.delay(frames)
    assert columns.shape[-1] == frames.shape[-1] + max(streams.delays)
    assert torch.equal(streams.undelay(columns), frames)


@given(framed())
def test_gaps_hold_start_in_front_and_absent_behind(case: tuple[Streams, torch.Tensor]) -> None:
    streams, frames = case
    columns, time = streams.delay(frames), frames.shape[-1]
    for stream, (delay, size) in enumerate(zip(streams.delays, streams.sizes, strict=True)):
        assert (columns[:, stream, :delay] == size).all()
        assert (columns[:, stream, delay + time :] == ABSENT).all()


@given(framed(), st.integers(0, 5))
def test_a_frame_never_moves_to_an_earlier_column(
    case: tuple[Streams, torch.Tensor], at: int
) -> None:
    streams, frames = case
    at = min(at, frames.shape[-1])
    changed = frames.clone()
    changed[..., at:] = 0
    columns, other = streams.delay(frames), streams.delay(changed)
    assert torch.equal(columns[..., :at], other[..., :at])


def test_the_drawing() -> None:
    streams = Streams(text_size=9, codebooks=((2, 3), (4,), (4,)))
    assert streams.count == 8
    assert streams.sizes == (9, 6, 4, 4, 6, 4, 4, 9)
    assert streams.delays == (0, 0, 1, 1, 0, 1, 1, 0)
    columns = streams.delay(torch.zeros(8, 2, dtype=torch.long))
    assert columns.tolist() == [
        [0, 0, -1],
        [0, 0, -1],
        [4, 0, 0],
        [4, 0, 0],
        [0, 0, -1],
        [4, 0, 0],
        [4, 0, 0],
        [0, 0, -1],
    ]
    assert streams.start().tolist() == list(streams.sizes)


def test_parts_of_a_column_cover_it_once() -> None:
    streams = Streams(text_size=9, codebooks=((5,),) * 8)
    rows = list(range(streams.count))
    parts = [streams.text_index, *rows[streams.own], *rows[streams.user], streams.heard_index]
    assert sorted(parts) == rows


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(ValidationError, match="acoustic_delay"):
        Streams(text_size=9, codebooks=((5,),), acoustic_delay=-1)


def test_a_delay_for_each_acoustic_codebook() -> None:
    streams = Streams(text_size=9, codebooks=((5,), (5,), (5,)), acoustic_delay=(1, 3))
    assert streams.code_delays == (0, 1, 3) and streams.longest_delay == 3
    with pytest.raises(ValidationError, match="one for each of the 2 acoustic codebooks"):
        Streams(text_size=9, codebooks=((5,), (5,), (5,)), acoustic_delay=(1, 3, 2))
