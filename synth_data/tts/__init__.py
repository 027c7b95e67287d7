"""Text to speech with word times: any of eight engines behind one protocol.

    >>> speak("two plus three is five", Voice.parse("flite:rms")).words[0].text
    'two'

Each utterance is a pure function of ``(text, voice)``, whatever was synthesized before it, so a
shard of speech has the same bytes however many workers made it. ``voices.py`` says who can speak,
``speech.py`` what comes back, ``engines.py`` how one is asked; then one file an engine, and
``programs.py`` for those that are run.
"""

from synth_data.tts.engines import (
    Cached,
    InProcess,
    Isolated,
    SynthesisConfig,
    get_engine,
    get_synthesizer,
    speak,
)
from synth_data.tts.espeak import Espeak
from synth_data.tts.flite import Flite
from synth_data.tts.speech import EngineFailure, Synthesizer, Utterance, Word
from synth_data.tts.voices import ASSISTANT, Voice, new_speakers, sample_voices, user_voices

__all__ = [
    "ASSISTANT",
    "Cached",
    "EngineFailure",
    "Espeak",
    "Flite",
    "InProcess",
    "Isolated",
    "SynthesisConfig",
    "Synthesizer",
    "Utterance",
    "Voice",
    "Word",
    "get_engine",
    "get_synthesizer",
    "new_speakers",
    "sample_voices",
    "speak",
    "user_voices",
]
