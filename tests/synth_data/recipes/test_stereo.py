"""Recordings in moshi-finetune's layout become samples, encoded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CODEC, small_codec
from typer.testing import CliRunner

from audio_codec import checkpoint
from audio_codec.errors import UserError
from speechlm.cli import app
from synth_data.dialogue import ASSISTANT, UNTRANSCRIBED, USER
from synth_data.recipes import dialogues, stereo
from synth_data.recipes.stereo import StereoConfig, build_stereo, read_words
from synth_data.shards import read
from synth_data.tts import Word

RATE = 16_000
ALIGNMENTS = [
    ["Four.", [1.0, 1.5], "SPEAKER_MAIN"],
    ["$5?", [0.2, 0.6], "SPEAKER_OTHER"],
    ["--", [0.7, 0.8], "SPEAKER_OTHER"],
]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two talks of 1.6 s; the assistant hums low, the user high."""
    (tmp_path / "talks").mkdir()
    at = np.arange(round(1.6 * RATE)) / RATE
    lines = []
    for name in ("a", "b"):
        pcm = np.stack([0.1 * np.sin(440 * at), 0.1 * np.sin(4400 * at)], axis=1)
        soundfile.write(tmp_path / "talks" / f"{name}.wav", pcm, RATE)
        (tmp_path / "talks" / f"{name}.json").write_text(json.dumps({"alignments": ALIGNMENTS}))
        lines.append(json.dumps({"path": f"talks/{name}.wav", "duration": 1.6}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    checkpoint.save(tmp_path / "codec", CODEC, small_codec().state_dict(), dtype="fp32")
    dialogues.cached_codec.cache_clear()
    return tmp_path / "train.jsonl"


def config(manifest: Path, **changes: Any) -> StereoConfig:
    folder = manifest.parent
    return StereoConfig.model_validate(
        {
            "manifest": manifest,
            "output": folder / "out",
            "codec": str(folder / "codec"),
            "licence": "test",
            **changes,
        }
    )


def test_left_is_the_assistant(manifest: Path) -> None:
    report = build_stereo(config(manifest))
    assert report.samples == 2 and not report.dropped
    first, second = read(manifest.parent / "out")
    assert first.codes is not None and first.codes.shape == (2, 3, 20)
    assert first.seconds == 1.6 and first.licence == "test" and not first.synthetic
    assert first.words[ASSISTANT] == (Word("four", 1.0, 1.5),)
    assert first.words[USER] == (Word("five", 0.2, 0.4), Word("dollars", 0.4, 0.6))
    pcm = stereo.load_stereo(manifest.parent / "talks" / "a.wav")
    alone = dialogues.encode_long(small_codec(), pcm)
    assert (first.codes == alone).all() and (second.codes == alone).all()
    turned = dialogues.encode_long(small_codec(), np.ascontiguousarray(pcm[::-1]))
    assert (first.codes == turned[::-1]).all() and (first.codes != turned).any()


def test_codes_are_made_once(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_stereo(config(manifest, shard_size=1))
    monkeypatch.setattr(stereo, "encode_long", None)  # may not be called again
    again = build_stereo(config(manifest, shard_size=1))
    assert again.kept == 2 and again.written == 0
    # Other words are another data set.
    (manifest.parent / "talks" / "a.json").write_text(json.dumps({"alignments": []}))
    with pytest.raises(UserError, match="another plan"):
        build_stereo(config(manifest, shard_size=1))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.json", b'{"alignments": [["x", [2, 1], "S"]]}', "entry 0"),
        ("a.json", b'{"alignments": [["x", 1]]}', "entry 0"),
        ("a.json", b"{}", "must hold a list"),
        ("a.json", None, "cannot be read as JSON"),
        ("a.wav", b"noise", "cannot be read"),
        ("a.wav", None, "cannot be read"),
    ],
)
def test_a_broken_recording_is_dropped_and_named(
    manifest: Path, file: str, content: bytes | None, said: str
) -> None:
    path = manifest.parent / "talks" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    report = build_stereo(config(manifest))
    assert report.samples == 1 and report.dropped[0].id == "r000000-a"
    assert said in report.dropped[0].reason


def test_one_channel_is_not_two(manifest: Path) -> None:
    soundfile.write(manifest.parent / "talks" / "a.wav", np.zeros(RATE), RATE)
    assert "1 channels; expected 2" in build_stereo(config(manifest)).dropped[0].reason


def test_what_people_said_counts_as_theirs(manifest: Path) -> None:
    asked = {"guard": {"recorded_speech": 1.0, "human_text": 1.0}}
    summary = build_stereo(config(manifest, **asked)).summary
    assert summary.count("speech", "recorded").samples == 2
    assert summary.count("text", "human") == summary.total
    with pytest.raises(UserError, match=r"the recordings: recorded_speech is 0.0%"):
        build_stereo(config(manifest, synthetic=True, output=manifest.parent / "b", **asked))


@pytest.mark.parametrize("line", ["[]", "{}", "talks/a.wav"])
def test_a_broken_manifest_is_named(manifest: Path, line: str) -> None:
    manifest.write_text(line)
    with pytest.raises(UserError, match="line 1: expected an object with 'path'"):
        build_stereo(config(manifest))
    manifest.write_text("\n")
    with pytest.raises(UserError, match="names no recording"):
        build_stereo(config(manifest))


spoken = st.lists(
    st.tuples(
        st.sampled_from(["hello", "3", "Don't", "$12.50", "…"]),
        st.floats(0, 100),
        st.floats(0, 2),
        st.booleans(),
    ),
    max_size=8,
)


@given(entries=spoken)
@settings(max_examples=40)
def test_words_keep_their_speaker_order_and_time(
    entries: list[tuple[str, float, float, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    listed = [
        [text, [start, start + length], "SPEAKER_MAIN" if main else "SPEAKER_02"]
        for text, start, length, main in entries
    ]
    path = tmp_path_factory.mktemp("words") / "a.json"
    path.write_text(json.dumps({"alignments": listed}))
    words = read_words(path)
    forms = {"hello": 1, "3": 1, "Don't": 1, "$12.50": 5, "…": 0}
    for channel, main in ((ASSISTANT, True), (USER, False)):
        mine = [entry for entry in entries if entry[3] == main]
        assert len(words[channel]) == sum(forms[text] for text, *_ in mine)
        starts = [word.start for word in words[channel]]
        assert starts == sorted(starts)
        for word in words[channel]:
            assert any(s - 1e-6 <= word.start <= word.end <= s + n + 1e-6 for _, s, n, _ in mine)


def test_a_channel_that_nobody_wrote_down_is_marked(manifest: Path) -> None:
    for path in (manifest.parent / "talks").glob("*.json"):
        listed = json.loads(path.read_text())["alignments"]
        listed = [entry for entry in listed if entry[2] == "SPEAKER_MAIN"]
        path.write_text(json.dumps({"alignments": listed}))
    build_stereo(config(manifest))
    samples = list(read(config(manifest).output))
    assert samples and all(sample.words[ASSISTANT] for sample in samples)
    assert all(sample.meta[UNTRANSCRIBED] == [USER] for sample in samples)


def test_the_command_writes_shards(manifest: Path, root: Path) -> None:
    folder = manifest.parent
    done = CliRunner().invoke(
        app,
        [
            "synth",
            "stereo",
            str(root / "configs" / "synth" / "stereo.yaml"),
            f"manifest={manifest}",
            f"output={folder / 'out'}",
            f"codec={folder / 'codec'}",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "2 samples" in done.output and len(list(read(folder / "out"))) == 2
