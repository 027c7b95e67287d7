"""Any text-to-speech model of ``transformers``, from a directory or the hub.

The library's own pipeline knows how each kind of model is asked. Models that draw noise draw it
from a seed made of the text, the checkpoint's content and the speaker: an utterance depends neither
on what was said before nor on the folder the checkpoint lies in, and another rate changes the tempo
alone. They tell no word times: those are estimated.
"""

import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio_codec.errors import UserError
from synth_data.tts.speech import (
    Utterance,
    model_and_speaker,
    sixteen_bit,
    speaker_number,
    spread,
    state_of,
    tokens_of,
)
from synth_data.tts.voices import Voice


class Transformers:
    """Voices ``transformers:CHECKPOINT``, or ``…#SPEAKER`` of a model with several."""

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; the model's own sample rate, rounded to 16 bits."""
        assert voice.engine == "transformers", voice
        tokens = tokens_of(text)
        speak = _pipeline(model_and_speaker(voice)[0])
        speakers = int(getattr(speak.model.config, "num_speakers", 1) or 1)
        number = speaker_number(voice, speakers)
        if hasattr(speak.model, "speaking_rate"):
            speak.model.speaking_rate = speak.model.config.speaking_rate * (voice.rate or 1.0)
        elif voice.rate is not None:
            raise UserError(f"voice {str(voice)!r}: this model has no rate; leave it out")
        options = {"speaker_id": number} if speakers > 1 else {}
        drawn = f"{_weights(voice)}#{number}\n{text}"
        seed = hashlib.sha256(drawn.encode()).digest()[:8]
        with torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(seed, "little") >> 1)
            made = speak(text, forward_params=options)
        pcm = np.asarray(made["audio"], np.float32)
        pcm = sixteen_bit(pcm.mean(axis=0) if pcm.ndim == 2 else pcm.reshape(-1))
        if not len(pcm):
            raise UserError(f"text {text!r} holds nothing that voice {str(voice)!r} can speak")
        rate = int(made["sampling_rate"])
        return Utterance(pcm, rate, spread(tokens, pcm, rate), estimated=True)

    def version(self, voice: Voice) -> str:
        """Of the libraries, and a hash of the checkpoint where it lies on this disk."""
        libraries = f"{importlib.metadata.version('transformers')} {torch.__version__}"
        return f"{libraries} {_weights(voice)}"


def _weights(voice: Voice) -> str:
    path = Path(model_and_speaker(voice)[0])
    return _hash(path) if path.is_dir() else str(path)


_hash = functools.cache(state_of)


@functools.lru_cache(maxsize=2)
def _pipeline(model: str) -> Any:
    import transformers

    pipeline: Any = transformers.pipeline  # An overload for every task there is.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return pipeline("text-to-speech", model=model, device=device)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"voice 'transformers:{model}': no text-to-speech checkpoint can be loaded: {first}"
        ) from error
