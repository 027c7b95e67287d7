"""The rules of the house that no single module can hold."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

from speechlm.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["audio_codec", "synth_data", "speechlm", "streaming", "demo"]

# A recipe's folder, or else the first word of its file name, says what it is a recipe for.
RECIPES = {
    "text": "synth_data.corpus:TextConfig",
    "speech": "synth_data.recipes.speech:SpeechConfig",
    "dialogues": "synth_data.recipes.dialogues:DialoguesConfig",
    "stereo": "synth_data.recipes.stereo:StereoConfig",
    "pairs": "synth_data.recipes.pairs:PairsConfig",
    "interleave": "synth_data.recipes.interleave:InterleaveRecipe",
    "tokenizer": "speechlm.training.tokenizer:TrainConfig",
    "text_to_token": "speechlm.training.text_to_token:TrainConfig",
    "codec": "speechlm.training.codec:TrainConfig",
    "token_decoder": "speechlm.training.token_decoder:TrainConfig",
    "lm": "speechlm.training.lm:TrainConfig",
}

# What `from package import ...` offers; everything else is imported from its module.
PUBLIC: dict[str, set[str]] = {
    "audio_codec": set(),
    "synth_data": set(),
    "speechlm": set(),
    "streaming": {"Client", "SyncClient"},
    "demo": set(),
}


def tracked() -> list[Path]:
    """Every file that is, or could be, committed."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and sound


def test_layers_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_recipe_builds(path: Path) -> None:
    kinds = [path.parent.name, re.split(r"[-_.]", path.name)[0]]
    kind = next((kind for kind in kinds if kind in RECIPES), None)
    assert kind, f"folder or name of {path} must begin with one of {', '.join(RECIPES)}"
    module, name = RECIPES[kind].split(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    config = load_config(path, [], model)
    assert isinstance(config, model)
    if kind == "lm" and "eval_every" in config.run.model_fields_set:
        assert config.validation, "nothing is evaluated without"


def test_what_a_recipe_reads_a_command_makes() -> None:
    recipes = [path.read_text() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    made = {
        path
        for text in [*recipes, (ROOT / "Makefile").read_text()]
        for line in (r"^output: (\S+)", r"speechlm synth .*output=(\S+)", r"`(\S+)` is yours")
        for path in re.findall(line, text, re.MULTILINE)
    }
    read = {
        re.sub(r"/[^/]+\.(tar|jsonl)$", "", path)  # of a folder of shards, some
        for text in recipes
        for path in re.findall(r"(?<![\w/])data/(?:[\w./*-]|\[\d-\d\])+", re.sub(r"#.*", "", text))
    }
    assert len(read) > 20 and read - made == set()


def test_configs_hold_yaml_alone() -> None:
    inside = [path for path in tracked() if path.is_relative_to(ROOT / "configs")]
    assert [path for path in inside if path.suffix != ".yaml"] == []


def test_no_file_names_a_machine_or_a_package_index() -> None:
    forbidden = re.compile(
        "|".join(
            [
                r"(?<![\w.])/(?:work|root|Users)/\w",  # somebody's folders
                r"(?<![\w.])/home/(?!user\b)\w",
                r"pypi\.(?:org)|files\.pythonhosted|registry\.npmjs|download\.pytorch",
                r"--(?:extra-)?index-url|--find-links",
            ]
        )
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path, text in texts()
        if path != Path(__file__)
        for number, line in enumerate(text.splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []


def test_the_lock_is_light_and_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["tts"], *extras["dev"]]
    versions: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        requirement = Requirement(line)  # raises on options, so there are no index lines
        (pin,) = requirement.specifier
        assert requirement.url is None and pin.operator == "==", line
        versions.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    heavy = re.compile(r"nvidia-|cuda-|triton|flash-attn|pesq")
    assert [name for name in versions if heavy.match(name)] == []
    for requirement in map(Requirement, wanted):
        pinned = versions[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in pinned), requirement


def test_make_knows_every_verb() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for verb in ("setup", "demo", "check", "fix", "test", "test-all", "bench", "tiny"):
        assert re.search(rf"^{verb}:.*## ", makefile, re.MULTILINE), verb
    assert "make check test" in (ROOT / ".ci" / "run").read_text()


def house() -> set[str]:
    """The paths that the README's tree names."""
    section = (ROOT / "README.md").read_text().split("## The house")[1]
    tree = section.split("```text\n")[1].split("```")[0]
    paths, above = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            paths.add(above + name)
        else:
            above = name
            paths.add(name)
    return paths


def test_the_tree_in_the_readme_is_true() -> None:
    named = house()
    assert {path for path in named if not (ROOT / path).exists()} == set()
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).glob("*.py")
        if path.name != "__init__.py"
    }
    assert modules - named == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_pinned(package: str) -> None:
    program = f"import types, {package} as p; names = {{n: v for n, v in vars(p).items() "
    program += "if n[0] != '_' and not isinstance(v, types.ModuleType)}; print(*names)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == PUBLIC[package]
    assert (ROOT / package / "py.typed").exists()
