"""What integrators need to test against a server without network, weights or sound card.

    with Engine(EchoModel(), slots=2) as engine:
        client = Client("ws://test", transport=InProcess(create_app(engine)))
        recording = await ScriptedSpeaker([Say(pcm), Pause(1.0)]).run(client)

Nothing here needs a test framework.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from audio_codec.state import State, all_active
from streaming.client import (
    Client,
    ClientState,
    Connection,
    ConnectionClosed,
    Event,
    Heard,
    Said,
    ServerError,
    Speech,
)
from streaming.protocol import FRAME_SIZE, SAMPLE_RATE, Pcm

# -------------------------------------------------------------------------------------- a model


@dataclass(slots=True)
class EchoState(State):
    """What the echo remembers of each slot."""

    held: Tensor
    """[B, delay, 1920] what was heard last, oldest first."""
    count: Tensor
    """[B] int64 frames taken."""
    seed: Tensor
    """[B] int64."""


@dataclass(frozen=True, slots=True)
class EchoOutput:
    """One step of `EchoModel`."""

    pcm: Tensor
    text: Tensor
    heard: Tensor


@dataclass(frozen=True, slots=True)
class EchoCodec:
    """The codec that `EchoModel` does not have."""

    delay: int = 0


class EchoModel:
    """Gives back what it hears, some frames late, and text that depends on seed and count.

    A stand-in for `speechlm.duplex.Duplex` that costs nothing, whose answers a test can foretell:
    output t is input t − delay; the text of frame t is letter (seed + t) % 7 of "abcdefg"; a frame
    louder than −40 dBFS is heard as "+".
    """

    sample_rate = SAMPLE_RATE
    frame_size = FRAME_SIZE
    codec = EchoCodec()

    def __init__(self, delay: int = 1, on_step: Callable[[], None] | None = None) -> None:
        """`on_step` is called in each step: to sleep, to count, to fail."""
        assert delay >= 1, delay
        self.delay_frames = delay
        self._on_step = on_step

    def new_state(self, batch: int) -> EchoState:
        """Silence."""
        return EchoState(
            active=all_active(batch),
            held=torch.zeros(batch, self.delay_frames, FRAME_SIZE),
            count=torch.zeros(batch, dtype=torch.int64),
            seed=torch.zeros(batch, dtype=torch.int64),
        )

    def configure(
        self,
        state: EchoState,
        slot: int,
        *,
        seed: int | None = None,
        text_temperature: float | None = None,
        audio_temperature: float | None = None,
        text_topk: int | None = None,
        audio_topk: int | None = None,
    ) -> None:
        """Set the seed of a slot; there is nothing to sample, so the rest has no effect."""
        if seed is not None:
            state.seed[slot] = seed

    def step(self, pcm: Tensor, state: EchoState) -> EchoOutput:
        """Take pcm [B, 1, 1920]."""
        if self._on_step is not None:
            self._on_step()
        active = state.active
        output = EchoOutput(
            pcm=state.held[:, :1].clone(),
            text=1 + (state.seed + state.count) % 7,
            heard=torch.where(pcm[:, 0].square().mean(dim=1) > 1e-4, 8, 0),
        )
        state.held[active] = torch.cat([state.held[:, 1:], pcm], dim=1)[active]
        state.count[active] += 1
        return output

    def piece(self, token: int, /) -> str:
        """`a`…`g` for what is said, `+` for what is heard, nothing for 0."""
        return ("", *"abcdefg+")[token]


# ----------------------------------------------------------------------------------- a transport

T = TypeVar("T")
_Message = MutableMapping[str, Any]
AsgiApp = Callable[[_Message, Callable[[], Any], Callable[[_Message], Any]], Any]


class InProcess:
    """A client's transport that calls an ASGI application directly: no socket, no port."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def connect(self, url: str, headers: Mapping[str, str]) -> Connection:
        """Open a WebSocket to the application. Raises ServerError when it turns the client away."""
        connection = _AsgiConnection()
        await connection.open(self._app, url, headers)
        return connection


class _AsgiConnection:
    """The client's end of an ASGI WebSocket (spec 2.4)."""

    def __init__(self) -> None:
        # Small, like a socket's buffers: a client that does not read makes the server wait.
        self._to_app: asyncio.Queue[_Message] = asyncio.Queue(32)
        self._to_client: asyncio.Queue[_Message] = asyncio.Queue(32)
        self._task: asyncio.Task[Any] | None = None
        self._closed: int | None = None

    async def open(self, app: AsgiApp, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        scope: _Message = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": parts.scheme,
            "path": parts.path,
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(b"host", parts.netloc.encode())]
            + [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 0),
            "server": (parts.hostname, parts.port),
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
        }
        await self._to_app.put({"type": "websocket.connect"})
        self._task = asyncio.create_task(app(scope, self._to_app.get, self._take))
        first = await self._next()
        if first["type"] != "websocket.accept":
            await self._task
            raise ServerError(f"refused with status {first.get('status', 403)}")

    async def _take(self, message: _Message) -> None:
        if self._closed is not None:
            raise OSError("the client has gone")  # what the ASGI spec asks of a server
        await self._to_client.put(message)

    async def _next(self) -> _Message:
        """What the application sent next; a close, where it has returned without one."""
        if not self._to_client.empty():
            return self._to_client.get_nowait()
        found = await self._unless_over(self._to_client.get())
        return found or {"type": "websocket.close", "code": 1006}

    async def _unless_over(self, waiting: Coroutine[Any, Any, T]) -> T | None:
        """What is waited for; None when the application returns before that."""
        assert self._task is not None
        doing = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait([doing, self._task], return_when=asyncio.FIRST_COMPLETED)
            # Both at once: what was sent last counts.
            await asyncio.sleep(0)
            return doing.result() if doing.done() else None
        finally:
            doing.cancel()

    async def send(self, data: bytes) -> None:
        if self._closed is not None:
            raise ConnectionClosed(self._closed)

        async def put() -> bool:
            await self._to_app.put({"type": "websocket.receive", "bytes": data})
            return True

        if not await self._unless_over(put()):
            raise ConnectionClosed(1006)

    async def receive(self) -> bytes:
        if self._closed is not None:
            raise ConnectionClosed(self._closed)
        message = await self._next()
        if message["type"] == "websocket.close":
            self._closed = message.get("code", 1000)
            raise ConnectionClosed(self._closed)
        return bytes(message["bytes"])

    async def close(self) -> None:
        self._closed = 1000 if self._closed is None else self._closed
        # What is on its way is lost, as when a socket closes; so the goodbye always has room.
        for waiting in (self._to_app, self._to_client):
            while not waiting.empty():
                waiting.get_nowait()
        self._to_app.put_nowait({"type": "websocket.disconnect", "code": self._closed})
        if self._task is not None:
            await self._task


# ------------------------------------------------------------------------------------- a speaker


@dataclass(frozen=True, slots=True)
class Say:
    """Speak pcm [S] at 24 kHz."""

    pcm: Pcm


@dataclass(frozen=True, slots=True)
class Pause:
    """Keep silent, but on the line."""

    seconds: float


@dataclass(slots=True)
class Recording:
    """What came back from a conversation."""

    pcm: Pcm
    text: str
    heard: str
    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ScriptedSpeaker:
    """Plays a script into a client and records the answer, frame for frame."""

    script: Sequence[Say | Pause]
    real_time: bool = False
    """Send at the pace of speech; otherwise as fast as the server takes it."""

    def sound(self) -> Pcm:
        """The whole script [S], padded to whole frames."""
        parts = [
            turn.pcm
            if isinstance(turn, Say)
            else np.zeros(round(turn.seconds * SAMPLE_RATE), np.float32)
            for turn in self.script
        ]
        sound = np.concatenate([*parts, np.zeros(0, np.float32)]).astype(np.float32)
        return np.pad(sound, (0, -len(sound) % FRAME_SIZE))

    async def run(self, client: Client) -> Recording:
        """Connect if need be, speak, listen until every frame has been answered, hang up.

        Opus holds its last packet back, so with it the final 80 ms may be missing.
        """
        if client.state is not ClientState.LIVE:
            await client.connect()
        sound = self.sound()
        sender = asyncio.create_task(self._send(client, sound))
        events: list[Event] = []
        pieces: list[Pcm] = [np.zeros(0, np.float32)]
        expected = len(sound) if client.format != "opus" else len(sound) - FRAME_SIZE
        try:
            async for event in client:
                events.append(event)
                if isinstance(event, Speech):
                    pieces.append(event.pcm)
                if sum(map(len, pieces)) >= expected and sender.done():
                    break
            await sender
        finally:
            sender.cancel()
            await client.close()
        return Recording(
            pcm=np.concatenate(pieces),
            text="".join(event.text for event in events if isinstance(event, Said)),
            heard="".join(event.text for event in events if isinstance(event, Heard)),
            events=events,
        )

    async def _send(self, client: Client, sound: Pcm) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for start in range(0, len(sound), FRAME_SIZE):
            if self.real_time:
                await asyncio.sleep(began + (start + FRAME_SIZE) / SAMPLE_RATE - loop.time())
            await client.send(sound[start : start + FRAME_SIZE])
