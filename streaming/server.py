"""WebSocket and HTTP around an engine.

    GET /api/chat         the conversation (WebSocket); messages in `streaming.protocol`
    GET /api/build_info   what runs here
    GET /health           200 while calls are taken, 503 when draining or failed
    GET /metrics          Prometheus text
    GET /web/…            the JavaScript client

Who comes when every slot is taken is told so (kind 5) and closed with code 1013; who brings no
valid key is turned away with 401 before the WebSocket opens. On SIGTERM the server takes no new
calls, tells those that live, and leaves when the last has ended or `drain_seconds` have passed.

One task reads a socket, one writes it; neither computes, but for Opus: a millisecond or two a
frame, in which its library lets no other thread run, so that one of its own would gain nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import importlib.metadata
import logging
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.websockets import WebSocketState

from audio_codec.errors import UserError
from streaming import protocol
from streaming.engine import (
    Engine,
    Frame,
    FrameModel,
    Full,
    Refused,
    Session,
    SessionEnded,
    Status,
    pipeline_ms,
)
from streaming.protocol import Action, AudioFormat, Message

WEB: Final = Path(__file__).parent / "web"
LEVEL_FRAMES: Final = 5
"""Levels and latencies are sent with every fifth frame, every 0.4 s."""
_LONG: Final = 16 * 1024
"""Bytes past which a message is decoded beside the event loop: seconds of Opus, in slices between
which the loop has its turns."""

# WebSocket close codes (RFC 6455 and its registry).
GOING_AWAY: Final = 1001
UNSUPPORTED: Final = 1003
BROKEN: Final = 1007
POLICY: Final = 1008
INTERNAL: Final = 1011
TRY_LATER: Final = 1013

logger = logging.getLogger(__name__)


class ServerConfig(BaseModel):
    """Limits and keys of a server. Raises UserError for an empty key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_keys: frozenset[str] = frozenset()
    """Keys that open `/api/chat` (header `kyutai-api-key` or `?auth_id=`); none: open to all."""
    ping_seconds: float = Field(8.0, gt=0)
    """A ping goes out this often. Public web clients hang up after 10 s without a message, so
    exactly 10 s would race them."""
    idle_seconds: float = Field(60.0, gt=0)
    """A client that sends nothing at all for so long loses its slot."""
    session_seconds: float | None = Field(None, gt=0)
    """The longest conversation; None: no limit."""
    drain_seconds: float = Field(30.0, ge=0)
    """How long SIGTERM waits for the calls that live."""
    max_message_bytes: int = Field(256 * 1024, gt=0)
    """The longest message that is read (2.7 s of raw float32); a longer one ends the call with
    close code 1009."""

    @field_validator("api_keys")
    @classmethod
    def _not_empty(cls, keys: frozenset[str]) -> frozenset[str]:
        # An empty one would open the door to whoever brings none.
        if not all(key.strip() for key in keys):
            raise UserError(
                "api_keys: one is empty; give each a value, or name none to let all in."
            )
        return keys


# ------------------------------------------------------------------------------------- one call


class _Closed(Exception):
    """Ends a call from our side: what to tell the client, and the close code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class _Call:
    """One accepted WebSocket and its session."""

    def __init__(
        self,
        socket: WebSocket,
        session: Session,
        query: protocol.Query,
        engine: Engine[Any],
        config: ServerConfig,
    ) -> None:
        self._socket = socket
        self._session = session
        self._query = query
        self._engine = engine
        self._config = config
        self._decoder = protocol.audio_decoder(query.format)
        self._encoder = protocol.audio_encoder(query.format)
        self._heard_from = time.monotonic()
        self._full = False  # sound waits for room, for the client does not take its answers
        self._begun = 0  # conversations before this one, ended by a restart
        # Reader, writer and clock share one socket; messages go out whole, one after the other.
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Hold the conversation until either side ends it."""
        await self._send(protocol.Handshake())
        await self._send(protocol.Metadata(self._facts()))
        tasks = [asyncio.create_task(side) for side in (self._read(), self._write(), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def _facts(self) -> dict[str, Any]:
        model = self._engine.core.model
        return {
            "type": "session",
            "id": self._session.id,
            "slot": self._session.slot,
            "model": self._engine.name,
            "format": self._query.format,
            "sample_rate": protocol.SAMPLE_RATE,
            "frame_size": protocol.FRAME_SIZE,
            "delay_ms": pipeline_ms(model, 0.0),
            "ping_seconds": self._config.ping_seconds,
            "ignored": list(self._query.ignored),
            **self._session.params.given(),
        }

    async def _send(self, message: Message) -> None:
        async with self._sending:
            await self._put(message)

    async def _put(self, message: Message) -> None:
        try:
            await self._socket.send_bytes(protocol.encode(message))
        except RuntimeError as error:  # closed by the layer below, between two messages
            raise WebSocketDisconnect(1006) from error

    async def _read(self) -> None:
        while True:
            event = await self._socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            self._heard_from = time.monotonic()
            data = event.get("bytes")
            if data is None:
                raise _Closed("messages are binary; a text message came", UNSUPPORTED)
            await self._take(protocol.decode(data))

    async def _take(self, message: Message) -> None:
        match message:
            case protocol.Audio(data):
                if len(data) > _LONG:
                    pcm = await asyncio.to_thread(self._decoder.decode, data)
                else:
                    pcm = self._decoder.decode(data)
                # Waits while the queue is full: then the socket is not read, and TCP holds the
                # client back. Nothing is dropped, memory stays bounded.
                self._full = True
                await self._session.send(pcm)
                self._full = False
                self._heard_from = time.monotonic()
            case protocol.Control(Action.START):
                self._session.resume()
            case protocol.Control(Action.PAUSE):
                self._session.pause()
            case protocol.Control(Action.RESTART):
                self._session.restart()
                self._begun += 1
                # Tells what was on its way from what begins now.
                await self._send(protocol.Metadata({"type": "restarted"}))
            case _:
                # A full-duplex model hears that a turn has ended; the rest is not for a server.
                pass

    async def _write(self) -> None:
        while True:
            frame = await self._session.receive()
            begun = self._begun
            async with self._sending:
                if begun != self._begun:
                    continue  # restarted while it waited for its turn
                for extra in self._extras(frame):
                    await self._put(extra)
                await self._put(protocol.Audio(self._encoder.encode(frame.pcm)))

    def _extras(self, frame: Frame) -> Iterable[Message]:
        if frame.text:
            yield protocol.Text(frame.text)
        if frame.heard:
            yield protocol.Metadata({"type": "heard", "text": frame.heard})
        if frame.response_ms is not None or frame.index % LEVEL_FRAMES == 0:
            yield protocol.Metadata(
                {
                    "type": "level",
                    "input_dbfs": round(frame.input_dbfs, 1),
                    "output_dbfs": round(frame.output_dbfs, 1),
                }
            )
            latency = {
                "compute_ms": frame.compute_ms,
                "queue_ms": frame.queue_ms,
                "pipeline_ms": pipeline_ms(self._engine.core.model, frame.compute_ms)
                + frame.queue_ms,
                "response_ms": frame.response_ms,
            }
            yield protocol.Metadata(
                {"type": "latency"}
                | {name: round(ms, 1) for name, ms in latency.items() if ms is not None}
            )

    async def _watch(self) -> None:
        """Ping; end what has gone silent or has lasted too long; tell of a drain once."""
        config = self._config
        began = time.monotonic()
        pinged = began
        told = False
        while True:
            await asyncio.sleep(min(0.25, config.ping_seconds / 4, config.idle_seconds / 4))
            now = time.monotonic()
            if now - self._heard_from > config.idle_seconds:
                what = "was taken" if self._full else "came"
                raise _Closed(f"nothing {what} for {config.idle_seconds:g} s", POLICY)
            if config.session_seconds is not None and now - began > config.session_seconds:
                raise _Closed(f"a call lasts at most {config.session_seconds:g} s", POLICY)
            # A client that does not read holds the lock; this clock must not wait for it.
            if self._sending.locked():
                continue
            if now - pinged >= config.ping_seconds:
                pinged = now
                await self._send(protocol.Ping())
            if not told and self._engine.status is Status.DRAINING:
                told = True
                await self._send(
                    protocol.Metadata({"type": "draining", "seconds": config.drain_seconds})
                )


async def _hang_up(websocket: WebSocket, message: str, code: int) -> None:
    """Say why, then close; a client that is gone already is no error."""
    if websocket.application_state is not WebSocketState.CONNECTED:
        return
    # Bounded: a client that does not read must not keep its slot.
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        async with asyncio.timeout(2):
            await websocket.send_bytes(protocol.encode(protocol.Error(message)))
            await websocket.close(code)


# ------------------------------------------------------------------------------------ the server


def create_app(
    engine: Engine[Any],
    config: ServerConfig | None = None,
    *,
    info: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The web application around a started engine; its owner closes the engine.

    It keeps no state of its own and needs no lifespan, so it may be mounted in, or extended to, a
    larger application. `info` is added to `/api/build_info`.
    """
    config = config or ServerConfig()
    app = FastAPI(title="speechlm", docs_url=None, redoc_url=None, openapi_url=None)
    registry = _metrics(engine)

    @app.websocket("/api/chat")
    async def chat(websocket: WebSocket) -> None:
        if not _authorized(websocket, config.api_keys):
            await websocket.send_denial_response(Response("invalid or missing key", 401))
            return
        await websocket.accept()
        try:
            query = protocol.parse_query(websocket.query_params)
            session = engine.open(query.params, loop=asyncio.get_running_loop())
        except UserError as error:
            await _hang_up(websocket, str(error), POLICY)
            return
        except Refused as error:
            code = TRY_LATER if isinstance(error, Full) else GOING_AWAY
            await _hang_up(websocket, str(error), code)
            return
        try:
            await _Call(websocket, session, query, engine, config).run()
        except WebSocketDisconnect:
            pass  # the client has gone, mid-message
        except _Closed as closed:
            await _hang_up(websocket, closed.message, closed.code)
        except protocol.ProtocolError as error:
            await _hang_up(websocket, str(error), BROKEN)
        except SessionEnded as error:
            failed = engine.status is Status.FAILED
            await _hang_up(websocket, str(error), INTERNAL if failed else GOING_AWAY)
        finally:
            session.close()

    @app.get("/api/build_info")
    async def build_info() -> dict[str, Any]:
        return {
            "name": "speechlm",
            "version": _version(),
            "protocol_version": protocol.PROTOCOL_VERSION,
            "model": engine.name,
            "sample_rate": protocol.SAMPLE_RATE,
            "frame_size": protocol.FRAME_SIZE,
            "formats": list(AudioFormat),
            "slots": engine.slots,
            "slots_free": engine.slots - engine.active,
            **(info or {}),
        }

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = engine.status is Status.RUNNING
        return JSONResponse({"status": engine.status.value}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


def _authorized(websocket: WebSocket, keys: frozenset[str]) -> bool:
    given = websocket.headers.get("kyutai-api-key") or websocket.query_params.get("auth_id") or ""
    # Every key is compared, in constant time: the time taken tells nothing about any of them.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return not keys or any(matches)


def _version() -> str:
    try:
        return importlib.metadata.version("speechlm")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


class _EngineCollector:
    """Reads the engine when Prometheus asks."""

    def __init__(self, engine: Engine[Any]) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, help_text, value in (
            ("slots", "Conversations that fit", stats.slots),
            ("slots_active", "Conversations that live", stats.active),
            ("queued_frames", "Longest input queue of a session, frames", stats.queued_frames),
        ):
            yield GaugeMetricFamily(f"speechlm_{name}", help_text, value)
        for name, help_text, value in (
            ("steps", "Model steps", stats.steps),
            ("overruns", "Steps longer than the 80 ms they advance", stats.overruns),
            ("refused", "Conversations refused", stats.refused),
        ):
            yield CounterMetricFamily(f"speechlm_{name}", help_text, value)


def _metrics(engine: Engine[Any]) -> CollectorRegistry:
    # A registry of its own: two servers may live in one process.
    registry = CollectorRegistry()
    registry.register(_EngineCollector(engine))
    seconds = Histogram(
        "speechlm_step_seconds",
        "Compute time of a model step",
        buckets=(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.16, 0.32),
        registry=registry,
    )
    engine.on_step.append(seconds.observe)
    return registry


class DrainingServer(uvicorn.Server):
    """uvicorn, but SIGTERM first lets the calls that live end."""

    def __init__(self, config: uvicorn.Config, engine: Engine[Any], drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None
        self._leaving = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first SIGTERM, end the calls at the next signal, give up at the third."""
        # Only notes here: a signal handler must not wait for the engine's lock.
        if self._leaving:
            super().handle_exit(sig, frame)
        elif sig == signal.SIGTERM and self._deadline is None:
            self._deadline = time.monotonic() + self._drain_seconds
        else:
            self._deadline = time.monotonic()
            self._leaving = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self._deadline is not None and not self.should_exit:
            if self._engine.status is Status.RUNNING:
                self._engine.drain()
                logger.warning("draining: %d calls live", self._engine.active)
            if self._engine.active == 0 or time.monotonic() >= self._deadline:
                await asyncio.to_thread(self._engine.close)
                await asyncio.sleep(0.1)  # the calls say goodbye
                self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the address is taken or is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by every call. Left to itself the kernel would hold megabytes, a minute of sound,
    # before a client that lags is noticed, or notices that we do.
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        listener.setsockopt(socket.SOL_SOCKET, buffer, 64 * 1024)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UserError(
            f"Cannot listen on {host}:{port} ({reason}); choose another --host or --port."
        ) from error
    return listener


def run(
    app: FastAPI,
    engine: Engine[Any],
    host: str,
    port: int,
    config: ServerConfig | None = None,
) -> None:
    """Serve an app of `create_app` until a signal; blocks. Raises UserError for a taken address.

    Ends by Ctrl-C at once; by SIGTERM after the live calls, or `drain_seconds`.
    """
    config = config or ServerConfig()
    with contextlib.closing(listen(host, port)) as listener, contextlib.ExitStack() as stack:
        # Python's collector of cycles need not look through what was loaded, for two live frames.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            # uvicorn's own lines at "info" would print queries, and with them keys.
            ws_max_size=config.max_message_bytes,
            # Sound does not deflate; trying costs a millisecond a frame.
            ws_per_message_deflate=False,
            # Where sound is held back, a pong waits behind it and would be missed. Ours are the
            # protocol's own pings, and `idle_seconds`.
            ws_ping_interval=None,
            timeout_graceful_shutdown=5,
        )
        name = f"[{host}]" if ":" in host else host
        print(f"listening on http://{name}:{listener.getsockname()[1]}", flush=True)
        DrainingServer(settings, engine, config.drain_seconds).run(sockets=[listener])


def serve(
    model: str | FrameModel[Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8998,
    slots: int = 1,
    config: ServerConfig | None = None,
) -> None:
    """Load a model (a name, a folder, `hf://…`, or one in hand) and serve it; blocks."""
    listen(host, port).close()  # a taken address shows here, not after the model is loaded
    name = model if isinstance(model, str) else type(model).__name__
    with Engine(_load(model) if isinstance(model, str) else model, slots, name=name) as engine:
        run(create_app(engine, config), engine, host, port, config)


def _load(name: str) -> FrameModel[Any]:
    from speechlm import convert  # here: the server also serves models that need none of it

    return convert.load(name)
