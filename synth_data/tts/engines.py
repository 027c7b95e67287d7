"""Engines by name, and what stands between them and a build: a guard, a cache.

    speak ── Cached ──── Isolated ──── child process: Espeak, Flite, Festival, Pico, RHVoice,
              folder      time limit,                   Piper, Transformers, Endpoint
                          retries

All of them are ``Synthesizer``s, so each can be left out. An engine that hangs or dies takes its
child process with it and nothing else; after some tries its text is a ``UserError``, which a build
skips and counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import zipfile
import zlib
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from audio_codec.audio import SAMPLE_RATE, resample
from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data.tts.endpoint import Endpoint
from synth_data.tts.espeak import Espeak
from synth_data.tts.flite import Flite
from synth_data.tts.neural import Transformers
from synth_data.tts.piper import Piper
from synth_data.tts.programs import Festival, Pico, RHVoice
from synth_data.tts.speech import EngineFailure, Synthesizer, Utterance, Word
from synth_data.tts.voices import LIMITS, Voice

log = logging.getLogger(__name__)

_ENGINES: dict[str, type[Synthesizer]] = {
    "espeak": Espeak,
    "flite": Flite,
    "festival": Festival,
    "pico": Pico,
    "rhvoice": RHVoice,
    "piper": Piper,
    "transformers": Transformers,
    "http": Endpoint,
}
assert _ENGINES.keys() == LIMITS.keys()

# A child imports torch before it can speak.
_START_SECONDS = 120.0


class SynthesisConfig(BaseModel):
    """What stands between a build and its engines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: Path | None = None
    """Folder that keeps every utterance ever made; null keeps none."""
    seconds: float | None = Field(default=None, gt=0)
    """Time limit of an utterance, the loading of a model included: engines then run in a child
    process. Null runs them in this one, without a limit."""
    attempts: int = Field(default=3, ge=1)
    """Tries before a text is given up, where there is a limit."""


@functools.cache
def _engine(name: str) -> Synthesizer:
    return _ENGINES[name]()


def get_engine(name: str) -> Synthesizer:
    """The process-wide engine of that name.

    Raises:
        UserError: unknown name, or the engine is not installed (the message says how to do it).
    """
    if name not in _ENGINES:
        raise UserError(f"unknown speech engine {name!r}; choose one of {', '.join(_ENGINES)}")
    return _engine(name)


class InProcess:
    """Every engine, as it is."""

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``."""
        return get_engine(voice.engine).synthesize(text, voice)

    def version(self, voice: Voice) -> str:
        """Of the voice's engine."""
        return get_engine(voice.engine).version(voice)


@functools.cache
def get_synthesizer(config: SynthesisConfig) -> Synthesizer:
    """The process-wide synthesizer of every engine, behind what ``config`` asks for."""
    inner: Synthesizer = InProcess()
    if config.seconds is not None:
        inner = Isolated(config.seconds, config.attempts)
    return Cached(inner, config.cache) if config.cache is not None else inner


def speak(text: str, voice: Voice, synthesizer: Synthesizer | None = None) -> Utterance:
    """Speak ``text`` at 24 kHz, with word times; see ``Synthesizer`` for the errors raised.

    ``synthesizer``: None is the voice's engine in this process; see ``get_synthesizer``.
    """
    made = (synthesizer or get_engine(voice.engine)).synthesize(text, voice)
    pcm = resample(made.pcm, made.sample_rate, SAMPLE_RATE)
    return Utterance(np.clip(pcm, -1, 1), SAMPLE_RATE, made.words, made.estimated)


# --- A guard --------------------------------------------------------------------------------------


class Isolated:
    """Runs engines in one child process, which dies when it takes too long; tries again.

    ``counts``: "retried" tries and "failed" texts.
    """

    def __init__(self, seconds: float, attempts: int = 3) -> None:
        """Start nothing yet. ``seconds`` an utterance, ``attempts`` a text."""
        assert seconds > 0 and attempts >= 1, (seconds, attempts)
        self.seconds = seconds
        self.attempts = attempts
        self.counts: Counter[str] = Counter()
        self._child: BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; EngineFailure after the last try. A mistake is not tried again."""
        failures: list[EngineFailure] = []
        while len(failures) < self.attempts:
            if failures:
                self.counts["retried"] += 1
            answer = self._ask(text, voice)
            if isinstance(answer, Utterance):
                return answer
            if not isinstance(answer, EngineFailure):
                raise answer
            log.warning("%s", answer)
            failures.append(answer)
        self.counts["failed"] += 1
        raise EngineFailure(f"given up after {self.attempts} tries: {failures[-1]}")

    def version(self, voice: Voice) -> str:
        """Of the voice's engine."""
        return get_engine(voice.engine).version(voice)

    def close(self) -> None:
        """End the child; the next utterance starts another."""
        if self._child is not None and self._pipe is not None:
            # An engine may be a program of the child's, which has to end with it.
            if self._child.pid is not None and _leads(self._child.pid):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.kill()
            self._child.join()
            self._child.close()
            self._pipe.close()
        self._child = self._pipe = None

    def _ask(self, text: str, voice: Voice) -> Utterance | UserError:
        try:
            pipe = self._started()
            pipe.send((text, voice))
            if pipe.poll(self.seconds):
                answer: Utterance | UserError = pipe.recv()
                return answer
            failure = f"took longer than {self.seconds:g} s"
        except (EOFError, OSError):
            failure = "died"
        self.close()
        return EngineFailure(f"voice {str(voice)!r}: its engine {failure} on {text[:80]!r}")

    def _started(self) -> Connection[Any, Any]:
        if self._pipe is None:
            # A server forks children that have torch imported already: a new one takes
            # milliseconds. The engines themselves do not survive a fork; the server has none.
            methods = multiprocessing.get_all_start_methods()
            context: Any = multiprocessing.get_context(
                "forkserver" if "forkserver" in methods else "spawn"
            )
            context.set_forkserver_preload([__name__])
            pipe, theirs = multiprocessing.Pipe()
            child: BaseProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
            child.start()
            theirs.close()  # Else the end of the child would not end the pipe.
            self._pipe, self._child = pipe, child
            if not pipe.poll(_START_SECONDS):
                raise EOFError
            pipe.recv()
        return self._pipe


def _leads(pid: int) -> bool:
    """Whether a process leads a group of its own, as `_serve` has it do first of all."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _serve(pipe: Connection[Any, Any]) -> None:
    """A child's life: texts in, utterances or errors out, until the other end closes."""
    os.setsid()
    pipe.send("ready")
    while True:
        try:
            text, voice = pipe.recv()
        except EOFError:
            return
        try:
            answer: Utterance | UserError = InProcess().synthesize(text, voice)
        except UserError as error:
            answer = error
        except Exception as error:  # Whatever an engine can raise: the parent tries again.
            answer = EngineFailure(f"voice {str(voice)!r}: {type(error).__name__}: {error}")
        pipe.send(answer)


# --- A cache --------------------------------------------------------------------------------------


class Cached:
    """Keeps utterances in files named by what made them: engine, version, voice and text.

    A file is written whole or not at all, and carries checksums: a damaged one is made anew. Many
    processes may share a folder. ``counts``: "found", "made" and "broken" entries.
    """

    def __init__(self, inner: Synthesizer, folder: Path) -> None:
        """Keep what ``inner`` makes in ``folder``."""
        self.inner = inner
        self.folder = folder
        self.counts: Counter[str] = Counter()

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``."""
        path = self.path(text, voice)
        try:
            utterance = _load(path)
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
            self.counts["broken"] += 1
            log.warning("cache entry %s is broken; it is made again", path)
        else:
            self.counts["found"] += 1
            return utterance
        utterance = self.inner.synthesize(text, voice)
        _save(path, utterance)
        self.counts["made"] += 1
        return utterance

    def version(self, voice: Voice) -> str:
        """Of the voice's engine."""
        return self.inner.version(voice)

    def path(self, text: str, voice: Voice) -> Path:
        """Where an utterance is kept."""
        key = json.dumps([voice.engine, self.inner.version(voice), str(voice), text])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npz"


def _save(path: Path, utterance: Utterance) -> None:
    pcm = np.rint(utterance.pcm * 32768)
    assert np.array_equal(pcm, utterance.pcm * 32768), "an engine's sound must be of 16 bits"
    words = [[word.text, word.start, word.end] for word in utterance.words]
    described = json.dumps([utterance.sample_rate, utterance.estimated, words])
    with replacing(path) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(opened, pcm=pcm.astype(np.int16), described=np.array(described))


def _load(path: Path) -> Utterance:
    # Opened here: of a truncated file NumPy would leave its own handle open.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
        pcm = stored["pcm"]
        rate, estimated, words = json.loads(str(stored["described"]))
    if pcm.dtype != np.int16 or pcm.ndim != 1:
        raise ValueError(f"pcm is {pcm.dtype} of {pcm.ndim} axes")
    return Utterance(
        pcm.astype(np.float32) / np.float32(32768),
        int(rate),
        tuple(Word(str(text), float(start), float(end)) for text, start, end in words),
        bool(estimated),
    )
