"""Checkpoints of the whole model, in and out.

A checkpoint directory holds

    config.json          LMConfig
    model.safetensors    the language model
    text.model           its text pieces (tokenizer.json of one that began at Hugging Face's)
    card.json            what it was trained on, its measured scores
    codec/               the codec of its codes, a checkpoint of its own

An adapter's directory (`speechlm.lora`) stands for its base with the difference beside it.

A causal language model of Hugging Face (Llama, Mistral, Qwen 2 and 3, SmolLM: RMSNorm, rotary
positions, grouped queries, gated MLP) comes in as the temporal transformer with its text
vocabulary (`hf_transformer`, `fill_from_hf`). On text alone it then says what it said before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.codec import AnyCodec, kind_of, load_codec, load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.layers import lay_out
from audio_codec.speech_tokenizer import SpeechTokenizer, same_coder
from audio_codec.speech_tokenizer import kind_of as kind_of_tokenizer
from audio_codec.transformer import TransformerConfig
from speechlm import lora
from speechlm.duplex import Duplex
from speechlm.model import LMConfig, SpeechLM
from speechlm.streams import BOS, EOS
from speechlm.text_tokenizer import SPECIAL, HFTokenizer, TextTokenizer, load_text_tokenizer


def _base(name_or_path: str | Path) -> str | Path:
    """The checkpoint with the whole model: the one named, or the base of the adapter named."""
    return lora.base_of(checkpoints.resolve(name_or_path)) or name_or_path


def lm_config(name_or_path: str | Path) -> LMConfig:
    """Shape of a model. Raises UserError when there is no such model or it is broken."""
    path = checkpoints.resolve(_base(name_or_path))
    config = checkpoints.read_json(path / "config.json")
    return checkpoints.parse_config(LMConfig, checkpoints.Checkpoint(path, config, {}))


def load_lm(name_or_path: str | Path) -> tuple[SpeechLM, TextTokenizer]:
    """Language model and text pieces, without the codec; an adapter stays unmerged.

    Raises UserError when there is no such model or it is broken.
    """
    found = checkpoints.load(_base(name_or_path))
    model = SpeechLM(checkpoints.parse_config(LMConfig, found))
    checkpoints.restore(model, found)
    path = checkpoints.resolve(name_or_path)
    if lora.base_of(path) is not None:
        lora.load(model, path)
    return model.eval(), load_text_tokenizer(found.path)


def find_codec(name_or_path: str | Path) -> str:
    """Where the codec of a model is: the folder in its checkpoint, or what its config names."""
    named = lm_config(name_or_path).codec
    inside = checkpoints.resolve(_base(name_or_path)) / named
    return str(inside) if inside.is_dir() else named


def codec_folder(name_or_path: str | Path) -> str | Path:
    """The checkpoint of a model's codec, or `name_or_path` itself when it is a codec's."""
    return name_or_path if kind_of(name_or_path) else find_codec(name_or_path)


def load_codec_of(name_or_path: str | Path) -> AnyCodec:
    """The codec of a model, or the one that `load_codec` finds by that name.

    Raises UserError when there is none or it is broken.
    """
    return load_codec(codec_folder(name_or_path))


def _config_of(name_or_path: str | Path) -> Path:
    """The config of a checkpoint; its weights may be many gigabytes."""
    return checkpoints.resolve(_base(name_or_path), ("config.json",)) / "config.json"


def tokenizer_folder(name_or_path: str | Path) -> str | Path:
    """The checkpoint with a model's speech tokenizer: the model's codec, or `name_or_path` itself
    when it is a codec's or a tokenizer's.
    """
    config = checkpoints.read_json(_config_of(name_or_path))
    alone = kind_of_tokenizer(config) is not None
    return name_or_path if alone else codec_folder(name_or_path)


def load_speech_tokenizer_of(name_or_path: str | Path) -> SpeechTokenizer:
    """The speech tokenizer of a model or codec, or the one in its own checkpoint directory.

    Raises UserError when there is none or it is broken.
    """
    return load_tokenizer_of(tokenizer_folder(name_or_path))


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> Duplex:
    """The whole model, ready to talk: `"tiny"` (shipped), a directory or `hf://org/name`; of a
    checkpoint, or of an adapter, which then runs beside its base.

    Raises UserError when there is no such model or it is broken.
    """
    model, tokenizer = load_lm(name_or_path)
    lay_out(model.to(device))
    codec = load_codec(find_codec(name_or_path))
    return Duplex(codec.to(device), model.requires_grad_(False), tokenizer)


def save(
    directory: str | Path,
    model: SpeechLM,
    tokenizer: TextTokenizer,
    *,
    dtype: checkpoints.StoredType = "bf16",
    card: Mapping[str, Any] | None = None,
    bundle: bool = True,
) -> Path:
    """Write a checkpoint directory; with `bundle` the codec that its config names is copied in."""
    target = Path(directory)
    config = model.config
    codec = checkpoints.resolve(config.codec) if bundle else None
    if codec is not None:
        config = config.model_copy(update={"codec": "codec"})
    fresh = checkpoints.save(
        target.with_name(f".{target.name}.{os.getpid()}.tmp"),
        config,
        model.state_dict(),
        dtype=dtype,
        files={tokenizer.FILE: tokenizer.model},
        card=card,
    )
    try:
        if codec is not None:
            shutil.copytree(codec, fresh / "codec")
        checkpoints.replace_directory(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


def merge_adapter(
    name_or_path: str | Path, directory: str | Path, dtype: checkpoints.StoredType = "bf16"
) -> Path:
    """Write the checkpoint of an adapter's base with the difference added to its weights.

    Raises UserError when `name_or_path` is no adapter's directory, or is broken.
    """
    path = checkpoints.resolve(name_or_path)
    base = lora.base_of(path)
    if base is None:
        raise UserError(f"model '{name_or_path}' has no {lora.ADAPTER_CONFIG}; name an adapter.")
    checkpoints.check_replaceable(directory)
    model, tokenizer = load_lm(base)
    model = lora.merge(lora.load(model, path))
    model.config = model.config.model_copy(update={"codec": find_codec(base)})
    card = path / "card.json"
    return save(
        directory,
        model,
        tokenizer,
        dtype=dtype,
        card=checkpoints.read_json(card) if card.exists() else None,
    )


def average(
    one: str | Path,
    other: str | Path,
    directory: str | Path,
    share: float = 0.5,
    dtype: checkpoints.StoredType = "bf16",
) -> Path:
    """Write a checkpoint whose weights lie between two: `share` of the way from one to the other.

    Of a model and what it was trained on to, the mean often keeps what the first knew and has most
    of what the second learned (Wortsman et al., 2022, arXiv 2109.01903). Raises UserError when
    either is no model or an adapter, when their streams or shapes differ, or their text pieces.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share is {share:g}; give a number from 0 to 1.")
    checkpoints.check_replaceable(directory)
    for name in (one, other):
        if lora.base_of(checkpoints.resolve(name)) is not None:
            raise UserError(f"'{name}' is an adapter; make it a model first: speechlm merge.")
    (first, pieces), (second, others) = load_lm(one), load_lm(other)
    streams = [model.config.streams for model in (first, second)]
    alike = [found.model_copy(update={"coded_by": None}) for found in streams]
    if alike[0] != alike[1] or not same_coder(streams[0].coded_by, streams[1].coded_by):
        raise UserError(f"'{one}' and '{other}' have other streams: nothing lies between them.")
    if pieces.model != others.model:
        raise UserError(f"'{one}' and '{other}' have other text pieces: nothing lies between them.")
    weights, towards = first.state_dict(), second.state_dict()
    checkpoints.check(weights, checkpoints.Checkpoint(Path(other), {}, towards))
    first.load_state_dict(
        {
            name: tensor.lerp(towards[name].to(tensor), share)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in weights.items()
        }
    )
    first.config = first.config.model_copy(update={"codec": find_codec(one)})
    said = {"trainee": "lm", "average": [str(one), str(other)], "share": share}
    return save(directory, first, pieces, dtype=dtype, card=said)


# ------------------------------------------------------------------- language models, Hugging Face

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FREQUENCIES = ("linear", "llama3")  # Ways to stretch rotary positions that are other frequencies.


def names_hf(name_or_path: str | Path) -> bool:
    """Whether a directory is a model of Hugging Face's `transformers`, not one of ours."""
    config = checkpoints.resolve(name_or_path) / "config.json"
    return config.exists() and "model_type" in checkpoints.read_json(config)


def _hf_config(path: Path) -> Any:
    from transformers import AutoConfig  # seconds, for those who use it

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"init_from '{path}' cannot be read: {reason}") from error


def hf_transformer(name_or_path: str | Path, window: int | None) -> TransformerConfig:
    """Our shape of a causal language model of Hugging Face, with a window of at most `window`.

    Raises UserError, naming what is there and what is possible, for a model of another make.
    """
    path = checkpoints.resolve(name_or_path)
    config = _hf_config(path)

    def demand(name: str, found: object, *choices: object) -> None:
        if found not in choices:
            raise UserError(
                f"init_from '{path}': {name} is {found!r}; choices: "
                f"{', '.join(map(repr, choices))}."
            )

    demand("model_type", config.model_type, *_FAMILIES)
    demand("hidden_act", config.hidden_act, "silu")
    for name in ("attention_bias", "mlp_bias"):
        demand(name, getattr(config, name, False), False)
    rope = config.rope_parameters
    demand("rope_type", rope["rope_type"], "default", *_FREQUENCIES)
    demand("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    frequencies = None
    if rope["rope_type"] != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        turns, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        frequencies = tuple(turns.tolist())
    kinds = set(getattr(config, "layer_types", None) or ())
    sliding: Any = getattr(config, "sliding_window", None)
    if not kinds and sliding is not None:
        kinds = {"sliding_attention"}
    if len(kinds) > 1:
        raise UserError(f"init_from '{path}': its layers differ in attention: {sorted(kinds)}.")
    if kinds == {"sliding_attention"}:
        window = int(sliding) if window is None else min(int(sliding), window)
    return TransformerConfig(
        dim=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        hidden=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_frequencies=frequencies,
        window=window,
    )


def _pairs(rows: Tensor, size: int) -> Tensor:
    """Rows [H·D, …] of heads whose halves are rotated against each other → of neighbours."""
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def fill_from_hf(model: SpeechLM, name_or_path: str | Path) -> None:
    """Take temporal transformer and text pieces over from a causal language model.

    The pieces that it has no equal for begin as average ones, codes at a piece's size. Embeddings
    and head, where it ties them, part here. No more than a block is read at a time. Raises
    UserError when a tensor is missing, unknown or of another shape, or the text pieces are more
    than it has.
    """
    path = checkpoints.resolve(name_or_path)
    config, found = _hf_config(path), checkpoints.load(path, lazily=True)
    left = {name for name in found.tensors if not name.endswith("rotary_emb.inv_freq")}

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"weights in '{path}': tensor '{name}' is missing.")
        left.remove(name)
        return found.tensors[name]

    shape, size = model.config.temporal, model.config.temporal.head_size
    norm = checkpoints.Checkpoint(path, {}, {"weight": take("model.norm.weight")})
    checkpoints.restore(model.temporal.norm, norm)
    for layer, block in enumerate(model.temporal.blocks):
        there, weights = f"model.layers.{layer}", dict[str, Tensor]()
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            q, k, v = (take(f"{there}.self_attn.{part}_proj.{kind}") for part in "qkv")
            weights[f"attention.qkv.{kind}"] = torch.cat((_pairs(q, size), _pairs(k, size), v))
        if shape.qk_norm:
            for own, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                scale = take(f"{there}.self_attn.{name}.weight")
                weights[f"attention.{own}.weight"] = _pairs(scale, size)
        weights["attention.out.weight"] = take(f"{there}.self_attn.o_proj.weight")
        gate, up = (take(f"{there}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        weights["mlp.up.weight"] = torch.cat((gate, up))
        weights["mlp.down.weight"] = take(f"{there}.mlp.down_proj.weight")
        weights["attention_norm.weight"] = take(f"{there}.input_layernorm.weight")
        weights["mlp_norm.weight"] = take(f"{there}.post_attention_layernorm.weight")
        checkpoints.restore(block, checkpoints.Checkpoint(path, {}, weights))

    embedding = take("model.embed_tokens.weight")
    head = take("lm_head.weight") if "lm_head.weight" in left else embedding
    if left:
        raise UserError(f"weights in '{path}': tensor '{min(left)}' has no place in this model.")
    pieces = model.streams.text_size - SPECIAL
    if pieces > len(embedding):
        raise UserError(
            f"vocabulary of '{path}': its {HFTokenizer.FILE} has {pieces} ids, but there are "
            f"embeddings for {len(embedding)}."
        )

    def known(rows: Tensor, public: Tensor) -> Tensor:
        rows[SPECIAL : SPECIAL + pieces] = public[:pieces]
        for piece, theirs in ((BOS, config.bos_token_id), (EOS, config.eos_token_id)):
            first = theirs[0] if isinstance(theirs, list) else theirs
            if first is not None:
                rows[piece] = public[first]
        return rows

    # Whole tables are written, not rows of a view: a table may lie on several ranks.
    text, codes = (
        torch.randn(table.absent_row, shape.dim) * embedding.std()
        for table in (model.text, model.codes)
    )
    model.text.weight[: len(text)] = known(text + embedding.mean(0), embedding)
    model.codes.weight[: len(codes)] = codes
    for linear in (model.text_head, model.heard_head):
        if linear is not None:
            linear.weight.copy_(known(head.mean(0).repeat(model.streams.text_size, 1), head))


def fill(model: SpeechLM, name_or_path: str | Path) -> None:
    """Give a model the weights of a checkpoint of its shape, ours or of Hugging Face, reading a
    few tensors at a time.

    Raises UserError when they are not all there, or as `fill_from_hf`.
    """
    if names_hf(name_or_path):
        fill_from_hf(model, name_or_path)
    else:
        checkpoints.restore(model, checkpoints.load(name_or_path, lazily=True))
