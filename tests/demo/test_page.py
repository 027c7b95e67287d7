"""The page in a real browser: an echo stands in for the model, a recording for the microphone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import uvicorn

from demo.app import create_app
from demo.talk import EXAMPLES, EXAMPLES_DIR
from streaming import server
from streaming.engine import Engine
from streaming.testing import EchoModel

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

QUESTION = EXAMPLES_DIR / f"{EXAMPLES[0].slug}.mp3"
REFUSE = """
window.refusals = 0;
navigator.mediaDevices.getUserMedia = () => {
  window.refusals++;
  return Promise.reject(new DOMException("no", "NotAllowedError"));
};
"""
# As a browser does outside a click; a client waits ten seconds for it, here three.
MUTE = """
AudioContext.prototype.resume = () => new Promise(() => {});
const later = window.setTimeout;
window.setTimeout = (act, ms, ...rest) => later(act, ms === 10000 ? 3000 : ms, ...rest);
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """The address of a demo with one line, whose model answers after the question is over."""
    with Engine(EchoModel(delay=22), slots=1, name="echo") as engine:
        listener = server.listen("127.0.0.1", 0)
        config = uvicorn.Config(create_app(engine), log_level="error", timeout_graceful_shutdown=1)
        web = uvicorn.Server(config)
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        yield "http://127.0.0.1:{1}".format(*listener.getsockname())
        web.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a Chromium on the PATH")
    microphone = tmp_path_factory.mktemp("microphone") / "question.wav"
    pcm, rate = soundfile.read(QUESTION)
    # Chromium plays it in a loop: the silence leaves room for the echo between two questions.
    soundfile.write(microphone, np.pad(pcm, (rate // 4, 3 * rate)), rate)
    arguments = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, origin: str) -> Iterator[Page]:
    """A fresh page; at its end: no script has failed, and nothing foreign was asked for."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    addresses: list[str] = []
    errors: list[str] = []
    context.on("request", lambda request: addresses.append(request.url))
    page.on("websocket", lambda socket: addresses.append(socket.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []
    own = (origin, f"blob:{origin}", origin.replace("http", "ws"))
    assert addresses, "the page was never opened"
    assert [address for address in addresses if not address.startswith(own)] == []


def open_page(page: Page, origin: str) -> None:
    page.goto(origin)
    page.wait_for_selector(".talk[data-state=idle]")


def wait_for_state(page: Page, *states: str) -> None:
    page.wait_for_selector(", ".join(f".talk[data-state={state}]" for state in states))


def test_speak_and_be_answered(page: Page, origin: str) -> None:
    open_page(page, origin)
    page.get_by_role("button", name="Talk").press("Enter")  # by keyboard
    wait_for_state(page, "speaking")
    page.wait_for_function("document.querySelector('.turn.model .text')?.textContent.length > 5")
    page.wait_for_selector(".turn.you")
    page.wait_for_function("document.querySelector('.latency').textContent.endsWith(' ms')")
    page.wait_for_function("document.querySelector('.response').textContent.endsWith(' ms')")
    for side in ("You", "Model"):
        meter = page.get_by_role("meter", name=side).element_handle()
        page.wait_for_function("meter => meter.ariaValueNow > -40", arg=meter)
    page.get_by_role("button", name="Stop").click()
    wait_for_state(page, "idle")
    assert page.get_by_role("meter", name="Model").get_attribute("aria-valuenow") == "-60"
    assert page.get_by_role("meter", name="Model").get_attribute("aria-valuetext") == "−60 dB"
    log = page.get_by_role("log", name="Transcript")
    assert log.get_by_role("list").get_by_role("listitem").count() >= 2
    page.get_by_role("button", name="Start over").press("Enter")
    assert page.locator(".turn").count() == 0
    assert page.locator(".log .empty").is_visible()
    assert log.evaluate("log => log === document.activeElement")  # the button has gone


def test_an_example_needs_no_microphone(page: Page, origin: str) -> None:
    page.add_init_script(REFUSE)
    open_page(page, origin)
    page.get_by_role("button", name=EXAMPLES[0].text).click()
    wait_for_state(page, "asking", "speaking")
    page.wait_for_selector(".turn.you")
    page.wait_for_selector(".turn.model")
    page.get_by_role("button", name="Stop").click()
    wait_for_state(page, "idle")
    assert page.locator(".turn.model .text").first.inner_text().strip()


def test_one_question_at_a_time(page: Page, origin: str) -> None:
    open_page(page, origin)
    asked = page.evaluate(
        """
        () => {
          const chips = [...document.querySelectorAll("[data-src]")].slice(0, 2);
          for (const chip of chips) chip.click();
          return [...chips.map((chip) => chip.ariaBusy), chips[1].parentElement.ariaDisabled];
        }
        """
    )
    assert asked == ["true", None, "true"]
    wait_for_state(page, "asking", "speaking")
    page.wait_for_selector(".chips[aria-disabled=false]")


def test_a_question_begins_its_call_in_the_click(page: Page, origin: str) -> None:
    open_page(page, origin)
    contexts = page.evaluate(
        """
        () => {
          let contexts = 0;
          window.AudioContext = class extends AudioContext {
            constructor(options) {
              super(options);
              contexts++;
            }
          };
          document.querySelector("[data-src]").click();
          return contexts;
        }
        """
    )
    assert contexts == 1  # Safari lets no later one sound
    page.wait_for_selector(".turn.you")


def test_sound_that_may_not_begin_is_said(page: Page, origin: str) -> None:
    page.add_init_script(MUTE)
    open_page(page, origin)
    page.get_by_role("button", name=EXAMPLES[0].text).click()
    wait_for_state(page, "muted")
    assert "once more" in page.get_by_role("status").first.inner_text()


def test_what_cannot_be_fetched_is_said(page: Page, origin: str) -> None:
    open_page(page, origin)
    page.route("**/*.mp3", lambda route: route.abort())
    chip = page.get_by_role("button", name=EXAMPLES[0].text)
    chip.click()
    page.wait_for_function("document.querySelector('.note').textContent.includes('no answer')")
    wait_for_state(page, "idle")  # the call that was to take it has ended
    assert chip.is_enabled()
    page.get_by_role("button", name="Talk").click()
    page.wait_for_function("document.querySelector('.note').textContent.startsWith('No micro')")
    second = page.context.new_page()
    second.route("**/talk.js", lambda route: route.abort())
    second.goto(origin)
    second.get_by_text("The page's script could not be loaded; reload the page.").wait_for()


def test_a_recording_is_handed_over(page: Page, origin: str, tmp_path: Path) -> None:
    page.add_init_script(REFUSE)
    open_page(page, origin)
    (tmp_path / "notes.txt").write_text("no sound at all")
    page.get_by_label("Upload a sound").set_input_files(tmp_path / "notes.txt")
    page.wait_for_function("document.querySelector('.note').textContent.includes('no sound')")
    wait_for_state(page, "idle")
    page.wait_for_function(
        "fetch('api/build_info').then((i) => i.json()).then((i) => i.slots_free)"
    )
    page.get_by_label("Upload a sound").set_input_files(QUESTION)
    page.wait_for_selector(".turn.you")
    page.get_by_role("button", name="Stop").click()
    wait_for_state(page, "idle")
    assert page.locator(".turn.you .text").first.inner_text().strip()


def test_a_refused_microphone_is_said(page: Page, origin: str) -> None:
    page.add_init_script(REFUSE)
    open_page(page, origin)
    page.get_by_role("button", name="Talk").click()
    wait_for_state(page, "refused")
    assert "microphone was refused" in page.get_by_role("status").first.inner_text()
    page.get_by_role("button", name="Talk").click()  # asks again
    page.wait_for_function("window.refusals === 2")
    wait_for_state(page, "refused")


def test_a_full_server_is_said(page: Page, origin: str) -> None:
    open_page(page, origin)
    page.get_by_role("button", name="Talk").click()
    wait_for_state(page, "listening", "speaking")
    second = page.context.new_page()
    open_page(second, origin)
    second.get_by_role("button", name="Talk").click()
    wait_for_state(second, "full")
    assert "busy" in second.get_by_role("status").first.inner_text()


def test_the_card_stands_in_its_own_tab(page: Page, origin: str) -> None:
    open_page(page, origin)
    page.get_by_role("tab", name="Model card").click()
    page.wait_for_selector(".card:visible")
    assert page.title() == "speechlm"
