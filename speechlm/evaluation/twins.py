"""Runs of `speechlm train tokenizer`, and which of them is the unquantized twin of which.

What a bottleneck costs is told by a twin that was trained with the same config, seed, data and
steps, but without it. A run says all that in its folder, a checkpoint in its card.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from audio_codec import checkpoint as checkpoints
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from speechlm.convert import tokenizer_folder
from speechlm.training.tokenizer import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run of `speechlm train tokenizer`."""

    name: str
    """Its folder, below that of the sweep."""
    config: TrainConfig
    checkpoint: Path
    steps: int
    """Really done; `run.minutes` may end a run before its last step."""


_OF_ONE_SHAPE: Final = {"bottleneck", "levels", "codes", "code_dim"}
_OF_ONE_RUN: Final[dict[str, Any]] = {
    "run": {"dir", "log_every", "save_every", "eval_every", "log_spaced", "minutes"},
    "output": True,
    "dtype": True,
    "unquantized": True,
    "quantize_from": True,
    "quantize_full": True,
    "commitment_weight": True,
    "model": _OF_ONE_SHAPE,
}
"""Where the config of a run and that of its unquantized twin may differ: where and how often they
write, when they were told to stop (the steps that they did are compared), and in the bottleneck,
which the twin has not. So one twin serves every bottleneck of its rate and look-ahead."""


def finished_runs(folder: Path) -> list[Finished]:
    """All runs at or below a folder that have written their tokenizer, in the order of their names.

    Raises UserError when there is no such folder or no such run in it.
    """
    if not folder.is_dir():
        raise UserError(f"sweep '{folder}' is no folder.")
    found = []
    for path in sorted(folder.rglob("config.json")):
        content = checkpoints.read_json(path)
        if "run" not in content:
            continue  # a checkpoint's
        try:
            config = TrainConfig.model_validate(content)
        except ValidationError:
            log.warning("left out: %s is no config of a tokenizer's run", path)
            continue
        checkpoint = config.output or path.parent / "tokenizer"
        if not (checkpoint / "config.json").is_file():
            log.warning("left out: the run in %s is not finished", path.parent)
            continue
        trained = checkpoints.read_json(checkpoint / "config.json").get("bottleneck", "fsq")
        if trained != config.shape.bottleneck:
            log.warning(
                "left out: %s is unquantized, but has a bottleneck: train anew", path.parent
            )
            continue
        name = str(path.parent.relative_to(folder))
        steps = _card(checkpoint).get("steps", config.run.steps)
        name = folder.name if name == "." else name
        found.append(Finished(name, config, checkpoint, steps))
    if not found:
        raise UserError(f"sweep '{folder}' holds no finished run of 'speechlm train tokenizer'.")
    return found


def _card(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "card.json"
    return checkpoints.read_json(path) if path.exists() else {}


def finished_at(name: str) -> Finished | None:
    """How a tokenizer was trained, by the card in its own checkpoint; None where none says."""
    path = checkpoints.resolve(tokenizer_folder(name))
    card = _card(path)
    try:
        return Finished(name, TrainConfig.model_validate(card["config"]), path, card["steps"])
    except (KeyError, ValidationError):
        return None


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first field in which two trees differ, in words; None where none does."""
    one, other = dict(_leaves(ours)), dict(_leaves(theirs))
    for name in dict.fromkeys((*one, *other)):
        if one.get(name) != other.get(name):
            return f"{name} is {other.get(name)}, not {one.get(name)}"
    return None


def difference(run: Finished, twin: Finished) -> str | None:
    """In what a twin was not trained as the run was, in words; None where all is the same."""
    ours, theirs = (
        {"steps done": one.steps, **one.config.model_dump(mode="json", exclude=_OF_ONE_RUN)}
        for one in (run, twin)
    )
    return _difference(ours, theirs)


def twin_of(run: Finished, runs: Sequence[Finished]) -> Finished | None:
    """The run of the same config, seed, data and steps that was trained unquantized."""
    twins = (other for other in runs if other.config.unquantized)
    return next((twin for twin in twins if difference(run, twin) is None), None)


def check_twin(model: str, tokenizer: SpeechTokenizer, twin: str, other: SpeechTokenizer) -> None:
    """Raise UserError unless `twin` was trained as `model` was, but without a bottleneck.

    Where a card does not say how, shapes alone are compared, with a notice.
    """
    if tokenizer.bottleneck == "none":
        raise UserError(f"model '{model}' has no bottleneck, so twin '{twin}' tells nothing of it.")
    if other.bottleneck != "none":
        raise UserError(
            f"twin '{twin}' has a bottleneck ({other.bottleneck}): train it with unquantized=true."
        )
    ours, theirs = finished_at(model), finished_at(twin)
    if ours is not None and theirs is not None:
        found = difference(ours, theirs)
    else:
        log.warning(
            "twin %s: no card says that it was trained as %s: shapes alone fit", twin, model
        )
        found = _difference(
            *(one.config.model_dump(exclude=set(_OF_ONE_SHAPE)) for one in (tokenizer, other))
        )
    if found is not None:
        raise UserError(f"twin '{twin}' was not trained as '{model}': its {found}.")
