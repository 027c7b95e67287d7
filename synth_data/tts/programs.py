"""Speech engines that are programs: Festival, SVOX Pico and RHVoice, a process an utterance.

    text ─▶ program ─▶ said.wav (and, of Festival, the times of the words)

What a process says cannot depend on what another said before, and none of these programs takes
longer than 0.1 s to start. On one core of a busy cloud VM they make 50 (Festival), 180 (Pico) and
20 (RHVoice) seconds of speech a second, in sentences of two seconds, their starts included.

Who may train what ships: Festival's ked_diphone (University of Edinburgh, as free as BSD), Pico's
two (SVOX AG, Apache-2.0), RHVoice's alan, bdl, clb and slt (O. Yakovleva, LGPL-2.1-or-later). Not
so RHVoice's evgeniy-eng and lyubov (CC BY-NC-ND), nor the voices of Festival that read by
festlex-oald (non-commercial). kal_diphone is the speaker of flite's kal, whom no training hears.
"""

import abc
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import soundfile

from audio_codec.errors import UserError
from synth_data.text import Token
from synth_data.tts.speech import EngineFailure, Utterance, Word, spread, tokens_of
from synth_data.tts.voices import Voice

# A guard with a shorter limit (``engines.Isolated``) comes first.
_SECONDS = 60.0

# Characters that mean something to one of the programs; none is part of a word.
_PLAIN = str.maketrans(dict.fromkeys('<>"\\\0', " "))

_PANGRAM = "The five boxing wizards jump quickly."


class Program(abc.ABC):
    """Synthesizes by running ``program``, which writes ``said.wav`` where it runs."""

    engine: ClassVar[str]
    program: ClassVar[str]
    install: ClassVar[str]
    """The command that installs it."""

    def __init__(self) -> None:
        """Find the program and its voices.

        Raises:
            UserError: it is not installed.
        """
        path = shutil.which(self.program)
        if path is None:
            raise UserError(
                f"speech engine {self.engine!r} is not installed (no program {self.program!r} on "
                f"the path); run: {self.install}"
            )
        self.path = Path(path)
        self.voices = self._voices()
        self._version = functools.cache(self._pangram)

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; the voice's own sample rate."""
        assert voice.engine == self.engine, voice
        tokens = tokens_of(text)
        if voice.name not in self.voices:
            raise UserError(
                f"voice {str(voice)!r}: unknown name {voice.name!r}; choose one of "
                f"{', '.join(self.voices)} (these are installed; see also: {self.install})"
            )
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            printed = self._run(self._arguments(text.translate(_PLAIN), voice, folder), folder)
            try:
                pcm, rate = soundfile.read(folder / "said.wav", dtype="float32")
            except soundfile.LibsndfileError as error:
                raise EngineFailure(
                    f"voice {str(voice)!r}: no sound from {self.program} of {text[:80]!r}: {error}"
                ) from error
        if not len(pcm):
            raise UserError(f"text {text!r} holds nothing that voice {str(voice)!r} can speak")
        words = self._words(tokens, printed)
        return Utterance(pcm, int(rate), words or spread(tokens, pcm, int(rate)), words is None)

    def version(self, voice: Voice) -> str:
        """A hash of how the voice says a pangram: no program tells the version of its voices."""
        return self._version(voice.name)

    @abc.abstractmethod
    def _voices(self) -> tuple[str, ...]:
        """Names of the English voices that are installed."""

    @abc.abstractmethod
    def _arguments(self, text: str, voice: Voice, folder: Path) -> list[str]:
        """Of the program, which runs in ``folder`` and finds there what this leaves."""

    def _words(self, tokens: Sequence[Token], printed: str) -> tuple[Word, ...] | None:
        """Words by the times that the program printed; None when it tells none."""
        return None

    def _pangram(self, name: str) -> str:
        said = self.synthesize(_PANGRAM, Voice(self.engine, name))
        return hashlib.sha256(said.pcm.tobytes()).hexdigest()[:16]

    def _run(self, arguments: Sequence[str], folder: Path) -> str:
        """What the program prints; EngineFailure when it fails or hangs."""
        try:
            done = subprocess.run(
                [self.path, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineFailure(f"{self.program} took longer than {_SECONDS:g} s") from error
        except subprocess.CalledProcessError as error:
            told = error.stderr.decode(errors="replace").strip()
            raise EngineFailure(
                f"{self.program} ended with {error.returncode}: {told or 'it does not say why'}"
            ) from error
        return done.stdout.decode(errors="replace")


class Festival(Program):
    """Diphone voices of Festival 2, with the segment times of its utterance structure."""

    engine = "festival"
    program = "festival"
    install = "apt install festival festvox-kdlpc16k (Debian, Ubuntu)"

    # Its own heap of ten million cells takes longer to clear than a sentence to speak.
    _BATCH = ("--heap", "1000000", "-b")

    # The diphones are made quieter before they are joined: Festival's 16 bits wrap around where
    # their sum is too loud, which is heard as clicks. Then come the start and end of every segment,
    # a line a token; the items that a token is made of are listed beside it, with empty lines.
    _SCRIPT = """\
(voice_{name})
{settings}
(define concatenate us_unit_concat)
(define (us_unit_concat utterance)
  (mapcar
    (lambda (unit)
      (item.set_feat unit "sig" (wave.rescale (wave.copy (item.feat unit "sig")) 0.5)))
    (utt.relation.items utterance 'Unit))
  (concatenate utterance))
(set! said (SynthText "{text}"))
(utt.save.wave said "said.wav" 'riff)
(define (tell segment)
  (format t "%f %f " (item.feat segment "segment_start") (item.feat segment "end")))
(define (syllables word) (item.daughters (item.relation word 'SylStructure)))
(mapcar
  (lambda (token)
    (mapcar
      (lambda (word)
        (mapcar (lambda (syllable) (mapcar tell (item.daughters syllable))) (syllables word)))
      (item.daughters token))
    (format t "\\n"))
  (utt.relation.items said 'Token))
"""

    def _voices(self) -> tuple[str, ...]:
        with tempfile.TemporaryDirectory() as folder:
            listed = self._run([*self._BATCH, "(print (voice.list))"], Path(folder))
        # Its statistical voices know none of the settings below.
        return tuple(sorted(re.findall(r"\w+_diphone", listed)))

    def _arguments(self, text: str, voice: Voice, folder: Path) -> list[str]:
        if not text.isascii():
            raise UserError(f"text {text!r}: festival reads ASCII; write it in its spoken form")
        settings = ""
        if voice.rate is not None:
            stretch = f"(/ (Parameter.get 'Duration_Stretch) {voice.rate:g})"
            settings += f"(Parameter.set 'Duration_Stretch {stretch})\n"
        for value, name in ((voice.pitch, "mean"), (voice.range, "std")):
            if value is not None:
                settings += f"(set-cdr! (assoc 'target_f0_{name} int_lr_params) '({value:g}))\n"
        script = self._SCRIPT.format(name=voice.name, settings=settings, text=text)
        (folder / "said.scm").write_text(script)
        return [*self._BATCH, "said.scm"]

    def _words(self, tokens: Sequence[Token], printed: str) -> tuple[Word, ...] | None:
        times = [line.split() for line in printed.splitlines() if line.strip()]
        if len(times) != len(tokens):  # It splits the text where ``tokenize`` does not.
            return None
        return tuple(
            Word(token.text, round(float(segments[0]), 4), round(float(segments[-1]), 4))
            for token, segments in zip(tokens, times, strict=True)
        )


class Pico(Program):
    """SVOX Pico, one woman for American and one for British English, 16,000 Hz."""

    engine = "pico"
    program = "pico2wave"
    install = "apt install libttspico-utils (Debian with non-free, Ubuntu with multiverse)"

    def _voices(self) -> tuple[str, ...]:
        return ("en-US", "en-GB")

    def _arguments(self, text: str, voice: Voice, folder: Path) -> list[str]:
        for value, name in ((voice.rate, "speed"), (voice.pitch, "pitch")):
            if value is not None:
                text = f'<{name} level="{round(100 * value)}">{text}</{name}>'
        return ["-l", voice.name, "-w", "said.wav", "--", text]


class RHVoice(Program):
    """English voices of RHVoice: statistical models of recorded people, 24,000 Hz."""

    engine = "rhvoice"
    program = "RHVoice-test"
    install = "apt install rhvoice rhvoice-english (Debian with non-free)"

    def _voices(self) -> tuple[str, ...]:
        # The program cannot list them, and takes any other for one that it does not know.
        folder = self.path.resolve().parent.parent / "share" / "RHVoice" / "voices"
        return tuple(
            sorted(
                info.parent.name
                for info in folder.glob("*/voice.info")
                if "language=English" in info.read_text().splitlines()
            )
        )

    def _arguments(self, text: str, voice: Voice, folder: Path) -> list[str]:
        (folder / "said.txt").write_text(text)
        arguments = ["-p", voice.name, "-i", "said.txt", "-o", "said.wav"]
        for value, option in ((voice.rate, "-r"), (voice.pitch, "-t")):
            if value is not None:
                arguments += [option, str(round(100 * value))]
        return arguments
