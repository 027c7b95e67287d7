"""A speech server's HTTP endpoint, in the form that most of them share.

    POST http://host:8000/v1/audio/speech
    {"input": text, "voice": "af_sky", "speed": 1.0, "response_format": "wav", "model": "kokoro"}

``model``, and whatever else a server wants, are the query of the voice's address. The key of a
server that asks for one is taken from the variable ``SPEECHLM_TTS_KEY``. Word times are estimated;
the same bytes for the same arguments are the server's promise, not ours.
"""

import http.client
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import soundfile

from audio_codec.errors import UserError
from synth_data.tts.speech import (
    EngineFailure,
    Utterance,
    model_and_speaker,
    sixteen_bit,
    spread,
    tokens_of,
)
from synth_data.tts.voices import Voice

# A guard with a shorter limit (``engines.Isolated``) comes first.
_SECONDS = 120.0


class Endpoint:
    """Voices ``http:ADDRESS?FIELD=VALUE#VOICE``."""

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; EngineFailure when the server is away, busy or out of order."""
        assert voice.engine == "http", voice
        tokens = tokens_of(text)
        address, name = model_and_speaker(voice)
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"voice {str(voice)!r}: the address must begin with http:// or https://, as in "
                "'http:http://localhost:8000/v1/audio/speech#voice'"
            )
        body = {"input": text, "voice": name, "response_format": "wav", "speed": voice.rate or 1.0}
        body |= dict(urllib.parse.parse_qsl(parts.query))
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("SPEECHLM_TTS_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            parts._replace(query="").geturl(), json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                sound = response.read()
        except urllib.error.HTTPError as error:
            error.close()
            # 408 and 429 ask for patience; the other 4xx say that the request is wrong.
            lasting = 400 <= error.code < 500 and error.code not in (408, 429)
            kind = UserError if lasting else EngineFailure
            raise kind(f"voice {str(voice)!r}: the server answered {error}") from error
        except http.client.InvalidURL as error:
            raise UserError(f"voice {str(voice)!r} is no address: {error}") from error
        # urllib's own errors, time-outs and resets; answers that are cut short or not HTTP.
        except (OSError, http.client.HTTPException) as error:
            raise EngineFailure(f"voice {str(voice)!r}: no answer: {error}") from error
        try:
            pcm, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise EngineFailure(f"voice {str(voice)!r}: the answer is no sound: {error}") from error
        mono = sixteen_bit(np.asarray(pcm, np.float32).mean(axis=1))
        if not len(mono):
            raise UserError(f"text {text!r} holds nothing that voice {str(voice)!r} can speak")
        return Utterance(mono, int(rate), spread(tokens, mono, int(rate)), estimated=True)

    def version(self, voice: Voice) -> str:
        """Nothing: a server does not say. Its address is part of the voice."""
        return ""
