"""Fine-tuning by a small difference: W + α·B·A, with A and B alone learned (LoRA, 2106.09685).

The layers are those of the package `peft` (extra `finetune`), and an adapter directory is its own:

    adapter_config.json          rank, layers, and which model it is a difference to
    adapter_model.safetensors    A and B of each layer, in float32
    card.json                    as in any checkpoint

`speechlm.convert.load` takes such a directory where it takes a checkpoint and puts the difference
beside the base (unmerged); `merge` adds it to the base's weights, which then run as fast as before.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from audio_codec import checkpoint as checkpoints
from audio_codec.errors import UserError
from audio_codec.layers import unpack
from speechlm.model import SpeechLM

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

Layer = Literal["qkv", "out", "up", "down", "inputs"]


class LoraConfig(BaseModel):
    """How large the difference may be, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: PositiveInt = 128
    """Of A and B."""
    alpha: PositiveFloat = 2.0
    """What their product is multiplied by."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what goes into A."""
    layers: tuple[Layer, ...] = Field(("qkv", "out", "up", "down", "inputs"), min_length=1)
    """Which linear layers, in the temporal and the depth transformer: attention's in and out, the
    MLP's, and the map from the one transformer to the other."""


def _held(model: SpeechLM) -> nn.ModuleDict:
    # peft looks for a `config` like that of `transformers` on the module that it is given.
    return nn.ModuleDict({"lm": model})


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs the package peft: pip install 'speechlm[finetune]'.") from error
    return peft


def attach(model: SpeechLM, config: LoraConfig, base: str) -> PeftModel:
    """Give a model a difference of nothing, the only part that is trained from now on.

    The layers are replaced in place; what is returned is the handle to `save` and `merge` it.
    `base`: the checkpoint that the model was loaded from. Raises UserError without `peft`.
    """
    peft = _peft()
    unpack(model)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha * config.rank,
        lora_dropout=config.dropout,
        target_modules=list(config.layers),
    )
    adapted = peft.get_peft_model(_held(model), wanted)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def base_of(path: Path) -> str | None:
    """The model that an adapter directory is a difference to; None when it is no adapter's."""
    if not (path / ADAPTER_CONFIG).exists():
        return None
    base = checkpoints.read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"adapter '{path}' does not say which base_model_name_or_path it is for.")
    return base


def load(model: SpeechLM, path: Path) -> PeftModel:
    """Put the difference in a directory beside the weights of its base, in place.

    Raises UserError without `peft`, and when the adapter is broken or for another model.
    """
    peft = _peft()
    unpack(model)
    wanted = set(checkpoints.read_weights(path / _WEIGHTS))
    try:
        adapted = peft.PeftModel.from_pretrained(_held(model), str(path))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"adapter '{path}' cannot be loaded: {reason}") from error
    if wanted != set(_difference(adapted)):
        raise UserError(f"adapter '{path}' was made for a model of another shape.")
    return adapted


def _difference(adapted: PeftModel) -> dict[str, Any]:
    return _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)


def merge(adapted: PeftModel) -> SpeechLM:
    """Add the difference to the weights; the layers are the base's own again."""
    merged: Any = adapted.merge_and_unload()
    model = merged["lm"]
    assert isinstance(model, SpeechLM)
    unpack(model)
    return model


def save(directory: str | Path, adapted: PeftModel, card: Mapping[str, Any]) -> Path:
    """Write an adapter directory; it takes the place of an older one only once it is whole.

    Raises UserError where `checkpoint.check_replaceable` does.
    """
    target = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        described = adapted.peft_config["default"].to_dict()
        described = {k: sorted(v) if isinstance(v, set) else v for k, v in described.items()}
        described["inference_mode"] = True
        (fresh / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2, default=str) + "\n")
        tensors = {name: t.detach().cpu().contiguous() for name, t in _difference(adapted).items()}
        save_file(tensors, fresh / _WEIGHTS, {"format": "pt"})
        (fresh / "card.json").write_text(json.dumps(dict(card), indent=2) + "\n")
        checkpoints.replace_directory(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return Path(directory)
