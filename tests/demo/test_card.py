import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.errors import UserError
from demo.card import read_card, render

METRIC = {"value": 0.861, "low": 0.82, "high": 0.9, "n": 300, "unit": ""}
TEXT_TAGS = {"article", "section", "p", "a", "dl", "dt", "dd", "div", "ul", "li"}
TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td"}
HEADINGS = {f"h{level}" for level in range(1, 7)}


class Outline(HTMLParser):
    """The tags in a page, and whether each that opens is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_metrics_become_a_table_with_their_interval() -> None:
    outline = Outline(render({"name": "tiny", "scores": {"spoken_qa": {"s2t_accuracy": METRIC}}}))
    assert "table" in outline.tags
    for text in ("tiny", "Spoken QA", "S2T accuracy", "0.861", "0.82 … 0.9", "300"):
        assert text in outline.text


def test_a_wide_table_is_scrolled_by_keyboard() -> None:
    html = render({"scores": {"spoken_qa": {"s2t_accuracy": METRIC}}})
    assert '<div class="scroll" role="region" aria-label="Measures" tabindex="0">' in html


def test_a_metric_that_was_not_measured_shows_a_dash() -> None:
    metric = {"value": None, "low": None, "high": None, "n": None, "unit": ""}
    assert "–" in Outline(render({"scores": {"pesq": metric}})).text


def test_plain_fields_keep_their_shape() -> None:
    card = {"parameters": 55_123_456, "voices": ["rms", "slt"], "synthetic": True, "note": None}
    text = Outline(render(card)).text
    for part in ("55,123,456", "rms, slt", "yes", "–"):
        assert part in text


def test_an_empty_card_says_so() -> None:
    assert "without a card" in render({})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda item: (
        st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=12), item, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=12), JSON, max_size=4))
def test_any_card_is_drawn_as_balanced_harmless_markup(card: dict[str, object]) -> None:
    outline = Outline(render(card))
    assert outline.open == []
    assert outline.tags <= TEXT_TAGS | TABLE_TAGS | HEADINGS


def test_markup_in_a_card_is_text() -> None:
    hostile = "<script>alert(1)</script>"
    outline = Outline(render({hostile: hostile, "scores": {hostile: {**METRIC, "unit": hostile}}}))
    assert "script" not in outline.tags
    assert hostile in outline.text


def test_read_card(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "card.json").write_text(json.dumps({"name": "tiny"}))
    assert read_card(tmp_path) == {"name": "tiny"}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_broken_card_is_a_users_mistake(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(UserError, match="card.json"):
        read_card(tmp_path)
