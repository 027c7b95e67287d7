"""Scripted users who talk to a model, many at once, and what can be read off the sound of a talk.

A user is a generator: it yields 80 ms of its own voice, gets back what the model did with them, and
returns whatever it found out. It lives in one slot of the model's batch from its first frame to its
last; then the slot goes to the next user.

Both sides of a talk are kept on the user's clock. What the model says in step n begins to sound
when the frame that it answers is whole, one frame later:

    frame            0        1        2        3
    user         |--- u0 -|--- u1 -|--- u2 -|--- u3 -|
    assistant    |(silent)|- a(u0)-|- a(u1)-|- a(u2)-|

So the 80 ms of framing are part of every time measured here; the time to compute is not (it depends
on the machine: `speechlm chat` measures it), nor are sound card and network.

*Speech* is at least 240 ms of sound above −40 dBFS, in windows of 10 ms, with gaps below 400 ms
(the assistant's voice, flite's rms, pauses for up to 250 ms at a comma).

Letters: S samples, F = 1920 samples of a frame, N windows.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, WINDOW, Pcm, audible
from speechlm.duplex import DuplexOutput

FRAME_SECONDS: Final = FRAME_SIZE / SAMPLE_RATE
LEAST_SPEECH: Final = 0.24
"""Seconds of sound from which on it is speech."""
PAUSE: Final = 0.4
"""Seconds of silence that end speech; shorter ones are part of it."""

T = TypeVar("T")


# --- What the sound of a talk says ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speech:
    """A stretch of speech, in seconds."""

    start: float
    end: float


def find_speech(pcm: Pcm) -> list[Speech]:
    """The stretches of speech in `pcm` [S], in order; see the top of this file for what counts."""
    sounding = np.flatnonzero(audible(pcm))
    # A window starts a stretch when the one before it is a pause or more away.
    breaks = np.flatnonzero(np.diff(sounding) > round(PAUSE * SAMPLE_RATE / WINDOW)) + 1
    return [
        Speech(
            int(stretch[0]) * WINDOW / SAMPLE_RATE, (int(stretch[-1]) + 1) * WINDOW / SAMPLE_RATE
        )
        for stretch in np.split(sounding, breaks)
        if len(stretch) * WINDOW >= LEAST_SPEECH * SAMPLE_RATE
    ]


def silent_after(pcm: Pcm, at: float, silence: float = PAUSE) -> float:
    """Seconds from `at` until `pcm` [S] falls silent and stays so for `silence` seconds.

    0 when it is silent there already; infinity when it never is before the recording ends.
    """
    sounding = audible(pcm)
    first = math.ceil(at * SAMPLE_RATE / WINDOW - 1e-6)
    # The silence may begin at `first` or right after any audible window that follows it.
    later = np.flatnonzero(sounding[first:]) + first
    begins = np.concatenate(([first], later + 1))
    ends = np.concatenate((later, [len(sounding)]))
    long = np.flatnonzero(ends - begins >= round(silence * SAMPLE_RATE / WINDOW))
    return int(begins[long[0]] - first) * WINDOW / SAMPLE_RATE if len(long) else math.inf


# --- Users ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """What the model did with a frame of the user's."""

    pcm: Pcm  # [F]
    text: str  # a piece of what it says, often ""
    heard: str  # a piece of what it heard the user say, often ""


Script = Generator[Pcm, Said, T]
"""A user: yields frames [F], is sent what came back, returns its findings."""


class Call:
    """One end of a talk: sends the user's voice and keeps both sides, on the user's clock.

    The methods that speak or wait are generators, for use with `yield from` in a `Script`.
    """

    def __init__(self, echo: tuple[float, float] | None = None) -> None:
        """`echo`: gain (dB) and delay (seconds) at which the assistant's voice returns."""
        self._echo_gain = 0.0 if echo is None else 10 ** (echo[0] / 20)
        self._echo_delay = 0 if echo is None else round(echo[1] * SAMPLE_RATE)
        assert self._echo_delay >= 0, echo
        self._frames = 0
        self._active_until = -math.inf
        silence = np.zeros(FRAME_SIZE, np.float32)
        # What sounds before and while the first frame is spoken; the newest is always the frame
        # that sounds while the next one is spoken.
        history = self._echo_delay // FRAME_SIZE + 2
        self._sounding = [silence] * history
        self.forget()

    def forget(self) -> None:
        """Forget what was said so far, so that a long talk need not be kept; the clock goes on."""
        self._since = self._frames
        self._user: list[Pcm] = []
        self._assistant: list[Pcm] = []
        self._text: list[str] = []
        self._heard: list[str] = []

    @property
    def now(self) -> float:
        """Seconds since the talk began."""
        return self._frames * FRAME_SECONDS

    @property
    def since(self) -> float:
        """When that which is kept began: 0, or the time of the last `forget`."""
        return self._since * FRAME_SECONDS

    @property
    def quiet(self) -> float:
        """Seconds since the assistant last made a sound or wrote a piece of text."""
        return self.now - self._active_until

    @property
    def user(self) -> Pcm:
        """The user's side, from `since` to `now`."""
        return _join(self._user)

    @property
    def assistant(self) -> Pcm:
        """What sounded from the assistant, from `since` to `now`."""
        return _join(self._assistant)

    @property
    def text(self) -> str:
        """What the assistant wrote that it says."""
        return "".join(self._text).strip()

    @property
    def heard(self) -> str:
        """What the assistant wrote that it hears."""
        return "".join(self._heard).strip()

    def _send(self, frame: Pcm) -> Script[None]:
        if self._echo_gain:
            past = np.concatenate(self._sounding)
            first = len(past) - FRAME_SIZE - self._echo_delay
            frame = frame + np.float32(self._echo_gain) * past[first : first + FRAME_SIZE]
        said = yield frame
        self._user.append(frame)
        self._assistant.append(self._sounding[-1])
        self._text.append(said.text)
        self._heard.append(said.heard)
        self._frames += 1
        self._sounding = [*self._sounding[1:], said.pcm]
        sounding = np.flatnonzero(audible(said.pcm))
        if said.text:
            self._active_until = self.now
        if len(sounding):
            self._active_until = self.now + (int(sounding[-1]) + 1) * WINDOW / SAMPLE_RATE

    def say(self, pcm: Pcm) -> Script[None]:
        """Speak `pcm` [S], filled up with silence to whole frames."""
        padded = np.pad(pcm.astype(np.float32), (0, -len(pcm) % FRAME_SIZE))
        for frame in padded.reshape(-1, FRAME_SIZE):
            yield from self._send(frame)

    def wait(self, seconds: float) -> Script[None]:
        """Be silent for `seconds`, rounded to whole frames."""
        for _ in range(round(seconds / FRAME_SECONDS)):
            yield from self._send(np.zeros(FRAME_SIZE, np.float32))

    def listen(
        self, quiet: float = 1.2, patience: float = 3.0, limit: float = 20.0
    ) -> Script[None]:
        """Be silent until an answer is over: `quiet` seconds have passed since its last sound.

        Gives up `patience` seconds after one that does not begin, `limit` after one that does not
        end.
        """
        began = self.now
        while (waited := self.now - began) < limit:
            answering = self._active_until > began
            if self.quiet >= quiet and (answering or waited >= patience):
                return
            yield from self.wait(FRAME_SECONDS)

    def await_speech(self, patience: float = 3.0) -> Script[float | None]:
        """Be silent until the assistant has spoken for 240 ms since now; the time it began.

        None when it has not within `patience` seconds.
        """
        first = self._frames - self._since
        began = self.now
        while self.now - began < patience:
            yield from self.wait(FRAME_SECONDS)
            sounding = np.flatnonzero(audible(np.concatenate(self._assistant[first:])))
            if len(sounding) * WINDOW >= LEAST_SPEECH * SAMPLE_RATE:
                return began + int(sounding[0]) * WINDOW / SAMPLE_RATE
        return None


def _join(frames: Sequence[Pcm]) -> Pcm:
    return np.concatenate(frames) if frames else np.zeros(0, np.float32)


# --- Talking --------------------------------------------------------------------------------------


class Model(Protocol):
    """What is asked of a model here; `speechlm.duplex.Duplex` has it."""

    def new_state(self, batch: int) -> Any:
        """The state of `batch` talks."""

    def configure(self, state: Any, slot: int, *, seed: int) -> None:
        """Set the seed of one talk."""

    def step(self, pcm: torch.Tensor, state: Any) -> DuplexOutput:
        """One frame of each talk."""

    def piece(self, token: int) -> str:
        """What a token adds to a text."""


@dataclass(frozen=True, slots=True)
class Talk(Generic[T]):
    """A user, the seed of the model in talk with it, and roughly how long that will take."""

    script: Script[T]
    seed: int
    seconds: float
    """A guess, for the progress bar alone."""


def progress_bar(shown: bool) -> Progress:
    """One line on the terminal with the time left; nothing where not `shown`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def converse(
    model: Model,
    talks: Sequence[Talk[T]],
    slots: int,
    name: str = "talking",
    progress: bool = False,
) -> list[T]:
    """Hold all talks, `slots` of them at a time, and return what each user found.

    A talk begins in the first slot that is free, in the order given: put the long ones first.
    """
    assert slots >= 1, slots
    slots = min(slots, len(talks))
    if not talks:
        return []
    found: dict[int, T] = {}
    state = model.new_state(slots)
    device = state.active.device
    state.active[:] = False
    waiting = iter(range(len(talks)))
    talking: dict[int, int] = {}  # slot → number of its talk
    ticks = [0] * len(talks)
    pcm = np.zeros((slots, 1, FRAME_SIZE), np.float32)

    guesses = [talk.seconds / FRAME_SECONDS for talk in talks]
    with progress_bar(progress) as bar:
        task = bar.add_task(name, total=sum(guesses))

        def begin(slot: int) -> None:
            """Give the slot to the next user who has something to say; else put it to rest."""
            for number in waiting:
                try:
                    pcm[slot, 0] = next(talks[number].script)
                except StopIteration as stop:
                    found[number] = stop.value
                    continue
                state.reset([slot])
                model.configure(state, slot, seed=talks[number].seed)
                talking[slot] = number
                return
            talking.pop(slot, None)
            state.active[slot] = False
            pcm[slot] = 0

        for slot in range(slots):
            begin(slot)
        while talking:
            output = model.step(torch.from_numpy(pcm).to(device), state)
            sound = output.pcm[:, 0].float().cpu().numpy()
            text, heard = output.text.tolist(), output.heard.tolist()
            for slot, number in list(talking.items()):
                said = Said(sound[slot].copy(), model.piece(text[slot]), model.piece(heard[slot]))
                ticks[number] += 1
                try:
                    pcm[slot, 0] = talks[number].script.send(said)
                except StopIteration as stop:
                    found[number] = stop.value
                    guesses[number] = ticks[number]
                    begin(slot)
            bar.update(task, total=sum(guesses), completed=sum(ticks))
        bar.update(task, total=sum(ticks), completed=sum(ticks))
    return [found[number] for number in range(len(talks))]
