"""The codec's training: both phases, both sources of codebook 0, every bitrate, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from kills import rows, spoil, train_until
from small import CODEC, TOKENIZER, small_codec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE
from audio_codec.codec import load_codec
from audio_codec.errors import UserError
from audio_codec.losses import MultiScaleMel, pool_frames
from audio_codec.quantize import EMAVQ
from audio_codec.speech_tokenizer import SpeechTokenizer
from speechlm.config import build
from speechlm.convert import load_speech_tokenizer_of
from speechlm.training import codec as training
from speechlm.training.codec import CodeCounts, TrainConfig, draw_rows, picture, train
from speechlm.training.run import Average
from speechlm.training.teacher import load_teacher
from synth_data import shards

SHAPE = CODEC.model_dump(exclude={"tokenizer", "semantic", "kind"})
ADVERSARIAL = {
    "begin": 2,
    "alone": 1,
    "update_share": 0.6,
    "discriminators": {"windows": [256, 64], "channels": 4},
    "optimizer": {"lr": 3e-3, "warmup": 1},
}
DISTILLED = {**SHAPE, "semantic": {"size": 16, "dim": 6}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of gliding tones, and a tokenizer that nobody trained."""
    path, rng = tmp_path_factory.mktemp("codec"), np.random.default_rng(0)
    for folder, count, seconds in (("train", 6, 0.7), ("validation", 2, 0.9)):
        samples = []
        for number in range(count):
            time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
            pitch = rng.uniform(100, 400) * (1 + 0.3 * time)
            pcm = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * rng.standard_normal(len(time))
            samples.append(
                shards.Sample(
                    id=f"{folder}-{number}",
                    text="one",
                    words=((),),
                    voices=("tone",),
                    source="test",
                    licence="Apache-2.0",
                    synthetic=True,
                    seconds=seconds,
                    pcm=pcm.astype(np.float32)[None],
                )
            )
        shards.write(path / folder / shards.shard_name(folder, 0), samples)
    torch.manual_seed(0)
    checkpoints.save(path / "tokenizer", TOKENIZER, SpeechTokenizer(TOKENIZER).state_dict())
    return path


def layout(made: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    run = {"steps": 6, "log_every": 1, "save_every": 2, "eval_every": 6, "precision": "no"}
    return {
        "run": {"dir": run_dir, **run, **changes.pop("run", {})},
        "tokenizer": str(made / "tokenizer"),
        "model": SHAPE,
        "sources": [{"path": made / "train"}],
        "validation": made / "validation",
        "validation_utterances": 1,
        "samples": 0,
        "batch": 3,
        "crop_frames": 3,
        "dropout_share": 0.5,
        "bypass_share": 0.3,
        "ema": 0.9,
        "optimizer": {"lr": 3e-3, "warmup": 2},
        "adversarial": ADVERSARIAL,
        **changes,
    }


def config_of(made: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(layout(made, run_dir, **changes))


def distilled(made: Path, run_dir: Path, teacher: str, **changes: Any) -> TrainConfig:
    return config_of(
        made, run_dir, tokenizer=None, model=DISTILLED, teacher={"model": teacher}, **changes
    )


# --- Both phases ----------------------------------------------------------------------------------


def test_a_run_killed_in_either_phase_ends_with_the_same_bits(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Codes die quickly, so that restarts at random vectors happen within these few steps.
    monkeypatch.setattr(EMAVQ.__init__, "__defaults__", (0.3, 0.5, 2))

    def config(name: str) -> TrainConfig:
        run = {"precision": "bf16", "log_every": 3}  # counts of codes reach over a save
        return config_of(made, tmp_path / name, run=run)

    whole = train_until(training, config("whole"))
    assert whole is not None
    expected = checkpoints.load(whole).tensors
    # One clip a step for the codec, one more where the discriminators learn, from step 2 on: dead
    # in step 1, in the discriminators' step 2, in the codec's step 2, and one step further.
    for clips in (1, 2, 1, 3):
        assert train_until(training, config("parts"), resume=True, clips=clips) is None
    parts = train_until(training, config("parts"), resume=True)
    assert parts is not None
    found = checkpoints.load(parts).tensors
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    ends = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]
        for name in ("whole", "parts")
    ]
    for part in ("model", "balancer"):
        one, other = (end["adversary"][part] for end in ends)
        assert not [key for key in one if not torch.equal(one[key], other[key])], part


def test_the_second_phase_begins_when_it_should_and_is_logged(made: Path, tmp_path: Path) -> None:
    path = train(config_of(made, tmp_path / "run", validation_codebooks=[1, 2]))
    logged = [row for row in rows(tmp_path / "run") if "mel" in row]
    assert ["discriminator" in row for row in logged[:3]] == [False, False, True]
    assert ["adversarial" in row for row in logged] == [False] * 3 + [True] * 3
    assert all("features" in row for row in logged[3:])
    assert {f"{name}/{level}" for name in ("usage", "perplexity") for level in range(3)} <= set(
        logged[0]
    )
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    (measured,) = [row for row in rows(tmp_path / "run") if "stoi_validation" in row]
    assert {"stoi_validation_1", "stoi_validation_2", "mel_validation"} <= set(measured)
    assert checkpoints.load(path).card["adversarial_steps"] == 4


def test_it_learns_in_both_phases(made: Path, tmp_path: Path) -> None:
    """Six sounds over and over: the distances fall, and the discriminators find something."""
    run = {"steps": 60, "eval_every": 60, "save_every": 60}
    adversarial = {**ADVERSARIAL, "begin": 0.4, "alone": 4, "update_share": 1.0}
    train(config_of(made, tmp_path / "run", run=run, adversarial=adversarial, bypass_share=0.0))
    logged = [row for row in rows(tmp_path / "run") if "mel" in row]
    mel, told = ([r[key] for r in logged if key in r] for key in ("mel", "discriminator"))
    assert len(told) == 60 - 24 and sum("features" in row for row in logged) == 60 - 24 - 4
    assert np.mean(mel[14:24]) < 0.9 * np.mean(mel[:5])
    assert np.mean(mel[-10:]) < np.mean(mel[14:24])
    assert min(told) < 0.95 * told[0]


def test_a_gradient_that_is_no_number_changes_nothing_and_is_counted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The codec's in step 1; from step 2 on the discriminators clip first: theirs in step 4.
    spoil(monkeypatch, training, {1, 6})
    adversarial = {**ADVERSARIAL, "update_share": 1.0}
    moved: list[bool] = []
    real = Average.update

    def update(self: Average, model: nn.Module, step: int) -> None:
        real(self, model, step)
        moved.append(all(bool(weight.isfinite().all()) for weight in self.weights.values()))

    monkeypatch.setattr(Average, "update", update)
    path = train(config_of(made, tmp_path, adversarial=adversarial))
    logged = [row for row in rows(tmp_path) if "mel" in row]
    assert [row["bad_gradients"] for row in logged] == [0, 1, 1, 1, 2, 2]
    assert not np.isfinite(logged[1]["norm"])
    assert not np.isfinite(logged[4]["discriminator_norm"])
    assert moved == [True] * 5
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoints.load(path).tensors.values())
    ended = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert ended["bad_gradients"] == 2
    assert all(bool(t.isfinite().all()) for t in ended["state"]["adversary"]["model"].values())


def test_a_run_of_the_first_phase_can_go_on_into_the_second(made: Path, tmp_path: Path) -> None:
    train(config_of(made, tmp_path / "run", adversarial=None, run={"steps": 2}))
    AcceleratorState._reset_state(True)
    train(config_of(made, tmp_path / "run", run={"steps": 4}), resume=True)
    assert [row["step"] for row in rows(tmp_path / "run") if "mel" in row] == [0, 1, 2, 3]
    assert "adversarial" in rows(tmp_path / "run")[-2]


def test_what_is_saved_is_the_average(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages = []
    real = Average.update

    def update(self: Average, model: nn.Module, step: int) -> None:
        real(self, model, step)
        averages.append({name: weight.clone() for name, weight in self.weights.items()})

    monkeypatch.setattr(Average, "update", update)
    config = config_of(made, tmp_path / "run", adversarial=None, run={"steps": 3})
    saved = checkpoints.load(train(config)).tensors
    now = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["model"]
    assert averages[-1].keys() == {
        name for name, _ in small_codec().named_parameters() if not name.startswith("tokenizer.")
    }
    for name, weight in averages[-1].items():
        assert torch.equal(saved[name], weight)
    assert not torch.equal(saved["up.weight"], now["codec.up.weight"])


def test_a_codec_grows_by_more_codebooks(made: Path, tmp_path: Path) -> None:
    first = train(config_of(made, tmp_path / "first", run={"steps": 2}, adversarial=None))
    AcceleratorState._reset_state(True)
    fields = {"init_from": str(first), "adversarial": None, "ema": 0, "optimizer": {"lr": 0.0}}
    wide = {**SHAPE, "codebooks": [16, 16, 16, 16]}
    second = train(config_of(made, tmp_path / "second", model=wide, run={"steps": 1}, **fields))
    before, after = (checkpoints.load(path).tensors for path in (first, second))
    assert torch.equal(before["from_latent.weight"], after["from_latent.weight"])
    assert after.keys() - before.keys() == {
        f"quantizer.levels.{level}.{name}"
        for level in (2, 3)
        for name in ("codebook", "usage", "total", "ready")
    }
    assert all(bool(after[f"quantizer.levels.{level}.ready"]) for level in range(4))
    assert len(load_codec(second).codebooks) == 5
    narrow = {**SHAPE, "codebooks": [16]}
    with pytest.raises(UserError, match=r"tensor 'quantizer.levels.1\.\w+' has no place"):
        train(config_of(made, tmp_path / "third", model=narrow, **fields))


def test_a_decoder_learns_while_the_codes_stay(made: Path, tmp_path: Path) -> None:
    first = train(config_of(made, tmp_path / "first", run={"steps": 3}, dtype="int8"))
    AcceleratorState._reset_state(True)
    again = layout(made, tmp_path / "second", init_from=str(first), learn="decoder", dtype="int8")
    del again["tokenizer"], again["model"]
    second = train(TrainConfig.model_validate(again))
    before, after = (checkpoints.load(path).tensors for path in (first, second))
    changed = {name.partition(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"from_latent", "decoder_latent", "up", "back", "head"}
    pcm = 0.2 * torch.randn(1, 1, 20 * FRAME_SIZE)
    old, new = load_codec(first), load_codec(second)
    codes = old.encode(pcm)
    assert torch.equal(new.encode(pcm), codes)
    assert not torch.allclose(new.decode(codes), old.decode(codes))
    assert "adversarial" in [row for row in rows(tmp_path / "second") if "mel" in row][-1]
    # The config that the run wrote down trains it again.
    AcceleratorState._reset_state(True)
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    written["run"]["dir"] = str(tmp_path / "third")
    third = checkpoints.load(train(TrainConfig.model_validate(written))).tensors
    assert all(torch.equal(after[name], third[name]) for name in after)
    with pytest.raises(UserError, match="model is not that of init_from"):
        train(TrainConfig.model_validate({**again, "model": {**SHAPE, "latent": 5}}))
    with pytest.raises(UserError, match="validation_codebooks has 4, but the codec has 1 to 3"):
        train(TrainConfig.model_validate({**again, "validation_codebooks": [4]}))


def test_codebooks_join_those_that_stay(made: Path, tmp_path: Path) -> None:
    first = train(config_of(made, tmp_path / "first", run={"steps": 3}, dtype="int8"))
    AcceleratorState._reset_state(True)
    more = {"init_from": str(first), "learn": "decoder", "more_codebooks": [8, 8]}
    fields = layout(made, tmp_path / "second", dtype="int8", validation_codebooks=[3, 5], **more)
    del fields["tokenizer"], fields["model"]
    second = train(TrainConfig.model_validate(fields))
    before, after = (checkpoints.load(path).tensors for path in (first, second))
    assert {name.split(".")[2] for name in after.keys() - before.keys()} == {"2", "3"}
    assert all(torch.equal(before[name], after[name]) for name in before if "quantizer" in name)
    assert all(bool(after[f"quantizer.levels.{level}.ready"]) for level in range(4))
    # Placed by the first batch, they moved with the next.
    usage = after["quantizer.levels.3.usage"]
    assert not torch.allclose(usage, usage[:1].expand_as(usage))
    pcm = 0.2 * torch.randn(1, 1, 20 * FRAME_SIZE)
    old, new = load_codec(first), load_codec(second)
    assert new.encode(pcm).shape == (1, 5, 20)
    assert torch.equal(new.encode(pcm)[:, :3], old.encode(pcm))
    assert torch.equal(load_codec(second, 3).encode(pcm), old.encode(pcm))


# --- Rows, bitrates, codes ------------------------------------------------------------------------


def test_rows_are_drawn_in_their_shares(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path, batch=4000)
    depth, bypass = draw_rows(config, np.random.default_rng(0))
    shares = torch.bincount(depth) / 4000
    torch.testing.assert_close(shares, torch.tensor([1, 1, 4]) / 6, rtol=0, atol=0.03)
    assert 0.27 < float(bypass.float().mean()) < 0.33
    whole = config.model_copy(update={"dropout_share": 0.0, "bypass_share": 0.0})
    depth, bypass = draw_rows(whole, np.random.default_rng(0))
    assert bool((depth == 2).all()) and not bool(bypass.any())
    named = config.model_copy(update={"dropout_codebooks": (1, 2, 2)})
    depth, _ = draw_rows(named, np.random.default_rng(0))
    shares = torch.bincount(depth) / 4000
    torch.testing.assert_close(shares, torch.tensor([1, 2, 3]) / 6, rtol=0, atol=0.03)


def test_sixteen_codebooks_decode_at_any_bitrate(made: Path, tmp_path: Path) -> None:
    path = train(
        config_of(
            made,
            tmp_path / "run",
            model={**SHAPE, "codebooks": [8] * 15},
            dropout_share=1.0,
            adversarial=None,
            run={"steps": 3},
        )
    )
    codec = load_codec(path)
    codes = codec.encode(0.1 * torch.randn(1, 1, 4 * FRAME_SIZE))
    assert codes.shape == (1, 16, 4)
    sounds = [codec.decode(codes[:, :number]) for number in range(1, 17)]
    assert all(sound.shape == (1, 1, 4 * FRAME_SIZE) for sound in sounds)
    assert all(bool(sound.isfinite().all()) for sound in sounds)
    assert not torch.equal(sounds[0], sounds[7]) and not torch.equal(sounds[0], sounds[15])


def test_codes_are_counted_between_two_looks() -> None:
    counts = CodeCounts((4, 8), torch.device("cpu"))
    counts.add(torch.tensor([[[0, 1, 2, 3], [5, 5, 5, 5]]]))
    counts.add(torch.tensor([[[0, 1, 2, 3], [6, 6, 6, 6]]]))
    assert counts.read() == pytest.approx(
        {"usage/0": 1.0, "perplexity/0": 4.0, "usage/1": 0.25, "perplexity/1": 2.0}
    )
    counts.add(torch.zeros(1, 2, 3, dtype=torch.int64))
    other = CodeCounts((4, 8), torch.device("cpu"))
    other.load(counts.counts)
    assert other.read()["perplexity/0"] == 1.0


def test_samples_are_shown_and_heard_in_tensorboard(made: Path, tmp_path: Path) -> None:
    run = {"steps": 2, "eval_every": 1}
    config = config_of(made, tmp_path, run=run, samples=1, adversarial=None)
    train(config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["mel/0"]
    assert set(tags["audio"]) == {"sound/0/original", "sound/0/decoded"}
    assert [event.step for event in events.Images("mel/0")] == [0, 1]
    heard = events.Audio("sound/0/decoded")[0]
    assert heard.sample_rate == SAMPLE_RATE and heard.length_frames == 11 * FRAME_SIZE


def test_a_picture_shows_low_tones_at_the_bottom_of_their_own_row() -> None:
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    low, high = (0.5 * (2 * np.pi * pitch * time).sin() for pitch in (200, 6000))
    shown = picture(MultiScaleMel(), (low, high))
    assert shown.shape == (1, 2 * 160 + 2, 47) and 0 <= float(shown.min()) < float(shown.max()) <= 1
    upper, lower = shown[0, :160], shown[0, 162:]
    assert int(upper.sum(1).argmax()) > 130 and int(lower.sum(1).argmax()) < 60
    assert bool((shown[0, 160:162] == 1).all())


# --- Distillation ---------------------------------------------------------------------------------


def save_encoder(path: Path, kind: str) -> str:
    """A speech encoder of `transformers` that nobody trained, as small as they get."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "wavlm":
        config: Any = hf.WavLMConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            conv_dim=(8, 8), conv_kernel=(10, 40), conv_stride=(5, 64), num_buckets=8,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )  # fmt: skip
        model: Any = hf.WavLMModel(config)
        extractor: Any = hf.Wav2Vec2FeatureExtractor(do_normalize=True)
    else:
        config = hf.WhisperConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=80,
            max_source_positions=100, vocab_size=20, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        model, extractor = hf.WhisperModel(config), hf.WhisperFeatureExtractor(chunk_length=2)
    model.save_pretrained(path)
    extractor.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["tokenizer", "wavlm", "whisper"])
def test_a_student_comes_nearer_to_its_teacher(made: Path, tmp_path: Path, kind: str) -> None:
    teacher = (
        str(made / "tokenizer") if kind == "tokenizer" else save_encoder(tmp_path / kind, kind)
    )
    config = distilled(
        made,
        tmp_path / "run",
        teacher,
        adversarial=None,
        optimizer={"lr": 2e-2, "warmup": 2},
        run={"steps": 25, "eval_every": 25},
    )
    path = train(config)
    distances = [row["distillation"] for row in rows(tmp_path / "run") if "distillation" in row]
    assert len(distances) == 25
    assert np.mean(distances[-4:]) < 0.8 * np.mean(distances[:3])
    codec = load_codec(path)
    assert codec.codebooks[0] == (16,) and codec.tokenizer is None
    assert codec.decode(codec.encode(torch.zeros(1, 1, 2 * FRAME_SIZE))).shape == (1, 1, 3840)
    with pytest.raises(UserError, match="no speech tokenizer"):
        load_speech_tokenizer_of(path)


@pytest.mark.parametrize("kind", ["wavlm", "whisper"])
def test_a_teacher_speaks_of_the_crop_alone(tmp_path: Path, kind: str) -> None:
    teacher = load_teacher(save_encoder(tmp_path, kind))
    samples = 10 * FRAME_SIZE
    features = teacher(teacher.prepare(0.1 * torch.randn(2, 1, samples)), samples)
    assert features.shape[::2] == (2, 16) and features.shape[2] == teacher.width
    assert features.shape[1] == pytest.approx(0.8 * 50, abs=1)
    assert pool_frames(features, 10).shape == (2, 10, 16)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_distillation_resumes_too(made: Path, tmp_path: Path) -> None:
    def config(name: str) -> TrainConfig:
        return distilled(made, tmp_path / name, str(made / "tokenizer"), run={"steps": 4})

    whole = train_until(training, config("whole"))
    assert train_until(training, config("parts"), resume=True, clips=3) is None
    parts = train_until(training, config("parts"), resume=True)
    assert whole is not None and parts is not None
    one, other = checkpoints.load(whole).tensors, checkpoints.load(parts).tensors
    assert not [key for key in one if not torch.equal(one[key], other[key])]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_teacher_that_is_none_is_a_user_error(made: Path, tmp_path: Path) -> None:
    import transformers as hf

    text = hf.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    hf.BertModel(text).save_pretrained(tmp_path / "text")
    broken = Path(save_encoder(tmp_path / "broken", "wavlm"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    deaf = Path(save_encoder(tmp_path / "deaf", "wavlm"))
    (deaf / "preprocessor_config.json").unlink()
    for name, said in (
        ("nowhere", "nowhere"),
        (str(tmp_path / "text"), "takes input_ids, no sound"),
        (str(broken), "cannot be loaded"),
        (str(deaf), "cannot be loaded"),
        (str(made / "train"), "config.json"),
    ):
        with pytest.raises(UserError, match=said):
            load_teacher(name)


@pytest.mark.parametrize("kind", ["mimi", "encodec"])
def test_a_codec_is_no_teacher(tmp_path: Path, kind: str) -> None:
    """It takes sound as a speech encoder does, but what it gives back is something else."""
    import transformers as hf

    if kind == "mimi":
        model: Any = hf.MimiModel(hf.MimiConfig(
            hidden_size=16, upsample_groups=16, num_filters=4, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, num_quantizers=2,
            codebook_size=16, codebook_dim=8, vector_quantization_hidden_dimension=8,
        ))  # fmt: skip
    else:
        model = hf.EncodecModel(hf.EncodecConfig(
            hidden_size=8, num_filters=4, codebook_size=16, codebook_dim=8, num_lstm_layers=1,
        ))  # fmt: skip
    model.save_pretrained(tmp_path)
    hf.EncodecFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a {kind} and does not teach .*speech encoder") as told:
        load_teacher(str(tmp_path))
    assert "\n" not in str(told.value)


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"teacher": {"model": "x"}}, "teacher has nothing to teach"),
        ({"model": DISTILLED, "tokenizer": None}, "model.semantic needs a teacher"),
        ({"model": DISTILLED, "teacher": {"model": "x"}}, "both give codebook 0"),
        ({"validation_codebooks": [4]}, "validation_codebooks has 4, but the codec has 1 to 3"),
        ({"dropout_codebooks": [0]}, "dropout_codebooks has 0, but the codec has 1 to 3"),
        ({"adversarial": {"begin": 6}}, "adversarial.begin is step 6, but run.steps ends at 6"),
        ({"adversarial": {"start": 6}}, "unknown key 'adversarial.start'"),
        ({"adversarial": {"loss": "wgan"}}, "adversarial.loss is 'wgan'.*'hinge' or 'lsgan'"),
        ({"adversarial": {"update_share": 0}}, "adversarial.update_share is 0"),
        ({"adversarial": {"discriminators": {"windows": [30]}}}, "discriminators.windows.0 is 30"),
        ({"bypass_share": 2}, "bypass_share is 2"),
        ({"learn": "decoder"}, "learn: decoder keeps the codes of a codec; name it in init_from"),
        ({"learn": "decoder", "init_from": "x"}, "takes tokenizer from init_from; leave"),
        ({"more_codebooks": [8]}, "more_codebooks belongs to learn: decoder"),
        ({"ema": 1}, "ema is 1"),
        ({"model": {**DISTILLED, "semantic": {"size": 0}}}, "model.semantic.size is 0"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_clear_sentence(
    made: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build(layout(made, tmp_path, **changes), TrainConfig, "codec.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["tokenizer", "distilled"])
def test_a_gpu_trains_both_phases_and_goes_on(made: Path, tmp_path: Path, source: str) -> None:
    def config(steps: int) -> TrainConfig:
        changes: dict[str, Any] = {"run": {"steps": steps, "precision": "bf16"}, "samples": 1}
        if source == "tokenizer":
            return config_of(made, tmp_path / "run", **changes)
        return distilled(made, tmp_path / "run", str(made / "tokenizer"), **changes)

    train(config(4))
    AcceleratorState._reset_state(True)
    path = train(config(6), resume=True)
    logged = [row for row in rows(tmp_path / "run") if "mel" in row]
    assert [row["step"] for row in logged] == list(range(6))
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    assert "adversarial" in logged[-1]
    codec = load_codec(path)
    assert codec.encode(torch.zeros(1, 1, FRAME_SIZE)).shape == (1, 3, 1)
