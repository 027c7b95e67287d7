"""Clients of a speechlm server, or of a public Moshi one. Nothing here imports torch.

    async with Client("ws://127.0.0.1:8998") as client:
        await client.send(pcm)                  # float32 [S] at 24 kHz, any length, silence too
        async for event in client:
            match event:
                case Speech(pcm): ...
                case Said(text): ...

    with SyncClient("ws://127.0.0.1:8998") as client: ...       # the same without asyncio

The model's clock is the sound that it is sent: 80 ms in, 80 ms out. A client that sends nothing
hears nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import websockets
import websockets.asyncio.client

from audio_codec.errors import UserError
from streaming import protocol
from streaming.protocol import (
    FRAME_SIZE,
    SAMPLE_RATE,
    Action,
    AudioFormat,
    Pcm,
    SessionParams,
)

CHUNK: Final = FRAME_SIZE
"""Samples a message at most."""
LATE: Final = round(1.25 * SAMPLE_RATE)
"""Samples unanswered past which a microphone's are lost: a second, and a connection's delay."""
MISSED_PINGS: Final = 4
"""So many in a row, and the server is gone."""

T = TypeVar("T")


class ClientError(Exception):
    """The conversation cannot be opened or has broken; the message says why."""


class ServerError(ClientError):
    """The server said why (kind 5): it is full, the key is wrong, it shuts down, …"""


# ----------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Speech:
    """Sound of the assistant, silence too."""

    pcm: Pcm
    """[S] in −1…1 at 24 kHz."""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of text that the assistant says."""

    text: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A piece of text that the assistant heard."""

    text: str


@dataclass(frozen=True, slots=True)
class Level:
    """Loudness of the last frame in both directions, dBFS."""

    input_dbfs: float
    output_dbfs: float


@dataclass(frozen=True, slots=True)
class Latency:
    """What the server measured, milliseconds."""

    compute_ms: float
    queue_ms: float
    pipeline_ms: float
    response_ms: float | None = None
    """Once an answer: last voiced input → first audible output."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Any other JSON that the server sent."""

    data: Mapping[str, Any]


Event = Speech | Said | Heard | Level | Latency | Notice


# -------------------------------------------------------------------------------------- transport


class Connection(Protocol):
    """An open WebSocket, as far as a client needs it."""

    async def send(self, data: bytes) -> None:
        """Send one binary message. Raises ConnectionClosed."""
        ...

    async def receive(self) -> bytes:
        """The next binary message. Raises ConnectionClosed."""
        ...

    async def close(self) -> None:
        """Close; safe to call twice."""
        ...


class Transport(Protocol):
    """Opens connections; `streaming.testing.InProcess` is another one."""

    async def connect(self, url: str, headers: Mapping[str, str]) -> Connection:
        """Open a WebSocket. Raises ClientError."""
        ...


class ConnectionClosed(Exception):
    """The other side, or the network, has closed."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the connection was closed (code {code})")
        self.code = code


class _WebSocket:
    def __init__(self, socket: websockets.asyncio.client.ClientConnection) -> None:
        self._socket = socket

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send(data)
        except websockets.ConnectionClosed as error:
            raise ConnectionClosed(_code(error)) from error

    async def receive(self) -> bytes:
        try:
            data = await self._socket.recv(decode=False)
        except websockets.ConnectionClosed as error:
            raise ConnectionClosed(_code(error)) from error
        return bytes(data)

    async def close(self) -> None:
        await self._socket.close()


def _code(error: websockets.ConnectionClosed) -> int:
    return error.rcvd.code if error.rcvd is not None else 1006


class WebSocketTransport:
    """The network, by `websockets`."""

    async def connect(self, url: str, headers: Mapping[str, str]) -> Connection:
        """Open a WebSocket. Raises ClientError."""
        try:
            socket = await websockets.asyncio.client.connect(
                # Sound that nobody has read holds up the closing handshake: not for long.
                url,
                additional_headers=dict(headers),
                compression=None,
                close_timeout=0.5,
                # A pong waits behind sound that is held back; servers send pings of the protocol.
                ping_interval=None,
            )
        except websockets.InvalidStatus as error:
            status = error.response.status_code
            why = "the key is missing or wrong" if status == 401 else f"status {status}"
            raise ServerError(f"{url} refused the connection: {why}") from error
        except (OSError, websockets.WebSocketException) as error:
            raise ClientError(f"cannot connect to {url}: {error}") from error
        return _WebSocket(socket)


# ---------------------------------------------------------------------------------------- clients


class ClientState(Enum):
    """The life of a client."""

    IDLE = "idle"
    CONNECTING = "connecting"
    LIVE = "live"
    CLOSED = "closed"


@dataclass(slots=True)
class Client:
    """One conversation with a server, for asyncio."""

    url: str
    """ws://host:port, wss://…; without a path `/api/chat` is meant."""
    format: AudioFormat = AudioFormat.OPUS
    """Opus suits the internet and every Moshi server; raw PCM loses and delays nothing, but only
    our own servers speak it."""
    params: SessionParams = field(default_factory=SessionParams)
    api_key: str | None = None
    timeout: float = 10.0
    """Seconds to wait for the server's handshake."""
    transport: Transport = field(default_factory=WebSocketTransport)
    state: ClientState = field(default=ClientState.IDLE, init=False)
    session: Mapping[str, Any] = field(default_factory=dict, init=False)
    """What the server said about the session; empty with a public Moshi server."""
    _connection: Connection | None = field(default=None, init=False, repr=False)
    _encoder: protocol.AudioEncoder = field(init=False, repr=False)
    _decoder: protocol.AudioDecoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = _chat_url(self.url, self.format, self.params)

    async def __aenter__(self) -> Client:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Open the conversation. Raises ServerError when refused, ClientError otherwise."""
        if self.state not in (ClientState.IDLE, ClientState.CLOSED):
            raise ClientError(f"connect() needs an idle client; this one is {self.state.value}")
        self.state = ClientState.CONNECTING
        self.session = {}
        self._encoder = protocol.audio_encoder(self.format)
        self._decoder = protocol.audio_decoder(self.format)
        headers = {"kyutai-api-key": self.api_key} if self.api_key else {}
        try:
            async with asyncio.timeout(self.timeout):
                self._connection = await self.transport.connect(self.url, headers)
                await self._await_handshake()
        except TimeoutError as error:
            await self.close()
            raise ClientError(f"no handshake from {self.url} in {self.timeout:g} s") from error
        except ConnectionClosed as error:
            await self.close()
            raise ClientError(f"{self.url}: {error} before its handshake") from error
        except BaseException:
            await self.close()
            raise
        self.state = ClientState.LIVE

    async def _await_handshake(self) -> None:
        while not isinstance(await self._receive(), protocol.Handshake):
            pass
        if self.format is AudioFormat.OPUS:
            return  # a public server may say nothing until it has sound
        message = await self._receive()
        if isinstance(message, protocol.Metadata):
            self._metadata(message.data)
        if self.session.get("format") != self.format:
            raise ClientError(f"{self.url} does not speak {self.format}; use format opus")

    async def _receive(self) -> protocol.Message:
        connection = self._open_connection()
        pings = self.session.get("ping_seconds")  # of our own servers
        patience = MISSED_PINGS * pings if isinstance(pings, int | float) else None
        try:
            async with asyncio.timeout(patience):
                message = protocol.decode(await connection.receive())
        except TimeoutError as error:
            raise ClientError(f"{self.url}: nothing came for {patience:g} s") from error
        except protocol.ProtocolError as error:
            raise ClientError(f"{self.url} broke the protocol: {error}") from error
        if isinstance(message, protocol.Error):
            raise ServerError(message.message)
        return message

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise ClientError(f"the client is not connected; it is {self.state.value}")
        return self._connection

    async def send(self, pcm: Pcm) -> None:
        """Send sound [S] at 24 kHz, −1…1, of any length. Raises ClientError.

        Waits when the server takes sound more slowly than it is offered. A long recording should be
        sent while another task receives: a client that does not receive is frozen by the server.
        """
        connection = self._open_connection()
        pcm = np.asarray(pcm, np.float32)
        if pcm.ndim != 1 or not np.isfinite(pcm).all():
            raise ClientError(f"send() takes finite samples [S], not shape {list(pcm.shape)}")
        for start in range(0, len(pcm), CHUNK):
            data = self._encoder.encode(pcm[start : start + CHUNK])
            if data:
                await self._send(connection, protocol.Audio(data))

    async def control(self, action: Action) -> None:
        """Pause, start again, or restart the conversation from silence. Raises ClientError."""
        await self._send(self._open_connection(), protocol.Control(action))

    async def _send(self, connection: Connection, message: protocol.Message) -> None:
        try:
            await connection.send(protocol.encode(message))
        except ConnectionClosed as error:
            raise ClientError(f"{self.url}: {error}") from error

    async def receive(self) -> Event | None:
        """The next event; None when the server has ended the conversation in good order.

        Raises ServerError with the server's reason, ClientError for a connection that broke or a
        server that broke the protocol. Either way the client has hung up then.
        """
        while True:
            try:
                event = self._event(await self._receive())
            except ConnectionClosed as error:
                hung_up = self.state is ClientState.CLOSED  # by `close`, from another task
                await self.close()
                if hung_up or error.code in (1000, 1001):
                    return None
                raise ClientError(f"{self.url}: {error}") from error
            except ClientError:
                await self.close()
                raise
            if event is not None:
                return event

    def _event(self, message: protocol.Message) -> Event | None:
        match message:
            case protocol.Audio(data):
                try:
                    pcm = self._decoder.decode(data)
                except protocol.ProtocolError as error:
                    raise ClientError(f"{self.url} broke the protocol: {error}") from error
                return Speech(pcm) if len(pcm) else None
            case protocol.Text(text) | protocol.ColoredText(_, text):
                return Said(text)
            case protocol.Metadata(data):
                return self._metadata(data)
            case _:
                return None  # a ping, a kind of a newer protocol

    def _metadata(self, data: Mapping[str, Any]) -> Event:
        if data.get("type") == "session":
            self.session = data
        try:
            match data.get("type"):
                case "heard":
                    return Heard(str(data["text"]))
                case "level":
                    return Level(float(data["input_dbfs"]), float(data["output_dbfs"]))
                case "latency":
                    return Latency(**{k: float(v) for k, v in data.items() if k != "type"})
        except (KeyError, TypeError, ValueError):
            return Notice(data)  # of a newer server
        return Notice(data)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events until the conversation ends."""
        while self.state is ClientState.LIVE:
            event = await self.receive()
            if event is None:
                return
            yield event

    async def close(self) -> None:
        """Hang up; safe to call twice."""
        connection, self._connection = self._connection, None
        self.state = ClientState.CLOSED
        if connection is not None:
            await connection.close()


def _chat_url(url: str, audio_format: AudioFormat, params: SessionParams) -> str:
    try:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        right = scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number, of brackets that do not close
        right = False
    if not right:
        raise UserError(f"url={url!r} is not a server; write ws://host:port or wss://host:port.")
    query = dict(parse_qsl(parts.query))
    query |= {name: str(value) for name, value in params.given().items()}
    if audio_format is not AudioFormat.OPUS:  # what servers assume; strict ones know no `format`
        query["format"] = audio_format
    path = parts.path if parts.path not in ("", "/") else "/api/chat"
    return urlunsplit((scheme, parts.netloc, path, urlencode(query), ""))


class SyncClient:
    """One conversation with a server, for code without asyncio; usable from several threads.

    It runs a `Client` on an event loop in a thread of its own and reads all the time, so a caller
    that receives late does not freeze the conversation.
    """

    def __init__(self, client: Client | str) -> None:
        """`client`: a URL, or a `Client` with options that is not connected yet."""
        self.client = Client(client) if isinstance(client, str) else client
        self._events: queue.SimpleQueue[Event | ClientError | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._reader: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> SyncClient:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Open the conversation. Raises ServerError when refused, ClientError otherwise."""
        if self._loop is not None:
            raise ClientError("connect() needs an idle client; this one is connected")
        self._events, self._reader = queue.SimpleQueue(), None  # none of an earlier conversation
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        try:
            self._await(self.client.connect())
        except BaseException:
            self.close()
            raise
        self._reader = asyncio.run_coroutine_threadsafe(self._read(), self._loop)

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            coroutine.close()
            raise ClientError("the client is not connected")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _read(self) -> None:
        try:
            async for event in self.client:
                self._events.put(event)
            self._events.put(None)
        except ClientError as error:
            self._events.put(error)

    @property
    def session(self) -> Mapping[str, Any]:
        """What the server said about the session."""
        return self.client.session

    def send(self, pcm: Pcm) -> None:
        """Send sound [S] at 24 kHz, −1…1. Raises ClientError."""
        self._await(self.client.send(pcm))

    def control(self, action: Action) -> None:
        """Pause, start again, or restart the conversation. Raises ClientError."""
        self._await(self.client.control(action))

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event; None at the end. Raises TimeoutError, ServerError, ClientError."""
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no event within {timeout} s") from None
        if event is None or isinstance(event, ClientError):
            self._events.put(event)  # the end stays the end
        if isinstance(event, ClientError):
            raise event
        return event

    def __iter__(self) -> Iterator[Event]:
        """Events until the conversation ends."""
        while (event := self.receive()) is not None:
            yield event

    def close(self) -> None:
        """Hang up; safe to call twice."""
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self.client.close(), loop).result()
        if self._reader is not None:
            self._reader.cancel()
            concurrent.futures.wait([self._reader])
        self._events.put(None)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()


# ------------------------------------------------------------------------------------------- talk


async def converse(client: Client, microphone: AsyncIterator[Pcm], speaker: Speaker) -> None:
    """Carry sound between a microphone, an open client and a speaker until either side ends.

    What a slow server would hear more than a second late is lost: buffers on the way hold minutes.
    """
    unanswered = 0  # samples sent, less those that came back

    async def send() -> None:
        nonlocal unanswered
        async for pcm in microphone:
            # Of our own servers alone it is known that they answer every sample with one.
            if client.session and unanswered > LATE:
                continue
            unanswered += len(pcm)
            await client.send(pcm)

    async def receive() -> None:
        nonlocal unanswered
        async for event in client:
            match event:
                case Speech(pcm):
                    unanswered -= len(pcm)
                    speaker.play(pcm)
                case Said(text):
                    speaker.show(text)
                case _:
                    pass

    sending, receiving = tasks = [asyncio.create_task(send()), asyncio.create_task(receive())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if sending in done and sending.exception() is not None:
            # The server's reason, where it gave one, is among what it sent before it hung up.
            said, _ = await asyncio.wait([receiving], timeout=1.0)
            done = said or done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class Speaker(Protocol):
    """Where the assistant's sound and words go."""

    def play(self, pcm: Pcm) -> None:
        """Queue sound [S] at 24 kHz."""
        ...

    def show(self, text: str) -> None:
        """Show a piece of text."""
        ...


def talk(url: str, *, api_key: str | None = None, params: SessionParams | None = None) -> None:
    """Talk to a server by microphone and loudspeaker, until Ctrl-C.

    Wear headphones: here nothing cancels the echo of the loudspeaker (browsers do). Raises
    UserError when there is no sound device, or no server.
    """
    from streaming import audio_io  # here: PortAudio is wanted by this function alone

    async def run() -> None:
        client = Client(url, params=params or SessionParams(), api_key=api_key)
        async with client:
            print("Connected. Speak; Ctrl-C ends the conversation.", file=sys.stderr)
            with audio_io.open_microphone() as microphone, audio_io.open_speaker() as speaker:
                await converse(client, microphone, speaker)

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        print(file=sys.stderr)
    except ClientError as error:
        raise UserError(f"{error}.") from error
