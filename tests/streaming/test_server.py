from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from audio_codec.errors import UserError
from streaming import protocol, server
from streaming.client import Client, Notice, Said, ServerError, Speech
from streaming.engine import Engine
from streaming.protocol import FRAME_SIZE, Action, AudioFormat, Kind, Pcm, SessionParams
from streaming.testing import EchoModel, EchoState, InProcess, Pause, Say, ScriptedSpeaker

RAW = AudioFormat.PCM_F32


def noise(frames: int, seed: int = 0) -> Pcm:
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.5, 0.5, frames * FRAME_SIZE).astype(np.float32)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve on a real socket; gives host:port."""
    listener = server.listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws_per_message_deflate=False))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def echo(
    slots: int = 1, config: server.ServerConfig | None = None, **options: int
) -> Iterator[tuple[Engine[EchoState], FastAPI]]:
    with Engine(EchoModel(), slots, name="echo", **options) as engine:
        yield engine, server.create_app(engine, config)


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def client(app: FastAPI, **options: object) -> Client:
    return Client("ws://test", transport=InProcess(app), **{"format": RAW} | options)  # type: ignore[arg-type]


def run(coroutine: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await coroutine

    asyncio.run(bounded())


def test_a_conversation_over_a_real_socket() -> None:
    pcm = noise(12)

    async def talk(address: str) -> None:
        recording = await ScriptedSpeaker([Say(pcm), Pause(0.08)]).run(
            Client(f"http://{address}", format=RAW, params=SessionParams(seed=2))
        )
        np.testing.assert_array_equal(recording.pcm[FRAME_SIZE:], pcm)
        assert recording.text == ("cdefgab" * 2)[:13]
        assert recording.heard == "+" * 12

    with echo() as (_, app), listening(app) as address:
        run(talk(address))


def test_the_first_messages_are_handshake_and_session() -> None:
    async def talk(address: str) -> None:
        url = f"ws://{address}/api/chat?format=pcm_s16&text_seed=1&audio_seed=2&pad_mult=0"
        async with connect(url) as raw:
            assert await raw.recv() == bytes(9)
            first = await raw.recv()
            assert first[0] == Kind.METADATA
            facts = json.loads(first[1:])
        assert facts["format"] == "pcm_s16"
        assert facts["seed"] == 1_000_005
        assert facts["ignored"] == ["pad_mult"]
        assert facts["delay_ms"] == 160

    with echo() as (_, app), listening(app) as address:
        run(talk(address))


def test_a_public_client_that_speaks_opus_and_sends_at_once() -> None:
    """No query, no waiting for the handshake, understands kinds 1 and 2 alone."""
    tone = (0.3 * np.sin(np.arange(10 * FRAME_SIZE) / 12)).astype(np.float32)

    async def talk(address: str) -> None:
        encoder, decoder = protocol.OpusEncoder(), protocol.OpusDecoder()
        heard: list[Pcm] = []
        kinds: set[int] = set()
        async with connect(f"ws://{address}/api/chat", close_timeout=0.1) as raw:
            await raw.send(b"\x01" + encoder.encode(tone))
            await raw.send(b"\xc8 a kind of a newer protocol")
            while sum(map(len, heard)) < 8 * FRAME_SIZE:
                message = await raw.recv(decode=False)
                kinds.add(message[0])
                if message[0] == Kind.AUDIO:
                    heard.append(decoder.decode(message[1:]))
        assert max(kinds) <= 7
        assert {Kind.AUDIO, Kind.TEXT} <= kinds
        assert np.abs(np.concatenate(heard)[4 * FRAME_SIZE :]).max() == pytest.approx(0.3, abs=0.05)

    with echo() as (_, app), listening(app) as address:
        run(talk(address))


def test_a_full_server_says_so_and_closes() -> None:
    async def talk(engine: Engine[EchoState], address: str) -> None:
        async with Client(f"ws://{address}", format=RAW):
            async with connect(f"ws://{address}/api/chat") as raw:
                message = await raw.recv()
                assert message[:1] == bytes([Kind.ERROR]) and b"no free channels" in message
                with pytest.raises(ConnectionClosed) as closed:
                    await raw.recv()
                assert closed.value.rcvd is not None and closed.value.rcvd.code == server.TRY_LATER
            with pytest.raises(ServerError, match="no free channels"):
                await Client(f"ws://{address}", format=RAW).connect()
        await until(lambda: engine.active == 0)
        async with Client(f"ws://{address}", format=RAW) as again:
            assert again.session["slot"] == 0

    with echo() as (engine, app), listening(app) as address:
        run(talk(engine, address))


def test_two_callers_do_not_hear_each_other() -> None:
    sounds = [noise(15, seed) for seed in range(2)]

    async def talk(app: FastAPI) -> None:
        recordings = await asyncio.gather(
            *(
                ScriptedSpeaker([Say(pcm)]).run(client(app, params=SessionParams(seed=seed)))
                for seed, pcm in enumerate(sounds)
            )
        )
        for recording, pcm in zip(recordings, sounds, strict=True):
            np.testing.assert_array_equal(recording.pcm[FRAME_SIZE:], pcm[:-FRAME_SIZE])
        assert [recording.text[:3] for recording in recordings] == ["abc", "bcd"]

    with echo(slots=2) as (_, app):
        run(talk(app))


def test_an_abrupt_disconnect_frees_the_slot() -> None:
    async def talk(engine: Engine[EchoState], address: str) -> None:
        raw = await connect(f"ws://{address}/api/chat?format=pcm_f32")
        await raw.send(b"\x01" + noise(2).tobytes())
        await raw.recv()
        assert engine.active == 1
        raw.transport.abort()  # no closing handshake: the network has gone
        await until(lambda: engine.active == 0)
        async with Client(f"ws://{address}", format=RAW) as fresh:
            await fresh.send(np.zeros(2 * FRAME_SIZE, np.float32))
            sound = [event.pcm async for event in first_speech(fresh, 2)]
        assert not np.concatenate(sound).any()  # nothing is left of the caller before

    async def first_speech(caller: Client, count: int):  # type: ignore[no-untyped-def]
        async for event in caller:
            if isinstance(event, Speech):
                yield event
                count -= 1
                if not count:
                    return

    with echo() as (engine, app), listening(app) as address:
        run(talk(engine, address))


def test_a_slow_client_is_frozen_and_the_others_go_on() -> None:
    async def talk(engine: Engine[EchoState], address: str) -> None:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setblocking(False)
        host, port = address.split(":")
        await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
        slow = await connect(f"ws://{address}/api/chat?format=pcm_f32", sock=small, max_queue=1)

        async def shout() -> None:
            while True:
                await slow.send(b"\x01" + noise(1).tobytes())

        shouting = asyncio.create_task(shout())  # never reads what comes back
        state = engine.core.state

        async def stands_still() -> bool:
            before = int(state.count[0])
            await asyncio.sleep(0.25)
            return int(state.count[0]) == before > 0

        while not await stands_still():
            pass
        frozen = int(state.count[0])
        pcm = noise(20, 1)
        recording = await ScriptedSpeaker([Say(pcm)]).run(Client(f"ws://{address}", format=RAW))
        np.testing.assert_array_equal(recording.pcm[FRAME_SIZE:], pcm[:-FRAME_SIZE])
        assert int(state.count[0]) == frozen
        shouting.cancel()
        slow.transport.abort()
        await until(lambda: engine.active == 0)

    with echo(slots=2, queue_frames=4) as (engine, app), listening(app) as address:
        run(talk(engine, address))


def test_closing_the_engine_ends_live_calls_with_a_reason() -> None:
    async def talk(engine: Engine[EchoState], address: str) -> None:
        async with Client(f"ws://{address}", format=RAW) as caller:
            await caller.send(noise(1))
            await asyncio.to_thread(engine.close)
            with pytest.raises(ServerError, match="shutting down"):
                async for _ in caller:
                    pass

    with echo() as (engine, app), listening(app) as address:
        run(talk(engine, address))


@pytest.mark.parametrize(
    ("query", "message", "code", "sentence"),
    [
        ("?format=mp3", None, server.POLICY, b"opus, pcm_f32, pcm_s16"),
        ("?text_temperature=hot", None, server.POLICY, b"is not a number"),
        ("", b"\x01no page" * 9, server.BROKEN, b"not Ogg-Opus"),
        ("?format=pcm_f32", b"\x01\x00\x00\xc0\x7f", server.BROKEN, b"not a finite number"),
        ("?format=pcm_f32", b"", server.BROKEN, b"at least one byte"),
        ("?format=pcm_f32", "words", server.UNSUPPORTED, b"messages are binary"),
    ],
)
def test_what_breaks_the_protocol_is_told_and_closed(
    query: str, message: bytes | str | None, code: int, sentence: bytes
) -> None:
    async def talk(engine: Engine[EchoState], address: str) -> None:
        async with connect(f"ws://{address}/api/chat{query}") as raw:
            if message is not None:
                await raw.send(message)
            said = b""
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    said = await raw.recv(decode=False)
        assert said[0] == Kind.ERROR and sentence in said
        assert closed.value.rcvd is not None and closed.value.rcvd.code == code
        await until(lambda: engine.active == 0)

    with echo() as (engine, app), listening(app) as address:
        run(talk(engine, address))


def test_keys() -> None:
    config = server.ServerConfig(api_keys=frozenset({"sesame", "other"}))

    async def talk(address: str) -> None:
        url = f"ws://{address}"
        with pytest.raises(ServerError, match="key is missing or wrong"):
            await Client(url, format=RAW).connect()
        with pytest.raises(ServerError, match="key is missing or wrong"):
            await Client(url, format=RAW, api_key="sesam").connect()
        async with Client(url, format=RAW, api_key="sesame") as by_header:
            assert by_header.session["format"] == "pcm_f32"
        async with Client(f"{url}/api/chat?auth_id=other", format=RAW) as by_query:
            assert by_query.session["format"] == "pcm_f32"

    with echo(slots=4, config=config) as (_, app), listening(app) as address:
        run(talk(address))


def test_an_empty_key_does_not_open_the_door() -> None:
    with pytest.raises(UserError, match="api_keys: one is empty"):
        server.ServerConfig(api_keys=frozenset({"sesame", " "}))


@pytest.mark.parametrize("sound", AudioFormat)
def test_what_comes_after_a_restart_is_of_the_new_conversation(sound: AudioFormat) -> None:
    async def talk(app: FastAPI) -> None:
        async with client(app, format=sound, params=SessionParams(seed=0)) as caller:
            await caller.send(noise(10))  # more than has been read when it begins anew
            await caller.control(Action.RESTART)
            await caller.send(noise(4))
            said = {False: "", True: ""}
            restarted = False
            async for event in caller:
                if isinstance(event, Notice) and event.data["type"] == "restarted":
                    restarted = True
                elif isinstance(event, Said):
                    said[restarted] += event.text
                if len(said[True]) == 3:
                    break
            assert said[True] == "abc"
            assert "abcdefgabc".startswith(said[False])

    with echo(queue_frames=3) as (_, app):
        run(talk(app))


def test_who_takes_no_answers_is_told_so() -> None:
    async def talk(app: FastAPI) -> None:
        caller = client(app)
        await caller.connect()
        sending = asyncio.create_task(caller.send(noise(200)))
        await asyncio.sleep(2)  # and does not receive: 1 s, and one of the 2 s of a goodbye
        with pytest.raises(ServerError, match="nothing was taken for 1 s"):
            async for _ in caller:
                pass
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    with echo(config=server.ServerConfig(idle_seconds=1), queue_frames=3) as (_, app):
        run(talk(app))


def test_ping_idle_and_longest_call() -> None:
    async def pinged(app: FastAPI) -> None:
        transport = InProcess(app)
        connection = await transport.connect("ws://test/api/chat?format=pcm_f32", {})
        kinds = [(await connection.receive())[0] for _ in range(4)]
        assert kinds == [Kind.HANDSHAKE, Kind.METADATA, Kind.PING, Kind.PING]
        await connection.close()

    async def ended(app: FastAPI, why: str) -> None:
        caller = client(app)
        await caller.connect()
        with pytest.raises(ServerError, match=why):
            async for _ in caller:
                pass

    with echo(config=server.ServerConfig(ping_seconds=0.05)) as (_, app):
        run(pinged(app))
    with echo(config=server.ServerConfig(idle_seconds=0.1)) as (_, app):
        run(ended(app, "nothing came for 0.1 s"))
    with echo(config=server.ServerConfig(session_seconds=0.1)) as (_, app):
        run(ended(app, "at most 0.1 s"))


def test_a_drain_is_announced() -> None:
    async def talk(engine: Engine[EchoState], app: FastAPI) -> None:
        async with client(app) as caller:
            engine.drain()
            async for event in caller:
                assert event == Notice({"type": "draining", "seconds": 30.0})
                break
            with pytest.raises(ServerError, match="draining"):
                await client(app).connect()

    with echo(slots=2) as (engine, app):
        run(talk(engine, app))


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode(), answer.headers["content-type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["content-type"]


def test_pages() -> None:
    with echo(slots=3) as (engine, app), listening(app) as address:
        session = engine.open()
        session.offer(noise(1))
        session.wait(5)
        info = json.loads(get(f"http://{address}/api/build_info")[1])
        assert (info["model"], info["slots"], info["slots_free"]) == ("echo", 3, 2)
        assert info["formats"] == ["opus", "pcm_f32", "pcm_s16"]
        assert get(f"http://{address}/health")[:2] == (200, '{"status":"running"}')
        status, metrics, kind = get(f"http://{address}/metrics")
        assert status == 200 and kind.startswith("text/plain")
        assert re.search(r"^speechlm_slots_active 1\.0$", metrics, re.M)
        assert re.search(r"^speechlm_steps_total 1\.0$", metrics, re.M)
        assert re.search(r"^speechlm_step_seconds_count 1\.0$", metrics, re.M)
        for name in ("speechlm-client.js", "speechlm-worklet.js", "resampler.js"):
            status, script, kind = get(f"http://{address}/web/{name}")
            assert (
                status == 200
                and "javascript" in kind
                and "export" in script + "export" * (name == "speechlm-worklet.js")
            )
        assert get(f"http://{address}/web/../server.py")[0] == 404
        engine.drain()
        assert get(f"http://{address}/health")[:2] == (503, '{"status":"draining"}')


def test_a_taken_port_is_one_sentence() -> None:
    with server.listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="choose another"):
        server.listen("127.0.0.1", taken.getsockname()[1])


@contextmanager
def draining(engine: Engine[EchoState]) -> Iterator[tuple[server.DrainingServer, str]]:
    """The server of `server.run` in a thread, where a test plays the part of the signals."""
    listener = server.listen("127.0.0.1", 0)
    settings = uvicorn.Config(server.create_app(engine), log_level="warning")
    running = server.DrainingServer(settings, engine, drain_seconds=10)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield running, f"ws://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive()
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


def test_sigterm_waits_for_live_calls() -> None:
    async def talk(running: server.DrainingServer, url: str) -> None:
        pcm = noise(6)
        async with Client(url, format=RAW) as caller:
            running.handle_exit(signal.SIGTERM, None)
            async for event in caller:
                if isinstance(event, Notice):
                    assert event.data["type"] == "draining"
                    break
            with pytest.raises(ServerError, match="draining"):
                await Client(url, format=RAW).connect()
            await caller.send(pcm)
            got = 0
            while got < len(pcm):
                answer = await caller.receive()
                got += len(answer.pcm) if isinstance(answer, Speech) else 0
            assert not running.should_exit

    with echo(slots=2) as (engine, _), draining(engine) as (running, url):
        run(talk(running, url))


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_that_does_not_wait_ends_live_calls_with_a_reason(
    signals: list[signal.Signals],
) -> None:
    async def talk(running: server.DrainingServer, url: str) -> None:
        async with Client(url, format=RAW) as caller:
            for sig in signals:
                running.handle_exit(sig, None)
            with pytest.raises(ServerError, match="shutting down"):
                async for _ in caller:
                    pass

    with echo() as (engine, _), draining(engine) as (running, url):
        run(talk(running, url))


@pytest.mark.slow
def test_serve_in_a_process_of_its_own_leaves_in_peace_on_sigterm() -> None:
    code = (
        "from streaming import server; from streaming.testing import EchoModel;"
        "server.serve(EchoModel(), port=0, slots=2)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as served:
        assert served.stdout is not None
        url = served.stdout.readline().removeprefix("listening on ").strip()
        try:
            assert json.loads(get(f"{url}/api/build_info")[1])["model"] == "EchoModel"
            served.send_signal(signal.SIGTERM)
            assert served.wait(60) == 0
        finally:
            served.kill()


def test_handshake_bytes() -> None:
    assert protocol.encode(protocol.Handshake()) == struct.pack("<BII", 0, 0, 0)
