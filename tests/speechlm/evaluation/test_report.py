"""Numbers keep their uncertainty and their envelope."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
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
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "scores.json"
    for value in (0.5, 0.75):
        report.write_json(file, report.envelope("eval codec", {"stoi": Metric(value)}))
        report.add_scores(tmp_path, [file])
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["scores"]["eval codec"]["metrics"]["stoi"]["value"] == 0.75


def test_a_sweep_s_scores_stand_beside_the_model_s_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "scores.json"
    for value, extra in (
        (0.1, {}),
        (0.2, {"options": {"sweep": "runs/sweep"}}),
        (0.3, {"options": {"sweep": "runs/other"}}),
        (0.4, {"options": {"sweep": "runs/sweep"}}),
    ):
        made = report.envelope("eval tokenizer", {"wer": Metric(value)}, **extra)
        report.write_json(file, made)
        report.add_scores(tmp_path, [file])
    scores = json.loads((tmp_path / "card.json").read_text())["scores"]
    assert {name: score["metrics"]["wer"]["value"] for name, score in scores.items()} == {
        "eval tokenizer": 0.1,
        "eval tokenizer --sweep runs/sweep": 0.4,
        "eval tokenizer --sweep runs/other": 0.3,
    }


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text('{"command": "x"}')
    for model in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match="'.*' is (no checkpoint folder|neither)"):
            report.add_scores(model, [file])
    assert not (tmp_path / "no").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--json"):
        report.add_scores(tmp_path, [file])
    assert not (tmp_path / "card.json").exists()


# --- Documents ------------------------------------------------------------------------------------

NASTY = '<script src="https://x.invalid/a.js"></script> & "a|b"\n# `code` -- [x](https://x.invalid)'


def document(text: str = NASTY) -> list[report.Block]:
    """One block of every kind, with a text of somebody else's in each."""
    pcm = np.sin(np.arange(24_000, dtype=np.float32) / 10) / 2
    lines = {
        text: [(1.0, Metric(0.5, 0.4, 0.6)), (2.0, Metric(0.6)), (3.0, Metric(None, reason=text))]
    }
    return [
        report.Heading(text),
        report.Paragraph(text),
        report.Table([text, "b"], [[text, "1"], ["2", text]]),
        report.Picture("curve", text, report.curves([report.Panel("stoi", lines)], "bit/s")),
        report.Sound("tone", text, pcm, 24_000),
    ]


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_report_is_one_page_that_asks_for_nothing(tmp_path: Path) -> None:
    report.write_report(tmp_path / "new", NASTY, document())
    text = (tmp_path / "new" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "a" not in page.tags
    assert {"img", "audio", "table", "h2", "p", "figure"} <= set(page.tags)
    assert len(page.addresses) == 3  # the curve, the spectrogram, the sound
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in text and "default-src 'none'" in text
    assert page.text.count(NASTY) >= 5  # as it was written, and only as text


def test_the_markdown_points_at_files_that_are_there(tmp_path: Path) -> None:
    report.write_report(tmp_path, "Title", document("plain"))
    text = (tmp_path / "report.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert sorted(links) == ["media/curve.svg", "media/tone.flac", "media/tone.png"]
    pcm, rate = soundfile.read(tmp_path / "media" / "tone.flac")
    np.testing.assert_allclose(pcm, document()[-1].pcm, atol=1e-4)  # type: ignore[union-attr]
    assert rate == 24_000 and (tmp_path / "media" / "tone.png").read_bytes()[:4] == b"\x89PNG"
    assert "# Title" in text and "| plain | b |\n| --- | --- |\n| plain | 1 |" in text
    assert not list(tmp_path.rglob("*.tmp"))


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=30, deadline=None)
def test_no_text_breaks_a_markdown_table(first: str, second: str) -> None:
    table = report.Table(["a", "b"], [[first, second]])
    *_, header, _, row = report._markdown("t", [table]).rstrip("\n").split("\n")
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", header)) == 3
    assert "<" not in row


def test_drawings_are_the_same_bytes_each_time_and_show_what_they_are_of() -> None:
    first, second = document("x"), document("x")
    assert first[3] == second[3]
    tone = first[4]
    assert isinstance(tone, report.Sound)
    assert report.spectrogram(tone.pcm, 24_000) == report.spectrogram(tone.pcm, 24_000)
    assert report.spectrogram(tone.pcm, 24_000) != report.spectrogram(tone.pcm * 0.1, 24_000)
    panels = [report.Panel(str(i), {"a": [(1.0, Metric(i))]}) for i in range(5)]
    assert report.curves(panels, "x") != report.curves(panels[:4], "x")


def test_a_report_cannot_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            report.check_report(folder)
    report.check_report(tmp_path / "not" / "yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_metric_is_shown_with_its_interval_or_its_reason() -> None:
    assert report.shown(Metric(0.8714, 0.8641, 0.879, 50)) == "0.8714 (0.8641 – 0.879)"
    assert report.shown(Metric(1026.2, unit="bit/s")) == "1026"
    assert report.shown(Metric(None, reason="no compiler")) == "none: no compiler"


@pytest.mark.browser
def test_a_browser_shows_and_plays_it(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a Chromium on the PATH")
    report.write_report(tmp_path, "Title", document())
    address = (tmp_path / "report.html").as_uri()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_function("document.querySelector('audio').duration > 0.9")
        pictures = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        page.wait_for_function(pictures)
        browser.close()
    assert [url for url in asked if not url.startswith("data:")] == [address]
