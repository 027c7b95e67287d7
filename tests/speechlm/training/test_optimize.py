"""Rates, averages, what counts as a spike."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from audio_codec.errors import UserError
from speechlm.training.distributed import drop_untouched
from speechlm.training.optimize import (
    Average,
    OptimizerConfig,
    SpikeConfig,
    SpikeGuard,
    clip_gradients,
    load_optimizer,
    recompute,
)


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1))
@settings(max_examples=50)
def test_a_cosine_falls_from_the_rate_to_its_last_share(
    steps: int, warmup: int, final: float
) -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine", warmup=warmup, final=final)
    rates = [config.rate(step, steps + warmup) for step in range(steps + warmup)]
    assert all(a <= b for a, b in itertools.pairwise(rates[:warmup]))
    assert rates[warmup] == 2.0
    falling = rates[warmup:]
    assert all(b <= a for a, b in itertools.pairwise(falling)) and falling[-1] >= 2.0 * final
    middle = OptimizerConfig(lr=2.0, schedule="cosine", warmup=0, final=final).rate(50, 100)
    assert middle == pytest.approx(1 + final)


def test_an_infinite_schedule_knows_no_end_and_warms_up_again() -> None:
    config = OptimizerConfig(
        lr=1.0, schedule="infinite", warmup=10, cooldown=20, hold=0.4, rewarm=(100,), decay=0.0
    )
    rates = [config.rate(step, 200) for step in range(200)]
    assert rates == [config.rate(step, 10_000) for step in range(200)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert rates[19] == pytest.approx(0.7) and rates[29:100] == [pytest.approx(0.4)] * 71
    assert rates[100] == pytest.approx(0.46) and rates[109] == 1.0
    assert rates[129:] == [pytest.approx(0.4)] * 71
    ends = config.model_copy(update={"decay": 0.25, "final": 0.1})
    assert [ends.rate(step, 200) for step in range(150)] == rates[:150]
    assert ends.rate(199, 200) == pytest.approx(0.04)


def test_the_proposed_rate_is_that_of_the_rule() -> None:
    config = OptimizerConfig(lr=None, weight_decay=None)
    assert config.proposed(10**9).lr == pytest.approx(9.3e-5, rel=0.01)
    assert config.proposed(10**9).weight_decay == 0.1
    given_one = OptimizerConfig(lr=1e-3)
    assert given_one.proposed(10**9) == given_one
    with pytest.raises(UserError, match="must be numbers"):
        config.build(nn.Linear(2, 2))


def test_an_even_mean_is_the_mean() -> None:
    model = nn.Linear(3, 3)
    average = Average(model, 0.0)
    seen = []
    for number in range(1, 5):
        nn.init.normal_(model.weight)
        seen.append(model.weight.detach().clone())
        average.add(model, number)
    assert torch.allclose(average.weights["weight"], torch.stack(seen).mean(0), atol=1e-6)


@given(st.lists(st.floats(1, 2), min_size=5, max_size=30), st.floats(50, 1e6))
def test_a_spike_stands_out_of_the_losses_before_it(losses: list[float], high: float) -> None:
    guard = SpikeGuard(SpikeConfig(window=5, deviations=1e3))
    for loss in losses[:5]:
        assert not guard.spiked(loss)
    spread = torch.tensor(losses[:5], dtype=torch.float64).std(correction=0)
    before = guard.state_dict()
    assert guard.spiked(math.nan)
    assert guard.spiked(high) == (high > sum(losses[:5]) / 5 + 1e3 * float(spread))
    if high > 2000:
        assert guard.state_dict() == before  # a spike does not make the next one look small
    again = SpikeGuard(guard.config)
    again.load_state_dict(before)
    assert again.state_dict() == before and len(before["losses"]) == 5


def test_a_loss_that_is_no_number_is_a_spike_and_forgotten() -> None:
    guard = SpikeGuard(SpikeConfig(window=3))
    found = [guard.spiked(loss) for loss in (1.0, math.nan, 1.1, math.inf, 0.9, 1.0, 50.0)]
    assert found == [False, True, False, True, False, False, True]


def test_a_resumed_optimizer_keeps_its_moments_and_takes_the_settings_of_today() -> None:
    model = nn.Linear(3, 2)
    before = OptimizerConfig(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.5).build(model)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    after = OptimizerConfig(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1).build(model)
    load_optimizer(after, before.state_dict())
    assert torch.equal(after.state[model.weight]["exp_avg"], before.state[model.weight]["exp_avg"])
    settings = [
        (group["lr"], group["betas"], group["weight_decay"]) for group in after.param_groups
    ]
    assert settings == [(1e-3, (0.8, 0.95), 0.1), (1e-3, (0.8, 0.95), 0.0)]
    with pytest.raises(ValueError, match="loaded state dict"):
        load_optimizer(after, torch.optim.AdamW(nn.Linear(3, 2).parameters()).state_dict())


def test_what_nothing_used_stays_where_it_is() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = OptimizerConfig(lr=0.1, weight_decay=0.5).build(model)
    before = [p.detach().clone() for p in model[1].parameters()]
    loss = model[0](torch.ones(1, 2)).sum() + 0 * model[1](torch.ones(1, 2)).sum()
    loss.backward()
    drop_untouched(model)
    optimizer.step()
    assert all(map(torch.equal, before, model[1].parameters()))
    assert all(p.grad is not None for p in model[0].parameters())


def test_the_norm_before_clipping_is_told() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.grad = torch.full((1, 4), 3.0)
    assert clip_gradients(model, 1.5).item() == 6.0
    assert model.weight.grad.norm().item() == pytest.approx(1.5)


def test_recomputation_leaves_gradients_and_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    recompute(model)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, before[name])
