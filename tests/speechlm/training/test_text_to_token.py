"""A run of seconds: it learns what it is taught, it resumes to the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kills import Killed, rows, spoil
from small import TOKENIZER, small_text_to_token

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.sampling import Sampling
from audio_codec.speech_tokenizer import SpeechTokenizer
from speechlm.training import text_to_token as room
from speechlm.training.text_to_token import (
    DataConfig,
    Pair,
    TrainConfig,
    collate,
    cut_some,
    grouped,
    load_pairs,
    positions,
    train,
)
from synth_data import shards
from synth_data.text import tokenize
from synth_data.text_to_token import GenerationConfig, Line, cells, generate, load_text_to_token
from synth_data.tts import Word

TEXTS = ["The cat sat.", "A dog ran home", "one, two", "yes", "the dog sat", "a cat ran home"]


def pairs() -> list[Pair]:
    """Every word lasts as many frames as it has letters, 80 ms each."""
    rng = np.random.default_rng(0)
    found = []
    for text in TEXTS:
        tokens, words, at = tokenize(text), [], 0.0
        for token in tokens:
            words.append(Word(token.text, at, at + 0.08 * len(token.text)))
            at = words[-1].end
        codes = rng.integers(0, 9, round(at / 0.08)).astype(np.uint16)
        found.append(Pair(text, codes, tuple(tokens), tuple(words)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and shards of pairs."""
    path = tmp_path_factory.mktemp("text_to_token")
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(TOKENIZER)
    checkpoint.save(path / "tokenizer", TOKENIZER, tokenizer.state_dict(), dtype="fp32")
    samples = [
        shards.Sample(
            id=f"p{number}",
            text=pair.text,
            words=(pair.words,),
            voices=("espeak:en",),
            source="test",
            licence="CC0",
            synthetic=True,
            seconds=len(pair.codes) * 0.08,
            codes=pair.codes[None, None],
        )
        for number, pair in enumerate(pairs())
    ]
    shards.write(path / "shards" / "pairs-000000.tar", samples)
    return path


def config_of(made: Path, run_dir: Path, **changes: object) -> TrainConfig:
    layout = {
        "run": {
            "dir": run_dir, "steps": 8, "log_every": 1, "save_every": 3, "eval_every": 4,
            "precision": "no",
        },
        "tokenizer": str(made / "tokenizer"),
        "data": {
            "train": [made / "shards"],
            "validation": [made / "shards"],
            "batch_positions": 64,
        },
        "model": {
            "cell": 2, "step": 2,
            "transformer": {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "window": 100},
            "head": 32,
        },
        "optimizer": {"lr": 1e-2, "warmup": 10, "decay": 0.5, "betas": [0.9, 0.95]},
        "dtype": "fp32",
    }  # fmt: skip
    return TrainConfig.model_validate({**layout, **changes})


def test_it_says_what_it_was_taught(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path)
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"steps": 120, "eval_every": 120}),
            "data": config.data.model_copy(
                update={"cut": 0.0, "hide": 0.0, "batch_positions": 200}
            ),
        }
    )
    model = load_text_to_token(train(config))
    logged = rows(tmp_path)
    assert logged[-1]["loss_validation"] < 0.1 < logged[0]["loss"] / 10
    assert logged[-1]["faults_validation"] == 0 and "wer_validation" in logged[-1]
    assert model.config.codebook == (3, 3) and model.config.rate == 12.5
    greedy = GenerationConfig(sampling=Sampling(temperature=0))
    spoken = generate(model, [Line(pair.text, 0) for pair in pairs()], greedy)
    assert [s.codes.tolist() for s in spoken] == [pair.codes.tolist() for pair in pairs()]


def test_it_resumes_to_the_same_numbers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config_of(made, tmp_path / "whole"))
    clip, calls = room.clip_gradients, 0

    def dies(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return clip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "clip_gradients", dies)
    with pytest.raises(Killed):
        train(config_of(made, tmp_path / "parts"))
    monkeypatch.setattr(room, "clip_gradients", clip)
    parts = train(config_of(made, tmp_path / "parts"), resume=True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    one, other = checkpoint.load(whole), checkpoint.load(parts)
    assert one.config == other.config
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_gradient_that_is_no_number_changes_nothing_and_is_counted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, room, {1})
    path = train(config_of(made, tmp_path))
    logged = [row["bad_gradients"] for row in rows(tmp_path) if "bad_gradients" in row]
    assert logged == [0] + [1] * (len(logged) - 1) and len(logged) > 2
    tensors = checkpoint.load(path).tensors
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


def test_a_cut_pair_has_the_frames_of_its_words() -> None:
    (pair, *_) = pairs()
    cut = pair.cut(1, 3, 12.5)
    assert cut.text == "cat sat." and cut.codes.tolist() == pair.codes[3:].tolist()
    config = DataConfig(train=(Path("a"),), validation=(Path("b"),), cut=1.0, cut_words=2.0)
    rng = np.random.default_rng(0)
    found = {p.text for _ in range(40) for p in cut_some([pair], config, 12.5, rng)}
    assert found == {"The", "cat", "sat.", "The cat", "cat sat.", "The cat sat."}
    whole = cut_some(pairs(), config.model_copy(update={"cut": 0.0}), 12.5, rng)
    assert [p.text for p in whole] == TEXTS


def test_batches_hold_every_pair_within_their_budget() -> None:
    model = small_text_to_token(codebook=(3, 3))
    found = grouped(pairs(), model.config, 48, np.random.default_rng(0))
    assert sorted(pair.text for batch in found for pair in batch) == sorted(TEXTS)
    for batch in found:
        longest = max(-(-positions(pair, model.config) // 8) * 8 for pair in batch)
        assert len(batch) == 1 or len(batch) * longest <= 48


def test_a_batch_predicts_every_frame_and_the_end() -> None:
    model = small_text_to_token(codebook=(3, 3))
    chosen = pairs()[:3]
    batch = collate(chosen, model, 0.0, np.random.default_rng(0))
    assert batch.rows.shape[1] % 8 == 0 and len(batch.index) % 256 == 0
    learned = batch.steps.view(len(batch.steps), 2, 2)
    assert int((learned[:, :, 0] >= 0).sum()) == sum(len(pair.codes) + 1 for pair in chosen)
    assert int((learned[:, :, 0] == model.end).sum()) == 3
    assert int((learned[:, :, 1] >= 0).sum()) == sum(len(pair.codes) for pair in chosen)
    # A row alone gives the loss that it gives among others.
    alone = [collate([pair], model, 0.0, np.random.default_rng(0)) for pair in chosen]
    losses = [float(model.loss(b.rows, b.clock, b.index, b.steps)) for b in alone]
    weights = [len(pair.codes) + 1 for pair in chosen]
    together = float(model.loss(batch.rows, batch.clock, batch.index, batch.steps))
    assert together == pytest.approx(np.average(losses, weights=weights), rel=1e-6)
    # Text and speech of a row end at about the same time, whatever its pace.
    for row, pair in enumerate(chosen):
        cells_of = len(cells(pair.text, 2))
        assert 0 < float(batch.clock[row, cells_of - 1]) < len(pair.codes)
        steps_of = batch.clock[row, cells_of : cells_of + len(pair.codes) // 2 + 1]
        assert steps_of.tolist() == [2.0 * step for step in range(len(steps_of))]
    hidden = collate(chosen, model, 0.99, np.random.default_rng(0))
    assert torch.equal(hidden.steps, batch.steps) and int((hidden.rows > 0).sum()) < int(
        (batch.rows > 0).sum()
    )


def test_pairs_of_another_tokenizer_are_refused(made: Path, tmp_path: Path) -> None:
    assert len(load_pairs([made / "shards"], 9, 10.0)) == len(TEXTS)
    with pytest.raises(UserError, match="one codebook of 4"):
        load_pairs([made / "shards"], 4, 10.0)
    with pytest.raises(UserError, match="no pair"):
        load_pairs([made / "shards"], 9, 0.01)
    coded = [s.model_copy(update={"coded_by": (1.0, 2.0)}) for s in shards.read(made / "shards")]
    shards.write(tmp_path / "coded-000000.tar", coded)
    assert len(load_pairs([tmp_path], 9, 10.0, (1.001, 2.0))) == len(TEXTS)
    with pytest.raises(UserError, match="codes of another tokenizer"):
        load_pairs([tmp_path], 9, 10.0, (2.0, 1.0))
