"""Small language models and vocabularies, as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

from speechlm.text_tokenizer import SPECIAL, HFTokenizer

TEXTS = ["one two three four five six zebra crossing, a long way", "abcdefghijklmnopqrstuvwxyz' A"]


def hf_tokenizer(kind: str) -> bytes:
    """The `tokenizer.json` of a vocabulary: `bytes` as of Llama 3, Qwen and SmolLM, `metaspace` as
    of Llama 2 and Mistral.
    """
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = [*"▁abcdefghijklmnopqrstuvwxyz'A"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer.to_str().encode()


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),  # SmolLM is one too
    "llama-3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16, "eos_token_id": [2, 1]}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def write(path: Path, family: str, padding: int = 3, **changes: Any) -> Any:
    """A small random model with its tokenizer, as `save_pretrained` writes them."""
    import transformers

    name, more = FAMILIES[family]
    tokenizer = hf_tokenizer("bytes")
    vocab = HFTokenizer(tokenizer).size - SPECIAL + padding  # public tables are padded up
    config = getattr(transformers, f"{name}Config")(
        **{**SHAPE, "vocab_size": vocab, **more, **changes}
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_bytes(tokenizer)
    return model.eval()


LETTERS = "abcdefghijklmnopqrstuvwxyz'"
MARKS = ("<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>")


def save_whisper(folder: Path) -> None:
    """A small public checkpoint, its text pieces beside it."""
    words = [*LETTERS, "Ġ", "Ġo", "Ġon"]
    vocabulary = {piece: number for number, piece in enumerate((*words, *MARKS))}
    pieces = WhisperTokenizer(vocab=vocabulary, merges=[("Ġ", "o"), ("Ġo", "n")])
    pieces.add_special_tokens({"additional_special_tokens": list(MARKS[1:])})
    pieces.save_pretrained(folder)
    torch.manual_seed(6)
    WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=40,
            max_source_positions=20,
            max_target_positions=30,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=len(words),
            decoder_start_token_id=len(words) + 1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ).save_pretrained(folder)
