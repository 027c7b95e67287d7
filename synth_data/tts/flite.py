"""CMU Flite through its C libraries, with the segment times of its utterance structure.

60 to 85 seconds of speech a second on one core of a cloud VM for the clustergen voices (rms, slt,
awb), 500 or more for the diphone voices (kal, kal16), resampling included.
"""

import ctypes
import ctypes.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audio_codec.errors import UserError
from synth_data.tts.speech import C_LIBRARY, Utterance, Word, tokens_of
from synth_data.tts.voices import Voice


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
        tokens = tokens_of(text)
        if voice.name not in self.voices:
            raise UserError(
                f"voice {str(voice)!r}: unknown name {voice.name!r}; "
                f"choose one of {', '.join(self.voices)}"
            )
        with C_LIBRARY:
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

    def version(self, voice: Voice) -> str:
        """The name of the library's file, which ends in its version."""
        # dlopen finds a name that no path is known of; the map of this process tells.
        maps = Path("/proc/self/maps")
        if maps.exists():
            for line in maps.read_text().splitlines():
                name = Path(line.rpartition(" ")[2]).name
                if name.startswith("libflite.so"):
                    return name
        return str(ctypes.util.find_library("flite"))

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
