"""Who speaks when: sessions in the slots of one batch, stepped by one worker thread.

A conversation moves in frames of 80 ms: 1920 samples in, 1920 samples and at most one piece of text
out. The engine holds a batch of `slots` conversations in one model state. One worker thread steps
the model and never awaits; the asyncio side moves bytes and never computes; between them stand two
bounded queues a session and one lock, which is never held over a step.

When a step begins. A frame is due the moment it is whole; stepping at once would give a lone caller
the least latency but would step a batch once a session. So a step waits for the sessions that took
part in the last one, though for no longer than a step costs (the ski-rental rule: at most twice the
work of the best plan that knows all arrivals), and takes every frame that is there. Steps of a full
house so fall in with each other, one every 80 ms. A session that stayed away is not waited for.

    frames of A   |----a1----|----a2----|          A and B fall in: one step for both
    frames of B      |----b1----|----b2----|
    steps                       [a1 b1]    [a2 b2]

A slot whose client sends nothing, or does not take what it is sent, is frozen by the state's
`active` mask: its conversation stands still and costs the others nothing. Clients that lag catch
up, because a backlog is stepped as fast as the machine allows.

`Core` is the same batch without thread and queues; `chat` runs a recording through it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from audio_codec.audio import AUDIBLE_DBFS, WINDOW, audible, window_levels
from audio_codec.errors import UserError
from speechlm.evaluation.report import Metric
from streaming.protocol import FRAME_SIZE, SAMPLE_RATE, Pcm, SessionParams

logger = logging.getLogger(__name__)

FRAME_SECONDS: Final = FRAME_SIZE / SAMPLE_RATE

# ------------------------------------------------------------------------------------- the model


class FrameState(Protocol):
    """What the engine asks of a streaming state; `audio_codec.state.State` is one."""

    active: Tensor
    """[B] bool; a step leaves the rows that are False as they were."""

    def reset(self, slots: Sequence[int] | Tensor | None = None) -> None:
        """Put slots back to silence."""
        ...


class FrameOutput(Protocol):
    """One step of every slot."""

    @property
    def pcm(self) -> Tensor:
        """[B, 1, 1920] float."""
        ...

    @property
    def text(self) -> Tensor:
        """[B] int64: a text piece each."""
        ...

    @property
    def heard(self) -> Tensor:
        """[B] int64: a piece of what the user said."""
        ...


S = TypeVar("S", bound=FrameState)


class Delayed(Protocol):
    """A codec, as far as the clock is concerned."""

    @property
    def delay(self) -> int:
        """Samples by which its sound trails its frame."""
        ...


class FrameModel(Protocol[S]):
    """80 ms of sound in, 80 ms of sound and text out, a batch of conversations.

    `speechlm.duplex.Duplex` is the real one, `streaming.testing.EchoModel` a stand-in.
    """

    sample_rate: int
    frame_size: int
    delay_frames: int
    """Frames by which the model's sound trails its decision (the acoustic delay)."""

    @property
    def codec(self) -> Delayed:
        """What adds its own delay to the sound."""
        ...

    def new_state(self, batch: int) -> S:
        """The state of `batch` silent conversations."""
        ...

    def step(self, pcm: Tensor, state: S) -> FrameOutput:
        """Take pcm [B, 1, 1920] into the active rows of the state."""
        ...

    def piece(self, token: int, /) -> str:
        """The text of an output's id; empty for padding."""
        ...

    def configure(
        self,
        state: S,
        slot: int,
        *,
        seed: int | None = None,
        text_temperature: float | None = None,
        audio_temperature: float | None = None,
        text_topk: int | None = None,
        audio_topk: int | None = None,
    ) -> None:
        """Set one slot's seed and sampling; None leaves what a reset has left, the default."""
        ...


@dataclass(frozen=True, slots=True)
class Frame:
    """What one session gets from one step."""

    index: int
    """Frames since the conversation began."""
    pcm: Pcm
    """[1920] in −1…1."""
    text: str
    heard: str
    compute_ms: float
    """What the step took, for the whole batch."""
    queue_ms: float
    """How long the frame waited before its step."""
    input_dbfs: float
    output_dbfs: float
    response_ms: float | None
    """Once an answer: last voiced input → first audible output."""


def dbfs(pcm: Pcm) -> float:
    """Level of pcm [S] in dB below a full-scale square wave; −100 for digital silence."""
    return 10 * math.log10(float(np.mean(np.square(pcm), dtype=np.float64)) + 1e-10)


class ResponseMeter:
    """Measures one conversation's response time: last voiced input → first audible output.

    The clock is the caller's: sample n of the input is spoken at n / 24000 s, and the output of a
    frame begins to sound when that frame is whole and its step is computed, so the 80 ms of framing
    and the compute time count; sound card and network do not.
    """

    def __init__(self, voiced_dbfs: float = AUDIBLE_DBFS) -> None:
        """`voiced_dbfs`: an input window louder than this is speech."""
        self._voiced_dbfs = voiced_dbfs
        self._now = 0  # input samples so far
        self.voiced_at: float | None = None
        """Sample time at which the last voiced input window ended."""
        self.onset_at: float | None = None
        """Sample time of the first audible output window after that."""
        self.audible_until = -math.inf
        """Sample time at which the last audible output window ended."""
        self._overlapped = False
        self._reported = False

    def feed(self, heard: Pcm, said: Pcm, compute_ms: float) -> float | None:
        """Take one frame of both directions; milliseconds when a response time has become known.

        That is when the answer sounds and the input has been silent for 0.3 s, for until then the
        turn may go on. An answer that began while the input went on has no response time.
        """
        for i, level in enumerate(window_levels(heard)):
            if level > self._voiced_dbfs:
                self.voiced_at = self._now + (i + 1) * WINDOW
                self.onset_at = None
                self._reported = False
                self._overlapped = self.voiced_at - self.audible_until < 0.2 * SAMPLE_RATE
        self._now += len(heard)
        start = self._now + compute_ms * SAMPLE_RATE / 1000
        for i, loud in enumerate(audible(said)):
            if loud:
                if self.onset_at is None and self.voiced_at is not None:
                    self.onset_at = max(start + i * WINDOW, self.voiced_at)
                self.audible_until = start + (i + 1) * WINDOW
        if self.onset_at is None or self._reported or self._overlapped:
            return None
        if self.voiced_at is None or self._now - self.voiced_at < 0.3 * SAMPLE_RATE:
            return None
        self._reported = True
        return self.response_ms

    @property
    def overlapped(self) -> bool:
        """Whether the output was audible when the input ended, which leaves no time between."""
        return self._overlapped

    @property
    def response_ms(self) -> float | None:
        """The response time in milliseconds; None unless an answer began after the input's end."""
        if self.onset_at is None or self.voiced_at is None or self._overlapped:
            return None
        return (self.onset_at - self.voiced_at) * 1000 / SAMPLE_RATE


class Core(Generic[S]):
    """A batch of conversations in one model state; plain calls, one thread."""

    def __init__(self, model: FrameModel[S], slots: int) -> None:
        assert slots >= 1, slots
        assert (model.sample_rate, model.frame_size) == (SAMPLE_RATE, FRAME_SIZE), (
            model.sample_rate,
            model.frame_size,
        )
        self.model = model
        self.slots = slots
        with torch.inference_mode():
            self.state = model.new_state(slots)
            # Kept on the host, filled in place: the step's only allocation is its output.
            self._pcm = torch.zeros(slots, 1, FRAME_SIZE)
        self._indices = [0] * slots
        self._meters = [ResponseMeter() for _ in range(slots)]

    def begin(self, slot: int, params: SessionParams, meter: ResponseMeter | None = None) -> None:
        """Start a conversation in a slot, from silence."""
        with torch.inference_mode():
            self.state.reset([slot])
            self.model.configure(self.state, slot, **asdict(params))
        self._indices[slot] = 0
        self._meters[slot] = meter or ResponseMeter()

    def end(self, slot: int) -> None:
        """Forget the conversation in a slot."""
        with torch.inference_mode():
            self.state.reset([slot])

    def step(
        self, inputs: Mapping[int, Pcm], queue_ms: Mapping[int, float] | None = None
    ) -> dict[int, Frame]:
        """Take one frame [1920] for each given slot; the other slots stand still."""
        began = time.perf_counter()
        with torch.inference_mode():
            self._pcm.zero_()
            self.state.active.zero_()
            for slot, pcm in inputs.items():
                self._pcm[slot, 0] = torch.from_numpy(pcm)
                self.state.active[slot] = True
            output = self.model.step(self._pcm.to(self.state.active.device), self.state)
            said = output.pcm.float().cpu().numpy()
            texts: list[int] = output.text.tolist()
            heards: list[int] = output.heard.tolist()
        compute_ms = (time.perf_counter() - began) * 1000
        frames = {}
        for slot, heard in inputs.items():
            pcm = said[slot, 0].copy()
            frames[slot] = Frame(
                index=self._indices[slot],
                pcm=pcm,
                text=self.model.piece(texts[slot]),
                heard=self.model.piece(heards[slot]),
                compute_ms=compute_ms,
                queue_ms=queue_ms[slot] if queue_ms else 0.0,
                input_dbfs=dbfs(heard),
                output_dbfs=dbfs(pcm),
                response_ms=self._meters[slot].feed(heard, pcm, compute_ms),
            )
            self._indices[slot] += 1
        return frames

    def warm_up(self, frames: int = 3) -> None:
        """Pay the first calls' costs (kernels, caches) before anyone waits for them."""
        silence = np.zeros(FRAME_SIZE, np.float32)
        for slot in range(self.slots):
            self.begin(slot, SessionParams(seed=0))
        for _ in range(frames):
            self.step(dict.fromkeys(range(self.slots), silence))
        for slot in range(self.slots):
            self.end(slot)


# ----------------------------------------------------------------------------------- live sessions


class Refused(Exception):
    """The engine takes no session now; the message is one sentence."""


class Full(Refused):
    """Every slot is taken."""


class SessionEnded(Exception):
    """The session is over; the message says why."""


class Status(Enum):
    """The life of an engine."""

    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


class Session:
    """One live conversation: sound goes in by `offer`/`send`, frames come out by `poll`/`receive`.

    Made by `Engine.open`. The plain methods may be called from any thread; the async ones from the
    loop that was given to `open`.
    """

    def __init__(
        self,
        engine: Engine[Any],
        slot: int,
        params: SessionParams,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.id = secrets.token_hex(8)
        self.slot = slot
        self.params = params
        self.paused = False
        self._engine = engine
        self._lock = engine._changed
        self._loop = loop
        self._wake = asyncio.Event()
        self._input: deque[tuple[Pcm, float]] = deque()  # whole frames and when they came
        self._partial = np.zeros(FRAME_SIZE, np.float32)
        self._filled = 0
        self._output: deque[Frame] = deque()
        self._fresh = True  # the slot must be reset before the next step
        self._expected = False  # took part in the last step
        self._ended: str | None = None

    # ---- state, with the lock held

    def _ready(self) -> bool:
        """Whether the next step can take a frame: there is input, and room for the output."""
        room = len(self._output) < self._engine.queue_frames
        return bool(self._input) and room and not self.paused

    def _signal(self) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop has closed: nobody is left to take part
            self._engine._release(self, "the event loop of the session has closed")

    def _check(self) -> None:
        if self._ended is not None:
            raise SessionEnded(self._ended)

    # ---- the caller's side

    @property
    def ended(self) -> str | None:
        """Why the session is over, or None."""
        return self._ended

    @property
    def queued_frames(self) -> int:
        """Whole frames that wait for their step."""
        return len(self._input)

    def offer(self, pcm: Pcm) -> int:
        """Take sound [S] at 24 kHz, of any length; returns how many samples there was room for.

        While the session is paused, sound is taken and dropped. Raises SessionEnded.
        """
        with self._lock:
            self._check()
            if self.paused:
                return len(pcm)
            taken = 0
            while taken < len(pcm) and len(self._input) < self._engine.queue_frames:
                count = min(FRAME_SIZE - self._filled, len(pcm) - taken)
                np.clip(
                    pcm[taken : taken + count],
                    -1,
                    1,
                    out=self._partial[self._filled : self._filled + count],
                )
                taken += count
                self._filled += count
                if self._filled == FRAME_SIZE:
                    self._input.append((self._partial, time.monotonic()))
                    self._partial = np.zeros(FRAME_SIZE, np.float32)
                    self._filled = 0
                    self._lock.notify_all()
            return taken

    async def send(self, pcm: Pcm) -> None:
        """Take all of pcm [S], waiting while the queue is full. Raises SessionEnded."""
        while True:
            self._wake.clear()
            pcm = pcm[self.offer(pcm) :]
            if not len(pcm):
                return
            await self._wake.wait()

    def poll(self) -> Frame | None:
        """The next frame if there is one. Raises SessionEnded once none is left."""
        with self._lock:
            if not self._output:
                self._check()
                return None
            frame = self._output.popleft()
            if len(self._output) == self._engine.queue_frames - 1:
                self._lock.notify_all()  # was full: the slot thaws
            return frame

    async def receive(self) -> Frame:
        """The next frame. Raises SessionEnded."""
        while True:
            self._wake.clear()
            frame = self.poll()
            if frame is not None:
                return frame
            await self._wake.wait()

    def wait(self, timeout: float) -> Frame:
        """The next frame, for callers without a loop. Raises SessionEnded, TimeoutError."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while (frame := self.poll()) is None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._lock.wait(left):
                    raise TimeoutError(f"no frame within {timeout} s")
            return frame

    def pause(self) -> None:
        """Let the conversation stand still; what is said meanwhile is dropped."""
        with self._lock:
            self.paused = True
            self._signal()  # who waits in `send` for room need not

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._lock:
            self.paused = False
            self._lock.notify_all()

    def restart(self) -> None:
        """Forget the conversation and begin a new one, in the same slot, with the same seed."""
        with self._lock:
            self._input.clear()
            self._output.clear()
            self._filled = 0
            self._fresh = True
            self._signal()  # there is room for input again

    def close(self) -> None:
        """Give the slot back; what it held is erased."""
        self._engine._release(self, "the session was closed")


@dataclass(frozen=True, slots=True)
class Stats:
    """What the engine has measured; times over the last thousand steps."""

    status: Status
    slots: int
    active: int
    queued_frames: int
    """The longest input queue."""
    steps: int
    overruns: int
    """Steps that took longer than the 80 ms they advance."""
    refused: int
    frame_ms_p50: float
    frame_ms_p95: float
    frame_ms_max: float


class Engine(Generic[S]):
    """Holds `slots` conversations of one model and steps them on a thread of its own.

    Used as a context manager, or by `start` and `close`.
    """

    def __init__(
        self, model: FrameModel[S], slots: int = 1, *, name: str = "", queue_frames: int = 25
    ) -> None:
        """`queue_frames` bounds each of a session's two queues (25 frames: 2 s)."""
        assert queue_frames >= 1, queue_frames
        self.core = Core(model, slots)
        self.name = name
        self.slots = slots
        self.queue_frames = queue_frames
        self.on_step: list[Callable[[float], None]] = []
        """Called by the worker after each step with the seconds it took."""
        # Re-entrant: a failing signal releases its session from inside.
        self._changed = threading.Condition(threading.RLock())
        self._sessions: dict[int, Session] = {}
        self._erase: set[int] = set()
        self._status = Status.NEW
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_seconds = 0.0
        self._times: deque[float] = deque(maxlen=1000)
        self._steps = self._overruns = self._refused = 0

    # ---- life

    def start(self) -> None:
        """Start the worker and wait until the model is warm. Raises what the model raised."""
        assert self._status is Status.NEW, self._status
        self.core.warm_up()
        self._status = Status.RUNNING
        self._thread.start()

    def drain(self) -> None:
        """Take no new session; those that live go on."""
        with self._changed:
            if self._status is Status.RUNNING:
                self._status = Status.DRAINING

    def close(self) -> None:
        """End every session and the worker; safe to call twice."""
        with self._changed:
            if self._status in (Status.RUNNING, Status.DRAINING):
                self._status = Status.CLOSED
            for session in list(self._sessions.values()):
                self._release(session, "the server is shutting down")
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Engine[S]:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- sessions

    def open(
        self,
        params: SessionParams | None = None,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Session:
        """Claim a slot, at once or not at all. Raises Full, or Refused when not running.

        `loop` is the loop on which `Session.send` and `Session.receive` will be awaited.
        """
        params = params or SessionParams()
        if params.seed is None:
            params = replace(params, seed=secrets.randbelow(2**31))
        with self._changed:
            if self._status is not Status.RUNNING:
                self._refused += 1
                raise Refused(f"the server takes no new conversation: it is {self._status.value}")
            free = next((slot for slot in range(self.slots) if slot not in self._sessions), None)
            if free is None:
                self._refused += 1
                raise Full(f"no free channels: all {self.slots} are taken, try again later")
            session = Session(self, free, params, loop)
            self._sessions[free] = session
            return session

    def _release(self, session: Session, reason: str) -> None:
        with self._changed:
            if session._ended is not None:
                return
            session._ended = reason
            session._input.clear()
            del self._sessions[session.slot]
            self._erase.add(session.slot)
            session._signal()
            self._changed.notify_all()

    @property
    def status(self) -> Status:
        """Where in its life the engine is."""
        return self._status

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._sessions)

    def stats(self) -> Stats:
        """What has been measured so far."""
        with self._changed:
            times = np.array(self._times or [0.0]) * 1000
            p50, p95 = np.percentile(times, [50, 95])
            return Stats(
                status=self._status,
                slots=self.slots,
                active=len(self._sessions),
                queued_frames=max((s.queued_frames for s in self._sessions.values()), default=0),
                steps=self._steps,
                overruns=self._overruns,
                refused=self._refused,
                frame_ms_p50=float(p50),
                frame_ms_p95=float(p95),
                frame_ms_max=float(times.max()),
            )

    # ---- the worker

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            # A model that raised is in an unknown state: end every call, take no more, say so.
            logger.exception("the model failed; the engine stops")
            with self._changed:
                self._status = Status.FAILED
                for session in list(self._sessions.values()):
                    self._release(session, f"the model failed ({type(error).__name__})")

    def _turn(self) -> bool:
        """Wait for work and do it once; False when the engine closes."""
        with self._changed:
            batch = self._next_batch()
            if batch is None:
                return False
            erase, self._erase = self._erase, set()
            now = time.monotonic()
            inputs: dict[int, Pcm] = {}
            queue_ms: dict[int, float] = {}
            fresh = []
            for session in batch:
                inputs[session.slot], came = session._input.popleft()
                queue_ms[session.slot] = (now - came) * 1000
                if session._fresh:
                    fresh.append(session)
                    session._fresh = False
                session._signal()  # there is room for input again
        for slot in erase:
            self.core.end(slot)
        for session in fresh:
            self.core.begin(session.slot, session.params)
        if batch:
            frames = self.core.step(inputs, queue_ms)
            self._deliver(batch, frames)
        return True

    def _next_batch(self) -> list[Session] | None:
        """The sessions of the next step (none: only slots to erase); None when closing."""
        while True:
            if self._status not in (Status.RUNNING, Status.DRAINING):
                return None
            sessions = self._sessions.values()
            ready = [session for session in sessions if session._ready()]
            wait = None
            if ready:
                due = min(session._input[0][1] for session in ready) + self._step_seconds
                wait = due - time.monotonic()
                awaited = any(session._expected and not session._ready() for session in sessions)
                if not awaited or wait <= 0:
                    return ready
            if self._erase:
                return []
            self._changed.wait(wait)

    def _deliver(self, batch: Sequence[Session], frames: Mapping[int, Frame]) -> None:
        seconds = next(iter(frames.values())).compute_ms / 1000
        with self._changed:
            self._steps += 1
            self._overruns += seconds > FRAME_SECONDS
            self._times.append(seconds)
            share = 0.1 if self._steps > 1 else 1.0
            self._step_seconds += share * (seconds - self._step_seconds)
            for session in self._sessions.values():
                session._expected = session in batch
            for session in batch:
                # Ended or restarted during the step: the frame belongs to no conversation.
                if session._ended is None and not session._fresh:
                    session._output.append(frames[session.slot])
                    session._signal()
            self._changed.notify_all()  # for Session.wait
        for listener in self.on_step:
            listener(seconds)


# --------------------------------------------------------------------------------- one recording


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to a recording."""

    pcm: Pcm
    """[S] from the first to the last audible output; all of the output when none is audible."""
    text: str
    heard: str
    stream: Pcm
    """[S] all of the output, on the clock of the recording."""
    metrics: dict[str, Metric]


def chat(
    model: FrameModel[Any],
    pcm: Pcm,
    *,
    seed: int = 0,
    end_silence: float = 1.5,
    max_seconds: float = 20.0,
) -> Answer:
    """Stream a recording [S] at 24 kHz through the engine's core, then silence until answered.

    The answer is over after `end_silence` seconds below −40 dBFS since speech began; at most
    `max_seconds` of silence follow the recording. Frames are computed one by one, as live, but
    without waiting for the clock. Which input windows count as voiced says `voiced_level`.
    Raises UserError for an empty recording.
    """
    if not len(pcm):
        raise UserError("The recording has no samples.")
    core = Core(model, 1)
    core.warm_up()
    padded = np.zeros(math.ceil(len(pcm) / FRAME_SIZE) * FRAME_SIZE, np.float32)
    padded[: len(pcm)] = np.clip(pcm, -1, 1)
    meter = ResponseMeter(voiced_level(padded[: len(pcm)]))
    core.begin(0, SessionParams(seed=seed), meter)
    frames: list[Frame] = []
    quiet = 0.0  # seconds since the last audible output
    spoken = False  # since the recording was over
    for start in range(0, len(padded) + round(max_seconds * SAMPLE_RATE), FRAME_SIZE):
        recorded = padded[start : start + FRAME_SIZE]
        over = not len(recorded)
        if over and (spoken or meter.onset_at is not None) and quiet >= end_silence:
            break
        frame = core.step({0: np.zeros(FRAME_SIZE, np.float32) if over else recorded})[0]
        frames.append(frame)
        heard = np.flatnonzero(audible(frame.pcm))
        spoken = spoken or (over and heard.size > 0)
        windows = FRAME_SIZE // WINDOW
        quiet = (
            (windows - 1 - int(heard[-1])) * WINDOW / SAMPLE_RATE
            if heard.size
            else quiet + FRAME_SECONDS
        )
    stream = np.concatenate([frame.pcm for frame in frames])
    heard = np.flatnonzero(audible(stream))
    first, last = (heard[0], heard[-1] + 1) if heard.size else (0, len(stream) // WINDOW)
    unmeasured = "the recording is silent" if meter.voiced_at is None else "no audible answer"
    if meter.overlapped and heard.size:
        unmeasured = "the answer began before the recording's last words"
    return Answer(
        pcm=stream[first * WINDOW : last * WINDOW],
        text="".join(frame.text for frame in frames).strip(),
        heard="".join(frame.heard for frame in frames).strip(),
        stream=stream,
        metrics={
            **frame_metrics([frame.compute_ms for frame in frames]),
            "pipeline_ms_p50": Metric(
                pipeline_ms(model, float(np.median([frame.compute_ms for frame in frames]))),
                n=len(frames),
                unit="ms",
            ),
            "response_latency_ms": _metric(meter.response_ms, "ms", unmeasured),
            "answer_seconds": Metric(
                int(last - first) * WINDOW / SAMPLE_RATE if heard.size else 0.0, unit="s"
            ),
        },
    )


def voiced_level(pcm: Pcm) -> float:
    """Level in dBFS above which a window of a recording [S] is somebody's voice.

    That is within 30 dB of the loudest window and 8 dB above the quietest tenth of them, but not
    above the 12 dB that speech without a pause keeps within.
    """
    levels = window_levels(pcm) if len(pcm) >= WINDOW else dbfs(pcm)
    peak, floor = float(np.max(levels)), float(np.percentile(levels, 10))
    return max(min(max(peak - 30, floor + 8), peak - 12), -70.0)


def pipeline_ms(model: FrameModel[Any], compute_ms: float) -> float:
    """Delay from a sound in to a sound out: 80 ms of framing + acoustic delay + codec + compute."""
    frames = (1 + model.delay_frames) * FRAME_SECONDS * 1000
    return frames + model.codec.delay * 1000 / SAMPLE_RATE + compute_ms


def frame_metrics(compute_ms: Sequence[float], suffix: str = "") -> dict[str, Metric]:
    """`frame_ms_p50`, `_p95` and `_max` of measured step times."""
    p50, p95 = np.percentile(compute_ms, [50, 95])
    n = len(compute_ms)
    return {
        f"frame_ms_p50{suffix}": Metric(float(p50), n=n, unit="ms"),
        f"frame_ms_p95{suffix}": Metric(float(p95), n=n, unit="ms"),
        f"frame_ms_max{suffix}": Metric(float(max(compute_ms)), n=n, unit="ms"),
    }


def _metric(value: float | None, unit: str, reason: str) -> Metric:
    return Metric(None, unit=unit, reason=reason) if value is None else Metric(value, unit=unit)
