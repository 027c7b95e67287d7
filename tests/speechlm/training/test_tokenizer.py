"""Every shape of tokenizer trains, resumes to the bit, and starts from a public Whisper."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hf import LETTERS, save_whisper
from kills import rows, spoil, train_until
from pydantic import ValidationError
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import SAMPLE_RATE
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer, load_tokenizer
from speechlm.config import load_config
from speechlm.evaluation.twins import Finished, twin_of
from speechlm.training import tokenizer as training
from synth_data import shards

STEPS = 6
SMALL: dict[str, Any] = {
    "front_dim": 8,
    "front_blocks": 1,
    "dim": 16,
    "heads": 2,
    "layers_before": 1,
    "layers_after": 1,
    "window_seconds": 0.32,
    "levels": [3, 3],
    "dropout": 0.1,  # draws from torch's generator at every step
}
VQ = {"bottleneck": "vq", "codes": 12, "code_dim": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "vq": {"model": {**SMALL, **VQ, "rate": 25, "layers_pooled": 1}, "phones": 0.3},
    "late slow": {"model": {**SMALL, "rate": 6.25, "lookahead_ms": 160}, "phones": 0.3},
    "blocks and a decoder": {
        "model": {**SMALL, "block_ms": 160, "decoder": {"layers": 1, "heads": 2}}
    },
    "decoder alone": {
        "model": {**SMALL, "ctc": False, "rate": 50, "decoder": {"layers": 1, "heads": 2}}
    },
    "whisper": {
        "model": {**SMALL, **VQ, "whisper": {"positions": 20}, "mels": 128, "pooling": "avg"}
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few seconds of tones."""
    path = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    for folder, number_of in (("train", 8), ("validation", 2)):
        samples = []
        for number in range(number_of):
            time = np.arange(int((0.5 + 0.1 * (number % 4)) * SAMPLE_RATE)) / SAMPLE_RATE
            tone = np.sin(2 * np.pi * rng.uniform(100, 900) * time) * rng.uniform(0.1, 0.4)
            pcm = tone + 0.05 * rng.standard_normal(len(time))
            samples.append(
                shards.Sample(
                    id=f"{folder}-{number}",
                    text=("one two", "three", "yes I am")[number % 3],
                    words=((),),
                    voices=("tone",),
                    source="test",
                    licence="Apache-2.0",
                    synthetic=True,
                    seconds=len(time) / SAMPLE_RATE,
                    pcm=pcm.astype(np.float32)[None],
                )
            )
        shards.write(path / folder / shards.shard_name(folder, 0), samples)
    return path


def config(made: Path, run_dir: Path, **changes: Any) -> training.TrainConfig:
    run = {"steps": STEPS, "log_every": 1, "save_every": 2, "eval_every": 3}
    layout = {
        "run": {"dir": run_dir, **run, **changes.pop("run", {})},
        "model": SMALL,
        "data": {
            "train": [made / "train"],
            "validation": [made / "validation"],
            "batch_seconds": 3.0,
        },
        "optimizer": {"lr": 3e-3, "warmup": 2},
    }
    return training.TrainConfig.model_validate({**layout, **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    made: Path, tmp_path: Path, shape: str
) -> None:
    whole = train_until(training, config(made, tmp_path / "whole", **SHAPES[shape]))
    assert whole is not None
    for updates in (1, 2, 3):  # before the first save, right after it, within a step
        parts = config(made, tmp_path / "parts", **SHAPES[shape])
        assert train_until(training, parts, resume=True, clips=updates) is None
    ended = train_until(training, config(made, tmp_path / "parts", **SHAPES[shape]), resume=True)
    assert ended is not None
    expected, found = checkpoints.load(whole).tensors, checkpoints.load(ended).tensors
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    said = [row for row in rows(tmp_path / "whole") if "loss" in row]
    model = load_tokenizer(ended)
    assert all(1 <= row["codes"] <= model.codebook_size for row in said)
    assert all(row["batch_usage"] == row["codes"] / model.codebook_size for row in said)
    assert ("commitment" in said[0]) == (model.bottleneck == "vq")
    assert ("attention" in said[0]) == (model.decoder is not None)
    assert {"wer_validation"} <= rows(tmp_path / "whole")[-1].keys()


@pytest.mark.parametrize("shape", ["vq", "decoder alone", "whisper"])
def test_any_shape_learns(made: Path, tmp_path: Path, shape: str) -> None:
    changes = {**SHAPES[shape], "run": {"steps": 25, "eval_every": 25, "save_every": 25}}
    training.train(config(made, tmp_path / "run", **changes))
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 25 and sum(losses[-5:]) < 0.9 * sum(losses[:5])


# --- The loss -------------------------------------------------------------------------------------


def batch(vocabulary: training.Vocabulary | None = None) -> training.Batch:
    rng = np.random.default_rng(1)
    utterances = [
        training.Utterance(rng.standard_normal((size, 80)).astype(np.float16), text, "v")
        for size, text in ((40, "abc"), (25, "no"))
    ]
    return training.collate(utterances, (), None, rng, vocabulary)


def losses(shape: dict[str, Any], sound: training.Batch, **weights: float) -> dict[str, float]:
    """Of a seed-made tokenizer, no row of which is rounded."""
    torch.manual_seed(5)
    model = SpeechTokenizer(training.TokenizerConfig.model_validate({**shape, "dropout": 0.0}))
    if model.bottleneck == "vq":
        model.quantizer.ready.fill_(True)
    none = torch.zeros(len(sound.mel), dtype=torch.bool)
    found, _ = training.Trainee(model, 0.0, **weights)(sound, none)
    return {name: loss.item() for name, loss in found.items()}


def test_the_attention_decoder_gets_its_share_of_the_loss() -> None:
    shape, sound = {**SMALL, "decoder": {"layers": 1, "heads": 2}}, batch(training.Characters())
    assert sound.pieces is not None
    assert sound.pieces.classes.tolist() == [[0, 3, 4, 5, 0], [0, 16, 17, 0, 0]]
    none, some, whole = (losses(shape, sound, attention=share) for share in (0.0, 0.25, 1.0))
    assert whole["loss"] == pytest.approx(whole["attention"], rel=1e-6)
    assert none["loss"] != pytest.approx(none["attention"], rel=1e-2)
    assert some["loss"] == pytest.approx(0.75 * none["loss"] + 0.25 * whole["loss"], rel=1e-5)
    alone = losses({**shape, "ctc": False}, sound, attention=0.25)
    assert alone["loss"] == alone["attention"]


def test_a_piece_of_the_padding_costs_nothing() -> None:
    pieces = training.Classes.of([[0, 3, 4, 0], [0, 2, 0]])
    logits = torch.randn(2, 3, 5)
    said = [(0, 0, 3), (0, 1, 4), (0, 2, 0), (1, 0, 2), (1, 1, 0)]
    log_p = torch.log_softmax(logits, -1)
    expected = -sum(float(log_p[place]) for place in said) / 5
    assert training.piece_loss(logits, pieces).item() == pytest.approx(expected, rel=1e-5)


def test_the_encoder_is_drawn_to_the_codes_as_much_as_it_says() -> None:
    shape, sound = {**SMALL, **VQ}, batch()
    free, drawn = (losses(shape, sound, commitment=weight) for weight in (0.0, 2.0))
    assert drawn["commitment"] > 0
    assert drawn["loss"] == pytest.approx(free["loss"] + 2 * drawn["commitment"], rel=1e-5)
    assert "commitment" not in losses(SMALL, sound, commitment=2.0)


# --- The twin without a bottleneck ----------------------------------------------------------------


def test_a_twin_has_no_bottleneck_whatever_its_model_s(made: Path, tmp_path: Path) -> None:
    ended = []
    for name, model in (("vq", {**SMALL, **VQ}), ("fsq", {**SMALL, "levels": [5, 5]})):
        twin = {"model": model, "unquantized": True, "run": {"steps": 3}}
        ended.append(checkpoints.load(training.train(config(made, tmp_path / name, **twin))))
    one, other = (found.tensors for found in ended)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not [key for key in one if key.startswith(training._BOTTLENECK)]
    assert one["pool.weight"].shape == (
        16,
        32,
    )  # two positions of the encoder become one, unsqueezed
    assert ended[0].config["bottleneck"] == "none"
    card = ended[0].card
    assert (card["seed"], card["unquantized"], card["steps"]) == (0, True, 3)
    asked = config(made, tmp_path / "vq", model={**SMALL, **VQ}, unquantized=True, run={"steps": 3})
    kept = training.TrainConfig.model_validate(card["config"])
    assert kept.model_dump(exclude={"run"}) == asked.model_dump(exclude={"run"})
    said = rows(tmp_path / "vq")
    assert {"loss", "wer_validation"} <= {name for row in said for name in row}
    assert not any("codes" in row or "commitment" in row for row in said)
    with pytest.raises(ValidationError, match="bottleneck=none is what unquantized=true makes"):
        config(made, tmp_path, model={**SMALL, "bottleneck": "none"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment": {"noise_share": 1.5}}, "less than or equal to 1"),
        ({"augment": {"time_masks": -1}}, "greater than or equal to 0"),
        ({"augment": {"mel_width": 80}}, "mel_width is 80: a mask must be narrower"),
        ({"quantize_from": 0.5}, r"quantize_from is 0\.5, quantize_full 0\.3: the first row"),
    ],
)
def test_shares_and_widths_have_bounds(
    made: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        config(made, tmp_path, **changes)


def test_the_card_counts_the_steps_that_were_done(made: Path, tmp_path: Path) -> None:
    path = training.train(config(made, tmp_path / "run", run={"steps": 50, "minutes": 1e-9}))
    card = checkpoints.load(path).card
    assert (card["steps"], card["config"]["run"]["steps"], card["unquantized"]) == (1, 50, False)


@pytest.mark.parametrize("bottleneck", [{"levels": [5, 5]}, VQ])
def test_a_twin_goes_on_from_a_quantized_tokenizer(
    tmp_path: Path, bottleneck: dict[str, Any]
) -> None:
    shape = training.TokenizerConfig.model_validate({**SMALL, **bottleneck, "dropout": 0})
    torch.manual_seed(0)
    model = SpeechTokenizer(shape).eval()
    mel = torch.randn(8, 8 * 20, 80)
    with torch.no_grad():
        numbers = model.features(mel)
        if model.bottleneck == "fsq":
            model.quantizer.mean.copy_(numbers.mean((0, 1)))
            model.quantizer.variance.copy_(numbers.var((0, 1)))
    checkpoints.save(tmp_path / "t", shape, model.state_dict(), dtype="fp32")
    torch.manual_seed(1)
    twin = SpeechTokenizer(shape.model_copy(update={"bottleneck": "none"})).eval()
    training.start_from(twin, str(tmp_path / "t"))
    ours, theirs = twin.state_dict(), model.state_dict()
    shared = {name for name in theirs if not name.startswith(training._BOTTLENECK)}
    assert shared == {name for name in ours if not name.startswith("pool.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    # And where it pools, it begins with what the bottleneck let pass, but for the bound's bend.
    with torch.no_grad():
        bounded = model.quantizer.bound(numbers) if model.bottleneck == "fsq" else numbers
        passed, found = model.from_bottleneck(bounded), twin.features(mel)
    gap = (passed - found).square().mean() / (passed - passed.mean((0, 1))).square().mean()
    assert float(gap) < (0.1 if model.bottleneck == "fsq" else 1e-9)


def test_a_tokenizer_that_reads_no_text_says_so() -> None:
    mute = training.TokenizerConfig.model_validate({**SMALL, "ctc": False, "layers_after": 0})
    sound = batch()
    with pytest.raises(UserError, match="reads no characters"):
        training.transcribe(SpeechTokenizer(mute).eval(), sound.mel, sound.frames)


def test_only_a_shape_with_a_lesson_is_trained(made: Path, tmp_path: Path) -> None:
    public = {**SMALL, "whisper": {"public_features": True}}
    mute = {**SMALL, "ctc": False, "layers_after": 0}
    for changes, said in (
        ({"model": mute}, "no head, no lesson"),
        ({"model": public}, "public_features"),
    ):
        with pytest.raises(ValidationError, match=said):
            config(made, tmp_path, **changes)


# --- Whisper --------------------------------------------------------------------------------------

WHISPERED: dict[str, Any] = {
    **SMALL,
    **VQ,
    "hidden": 24,
    "whisper": {"positions": 20},
    "pooling": "avg",
    "ctc": False,
    "decoder": {"layers": 1, "heads": 2, "hidden": 24, "vocabulary": 40, "positions": 30},
}


def test_a_tokenizer_grows_out_of_a_public_whisper(made: Path, tmp_path: Path) -> None:
    save_whisper(tmp_path / "w")
    still = {"lr": 0.0, "weight_decay": 0.0}
    one = {"steps": 1, "eval_every": 1}
    start = {"model": WHISPERED, "init_from": str(tmp_path / "w")}
    path = training.train(config(made, tmp_path / "a", run=one, optimizer=still, **start))
    found, public = checkpoints.load(path).tensors, checkpoints.load(tmp_path / "w").tensors
    for own, theirs in {
        "stem.second.weight": "model.encoder.conv2.weight",
        "after.blocks.0.mlp.up.weight": "model.encoder.layers.1.fc1.weight",
        "decoder.embed.weight": "model.decoder.embed_tokens.weight",
    }.items():
        assert torch.equal(found[own], public[theirs])
    # Trained on, it needs nothing but its own checkpoint: the text pieces lie in it.
    again = {"model": WHISPERED, "init_from": str(path)}
    more = {"steps": 20, "eval_every": 20, "save_every": 20}
    training.train(config(made, tmp_path / "b", run=more, **again))
    losses = [row["loss"] for row in rows(tmp_path / "b") if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    with pytest.raises(UserError, match=r"after\.blocks|encoder\.layers\.2"):
        deep = {**start, "model": {**WHISPERED, "layers_after": 2}}
        training.train(config(made, tmp_path / "c", **deep))


def test_text_pieces_are_those_of_the_checkpoint(made: Path, tmp_path: Path) -> None:
    save_whisper(tmp_path / "w")
    pieces = training.WhisperPieces(tmp_path / "w", 40)
    said = pieces.encode("one two")
    first = len(LETTERS) + 3
    assert said[0] == first + 1 and said[-1] == pieces.end == first
    assert said[len(pieces.prompt)] == first - 1  # " on" is one piece
    assert pieces.decode(said) == "one two"
    assert training.Characters().decode(training.Characters().encode("it's me")) == "it's me"
    with pytest.raises(UserError, match="vocabulary=20, but"):
        training.WhisperPieces(tmp_path / "w", 20)
    with pytest.raises(UserError, match="needs init_from"):
        training.train(config(made, tmp_path / "a", model=WHISPERED))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no text pieces"):
        training.WhisperPieces(tmp_path / "bare", 40)


def test_a_gradient_that_is_no_number_changes_nothing_and_is_counted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, training, {1})
    path = training.train(config(made, tmp_path, run={"steps": 3}))
    logged = [row["bad_gradients"] for row in rows(tmp_path) if "bad_gradients" in row]
    assert logged == [0] + [1] * (len(logged) - 1) and len(logged) > 2
    tensors = checkpoints.load(path).tensors
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


# --- An encoder alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [25, 50])
def test_an_encoder_can_be_taken_over_for_another_bottleneck(
    made: Path, tmp_path: Path, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = training.train(config(made, tmp_path / "first", run={"steps": 2}))
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(training, "clip_gradients", lambda *_: torch.tensor(0.0))
    still = {"run": {"steps": 1}, "optimizer": {"lr": 0.0}}  # what was taken over is not moved
    shape = {**SMALL, **VQ, "rate": rate, "layers_after": 2}
    again = config(made, tmp_path / "again", model=shape, encoder_from=str(first), **still)
    found, start = (checkpoints.load(path).tensors for path in (training.train(again), first))
    same = {name for name in found if name in start and torch.equal(found[name], start[name])}
    encoder = {name for name in start if name.startswith(("front", "before.", "stack."))}
    anew = {"stack.weight", "stack.bias"} if rate == 50 else set()
    assert encoder and encoder - same == anew
    assert "head.weight" not in same and "after.blocks.0.mlp.up.weight" not in same


def test_an_encoder_of_another_shape_is_named(made: Path, tmp_path: Path) -> None:
    first = training.train(config(made, tmp_path / "first", run={"steps": 1}))
    AcceleratorState._reset_state(True)
    wide = {**SMALL, "front_dim": 12}
    with pytest.raises(UserError, match=r"tensor 'front_in.weight' has shape \(8, 80\), expected"):
        training.train(config(made, tmp_path / "b", model=wide, encoder_from=str(first)))
    for start in ("init_from", "encoder_from"):  # whose shapes are the same
        four = config(made, tmp_path / start, model={**SMALL, "heads": 4}, **{start: str(first)})
        with pytest.raises(UserError, match=r"model.heads=4, but .* has 2 heads"):
            training.train(four)
    with pytest.raises(ValidationError, match="init_from and encoder_from"):
        config(made, tmp_path / "c", init_from="a", encoder_from="b")


# --- Several processes ----------------------------------------------------------------------------


def test_processes_take_batches_in_turn(made: Path, tmp_path: Path) -> None:
    settings = config(made, tmp_path / "run")
    utterances = training.load_utterances([made / "train"], 12.0)

    def drawn(rank: int, world: int, steps: int) -> list[Tensor]:
        order = training._Order(utterances, settings, (), None, rank, world)
        return [order.batch(step).mel for step in range(steps)]

    alone, halves = drawn(0, 1, 12), (drawn(0, 2, 6), drawn(1, 2, 6))
    for number, mel in enumerate(alone):
        assert torch.equal(mel, halves[number % 2][number // 2])
    assert not torch.equal(alone[0], alone[1])


def test_a_wrapper_of_processes_finds_a_gradient_for_every_weight() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        shape = training.TokenizerConfig.model_validate(
            {**SMALL, "decoder": {"layers": 1, "heads": 2}}
        )
        trainee = training.Trainee(SpeechTokenizer(shape), 0.3, attention=0.5)
        wrapped = nn.parallel.DistributedDataParallel(trainee)
        sound = batch(training.Characters())
        for known in (True, False, True):  # it complains about the step before
            rows: Sequence[Sequence[int]] = [[3, 4], [5]] if known else [[], []]
            sound.phones = training.Classes.of(rows)
            found, _ = wrapped(sound, torch.ones(len(sound.mel), dtype=torch.bool))
            assert ("phones_after" in found) == known
            found["loss"].backward()
            assert all(p.grad is not None for p in trainee.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_tokenizer(made: Path, root: Path, tmp_path: Path) -> None:
    settings = config(made, tmp_path / "run", **SHAPES["vq"], data={
        "train": [made / "train"], "validation": [made / "validation"], "batch_seconds": 1.0,
    })  # fmt: skip
    recipe = tmp_path / "run.yaml"  # JSON is YAML
    recipe.write_text(settings.model_dump_json())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "speechlm.cli", "train", "tokenizer", str(recipe)],
        cwd=root, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logged = [row["step"] for row in rows(tmp_path / "run") if "loss" in row]
    assert logged == list(range(STEPS))  # one process writes
    # Had both taken the same batches, their gradients' mean would be that of one alone.
    alone = training.train(
        settings.model_copy(
            update={"run": settings.run.model_copy(update={"dir": tmp_path / "alone"})}
        )
    )
    one, two = (load_tokenizer(path) for path in (alone, tmp_path / "run" / "tokenizer"))
    assert not torch.allclose(
        one.before.blocks[0].mlp.up.weight, two.before.blocks[0].mlp.up.weight
    )


# --- Rooms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decibel", [-12.0, 0.0])
def test_a_room_echoes_with_its_energy_and_dies_away_in_its_time(decibel: float) -> None:
    power = np.zeros((400, 3), np.float32)
    power[10] = 2.0
    heard = training._echo(power, 0.5, decibel)
    np.testing.assert_array_equal(heard[:11], power[:11])  # nothing before the sound
    echo = heard[11:, 0].astype(np.float64)
    assert echo.sum() / 2 == pytest.approx(10 ** (decibel / 10), rel=1e-3)
    assert 10 * np.log10(echo[50] / echo[0]) == pytest.approx(-60, abs=0.01)
    assert heard.dtype == np.float32


def test_rooms_are_drawn_in_their_share_and_change_nothing_else() -> None:
    mel = training.log_mel(np.random.default_rng(0).standard_normal(9600).astype(np.float32))

    def disturbed(share: float, seed: int) -> Any:
        augment = training.AugmentConfig(echo_share=share, echo_db=(0.0, 0.0))
        return training.disturb(mel, (), augment, np.random.default_rng(seed))

    old = training.AugmentConfig()
    same = training.disturb(mel, (), old, np.random.default_rng(3))
    np.testing.assert_array_equal(disturbed(0.0, 3), same)
    quiet = training.AugmentConfig(noise_share=0.0, band_share=0.0, gain_db=(0.0, 0.0))
    louder = [
        float((training.disturb(mel, (), quiet.model_copy(update={"echo_share": 0.5}),
                                np.random.default_rng(seed)) - mel)[20:].mean()) > 0.05
        for seed in range(100)
    ]  # fmt: skip
    assert 35 <= sum(louder) <= 65


# --- Another vocal tract --------------------------------------------------------------------------


def test_a_warp_is_drawn_only_where_the_speed_is() -> None:
    augment = training.AugmentConfig(
        gain_db=(0, 0), noise_share=0.0, band_share=0.0, speed_share=0.0, warp=(1.3, 1.3)
    )
    mel = training.log_mel(np.random.default_rng(0).standard_normal(9600).astype(np.float32))
    same = training.disturb(mel, (), augment, np.random.default_rng(0))
    assert np.abs(same - mel).max() < 1e-3


# --- The sweep ------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_sweep_trains_a_twin_of_each_of_its_runs(root: Path) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "sweep"], cwd=root, capture_output=True, text=True, check=True
    )
    lines = [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]
    said = [words[1:] for words in lines if words and words[0].endswith("speechlm")]
    assert said[-1][:4] == ["eval", "tokenizer", "--sweep", "runs/sweep"]
    runs = []
    for verb, trainee, path, resume, *overrides in said[:-1]:
        assert (verb, trainee, resume) == ("train", "tokenizer", "--resume")
        settings = load_config(root / path, overrides, training.TrainConfig)
        runs.append(Finished(settings.run.dir.name, settings, settings.run.dir, 1))
    assert len({run.config.run.dir for run in runs}) == len(runs) == 20
    shapes = [run.config.shape for run in runs]
    assert {shape.rate for shape in shapes} == {50, 25, 12.5, 6.25}
    assert {shape.lookahead_ms for shape in shapes} == {0, 80, 160}
    assert {shape.block_ms for shape in shapes} == {None, 480, 4000}
    assert {shape.codebook for shape in shapes if shape.bottleneck == "vq"} == {(625,), (4375,)}
    twins = [twin_of(run, runs) for run in runs if not run.config.unquantized]
    assert None not in twins
    assert {twin.name for twin in twins if twin} == {r.name for r in runs if r.config.unquantized}


def test_the_shipped_recipe_hears_rooms(root: Path) -> None:
    path = root / "configs" / "tokenizer" / "shipped.yaml"
    augment = load_config(path, [], training.TrainConfig).augment
    assert augment.echo_share > 0 and augment.noise_share > 0 and augment.speed_share > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"rate": 12.5, "codebook": (7, 5, 5, 5, 5)}),
        (["model.rate=50"], {"rate": 50}),
        (["model.rate=6.25", "model.levels=[8,8,8,8]"], {"rate": 6.25, "codebook_size": 4096}),
        (["model.bottleneck=vq", "model.codes=512"], {"bottleneck": "vq", "codebook": (512,)}),
        (["model.lookahead_ms=160"], {"lookahead_ms": 160, "delay": 3840}),
        (["model.block_ms=4000"], {"lookahead_ms": 3920, "frame_size": 96_000}),
    ],
)
def test_the_sweep_is_steered_from_the_command_line(
    root: Path, overrides: list[str], expected: dict[str, Any]
) -> None:
    path = root / "configs" / "tokenizer" / "sweep.yaml"
    model = SpeechTokenizer(load_config(path, overrides, training.TrainConfig).model)
    assert {name: getattr(model, name) for name in expected} == expected
