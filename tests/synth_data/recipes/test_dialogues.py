"""Conversations become shards: two channels of codes in step, the same bytes for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from audio_codec.errors import UserError
from audio_codec.state import State, all_active
from synth_data.build import BuildReport
from synth_data.dialogue import ASSISTANT, USER, DialogueConfig, Exchange
from synth_data.mixture import read_index
from synth_data.recipes import dialogues
from synth_data.recipes.dialogues import (
    DialoguesConfig,
    build_dialogues,
    encode_long,
    parse_dialogue,
)
from synth_data.shards import Sample, read, write
from synth_data.tts import sample_voices

pytest.importorskip("espeakng_loader", reason="speech engine espeak is not installed")


@dataclass
class LevelCodec:
    """Codebook 0 is the frame's level in 16 steps of 5 dB, codebook 1 counts frames."""

    sample_rate: int = SAMPLE_RATE
    frame_size: int = FRAME_SIZE
    delay: int = 0
    codebooks: tuple[tuple[int, ...], ...] = ((4, 4), (1024,))
    chunks: list[int] = field(default_factory=list)

    def to(self, device: str) -> LevelCodec:
        return self

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> CountState:
        return CountState(
            all_active(batch, torch.device("cpu")), torch.zeros(batch, dtype=torch.long)
        )

    def encode(self, pcm: Tensor, state: CountState) -> Tensor:
        frames = pcm.reshape(len(pcm), -1, FRAME_SIZE)
        level = 10 * torch.log10(frames.square().mean(2) + 1e-12)
        count = state.count[:, None] + torch.arange(frames.shape[1])
        state.count += frames.shape[1]
        self.chunks.append(frames.shape[1])
        return torch.stack([((level + 80) / 5).long().clamp(0, 15), count % 1024], dim=1)


@dataclass(slots=True)
class CountState(State):
    count: Tensor


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LevelCodec]:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "model.safetensors").write_bytes(b"weights")
    fake = LevelCodec()
    monkeypatch.setattr(dialogues, "load_codec", lambda name: fake)
    dialogues.cached_codec.cache_clear()
    yield fake
    dialogues.cached_codec.cache_clear()


def config(tmp_path: Path, folder: str = "out", **changes: object) -> DialoguesConfig:
    values = {
        "output": tmp_path / folder,
        "codec": str(tmp_path / "codec"),
        "hours": 2 * 24 / 3600,
        "dialogue": DialogueConfig(seconds=24, noise=0.0, echo=0.0, noise_burst=0.0),
        "sample_seconds": 16,
        "engines": ("espeak",),
        "assistant": "espeak:en-us+m3",
        "reverberation": 0.0,
        "telephone": 0.0,
        "shard_size": 1,
        "batch": 2,
    }
    return DialoguesConfig(**{**values, **changes})


def built(configuration: DialoguesConfig) -> tuple[BuildReport, list[Sample]]:
    report = build_dialogues(configuration)
    return report, list(read(configuration.output))


def test_samples_are_whole_and_aligned(codec: LevelCodec, tmp_path: Path) -> None:
    report, samples = built(config(tmp_path, keep_sound=True))
    assert report.written == 2 and report.samples == 4 and report.dropped == []
    assert [s.id for s in samples][:3] == ["d0-000000-00", "d0-000000-01", "d0-000001-00"]
    assert [s.seconds for s in samples] == [16, 8] * 2
    for sample in samples:
        assert sample.codes is not None and sample.pcm is not None
        frames = round(sample.seconds * FRAME_RATE)
        assert sample.codes.shape == (2, 2, frames)
        assert sample.pcm.shape == (2, frames * FRAME_SIZE)
        assert sample.voices[ASSISTANT] == "espeak:en-us+m3"
        assert sample.voices[USER] != sample.voices[ASSISTANT]
        # A codec that counts frames shows that parts continue each other.
        first = round(sample.meta["start"] * FRAME_RATE)
        assert sample.codes[:, 1].tolist() == [list(range(first, first + frames))] * 2
        # Codes, sound and words tell the same story.
        for channel in (ASSISTANT, USER):
            loud = sample.codes[channel, 0] > 6  # Above -50 dBFS.
            for word in sample.words[channel]:
                assert 0 <= word.start <= word.end <= sample.seconds
                if word.end - word.start > 0.2:
                    a, b = int(word.start * FRAME_RATE), int(np.ceil(word.end * FRAME_RATE))
                    assert loud[a:b].any(), (sample.id, word)
        assert {e.kind for e in sample.events} & {"turn_end", "answer", "silence", "pause"}
    assert max(codec.chunks) <= dialogues._ENCODED_SECONDS * FRAME_RATE


def test_voices_are_drawn_by_number(codec: LevelCodec, tmp_path: Path) -> None:
    changes = {"voices": 3, "jitter": False, "hours": 12 * 24 / 3600}
    _, samples = built(config(tmp_path, **changes))
    drawn = {str(voice) for voice in sample_voices(3, 0, ("espeak",))}
    assert {sample.voices[USER] for sample in samples} == drawn


def test_same_seed_same_bytes_and_resume(codec: LevelCodec, tmp_path: Path) -> None:
    one, two = config(tmp_path, "one"), config(tmp_path, "two")
    build_dialogues(one)
    build_dialogues(two)
    names = sorted(p.name for p in one.output.glob("*.tar"))
    assert len(names) == 2
    for name in names:
        assert (one.output / name).read_bytes() == (two.output / name).read_bytes()
    (two.output / names[1]).unlink()
    report = build_dialogues(two)
    assert (report.kept, report.written) == (1, 1)
    assert (one.output / names[1]).read_bytes() == (two.output / names[1]).read_bytes()
    other = config(tmp_path, "other", seed=1)
    build_dialogues(other)
    assert (one.output / names[0]).read_bytes() != (other.output / names[0]).read_bytes()


def test_shards_of_another_codec_are_refused(codec: LevelCodec, tmp_path: Path) -> None:
    build_dialogues(config(tmp_path))
    (tmp_path / "codec" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="another plan"):
        build_dialogues(config(tmp_path))


def test_noise_that_is_none_is_refused_before_the_work(codec: LevelCodec, tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    with pytest.raises(UserError, match="noise"):
        build_dialogues(config(tmp_path, noise=(folder,)))
    codes = Sample(id="a", text="", words=((),), voices=("x",), source="x", licence="x",
                   synthetic=True, human_text=False, seconds=0.08,
                   codes=np.zeros((1, 2, 1), np.uint16))  # fmt: skip
    write(folder / "noise-000000.tar", [codes])
    dialogues._noises.cache_clear()
    with pytest.raises(UserError, match="noise '.*': its shards hold no sound"):
        build_dialogues(config(tmp_path, noise=(folder,)))


def test_a_codec_of_other_frames_is_refused(codec: LevelCodec, tmp_path: Path) -> None:
    codec.frame_size = 320
    with pytest.raises(UserError, match="has 75 frames a second of 24000 Hz; codes in shards"):
        build_dialogues(config(tmp_path))


def test_the_microphone_hears_noise_and_echo(codec: LevelCodec, tmp_path: Path) -> None:
    noisy = DialogueConfig(seconds=24, noise=1.0, noise_snr_db=(10.0, 10.0), echo=0.0)
    echoing = DialogueConfig(
        seconds=24, noise=0.0, noise_burst=0.0, echo=1.0, echo_gain_db=(-10, -10), interruption=0.0
    )
    one: dict[str, object] = {"keep_sound": True, "hours": 24 / 3600}
    _, clean = built(config(tmp_path, "clean", **one))
    _, loud = built(config(tmp_path, "noisy", **one, dialogue=noisy))
    _, returned = built(config(tmp_path, "echo", **one, dialogue=echoing))

    def floor(samples: list[Sample]) -> float:
        """The fraction of the user's frames that are below -70 dBFS."""
        return float(np.mean(np.concatenate([s.codes[USER, 0] for s in samples]) <= 2))

    assert floor(clean) > 0.3
    assert floor(loud) == 0.0
    for sample in returned:
        echo = next(e for e in sample.events if e.kind == "echo")
        delay = round(echo.meta["delay"] * SAMPLE_RATE)
        assistant, user = sample.pcm
        for event in sample.events:
            if event.kind == "answer" and event.end < sample.seconds - 1 and event.end > 1:
                first = round(max(event.start, 0.0) * SAMPLE_RATE) + delay
                last = min(round(event.end * SAMPLE_RATE), len(user))
                heard = user[first:last].astype(float)
                source = assistant[first - delay : last - delay].astype(float)
                if not any(e.kind == "backchannel" for e in sample.events):
                    assert heard @ source / (source @ source) == pytest.approx(0.316, abs=0.03)


def test_encoding_in_pieces(codec: LevelCodec) -> None:
    pcm = np.random.default_rng(0).normal(size=(3, 250 * FRAME_SIZE)).astype(np.float32)
    codes = encode_long(codec, pcm)
    assert codes.shape == (3, 2, 250) and codes.dtype == np.uint16
    assert len(codec.chunks) > 1
    assert codes[:, 1].tolist() == [list(range(250))] * 3


def test_lengths_are_whole_frames(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample_seconds 0.1 is not a whole number"):
        config(tmp_path, sample_seconds=0.1)


# --- Written dialogues ----------------------------------------------------------------------------


LINES = [
    {"turns": [{"speaker": "Ann", "text": "Is it 3 miles?"}, {"speaker": "Bob", "text": "No."}]},
    {"messages": [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hi."}]},
    {"turns": ["One two three.", "Four."] * 40},
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Good lines, one nobody answers, and much that is no dialogue."""
    path = tmp_path / "talks.jsonl"
    bad = [b"", b"\x00\xff\xfe", b'{"turns": 3}', b"[" * 5000, b'{"x": "' + b"a" * 2**20 + b'"}']
    good = [json.dumps(line).encode() for line in LINES]
    path.write_bytes(b"\n".join([*good[:1], *bad, *good[1:]]))
    return path


def test_dialogues_of_a_file_are_spoken(codec: LevelCodec, tmp_path: Path, corpus: Path) -> None:
    source = {"path": corpus, "licence": "CC0"}
    plain = {"hours": None, "corpus": source, "keep_sound": True, "shard_size": 3}
    report, samples = built(config(tmp_path, **plain))
    # Two are spoken; of the five others each says why not. The empty line counts for nothing.
    assert [sample.meta["conversation"] for sample in samples] == [0, 6, 6]
    assert len(report.dropped) == 5
    reasons = [dropped.reason for dropped in report.dropped]
    assert all(f"dialogue {n} of talks.jsonl: " in r for n, r in enumerate(reasons, 1))
    assert "more than 1048576" in reasons[3] and "nobody answers" in reasons[4]
    first, long, _ = samples
    assert [w.text for w in first.words[USER]] == ["is", "it", "three", "miles"]
    assert [w.text for w in first.words[ASSISTANT]] == ["no"]
    assert (first.source, first.licence, first.human_text) == ("talks.jsonl", "CC0", True)
    # It ends when all is said, but for a second, in whole frames; the long one when time is up.
    end = max(word.end for words in first.words for word in words)
    assert end + 1 <= first.seconds < end + 1.1 and long.seconds == 16
    for sample in samples:
        assert sample.codes is not None and sample.pcm is not None
        assert sample.codes.shape[2] * FRAME_SIZE == sample.pcm.shape[1]
        assert sample.codes.shape[2] == round(sample.seconds * FRAME_RATE)
        assert all(0 <= e.start <= e.end <= sample.seconds for e in sample.events)
    index = read_index(tmp_path / "out")["dialogues"]
    assert index.summary.count("text", "human").samples == 3 and index.source is not None


def test_hours_ask_for_a_dialogue_again_in_other_voices(
    codec: LevelCodec, tmp_path: Path, corpus: Path
) -> None:
    corpus.write_text(json.dumps(LINES[0]))
    changes = {"corpus": {"path": corpus, "licence": "CC0"}, "hours": 3 * 24 / 3600}
    _, samples = built(config(tmp_path, **changes))
    assert len(samples) == 3 and len({sample.voices[USER] for sample in samples}) > 1
    assert len({tuple(w.text for w in sample.words[USER]) for sample in samples}) == 1
    corpus.write_text(json.dumps(LINES[2]))
    with pytest.raises(UserError, match="another plan"):
        build_dialogues(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"turns": ["Hello.", "..."]}, "two speakers"),
        ({"turns": [{"text": "Hello."}]}, "turn 0 has no speaker"),
        ({"turns": [{"speaker": name, "text": "Hello."} for name in "abc"]}, "found 3"),
        ([], "expected turns or messages"),
    ],
)
def test_what_is_no_dialogue_says_why(line: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_dialogue(line)


def test_turns_are_paired() -> None:
    said = [("system", "Be good."), ("assistant", "Hello."), ("user", "Is it"), ("user", "far - ?")]
    said += [("assistant", "No."), ("user", "Bye.")]
    turns = [{"role": role, "content": text} for role, text in said]
    assert parse_dialogue({"messages": turns}) == ("Hello.", [Exchange("Is it far?", "No.")])


def test_a_guard_is_heard_before_the_work(tmp_path: Path, corpus: Path) -> None:
    guard = {"guard": {"human_text": 0.3}}
    with pytest.raises(UserError, match=r"planned dialogues: human_text is 0.0%"):
        build_dialogues(config(tmp_path, **guard))
    for path, named in ((tmp_path / "no.jsonl", "cannot be read"), (corpus, "holds no dialogue")):
        corpus.write_text("\n \n")
        with pytest.raises(UserError, match=named):
            build_dialogues(config(tmp_path, corpus={"path": path, "licence": ""}))
    with pytest.raises(ValueError, match="hours is missing"):
        config(tmp_path, hours=None)


def test_the_room_and_the_telephone_are_labelled(codec: LevelCodec, tmp_path: Path) -> None:
    changes = {"reverberation": 1.0, "telephone": 1.0, "hours": 24 / 3600}
    _, (first, second) = built(config(tmp_path, **changes))
    for sample in (first, second):
        found = {e.kind: e for e in sample.events if e.kind in ("room", "telephone")}
        assert set(found) == {"room", "telephone"}
        assert all((e.start, e.end) == (0, sample.seconds) for e in found.values())
        assert 0.15 <= found["room"].meta["rt60"] <= 0.5


def test_a_missing_codec_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        build_dialogues(config(tmp_path, codec="nowhere"))
