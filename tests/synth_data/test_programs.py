"""Engines that are programs: stand-ins show how they are asked; those installed are heard."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from audio_codec.errors import UserError
from synth_data.text import normalize
from synth_data.tts import EngineFailure, Utterance, Voice, get_engine, programs, user_voices
from synth_data.tts.programs import Festival, Pico, Program, RHVoice

TEXT = "One two, three."


# --- Stand-ins ------------------------------------------------------------------------------------

# Notes how it is run and says a second of a tone, but for what the file "mode" beside it orders.
STAND_IN = """#!{python}
import json, pathlib, sys, time, wave

here, mode = pathlib.Path(sys.argv[0]).parent, ""
if (here / "mode").exists():
    mode = (here / "mode").read_text()
if "(print (voice.list))" in sys.argv:
    print("(kal_diphone cmu_us_slt_arctic_hts ked_diphone)")
    sys.exit()
left = {{path.name: path.read_text() for path in pathlib.Path().iterdir()}}
with (here / "asked").open("a") as asked:
    asked.write(json.dumps([sys.argv[1:], left]) + "\\n")
if mode == "hang":
    time.sleep(60)
if mode == "fail":
    sys.exit("no such thing")
if mode != "mute":
    with wave.open("said.wav", "wb") as said:
        said.setparams((1, 2, 8000, 0, "NONE", ""))
        said.writeframes(bytes([0, 20 + len(mode), 0, 236 - len(mode)] * 4000) * (mode != "empty"))
if "said.scm" in sys.argv:
    print("0.1 0.15 0.15 0.2 \\n\\n0.2 0.4 \\n0.5 0.9 \\n" if mode != "odd" else "0.1 0.9 ")
"""


class StandIns:
    """What was asked of the programs in ``folder``; ``order`` makes them misbehave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def order(self, mode: str) -> None:
        (self.folder / "mode").write_text(mode)

    def asked(self) -> list[tuple[list[str], dict[str, str]]]:
        lines = (self.folder / "asked").read_text().splitlines()
        return [(arguments, left) for arguments, left in map(json.loads, lines)]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("festival", "pico2wave", "RHVoice-test"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(0o755)
    for name, language in (("clb", "English"), ("slt", "English"), ("anna", "Russian")):
        voice = tmp_path / "share" / "RHVoice" / "voices" / name
        voice.mkdir(parents=True)
        (voice / "voice.info").write_text(f"name={name.title()}\nlanguage={language}\n")
    monkeypatch.setenv("PATH", str(folder))
    return StandIns(folder)


def said(engine: Program, voice: str, text: str = TEXT) -> Utterance:
    return engine.synthesize(text, Voice.parse(voice))


def test_pico_is_asked_by_its_markup(stand_ins: StandIns) -> None:
    made = said(Pico(), "pico:en-GB@rate=1.2,pitch=0.9", "One <two>, three.")
    said(Pico(), "pico:en-US")
    (marked, _), (plain, _) = stand_ins.asked()
    text = '<pitch level="90"><speed level="120">One  two , three.</speed></pitch>'
    assert marked == ["-l", "en-GB", "-w", "said.wav", "--", text]
    assert plain == ["-l", "en-US", "-w", "said.wav", "--", TEXT]
    assert made.estimated and made.sample_rate == 8000 and made.seconds == 1
    assert [word.text for word in made.words] == ["one", "two", "three"]


def test_rhvoice_is_asked_by_its_options(stand_ins: StandIns) -> None:
    assert said(RHVoice(), "rhvoice:clb@rate=0.9,pitch=1.25").estimated
    ((arguments, left),) = stand_ins.asked()
    assert arguments == ["-p", "clb", "-i", "said.txt", "-o", "said.wav", "-r", "90", "-t", "125"]
    assert left == {"said.txt": TEXT}


def test_festival_is_asked_by_a_script_and_tells_the_times(stand_ins: StandIns) -> None:
    made = said(Festival(), "festival:ked_diphone@rate=1.2,pitch=120,range=12", 'One "two", three.')
    ((arguments, left),) = stand_ins.asked()
    assert arguments[-2:] == ["-b", "said.scm"]
    asked = left["said.scm"].splitlines()
    for line in (
        "(voice_ked_diphone)",
        "(Parameter.set 'Duration_Stretch (/ (Parameter.get 'Duration_Stretch) 1.2))",
        "(set-cdr! (assoc 'target_f0_mean int_lr_params) '(120))",
        "(set-cdr! (assoc 'target_f0_std int_lr_params) '(12))",
        '(set! said (SynthText "One  two , three."))',
    ):
        assert line in asked
    times = [(word.text, word.start, word.end) for word in made.words]
    assert times == [("one", 0.1, 0.2), ("two", 0.2, 0.4), ("three", 0.5, 0.9)]
    assert not made.estimated
    stand_ins.order("odd")  # Read as one word: nobody knows when the others are said.
    guessed = said(Festival(), "festival:ked_diphone")
    assert guessed.estimated and len(guessed.words) == 3
    with pytest.raises(UserError, match="spoken form"):
        said(Festival(), "festival:ked_diphone", "café")


@pytest.mark.parametrize(
    ("mode", "named", "passing"),
    [
        ("fail", "ended with 1: no such thing", True),
        ("mute", "no sound", True),
        ("hang", "longer than 1 s", True),
        ("empty", "nothing that voice", False),
    ],
)
def test_a_program_that_fails(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, mode: str, named: str, passing: bool
) -> None:
    monkeypatch.setattr(programs, "_SECONDS", 1.0)
    engine = Pico()
    stand_ins.order(mode)
    with pytest.raises(UserError, match=named) as raised:
        said(engine, "pico:en-GB")
    assert isinstance(raised.value, EngineFailure) == passing


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        (Festival, "kal_diphone, ked_diphone"),
        (Pico, "en-US, en-GB"),
        (RHVoice, "clb, slt"),
    ],
)
def test_unknown_voices_name_the_choices(
    stand_ins: StandIns, kind: type[Program], choices: str
) -> None:
    with pytest.raises(UserError, match=f"choose one of {choices} .*apt install"):
        said(kind(), f"{kind.engine}:anna")
    with pytest.raises(UserError, match="no word"):
        said(kind(), f"{kind.engine}:anna", "?!")


@pytest.mark.parametrize("kind", [Festival, Pico, RHVoice])
def test_a_missing_program_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Program]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"{kind.engine}.*not installed.*run: apt install"):
        kind()


def test_a_version_is_of_the_voice_as_it_sounds(stand_ins: StandIns) -> None:
    engine = Pico()
    before = engine.version(Voice("pico", "en-GB"))
    assert (
        engine.version(Voice("pico", "en-GB", rate=1.2))
        == before
        == Pico().version(Voice("pico", "en-GB"))
    )
    stand_ins.order("other")
    assert engine.version(Voice("pico", "en-GB")) == before  # Asked once a process.
    assert Pico().version(Voice("pico", "en-GB")) != before


# --- The programs themselves ----------------------------------------------------------------------


def installed(kind: type[Program]) -> Sequence[pytest.MarkDecorator]:
    return [pytest.mark.skipif(shutil.which(kind.program) is None, reason=f"needs {kind.program}")]


ENGINES = {kind.engine: kind for kind in (Festival, Pico, RHVoice)}
WIDE = dict.fromkeys((v.engine, v.name) for v in user_voices("wide", tuple(ENGINES)))
VOICES = [
    pytest.param(Voice(engine, name), marks=installed(ENGINES[engine]), id=f"{engine}:{name}")
    for engine, name in WIDE
]


def _spoken(voice: Voice, text: str) -> Utterance:
    return get_engine(voice.engine).synthesize(text, voice)


def _fundamental(made: Utterance) -> float:
    """F0 in Hz: the median, over voiced frames of 40 ms, of the autocorrelation's peak."""
    size = made.sample_rate // 25
    shortest, longest = made.sample_rate // 400, made.sample_rate // 60
    found = []
    for start in range(0, len(made.pcm) - size, size // 2):
        frame = made.pcm[start : start + size] * np.hanning(size)
        correlation = np.fft.irfft(np.abs(np.fft.rfft(frame, 4 * size)) ** 2)
        lag = shortest + int(correlation[shortest:longest].argmax())
        if np.abs(frame).max() > 0.05 and correlation[lag] > 0.5 * correlation[0]:
            found.append(made.sample_rate / lag)
    return float(np.median(found))


@pytest.mark.parametrize("voice", VOICES)
def test_a_voice_speaks_at_its_rate_and_pitch(voice: Voice) -> None:
    text = "We were away a year ago; it's Lee's dog."
    made = _spoken(voice, text)
    assert [word.text for word in made.words] == normalize(text).split()
    assert all(0 <= word.start < word.end <= made.seconds for word in made.words)
    assert 0.1 < np.abs(made.pcm).max() < 0.99 and 1.5 < made.seconds < 5
    np.testing.assert_array_equal(made.pcm, _spoken(voice, text).pcm)
    own = 105.0 if voice.engine == "festival" else 1.0
    moved = _spoken(Voice(voice.engine, voice.name, rate=0.8, pitch=1.25 * own), text)
    assert moved.words[-1].end - moved.words[0].start == pytest.approx(
        1.25 * (made.words[-1].end - made.words[0].start), rel=0.1
    )
    assert _fundamental(moved) == pytest.approx(1.25 * _fundamental(made), rel=0.15)


@pytest.mark.parametrize("voice", VOICES[:1])
def test_festival_times_lie_where_the_sound_is(voice: Voice) -> None:
    made = _spoken(voice, "Seven of the best dogs, don't you think? Well: goodbye!")
    assert not made.estimated
    by_text = {word.text: word for word in made.words}
    for before, after in (("dogs", "don't"), ("think", "well")):
        pause = slice(
            *(int(t * made.sample_rate) for t in (by_text[before].end, by_text[after].start))
        )
        assert pause.stop - pause.start > 0.06 * made.sample_rate
        word = slice(
            *(int(t * made.sample_rate) for t in (by_text[after].start, by_text[after].end))
        )
        quiet, loud = (np.square(made.pcm[part]).mean() for part in (pause, word))
        assert loud > 10 * quiet
