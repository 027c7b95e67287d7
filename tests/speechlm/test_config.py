"""A recipe is checked before anything is computed, and mistakes are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from audio_codec.errors import UserError
from speechlm.config import build, load_config


class Part(BaseModel):
    model_config = ConfigDict(frozen=True)
    dim: int = 8
    kind: Literal["fast", "slow"] = "fast"
    rate: float = 1.0


class Noise(BaseModel):
    level: Annotated[float, Field(le=0)] = -30.0


class Whole(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    part: Part = Part()
    spare: Part | None = None
    parts: list[Part] = []
    noises: dict[str, Noise] = {}
    where: Path = Path("runs")
    bounds: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _rule(self) -> Whole:
        if self.name == self.part.kind:
            raise ValueError("name and part.kind must differ")
        return self


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "whole.yaml"
    path.write_text("name: a\npart: {dim: 16}\nparts: [{dim: 1}, {dim: 2}]\nbounds: [1, 2]\n")
    return path


def message(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides or [], Whole)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_yaml_and_overrides_make_a_frozen_tree(recipe: Path) -> None:
    config = load_config(
        recipe,
        ["part.kind=slow", "part.rate=1e-4", "parts.1.dim=5", "spare.dim=3", "name=b=c",
         "noises.rain.level=-10", "bounds=[4,5,6]"],
        Whole,
    )  # fmt: skip
    assert config.part == Part(dim=16, kind="slow", rate=1e-4)
    assert [part.dim for part in config.parts] == [1, 5]
    assert config.spare == Part(dim=3) and config.noises["rain"].level == -10
    assert config.name == "b=c" and config.bounds == (4, 5, 6)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


def test_extends_lays_the_file_over_its_base(recipe: Path) -> None:
    child = recipe.parent / "small" / "whole.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../whole.yaml\npart: {kind: slow}\nbounds: [9]\n")
    grandchild = recipe.parent / "smaller.yaml"
    grandchild.write_text("extends: small/whole.yaml\nname: ${part.kind} one\n")
    config = load_config(grandchild, [], Whole)
    assert config.name == "slow one" and config.bounds == (9,)
    assert config.part == Part(dim=16, kind="slow")


def test_extends_in_a_circle_or_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends itself" in message(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("extends: c.yaml\n")
    assert "c.yaml" in message(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("extends: [c.yaml]\n")
    assert "one file" in message(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("nam=x", "'nam'", "'name'"),
        ("part.dimm=3", "'part.dimm'", "'dim'"),
        ("spare.kid=fast", "'spare.kid'", "'kind'"),
        ("parts.0.dm=3", "'parts.0.dm'", "'dim'"),
        ("noises.rain.levl=3", "'noises.rain.levl'", "'level'"),
    ],
)
def test_an_unknown_key_names_the_near_miss_and_the_choices(
    recipe: Path, override: str, key: str, near: str
) -> None:
    said = message(recipe, [override])
    assert (
        key in said and f"did you mean {near}?" in said and near.strip("'") in said.split("are")[1]
    )


def test_an_unlike_key_has_no_near_miss_but_choices(recipe: Path) -> None:
    said = message(recipe, ["part.xyzzy=1"])
    assert "did you mean" not in said and "The keys here are dim, kind, rate." in said


def test_a_typo_in_a_required_key_is_called_a_typo(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("nme: a\n")
    assert "did you mean 'name'?" in message(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("part.dim=wide", ["part.dim", "'wide'", "integer"]),
        ("part.dim=null", ["part.dim", "None", "integer"]),
        ("part.kind=medium", ["part.kind", "'medium'", "'fast' or 'slow'"]),
        ("part=3", ["part", "3"]),
        ("part.dim.x=3", ["part.dim"]),
        ("noises.rain.level=1", ["noises.rain.level", "less than or equal to 0"]),
        ("bounds=[1,x]", ["bounds.1", "'x'"]),
        ("name=${nowhere}", ["nowhere"]),
        ("name=???", ["name"]),
        ("part.dim", ["part.dim", "key=value"]),
        ("=3", ["key=value"]),
        ("name=[1", ["name=[1"]),
        ("parts.7.dim=1", ["parts.7.dim=1"]),
    ],
)
def test_a_wrong_value_is_one_sentence(recipe: Path, override: str, says: list[str]) -> None:
    said = message(recipe, [override])
    assert all(word in said for word in says), said


def test_a_rule_about_the_whole_is_told_as_it_stands(recipe: Path) -> None:
    assert message(recipe, ["name=fast"]) == f"{recipe}: name and part.kind must differ."


def test_several_mistakes_are_counted(recipe: Path) -> None:
    assert "(and 1 more)" in message(recipe, ["part.dim=x", "part.rate=y"])


def test_bad_files(tmp_path: Path) -> None:
    assert "no config file" in message(tmp_path / "none.yaml")
    assert "Cannot read" in message(tmp_path)
    for name, content in {
        "list": b"- 1\n",
        "broken": b"a: [1\n",
        "twice": b"name: a\nname: b\n",
        "binary": b"\xff\xfe\x00",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in message(tmp_path / name)
    (tmp_path / "empty").touch()
    assert "name is missing" in message(tmp_path / "empty")


@given(
    st.fixed_dictionaries(
        {"name": st.text(st.characters(codec="ascii", categories=["L"]), min_size=1)},
        optional={
            "part": st.fixed_dictionaries({"dim": st.integers(-(2**40), 2**40)}),
            "bounds": st.lists(st.integers(), max_size=3),
        },
    )
)
def test_plain_data_survives_yaml(data: dict[str, object]) -> None:
    assert build(yaml.safe_load(yaml.safe_dump(data)), Whole, "test") == Whole.model_validate(data)
