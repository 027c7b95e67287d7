"""The model card tab: a checkpoint's `card.json`, drawn for people.

A card is free-form JSON, with one convention: an object that holds a `value` is a metric
(`{"value", "low", "high", "n", "unit"}`), and an object of nothing but metrics becomes a table.
Everything else keeps its own shape: objects become sections and definition lists, lists of scalars
become one line, lists of objects stay a list. All text is escaped: a card may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from audio_codec.errors import UserError

STATIC = Path(__file__).parent / "static"

_UPPERCASE = {"asr", "ctc", "fsq", "lm", "pesq", "qa", "s2s", "s2t", "stoi", "tor", "tts", "wer"}


def read_card(directory: Path) -> dict[str, Any]:
    """Read `card.json` of a checkpoint directory; an empty dict where there is none.

    Raises `UserError` when the file is there but is not a JSON object.
    """
    path = directory / "card.json"
    if not path.exists():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(card, dict):
        raise UserError(f"{path} holds a {type(card).__name__}; a card is a JSON object.")
    return card


def render(card: Mapping[str, Any]) -> str:
    """HTML of a card: one section for each nested object, scalars of the top level first."""
    if not card:
        return '<article class="card"><p>This checkpoint came without a card.</p></article>'
    title = escape(str(card.get("name", "Model card")))
    rest = {key: value for key, value in card.items() if key != "name"}
    return f'<article class="card"><h1>{title}</h1>{_object(rest, level=2)}</article>'


def card_tab(card: Mapping[str, Any]) -> gr.HTML:
    """The tab's one component; call it inside a `gr.Tab`."""
    return gr.HTML(
        value=render(card),
        css_template=(STATIC / "card.css").read_text(encoding="utf-8"),
        js_on_load=None,
        apply_default_css=False,
    )


def _label(key: str) -> str:
    """`turn_tor` → `Turn TOR`."""
    words = key.replace("-", "_").split("_")
    words = [word.upper() if word.lower() in _UPPERCASE else word for word in words]
    text = " ".join(words)
    return escape(text[:1].upper() + text[1:])


def _is_metric(value: object) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_metric, value.values()))


def _scalar(value: object) -> str:
    """One value as text; thousands are grouped, floats keep four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    text = str(value)
    if text.startswith(("https://", "http://")):
        link = escape(text, quote=True)
        return f'<a href="{link}" rel="noopener noreferrer" target="_blank">{escape(text)}</a>'
    return escape(text)


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, metric in metrics.items():
        low, high = metric.get("low"), metric.get("high")
        interval = "" if low is None or high is None else f"{_scalar(low)} … {_scalar(high)}"
        count = "" if metric.get("n") is None else _scalar(metric["n"])
        unit = escape(str(metric.get("unit") or ""))
        rows.append(
            f'<tr><th scope="row" title="{escape(name, quote=True)}">{_label(name)}</th>'
            f"<td>{_scalar(metric['value'])}{' ' + unit if unit else ''}</td>"
            f"<td>{interval}</td><td>{count}</td></tr>"
        )
    return (
        # A region in the tab order: the keyboard, too, scrolls a table wider than the screen.
        '<div class="scroll" role="region" aria-label="Measures" tabindex="0">'
        '<table><thead><tr><th scope="col">Measure</th><th scope="col">Value</th>'
        '<th scope="col">95% interval</th><th scope="col">n</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _value(value: object, level: int) -> str:
    if isinstance(value, Mapping):
        return _table(value) if _is_table(value) else _object(value, level)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(not isinstance(item, (Mapping, list)) for item in value):
            return ", ".join(_scalar(item) for item in value) or "–"
        return "<ul>" + "".join(f"<li>{_value(item, level)}</li>" for item in value) + "</ul>"
    return _scalar(value)


def _object(value: Mapping[str, Any], level: int) -> str:
    """Plain fields as a definition list, loose metrics as one table, then a section a child."""
    metrics = {key: item for key, item in value.items() if _is_metric(item)}
    children = {
        key: item for key, item in value.items() if isinstance(item, Mapping) and key not in metrics
    }
    fields = {
        key: item for key, item in value.items() if key not in metrics and key not in children
    }
    parts = []
    if fields:
        rows = "".join(
            f"<div><dt>{_label(key)}</dt><dd>{_value(item, level)}</dd></div>"
            for key, item in fields.items()
        )
        parts.append(f"<dl>{rows}</dl>")
    if metrics:
        parts.append(_table(metrics))
    heading = f"h{min(level, 6)}"
    for key, item in children.items():
        parts.append(
            f"<section><{heading}>{_label(key)}</{heading}>{_value(item, level + 1)}</section>"
        )
    return "".join(parts)
