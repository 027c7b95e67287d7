"""Numbers keep their uncertainty and their envelope."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from audio_codec.errors import UserError
from speechlm.evaluation import report
from speechlm.evaluation.report import Metric


def test_wilson_against_published_values() -> None:
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        metric = report.proportion(successes, n)
        assert metric.low == pytest.approx(low, abs=1e-4)
        assert metric.high == pytest.approx(high, abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_share_lies_in_its_interval(trial: tuple[int, int]) -> None:
    metric = report.proportion(*trial)
    assert metric.value is not None and metric.low is not None and metric.high is not None
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_bootstrap_covers_and_repeats() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        metric = report.bootstrap_mean(list(rng.normal(3.0, 1.0, 40)), "ms")
        assert metric.low is not None and metric.high is not None
        covered += metric.low <= 3.0 <= metric.high
    assert 86 <= covered <= 99
    values = [1.0, 2.0, 3.0, 50.0, 4.0]
    assert report.bootstrap_median(values) == report.bootstrap_median(values)
    assert report.bootstrap_median(values).value == 3.0


def test_nothing_measured_is_null_with_a_reason() -> None:
    for metric in (report.proportion(0, 0), report.bootstrap_median([])):
        assert metric.value is None and metric.reason and metric.n == 0
        assert metric.as_dict()["reason"] == metric.reason
    assert "reason" not in Metric(1.0).as_dict()
    with pytest.raises(AssertionError, match="reason"):
        Metric(None)
    with pytest.raises(AssertionError):
        Metric(float("nan"))


def test_the_envelope_is_the_published_one(tmp_path: Path) -> None:
    metrics = {"stoi": Metric(0.9, 0.8, 0.95, 12), "pesq": Metric(None, reason="not installed")}
    report.write_json(tmp_path / "new" / "a.json", report.envelope("chat", metrics, text="hé"))
    read = json.loads((tmp_path / "new" / "a.json").read_text())
    assert list(read) == ["command", "commit", "hardware", "date", "metrics", "text"]
    assert read["metrics"]["stoi"] == {"value": 0.9, "low": 0.8, "high": 0.95, "n": 12, "unit": ""}
    assert read["metrics"]["pesq"]["value"] is None
    assert "cores" in read["hardware"] and read["date"].endswith("+00:00")


def test_the_table_shows_every_number() -> None:
    out = io.StringIO()
    metrics = {"s2s": Metric(0.71234, 0.6, 0.8, 300), "pesq": Metric(None, reason="no compiler")}
    report.print_table("eval", metrics, Console(file=out, width=100))
    for shown in ("s2s", "0.7123", "0.6 – 0.8", "300", "null", "no compiler"):
        assert shown in out.getvalue()


def test_scores_enter_the_card_and_replace_older_ones(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"name": "tiny"}')
    file = tmp_path / "scores.json"
    for value in (0.5, 0.75):
        report.write_json(file, report.envelope("eval codec", {"stoi": Metric(value)}))
        report.add_scores(tmp_path, [file])
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["scores"]["eval codec"]["metrics"]["stoi"]["value"] == 0.75


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text('{"command": "x"}')
    with pytest.raises(UserError, match="--json"):
        report.add_scores(tmp_path, [file])
    assert not (tmp_path / "card.json").exists()
