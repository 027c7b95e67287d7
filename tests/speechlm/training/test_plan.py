"""What a run takes, counted beside what torch counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_runs import config_of, make_data
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from audio_codec.errors import UserError
from audio_codec.transformer import Transformer, TransformerConfig
from speechlm.cli import app
from speechlm.training import work
from speechlm.training.plan import peak_of, plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("window", [None, 8])
def test_flops_are_those_of_the_products(window: int | None) -> None:
    config = TransformerConfig(dim=32, layers=2, heads=4, kv_heads=2, window=window)
    model, time = Transformer(config), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, time, 32))
    seen = sum(min(t + 1, window or time) for t in range(time))
    expected = counter.get_total_flops() + 4 * 2 * 32 * seen  # it knows no attention of a CPU
    assert work._transformer(model, time) * time == pytest.approx(expected)


def test_a_plan_counts_parameters_tokens_and_cost(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path / "run", optimizer={"lr": None})
    found = plan(config, device="H100", processes=2, utilization=0.5, price=3.0)
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values["columns"] == 12 * 6 * 40
    assert values["tokens"] is not None and values["columns"] < values["tokens"]
    assert values["parameters_body"] < values["parameters"] < 30_000
    seconds = values["flops"] / (989.5e12 * 0.5 * 2)
    assert values["cost"] == pytest.approx(3.0 * 2 * seconds / 3600)
    assert 6 * values["optimal_parameters"] * values["optimal_columns"] == pytest.approx(
        values["flops"]
    )
    assert values["memory_state"] == pytest.approx(16 * values["parameters"] / 2 / 2**30)
    assert values["lr"] == pytest.approx(
        config.optimizer.proposed(int(values["parameters_body"])).lr
    )
    assert [round(one.epochs, 1) for one in found.exposures] == [7.1]
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="listen_every is for runs of one process"):
        plan(config.model_copy(update={"listen_every": 5}), processes=2)
    with pytest.raises(UserError, match=r"sources\.0\.rows is 4; it must be a multiple .* 3"):
        plan(config, processes=3)
    gone = [s.model_copy(update={"path": tmp_path / "no"}) for s in config.sources]
    with pytest.raises(UserError, match="no shard"):
        plan(config.model_copy(update={"validation": tuple(gone)}))
    with pytest.raises(UserError, match="device 'H1' is unknown; choices: B200"):
        peak_of("H1")


def test_the_commands_print(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "lm.yaml"
    path.write_text(config_of(made, tmp_path / "run").model_dump_json())  # JSON is YAML too
    planned = CliRunner().invoke(app, ["train", "plan", str(path), "--device", "H100"])
    assert planned.exit_code == 0, planned.output
    assert "optimal_parameters" in planned.output and "seen 7.1 times" in planned.output
    told = CliRunner().invoke(app, ["train", "samples", str(path), "--step", "2"])
    assert told.exit_code == 0, told.output
    assert told.output.count("shards-") >= 4 and "lane 3" in told.output


def test_this_machine_has_a_peak() -> None:
    assert 1e8 < work.peak_flops(torch.device("cpu"), "no") < 1e15
