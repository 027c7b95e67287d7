from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from audio_codec.errors import UserError
from streaming import audio_io, protocol
from streaming import client as clients
from streaming.client import (
    Client,
    ClientError,
    ClientState,
    Connection,
    ConnectionClosed,
    Heard,
    Latency,
    Level,
    Notice,
    Said,
    ServerError,
    Speech,
    SyncClient,
)
from streaming.engine import Engine
from streaming.protocol import FRAME_SIZE, Action, AudioFormat, Message, Pcm, SessionParams
from streaming.server import create_app
from streaming.testing import EchoModel, InProcess

RAW = AudioFormat.PCM_F32


def noise(frames: int) -> Pcm:
    rng = np.random.default_rng(0)
    return rng.uniform(-0.5, 0.5, frames * FRAME_SIZE).astype(np.float32)


@contextmanager
def echo(slots: int = 1) -> Iterator[InProcess]:
    with Engine(EchoModel(), slots, name="echo") as engine:
        yield InProcess(create_app(engine))


class Scripted:
    """A transport whose server says what a test wrote down, and records what it hears."""

    def __init__(self, *messages: Message | bytes, code: int = 1000) -> None:
        self._messages = [m if isinstance(m, bytes) else protocol.encode(m) for m in messages]
        self._code = code
        self.sent: list[bytes] = []
        self.url = ""
        self.headers: Mapping[str, str] = {}

    async def connect(self, url: str, headers: Mapping[str, str]) -> Connection:
        self.url, self.headers = url, headers
        return self

    async def send(self, data: bytes) -> None:
        self.sent.append(data)

    async def receive(self) -> bytes:
        if not self._messages:
            raise ConnectionClosed(self._code)
        return self._messages.pop(0)

    async def close(self) -> None:
        self._messages.clear()


def run_events(transport: Scripted, **options: Any) -> list[clients.Event]:
    async def run() -> list[clients.Event]:
        async with Client("ws://test", transport=transport, **options) as client:
            return [event async for event in client]

    return asyncio.run(run())


def test_events_of_every_kind() -> None:
    session = {"type": "session", "format": "pcm_f32", "seed": 3}
    pcm = noise(1)
    transport = Scripted(
        protocol.Handshake(),
        protocol.Metadata(session),
        protocol.Audio(pcm.tobytes()[:5]),  # cut in the middle of a sample
        protocol.Audio(pcm.tobytes()[5:]),
        protocol.Text(" hello"),
        protocol.ColoredText(3, " world"),
        protocol.Metadata({"type": "heard", "text": "hi"}),
        protocol.Metadata({"type": "level", "input_dbfs": -30, "output_dbfs": -100}),
        protocol.Metadata({"type": "latency", "compute_ms": 1, "queue_ms": 2, "pipeline_ms": 163}),
        protocol.Metadata({"type": "level", "decibel": 3}),
        protocol.Ping(),
        protocol.Unknown(99, b"?"),
    )
    events = run_events(transport, format=RAW)
    sound = np.concatenate([event.pcm for event in events if isinstance(event, Speech)])
    np.testing.assert_array_equal(sound, pcm)
    assert [event for event in events if not isinstance(event, Speech)] == [
        Said(" hello"),
        Said(" world"),
        Heard("hi"),
        Level(-30, -100),
        Latency(1, 2, 163),
        Notice({"type": "level", "decibel": 3}),
    ]


def test_a_public_server_that_sends_the_kind_alone() -> None:
    transport = Scripted(b"\x00", protocol.Text("hi"))
    assert run_events(transport, params=SessionParams(seed=1, text_topk=5)) == [Said("hi")]
    assert transport.url == "ws://test/api/chat?seed=1&text_topk=5"
    assert transport.headers == {}


def test_the_key_travels_in_the_header() -> None:
    transport = Scripted(b"\x00")
    assert run_events(transport, api_key="sesame") == []
    assert transport.headers == {"kyutai-api-key": "sesame"}


@pytest.mark.parametrize(
    ("messages", "code", "kind", "sentence"),
    [
        ([protocol.Handshake(), protocol.Error("I am tired")], 1000, ServerError, "I am tired"),
        ([protocol.Handshake()], 1006, ClientError, "code 1006"),
        ([], 1013, ClientError, r"\(code 1013\) before its handshake"),
        ([protocol.Handshake(), b"\x02\xff"], 1000, ClientError, "broke the protocol"),
        ([protocol.Handshake(), b"\x01abc" * 9], 1000, ClientError, "not Ogg-Opus"),
    ],
)
def test_what_goes_wrong_is_raised(
    messages: list[Message | bytes], code: int, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        run_events(Scripted(*messages, code=code))


def test_a_server_that_cannot_speak_pcm_is_found_out() -> None:
    transport = Scripted(protocol.Handshake(), protocol.Audio(b"OggS"))
    with pytest.raises(ClientError, match="does not speak pcm_f32"):
        run_events(transport, format=RAW)


def test_no_handshake_in_time() -> None:
    class Mute(Scripted):
        async def receive(self) -> bytes:
            await asyncio.sleep(60)
            raise AssertionError

    with pytest.raises(ClientError, match=r"no handshake from .* in 0\.05 s"):
        run_events(Mute(), timeout=0.05)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8998", "ftp://host", "ws://", "ws://host:abc", "ws://[::1", "ws://host:0"]
)
def test_bad_url_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match="is not a server; write ws://host:port"):
        Client(url)


def test_nobody_listens() -> None:
    with pytest.raises(ClientError, match="cannot connect to ws://127.0.0.1:9/api/chat"):
        asyncio.run(Client("http://127.0.0.1:9").connect())


def test_states_and_misuse() -> None:
    async def run(transport: InProcess) -> None:
        client = Client("ws://test", format=RAW, transport=transport)
        states = [client.state]
        with pytest.raises(ClientError, match="not connected; it is idle"):
            await client.send(noise(1))
        await client.connect()
        states.append(client.state)
        with pytest.raises(ClientError, match="needs an idle client; this one is live"):
            await client.connect()
        with pytest.raises(ClientError, match=r"shape \[1, 2\]"):
            await client.send(np.zeros((1, 2), np.float32))
        with pytest.raises(ClientError, match="finite"):
            await client.send(np.array([np.nan], np.float32))
        await client.close()
        await client.close()
        states.append(client.state)
        assert states == [ClientState.IDLE, ClientState.LIVE, ClientState.CLOSED]
        await client.connect()  # a closed client may call again
        assert client.session["model"] == "echo"
        await client.close()

    with echo() as transport:
        asyncio.run(run(transport))


def test_long_sound_is_sent_in_short_messages() -> None:
    transport = Scripted(b"\x00")

    async def run() -> None:
        client = Client("ws://test", transport=transport)
        await client.connect()
        await client.send(noise(10))
        await client.control(Action.RESTART)

    asyncio.run(run())
    assert max(map(len, transport.sent)) < 1000
    assert transport.sent[-1] == b"\x03\x03"


def test_sync_client() -> None:
    pcm = noise(10)
    with (
        echo() as transport,
        SyncClient(Client("ws://test", format=RAW, transport=transport)) as client,
    ):
        assert client.session["model"] == "echo"
        client.send(pcm)
        sound: list[Pcm] = []
        while sum(map(len, sound)) < len(pcm):
            event = client.receive(timeout=5)
            if isinstance(event, Speech):
                sound.append(event.pcm)
        with pytest.raises(TimeoutError, match=r"no event within 0\.01 s"):
            while True:
                client.receive(timeout=0.01)
        client.close()
        assert list(client) == []
        with pytest.raises(ClientError, match="not connected"):
            client.send(pcm)
    np.testing.assert_array_equal(np.concatenate(sound)[FRAME_SIZE:], pcm[:-FRAME_SIZE])


def test_sync_client_is_refused() -> None:
    with echo() as transport:
        first = SyncClient(Client("ws://test", format=RAW, transport=transport))
        with (
            first,
            pytest.raises(ClientError),
            SyncClient(Client("http://127.0.0.1:9")),
        ):
            raise AssertionError("it connected")
        first.close()  # safe twice


def test_a_sync_client_may_call_again() -> None:
    with echo() as transport:
        late = SyncClient(Client("ws://test", format=RAW, transport=transport))
        with (
            SyncClient(Client("ws://test", format=RAW, transport=transport)),
            pytest.raises(ServerError, match="no free channels"),
        ):
            late.connect()
        with late:
            late.send(noise(1))
            while not isinstance(event := late.receive(timeout=5), Speech):
                assert event is not None, "the end of the call before"


def test_a_client_hangs_up_on_a_server_that_breaks_the_protocol() -> None:
    async def run() -> None:
        client = Client("ws://test", transport=Scripted(b"\x00", b"\x04no object", b"\x02late"))
        await client.connect()
        with pytest.raises(ClientError, match="broke the protocol"):
            await client.receive()
        assert client.state is ClientState.CLOSED

    asyncio.run(run())


def test_a_server_that_no_longer_pings_is_gone() -> None:
    class Stuck(Scripted):
        async def receive(self) -> bytes:
            return await super().receive() if self._messages else await asyncio.Future()

    async def run() -> None:
        session = protocol.Metadata({"type": "session", "format": RAW, "ping_seconds": 0.01})
        async with Client("ws://test", RAW, transport=Stuck(b"\x00", session)) as client:
            with pytest.raises(ClientError, match=r"nothing came for 0\.04 s"):
                await client.receive()

    asyncio.run(run())


def test_an_application_that_ends_is_noticed_on_both_sides() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        for _ in range(31):
            await send({"type": "websocket.send", "bytes": b"\x06"})

    async def run() -> None:
        connection = await InProcess(application).connect("ws://test", {})
        with pytest.raises(ConnectionClosed):
            for _ in range(100):
                await connection.send(b"\x06")
        for _ in range(31):
            assert await connection.receive() == b"\x06"
        with pytest.raises(ConnectionClosed, match="1006"):
            await connection.receive()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_a_slow_server_would_hear_late_is_lost() -> None:
    class Slow(Scripted):
        async def receive(self) -> bytes:
            return await super().receive() if self._messages else await asyncio.Future()

    class Ear:
        def play(self, pcm: Pcm) -> None: ...

        def show(self, text: str) -> None: ...

    async def microphone() -> AsyncIterator[Pcm]:
        for _ in range(50):  # 4 s, of which nothing is answered
            yield np.zeros(FRAME_SIZE, np.float32)

    async def run(*told: Message) -> int:
        transport = Slow(b"\x00", *told)
        async with Client("ws://test", RAW, transport=transport) as client:
            await clients.converse(client, microphone(), Ear())
        return len(transport.sent)

    session = protocol.Metadata({"type": "session", "format": RAW})
    assert asyncio.run(run(session)) == 1 + clients.LATE // FRAME_SIZE


def test_converse_carries_both_directions() -> None:
    pcm = noise(5)
    played: list[Pcm] = []
    shown: list[str] = []

    class Ear:
        def play(self, pcm: Pcm) -> None:
            played.append(pcm)

        def show(self, text: str) -> None:
            shown.append(text)

    async def microphone() -> AsyncIterator[Pcm]:
        for start in range(0, len(pcm), 480):
            yield pcm[start : start + 480]
        while len(played) < 5:
            await asyncio.sleep(0.001)

    async def run(transport: InProcess) -> None:
        params = SessionParams(seed=0)
        async with Client("ws://test", RAW, params, transport=transport) as client:
            await clients.converse(client, microphone(), Ear())

    with echo() as transport:
        asyncio.run(run(transport))
    np.testing.assert_array_equal(np.concatenate(played)[FRAME_SIZE:], pcm[:-FRAME_SIZE])
    assert "".join(shown).startswith("abcd")


class FakeStream:
    """A sound device that calls back as often as a test wishes."""

    opened: list[FakeStream] = []

    def __init__(self, **settings: Any) -> None:
        assert settings["samplerate"] == 24_000 and settings["channels"] == 1
        self.callback = settings["callback"]

    def __enter__(self) -> None:
        FakeStream.opened.append(self)

    def __exit__(self, *_: object) -> None:
        FakeStream.opened.remove(self)


@pytest.fixture
def sound_card(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("sounddevice")
    module.InputStream = module.OutputStream = FakeStream  # type: ignore[attr-defined]
    module.PortAudioError = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


def test_microphone_and_speaker(sound_card: types.ModuleType) -> None:
    async def run() -> None:
        with audio_io.open_microphone() as microphone, audio_io.open_speaker() as speaker:
            ear, mouth = FakeStream.opened
            ear.callback(np.full((480, 1), 0.5, np.float32), 480, None, None)
            assert (await anext(microphone)).tolist() == [0.5] * 480
            for block in range(60):  # 1.2 s that nobody takes
                ear.callback(np.full((480, 1), block, np.float32), 480, None, None)
            await asyncio.sleep(0)
            assert (await anext(microphone))[0] == 10  # the last second is kept
            speaker.play(np.ones(1920, np.float32))
            out = np.full((480, 1), 9, np.float32)
            mouth.callback(out, 480, None, None)
            assert out.tolist() == [[1.0]] * 480
        assert FakeStream.opened == []

    asyncio.run(run())


def test_jitter_buffer_waits_fills_and_sheds() -> None:
    buffer = audio_io.JitterBuffer()
    buffer.push(np.ones(600, np.float32))
    assert not buffer.pull(480).any()  # holds back until 50 ms are there
    buffer.push(np.ones(700, np.float32))
    assert buffer.pull(1000).all()
    assert buffer.pull(480).sum() == 300  # runs dry
    buffer.push(np.ones(600, np.float32))
    assert not buffer.pull(480).any()  # and holds back again
    for value in range(30):
        buffer.push(np.full(1920, value, np.float32))
    assert buffer.pull(1)[0] == 30 - 24_000 // 1920  # the oldest of a second


def test_a_stall_is_caught_up_with_in_silence() -> None:
    buffer = audio_io.JitterBuffer()
    silence, voice = np.zeros(1920, np.float32), np.full(1920, 0.1, np.float32)
    for _ in range(10):
        buffer.push(voice)  # a burst of 0.8 s
    played = []
    for _ in range(20):
        buffer.push(silence)
        played.append(buffer.pull(1920))
    assert np.count_nonzero(np.concatenate(played)) == 10 * 1920  # not a word is lost
    buffer.push(np.ones(1, np.float32))
    assert np.flatnonzero(buffer.pull(24_000) == 1)[0] <= audio_io.LATE


def test_talk_says_how_to_install_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match="pip install sounddevice"):
        audio_io.sound_device()


def test_talk_without_a_device(sound_card: types.ModuleType) -> None:
    def none(**_: Any) -> None:
        raise RuntimeError("no default device")

    sound_card.OutputStream = none  # type: ignore[attr-defined]
    with (
        pytest.raises(UserError, match="loudspeaker cannot be opened: no default device"),
        audio_io.open_speaker(),
    ):
        raise AssertionError("it opened")


def test_a_device_that_opens_but_does_not_start(sound_card: types.ModuleType) -> None:
    class Busy(FakeStream):
        def __enter__(self) -> None:
            raise RuntimeError("device busy")

    sound_card.InputStream = Busy  # type: ignore[attr-defined]

    async def run() -> None:
        with audio_io.open_microphone():
            raise AssertionError("it opened")

    with pytest.raises(UserError, match="microphone cannot be opened: device busy"):
        asyncio.run(run())


def test_talk_without_a_server(sound_card: types.ModuleType) -> None:
    with pytest.raises(UserError, match="cannot connect"):
        clients.talk("ws://127.0.0.1:9")
