"""Draws follow the distribution, keep to their support, and belong to their session alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

from audio_codec import layers
from audio_codec.sampling import Sampling, normal, sample, uniform

DRAWS = 40_000


def logits_of(rows: int, size: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def numbers(rows: int, seed: int = 1) -> Tensor:
    # From the whole range of int64, negative ones too.
    return torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(seed))


def many(logits: Tensor, draws: int = DRAWS, **how: Any) -> Tensor:
    """Tokens of one session with these logits [V]."""
    counter = torch.arange(draws)
    seed = torch.full_like(counter, 42)
    return sample(logits.expand(draws, -1), seed, counter, **how)


def p_value(tokens: Tensor, p: Tensor) -> float:
    """Of a chi-square test that tokens were drawn from p; rare classes are pooled."""
    counts, expected = torch.bincount(tokens, minlength=len(p)).double(), p.double() * len(tokens)
    rare = expected < 8
    assert counts[expected == 0].sum() == 0, "a token of no probability was drawn"
    pooled = [torch.cat((x[~rare], x[rare].sum().view(1))) for x in (counts, expected)]
    kept = pooled[1] > 0
    found, meant = (x[kept].numpy() for x in pooled)
    if len(meant) == 1:  # the one possible outcome
        return 1.0
    return float(stats.chisquare(found, meant * found.sum() / meant.sum()).pvalue)


# --- Noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["counters", "seeds", "both"])
def test_noise_is_even_and_does_not_repeat(way: str) -> None:
    steps, still = torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)
    seed, counter = {"counters": (still, steps), "seeds": (steps, still), "both": (steps, steps)}[
        way
    ]
    u = uniform(seed, counter)
    assert u.dtype == torch.float32 and float(u.min()) > 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    following = torch.corrcoef(torch.stack((u[:-1], u[1:])).double())[0, 1]
    assert abs(float(following)) < 0.015


def test_sessions_with_neighbouring_seeds_are_unrelated() -> None:
    counter = torch.arange(20_000)
    streams = torch.stack([uniform(torch.full_like(counter, s), counter) for s in range(-4, 4)])
    assert float((torch.corrcoef(streams.double()) - torch.eye(8)).abs().max()) < 0.035
    # Nor is one stream another one, shifted.
    shifted = torch.corrcoef(torch.stack((streams[0, 1:], streams[1, :-1])).double())[0, 1]
    assert abs(float(shifted)) < 0.035


def test_the_noise_of_a_seed_never_changes() -> None:
    # Stored conversations replay only as long as these numbers hold.
    seed, counter = torch.tensor([0, 1, -1, 2**63 - 1]), torch.tensor([0, 7, 10**12, -5])
    expected = []
    for s, c in zip(seed.tolist(), counter.tolist(), strict=True):
        expected.append(splitmix(s, c))
    assert uniform(seed, counter).tolist() == expected


def splitmix(seed: int, counter: int) -> float:
    """The same in Python's own integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    bits = mix((mix((seed + golden) & mask) + counter * golden) & mask)
    return ((bits >> 41) + 0.5) / 2**23


# --- Independence ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0, 3),
    at=st.integers(0, 8),
)
def test_a_row_does_not_know_its_neighbours(
    rows: int, size: int, top_k: int, top_p: float, temperature: float, at: int
) -> None:
    at %= rows
    logits, seed, counter = logits_of(rows, size), numbers(rows), numbers(rows, 2)
    together = sample(logits, seed, counter, temperature, top_k, top_p)
    one = slice(at, at + 1)
    alone = sample(logits[one], seed[one], counter[one], temperature, top_k, top_p)
    assert together[at] == alone[0]
    order = torch.randperm(rows)
    moved = sample(logits[order], seed[order], counter[order], temperature, top_k, top_p)
    assert torch.equal(moved, together[order])
    # The same settings, given a row each and among other rows' settings.
    own = sample(
        logits,
        seed,
        counter,
        torch.where(torch.arange(rows) == at, temperature, 1.7),
        torch.where(torch.arange(rows) == at, top_k, 2),
        torch.where(torch.arange(rows) == at, top_p, 0.5).float(),
    )
    assert own[at] == together[at]


# --- Distribution ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("size", [2, 30, 500])
def test_draws_follow_the_softmax(size: int, temperature: float) -> None:
    logits = logits_of(1, size)[0]
    tokens = many(logits, 4_000 if size == 500 else DRAWS, temperature=temperature)
    assert p_value(tokens, torch.softmax(logits / temperature, 0)) > 1e-3


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 29, 30, 31])
def test_top_k_keeps_k_and_their_proportions(top_k: int, as_tensor: bool) -> None:
    logits = logits_of(1, 30)[0]
    tokens = many(logits, top_k=torch.full((DRAWS,), top_k) if as_tensor else top_k)
    p = torch.softmax(logits, 0)
    kept = torch.zeros(30).index_fill_(0, p.argsort(descending=True)[:top_k], 1.0)
    assert p_value(tokens, p * kept / (p * kept).sum()) > 1e-3


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, 5), (0.97, 5), (0.95, 4), (0.91, 4), (0.89, 3), (0.65, 2), (0.39, 1), (1e-6, 1)],
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: int) -> None:
    p = torch.tensor([0.04, 0.4, 0.2, 0.3, 0.06])
    tokens = many(p.log(), top_p=top_p)
    best = [1, 3, 2, 4, 0][:kept]
    shares = torch.zeros(5).index_copy_(0, torch.tensor(best), p[best])
    assert p_value(tokens, shares / shares.sum()) > 1e-3


def test_top_p_counts_what_top_k_left() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.15])
    # Of the two best, 0.5 / 0.7 = 0.71 is the first: enough for 0.7, though not of the whole.
    assert many(p.log(), top_k=2, top_p=0.7).unique().tolist() == [0]
    assert many(p.log(), top_k=2, top_p=0.75).unique().tolist() == [0, 1]


def test_the_tail_of_a_large_flat_vocabulary_can_be_drawn() -> None:
    # Rounding in a long cumulative sum must neither cut the tail off nor bend the middle.
    size = 50_000
    seed = torch.arange(1_000_000)
    u = uniform(seed, torch.zeros_like(seed))
    seed = torch.cat([seed[(u - wanted).abs().argmin()].view(1) for wanted in (0.0, 0.3, 0.7, 1.0)])
    logits = torch.linspace(0, -1e-3, size).expand(4, -1)  # falling, so that rank is the index
    tokens = sample(logits, seed, torch.zeros_like(seed))
    expected = uniform(seed, torch.zeros_like(seed)) * size
    assert float((tokens - expected).abs().max()) < 0.001 * size
    assert tokens[-1] > size - 10


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.zeros(6)
    logits[2] = -torch.inf
    assert many(logits).unique().tolist() == [0, 1, 3, 4, 5]
    logits[:] = -torch.inf
    logits[4] = 0
    assert many(logits).unique().tolist() == [4]


# --- Temperature 0 --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_temperature_zero_takes_the_likeliest(rows: int, size: int, seed: int) -> None:
    logits = logits_of(rows, size, seed)
    for top_k in (0, 3):
        tokens = sample(logits, numbers(rows), numbers(rows, 2), 0.0, top_k)
        assert torch.equal(tokens, logits.argmax(1))


def test_temperatures_mix_in_a_batch() -> None:
    logits = logits_of(1, 50).expand(DRAWS, -1)
    counter = torch.arange(DRAWS)
    temperature = (counter % 2).float()
    tokens = sample(logits, torch.zeros_like(counter), counter, temperature)
    assert bool((tokens[::2] == logits[0].argmax()).all())
    assert p_value(tokens[1::2], torch.softmax(logits[0], 0)) > 1e-3


def test_extreme_logits_and_half_precision_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 9.9e3]])
    assert sample(logits, numbers(1), numbers(1), 1e-6).item() == 0
    assert sample(logits.bfloat16(), numbers(1), numbers(1), 1.0).item() == 0


# --- Config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_q", 1)],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        Sampling.model_validate({"temperature": 1.0, field: value})


def test_normal_numbers_are_normal_and_belong_to_their_pair() -> None:
    counter = torch.arange(DRAWS)
    drawn = normal(torch.tensor([[3], [4]]), counter)  # two sessions
    assert drawn.shape == (2, DRAWS) and drawn.dtype == torch.float32
    assert bool(drawn.isfinite().all()) and 3.5 < float(drawn.abs().max()) < 5.4
    for row in drawn:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(drawn)[0, 1])) < 0.03
    assert torch.equal(normal(torch.tensor(4), counter[100:200]), drawn[1, 100:200])


# --- In compiled loops ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 60),
    top_k=st.lists(st.integers(0, 70), min_size=9, max_size=9),
    top_p=st.floats(0.01, 1.0),
    heat=st.lists(st.floats(-1, 3, width=32), min_size=9, max_size=9),
    most=st.none() | st.integers(1, 70),
    ruled_out=st.booleans(),
)
def test_a_few_rows_are_drawn_as_many_are(
    rows: int,
    size: int,
    top_k: list[int],
    top_p: float,
    heat: list[float],
    most: int | None,
    ruled_out: bool,
) -> None:
    logits = logits_of(rows, size)
    if ruled_out:
        logits[:, size // 2 :: 2] = -torch.inf
    arguments = (numbers(rows), numbers(rows, 2), torch.tensor(heat[:rows]))
    rest = (torch.tensor(top_k[:rows]), top_p, most)
    with torch.no_grad():
        few = sample(logits, *arguments, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "FEW", 0)
            assert torch.equal(few, sample(logits, *arguments, *rest))
    assert not most or bool((few[:, None] == logits.topk(min(most, size)).indices).any(1).all())


def test_settings_and_logits_of_any_layout_will_do() -> None:
    logits = logits_of(40, 6).T
    with torch.no_grad():
        plain = sample(logits.contiguous(), numbers(6), numbers(6, 2), 0.7, 0, 0.9)
        heat = torch.full((6,), 0.7, dtype=torch.float64)
        share = torch.full((6, 1), 0.9, dtype=torch.float64)
        assert torch.equal(sample(logits, numbers(6), numbers(6, 2), heat, 0, share), plain)


def test_logits_that_are_no_numbers_are_drawn_from_all_the_same() -> None:
    for wrong in (torch.nan, -torch.inf):
        logits = torch.full((2, 5), wrong)
        with torch.no_grad():
            drawn = sample(logits, numbers(2), numbers(2, 2))
        assert bool(((drawn >= 0) & (drawn < 5)).all())
