"""Text to speech with word times: espeak-ng and flite behind one protocol.

Both engines are C libraries called in this process. Each utterance is a pure function of
``(text, voice)``, whatever was synthesized before it, so a shard of speech has the same bytes
however many workers made it. Word times are the engines' own (espeak-ng's word events; the segment
ends of flite's utterance structure), not a forced alignment.

Seconds of speech made in one second on one core of a cloud VM, resampling included: espeak-ng 350
to 700; flite's clustergen voices (rms, slt, awb) 60 to 85, its diphone voices (kal, kal16) 500 or
more.

A voice is written ``engine:name@rate=…,pitch=…,range=…``, for example ``espeak:en-us+m3@rate=170``
or ``flite:rms``::

    >>> speak("two plus three is five", Voice.parse("flite:rms")).words[0].text
    'two'
"""

import _ctypes
import ctypes
import ctypes.util
import functools
import itertools
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from audio_codec.audio import SAMPLE_RATE, resample
from audio_codec.errors import UserError
from synth_data.text import Token, tokenize

# One utterance at a time: the engines are C libraries with global variables.
_LOCK = threading.Lock()

# Below this level, relative to the utterance's loudest 10 ms, espeak-ng's output counts as pause.
_PAUSE_DB = -40.0


@dataclass(frozen=True, slots=True)
class Word:
    """A spoken word and its time on the clock of its channel."""

    text: str
    """Lower-case, without outer punctuation."""
    start: float
    """Seconds."""
    end: float
    """Seconds; a pause after the word is not part of it."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """Synthesized speech: mono ``pcm`` float32 [S] in -1..1 and the words in it, in order."""

    pcm: npt.NDArray[np.float32]
    sample_rate: int
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.pcm) / self.sample_rate


@dataclass(frozen=True, slots=True)
class Voice:
    """Who speaks, and how. ``None`` leaves a setting at the engine's own value.

    The settings keep their engine's units:

    ======= ============================== =======================================
    setting espeak                         flite
    ======= ============================== =======================================
    name    accent+variant ("en-us+m3")    rms, slt, awb, kal16, kal
    rate    words a minute (80..450)       speed, 1 = as recorded (0.5..2)
    pitch   0..99, 50 = as the variant     mean F0 in Hz (50..400); rms ignores it
    range   0..99, 50 = as the variant     standard deviation of F0 in Hz (0..100)
    ======= ============================== =======================================
    """

    engine: str
    name: str
    rate: float | None = None
    pitch: float | None = None
    range: float | None = None

    def __post_init__(self) -> None:
        """Check every setting against the limits of the engine.

        Raises:
            UserError: unknown engine, or a setting outside its limits.
        """
        if self.engine not in _LIMITS:
            raise UserError(
                f"voice {str(self)!r}: unknown engine {self.engine!r}; "
                f"choose one of {', '.join(_LIMITS)}"
            )
        for setting, (low, high) in _LIMITS[self.engine].items():
            value = getattr(self, setting)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"voice {str(self)!r}: {setting} {value:g} is outside {low:g}..{high:g}"
                )

    def __str__(self) -> str:
        """The written form, which ``parse`` reads back."""
        settings = [
            f"{setting}={value:.6g}"
            for setting in ("rate", "pitch", "range")
            if (value := getattr(self, setting)) is not None
        ]
        return f"{self.engine}:{self.name}" + ("@" + ",".join(settings) if settings else "")

    @classmethod
    def parse(cls, text: str) -> "Voice":
        """Read ``engine:name[@rate=…,pitch=…,range=…]``.

        Raises:
            UserError: the text has another form, an unknown engine or setting, or a bad number.
        """
        head, _, tail = text.partition("@")
        engine, colon, name = head.partition(":")
        if not colon or not name:
            raise UserError(f"voice {text!r} must be written engine:name, as in 'flite:rms'")
        settings: dict[str, float] = {}
        for pair in filter(None, tail.split(",")):
            setting, _, value = pair.partition("=")
            if setting not in ("rate", "pitch", "range"):
                raise UserError(
                    f"voice {text!r}: unknown setting {setting!r}; choose rate, pitch or range"
                )
            try:
                settings[setting] = float(value)
            except ValueError:
                raise UserError(f"voice {text!r}: {setting} {value!r} is not a number") from None
        return cls(engine, name, **settings)

    def jitter(self, rng: np.random.Generator) -> "Voice":
        """The same voice on another day: speed within ±10%, pitch within ±8%, range within ±20%."""
        drawn: dict[str, float | None] = {}
        for setting, width in (("rate", 0.10), ("pitch", 0.08), ("range", 0.20)):
            own: float | None = getattr(self, setting)
            value = _NEUTRAL[self.engine].get(setting) if own is None else own
            factor = 1 + width * rng.uniform(-1, 1)  # Drawn always: one voice takes three draws.
            if value is not None:  # Else only the engine knows: a flite voice's own F0.
                low, high = _LIMITS[self.engine][setting]
                value = float(f"{min(max(value * factor, low), high):.4g}")
            drawn[setting] = value
        return Voice(self.engine, self.name, drawn["rate"], drawn["pitch"], drawn["range"])


_LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "espeak": {"rate": (80, 450), "pitch": (0, 99), "range": (0, 99)},
    "flite": {"rate": (0.5, 2), "pitch": (50, 400), "range": (0, 100)},
}
_NEUTRAL: dict[str, dict[str, float]] = {
    "espeak": {"rate": 175, "pitch": 50, "range": 50},
    "flite": {"rate": 1},
}


class Synthesizer(Protocol):
    """A text-to-speech engine."""

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """Speak ``text``; the engine's own sample rate; the same bytes for the same arguments.

        The words of the result are ``tokenize(text)``; give it the spoken form (``text.spell_out``)
        for one word of time an entry.

        Raises:
            UserError: the engine or voice is not installed, or the text holds nothing to speak.
        """
        ...


def _tokens(text: str) -> list[Token]:
    tokens = tokenize(text)
    if not tokens:
        raise UserError(f"text {text!r} holds no word to speak")
    return tokens


# --- espeak-ng ------------------------------------------------------------------------------------


class _EspeakEvent(ctypes.Structure):
    """``espeak_EVENT`` of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # Characters from 1.
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # Milliseconds.
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_uint64),
    )


_EspeakCallback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_short),
    ctypes.c_int,
    ctypes.POINTER(_EspeakEvent),
)

_EVENT_LIST_TERMINATED, _EVENT_WORD = 0, 1
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
# Of 100: at full volume the loud variants clip inside the engine.
_ESPEAK_VOLUME = 60


class Espeak:
    """espeak-ng from the ``espeakng-loader`` wheel, in its synchronous mode with word events.

    The library is one synthesizer in global variables, and what it says depends, by up to 200
    samples, on what it said before (oscillator phase and noise generator survive even
    ``espeak_Terminate``). It is therefore unloaded and loaded again for each utterance, which takes
    0.3 ms and makes ``synthesize`` a pure function.
    """

    sample_rate = 22_050

    def __init__(self) -> None:
        """Find the library and its data.

        Raises:
            UserError: the wheel is not installed.
        """
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "speech engine 'espeak' is not installed; "
                "run: pip install espeakng-loader (or this package's extra 'tts')"
            ) from None
        self._library = espeakng_loader.get_library_path()
        self._data = Path(espeakng_loader.get_data_path())
        # espeak-ng takes an unknown variant without a word: names are checked here instead.
        self._variants = {path.name for path in (self._data / "voices" / "!v").iterdir()}
        self._accents = {
            path.name.lower()
            for path in (self._data / "lang").rglob("en*")
            if path.is_file() and path.name != "en-Shaw"  # Shavian letters
        }

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; 22,050 Hz, starting and ending in the engine's own short silence."""
        assert voice.engine == "espeak", voice
        tokens = _tokens(text)
        accent, _, variant = voice.name.partition("+")
        if accent not in self._accents:
            raise UserError(
                f"voice {str(voice)!r}: unknown accent {accent!r}; "
                f"choose one of {', '.join(sorted(self._accents))}"
            )
        if variant and variant not in self._variants:
            raise UserError(
                f"voice {str(voice)!r}: unknown variant {variant!r}; "
                f"choose one of {', '.join(sorted(self._variants))}"
            )
        with _LOCK:
            samples, events = self._run(text, voice)
        if not samples:
            raise UserError(f"text {text!r} holds nothing that voice {str(voice)!r} can speak")
        pcm = np.concatenate(samples).astype(np.float32) / np.float32(32768)
        words = _words_from_events(tokens, events, pcm, self.sample_rate)
        return Utterance(pcm, self.sample_rate, words)

    def _run(
        self, text: str, voice: Voice
    ) -> tuple[list[npt.NDArray[np.int16]], list[tuple[int, float]]]:
        """Samples by chunk, and (character, seconds) of each word event."""
        samples: list[npt.NDArray[np.int16]] = []
        events: list[tuple[int, float]] = []

        def receive(wav: Any, count: int, event: Any) -> int:
            if wav and count > 0:
                samples.append(np.ctypeslib.as_array(wav, (count,)).copy())
            for index in itertools.count():
                current = event[index]
                if current.type == _EVENT_LIST_TERMINATED:
                    return 0
                if current.type == _EVENT_WORD:
                    events.append((current.text_position - 1, current.audio_position / 1000))
            raise AssertionError("unreachable: itertools.count is endless")

        callback = _EspeakCallback(receive)
        library = ctypes.CDLL(self._library)
        try:
            rate = library.espeak_Initialize(
                _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self._data).encode(), _INITIALIZE_DONT_EXIT
            )
            assert rate == self.sample_rate, f"espeak_Initialize returned {rate}"
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # It starts from the time of day.
            library.espeak_SetSynthCallback(callback)
            status = library.espeak_SetVoiceByName(voice.name.encode())
            assert status == 0, f"espeak_SetVoiceByName({voice.name!r}) returned {status}"
            library.espeak_SetParameter(_VOLUME, _ESPEAK_VOLUME, 0)
            for parameter, setting in ((_RATE, "rate"), (_PITCH, "pitch"), (_RANGE, "range")):
                value = getattr(voice, setting)
                neutral = _NEUTRAL["espeak"][setting]
                library.espeak_SetParameter(
                    parameter, round(neutral if value is None else value), 0
                )
            encoded = text.encode()
            library.espeak_Synth(
                encoded,
                ctypes.c_size_t(len(encoded) + 1),
                ctypes.c_uint(0),
                ctypes.c_int(_POS_CHARACTER),
                ctypes.c_uint(0),
                ctypes.c_uint(_CHARS_UTF8),
                None,
                None,
            )
            library.espeak_Synchronize()
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)
        return samples, events


def _words_from_events(
    tokens: list[Token],
    events: list[tuple[int, float]],
    pcm: npt.NDArray[np.float32],
    sample_rate: int,
) -> tuple[Word, ...]:
    """Turn the starts of espeak-ng's word events into words with ends.

    espeak-ng reads some word pairs as one ("of the" has one event) and some tokens as several
    ("don't" may have two). A token takes its first event; tokens without one share the interval of
    the token before them, by length in characters.
    """
    starts: dict[int, float] = {}
    for character, seconds in events:
        index = next((i for i, token in enumerate(tokens) if token.end > character), None)
        if index is not None:
            starts[index] = min(seconds, starts.get(index, math.inf))
    # The first token opens the first interval even when its event was given to a later one.
    if 0 not in starts:
        starts[0] = min(starts.values(), default=0.0)
    heads = sorted(starts)
    words: list[Word] = []
    for head, following in itertools.zip_longest(heads, heads[1:]):
        group = tokens[head:following]
        begin = starts[head]
        limit = starts[following] if following is not None else len(pcm) / sample_rate
        # A head that shares its start with the next (the patched first token) gets no time.
        end = max(begin, _end_of_sound(pcm, sample_rate, begin, max(begin, limit)))
        total = sum(len(token.text) for token in group)
        edges = itertools.accumulate((len(token.text) / total for token in group), initial=0.0)
        times = [begin + edge * (end - begin) for edge in edges]
        words += [
            Word(token.text, round(a, 4), round(b, 4))
            for token, (a, b) in zip(group, itertools.pairwise(times), strict=True)
        ]
    return tuple(words)


def _end_of_sound(
    pcm: npt.NDArray[np.float32], sample_rate: int, start: float, end: float
) -> float:
    """The last time within ``start..end`` (seconds) that is louder than a pause."""
    loudest = float(np.abs(pcm).max())
    first, last = round(start * sample_rate), min(round(end * sample_rate), len(pcm))
    audible = np.flatnonzero(np.abs(pcm[first:last]) > loudest * 10 ** (_PAUSE_DB / 20))
    return (first + int(audible[-1]) + 1) / sample_rate if len(audible) else end


# --- flite ----------------------------------------------------------------------------------------


class _FliteWave(ctypes.Structure):
    """``cst_wave`` of cst_wave.h."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _FliteVoice(ctypes.Structure):
    """The head of ``cst_voice`` of cst_voice.h."""

    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


class Flite:
    """CMU Flite 2 from the system's shared libraries, with word times from its utterance structure.

    The library is called rather than the ``flite`` program because the program prints words and
    segment times but not which segments a word has.
    """

    voices = ("rms", "slt", "awb", "kal16", "kal")

    def __init__(self) -> None:
        """Load the library and its English front end.

        Raises:
            UserError: the shared libraries are not installed.
        """
        self._library = _flite_library("flite")
        for dependency in ("flite_cmulex", "flite_usenglish"):
            _flite_library(dependency)
        pointer, text, real = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
        prototypes: dict[str, tuple[Any, list[Any]]] = {
            "flite_synth_text": (pointer, [text, pointer]),
            "utt_wave": (ctypes.POINTER(_FliteWave), [pointer]),
            "utt_relation": (pointer, [pointer, text]),
            "relation_head": (pointer, [pointer]),
            "item_next": (pointer, [pointer]),
            "item_feat_string": (text, [pointer, text]),
            "ffeature_float": (real, [pointer, text]),
            "ffeature_string": (text, [pointer, text]),
            "feat_set_float": (None, [pointer, text, real]),
            "feat_present": (ctypes.c_int, [pointer, text]),
            "feat_float": (real, [pointer, text]),
            "feat_remove": (ctypes.c_int, [pointer, text]),
            "delete_utterance": (None, [pointer]),
            "flite_init": (ctypes.c_int, []),
        }
        for name, (result, arguments) in prototypes.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._library.flite_init()
        self._loaded: dict[str, tuple[Any, dict[bytes, float | None]]] = {}

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; 16,000 Hz (``kal``: 8,000 Hz)."""
        assert voice.engine == "flite", voice
        tokens = _tokens(text)
        if voice.name not in self.voices:
            raise UserError(
                f"voice {str(voice)!r}: unknown name {voice.name!r}; "
                f"choose one of {', '.join(self.voices)}"
            )
        with _LOCK:
            ctypes.CDLL(None).srand(1)  # flite draws its excitation noise from the C library.
            pcm, sample_rate, times = self._run(text, voice)
        if len(times) != len(tokens):
            raise UserError(
                f"text {text!r}: flite reads {len(times)} words where {len(tokens)} are written; "
                "write it in its spoken form"
            )
        words = tuple(
            Word(token.text, round(start, 4), round(end, 4))
            for token, (start, end) in zip(tokens, times, strict=True)
        )
        return Utterance(pcm, sample_rate, words)

    def _run(
        self, text: str, voice: Voice
    ) -> tuple[npt.NDArray[np.float32], int, list[tuple[float, float]]]:
        """Samples, sample rate, and (start, end) in seconds of each token that is spoken."""
        library = self._library
        loaded, defaults = self._voice(voice.name)
        stretch = defaults[b"duration_stretch"]
        settings = {
            b"duration_stretch": stretch if voice.rate is None else (stretch or 1) / voice.rate,
            b"int_f0_target_mean": voice.pitch or defaults[b"int_f0_target_mean"],
            b"int_f0_target_stddev": defaults[b"int_f0_target_stddev"]
            if voice.range is None
            else voice.range,
        }
        features = loaded.contents.features
        for feature, value in settings.items():
            if value is None:  # This voice has a statistical model in place of the setting.
                library.feat_remove(features, feature)
            else:
                library.feat_set_float(features, feature, value)
        try:
            encoded = text.encode("ascii")
        except UnicodeEncodeError:
            raise UserError(
                f"text {text!r}: flite reads ASCII; write it in its spoken form"
            ) from None
        utterance = library.flite_synth_text(encoded, loaded)
        assert utterance, "flite_synth_text returned no utterance"
        try:
            wave = library.utt_wave(utterance).contents
            pcm = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).astype(np.float32)
            times = list(self._token_times(utterance))
            return pcm / np.float32(32768), int(wave.sample_rate), times
        finally:
            library.delete_utterance(utterance)

    def _token_times(self, utterance: int) -> Iterator[tuple[float, float]]:
        library = self._library
        item = library.relation_head(library.utt_relation(utterance, b"Token"))
        while item:
            # A token of punctuation alone has no words, and so no syllables.
            if library.ffeature_string(item, b"daughter1.name") not in (None, b"", b"0"):
                start = library.ffeature_float(
                    item, b"daughter1.R:SylStructure.daughter1.daughter1.R:Segment.p.end"
                )
                end = library.ffeature_float(
                    item, b"daughtern.R:SylStructure.daughtern.daughtern.R:Segment.end"
                )
                yield float(start), float(end)
            item = library.item_next(item)

    def _voice(self, name: str) -> tuple[Any, dict[bytes, float | None]]:
        """A registered voice, and the settings that it came with."""
        if name not in self._loaded:
            register = getattr(_flite_library(f"flite_cmu_us_{name}"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = ctypes.POINTER(_FliteVoice), [ctypes.c_char_p]
            loaded = register(None)
            features = loaded.contents.features
            defaults = {
                feature: float(self._library.feat_float(features, feature))
                if self._library.feat_present(features, feature)
                else None
                for feature in (b"duration_stretch", b"int_f0_target_mean", b"int_f0_target_stddev")
            }
            self._loaded[name] = loaded, defaults
        return self._loaded[name]


def _flite_library(name: str) -> ctypes.CDLL:
    path = ctypes.util.find_library(name)
    if path is None:
        raise UserError(
            f"speech engine 'flite' is not installed (no shared library {name!r}); "
            "run: apt install flite (Debian, Ubuntu), or dnf install flite (Fedora)"
        )
    # flite's libraries resolve each other's symbols, without naming each other as needed.
    return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


# --- The engines and voices of the project --------------------------------------------------------


@functools.cache
def _engine(name: str) -> Synthesizer:
    return Espeak() if name == "espeak" else Flite()


def get_engine(name: Literal["espeak", "flite"] | str) -> Synthesizer:
    """The process-wide engine of that name.

    Raises:
        UserError: unknown name, or the engine is not installed (the message says how to do it).
    """
    if name not in _LIMITS:
        raise UserError(f"unknown speech engine {name!r}; choose one of {', '.join(_LIMITS)}")
    return _engine(name)


def speak(text: str, voice: Voice) -> Utterance:
    """Speak ``text`` at 24 kHz, with word times; see ``Synthesizer`` for the errors raised."""
    utterance = get_engine(voice.engine).synthesize(text, voice)
    pcm = resample(utterance.pcm, utterance.sample_rate, SAMPLE_RATE)
    return Utterance(np.clip(pcm, -1, 1), SAMPLE_RATE, utterance.words)


ASSISTANT = Voice("flite", "rms")
"""The default assistant: of the voices at hand the one that the independent recognizer understands
best."""

_TRAIN_ACCENTS = ("en-us", "en", "en-us", "en-gb-x-rp", "en-us", "en-029", "en-us-nyc")
_TRAIN_VARIANTS = tuple(
    re.findall(
        r"\S+",
        """
        m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 klatt4 Alex Alicia Andrea Andy
        Annie adam anika antonio belinda benjamin boris caleb david ed edward Gene Henrique Hugo
        ian iven john Lee linda Marco Mario max Michael Mike norbert pablo paul pedro quincy rob
        robert sandro travis victor zac
        """,
    )
)


@functools.cache
def _train_voices() -> tuple[Voice, ...]:
    # Coprime strides walk accent, pitch and rate through all their combinations over the variants.
    espeak = [
        Voice(
            "espeak",
            f"{_TRAIN_ACCENTS[index % len(_TRAIN_ACCENTS)]}+{variant}",
            rate=(150, 175, 130, 190, 160, 205, 140, 180)[index % 8],
            pitch=(50, 38, 60, 45, 70, 55, 30, 65, 42)[index % 9],
            range=(50, 35, 65, 45, 80)[index % 5],
        )
        for index, variant in enumerate(_TRAIN_VARIANTS)
    ]
    flite = [
        Voice("flite", name, rate=rate, pitch=pitch)
        for name, pitches in (("slt", (None, 150, 190)), ("awb", (None, 105, 145)))
        for rate, pitch in zip((1.0, 0.85, 1.15), pitches, strict=True)
    ]
    return (*espeak, *flite)


_HELDOUT = (
    # Engine voices that are no variant of a trained one: flite's diphone synthesizer (another
    # synthesis method and speaker), and a family of espeak variants in an accent, none of which
    # is in the training list.
    "flite:kal16",
    "flite:kal16@rate=0.85,pitch=120",
    "flite:kal@rate=1.1",
    "espeak:en-gb-scotland+steph",
    "espeak:en-gb-scotland+steph3@rate=150",
    # Trained variants and accents, in pairs, pitches and rates that training never shows.
    "espeak:en-us+m6@rate=165,pitch=33",
    "espeak:en+m1@rate=145,pitch=58",
    "espeak:en-029+f2@rate=170,pitch=48",
    "espeak:en-us-nyc+f4@rate=155,pitch=62",
    "espeak:en-gb-x-rp+m7@rate=185,pitch=40",
    "espeak:en-us+Andy@rate=172,pitch=52",
    "espeak:en+Annie@rate=160,pitch=46",
    "flite:slt@rate=0.93,pitch=170",
    "flite:awb@rate=1.08,pitch=125",
)


def user_voices(
    split: Literal["train", "heldout"] | str, engines: tuple[str, ...] = ("espeak", "flite")
) -> list[Voice]:
    """The user's voices: for training, or kept from all training.

    Args:
        split: "train" or "heldout". The held-out ones include engine voices of which training has
            nothing: flite's diphone speaker, espeak-ng's steph family and its Scottish accent.
        engines: keep the voices of these engines only.

    Raises:
        UserError: unknown split or engine, or no voice left.
    """
    if split not in ("train", "heldout"):
        raise UserError(f"unknown voice split {split!r}; choose train or heldout")
    for engine in engines:
        if engine not in _LIMITS:
            raise UserError(f"unknown speech engine {engine!r}; choose one of {', '.join(_LIMITS)}")
    voices = _train_voices() if split == "train" else [Voice.parse(text) for text in _HELDOUT]
    kept = [voice for voice in voices if voice.engine in engines]
    if not kept:
        raise UserError("engines is empty; choose " + " or ".join(_LIMITS))
    return kept
