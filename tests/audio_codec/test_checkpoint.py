"""Checkpoints: what goes in comes out, what is broken is named, what was there is never lost."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import Killed
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors.torch import load_file, save_file
from small import CODEC
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec.codec import load_codec, locate
from audio_codec.errors import UserError
from audio_codec.mimi import MimiCodec, MimiConfig, read_kyutai, save_hf, to_public
from audio_codec.spectral import SpectralCodec
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig, load_tokenizer


class Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    width: PositiveInt = 32


class Model(nn.Module):
    count: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 48)
        self.thin = nn.Linear(width, 3)
        self.register_buffer("count", torch.tensor(7))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def store(directory: Path, **how: Any) -> Model:
    model = Model()
    checkpoints.save(directory, Shape(), model.state_dict(), **how)
    return model


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


# --- Round trip -----------------------------------------------------------------------------------


def test_float32_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = store(tmp_path / "a", dtype="fp32", card={"score": 1.5}, files={"x.bin": b"\0\1"})
    found = checkpoints.load(tmp_path / "a")
    assert found.config == {"width": 32} and found.card == {"score": 1.5}
    assert found.tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert (
            torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype
        )
    assert (tmp_path / "a" / "x.bin").read_bytes() == b"\0\1"
    fresh = Model()
    checkpoints.restore(fresh, found)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True)
    )


def test_bfloat16_rounds_matrices_and_keeps_vectors(tmp_path: Path) -> None:
    model = store(tmp_path / "a", dtype="bf16")
    found = checkpoints.load(tmp_path / "a").tensors
    assert all(t.dtype == torch.float32 for t in found.values() if t.is_floating_point())
    assert torch.equal(found["wide.weight"], model.wide.weight.bfloat16().float())
    assert torch.equal(found["wide.bias"], model.wide.bias)
    assert found["count"].item() == 7


@settings(max_examples=20, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 30), min_size=16, max_size=16),
    zero=st.integers(0, 15),
    seed=st.integers(0, 99),
)
def test_int8_is_wrong_by_half_a_step_of_its_own_row(
    tmp_path_factory: pytest.TempPathFactory, exponents: list[int], zero: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 24, generator=generator) * 2.0 ** torch.tensor(exponents).view(-1, 1)
    weight[zero] = 0
    path = tmp_path_factory.mktemp("int8")
    checkpoints.save(path, Shape(), {"w": weight, "b": weight[0]}, dtype="int8")
    found = checkpoints.load(path).tensors
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((found["w"] - weight).abs() <= 0.5001 * step + 1e-12).all())
    assert torch.equal(found["b"], weight[0])
    assert found.keys() == {"w", "b"}
    # The largest number of a row is hit exactly, up to float rounding.
    torch.testing.assert_close(found["w"].abs().amax(1), weight.abs().amax(1))


def test_int8_is_a_quarter_of_the_size_and_spares_thin_matrices(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("fp32", "bf16", "int8"):
        weights = {"w": torch.randn(256, 256), "thin": torch.randn(8, 256)}
        checkpoints.save(tmp_path / dtype, Shape(), weights, dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
        found = checkpoints.load(tmp_path / dtype).tensors
        exact = weights["thin"] if dtype == "fp32" else weights["thin"].bfloat16().float()
        assert torch.equal(found["thin"], exact)
    assert sizes["bf16"] < 0.51 * sizes["fp32"] and sizes["int8"] < 0.27 * sizes["fp32"]


def test_tensors_that_share_or_stride_memory_are_stored(tmp_path: Path) -> None:
    base = torch.randn(20, 30)
    weights = {"a": base, "b": base, "t": base.T, "row": base[3], "every": base[:, ::2]}
    checkpoints.save(tmp_path / "a", Shape(), weights, dtype="fp32")
    found = checkpoints.load(tmp_path / "a").tensors
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_read_one_by_one_the_tensors_are_the_same(
    tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "a", dtype=dtype)
    whole, lazy = (checkpoints.load(tmp_path / "a", lazily=on) for on in (False, True))
    assert set(lazy.tensors) == set(whole.tensors) and len(lazy.tensors) == len(whole.tensors)
    assert all(torch.equal(lazy.tensors[name], whole.tensors[name]) for name in whole.tensors)
    monkeypatch.setattr(checkpoints, "_read_file", None)  # nothing is read as a whole
    other = Model()
    checkpoints.restore(other, checkpoints.load(tmp_path / "a", lazily=True))
    found = tensors_of(other)
    assert all(torch.equal(found[name], whole.tensors[name]) for name in whole.tensors)
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated or corrupt"):
        checkpoints.load(tmp_path / "a", lazily=True)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    weights = tensors_of(Model())
    for name in ("a", "b"):
        checkpoints.save(tmp_path / name, Shape(), weights, dtype="int8", card={"x": 1})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_every_truncation_of_every_file_is_a_user_error(tmp_path: Path, dtype: Any) -> None:
    good = tmp_path / "good"
    checkpoints.save(
        good, Shape(), {"w": torch.randn(16, 16)}, dtype=dtype, card={"trainee": "x", "steps": 3}
    )
    whole = checkpoints.load(good)
    broken = shutil.copytree(good, tmp_path / "broken")
    refused = 0
    for file in sorted(good.iterdir()):
        content = file.read_bytes()
        # Every length of the headers and texts, a sample of the tail.
        for length in (*range(min(len(content), 300)), *range(300, len(content), 37)):
            (broken / file.name).write_bytes(content[:length])
            if file.suffix == ".json" and content[:length].rstrip() == content.rstrip():
                assert checkpoints.load(broken).config == whole.config  # only a newline less
                continue
            with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
                checkpoints.load(broken)
            refused += 1
        (broken / file.name).write_bytes(content)
    assert refused > 300
    assert torch.equal(checkpoints.load(broken).tensors["w"], whole.tensors["w"])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a"
    if not path.exists():
        checkpoints.save(path, Shape(), {"w": torch.randn(16, 16)}, dtype="int8", card={"a": 1})
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "card.json"]))
    content = (path / name).read_bytes()
    at = data.draw(st.integers(0, min(len(content), 200) - 1))
    spoilt = bytearray(content)
    spoilt[at] ^= data.draw(st.integers(1, 255))
    (path / name).write_bytes(bytes(spoilt))
    try:
        found = checkpoints.load(path)
    except UserError as error:
        assert name in str(error)
    else:
        assert isinstance(found.config, dict) and isinstance(found.card, dict)
    finally:
        (path / name).write_bytes(content)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    store(tmp_path / "a")
    (tmp_path / "a" / missing).unlink()
    with pytest.raises(UserError, match=r"config\.json|safetensors"):
        checkpoints.load(tmp_path / "a")


@pytest.mark.parametrize("content", ["[1, 2]", '"x"', "null", "3", b"\xff\xfe{}"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str | bytes) -> None:
    store(tmp_path / "a")
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "a" / "config.json").write_bytes(raw)
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoints.load(tmp_path / "a")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        store(tmp_path / name)
        (tmp_path / name / name).unlink()
        (tmp_path / name / name).mkdir()
        with pytest.raises(UserError, match=name):
            checkpoints.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("thin.bias"), r"'thin.bias' is missing, expected float32 \(3,\)"),
        (lambda t: t.update(extra=torch.zeros(2)), "'extra' has no place"),
        (lambda t: t.update({"wide.weight": t["wide.weight"].T}), r"'wide.weight' has shape"),
        (
            lambda t: t.update(count=torch.tensor(7.5)),
            r"'count' is float32 \(\), expected int64 \(\)",
        ),
        (
            lambda t: t.update({"thin.bias": torch.zeros(3, dtype=torch.int32)}),
            r"'thin.bias' is int32 \(3,\), expected float32 \(3,\)",
        ),
        (lambda t: t["wide.weight"].view(-1)[5].fill_(float("nan")), "'wide.weight' holds NaN"),
        (lambda t: t["thin.bias"][0].fill_(float("inf")), "'thin.bias' holds NaN or inf"),
        (lambda t: t["wide.weight"][40].fill_(float("-inf")), "'wide.weight' holds NaN or inf"),
        (lambda t: t.clear(), "is missing"),
    ],
    ids=[
        "missing",
        "extra",
        "shape",
        "float_for_int",
        "int_for_float",
        "nan",
        "inf",
        "inf_row",
        "empty",
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, dtype: Any, change: Any, named: str
) -> None:
    model = Model()
    before = tensors_of(model)
    weights = tensors_of(model)
    change(weights)
    checkpoints.save(tmp_path / "a", Shape(), weights, dtype=dtype)
    with pytest.raises(UserError, match=named):
        checkpoints.restore(model, checkpoints.load(tmp_path / "a"))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "scale", "named"),
    [
        ("w", torch.ones(15), r"'w::scale' is float32 \(15,\), expected .* 'w', .* \(16, 16\)"),
        ("w", torch.ones(16, 1), r"'w::scale' is float32 \(16, 1\)"),
        ("w", torch.tensor(1.0), r"'w::scale' is float32 \(\)"),
        ("w", torch.ones(16, dtype=torch.int64), r"'w::scale' is int64"),
        ("v", torch.ones(16), r"'v::scale' is float32 \(16,\), .* 'v', .* \(16,\)"),
    ],
)
def test_a_scale_that_does_not_fit_its_matrix_is_named(
    tmp_path: Path, name: str, scale: Tensor, named: str
) -> None:
    stored = {"w": torch.ones(16, 16, dtype=torch.int8), "v": torch.ones(16), "w::scale": scale}
    stored = {**stored, "w::scale": torch.ones(16), f"{name}::scale": scale}
    (tmp_path / "config.json").write_text("{}")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=named):
        checkpoints.load(tmp_path)


def test_a_scale_alone_and_a_matrix_without_one_are_named(tmp_path: Path) -> None:
    model = Model()
    checkpoints.save(tmp_path, Shape(), model.state_dict(), dtype="int8")
    stored = load_file(tmp_path / "model.safetensors")
    for name, named in (
        ("wide.weight", "'wide.weight' is missing"),
        ("wide.weight::scale", r"'wide.weight' is int8 \(48, 32\), expected float32"),
    ):
        save_file(
            {key: value for key, value in stored.items() if key != name},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(UserError, match=named):
            checkpoints.restore(model, checkpoints.load(tmp_path))


def test_a_config_field_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for config, named in (
        ({"width": -1}, "width"),
        ({"widht": 3}, "widht"),
        ({"width": "x"}, "width"),
    ):
        found = checkpoints.Checkpoint(tmp_path, config, {})
        with pytest.raises(UserError, match=f"field '{named}'"):
            checkpoints.parse_config(Shape, found)


# --- Saving over what is there --------------------------------------------------------------------


def test_a_new_checkpoint_replaces_the_whole_old_one(tmp_path: Path) -> None:
    store(tmp_path / "a", files={"old.bin": b"old"})
    store(tmp_path / "a", card={"new": 1})
    assert set(contents(tmp_path / "a")) == {"config.json", "model.safetensors", "card.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "at", ["write_text", "write_bytes", "save_file", "first", "second", "rmtree"]
)
@pytest.mark.parametrize("error", [Killed, OSError])
def test_an_interrupted_save_never_destroys_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: type[BaseException]
) -> None:
    target = tmp_path / "a"
    store(target, card={"which": "old"}, dtype="fp32")
    old, renames = contents(target), 0
    real_rename, real_rmtree = Path.rename, shutil.rmtree

    def fail(*_: Any, **__: Any) -> None:
        raise error("interrupted")

    def rename(self: Path, to: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == {"first": 1, "second": 2}.get(at):
            fail()
        return real_rename(self, to)

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if at == "rmtree" and "old" in Path(path).name:
            fail()
        real_rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(shutil, "rmtree", rmtree)
        if at in ("write_text", "write_bytes"):
            patch.setattr(Path, at, fail)
        if at == "save_file":
            patch.setattr(checkpoints, "save_file", fail)
        with pytest.raises(error):
            store(target, card={"which": "new"}, files={"x": b"x"})
    if at == "rmtree":  # the new one is in place and whole; the old one could not be cleared away
        assert checkpoints.load(target).card == {"which": "new"}
    else:
        assert contents(target) == old
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
    # Whatever was left behind, the next save goes through.
    store(target, card={"which": "next"})
    assert checkpoints.load(target).card == {"which": "next"}


def test_a_process_killed_between_the_two_moves_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    store(target, card={"which": "old"})
    old = contents(target)
    real_rename = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if to == target:  # no move back either: a dead process puts nothing right
            raise Killed
        return real_rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            store(target, card={"which": "new"})
    assert [contents(path) for path in tmp_path.iterdir()] == [old]
    store(target, card={"which": "next"})
    assert checkpoints.load(target).card == {"which": "next"}


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is no folder"):
        checkpoints.check_replaceable(tmp_path / "file" / "model")
    checkpoints.check_replaceable(tmp_path / "new" / "model")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="home"):
        store(precious)
    assert contents(precious) == {"thesis.tex": b"years of work"}
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="file"):
        store(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"
    (tmp_path / "empty").mkdir()
    store(tmp_path / "empty")
    assert checkpoints.load(tmp_path / "empty").config == {"width": 32}
    assert {path.name for path in tmp_path.iterdir()} == {"home", "file", "empty"}


# --- Names ----------------------------------------------------------------------------------------


def test_a_process_that_imported_nothing_else_finds_the_shipped_weights() -> None:
    asked = "from audio_codec.checkpoint import resolve; print(resolve('tiny') / 'config.json')"
    found = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_file()


def test_names_paths_and_the_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "shipped", lambda: {"small": tmp_path})
    (tmp_path / "part").mkdir()
    assert checkpoints.resolve("small") == tmp_path
    assert checkpoints.resolve("small/part") == tmp_path / "part"
    assert checkpoints.resolve(tmp_path) == tmp_path == checkpoints.resolve(str(tmp_path))
    for wrong in ("large", "small/other", str(tmp_path / "none"), "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="small"):
            checkpoints.resolve(wrong)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://name", "hf://a/b", "hf://a/../..", "hf://a b/c"]
)
def test_a_hub_that_does_not_answer_is_a_user_error(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf://"):
        checkpoints.resolve(address)


def test_a_folder_of_a_hub_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store(tmp_path / "codec")
    asked = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert checkpoints.load("hf://org/name/codec").config == {"width": 32}
    checkpoints.resolve("hf://org/name", ("*.json", "x"))
    assert asked == [("org/name", ["codec/*"]), ("org/name", ["*.json", "x"])]


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ("config.json: moshi, tokenizer-e3.safetensors, model.safetensors, a.model", "ct"),
        ("config.json: stt, mimi-pytorch-e3.safetensors, model.safetensors", "cm"),
        ("config.json: mimi, model.safetensors, preprocessor_config.json, pytorch_model.bin", "cm"),
        ("config.json: mimi, model-00001-of-2.safetensors, model-00002-of-2.safetensors", "cmm"),
        ("config.json: encodec, model.safetensors, pytorch_model.bin, tf_model.h5", "cm"),
        ("config.json: ours, model.safetensors, card.json", "cm"),
        ("any.safetensors, README.md", "a"),
        ("config.json: llama, model.safetensors", "c"),
    ],
)
def test_no_more_is_fetched_than_a_codec_is_made_of(
    there: str, taken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        for name, *kind in (entry.split(": ") for entry in there.split(", ")):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                config = {"kind": "spectral"} if kind == ["ours"] else {"model_type": "".join(kind)}
                (tmp_path / name).write_text(json.dumps(config))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("hf://org/name") == tmp_path
    assert "".join(sorted(path.name[0] for path in tmp_path.iterdir())) == taken


# --- What is built from a checkpoint --------------------------------------------------------------

SMALL = TokenizerConfig(
    front_dim=8, front_blocks=1, dim=16, heads=2, layers_before=1, layers_after=1, levels=(3, 3)
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 17),
        ("dim", 18),
        ("heads", 3),
        ("front_blocks", -1),
        ("window_seconds", 0.0),
        ("window_seconds", 0.01),
        ("levels", []),
        ("levels", [3, 0]),
        ("levels", [7, -5]),
        ("dropout", 1.5),
        ("depth", 3),
    ],
)
def test_a_tokenizer_config_that_cannot_be_is_a_user_error(
    tmp_path: Path, field: str, value: Any
) -> None:
    checkpoints.save(tmp_path / "a", SMALL, SpeechTokenizer(SMALL).state_dict())
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(UserError, match=field):
        load_tokenizer(tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "mimi"),
        ("window", 100),
        ("window", 240),
        ("codebooks", []),
        ("codebooks", [16, 0]),
        ("encoder_blocks", -1),
        ("tokenizer", {"dim": 17}),
    ],
)
def test_a_codec_config_that_cannot_be_is_a_user_error(
    tmp_path: Path, field: str, value: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"kind": "spectral", field: value}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=field):
        load_codec(tmp_path)


MIMI = MimiConfig(
    hidden_size=8,
    upsample_groups=8,
    num_filters=2,
    upsampling_ratios=(5, 4),
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=8,
    num_quantizers=3,
    codebook_size=4,
    codebook_dim=4,
    vector_quantization_hidden_dimension=4,
)


def write_codec(form: str, folder: Path) -> Path:
    """A codec's checkpoint in one of the formats that there are; its file of weights."""
    torch.manual_seed(0)
    if form == "spectral":
        checkpoints.save(folder, CODEC, SpectralCodec(CODEC).state_dict(), dtype="fp32")
    elif form == "hf":
        save_hf(folder, MimiCodec(MIMI))
    else:
        folder.mkdir()
        save_file(to_public(MimiCodec(MIMI), "kyutai"), folder / "model.safetensors")
    return folder / "model.safetensors"


def read_codec(form: str, file: Path) -> nn.Module:
    return read_kyutai(file, MIMI) if form == "kyutai" else load_codec(file.parent)


FORMS = ["spectral", "hf", "kyutai"]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_codec_names_the_tensor_and_what_was_expected(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    file = write_codec(form, tmp_path_factory.mktemp("fuzz") / "a")
    tensors = load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    good = tensors[name]
    kind = f"{str(good.dtype).removeprefix('torch.')} {tuple(good.shape)}"
    floating = good.is_floating_point()
    damage = data.draw(
        st.sampled_from(["missing", "extra", "shape", "dtype", *["nan", "inf"] * floating])
    )
    if damage == "missing":
        del tensors[name]
        said = f"tensor '{name}' is missing, expected {kind}"
    elif damage == "extra":
        extra = data.draw(st.sampled_from([name + ".x", name[:-1], "zz"]))
        tensors[extra] = torch.zeros(2)
        said = f"tensor '{extra}' has no place in this model"
    elif damage == "shape":
        shapes = [(1, *good.shape), (*good.shape, 1)]
        for axis, size in enumerate(good.shape):
            shapes += [(*good.shape[:axis], size + by, *good.shape[axis + 1 :]) for by in (-1, 1)]
        shape = data.draw(st.sampled_from(shapes))
        tensors[name] = torch.zeros(shape, dtype=good.dtype)
        said = f"tensor '{name}' has shape {shape}, expected {tuple(good.shape)}"
    elif damage == "dtype":
        others = [torch.int8, torch.int64, torch.bool if floating else torch.float32]
        dtype = data.draw(st.sampled_from([dtype for dtype in others if dtype != good.dtype]))
        tensors[name] = torch.zeros(good.shape, dtype=dtype)
        found = f"{str(dtype).removeprefix('torch.')} {tuple(good.shape)}"
        said = f"tensor '{name}' is {found}, expected {kind}"
    else:
        at = data.draw(st.integers(0, good.numel() - 1))
        good.view(-1)[at] = float(damage)
        said = f"tensor '{name}' holds NaN or infinity, expected finite numbers"
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        read_codec(form, file)
    assert said in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_codec_is_refused_and_a_whole_one_is_not(tmp_path: Path, form: str) -> None:
    file = write_codec(form, tmp_path / "a")
    content = file.read_bytes()
    for length in (0, 7, 8, 9, 500, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.safetensors' are truncated or corrupt"):
            read_codec(form, file)
    file.write_bytes(content)
    assert not read_codec(form, file).training


def test_other_floating_point_types_will_do(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        file = write_codec("hf", tmp_path / str(dtype))
        expected = {name: t.to(dtype).float() for name, t in load_file(file).items()}
        save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)
        codec = load_codec(file.parent)
        assert isinstance(codec, MimiCodec)
        found = to_public(codec, "hf")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", ["spectral", "hf"])
def test_any_codec_keeps_as_many_codebooks_as_are_asked(tmp_path: Path, form: str) -> None:
    folder = write_codec(form, tmp_path / "a").parent
    whole = load_codec(folder)
    pcm = 0.1 * torch.randn(1, 1, 4 * whole.frame_size)
    codes = whole.encode(pcm)
    for count in (1, 2, 3):
        codec = load_codec(folder, count)
        assert codec.codebooks == whole.codebooks[:count]
        assert torch.equal(codec.encode(pcm), codes[:, :count])
        assert torch.equal(codec.decode(codes[:, :count]), whole.decode(codes[:, :count]))
    for count in (0, 4):
        with pytest.raises(UserError, match=f"codebooks={count}.* 1 … 3"):
            load_codec(folder, count)


def test_a_tokenizer_comes_back_ready_for_inference(tmp_path: Path) -> None:
    model = SpeechTokenizer(SMALL).eval()
    checkpoints.save(tmp_path / "a", SMALL, model.state_dict(), dtype="fp32")
    found = load_tokenizer(tmp_path / "a")
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    pcm = 0.1 * torch.randn(1, 1, 3 * 1920)
    assert torch.equal(found.encode(pcm), model.encode(pcm))
