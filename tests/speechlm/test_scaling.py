"""A law that is known comes back from its own losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from typer.testing import CliRunner

from audio_codec.errors import UserError
from speechlm import scaling
from speechlm.cli import app
from speechlm.scaling import Law, Point

TRUTH = Law(floor=1.7, size=400.0, size_exponent=0.34, data=1200.0, data_exponent=0.4)


def runs(noise: float = 0.0) -> list[Point]:
    rng = np.random.default_rng(0)
    return [
        Point(
            f"{size:g}-{columns:g}",
            size,
            columns,
            TRUTH.loss(size, columns) * float(np.exp(noise * rng.standard_normal())),
        )
        for size in (1e6, 1e7, 1e8, 1e9)
        for columns in (1e8, 1e9, 1e10)
    ]


def test_a_law_is_found_again() -> None:
    law = scaling.fit(runs())
    for point in runs():
        assert law.loss(point.parameters, point.columns) == pytest.approx(point.loss, rel=1e-3)
    assert law.size_exponent == pytest.approx(TRUTH.size_exponent, rel=0.05)
    assert law.data_exponent == pytest.approx(TRUTH.data_exponent, rel=0.05)
    assert law.floor == pytest.approx(TRUTH.floor, rel=0.03)


def test_the_gradient_is_that_of_the_objective() -> None:
    logs, x = scaling._arrays(runs(0.01)), np.array([6.1, 7.0, 0.4, 0.3, 0.45])
    value = approx_fprime(x, lambda x: scaling._objective(x, logs)[0], 1e-7)
    assert scaling._objective(x, logs)[1] == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_the_optimum_is_one() -> None:
    size, columns = TRUTH.optimum(1e21)
    assert 6 * size * columns == pytest.approx(1e21)
    for other in (0.8, 1.25):
        assert TRUTH.loss(size * other, columns / other) > TRUTH.loss(size, columns)
    size, tokens = scaling.TEXT.optimum(5.76e23)  # Chinchilla's own budget
    assert 4e10 < size < 1.2e11 and 10 < tokens / size < 40


def run_dir(path: Path, point: Point) -> Path:
    folder = path / point.name
    (folder / "lm").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"output": None}))
    card = {"body_parameters": point.parameters, "steps": 1, "rows": 1, "length": point.columns}
    (folder / "lm" / "card.json").write_text(json.dumps(card))
    lines = [{"step": 0, "loss": 9.0}, {"step": 1, "validation/loss": point.loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_command_fits_draws_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 8)
    folders = [str(run_dir(tmp_path, point)) for point in runs(0.002)]
    picture, numbers = tmp_path / "law.svg", tmp_path / "law.json"
    arguments = ["scaling", "fit", *folders, "--plot", str(picture), "--json", str(numbers)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(numbers.read_text())["metrics"]
    assert found["size_exponent"]["low"] <= found["size_exponent"]["value"]
    assert found["fit_error"]["value"] < 0.01 and found["budget"]["value"] == 6e20
    assert picture.read_text().count("<svg") == 1


def test_runs_of_the_same_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 2)
    folders = [run_dir(tmp_path / point.name, replace(point, name="run")) for point in runs(0.002)]
    points = scaling.read_runs(folders, "validation/loss")
    assert [point.name for point in points] == list(map(str, folders))
    assert len(scaling.bootstrap(points, scaling.fit(points))) == 2
    with pytest.raises(UserError, match="is given twice"):
        scaling.read_runs([folders[0], *folders], "validation/loss")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 runs are too few; give 5"):
        scaling.fit(runs()[:4])
    with pytest.raises(UserError, match="no finished run"):
        scaling.read_run(tmp_path)
    folder = run_dir(tmp_path, runs()[0])
    with pytest.raises(UserError, match="never logged 'validation/other'"):
        scaling.read_run(folder, "validation/other")
    with pytest.raises(UserError, match=r"end in \.svg or \.png"):
        scaling.plot(runs(), TRUTH, tmp_path / "law.pdf")
