"""Numbers with their uncertainty, and the one envelope in which every command writes them.

An evaluator returns `dict[str, Metric]` and knows nothing of files; the front door writes them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from audio_codec.errors import UserError
from audio_codec.files import replacing

_Z95 = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured value, its 95% interval (None where none is meant) and its number of trials.

    `value` is None when it could not be measured; `reason` then says why.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None), "no value needs a reason"
        for number in (self.value, self.low, self.high):
            assert number is None or math.isfinite(number), self

    def as_dict(self) -> dict[str, Any]:
        """The metric as it stands in the envelope."""
        plain: dict[str, Any] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "unit": self.unit,
        }
        return plain if self.reason is None else {**plain, "reason": self.reason}


def proportion(successes: int, n: int) -> Metric:
    """A share of `n` trials with Wilson's score interval, which stays honest near 0 and 1.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    assert 0 <= successes <= n, (successes, n)
    if n == 0:
        return Metric(None, n=0, reason="no trial qualified")
    share = successes / n
    centre = (share + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + (_Z95 / (2 * n)) ** 2) / (1 + _Z95**2 / n)
    # At 0 and 1 the interval touches the value; rounding must not put it on the wrong side.
    return Metric(
        share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n
    )


def bootstrap_median(values: Sequence[float], unit: str = "") -> Metric:
    """The median with its percentile-bootstrap interval (2000 seeded resamples)."""
    return _bootstrap(values, np.median, unit)


def bootstrap_mean(values: Sequence[float], unit: str = "") -> Metric:
    """The mean with its percentile-bootstrap interval (2000 seeded resamples)."""
    return _bootstrap(values, np.mean, unit)


def _bootstrap(values: Sequence[float], statistic: Callable[..., Any], unit: str) -> Metric:
    if len(values) == 0:
        return Metric(None, n=0, unit=unit, reason="no trial qualified")
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(sample), size=(2000, len(sample)))
    low, high = np.percentile(statistic(sample[picks], axis=1), [2.5, 97.5])
    return Metric(float(statistic(sample)), float(low), float(high), len(sample), unit)


def envelope(command: str, metrics: Mapping[str, Metric], **extra: Any) -> dict[str, Any]:
    """What a measuring command writes: the metrics and where, when and by what they were measured.

    `extra` adds top-level entries (`chat` adds its `text`).
    """
    return {
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": {name: metric.as_dict() for name, metric in metrics.items()},
        **extra,
    }


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def add_scores(model: Path, scores: Sequence[Path]) -> None:
    """Put measurements (envelopes written by `--json`) into the `card.json` of a checkpoint folder.

    A command's earlier scores are replaced. Raises UserError when a file is not an envelope.
    """
    path = model / "card.json"
    card = _read_object(path) if path.exists() else {}
    known = dict(card.get("scores", {}))
    for file in scores:
        measured = _read_object(file)
        if missing := {"command", "metrics", "date", "hardware"} - measured.keys():
            raise UserError(f"scores '{file}': no '{min(missing)}'; give a file written by --json.")
        known[measured.pop("command")] = measured
    write_json(path, {**card, "scores": known})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"file '{path}' cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"file '{path}' must hold a JSON object.")
    return content


def print_table(title: str, metrics: Mapping[str, Metric], console: Console | None = None) -> None:
    """Draw the metrics as a table on the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for heading in ("value", "95% interval", "n"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for name, metric in metrics.items():
        interval = ""
        if metric.low is not None and metric.high is not None:
            interval = f"{_short(metric.low)} – {_short(metric.high)}"
        count = "" if metric.n is None else str(metric.n)
        if metric.value is None:
            table.add_row(name, "null", interval, count, metric.reason or "")
        else:
            table.add_row(name, _short(metric.value), interval, count, metric.unit)
    (console or Console()).print(table)


def _short(number: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def commit() -> str | None:
    """The checkout's commit, with "+dirty" when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    return head + ("+dirty" if git("status", "--porcelain") else "") if head else None


def hardware() -> str:
    """The machine in words: processor, usable cores, and the GPU if there is one."""
    import torch  # slow to import, and the tables above have no need of it

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{name}, {cores} cores"
    if torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words
