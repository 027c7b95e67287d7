"""Small vocabularies in the ways that language models of Hugging Face write them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["one two three four five six zebra crossing, a long way", "abcdefghijklmnopqrstuvwxyz' A"]


def hf_tokenizer(kind: str) -> bytes:
    """The `tokenizer.json` of a vocabulary: `bytes` as of Llama 3, Qwen and SmolLM, `metaspace` as
    of Llama 2 and Mistral."""
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
