"""Speech builds: planned once, resumed by shard, the same bytes whoever makes them."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from audio_codec.audio import SAMPLE_RATE, save
from audio_codec.errors import UserError
from synth_data.build import BuildReport
from synth_data.recipes.speech import SpeechConfig, build_speech, plan_speech
from synth_data.shards import read, shard_paths
from synth_data.text import normalize
from synth_data.tts import Voice, user_voices

espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs espeakng-loader"
)


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("Dr. Lee has 3 dogs.\nWhere are you?\nYes!\n?!\n" + "far " * 40 + "\n")
    return path


def config(tmp_path: Path, sentences: Path, **changes: Any) -> SpeechConfig:
    settings: dict[str, Any] = {
        "output": tmp_path / "out",
        "utterances": 10,
        "engines": ["espeak"],
        "assistant": "espeak:en-us+f5@rate=140",
        "assistant_share": 0.3,
        "shard_size": 4,
        "seed": 5,
        "sources": [
            {"kind": "text", "path": sentences, "licence": "CC0"},
            {"kind": "quiz", "pool": 20},
        ],
    }
    return SpeechConfig.model_validate({**settings, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard_paths(folder)}


# --- The plan -------------------------------------------------------------------------------------


@espeak
def test_the_plan_is_a_function_of_the_configuration(tmp_path: Path, sentences: Path) -> None:
    settings = config(tmp_path, sentences, utterances=400)
    plan = plan_speech(settings)
    assert plan == plan_speech(settings.model_copy(update={"workers": 7}))
    assert plan != plan_speech(settings.model_copy(update={"seed": 6}))
    assert len(plan) == len({line.id for line in plan}) == 400
    assert sum(line.voice == settings.assistant for line in plan) == pytest.approx(120, abs=30)
    assert sum(line.source == "quiz" for line in plan) == pytest.approx(200, abs=40)
    texts = {line.text for line in plan if line.source == "sentences.txt"}
    # Numbers are spelled out; what holds no word, or too many, is left out.
    assert texts == {"doctor Lee has three dogs.", "Where are you?", "Yes!"}
    names = {voice.name for voice in user_voices("train", ("espeak",))}
    assert {Voice.parse(line.voice).name for line in plan} <= names | {"en-us+f5"}


@espeak
def test_hours_become_utterances(tmp_path: Path, sentences: Path) -> None:
    short = plan_speech(config(tmp_path, sentences, hours=0.02, utterances=None))
    long = plan_speech(config(tmp_path, sentences, hours=0.04, utterances=None))
    assert len(long) == pytest.approx(2 * len(short), rel=0.15)
    report = build_speech(config(tmp_path, sentences, hours=0.02, utterances=None, shard_size=99))
    assert report.seconds == pytest.approx(72, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hours": 1}, "either hours or utterances"),
        ({"utterances": None}, "either hours or utterances"),
        ({"sources": [{"kind": "recorded", "data": ".", "sets": ["digits"]}]}, "digits"),
        ({"sources": [{"kind": "radio"}]}, "radio"),
        ({"speed": 2}, "speed"),
        ({"workers": 0}, "workers"),
    ],
)
def test_bad_configurations_are_refused(
    tmp_path: Path, sentences: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        config(tmp_path, sentences, **changes)


@espeak
def test_what_is_missing_shows_before_the_work(tmp_path: Path, sentences: Path) -> None:
    (tmp_path / "empty.txt").write_text("?!\n")
    for changes, named in (
        ({"voices": ["espeak:en-us+nobody"]}, "nobody"),
        ({"assistant": "festival:x"}, "festival"),
        ({"sources": [{"kind": "text", "path": tmp_path / "no.txt", "licence": ""}]}, "no.txt"),
        ({"sources": [{"kind": "text", "path": tmp_path / "empty.txt", "licence": ""}]}, "empty"),
        ({"sources": [{"kind": "recorded", "data": tmp_path, "sets": ["x"]}]}, "manifest"),
    ):
        with pytest.raises(UserError, match=named):
            build_speech(config(tmp_path, sentences, **changes))
    assert not (tmp_path / "out").exists()


# --- The build ------------------------------------------------------------------------------------


@espeak
def test_shards_hold_what_was_planned(tmp_path: Path, sentences: Path) -> None:
    settings = config(tmp_path, sentences)
    report = build_speech(settings)
    assert (report.samples, report.written, report.kept, report.dropped) == (10, 3, 0, [])
    assert report.speed > 1
    plan, samples = plan_speech(settings), list(read(settings.output))
    assert [sample.id for sample in samples] == [line.id for line in plan]
    for sample, line in zip(samples, plan, strict=True):
        assert sample.voices == (line.voice,) and sample.synthetic and sample.wer is None
        assert " ".join(word.text for word in sample.words[0]) == normalize(line.text)
        assert sample.pcm is not None
        assert sample.pcm.shape == (1, round(sample.seconds * SAMPLE_RATE))
        assert 0.02 < np.abs(sample.pcm).max() <= 1
        assert sample.licence == ("Apache-2.0" if sample.source == "quiz" else "CC0")


@espeak
def test_a_build_resumes_by_shard_and_refuses_another_plan(tmp_path: Path, sentences: Path) -> None:
    settings = config(tmp_path, sentences)
    build_speech(settings)
    first = contents(settings.output)
    (settings.output / "speech-000001.tar").unlink()
    report = build_speech(settings)
    assert (report.written, report.kept, report.samples) == (1, 2, 4)
    assert contents(settings.output) == first
    sentences.write_text("Another text.\n")
    for changed in (settings, settings.model_copy(update={"seed": 6})):
        with pytest.raises(UserError, match="another plan"):
            build_speech(changed)
    assert contents(settings.output) == first


@espeak
def test_two_workers_make_the_same_bytes_as_one(tmp_path: Path, sentences: Path) -> None:
    one = config(tmp_path, sentences, output=tmp_path / "one", utterances=6)
    two = config(tmp_path, sentences, output=tmp_path / "two", utterances=6, workers=2)
    assert build_speech(one).samples == build_speech(two).samples == 6
    assert contents(one.output) == contents(two.output)


@espeak
def test_verification_drops_what_is_not_understood(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf:
        """Hears one thing, whatever is said."""

        def transcribe(self, pcm: np.ndarray) -> str:
            return "where are you"

    monkeypatch.setattr("synth_data.verify.default_recognizer", Deaf)
    settings = config(
        tmp_path,
        sentences,
        utterances=20,
        sources=[{"kind": "text", "path": sentences, "licence": "CC0"}],
        verify={"drop_above": 0.5},
    )
    report = build_speech(settings)
    samples = list(read(settings.output))
    assert {(sample.text, sample.wer) for sample in samples} == {("Where are you?", 0.0)}
    assert len(samples) + len(report.dropped) == 20 and len(samples) == report.samples > 0
    assert all("word error rate" in dropped.reason for dropped in report.dropped)


# --- Recorded speech ------------------------------------------------------------------------------


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A data folder: a good file, a broken one, one too long, one of another split, a test set."""
    folder = tmp_path / "data"
    header = "split\tset\tid\tspeaker\tpath\tseconds\trate\tbytes\ttext\tlicence_source"
    rows = [
        ("train", "people", "a.1", "ann", "audio/a.wav", "0.5", "It's 5 \"o'clock"),
        ("train", "people", "b", "bob", "audio/broken.wav", "0.5", "hello"),
        ("train", "people", "c", "bob", "audio/a.wav", "90", "long"),
        ("validation", "people", "d", "bob", "audio/a.wav", "0.5", "later"),
        ("train", "digits", "e", "bob", "audio/a.wav", "0.5", "five"),
    ]
    folder.mkdir()
    lines = ["\t".join((*row[:6], "16000", "1", row[6], "CC0")) for row in rows]
    manifest = "\n".join([header, *lines, ""])
    (folder / "manifest.tsv.gz").write_bytes(gzip.compress(manifest.encode()))
    tone = np.sin(np.arange(8000) / 5).astype(np.float32) / 3
    save(folder / "audio" / "a.wav", tone, 16_000)
    (folder / "audio" / "broken.wav").write_bytes(b"RIFF")
    return folder


def test_recordings_enter_once_each(tmp_path: Path, recordings: Path) -> None:
    source = {"kind": "recorded", "data": recordings, "sets": ["people"]}
    settings = SpeechConfig.model_validate({"output": tmp_path / "out", "sources": [source]})
    report = build_speech(settings)
    (sample,) = read(settings.output)
    assert sample.id == "people-a_1" and sample.text == "It's five o'clock"
    assert sample.voices == ("people/ann",) and sample.words == ((),) and not sample.synthetic
    assert sample.pcm is not None and sample.pcm.shape == (1, 12_000)
    assert [dropped.id for dropped in report.dropped] == ["people-b"]


def test_the_guard_weighs_recordings_against_synthesis(
    tmp_path: Path, recordings: Path, sentences: Path
) -> None:
    sources = [
        {"kind": "recorded", "data": recordings, "sets": ["people"]},
        {"kind": "text", "path": sentences, "licence": "CC0", "human": False},
    ]

    def build(utterances: int, **guard: float) -> BuildReport:
        folder = tmp_path / f"out{utterances}"
        settings = {"sources": sources, "utterances": utterances, "output": folder}
        return build_speech(config(tmp_path, sentences, guard=guard, **settings))

    with pytest.raises(UserError, match=r"planned speech: recorded_speech is \d"):
        build(30, recorded_speech=0.2)
    assert not (tmp_path / "out30").exists()
    # Planned are two recordings and one utterance; one recording turns out to be broken.
    with pytest.raises(UserError, match=r"out1: human_text is 50.0%"):
        build(1, human_text=0.55)
    report = build(2, recorded_speech=0.1, human_text=0.1)
    assert report.summary.count("speech", "recorded").samples == 1
    assert report.summary.count("text", "human").words == 3
    assert report.summary.count("text", "made").samples == 2


@pytest.mark.parametrize("damage", ["cut", "no gzip", "no column"])
def test_a_broken_manifest_is_one_sentence(tmp_path: Path, recordings: Path, damage: str) -> None:
    path = recordings / "manifest.tsv.gz"
    stored = path.read_bytes()
    broken = {"cut": stored[:60], "no gzip": b"set", "no column": gzip.compress(b"set\tid\n")}
    path.write_bytes(broken[damage])
    source = {"kind": "recorded", "data": recordings, "sets": ["people"]}
    settings = SpeechConfig.model_validate({"output": tmp_path / "out", "sources": [source]})
    with pytest.raises(UserError, match=r"manifest .*(cannot be read|has no column 'split')"):
        build_speech(settings)


def test_an_unknown_split_names_the_choices(tmp_path: Path, recordings: Path) -> None:
    source = {"kind": "recorded", "data": recordings, "sets": ["people"], "splits": ["valid"]}
    settings = SpeechConfig.model_validate({"output": tmp_path / "out", "sources": [source]})
    with pytest.raises(UserError, match="unknown split 'valid'; choose from "):
        build_speech(settings)


def test_a_document_keeps_its_own_licence(tmp_path: Path, sentences: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [{"text": "One two.", "source": "book", "licence": "MIT"}, {"text": "Three four."}]
    (folder / "text-000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"sources": ({"kind": "text", "path": folder, "licence": "CC0-1.0"},)}
    plan = plan_speech(config(tmp_path, sentences, **changes))
    told = {(line.text, line.source, line.licence) for line in plan}
    assert told == {("One two.", "book", "MIT"), ("Three four.", "text", "CC0-1.0")}


def test_an_unknown_set_names_the_choices(tmp_path: Path, recordings: Path) -> None:
    source = {"kind": "recorded", "data": recordings, "sets": ["peeple"]}
    settings = SpeechConfig.model_validate({"output": tmp_path / "out", "sources": [source]})
    with pytest.raises(UserError, match="choose from people"):
        build_speech(settings)


@pytest.mark.data
def test_the_recorded_data_can_be_planned(tmp_path: Path, data_dir: Path) -> None:
    sets = ("librispeech", "librispeech_many", "arctic", "kathleen")
    source = {"kind": "recorded", "data": data_dir, "sets": sets}
    plan = plan_speech(SpeechConfig.model_validate({"output": tmp_path, "sources": [source]}))
    assert len(plan) == 2204 + 1585 + 863 + 244
    assert len({line.id for line in plan}) == len(plan)
    assert len({line.voice for line in plan}) > 250
    missing = [line for line in plan if line.recording is None or not line.recording.is_file()]
    assert not missing


# --- The recipes ----------------------------------------------------------------------------------


def test_the_speech_recipes_name_voices_that_exist(root: Path) -> None:
    folder = root / "configs" / "synth"
    recipes = [path for path in sorted(folder.glob("*.yaml")) if path.name.startswith("speech")]
    assert recipes
    for recipe in recipes:
        settings = SpeechConfig.model_validate(OmegaConf.to_container(OmegaConf.load(recipe)))
        named = settings.voices if isinstance(settings.voices, tuple) else ()
        for name in (*named, settings.assistant):
            assert str(Voice.parse(name)) == name, recipe
    # The reduced recipe needs nothing but espeak-ng's wheel.
    tiny = OmegaConf.load(folder / "speech_tiny.yaml")
    assert all(voice.startswith("espeak:") for voice in (*tiny.voices, tiny.assistant))
