"""Samples and sets as a person sees them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE
from audio_codec.errors import UserError
from synth_data import view
from synth_data.mixture import Summary
from synth_data.shards import Event, Sample, write
from synth_data.tts import Word


def make(number: int = 0, **changes: object) -> Sample:
    rng = np.random.default_rng(number)
    fields: dict[str, object] = {
        "id": f"s{number}",
        "text": "",
        "words": (
            (Word("four", 1.0, 1.3),),
            (Word("two", 0.1, 0.3), Word("plus", 0.3, 0.5), Word("ah", 1.4, 1.6)),
        ),
        "voices": ("flite:rms", "espeak:en-us+m3@rate=170"),
        "source": "quiz",
        "licence": "CC0",
        "synthetic": True,
        "seconds": 1.6,
        "events": (
            Event(kind="turn_end", channel=1, start=0.5, end=0.5, meta={"answer": "four"}),
            Event(kind="answer", channel=0, start=1.0, end=1.3),
        ),
        "codes": rng.integers(0, 9, (2, 3, 20)).astype(np.uint16),
    }
    return Sample.model_validate({**fields, **changes})


@dataclass
class LevelCodec:
    """The first codebook is the level of a frame, the others say nothing; a sample late."""

    sample_rate: int = SAMPLE_RATE
    frame_size: int = FRAME_SIZE
    delay: int = 1
    codebooks: tuple[tuple[int, ...], ...] = ((9,), (3, 3), (9,))

    def decode(self, codes: Tensor) -> Tensor:
        late = (codes[:, :1] / 10).repeat_interleave(FRAME_SIZE, dim=2).roll(1, dims=2)
        late[..., 0] = -1
        return late


def test_a_sample_is_found_by_its_key(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [make(0), make(1)])
    write(tmp_path / "b.tar", [make(2)])
    assert view.find(tmp_path).id == "s0" and view.find(tmp_path, "s2").id == "s2"
    with pytest.raises(UserError, match="sample 's9' is not among the 3 in .* such as 's0'"):
        view.find(tmp_path, "s9")
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"no sample in .*b.tar' \(1 could not be read\)"):
        view.find(tmp_path / "b.tar")


def styles(sample: Sample) -> list[tuple[str, str]]:
    """Pieces of the description with their styles."""
    text = view.describe(sample)
    return [(text.plain[span.start : span.end].strip(), str(span.style)) for span in text.spans]


def test_speakers_have_their_colours() -> None:
    coloured = [piece for piece in styles(make()) if piece[1] in ("cyan", "green")]
    assert coloured == [
        ("■ assistant", "cyan"),
        ("■ user", "green"),
        # In order of time; a long pause begins a new line.
        ("two plus", "green"),
        ("four", "cyan"),
        ("ah", "green"),
    ]
    plain = view.describe(make()).plain
    assert "synthetic, words not of people" in plain and "codes 2 × 3 × 20" in plain
    assert "turn_end (answer: four)" in plain


def test_an_interleaved_document_shows_its_modalities() -> None:
    segments = [
        {"modality": "text", "text": "the quick", "utterance": 0, "first": 0, "last": 0},
        {"modality": "speech", "text": "brown fox", "utterance": 0, "first": 0, "last": 12},
    ]
    sample = make(
        words=((),), voices=("text-to-token",), codes=None, meta={"segments": segments}, events=()
    )
    assert "the quick [brown fox]·12" in view.describe(sample).plain
    assert ("[brown fox]", "bold cyan") in styles(sample)


def test_a_document_of_which_nothing_is_spoken_is_shown_too(tmp_path: Path) -> None:
    silent = np.zeros((1, 1, 0), np.uint16)
    sample = make(words=((),), voices=("text-to-token",), codes=silent, events=(), seconds=0.0)
    pcm = view.sound(sample, LevelCodec)  # type: ignore[arg-type]
    assert pcm.shape == (1, 0)
    view.draw(sample, pcm, tmp_path / "a.png")
    view.save_sound(tmp_path / "a.wav", pcm)
    assert imread(tmp_path / "a.png").size and soundfile.info(tmp_path / "a.wav").frames == 0


def test_a_text_without_times_is_shown_all_the_same() -> None:
    known = make(words=((), ()), text="two plus two", events=())
    assert "two plus two" in view.describe(known).plain
    unknown = make(words=((), ()), events=(), synthetic=False, human_text=True, wer=0.25)
    plain = view.describe(unknown).plain
    assert "nothing is known" in plain
    assert "recorded, words of people" in plain and "word error rate 0.25" in plain


def test_codes_become_sound_in_step() -> None:
    sample = make()
    assert sample.codes is not None
    pcm = view.sound(sample, LevelCodec)  # type: ignore[arg-type]
    levels = pcm.reshape(2, 20, FRAME_SIZE)
    assert pcm.dtype == np.float32
    assert np.allclose(levels[:, :, :-1], sample.codes[:, 0, :, None] / 10)
    first = make(codes=sample.codes[:, :1])  # The semantic codebook alone.
    assert np.array_equal(view.sound(first, LevelCodec), pcm)  # type: ignore[arg-type]


def test_sound_that_is_there_needs_no_codec() -> None:
    pcm = np.zeros((2, 4800), np.float32)

    def load() -> None:
        raise AssertionError("no codec is needed")

    assert view.sound(make(pcm=pcm), load) is not None  # type: ignore[arg-type]
    with pytest.raises(UserError, match="neither sound nor codes"):
        view.sound(make(codes=None), load)  # type: ignore[arg-type]


@pytest.mark.parametrize("codes", [np.full((2, 4, 9), 1), np.full((2, 3, 9), 9)])
def test_codes_of_another_codec_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(UserError, match="name the model that made them with --model"):
        view.sound(make(codes=codes.astype(np.uint16)), LevelCodec)  # type: ignore[arg-type]


def test_semantic_codes_are_spoken_by_a_decoder() -> None:
    def decode(codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes / np.float32(10), FRAME_SIZE).astype(np.float32)

    codes = np.array([[[1, 5]]], np.uint16)
    pair = make(codes=codes, words=((),), voices=("text-to-token",), events=())
    spoken = view.speech(pair, decode)
    assert spoken.shape == (1, 2 * FRAME_SIZE)
    assert spoken[0, ::FRAME_SIZE].tolist() == pytest.approx([0.1, 0.5])
    silent = make(codes=codes[:, :, :0], words=((),), voices=("text-to-token",), events=())
    assert view.speech(silent, decode).shape == (1, 0)
    with pytest.raises(UserError, match="has 3 codebooks"):
        view.speech(make(), decode)


def test_the_picture_of_an_interleaved_document_shows_its_text(tmp_path: Path) -> None:
    segments = [
        {"modality": "text", "text": "quick", "utterance": 0, "first": 0, "last": 0},
        {"modality": "speech", "text": "brown fox", "utterance": 0, "first": 0, "last": 9},
    ]
    layout = {"words": ((),), "voices": ("text-to-token",), "events": ()}
    pictures = []
    for number, shown in enumerate((segments, segments[1:])):
        document = make(codes=np.ones((1, 1, 9), np.uint16), meta={"segments": shown}, **layout)
        view.draw(document, None, tmp_path / f"{number}.png")
        pictures.append(imread(tmp_path / f"{number}.png"))
    # Text, and only text, is drawn above the speech of the first row.
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()


def test_the_sound_is_written_with_its_channels(tmp_path: Path) -> None:
    pcm = np.stack([np.full(2400, 0.25), np.full(2400, -0.5)]).astype(np.float32)
    view.save_sound(tmp_path / "deep" / "a.wav", pcm)
    stored, rate = soundfile.read(tmp_path / "deep" / "a.wav", dtype="float32")
    assert rate == SAMPLE_RATE and np.abs(stored.T - pcm).max() < 2**-14


def test_the_picture_shows_sound_events_and_codes(tmp_path: Path) -> None:
    pcm = np.sin(np.arange(2 * 38_400) / 9).reshape(2, -1).astype(np.float32)
    sizes = []
    for number, (sample, sound) in enumerate(
        [
            (make(), pcm),
            (make(), None),
            (make(events=()), None),
            (make(events=(), codes=None), None),
        ]
    ):
        path = tmp_path / f"{number}.png"
        view.draw(sample, sound, path)
        sizes.append(imread(path).shape)
    with_sound, without = imread(tmp_path / "0.png"), imread(tmp_path / "1.png")
    assert with_sound.shape == without.shape and not np.array_equal(with_sound, without)
    heights = [shape[0] for shape in sizes]
    assert heights[1] > heights[2] > heights[3]  # A row fewer each.
    assert sizes[0][1] >= 790


def test_numbers_of_sets(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [make(0), make(1, synthetic=False, human_text=True, seconds=4.8)])
    write(tmp_path / "b.tar", [make(2)])
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:2000])
    summary, figures = view.measure([tmp_path / "a.tar", tmp_path / "b.tar"])
    values = {name: figure.value for name, figure in figures.items()}
    assert values["samples"] == 2 and values["skipped"] == 1 and values["words"] == 8
    assert values["hours"] == pytest.approx(6.4 / 3600) and values["tokens"] == 240
    assert values["recorded_speech"] == pytest.approx(0.75) and values["human_text"] == 0.5
    assert values["unigram_entropy"] == pytest.approx(2.0)
    assert figures["token_entropy"].n == 80 and 2.5 < values["token_entropy"] < 3.17
    _, figures = view.measure([tmp_path / "a.tar"], tmp_path / "a.tar")
    assert figures["source_token_entropy"] == figures["token_entropy"]
    drawn = io.StringIO()
    Console(file=drawn, width=120).print(view.table(summary))
    assert "flite:rms" in drawn.getvalue() and "recorded" in drawn.getvalue()


def test_a_table_of_a_thousand_voices_stays_a_table() -> None:
    voices = [make(n, voices=("flite:rms", f"espeak:v{n}")) for n in range(30)]
    drawn = view.table(Summary.of(voices))
    assert drawn.row_count < 30
    assert "… and 19 more" in list(drawn.columns[1].cells)
