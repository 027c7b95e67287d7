import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient

from audio_codec.errors import UserError
from demo.app import create_app, launch
from demo.talk import EXAMPLES
from streaming.client import Client
from streaming.engine import Engine
from streaming.protocol import AudioFormat
from streaming.testing import EchoModel, InProcess, Pause, Say, ScriptedSpeaker


@pytest.fixture(scope="module")
def page() -> Iterator[TestClient]:
    card = {"name": "echo", "hours": 12.5}
    with (
        Engine(EchoModel(), slots=1, name="echo") as engine,
        TestClient(create_app(engine, card)) as client,
    ):
        yield client


def test_the_page_holds_both_tabs_and_the_card(page: TestClient) -> None:
    html = page.get("/").text
    for text in ('"title":"speechlm"', '"Talk"', '"Model card"', "Ask it something", "12.5"):
        assert text in html


def test_nothing_in_the_page_or_its_theme_comes_from_elsewhere(page: TestClient) -> None:
    for path in ("/", "/theme.css"):
        text = page.get(path).text
        for host in ("fonts.googleapis", "fonts.gstatic", "cdn.", "google-analytics"):
            assert host not in text
    assert page.get("/config").json()["analytics_enabled"] is False


@pytest.mark.parametrize("path", ["/demo/talk.js", "/web/speechlm-client.js", "/favicon.ico"])
def test_what_the_page_loads_is_served(page: TestClient, path: str) -> None:
    assert page.get(path).status_code == 200


def test_every_example_ships_small_and_is_offered(page: TestClient) -> None:
    html = page.get("/").text
    sizes = []
    for example in EXAMPLES:
        assert example.text in html
        answer = page.get(f"/demo/examples/{example.slug}.mp3")
        assert answer.headers["content-type"] == "audio/mpeg"
        sizes.append(len(answer.content))
    assert sum(sizes) < 200_000


def test_the_conversation_shares_the_origin_of_the_page(page: TestClient) -> None:
    frame = np.full(1920, 0.25, np.float32)
    client = Client("ws://demo", AudioFormat.PCM_F32, transport=InProcess(page.app))
    recording = asyncio.run(ScriptedSpeaker([Say(frame), Pause(0.08)]).run(client))
    np.testing.assert_array_equal(recording.pcm[-1920:], frame)
    assert client.session["model"] == "echo"


def test_launch_wants_a_line_at_least() -> None:
    with pytest.raises(UserError, match="slots: 0"):
        launch(slots=0)


def test_launch_names_the_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no-such-model"):
        launch("no-such-model")
