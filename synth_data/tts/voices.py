"""Who speaks: voices as text, the lists of the project, thousands of timbres drawn at random.

A voice is written ``engine:name@rate=…,pitch=…,range=…``, for example ``espeak:en-us+m3@rate=170``,
``flite:rms`` or ``piper:voices/en_US-lessac.onnx``. No held-out voice is one of training, but most
are a trained speaker in another accent, rate or pitch: ``new_speakers`` says which are not.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from audio_codec.errors import UserError


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

    Those that are programs have a rate too, a speed (0.5..2), and:

    ======= =============================== =========================================
    setting festival                        pico, rhvoice
    ======= =============================== =========================================
    name    ked_diphone                     en-US, en-GB; alan, bdl, clb, slt
    pitch   mean F0 in Hz (50..400)         F0, 1 = the voice's own (0.5..2)
    range   standard deviation (0..100 Hz)
    ======= =============================== =========================================

    The neural engines have a rate alone, a speed (0.5..2), and these names:

    ============ ===========================================================================
    piper        a model with its speaker: ``voices/en_US-libritts.onnx#12``
    transformers a checkpoint with its speaker: ``models/vits#3``
    http         an address, fields of the request, and the server's name of the voice:
                 ``http://localhost:8000/v1/audio/speech?model=kokoro#af_sky``
    ============ ===========================================================================
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
        if self.engine not in LIMITS:
            raise UserError(
                f"voice {str(self)!r}: unknown engine {self.engine!r}; "
                f"choose one of {', '.join(LIMITS)}"
            )
        limits = LIMITS[self.engine]
        for setting in ("rate", "pitch", "range"):
            value = getattr(self, setting)
            if value is not None and setting not in limits:
                raise UserError(
                    f"voice {str(self)!r}: engine {self.engine!r} has no setting {setting!r}; "
                    f"choose {' or '.join(limits)}"
                )
            low, high = limits.get(setting, (0, 0))
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

    @property
    def speaker(self) -> tuple[str, str]:
        """Who speaks, whatever the accent, rate and pitch: engine, and its voice or variant."""
        accent, _, variant = self.name.partition("+")
        return self.engine, variant or accent

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
            value = NEUTRAL[self.engine].get(setting) if own is None else own
            factor = 1 + width * rng.uniform(-1, 1)  # Drawn always: one voice takes three draws.
            if value is not None:  # Else only the engine knows: a flite voice's own F0.
                low, high = LIMITS[self.engine][setting]
                value = float(f"{min(max(value * factor, low), high):.4g}")
            drawn[setting] = value
        return Voice(self.engine, self.name, drawn["rate"], drawn["pitch"], drawn["range"])


LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "espeak": {"rate": (80, 450), "pitch": (0, 99), "range": (0, 99)},
    "flite": {"rate": (0.5, 2), "pitch": (50, 400), "range": (0, 100)},
    "festival": {"rate": (0.5, 2), "pitch": (50, 400), "range": (0, 100)},
    "pico": {"rate": (0.5, 2), "pitch": (0.5, 2)},
    "rhvoice": {"rate": (0.5, 2), "pitch": (0.5, 2)},
    "piper": {"rate": (0.5, 2)},
    "transformers": {"rate": (0.5, 2)},
    "http": {"rate": (0.5, 2)},
}
NEUTRAL: dict[str, dict[str, float]] = {
    "espeak": {"rate": 175, "pitch": 50, "range": 50},
    "flite": {"rate": 1},
    "festival": {"rate": 1},
    "pico": {"rate": 1, "pitch": 1},
    "rhvoice": {"rate": 1, "pitch": 1},
    "piper": {"rate": 1},
    "transformers": {"rate": 1},
    "http": {"rate": 1},
}


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


# Speakers of the wide split, with their own pitch in their engine's unit. Four are new; alan is the
# speaker of flite's awb, slt of flite's slt, bdl one of the recorded people: new as voices alone.
_WIDE = (
    ("festival", "ked_diphone", 105.0),
    ("pico", "en-US", 1.0),
    ("pico", "en-GB", 1.0),
    ("rhvoice", "alan", 1.0),
    ("rhvoice", "bdl", 1.0),
    ("rhvoice", "clb", 1.0),
    ("rhvoice", "slt", 1.0),
)


@functools.cache
def _wide_voices() -> tuple[Voice, ...]:
    # As many of each, so that all speakers are heard equally often.
    settings = ((1, 1), (0.85, 1.08), (1.15, 0.94), (0.93, 0.86), (1.08, 1.16), (1.22, 1.04))
    return tuple(
        Voice(engine, name, rate=rate, pitch=float(f"{own * factor:.4g}"))
        for engine, name, own in _WIDE
        for rate, factor in settings
    )


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
    split: Literal["train", "wide", "heldout"] | str, engines: tuple[str, ...] = ("espeak", "flite")
) -> list[Voice]:
    """The user's voices: for training, or kept from all training.

    Args:
        split: "train"; "wide", which adds to these the speakers of festival, pico and rhvoice, each
            at six rates and pitches; or "heldout". The held-out ones include engine voices of which
            training has
            nothing: flite's diphone speaker, espeak-ng's steph family and its Scottish accent.
        engines: keep the voices of these engines only.

    Raises:
        UserError: unknown split or engine, or no voice left.
    """
    if split not in ("train", "wide", "heldout"):
        raise UserError(f"unknown voice split {split!r}; choose train, wide or heldout")
    for engine in engines:
        if engine not in LIMITS:
            raise UserError(f"unknown speech engine {engine!r}; choose one of {', '.join(LIMITS)}")
    voices = {
        "train": _train_voices(),
        "wide": (*_train_voices(), *_wide_voices()),
        "heldout": tuple(Voice.parse(text) for text in _HELDOUT),
    }[split]
    kept = [voice for voice in voices if voice.engine in engines]
    if not kept:
        raise UserError(
            f"engines {list(engines)} have no {split} voices of their own; choose espeak or flite, "
            "or name voices"
        )
    return kept


def new_speakers(voices: Sequence[Voice]) -> list[Voice]:
    """Those of `voices` that are no variant, accent, pitch or rate of a trained voice."""
    trained = {voice.speaker for voice in (*user_voices("train"), ASSISTANT)}
    return [voice for voice in voices if voice.speaker not in trained]


def sample_voices(
    count: int,
    seed: int = 0,
    engines: tuple[str, ...] = ("espeak", "flite"),
    models: Sequence[str] = (),
) -> list[Voice]:
    """Draw ``count`` different timbres for training, none of them a held-out one.

    A base is drawn from all at once: espeak-ng's accents times variants, flite's two speakers, the
    speakers of ``models``. Then come pitch, range and rate, uniform where the engine has them.
    Timbre by timbre the same list whatever ``count`` is.

    Args:
        count: thousands are no problem: espeak-ng alone has some 250 bases, and each pitch of a
            base is another throat.
        seed: same seed, same voices.
        engines: of espeak and flite, those to draw from.
        models: voices of other engines, with one speaker or a range of them:
            ``piper:voices/libritts.onnx#0..903``.

    Raises:
        UserError: an engine has no bases, a model is no voice, or ``count`` is out of reach.
    """
    spans = _timbre_spans(engines) + [
        (voice, {"rate": (0.85, 1.15)}) for text in models for voice in _speakers(text)
    ]
    if not spans:
        raise UserError("engines and models are empty; name one of either")
    held = {voice.speaker for voice in new_speakers(user_voices("heldout"))}
    for voice in (voice for text in models for voice in _speakers(text)):
        if voice.speaker in held:
            raise UserError(f"models: {str(voice)!r} is a held-out speaker; leave it out")
    rng = np.random.default_rng(seed)
    drawn: dict[Voice, None] = {}
    for _ in range(20 * count):
        if len(drawn) == count:
            break
        base, settings = spans[int(rng.integers(len(spans)))]
        values: dict[str, Any] = {
            name: float(f"{rng.uniform(low, high):.3g}") for name, (low, high) in settings.items()
        }
        drawn[replace(base, **values)] = None
    if len(drawn) < count:
        raise UserError(f"count is {count}, but only {len(drawn)} voices differ; name more models")
    return list(drawn)


def _timbre_spans(
    engines: tuple[str, ...],
) -> list[tuple[Voice, dict[str, tuple[float, float]]]]:
    """Bases with the ranges of their settings."""
    heldout = {voice.name for voice in user_voices("heldout") if voice.engine == "espeak"}
    bases: dict[str, list[tuple[Voice, dict[str, tuple[float, float]]]]] = {
        "espeak": [
            (Voice("espeak", name), {"rate": (130, 210), "pitch": (20, 80), "range": (25, 85)})
            for accent in dict.fromkeys(_TRAIN_ACCENTS)
            for variant in _TRAIN_VARIANTS
            if (name := f"{accent}+{variant}") not in heldout
        ],
        "flite": [
            (Voice("flite", name), {"rate": (0.85, 1.15), "pitch": pitch, "range": (5, 40)})
            for name, pitch in (("slt", (140.0, 220.0)), ("awb", (90.0, 150.0)))
        ],
    }
    for engine in engines:
        if engine not in bases:
            raise UserError(
                f"engine {engine!r} has no voices to draw from; choose one of {', '.join(bases)}, "
                "or name its voices as models"
            )
    return [base for engine in dict.fromkeys(engines) for base in bases[engine]]


def _speakers(text: str) -> list[Voice]:
    """A voice, or of ``…#0..903`` all of them."""
    span = re.fullmatch(r"(.+#)(\d+)\.\.(\d+)", text)
    if span is None:
        return [Voice.parse(text)]
    if not (found := [f"{span[1]}{n}" for n in range(int(span[2]), int(span[3]) + 1)]):
        raise UserError(f"models: {text!r} counts down; write the smaller number first")
    return [Voice.parse(name) for name in found]
