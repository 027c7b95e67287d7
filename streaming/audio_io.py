"""Microphone and loudspeaker through `sounddevice` (PortAudio), at 24 kHz mono.

PortAudio calls back on a thread of its own, every 20 ms; a callback only moves samples between the
device and a queue. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Final

import numpy as np

from audio_codec.errors import UserError
from streaming.protocol import SAMPLE_RATE, Pcm

BLOCK: Final = 480
"""Samples (20 ms) a callback."""
JITTER: Final = 1200
"""Samples (50 ms) held back before playback begins, against uneven arrival."""
LONGEST: Final = SAMPLE_RATE
"""More than a second of waiting sound is cut down: a conversation must not fall behind."""
LATE: Final = JITTER + round(0.24 * SAMPLE_RATE)
"""Samples waiting past which silence is left out, until what was held up is caught up with."""
SILENT: Final = 1e-5
"""Mean power of silence, −50 dBFS."""


def sound_device() -> ModuleType:
    """The `sounddevice` module. Raises UserError with the way to install it."""
    try:
        return importlib.import_module("sounddevice")
    except ImportError:
        raise UserError(
            "Talking needs the package sounddevice; install it with `pip install sounddevice`."
        ) from None
    except OSError as error:  # the package is there, the C library is not
        raise UserError(
            f"Talking needs the PortAudio library ({error}); install it, "
            "on Debian and Ubuntu with `apt install libportaudio2`."
        ) from None


@contextmanager
def open_microphone() -> Iterator[AsyncIterator[Pcm]]:
    """The default microphone: an async iterator of pcm [480]. Raises UserError without one.

    What is taken from it more than a second late is lost from its beginning.
    """
    device = sound_device()
    loop = asyncio.get_running_loop()
    blocks: asyncio.Queue[Pcm] = asyncio.Queue()

    def arrive(block: Pcm) -> None:
        blocks.put_nowait(block)
        while blocks.qsize() * BLOCK > LONGEST:
            blocks.get_nowait()

    def callback(data: Any, frames: int, time: Any, status: Any) -> None:
        loop.call_soon_threadsafe(arrive, data[:, 0].copy())

    async def iterate() -> AsyncIterator[Pcm]:
        while True:
            yield await blocks.get()

    with _open(device, device.InputStream, callback, "microphone"):
        yield iterate()


class JitterBuffer:
    """Sound waiting to be played; fed by one thread, drained by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: deque[Pcm] = deque()
        self._length = 0
        self._playing = False

    def push(self, pcm: Pcm) -> None:
        """Append sound [S]; late, silence is left out; past a second the oldest is dropped."""
        with self._lock:
            if self._length > LATE and float(np.square(pcm).mean()) < SILENT:
                return
            self._chunks.append(pcm)
            self._length += len(pcm)
            while self._length > LONGEST and len(self._chunks) > 1:
                self._length -= len(self._chunks.popleft())

    def pull(self, count: int) -> Pcm:
        """The next `count` samples, silence where there are none."""
        block = np.zeros(count, np.float32)
        with self._lock:
            if not self._playing and self._length < JITTER:
                return block
            self._playing = True
            done = 0
            while done < count and self._chunks:
                head = self._chunks.popleft()
                part = head[: count - done]
                block[done : done + len(part)] = part
                done += len(part)
                if len(part) < len(head):
                    self._chunks.appendleft(head[len(part) :])
            self._length -= done
            self._playing = done == count  # ran dry: hold back again
        return block


class LoudSpeaker:
    """Plays sound and prints text; made by `open_speaker`."""

    def __init__(self) -> None:
        self._buffer = JitterBuffer()

    def play(self, pcm: Pcm) -> None:
        """Queue sound [S] at 24 kHz."""
        self._buffer.push(pcm)

    def show(self, text: str) -> None:
        """Print a piece of text."""
        print(text, end="", flush=True, file=sys.stdout)

    def _callback(self, data: Any, frames: int, time: Any, status: Any) -> None:
        data[:, 0] = self._buffer.pull(frames)


@contextmanager
def open_speaker() -> Iterator[LoudSpeaker]:
    """The default loudspeaker. Raises UserError without one."""
    device = sound_device()
    speaker = LoudSpeaker()
    with _open(device, device.OutputStream, speaker._callback, "loudspeaker"):
        yield speaker


@contextmanager
def _open(device: ModuleType, stream: Any, callback: Any, what: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            opened = stream(
                samplerate=SAMPLE_RATE,
                channels=1,
                dtype="float32",
                blocksize=BLOCK,
                callback=callback,
            )
            stack.enter_context(opened)  # which starts it
        except device.PortAudioError as error:
            raise UserError(f"The {what} cannot be opened: {error}.") from error
        yield
