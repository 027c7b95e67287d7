"""One YAML file and `a.b=c` overrides become one validated, frozen config.

    extends: full.yaml          # optional, relative to this file; what follows lies on top of it
    run: runs/${name}           # OmegaConf interpolation
    optimizer: {lr: 3e-4}

`load_config("configs/lm/tiny.yaml", ["optimizer.lr=1e-4"], TrainConfig)` gives a `TrainConfig`. The
pydantic models themselves stand at the top of the files that they configure.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from audio_codec.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """Read `path`, lay `overrides` ("a.b=c", values in YAML) on top and build a `model`.

    Raises UserError, one sentence, for a file that is missing or no YAML mapping, an override
    without "=", an unknown key (it names the nearest known one) and a value of the wrong type.
    """
    path = Path(path)
    tree = _read(path, ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (key and equals):
            raise UserError(f"The override {override!r} must look like key=value, as in a.b=3.")
        try:
            value = OmegaConf.from_dotlist([f"value={text}"]).value
            OmegaConf.update(tree, key, value, force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, IndexError) as error:
            raise UserError(f"Cannot apply the override {override!r}: {_line(error)}.") from error
    try:
        data = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_line(error)}.") from error
    return build(data, model, str(path))


def build(data: Any, model: type[Model], source: str) -> Model:
    """Validate plain `data` as a `model`; `source` names it in the UserError of a mistake."""
    _check_keys(data, model, source, "")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first, *rest = error.errors(include_url=False)
        where = ".".join(str(part) for part in first["loc"])
        said = _line(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "missing":
            what = f"{where} is missing"
        elif not where:  # a rule about the whole
            what = said
        else:
            what = f"{where} is {reprlib.repr(first['input'])}: {said}"
        more = f" (and {len(rest)} more)" if rest else ""
        raise UserError(f"{source}: {what}{more}.") from error


def _read(path: Path, children: tuple[Path, ...]) -> DictConfig:
    """The YAML tree of a file on top of what it extends."""
    if path.resolve() in children:
        raise UserError(f"{path} extends itself, by way of {children[-1]}.")
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no config file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the config file {path}: {_line(error)}.") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not valid YAML: {_line(error)}.") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} must hold key: value pairs at its top.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: extends is {base!r}; it must name one file.")
    merged = OmegaConf.merge(_read(path.parent / base, (*children, path.resolve())), tree)
    assert isinstance(merged, DictConfig)
    return merged


def _check_keys(data: Any, annotation: Any, source: str, prefix: str) -> None:
    """Raise UserError for a key that no model of `annotation` has, wherever it stands in `data`.

    This runs before pydantic does: a mistyped key would else be reported as a missing one.
    """
    for kind in _alternatives(annotation):
        inner = get_args(kind)
        if isinstance(data, list) and inner:
            for index, value in enumerate(data):
                _check_keys(value, inner[0], source, f"{prefix}{index}.")
        elif isinstance(data, Mapping) and inner:
            for key, value in data.items():
                _check_keys(value, inner[-1], source, f"{prefix}{key}.")
    models = [kind for kind in _alternatives(annotation) if hasattr(kind, "model_fields")]
    if isinstance(data, Mapping) and models:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        for key, value in data.items():
            if key not in fields:
                raise UserError(f"{source}: {_unknown(f'{prefix}{key}', str(key), fields)}")
            _check_keys(value, fields[key].annotation, source, f"{prefix}{key}.")


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, however nested; anything else is its own only alternative."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


def _unknown(where: str, key: str, choices: Iterable[str]) -> str:
    known = sorted(choices)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown key {where!r};{hint} The keys here are {', '.join(known)}."


def _line(error: object) -> str:
    """The first line of a message, without its full stop."""
    return str(error).strip().splitlines()[0].rstrip(".")
