"""The JavaScript client in a real browser; an echo stands in for the model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from streaming import server
from streaming.engine import Engine
from streaming.testing import EchoModel

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

# A burst of 0.12 s, fed at 48 kHz; resolves with the events once it has come back.
CALL = """
async (format) => {
  const { SpeechClient } = await import("/web/speechlm-client.js");
  const client = new SpeechClient({ format, params: { seed: 3 } });
  const events = { state: [], text: [], heard: [], level: [], latency: [], error: [], session: [] };
  for (const [type, list] of Object.entries(events)) {
    client.addEventListener(type, ({ detail }) => list.push(detail));
  }
  await client.connect({ microphone: false });
  const burst = Float32Array.from({ length: 5760 }, (_, k) => 0.5 * Math.sin(k / 20));
  await client.feed(burst, 48000);
  const began = performance.now();
  const answered = () => events.latency.some((l) => l.response_ms !== undefined);
  const late = () => performance.now() - began > 8000;
  while (!answered() && !late()) await new Promise((r) => setTimeout(r, 20));
  // An answer counts from its beginning; on a busy machine its loudest may be yet to come.
  await new Promise((r) => setTimeout(r, 600));
  client.close();
  return events;
}
"""
# The largest error of a resampled tone against the same tone made at the target rate.
RESAMPLE = """
async ([from, to, hertz]) => {
  const { resample, Resampler } = await import("/web/resampler.js");
  const tone = (rate) =>
    Float32Array.from({ length: rate / 4 }, (_, k) => Math.sin((2 * Math.PI * hertz * k) / rate));
  const got = resample(tone(from), from, to);
  const want = tone(to);
  let error = 0;
  for (let k = 200; k < want.length - 200; k++) error = Math.max(error, Math.abs(got[k] - want[k]));
  // The same by pieces of an audio thread's size.
  const streaming = new Resampler(from, to);
  const input = tone(from);
  const pieces = [];
  for (let k = 0; k + 128 <= input.length; k += 128) {
    const out = new Float32Array(streaming.bound(128));
    const count = streaming.process(input.subarray(k, k + 128), 128, out);
    pieces.push(...out.subarray(0, count));
  }
  const apart = Math.max(...pieces.slice(0, got.length).map((x, k) => Math.abs(x - got[k])));
  return { error, apart, length: got.length, pieces: pieces.length };
}
"""
# A server that does only what a test tells it to, and the wait for pieces of 40 ms.
SCRIPTED = """
window.WebSocket = class {
  static OPEN = 1;
  readyState = 1;
  heard = 0; // pieces of sound that came
  constructor() {
    window.server = this;
    setTimeout(() => this.tell({ type: "session", format: "pcm_s16", delay_ms: 160 }));
  }
  send(bytes) {
    if (bytes[0] === 1) this.heard++;
  }
  close() {}
  message(kind, payload) {
    this.onmessage({ data: Uint8Array.of(kind, ...payload).buffer });
  }
  sound(byte) {
    this.message(1, new Uint8Array(2 * 960).fill(byte));
  }
  say(text) {
    this.message(2, new TextEncoder().encode(text));
  }
  tell(facts) {
    this.message(4, new TextEncoder().encode(JSON.stringify(facts)));
  }
};
window.pieces = (client, count) =>
  new Promise((resolve) => client.addEventListener("level", () => --count || resolve()));
"""
# Ten times as fast, but for the long waits that tell of a server that is gone.
HURRY = """
const later = window.setTimeout;
window.setTimeout = (act, ms) => later(act, ms < 10000 ? ms / 10 : ms);
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with Engine(EchoModel(), slots=1, name="echo") as engine:
        listener = server.listen("127.0.0.1", 0)
        web = uvicorn.Server(
            uvicorn.Config(
                server.create_app(engine), log_level="error", timeout_graceful_shutdown=1
            )
        )
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        web.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a Chromium on the PATH")
    arguments = [
        "--no-sandbox",
        "--autoplay-policy=no-user-gesture-required",
        "--host-resolver-rules=MAP speechlm.test 127.0.0.1",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, origin: str) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(f"{origin}/api/build_info")
    yield page
    page.close()


@pytest.mark.parametrize("format", ["pcm_s16", "pcm_f32"])
def test_a_recording_is_fed_and_answered(page: Page, format: str) -> None:
    events: dict[str, Any] = page.evaluate(CALL, format)
    assert [event["state"] for event in events["state"]] == ["connecting", "live", "closed"]
    assert events["error"] == []
    (session,) = events["session"]
    assert (session["seed"], session["format"], session["model"]) == (3, format, "echo")
    text = "".join(event["text"] for event in events["text"])
    assert len(text) >= 4 and ("defgabc" * 20).startswith(text)  # seed 3: no frame is missing
    assert 2 <= sum(event["text"] == "+" for event in events["heard"]) <= 3  # of 80 ms each
    assert max(event["input"] for event in events["level"]) == pytest.approx(-9, abs=1)
    assert max(event["output"] for event in events["level"]) == pytest.approx(-9, abs=1)
    (response,) = [e["response_ms"] for e in events["latency"] if "response_ms" in e]
    assert response > 40  # the echo of the last sample comes 160 ms after it, of the first before
    server_side = [event for event in events["latency"] if "pipeline_ms" in event]
    assert all(event["pipeline_ms"] >= 160 and event["playout_ms"] >= 0 for event in server_side)


def test_controls_go_over_the_wire(page: Page) -> None:
    sent: list[bytes | str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda data: sent.append(data)))
    page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          await client.connect({ microphone: false });
          for (const action of ["pause", "resume", "restart"]) client[action]();
          await new Promise((r) => setTimeout(r, 200));
          client.close();
        }
        """
    )
    assert [message for message in sent if message[0] == 3] == [
        b"\x03\x02",
        b"\x03\x00",
        b"\x03\x03",
    ]
    assert any(len(message) == 1 + 2 * 960 for message in sent)  # and silence flows


def test_a_full_server_is_an_error_event(page: Page) -> None:
    outcome = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const first = new SpeechClient();
          const second = new SpeechClient();
          const told = [];
          second.addEventListener("error", ({ detail }) => told.push(detail));
          await first.connect({ microphone: false });
          const thrown = await second
            .connect({ microphone: false })
            .catch(({ message, code }) => ({ message, code }));
          const early = (() => { try { second.feed(new Float32Array(9)); } catch (e) { return e.message; } })();
          first.close();
          return { thrown, told, early, states: [first.state, second.state] };
        }
        """  # noqa: E501
    )
    assert "no free channels" in outcome["thrown"]["message"]
    assert outcome["thrown"]["code"] == "server-full"
    assert outcome["told"] == [outcome["thrown"]]
    assert "needs a live client; this one is closed" in outcome["early"]
    assert outcome["states"] == ["closed", "closed"]


def test_closed_while_the_microphone_is_asked_for(page: Page) -> None:
    outcome = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const { stream } = new AudioContext().createMediaStreamDestination();
          let allow;
          navigator.mediaDevices.getUserMedia = () =>
            new Promise((resolve) => { allow = () => resolve(stream); });
          const client = new SpeechClient();
          const thrown = client.connect().catch((e) => e.message);
          client.close();
          allow();
          return { thrown: await thrown, track: stream.getTracks()[0].readyState };
        }
        """
    )
    assert outcome == {"thrown": "The client was closed while it connected.", "track": "ended"}


def test_closed_while_the_server_is_asked(page: Page) -> None:
    thrown = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          window.WebSocket = class extends WebSocket {
            constructor(url) {
              super(url);
              setTimeout(() => client.close());
            }
          };
          const late = new Promise((resolve) => setTimeout(resolve, 5000, "nothing"));
          const thrown = client.connect({ microphone: false }).catch((e) => e.message);
          return Promise.race([thrown, late]);
        }
        """
    )
    assert thrown == "The client was closed while it connected."


def test_restart_drops_the_rest_of_a_recording(page: Page) -> None:
    dropped = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          await client.connect({ microphone: false });
          const fed = client.feed(new Float32Array(60 * 24000)).then(() => true);
          client.restart();
          const late = new Promise((resolve) => setTimeout(resolve, 5000, false));
          const dropped = await Promise.race([fed, late]);
          client.close();
          return dropped;
        }
        """
    )
    assert dropped


def test_what_a_late_server_could_not_answer_in_time_is_lost(page: Page) -> None:
    page.add_script_tag(content=SCRIPTED)
    sent = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          await client.connect({ microphone: false });
          let before = 0;
          const sent = async (act, count) => {
            await act();
            await pieces(client, count);
            const more = server.heard - before;
            before = server.heard;
            return more;
          };
          const answer = () => { for (let k = 0; k < 5; k++) server.sound(0); };
          const restart = () => { client.restart(); answer(); server.tell({ type: "restarted" }); };
          const counts = {
            unanswered: await sent(() => {}, 40),
            answered: await sent(answer, 10),
            recorded: await sent(() => client.feed(new Float32Array(9600)), 5),
            paused: await sent(() => client.pause(), 5),
            resumed: await sent(() => client.resume(), 5),
            restarted: await sent(restart, 40),
          };
          client.close();
          return counts;
        }
        """
    )
    assert sent.pop("recorded") in (10, 11)  # whole, for a recording ends
    # A second and the server's delay are 29 pieces; one more tells that they are exceeded.
    assert sent == {"unanswered": 30, "answered": 5, "paused": 5, "resumed": 0, "restarted": 30}


def test_nothing_of_the_old_conversation_comes_after_a_restart(page: Page) -> None:
    page.add_script_tag(content=SCRIPTED)
    outcome = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          const told = [];
          let loudest = -100;
          for (const type of ["text", "heard", "metadata"]) {
            client.addEventListener(type, ({ detail }) => told.push(detail));
          }
          client.addEventListener("level", ({ detail }) => {
            loudest = Math.max(loudest, detail.output);
          });
          await client.connect({ microphone: false });
          const everything = async (text) => {
            server.say(text);
            server.tell({ type: "heard", text });
            for (let k = 0; k < 5; k++) server.sound(0x20);
            await pieces(client, 10);
            return loudest;
          };
          client.restart();
          client.restart();
          server.tell({ type: "restarted" }); // the first of two
          const before = await everything("old");
          server.tell({ type: "restarted" });
          const after = await everything("new");
          client.close();
          return { told, before, after };
        }
        """
    )
    restarted = {"type": "restarted"}
    assert outcome["told"] == [restarted, restarted, {"text": "new"}, {"text": "new"}]
    assert outcome["before"] < -60
    assert outcome["after"] > -30


def test_a_server_that_does_not_tell_of_its_restart_is_heard_again(page: Page) -> None:
    page.add_script_tag(content=SCRIPTED)
    page.add_script_tag(content=HURRY)
    texts = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          const texts = [];
          client.addEventListener("text", ({ detail }) => texts.push(detail.text));
          await client.connect({ microphone: false });
          client.restart();
          server.say("old");
          await new Promise((resolve) => setTimeout(resolve, 2500));
          server.say("new");
          client.close();
          return texts;
        }
        """
    )
    assert texts == ["new"]


def test_a_flush_leaves_nothing_of_the_turn(page: Page) -> None:
    told = page.evaluate(
        """
        async () => {
          let Processor;
          globalThis.sampleRate = 24000;
          globalThis.registerProcessor = (_, processor) => (Processor = processor);
          globalThis.AudioWorkletProcessor = class {
            port = { postMessage: (message) => told.push(message) };
          };
          const told = [];
          await import("/web/speechlm-worklet.js");
          const run = (flushed) => {
            told.length = 0;
            const processor = new Processor({ processorOptions: { jitterMs: 0 } });
            const tell = (data) => processor.port.onmessage({ data });
            const hear = (value, blocks) => {
              for (let k = 0; k < blocks; k++) {
                processor.process([[new Float32Array(128).fill(value)]], [[new Float32Array(128)]]);
              }
            };
            hear(0.5, 19);
            hear(0, 1); // two pieces and two thirds
            if (flushed) tell({ type: "flush" });
            hear(0, 9);
            tell({ type: "play", pcm: new Float32Array(2400).fill(0.5) });
            hear(0, 100);
            const third = told.filter(({ type }) => type === "capture")[2];
            const responses = told.filter(({ type }) => type === "response").length;
            return { loudest: Math.max(...third.pcm), responses };
          };
          return { plain: run(false), flushed: run(true) };
        }
        """
    )
    assert told["plain"] == {"loudest": pytest.approx(0.5, abs=0.1), "responses": 1}
    assert told["flushed"] == {"loudest": 0, "responses": 0}


def test_a_page_without_https_says_so(page: Page, origin: str) -> None:
    page.goto(origin.replace("127.0.0.1", "speechlm.test") + "/api/build_info")
    outcome = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const client = new SpeechClient();
          const told = [];
          client.addEventListener("error", ({ detail }) => told.push(detail.message));
          for (const microphone of [true, false]) {
            await client.connect({ microphone }).catch(({ message }) => told.push(message));
          }
          return { told, state: client.state };
        }
        """
    )
    sentence = "This page may not use sound: open it over https or on localhost."
    assert outcome == {"told": [sentence] * 4, "state": "closed"}


def test_a_microphone_that_goes_away_is_an_error_event(page: Page) -> None:
    page.add_script_tag(content=SCRIPTED)
    outcome = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const { stream } = new AudioContext().createMediaStreamDestination();
          navigator.mediaDevices.getUserMedia = async () => stream;
          const client = new SpeechClient();
          const told = [];
          client.addEventListener("error", ({ detail }) => told.push(detail));
          await client.connect();
          stream.getTracks()[0].dispatchEvent(new Event("ended"));
          return { told, state: client.state };
        }
        """
    )
    told = {"message": "The microphone was disconnected.", "code": "no-microphone"}
    assert outcome == {"told": [told], "state": "closed"}


def test_stopped_sound_goes_on_or_is_an_error_event(page: Page) -> None:
    page.add_script_tag(content=SCRIPTED)
    page.add_script_tag(content=HURRY)
    outcome = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          let context;
          window.AudioContext = class extends AudioContext {
            constructor(options) {
              super(options);
              context = this;
            }
          };
          const client = new SpeechClient();
          const told = new Promise((resolve) => {
            client.addEventListener("error", ({ detail }) => resolve(detail.message));
          });
          await client.connect({ microphone: false });
          await context.suspend();
          await pieces(client, 20); // longer than the client waits
          const state = client.state;
          context.resume = () => new Promise(() => {});
          await context.suspend();
          return { state, told: await told, end: client.state };
        }
        """
    )
    sentence = "The sound of the page was stopped and does not go on; connect again."
    assert outcome == {"state": "live", "told": sentence, "end": "closed"}


def test_an_address_without_a_path_is_completed(page: Page) -> None:
    addresses = page.evaluate(
        """
        async () => {
          const { SpeechClient } = await import("/web/speechlm-client.js");
          const urls = ["wss://host:8998", "https://host/", "ws://host/other/chat", undefined];
          return urls.map((url) => new SpeechClient({ url }).url.href.split("?")[0]);
        }
        """
    )
    assert addresses[:3] == [
        "wss://host:8998/api/chat",
        "wss://host/api/chat",
        "ws://host/other/chat",
    ]
    assert addresses[3] == page.url.replace("http", "ws").replace("build_info", "chat")


@pytest.mark.parametrize(
    ("rates", "bound"),
    [
        ((48_000, 24_000, 1000), 1e-3),
        ((44_100, 24_000, 1000), 1e-3),
        ((24_000, 48_000, 3000), 1e-3),
        ((24_000, 44_100, 3000), 1e-3),
    ],
)
def test_resampler(page: Page, rates: tuple[int, int, int], bound: float) -> None:
    result = page.evaluate(RESAMPLE, rates)
    assert result["error"] < bound
    assert result["apart"] < 1e-6
    assert result["length"] == rates[1] // 4
    assert result["pieces"] > result["length"] - 300


def test_what_would_alias_is_filtered_out(page: Page) -> None:
    loudest = page.evaluate(
        """
        async () => {
          const { resample } = await import("/web/resampler.js");
          const high = Float32Array.from({ length: 12000 }, (_, k) => Math.sin((2 * Math.PI * 15000 * k) / 48000));
          return Math.max(...resample(high, 48000, 24000).slice(200, -200).map(Math.abs));
        }
        """  # noqa: E501
    )
    assert loudest < 1e-2
