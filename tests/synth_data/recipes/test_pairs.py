"""Pairs: the codes are those of the sound, the sound is gone, the bytes are those of the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from small import TOKENIZER, small_codec

from audio_codec import checkpoint
from audio_codec.codec import load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig
from synth_data.recipes.pairs import PairsConfig, build_pairs, tokenize
from synth_data.recipes.speech import SpeechConfig, build_speech
from synth_data.shards import read

pytest.importorskip("espeakng_loader", reason="speech engine espeak is not installed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return checkpoint.save(folder, TOKENIZER, SpeechTokenizer(TOKENIZER).state_dict(), dtype="fp32")


def speech(output: Path, **changes: object) -> dict[str, object]:
    layout = {
        "output": output,
        "utterances": 7,
        "engines": ("espeak",),
        "sources": [{"kind": "quiz", "pool": 20}],
        "shard_size": 4,
        "seed": 3,
    }
    return {**layout, **changes}


def test_pairs_are_the_speech_of_the_same_recipe(tokenizer: Path, tmp_path: Path) -> None:
    report = build_pairs(
        PairsConfig.model_validate(speech(tmp_path / "pairs", tokenizer=str(tokenizer), batch=3))
    )
    build_speech(SpeechConfig.model_validate(speech(tmp_path / "speech")))
    pairs, spoken = list(read(tmp_path / "pairs")), list(read(tmp_path / "speech"))
    assert report.samples == len(pairs) == len(spoken) == 7 and report.written == 2
    model = load_tokenizer_of(tokenizer)
    for pair, sound in zip(pairs, spoken, strict=True):
        assert (pair.id, pair.text, pair.words, pair.voices) == (
            sound.id, sound.text, sound.words, sound.voices,
        )  # fmt: skip
        assert pair.pcm is None and pair.codes is not None and sound.pcm is not None
        frames = pair.codes.shape[2]
        assert pair.codes.shape == (1, 1, frames) and 0 <= frames * 0.08 - pair.seconds < 0.08
        # The stored sound is rounded to 16 bits: near a border a code may differ.
        again = tokenize(model, [sound.pcm[0]])[0]
        assert (again == pair.codes[0, 0]).mean() > 0.9
        assert pair.meta["tokenizer"] == str(tokenizer)
        assert pair.coded_by == model.fingerprint()


def test_an_interrupted_build_goes_on_to_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    def built(name: str) -> PairsConfig:
        config = PairsConfig.model_validate(speech(tmp_path / name, tokenizer=str(tokenizer)))
        build_pairs(config)
        return config

    built("one")
    config = built("two")
    shards = sorted((tmp_path / "one").glob("*.tar"))
    assert len(shards) == 2
    (tmp_path / "two" / shards[1].name).unlink()
    report = build_pairs(config)
    assert (report.kept, report.written) == (1, 1)
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    with pytest.raises(UserError, match="another plan"):
        build_pairs(config.model_copy(update={"seed": 4}))


def test_recordings_need_a_text(tokenizer: Path, tmp_path: Path) -> None:
    import gzip

    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        soundfile.write(data / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 9000), 24_000)
    rows = [
        "split\tset\tid\tspeaker\tpath\tseconds\trate\tbytes\ttext\tlicence_source",
        "train\tsome\ta\tann\ta.wav\t0.375\t24000\t1\tOne, two.\tCC0",
        "train\tsome\tb\tann\tb.wav\t0.375\t24000\t1\t\tCC0",
    ]
    with gzip.open(data / "manifest.tsv.gz", "wt") as file:
        file.write("\n".join(rows) + "\n")
    config = PairsConfig.model_validate(
        {
            "output": tmp_path / "pairs",
            "tokenizer": str(tokenizer),
            "sources": [{"kind": "recorded", "data": data, "sets": ["some"]}],
        }
    )
    report = build_pairs(config)
    (pair,) = read(config.output)
    assert pair.text == "One, two." and not pair.synthetic and pair.codes is not None
    assert pair.codes.shape == (1, 1, 5) and pair.words == ((),)
    assert [dropped.reason for dropped in report.dropped] == ["nobody knows what is said in it"]


def test_what_is_missing_shows_before_the_work(tokenizer: Path, tmp_path: Path) -> None:
    for changes, named in (
        ({"voices": ["espeak:en-us+nobody"]}, "nobody"),
        ({"tokenizer": str(tmp_path)}, "config.json"),
        ({"guard": {"human_text": 0.5}}, "planned pairs: human_text is 0.0%"),
    ):
        layout = speech(tmp_path / "out", tokenizer=str(tokenizer))
        with pytest.raises(UserError, match=named):
            build_pairs(PairsConfig.model_validate({**layout, **changes}))
    assert not (tmp_path / "out").exists()


def test_what_the_tokenizer_cannot_read_is_dropped(tokenizer: Path, tmp_path: Path) -> None:
    layout = speech(tmp_path / "all", tokenizer=str(tokenizer), drop_above=99.0)
    build_pairs(PairsConfig.model_validate(layout))
    rates = [sample.wer for sample in read(tmp_path / "all")]
    assert len(rates) == 7 and all(rate is not None and rate > 0 for rate in rates)
    strict = speech(tmp_path / "none", tokenizer=str(tokenizer), drop_above=1e-6)
    report = build_pairs(PairsConfig.model_validate(strict))
    assert report.samples == 0 and len(report.dropped) == 7
    assert all(dropped.reason.startswith("word error rate") for dropped in report.dropped)


@pytest.mark.parametrize(
    "changes", [{"lookahead_ms": 160}, {"causal": False}, {"rate": 25.0}, {"block_ms": 160}]
)
def test_codes_are_of_the_sound_whatever_the_tokenizer(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    layout = {**TOKENIZER.model_dump(), **changes}
    model = SpeechTokenizer(TokenizerConfig.model_validate(layout)).eval()
    rng = np.random.default_rng(0)
    sounds = [rng.normal(0, 0.1, size).astype(np.float32) for size in (5000, 23_000)]
    size = model.config.code_size
    for sound, codes in zip(sounds, tokenize(model, sounds), strict=True):
        assert len(codes) == -(-len(sound) // size)
        whole = np.pad(sound, (0, -len(sound) % size))
        with torch.inference_mode():
            frames = torch.tensor([-(-len(whole) // 1920)])
            expected = model(model.mel(torch.from_numpy(whole)[None, None]), frames).codes[0]
        assert (expected.numpy()[: len(codes)] == codes).mean() > 0.8


def test_padding_changes_no_code(tokenizer: Path) -> None:
    model = load_tokenizer_of(tokenizer).double()
    rng = np.random.default_rng(0)
    sounds = [rng.normal(0, 0.1, size).astype(np.float32) for size in (5000, 1920, 23_000, 100)]
    together = tokenize(model.float(), sounds, batch=4)
    alone = [tokenize(model, [sound])[0] for sound in sounds]
    assert [len(codes) for codes in together] == [3, 1, 12, 1]
    for a, b in zip(together, alone, strict=True):
        assert (a == b).mean() > 0.9


def test_the_tokenizer_of_a_codec_serves_too(tmp_path: Path) -> None:
    codec = small_codec()
    checkpoint.save(tmp_path / "codec", codec.config, codec.state_dict(), dtype="fp32")
    found = load_tokenizer_of(tmp_path / "codec")
    assert codec.tokenizer is not None
    assert torch.equal(found.head.weight, codec.tokenizer.head.weight)
    with pytest.raises(UserError, match="nowhere"):
        PairsConfig.model_validate(speech(tmp_path / "x", tokenizer="nowhere")) and build_pairs(
            PairsConfig.model_validate(speech(tmp_path / "x", tokenizer="nowhere"))
        )
