"""Numbers with their uncertainty, the one envelope in which every command writes them, and reports.

An evaluator returns `dict[str, Metric]` and knows nothing of files; the front door writes them.
One with more to show also returns a document, a list of blocks that is written twice:

    blocks ─┬─ FOLDER/report.md     for a repository, beside media/*.svg, *.png, *.flac
            └─ FOLDER/report.html   one file that holds everything and asks nobody for anything
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table as TerminalTable

from audio_codec import checkpoint as checkpoints
from audio_codec.errors import UserError
from audio_codec.files import check_writable, replacing

if TYPE_CHECKING:
    from audio_codec.audio import Pcm  # imports torch, which tables have no need of

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


def bootstrap_ratio(parts: Sequence[float], wholes: Sequence[float], unit: str = "") -> Metric:
    """Sum of `parts` over sum of `wholes`, with its percentile-bootstrap interval over the pairs.

    Of an error rate, say, the errors and the words of each utterance. Resamples whose wholes are
    all 0 have no ratio and are left out.
    """
    assert len(parts) == len(wholes), (len(parts), len(wholes))
    part, whole = (np.asarray(values, dtype=np.float64) for values in (parts, wholes))
    if not whole.any():
        return Metric(None, n=len(part), unit=unit, reason="no trial qualified")
    rng, ratios = np.random.default_rng(0), []
    # One resample at a time, so that memory grows with the trials alone.
    for _ in range(2000):
        picks = rng.integers(len(part), size=len(part))
        if total := whole[picks].sum():
            ratios.append(part[picks].sum() / total)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Metric(float(part.sum() / whole.sum()), float(low), float(high), len(part), unit)


def _bootstrap(values: Sequence[float], statistic: Callable[..., Any], unit: str) -> Metric:
    if len(values) == 0:
        return Metric(None, n=0, unit=unit, reason="no trial qualified")
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(sample), size=(2000, len(sample)))
    low, high = np.percentile(statistic(sample[picks], axis=1), [2.5, 97.5])
    return Metric(float(statistic(sample)), float(low), float(high), len(sample), unit)


def distinct(names: Iterable[str]) -> list[str]:
    """The names of metrics or codecs, each once: a second "mimi" becomes "mimi_2"."""
    found: list[str] = []
    for name in names:
        unique, again = name, 2
        while unique in found:
            unique, again = f"{name}_{again}", again + 1
        found.append(unique)
    return found


def envelope(command: str, metrics: Mapping[str, Metric], **extra: Any) -> dict[str, Any]:
    """What a measuring command writes: the metrics and where, when and by what they were measured.

    `extra` adds top-level entries (`chat` adds its `text`). Of these `options` are what makes it
    another measurement than the plain command is, as {"sweep": "runs/sweep"}; see `add_scores`.
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


def add_scores(model: str | Path, scores: Sequence[Path]) -> None:
    """Put measurements (envelopes written by `--json`) into the `card.json` of a checkpoint folder.

    Earlier scores of the same command with the same `options` are replaced. Raises UserError when
    there is no checkpoint, or a file is not an envelope.
    """
    folder = checkpoints.resolve(model)
    if not (folder / "config.json").exists():
        raise UserError(f"model '{model}' is no checkpoint folder: it has no config.json.")
    path = folder / "card.json"
    card = _read_object(path) if path.exists() else {}
    known = dict(card.get("scores", {}))
    for file in scores:
        measured = _read_object(file)
        if missing := {"command", "metrics", "date", "hardware"} - measured.keys():
            raise UserError(f"scores '{file}': no '{min(missing)}'; give a file written by --json.")
        said = (f"--{name} {value}" for name, value in measured.pop("options", {}).items())
        known[" ".join((measured.pop("command"), *said))] = measured
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
    table = TerminalTable(title=title, title_justify="left")
    table.add_column("metric")
    for heading in ("value", "95% interval", "n"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for name, metric in metrics.items():
        count = "" if metric.n is None else str(metric.n)
        if metric.value is None:
            table.add_row(name, "null", _interval(metric), count, metric.reason or "")
        else:
            table.add_row(name, _short(metric.value), _interval(metric), count, metric.unit)
    (console or Console()).print(table)


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f"{_short(metric.low)} – {_short(metric.high)}"


def shown(metric: Metric) -> str:
    """A metric as one reads it: "0.871 (0.864 – 0.879)", or why there is none."""
    if metric.value is None:
        return f"none: {metric.reason}"
    interval = _interval(metric)
    return _short(metric.value) + (f" ({interval})" if interval else "")


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
    import torch  # slow to import, and tables have no need of it

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


# --- Documents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heading:
    """Opens a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text as wide as the header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing with its caption."""

    name: str
    """Of its file, without a suffix: letters, digits, "-" and "_"."""
    caption: str
    svg: bytes


@dataclass(frozen=True, slots=True)
class Sound:
    """Something to listen to: its spectrogram over a player."""

    name: str
    """As a picture's."""
    caption: str
    pcm: Pcm  # [S]
    sample_rate: int


Block = Heading | Paragraph | Table | Picture | Sound

# The page may use what it carries, and nothing else: the browser itself refuses any request.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8886; }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; max-width: 100%; vertical-align: top; }
img { display: block; max-width: 100%; background: #fff; }
audio { width: 100%; }
"""


def check_report(folder: str | Path) -> None:
    """Raise the UserError that `write_report` would raise for this folder; touch nothing."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"report '{path}' is a file; name a folder.")
    check_writable(path / "report.html")


def write_report(folder: str | Path, title: str, blocks: Sequence[Block]) -> None:
    """Write a document as `report.md` (with `media/`) and as `report.html`, each file whole.

    Both end with where, when and by what it was measured. Raises UserError where `check_report`
    does.
    """
    check_report(folder)
    root = Path(folder)
    made = envelope(title, {})
    footer = f"Measured {made['date']} on {made['hardware']}, commit {made['commit'] or 'unknown'}."
    blocks = [*blocks, Paragraph(footer)]
    media: dict[str, bytes] = {}
    for block in blocks:
        files = _media(block)
        assert not media.keys() & files.keys(), f"two blocks are named {sorted(files)}"
        media |= files
    for name, content in media.items():
        with replacing(root / "media" / name) as temporary:
            temporary.write_bytes(content)
    for name, text in (
        ("report.md", _markdown(title, blocks)),
        ("report.html", _html(title, blocks, media)),
    ):
        with replacing(root / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _media(block: Block) -> dict[str, bytes]:
    """The files that a block is made of."""
    if isinstance(block, Picture):
        return {f"{block.name}.svg": block.svg}
    if isinstance(block, Sound):
        flac = io.BytesIO()
        soundfile.write(flac, block.pcm.clip(-1, 1), block.sample_rate, "PCM_16", format="FLAC")
        return {
            f"{block.name}.png": spectrogram(block.pcm, block.sample_rate),
            f"{block.name}.flac": flac.getvalue(),
        }
    return {}


def _markdown(title: str, blocks: Sequence[Block]) -> str:
    def plain(text: str) -> str:
        return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(plain(cell) for cell in cells) + " |"

    parts = [f"# {plain(title)}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {plain(text)}")
            case Paragraph(text):
                parts.append(plain(text))
            case Table(header, rows):
                rule = "|" + " --- |" * len(header)
                parts.append("\n".join([row(header), rule, *(row(cells) for cells in rows)]))
            case Picture(name, caption):
                parts.append(f"![{plain(caption)}](media/{name}.svg)")
            case Sound(name, caption):
                picture, sound = f"media/{name}.png", f"media/{name}.flac"
                parts.append(f"![{plain(caption)}]({picture})\n[{plain(caption)}]({sound})")
    return "\n\n".join(parts) + "\n"


def _html(title: str, blocks: Sequence[Block], media: Mapping[str, bytes]) -> str:
    kinds = {".svg": "image/svg+xml", ".png": "image/png", ".flac": "audio/flac"}

    def source(name: str) -> str:
        kind = kinds[Path(name).suffix]
        return f"data:{kind};base64,{base64.b64encode(media[name]).decode()}"

    def row(cells: Sequence[str], tag: str) -> str:
        first, *rest = (html.escape(cell) for cell in cells)
        others = "".join(f"<{tag}>{cell}</{tag}>" for cell in rest)
        return f"<tr><th>{first}</th>{others}</tr>"

    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Table(header, rows):
                body = "\n".join(row(cells, "td") for cells in rows)
                parts.append(f'<div class="wide"><table>{row(header, "th")}\n{body}</table></div>')
            case Picture(name, caption):
                words = html.escape(caption)
                parts.append(
                    f'<figure><img alt="{words}" src="{source(f"{name}.svg")}">'
                    f"<figcaption>{words}</figcaption></figure>"
                )
            case Sound(name, caption):
                words = html.escape(caption)
                parts.append(
                    f'<figure><img alt="spectrogram: {words}" src="{source(f"{name}.png")}">'
                    f'<audio controls src="{source(f"{name}.flac")}"></audio>'
                    f"<figcaption>{words}</figcaption></figure>"
                )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


# --- Drawings -------------------------------------------------------------------------------------
#
# matplotlib by its objects, without pyplot: no window, no state of the process.


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot: lines of metrics over x."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, Metric]]]
    """Name → points; one without a value is left out."""


def curves(panels: Sequence[Panel], label: str, *, logarithmic: bool = False) -> bytes:
    """Panels side by side, four a row, as SVG; a line has one colour in all of them.

    Bars are the metrics' intervals; `label` says what x is. The same panels give the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    width = min(4, len(panels))
    height = math.ceil(len(panels) / width)
    # Text as text would need the reader to have the font; a salt makes the SVG's ids repeat.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "speechlm"}):
        figure = Figure(figsize=(3 * width, 2.4 * height + 0.4), layout="constrained")
        axes = list(figure.subplots(height, width, squeeze=False).flat)
        for panel, axis in zip(panels, axes, strict=False):
            for name, points in panel.lines.items():
                known = [(x, m, m.value) for x, m in points if m.value is not None]
                if not known:
                    continue
                below = [v - (v if m.low is None else m.low) for _, m, v in known]
                above = [(v if m.high is None else m.high) - v for _, m, v in known]
                axis.errorbar(
                    [x for x, _, _ in known],
                    [v for _, _, v in known],
                    # Rounding may put a bootstrap's end on the wrong side of its value.
                    yerr=np.maximum([below, above], 0),
                    color=f"C{names.index(name) % 10}",
                    marker="o",
                    markersize=3,
                    capsize=2,
                    label=name,
                )
            axis.set_title(panel.title, fontsize=9)
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
            if logarithmic:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        found = [axis.get_legend_handles_labels() for axis in axes]
        entries = {name: handle for pair in found for handle, name in zip(*pair, strict=True)}
        handles, names = list(entries.values()), list(entries)
        figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def spectrogram(pcm: Pcm, sample_rate: int) -> bytes:
    """Level over time (s) and frequency (kHz) of [S], as PNG.

    Every picture has one scale, -100 … -20 dB of a full-scale sine, so that two can be compared.
    """
    from matplotlib.figure import Figure

    size, hop = 1024, 256
    padded = np.pad(pcm, (size // 2, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(pcm) + 1 : hop]
    window = np.hanning(size)
    levels = 20 * np.log10(np.abs(np.fft.rfft(frames * window)) * 2 / window.sum() + 1e-9)
    figure = Figure(figsize=(4, 1.8), layout="constrained", dpi=110)
    axis = figure.subplots()
    axis.imshow(
        levels.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-100,
        vmax=-20,
        extent=(0, len(frames) * hop / sample_rate, 0, sample_rate / 2000),
    )
    axis.set_xlabel("s", fontsize=7)
    axis.set_ylabel("kHz", fontsize=7)
    axis.tick_params(labelsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()
