"""How the loss falls with the size of a model and of its data, from runs that are done.

The form is Chinchilla's (arXiv 2203.15556, approach 3), with N parameters and D columns:

    L(N, D) = E + A / N^α + B / D^β

fitted by the Huber loss of the difference of logarithms, by L-BFGS from the best points of a grid;
intervals are of a bootstrap over the runs. What a budget of C = 6·N·D FLOPs is best spent on
follows from the exponents alone. Three sizes by three budgets are the least that tells the five
numbers apart; nine runs tell them roughly, and the intervals say how roughly.

    speechlm scaling fit runs/scaling/* --plot scaling.svg --json scaling.json
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from audio_codec.errors import UserError
from audio_codec.files import replacing
from speechlm.evaluation.report import Metric

Floats = npt.NDArray[np.float64]

LEAST: Final = 5
"""Runs without which five numbers cannot be told."""

HUBER: Final = 1e-3
RESAMPLES: Final = 200
_STARTS: Final = 24


@dataclass(frozen=True, slots=True)
class Point:
    """One finished run."""

    name: str
    parameters: float
    """Without the tables of embeddings."""
    columns: float
    loss: float


@dataclass(frozen=True, slots=True)
class Law:
    """The five numbers."""

    floor: float
    """E, nats: what no model of no size gets below."""
    size: float
    """A."""
    size_exponent: float
    """α."""
    data: float
    """B."""
    data_exponent: float
    """β."""

    def loss(self, parameters: float, columns: float) -> float:
        """The loss of a model of N parameters after D columns."""
        by_size = self.size / parameters**self.size_exponent
        return self.floor + by_size + self.data / columns**self.data_exponent

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and columns that a budget is best spent on."""
        a, b = self.size_exponent, self.data_exponent
        balance = (a * self.size / (b * self.data)) ** (1 / (a + b))
        parameters = balance * (flops / 6) ** (b / (a + b))
        return parameters, flops / 6 / parameters


TEXT: Final = Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
"""Of text, in tokens: Chinchilla's runs fitted anew (arXiv 2404.10102)."""


def read_run(run_dir: Path, metric: str = "validation/loss") -> Point:
    """A finished run of the language model. Raises UserError when it is none, or did not log."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
        card = json.loads((Path(config["output"] or run_dir / "lm") / "card.json").read_text())
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        losses = [record[metric] for record in map(json.loads, lines) if metric in record]
        size, columns = card["body_parameters"], card["steps"] * card["rows"] * card["length"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"'{run_dir}' is no finished run of the language model: {error}."
        ) from error
    if not losses:
        raise UserError(f"'{run_dir}' never logged '{metric}'; it needs validation data.")
    return Point(run_dir.name, float(size), float(columns), float(losses[-1]))


def read_runs(runs: Sequence[Path], metric: str) -> list[Point]:
    """What several finished runs tell, by their folders' names, or paths where names are alike.

    Raises UserError where `read_run` does, and when a run is given twice.
    """
    points = [read_run(run, metric) for run in runs]
    whole = [run.resolve() for run in runs]
    if twice := next((run for run in whole if whole.count(run) > 1), None):
        raise UserError(f"run '{twice}' is given twice; it counts once.")
    names = [point.name for point in points]
    return [
        replace(point, name=str(run)) if names.count(point.name) > 1 else point
        for run, point in zip(runs, points, strict=True)
    ]


def fit(points: Sequence[Point]) -> Law:
    """The law of some runs. Raises UserError when they are too few."""
    if len(points) < LEAST:
        raise UserError(f"scaling fit: {len(points)} runs are too few; give {LEAST} at the least.")
    return _law(_best(points, _starts(points)))


def bootstrap(points: Sequence[Point], law: Law, seed: int = 0) -> list[Law]:
    """The laws of runs drawn anew, with replacement, as many as there are."""
    rng = np.random.default_rng(seed)
    begin = np.array([_vector(law), *_starts(points)[:3]])
    laws: list[Law] = []
    while len(laws) < RESAMPLES:
        chosen = rng.integers(len(points), size=len(points))
        if len(set(chosen.tolist())) >= min(LEAST, len(points)):
            laws.append(_law(_best([points[index] for index in chosen], begin)))
    return laws


def _vector(law: Law) -> Floats:
    logs = (math.log(law.size), math.log(law.data), math.log(law.floor))
    return np.array([*logs, law.size_exponent, law.data_exponent])


def _law(x: Floats) -> Law:
    a, b, e = np.exp(x[:3])
    return Law(float(e), float(a), float(x[3]), float(b), float(x[4]))


def _arrays(points: Sequence[Point]) -> Floats:
    """Logarithms of size, data and loss: [3, runs]."""
    return np.log([[p.parameters, p.columns, p.loss] for p in points]).T


def _objective(x: Floats, logs: Floats) -> tuple[float, Floats]:
    """Huber loss of log L, and its gradient, for x = (ln A, ln B, ln E, α, β)."""
    n, d, loss = logs
    terms = np.stack([x[0] - x[3] * n, x[1] - x[4] * d, np.full_like(n, x[2])])
    top = terms.max(0)
    parts = np.exp(terms - top)
    off = top + np.log(parts.sum(0)) - loss
    parts /= parts.sum(0)
    small = np.abs(off) <= HUBER
    value = np.where(small, off**2 / 2, HUBER * (np.abs(off) - HUBER / 2)).sum()
    slope = np.clip(off, -HUBER, HUBER) * parts  # [3, runs]
    gradient = [*slope.sum(1), -(slope[0] * n).sum(), -(slope[1] * d).sum()]
    # L-BFGS stops by absolute changes; the loss of a good fit is of the order of 1e-6.
    return float(value) * 1e4, np.array(gradient) * 1e4


def _starts(points: Sequence[Point]) -> Floats:
    """The best points of a grid: [starts, 5]."""
    logs = _arrays(points)
    lowest = float(logs[2].min())
    grid = itertools.product(
        np.arange(0.0, 26.0, 5.0),
        np.arange(0.0, 26.0, 5.0),
        lowest + np.array([-2.0, -1.0, -0.5, -0.2, -0.05]),
        np.arange(0.1, 1.6, 0.3),
        np.arange(0.1, 1.6, 0.3),
    )
    found = [(_objective(np.array(x), logs)[0], x) for x in grid]
    return np.array([x for _, x in sorted(found)[:_STARTS]])


def _best(points: Sequence[Point], starts: Floats) -> Floats:
    logs = _arrays(points)
    bounds = [(None, None), (None, None), (None, float(logs[2].min())), (1e-3, 3.0), (1e-3, 3.0)]
    found = [minimize(_objective, x, (logs,), "L-BFGS-B", jac=True, bounds=bounds) for x in starts]
    return np.asarray(min(found, key=lambda one: float(one.fun)).x)


def metrics(points: Sequence[Point], law: Law, drawn: Sequence[Law]) -> dict[str, Metric]:
    """The five numbers, how well they fit, and what ten times the largest budget should buy."""
    largest = max(6 * p.parameters * p.columns for p in points)
    off = [abs(math.log(law.loss(p.parameters, p.columns) / p.loss)) for p in points]

    def interval(value: float, others: Sequence[float], unit: str = "") -> Metric:
        low, high = np.percentile(others, [2.5, 97.5])
        return Metric(value, min(value, float(low)), max(value, float(high)), len(points), unit)

    names = ("floor", "size", "size_exponent", "data", "data_exponent")
    best, ahead = law.optimum(10 * largest), [one.optimum(10 * largest) for one in drawn]
    return {
        **{name: interval(getattr(law, name), [getattr(x, name) for x in drawn]) for name in names},
        "fit_error": Metric(float(np.mean(off)), n=len(points), unit="of the loss"),
        "budget": Metric(10 * largest, unit="FLOP"),
        "optimal_parameters": interval(best[0], [x[0] for x in ahead]),
        "optimal_columns": interval(best[1], [x[1] for x in ahead]),
    }


def check_plot(path: Path) -> None:
    """Raise UserError when no picture can be written under this name; touch nothing."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"plot '{path}': its name must end in .svg or .png.")


def plot(points: Sequence[Point], law: Law, path: Path) -> None:
    """Draw the runs and the law: loss over columns by size, and what to buy for a budget.

    Raises UserError where `check_plot` does.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sizes = sorted({p.parameters for p in points})
    columns = np.geomspace(min(p.columns for p in points) / 2, 4 * max(p.columns for p in points))
    for size in sizes:
        (line,) = left.plot(columns, [law.loss(size, d) for d in columns], label=f"{size:.2g}")
        here = [p for p in points if p.parameters == size]
        left.plot([p.columns for p in here], [p.loss for p in here], "o", color=line.get_color())
    left.axhline(law.floor, color="grey", linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="columns of 80 ms", ylabel="loss, nats", title="runs and law")
    left.legend(title="parameters")
    spent = [6 * p.parameters * p.columns for p in points]
    budgets = np.geomspace(min(spent), 100 * max(spent))
    right.plot(budgets, [law.optimum(c)[0] for c in budgets], label="parameters")
    right.plot(budgets, [law.optimum(c)[1] for c in budgets], label="columns")
    right.plot(spent, [p.parameters for p in points], "o", color="grey", markersize=3, label="runs")
    right.set(xscale="log", yscale="log", xlabel="FLOPs, 6·N·D", title="what a budget is best for")
    right.legend()
    drawn = io.BytesIO()
    figure.savefig(
        drawn, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
    )
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getvalue())
