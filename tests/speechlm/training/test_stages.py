"""A model through every stage, by the recipes in configs/; adapters; mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf import write as write_hf
from small import CODEC, small_codec
from typer.testing import CliRunner

from audio_codec import checkpoint, layers
from audio_codec.errors import UserError
from speechlm import convert, lora
from speechlm.cli import app
from speechlm.config import build as build_config
from speechlm.config import load_config
from speechlm.documents import WeightConfig
from speechlm.model import SpeechLM
from speechlm.streams import ABSENT, Streams
from speechlm.text_tokenizer import HFTokenizer
from speechlm.training import lm
from speechlm.training.lm import RatesConfig, TrainConfig, mask_text, set_rates, train
from synth_data import shards
from synth_data.tts import Word

CHAIN = ["text", "interleaved", "audio", "post", "duplex"]
TASKS = ["asr", "tts", "spoken_qa"]
SHAPE = {
    "temporal": {"dim": 16, "layers": 1, "heads": 2, "window": 40},
    "depth": {"dim": 16, "layers": 1, "heads": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec, and data of every kind."""
    path = tmp_path_factory.mktemp("stages")
    checkpoint.save(path / "codec", CODEC, small_codec().state_dict())
    rng = np.random.default_rng(0)

    def sample(number: int, channels: int) -> shards.Sample:
        words = ((Word("two", 1.0, 1.4),), (Word("one", 0.2, 0.5),))
        return shards.Sample(
            id=f"d{number}",
            text="one two",
            words=words[:channels],
            voices=("assistant", "user")[:channels],
            source="test",
            licence="Apache-2.0",
            synthetic=True,
            seconds=2.4,
            codes=rng.integers(0, 9, (channels, 3, 30)).astype(np.uint16),
        )

    shards.write(path / "talk" / "dialogues-000000.tar", [sample(n, 2) for n in range(3)])
    shards.write(path / "single" / "pairs-000000.tar", [sample(n, 1) for n in range(3)])
    (path / "lines.txt").write_text("One two three.\nZebra.\n")
    return path


FOLDERS = {"sentences": "lines.txt", "dialogues": "talk", "spoken_qa": "talk"}


def recipe(root: Path, name: str, made: Path, runs: Path, **changes: Any) -> TrainConfig:
    """A recipe of configs/lm as it stands, but small, on other data and two steps long."""
    config = load_config(root / "configs" / "lm" / f"{name}.yaml", [], TrainConfig)
    tree = config.model_dump(mode="json", exclude_unset=True)
    for source in [*tree["sources"], *tree.get("validation", [])]:
        source["rows"] = 1
        if "path" in source:
            source["path"] = made / FOLDERS.get(source["kind"], "single")
    tree |= {"codec": str(made / "codec"), "length": 60, "dtype": "fp32", "validation_batches": 1}
    tree["run"] |= {"dir": runs / name, "steps": 2, "log_every": 1, "save_every": 2}
    tree["text"] = {"vocab": 120, "quiz": 100}
    if name == "text":
        tree["model"] = SHAPE
    elif config.init_from is not None and config.init_from.startswith("runs/"):
        tree["init_from"] = str(runs / Path(config.init_from).parent.name / "lm")
    return TrainConfig.model_validate({**tree, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Path:
    """The five stages and the three tasks, trained one after the other by their recipes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs")
    root = Path(__file__).resolve().parents[3]
    for name in CHAIN + TASKS:
        train(recipe(root, name, made, path))
    return path


def test_one_model_goes_through_every_stage(runs: Path) -> None:
    delays = {"text": 1, "interleaved": 1, "audio": 2, "post": 1, "duplex": 1}
    for name in CHAIN + TASKS:
        card = json.loads((runs / name / "lm" / "card.json").read_text())
        assert card["steps"] == 2 and card["stage"] == ("tasks" if name in TASKS else name)
        shape = convert.lm_config(runs / name / "lm")
        assert shape.temporal.dim == 16 and shape.streams.text_size < 130
        assert shape.streams.acoustic_delay == delays.get(name, 1)
        # What the run's own config says is what was trained, also where the recipe left it out.
        said = json.loads((runs / name / "config.json").read_text())
        assert said["model"]["temporal"]["dim"] == 16
        assert said["model"]["acoustic_delay"] == delays.get(name, 1)
        assert {"text_mask", "separate_states", "rates", "weights", "loss"} <= said.keys()
        lines = (runs / name / "metrics.jsonl").read_text().splitlines()
        losses = [v for line in lines for v in json.loads(line).values()]
        assert np.isfinite(losses).all()
    duplex = convert.load(runs / "duplex" / "lm")
    assert duplex.step(torch.zeros(1, 1, 1920), duplex.new_state(1)).pcm.shape == (1, 1, 1920)


def test_it_may_begin_at_a_language_model(root: Path, made: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "qwen3")
    changes = {"init_from": str(tmp_path / "hf"), "model": {"depth": SHAPE["depth"]}}
    done = train(recipe(root, "interleaved", made, tmp_path, **changes))
    model, tokenizer = convert.load_lm(done)
    assert isinstance(tokenizer, HFTokenizer) and model.config.temporal.qk_norm
    assert model.config.temporal.window == 750, "the window is ours to choose"
    again = train(recipe(root, "duplex", made, tmp_path, init_from=str(done)))
    assert isinstance(convert.load(again).tokenizer, HFTokenizer)


# ---------------------------------------------------------------------------------- adapters


def test_an_adapter_is_saved_served_and_merged(runs: Path, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    root = Path(__file__).resolve().parents[3]
    base = runs / "duplex" / "lm"
    config = recipe(
        root, "lora", made, tmp_path, init_from=str(base), optimizer={"lr": 0.1, "warmup": 0}
    )
    adapter = train(config)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
    ]
    assert json.loads((adapter / "card.json").read_text())["init_from"] == str(base)
    columns = torch.zeros(1, 40, 5, dtype=torch.long)[:, : convert.load_lm(base)[0].streams.count]
    with torch.no_grad():
        before = convert.load_lm(base)[0](columns)
        unmerged = convert.load_lm(adapter)[0](columns)
        said = CliRunner().invoke(app, ["merge", str(adapter), str(tmp_path / "m"), "--dtype=fp32"])
        assert said.exit_code == 0, said.output
        merged = convert.load_lm(tmp_path / "m")[0](columns)
    assert not torch.allclose(before, unmerged, atol=1e-3), "it has learned something"
    assert torch.allclose(unmerged, merged, atol=1e-5)
    same, other = checkpoint.load(base), checkpoint.load(tmp_path / "m")
    assert same.tensors.keys() == other.tensors.keys()
    changed = {n for n in same.tensors if not torch.equal(same.tensors[n], other.tensors[n])}
    assert changed and all(
        name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight", "inputs.weight"))
        for name in changed
    )
    # Served unmerged and merged, it says the same.
    sounds = []
    for folder in (adapter, tmp_path / "m"):
        duplex = convert.load(folder)
        state = duplex.new_state(1)
        pcm = torch.linspace(-0.1, 0.1, 1920).view(1, 1, -1)
        sounds.append(torch.cat([duplex.step(pcm, state).pcm for _ in range(6)]))
    assert torch.allclose(*sounds, atol=1e-4)


def test_an_adapter_of_a_base_in_int8_is_heard_in_live_frames(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    base = tmp_path / "base"
    whole, tokenizer = convert.load_lm(runs / "duplex" / "lm")
    codec = str(convert.codec_folder(runs / "duplex" / "lm"))
    whole.config = whole.config.model_copy(update={"codec": codec})
    convert.save(base, whole, tokenizer, dtype="int8")
    model = convert.load_lm(base)[0]
    adapted = lora.attach(model, lora.LoraConfig(), str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lora.save(tmp_path / "adapter", adapted, {})

    def streamed(folder: Path) -> torch.Tensor:
        duplex = convert.load(folder)
        state = duplex.model.new_state(1)
        columns = torch.zeros(1, duplex.model.streams.count, 1, dtype=torch.long)
        with torch.inference_mode():
            return torch.cat([duplex.model(columns, state) for _ in range(4)], dim=1)

    live, plain = streamed(tmp_path / "adapter"), streamed(base)
    monkeypatch.setattr(layers, "FEW", 0)
    torch.testing.assert_close(live, streamed(tmp_path / "adapter"), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(live, plain, atol=0.01)


def test_an_adapter_resumes_to_the_same_numbers(runs: Path, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    root = Path(__file__).resolve().parents[3]
    base = str(runs / "duplex" / "lm")

    def run(name: str, steps: int, resume: bool = False) -> Path:
        layout = {"dir": tmp_path / name, "steps": steps, "log_every": 1, "save_every": 1}
        config = recipe(
            root,
            "lora",
            made,
            tmp_path,
            init_from=base,
            run=layout,
            optimizer={"lr": 0.01, "warmup": 0, "decay": 0},
        )
        return train(config, resume=resume)

    whole = run("whole", 3)
    run("parts", 1)
    parts = run("parts", 3, resume=True)
    one, other = (
        checkpoint.read_weights(path / "adapter_model.safetensors") for path in (whole, parts)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_lies_between_two_models(runs: Path, tmp_path: Path) -> None:
    post, duplex = (str(runs / name / "lm") for name in ("post", "duplex"))
    one, other = (convert.load_lm(name)[0].state_dict() for name in (post, duplex))
    said = CliRunner().invoke(
        app, ["average", post, duplex, str(tmp_path / "m"), "--share=0.25", "--dtype=fp32"]
    )
    assert said.exit_code == 0, said.output
    between = convert.load_lm(tmp_path / "m")[0].state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * other[name])
    convert.load(tmp_path / "m")  # with its codec
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card["average"] == [post, duplex] and card["share"] == 0.25
    with pytest.raises(UserError, match=r"share is 1\.5; give a number from 0 to 1"):
        convert.average(post, duplex, tmp_path / "n", 1.5)
    with pytest.raises(UserError, match="have other streams"):
        convert.average(duplex, str(runs / "audio" / "lm"), tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_broken_adapters_are_named(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"has no adapter_config\.json; name an adapter"):
        convert.merge_adapter(runs / "duplex" / "lm", tmp_path / "out")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say which base_model_name_or_path"):
        convert.load_lm(tmp_path / "a")
    gone = {"base_model_name_or_path": str(tmp_path / "gone"), "peft_type": "LORA"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(UserError, match="gone' is neither a directory"):
        convert.load(tmp_path / "a")
    gone["base_model_name_or_path"] = str(runs / "duplex" / "lm")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(gone))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"half of")
    with pytest.raises(UserError, match="truncated or corrupt"):
        convert.load(tmp_path / "a")


# ---------------------------------------------------------------------------------- switches


def model_of(runs: Path) -> SpeechLM:
    return convert.load_lm(runs / "duplex" / "lm")[0].train()


def test_parts_have_rates_of_their_own(runs: Path) -> None:
    model = model_of(runs)
    rates = RatesConfig(temporal=0.5, depth=0, text=0.75)
    optimizer = TrainConfig.model_fields["optimizer"].default.proposed(10**4).build(model)
    before = {id(p) for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    set_rates(optimizer, model, rates)
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(after) == len(before) and {id(p) for p in after} == before
    scale = {id(p): g["scale"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        expected = {"temporal": 0.5, "depth": 0.0, "codes": 1.0}.get(part, 0.75)
        if part.endswith("role"):
            expected = 1.0
        assert scale[id(parameter)] == expected, name


def test_a_rate_of_zero_freezes_a_part(root: Path, runs: Path, made: Path, tmp_path: Path) -> None:
    base = runs / "text" / "lm"
    frozen = {"temporal": 0, "text": 0, "codes": 0}
    done = train(recipe(root, "duplex", made, tmp_path, init_from=str(base), rates=frozen, ema=0.0))
    before, after = checkpoint.load(base).tensors, checkpoint.load(done).tensors
    for name, weight in before.items():
        same = torch.equal(weight, after[name])
        assert same != name.startswith("depth."), name


def test_states_of_text_and_sound_are_apart(
    root: Path, runs: Path, made: Path, tmp_path: Path
) -> None:
    """Sound alone moves the depth transformer; each optimizer has seen its own gradients."""
    train(recipe(root, "audio", made, tmp_path, init_from=str(runs / "interleaved" / "lm")))
    saved = torch.load(tmp_path / "audio" / "checkpoint.pt", weights_only=True)["state"]
    states = [saved[name]["state"] for name in ("text_optimizer", "optimizer")]
    assert 0 < len(states[0]) < len(states[1]), "text has no gradient for the depth transformer"
    shared = states[0].keys() & states[1].keys()
    moments = [torch.cat([s[k]["exp_avg"].flatten() for k in sorted(shared)]) for s in states]
    assert not torch.allclose(*moments)
    assert [max(int(s["step"]) for s in state.values()) for state in states] == [2, 2]


def test_the_assistants_text_is_masked_where_its_voice_is() -> None:
    from speechlm.model import Batch

    streams = Streams(text_size=20, codebooks=((5,), (5,)))
    inputs = torch.ones(2, streams.count, 50, dtype=torch.long)
    inputs[1, streams.own] = ABSENT
    batch = Batch(inputs, inputs, torch.ones(inputs.shape), None)
    masked = mask_text(batch, streams, 0.3, np.random.default_rng(0)).inputs
    share = (masked[0, streams.text_index] == ABSENT).float().mean()
    assert 0.1 < share < 0.5
    assert torch.equal(masked[1], inputs[1]) and torch.equal(masked[:, 1:], inputs[:, 1:])
    assert mask_text(batch, streams, 0.0, np.random.default_rng(0)) is batch


# ------------------------------------------------------------------------------- bad configs


BASE: dict[str, Any] = {
    "run": {"dir": "never", "steps": 1},
    "codec": "none",
    "sources": [{"kind": "quiz", "rows": 1}],
}
TALK = {"kind": "dialogues", "path": "talk", "rows": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "text", "sources": [TALK]}, "a source of kind dialogues belongs to another"),
        ({"stage": "duplex"}, "none of the sources is of kind dialogues"),
        ({"stage": "tasks"}, "none of the sources is of kind asr or spoken_qa or tts"),
        ({"stage": "pretrain"}, "stage is 'pretrain'"),
        ({"loss": {"text": 0, "heard": 0, "audio": 0}}, "are all 0; nothing is learned"),
        ({"loss": {"herd": 1}}, "unknown key 'loss.herd'; did you mean 'heard'"),
        ({"rates": {"dept": 1}}, "unknown key 'rates.dept'; did you mean 'depth'"),
        ({"sources": [{"kind": "quiz", "rows": 0}]}, r"sources\.0\.quiz\.rows is 0"),
        ({"sources": [{"kind": "asd", "path": "x", "rows": 1}]}, "'asr', 'tts'"),
        ({"sources": [{"kind": "asr", "path": "x", "rows": 1, "answer": "song"}]}, "answer"),
        ({"lora": {}}, "lora is a difference to a model; name it in init_from"),
        ({"separate_states": True}, "needs sources of text alone and of sound"),
        ({"average_from": 0.9}, r"average_from is 0\.9, but no checkpoint follows"),
        ({"optimizer": {"clip": 0}}, r"optimizer\.clip is 0"),
        ({"optimizer": {"betas": [1.0, 0.9]}}, r"optimizer\.betas\.0 is 1"),
    ],
)
def test_a_config_that_cannot_be_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build_config({**BASE, **changes}, TrainConfig, "recipe.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"temporal": {"dim": 32, "layers": 1, "heads": 2}}},
            r"model\.temporal\.dim is 32, but init_from '.*' has 16",
        ),
        ({"model": {"heard": False}}, r"model\.heard is False, but init_from '.*' has True"),
        ({"model": {"predicts_user": True}}, r"model\.predicts_user is True"),
        ({"weights": {"user": 1}}, r"weights\.user is 1, but the model does not predict"),
        ({"model": {"acoustic_delay": [1, 2, 3]}}, "one for each of the 2 acoustic codebooks"),
        (
            {"lora": {}, "model": {"acoustic_delay": 2}},
            r"model\.acoustic_delay is 2, but an adapter keeps that of init_from '.*', 1;",
        ),
        (
            {"lora": {}, "sampling": {"text": {"temperature": 0.1}}},
            r"sampling is .*, but an adapter keeps that of init_from",
        ),
    ],
)
def test_a_checkpoint_of_another_shape_is_named_before_training(
    root: Path, runs: Path, made: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    base = str(runs / "post" / "lm")
    with pytest.raises(UserError, match=said):
        train(recipe(root, "duplex", made, tmp_path, init_from=base, **changes))
    assert (
        not (tmp_path / "duplex" / "metrics.jsonl").exists()
        or not (tmp_path / "duplex" / "metrics.jsonl").read_text()
    )


def test_what_cannot_be_begun_at_is_named(root: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    with pytest.raises(UserError, match="is an adapter; make it a model first: speechlm merge"):
        train(recipe(root, "duplex", made, tmp_path, init_from=str(tmp_path / "a")))
    write_hf(tmp_path / "hf", "llama")
    with pytest.raises(UserError, match="is a language model of text: train it whole first"):
        train(recipe(root, "lora", made, tmp_path, init_from=str(tmp_path / "hf")))


def test_what_no_weight_depends_on_may_change(
    root: Path, runs: Path, made: Path, tmp_path: Path
) -> None:
    base = str(runs / "post" / "lm")
    model = {"acoustic_delay": [0, 2], "temporal": {**SHAPE["temporal"], "window": 9}}
    config = recipe(root, "duplex", made, tmp_path, init_from=base, model=model)
    resolved = lm.resolve_shape(config)
    assert resolved.model.temporal.window == 9 and resolved.model.acoustic_delay == (0, 2)
    assert lm.resolve_shape(resolved) == resolved, "a run's config.json can be trained again"


def test_a_vocabulary_of_another_model_is_named(
    root: Path, runs: Path, made: Path, tmp_path: Path
) -> None:
    from speechlm.text_tokenizer import train_text_tokenizer

    model, _ = convert.load_lm(runs / "post" / "lm")
    other = train_text_tokenizer(["some other words"] * 3, 80)
    wrong = convert.save(tmp_path / "wrong", model, other, bundle=False)
    with pytest.raises(UserError, match="vocabulary of .* pieces, but the model was trained with"):
        train(recipe(root, "duplex", made, tmp_path, init_from=str(wrong)))


def test_the_weights_of_the_users_codes_train_them(root: Path, made: Path, tmp_path: Path) -> None:
    changes = {
        "init_from": None,
        "model": {**SHAPE, "predicts_user": True},
        "weights": WeightConfig(user=0.5),
        "ema": 0.0,
    }
    done = train(recipe(root, "duplex", made, tmp_path, **changes))
    assert convert.lm_config(done).predicts_user
    lines = (tmp_path / "duplex" / "metrics.jsonl").read_text().splitlines()
    assert all("dialogues/user_semantic" in json.loads(line) for line in lines[:2])
