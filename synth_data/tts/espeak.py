"""espeak-ng through its C library, with the word times of its own events.

350 to 700 seconds of speech a second on one core of a cloud VM, resampling included.
"""

import _ctypes
import ctypes
import importlib.metadata
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audio_codec.errors import UserError
from synth_data.text import Token
from synth_data.tts.speech import C_LIBRARY, Utterance, Word, audible, tokens_of
from synth_data.tts.voices import NEUTRAL, Voice


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
        self._c_library = ctypes.CDLL(None)
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
        tokens = tokens_of(text)
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
        with C_LIBRARY:
            samples, events = self._run(text, voice)
        if not samples:
            raise UserError(f"text {text!r} holds nothing that voice {str(voice)!r} can speak")
        pcm = np.concatenate(samples).astype(np.float32) / np.float32(32768)
        words = _words_from_events(tokens, events, pcm, self.sample_rate)
        return Utterance(pcm, self.sample_rate, words)

    def version(self, voice: Voice) -> str:
        """Of the wheel that the library is in."""
        return importlib.metadata.version("espeakng-loader")

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
            # The breath of the variants of kind "klatt 6" is the C library's own rand(), which
            # outlives the engine.
            self._c_library.srand(ctypes.c_uint(1))
            library.espeak_SetSynthCallback(callback)
            status = library.espeak_SetVoiceByName(voice.name.encode())
            assert status == 0, f"espeak_SetVoiceByName({voice.name!r}) returned {status}"
            library.espeak_SetParameter(_VOLUME, _ESPEAK_VOLUME, 0)
            for parameter, setting in ((_RATE, "rate"), (_PITCH, "pitch"), (_RANGE, "range")):
                value = getattr(voice, setting)
                neutral = NEUTRAL["espeak"][setting]
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
    heads, sound = sorted(starts), audible(pcm)
    words: list[Word] = []
    for head, following in itertools.zip_longest(heads, heads[1:]):
        group = tokens[head:following]
        begin = starts[head]
        limit = starts[following] if following is not None else len(pcm) / sample_rate
        # A head that shares its start with the next (the patched first token) gets no time.
        end = max(begin, _end_of_sound(sound, sample_rate, begin, max(begin, limit)))
        total = sum(len(token.text) for token in group)
        edges = itertools.accumulate((len(token.text) / total for token in group), initial=0.0)
        times = [begin + edge * (end - begin) for edge in edges]
        words += [
            Word(token.text, round(a, 4), round(b, 4))
            for token, (a, b) in zip(group, itertools.pairwise(times), strict=True)
        ]
    return tuple(words)


def _end_of_sound(sound: npt.NDArray[np.intp], sample_rate: int, start: float, end: float) -> float:
    """The last time within ``start..end`` (seconds) that is no pause, by ``audible``'s samples."""
    first, last = np.searchsorted(sound, (round(start * sample_rate), round(end * sample_rate)))
    return (int(sound[last - 1]) + 1) / sample_rate if last > first else end
