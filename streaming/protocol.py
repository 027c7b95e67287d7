"""What goes over the wire: messages ↔ bytes, sound ↔ bytes. Nothing here imports torch.

One binary WebSocket message on `/api/chat` is one message; its first byte is the kind. Kinds 0–7
are those of the public Moshi servers and clients, so either side may be one of theirs. Public web
clients throw on a kind above 7, therefore everything that is ours (session facts, what was heard,
levels, latencies) travels as JSON in kind 4, an object whose `type` names it:

    {"type": "session", "format": "opus", "seed": 7, …}         once, right after the handshake
    {"type": "heard", "text": "…"}                              what the model heard, piece by piece
    {"type": "level", "input_dbfs": -31.2, "output_dbfs": -80}  a few times a second
    {"type": "latency", "compute_ms": 31.0, …}                  a few times a second
    {"type": "restarted"}                                       a new conversation begins after it
    {"type": "draining", "seconds": 30}                         the server will go away

Sound (kind 1) is mono at 24 kHz: Ogg-Opus pages, or raw little-endian PCM when the client asked for
it with the query `?format=pcm_f32` or `?format=pcm_s16`. Both are byte streams: a message may carry
any number of bytes, even half a sample. Opus adds about 6.5 ms (its look-ahead); PCM adds nothing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from audio_codec.errors import UserError

SAMPLE_RATE: Final = 24_000
"""Samples a second on the wire."""
FRAME_SIZE: Final = 1920
"""Samples in the 80 ms that the model takes at a time."""
PROTOCOL_VERSION: Final = 0
"""What kind 0 announces; public clients know version 0."""

Pcm = npt.NDArray[np.float32]


class ProtocolError(ValueError):
    """Bytes that break the protocol; the connection that brought them is closed."""


# --------------------------------------------------------------------------------------- messages


class Kind(IntEnum):
    """The first byte of a message."""

    HANDSHAKE = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6
    COLORED_TEXT = 7


class Action(IntEnum):
    """The payload of a control message."""

    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


@dataclass(frozen=True, slots=True)
class Handshake:
    """The server's first message; a client sends no sound before it has come."""

    protocol_version: int = PROTOCOL_VERSION
    model_version: int = 0


@dataclass(frozen=True, slots=True)
class Audio:
    """A piece of the sound stream, of any length, in the format of the session."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of what the assistant says."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """The client starts, pauses or restarts the conversation."""

    action: Action


@dataclass(frozen=True, slots=True)
class Metadata:
    """A JSON object; ours carry `type`."""

    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Error:
    """One sentence; the connection is closed after it."""

    message: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Says that the sender is alive; wants no reply."""


@dataclass(frozen=True, slots=True)
class ColoredText:
    """A piece of text with a colour index, as some public servers send it."""

    color: int
    text: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A kind (or a control action) of a newer protocol; to be ignored."""

    kind: int
    payload: bytes


Message = Handshake | Audio | Text | Control | Metadata | Error | Ping | ColoredText | Unknown


def encode(message: Message) -> bytes:
    """The bytes of one message."""
    match message:
        case Handshake(protocol_version, model_version):
            return struct.pack("<BII", Kind.HANDSHAKE, protocol_version, model_version)
        case Audio(data):
            return bytes((Kind.AUDIO,)) + data
        case Text(text):
            return bytes((Kind.TEXT,)) + text.encode()
        case Control(action):
            return bytes((Kind.CONTROL, action))
        case Metadata(data):
            return bytes((Kind.METADATA,)) + json.dumps(data, allow_nan=False).encode()
        case Error(text):
            return bytes((Kind.ERROR,)) + text.encode()
        case Ping():
            return bytes((Kind.PING,))
        case ColoredText(color, text):
            return bytes((Kind.COLORED_TEXT, color)) + text.encode()
        case Unknown(kind, payload):
            return bytes((kind,)) + payload


def decode(data: bytes) -> Message:
    """The message in the bytes.

    A kind that is not known comes back as `Unknown`, to be ignored; so does an unknown control
    action. Raises ProtocolError for no bytes at all and for a known kind with a broken payload.
    """
    if not data:
        raise ProtocolError("a message has at least one byte, its kind")
    kind, payload = data[0], data[1:]
    match kind:
        case Kind.HANDSHAKE:
            return _decode_handshake(payload)
        case Kind.AUDIO:
            return Audio(payload)
        case Kind.TEXT:
            return Text(_utf8(payload, "text"))
        case Kind.CONTROL:
            if len(payload) == 1 and payload[0] in Action.__members__.values():
                return Control(Action(payload[0]))
            return Unknown(kind, payload)
        case Kind.METADATA:
            return Metadata(_decode_json(payload))
        case Kind.ERROR:
            return Error(_utf8(payload, "error"))
        case Kind.PING:
            return Ping()
        case Kind.COLORED_TEXT:
            if not payload:
                raise ProtocolError("coloured text begins with a colour byte; the payload is empty")
            return ColoredText(payload[0], _utf8(payload[1:], "coloured text"))
        case _:
            return Unknown(kind, payload)


def _decode_handshake(payload: bytes) -> Handshake:
    if not payload:  # some public servers send the kind alone
        return Handshake(0, 0)
    if len(payload) < 8:
        raise ProtocolError(f"a handshake carries 8 bytes or none, not {len(payload)}")
    return Handshake(*struct.unpack_from("<II", payload))


def _utf8(payload: bytes, what: str) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"the {what} is not UTF-8 (byte {error.start})") from error


def _decode_json(payload: bytes) -> dict[str, Any]:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the metadata is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ProtocolError(f"the metadata is a JSON object, not {type(data).__name__}")
    return data


# ------------------------------------------------------------------------------------------ sound


class AudioFormat(StrEnum):
    """How sound is written in kind 1; the value of the query `?format=`."""

    OPUS = "opus"
    PCM_F32 = "pcm_f32"
    PCM_S16 = "pcm_s16"

    @classmethod
    def parse(cls, name: str) -> AudioFormat:
        """The format of that name. Raises UserError for any other."""
        try:
            return cls(name)
        except ValueError:
            choices = ", ".join(cls)
            raise UserError(f"format={name!r} is not known; choose one of {choices}.") from None


class AudioEncoder(Protocol):
    """Sound to bytes, a stream: some input may come out with a later call."""

    def encode(self, pcm: Pcm) -> bytes:
        """The bytes for pcm [S] in −1…1; may be empty."""
        ...


class AudioDecoder(Protocol):
    """Bytes to sound, a stream: bytes that end mid-sample or mid-page wait for the next call."""

    def decode(self, data: bytes) -> Pcm:
        """The sound [S] that the bytes complete; may be empty. Raises ProtocolError."""
        ...


class PcmEncoder:
    """Raw little-endian samples; s16 clips to −1…1."""

    def __init__(self, sample_format: AudioFormat) -> None:
        self._s16 = sample_format is AudioFormat.PCM_S16

    def encode(self, pcm: Pcm) -> bytes:
        """The bytes for pcm [S]."""
        if self._s16:
            return np.rint(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes()
        return pcm.astype("<f4").tobytes()


class PcmDecoder:
    """The inverse of `PcmEncoder`, for bytes cut anywhere."""

    def __init__(self, sample_format: AudioFormat) -> None:
        self._dtype = np.dtype("<i2" if sample_format is AudioFormat.PCM_S16 else "<f4")
        self._rest = b""

    def decode(self, data: bytes) -> Pcm:
        """The samples that are whole by now. Raises ProtocolError for NaN and infinity."""
        data = self._rest + data
        whole = len(data) - len(data) % self._dtype.itemsize
        self._rest = data[whole:]
        pcm = np.frombuffer(data[:whole], self._dtype).astype(np.float32)
        if self._dtype.kind == "i":
            pcm /= 32767
            return pcm
        # One NaN would stay in the session's key-value cache for good.
        if not np.isfinite(pcm).all():
            raise ProtocolError("the sound holds a sample that is not a finite number")
        return pcm


class OpusEncoder:
    """Ogg-Opus pages by `sphn`, at the sample rate of the wire."""

    def __init__(self) -> None:
        import sphn  # here: a client that speaks raw PCM does not need it

        self._writer = sphn.OpusStreamWriter(SAMPLE_RATE)

    def encode(self, pcm: Pcm) -> bytes:
        """The pages that pcm [S] completes."""
        # The writer cuts 40 ms packets and keeps the rest, so any length is allowed.
        return bytes(self._writer.append_pcm(np.ascontiguousarray(pcm, np.float32)))


class OpusDecoder:
    """The inverse of `OpusEncoder`, for bytes cut anywhere."""

    SLICE: Final = 1024
    """Bytes that the reader is given at a time: it completes no more than 5 s at once."""
    LONGEST: Final = 120
    """Seconds of sound in a message; silence packs so well that bytes alone bound nothing."""

    def __init__(self) -> None:
        import sphn

        self._reader = sphn.OpusStreamReader(SAMPLE_RATE)

    def decode(self, data: bytes) -> Pcm:
        """The sound of the packets that are whole by now. Raises ProtocolError for a bad page."""
        parts, samples = [np.zeros(0, np.float32)], 0
        for start in range(0, len(data), self.SLICE):
            try:
                parts.append(self._reader.append_bytes(data[start : start + self.SLICE]))
            except ValueError as error:  # the reader cannot be used after this
                raise ProtocolError(f"the sound is not Ogg-Opus ({error})") from error
            samples += len(parts[-1])
            if samples > self.LONGEST * SAMPLE_RATE:
                raise ProtocolError(f"a message holds at most {self.LONGEST} s of sound")
        return np.concatenate(parts)


def audio_encoder(audio_format: AudioFormat) -> AudioEncoder:
    """A new encoder, for one direction of one session."""
    return OpusEncoder() if audio_format is AudioFormat.OPUS else PcmEncoder(audio_format)


def audio_decoder(audio_format: AudioFormat) -> AudioDecoder:
    """A new decoder, for one direction of one session."""
    return OpusDecoder() if audio_format is AudioFormat.OPUS else PcmDecoder(audio_format)


# ------------------------------------------------------------------------------- query parameters


@dataclass(frozen=True, slots=True)
class SessionParams:
    """What a client may ask for in the query of `/api/chat`; None leaves it to the model.

    Raises UserError for a value out of range.
    """

    seed: int | None = None
    """Fixes every draw of the session, whoever else is connected; drawn by the server when None."""
    text_temperature: float | None = None
    audio_temperature: float | None = None
    text_topk: int | None = None
    audio_topk: int | None = None

    def __post_init__(self) -> None:
        for name in ("text_temperature", "audio_temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= 10):
                raise UserError(f"{name}={value} is out of range; choose 0 (greedy) to 10.")
        for name in ("text_topk", "audio_topk"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**31:
                raise UserError(
                    f"{name}={value} is out of range; choose 1 or more, or 0 (the model's own)."
                )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} is out of range; choose 0 to 2**63 - 1.")

    def given(self) -> dict[str, int | float]:
        """The fields that are not None."""
        values = {name: getattr(self, name) for name in _PARAMS}
        return {name: value for name, value in values.items() if value is not None}


_PARAMS: Final[Mapping[str, type[int] | type[float]]] = {
    "seed": int,
    "text_temperature": float,
    "audio_temperature": float,
    "text_topk": int,
    "audio_topk": int,
}
# Query names of public clients that our sampler has no counterpart for: accepted, listed in the
# session message as ignored.
_FOREIGN: Final = frozenset({"pad_mult", "repetition_penalty", "repetition_penalty_context"})


@dataclass(frozen=True, slots=True)
class Query:
    """The parsed query of `/api/chat`."""

    format: AudioFormat
    params: SessionParams
    ignored: tuple[str, ...]
    """Names that were given and have no effect."""


def parse_query(query: Mapping[str, str]) -> Query:
    """Read the query of `/api/chat`: our names, and those that public clients send.

    Public clients send two seeds, `text_seed` and `audio_seed`; here one seed drives a session, so
    both are folded into it (negative: draw one). Raises UserError for a value that is not of its
    type or out of range. A name that is not known is not an error: newer clients exist.
    """
    values: dict[str, Any] = {
        name: _number(name, query[name], kind) for name, kind in _PARAMS.items() if name in query
    }
    pair = [int(_number(n, query[n], int)) for n in ("text_seed", "audio_seed") if n in query]
    if "seed" not in values and pair and min(pair) >= 0:
        folded = 0
        for seed in pair:
            folded = (folded * 1_000_003 + seed) % 2**31
        values["seed"] = folded
    return Query(
        format=AudioFormat.parse(query.get("format", AudioFormat.OPUS)),
        params=SessionParams(**values),
        ignored=tuple(sorted(name for name in query if name in _FOREIGN)),
    )


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name}={text!r} is not {what}.") from None
