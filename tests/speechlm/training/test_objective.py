"""The loss of a step, and the numbers beside it, from pieces of it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.transformer import TransformerConfig
from speechlm.model import Batch, LMConfig, LossConfig, SpeechLM
from speechlm.streams import ABSENT, PAD, Streams
from speechlm.training.objective import Meter, Objective, cut, masses, tally

STREAMS = Streams(text_size=20, codebooks=((3, 2), (5,), (5,)))


@pytest.fixture(scope="module")
def model() -> SpeechLM:
    torch.manual_seed(0)
    shape = TransformerConfig(dim=16, layers=1, heads=2, hidden=16, window=8)
    return SpeechLM(LMConfig(streams=STREAMS, temporal=shape, depth=shape, codec="none")).double()


def uneven(seed: int) -> Batch:
    """Rows that have more, less, or nothing of each kind of prediction."""
    chance = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(STREAMS.sizes)[:, None]
    columns = (torch.rand(4, STREAMS.count, 8, generator=chance) * sizes).long()
    text = columns[:, STREAMS.text_index]
    text[torch.rand(text.shape, generator=chance) < 0.5] = PAD
    weights = torch.rand(4, STREAMS.count, 7, generator=chance).double()
    kept = torch.rand(4, STREAMS.count, 1, generator=chance)
    weights = weights * (torch.rand(weights.shape, generator=chance) < kept)
    weights[:, STREAMS.user] = 0
    weights[1, STREAMS.own] = 0
    targets = columns[:, :, 1:].masked_fill(weights == 0, ABSENT)
    return Batch(columns[:, :, :-1], targets, weights, None)


@given(seed=st.integers(0, 1000), pieces=st.integers(2, 4), ranks=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_no_number_depends_on_how_the_rows_are_cut(
    model: SpeechLM, seed: int, pieces: int, ranks: int
) -> None:
    batch = uneven(seed)
    objective = Objective(model, LossConfig(heard=0.7, z=1e-3))
    with torch.no_grad():
        whole, parts, _ = objective(batch)
        mass = masses(batch, STREAMS)
        total, meters = 0.0, [Meter() for _ in range(ranks)]
        for number, piece in enumerate(cut(batch, pieces)):
            has = masses(piece, STREAMS)
            shares = {kind: has[kind] / mass[kind] if mass[kind] else 0.0 for kind in mass}
            loss, *measured = objective(piece, shares)
            total += float(loss)
            meters[number % ranks].add("", tally(*measured))
    together = Meter()
    for meter in meters:
        together.add("", meter.sums)
    assert total == pytest.approx(float(whole), rel=1e-9)
    assert together.read() == pytest.approx({k: float(v) for k, v in parts.items()}, rel=1e-5)
    assert together.read() == {}


def test_every_mean_has_a_count(model: SpeechLM) -> None:
    losses = model.loss(uneven(3))
    assert losses.parts.keys() == losses.counts.keys() and len(losses.parts) > 8
    assert {field.name for field in fields(losses)} == {"total", "parts", "counts"}
