"""Words ↔ the pieces of a text vocabulary.

    id    0 … 6                              7 …
        ┌──────────────────────────────────┬───────────────────────────────────────────┐
        │ <pad> <unk> <s> </s>             │ SentencePiece: what was learned from text │
        │ <epad> <speech> <text>           │ Hugging Face: the vocabulary's id + 7     │
        └──────────────────────────────────┴───────────────────────────────────────────┘

The special pieces have the same ids in every vocabulary (`speechlm.streams`), so that nothing but
this file knows which kind a model has. A checkpoint holds the vocabulary as the one file that its
own library wrote: `text.model` (SentencePiece, what a model trained from nothing learns) or
`tokenizer.json` (what a language model of Hugging Face brings along).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import ClassVar, Protocol

import sentencepiece

from audio_codec.errors import UserError
from synth_data.text import normalize, spell_out

_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<epad>", "<speech>", "<text>")
SPECIAL = len(_SPECIAL)
"""Number of special pieces; the first id of a piece of text."""


class TextTokenizer(Protocol):
    """A text vocabulary, the special pieces included."""

    FILE: ClassVar[str]
    """Name of its file in a checkpoint directory."""
    model: bytes
    """Content of that file."""
    size: int
    """Number of ids."""

    def word(self, text: str) -> tuple[int, ...]:
        """Pieces of one spoken word that follows others."""

    def encode(self, text: str) -> list[int]:
        """Pieces of a text."""

    def pieces(self) -> list[str]:
        """What each id adds to a text; special pieces add nothing."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text that pieces spell; special pieces are passed over."""


class SentencePieceTokenizer:
    """Pieces of lower-case words without punctuation (unigram model, arXiv 1808.06226)."""

    FILE: ClassVar[str] = "text.model"

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a `text.model`. Raises UserError when it is not one of ours."""
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"text.model is not a SentencePiece model: {error}") from error
        self.size: int = self._processor.get_piece_size()
        found = tuple(self._processor.id_to_piece(i) for i in range(min(self.size, SPECIAL)))
        if found != _SPECIAL:
            raise UserError(f"text.model begins with the pieces {found}, expected {_SPECIAL}.")
        self._words: dict[str, tuple[int, ...]] = {}

    def word(self, text: str) -> tuple[int, ...]:
        """Pieces of one word."""
        if text not in self._words:
            self._words[text] = tuple(self._processor.encode(text.lower()))
        return self._words[text]

    def encode(self, text: str) -> list[int]:
        """Pieces of a sentence; numbers and symbols are spelled out, punctuation is dropped."""
        return [piece for word in normalize(spell_out(text)).split() for piece in self.word(word)]

    def pieces(self) -> list[str]:
        """What each id adds to a text; special pieces add nothing."""
        texts = [self._processor.id_to_piece(i).replace("▁", " ") for i in range(self.size)]
        return ["" if number < SPECIAL else text for number, text in enumerate(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that pieces spell; special pieces are passed over."""
        pieces = self.pieces()
        return "".join(pieces[i] for i in ids).strip()


class HFTokenizer:
    """The vocabulary of a language model of Hugging Face, behind our special pieces.

    Words of speech are given in lower case, one at a time, each with the space before it. Text is
    given as it stands, capitals and punctuation too: so the language model knows it.
    """

    FILE: ClassVar[str] = "tokenizer.json"

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a `tokenizer.json`. Raises UserError when it is none."""
        from tokenizers import Tokenizer

        self.model = model
        try:
            self._tokenizer = Tokenizer.from_buffer(model)
        except Exception as error:  # tokenizers raises bare Exceptions of no narrower type
            raise UserError(f"tokenizer.json is not a tokenizer: {error}") from error
        self.size: int = SPECIAL + 1 + max(self._tokenizer.get_vocab().values())
        self._words: dict[str, tuple[int, ...]] = {}

    def word(self, text: str) -> tuple[int, ...]:
        """Pieces of one word, the space before it in the first of them."""
        if text not in self._words:
            # Vocabularies differ in where they write the space between two words: let there be one.
            encoded = self._tokenizer.encode(f"a {text.lower()}", add_special_tokens=False)
            self._words[text] = tuple(
                SPECIAL + piece
                for piece, (_, end) in zip(encoded.ids, encoded.offsets, strict=True)
                if end > 1
            )
        return self._words[text]

    def encode(self, text: str) -> list[int]:
        """Pieces of a text as it stands."""
        return [SPECIAL + i for i in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def pieces(self) -> list[str]:
        """What each id adds to a text; special pieces add nothing.

        Nor does a piece that is but a part of a character's bytes.
        """
        # A decoder may drop the space at the start of a text: let there be a letter before it.
        letter = self._tokenizer.encode("a", add_special_tokens=False).ids
        before = len(self._tokenizer.decode(letter))
        texts = self._tokenizer.decode_batch([[*letter, i] for i in range(self.size - SPECIAL)])
        return [""] * SPECIAL + ["" if "\ufffd" in text else text[before:] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that pieces spell; special pieces are passed over."""
        return self._tokenizer.decode([i - SPECIAL for i in ids if i >= SPECIAL]).strip()


def load_text_tokenizer(path: Path) -> TextTokenizer:
    """The text vocabulary in a checkpoint directory. Raises UserError when there is none."""
    kinds: tuple[type[SentencePieceTokenizer | HFTokenizer], ...]
    kinds = (SentencePieceTokenizer, HFTokenizer)
    for kind in kinds:
        if (path / kind.FILE).exists():
            return kind((path / kind.FILE).read_bytes())
    names = " or ".join(kind.FILE for kind in kinds)
    raise UserError(f"model '{path}' has no {names}.")


def train_text_tokenizer(texts: Iterable[str], vocab: int = 2000) -> SentencePieceTokenizer:
    """Learn a vocabulary of at most `vocab` pieces from sentences.

    The same texts give the same vocabulary. Raises UserError when `vocab` has no room for the
    special pieces and the letters, or there is no word to learn from.
    """
    sentences = filter(None, (normalize(spell_out(text)) for text in texts))
    first = next(sentences, None)
    if first is None:
        raise UserError("text has no word in Latin letters: there is nothing to learn pieces from.")
    model = io.BytesIO()
    letters = "abcdefghijklmnopqrstuvwxyz'"
    least = SPECIAL + 2 * len(letters)
    if vocab < least:
        raise UserError(f"vocab is {vocab}; at least {least} are needed.")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=chain([first], sentences),
        model_writer=model,
        vocab_size=vocab,
        hard_vocab_limit=False,  # a small corpus may have fewer pieces
        model_type="unigram",
        character_coverage=1.0,
        required_chars=letters,
        byte_fallback=False,
        normalization_rule_name="identity",
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=_SPECIAL[0],
        unk_piece=_SPECIAL[1],
        bos_piece=_SPECIAL[2],
        eos_piece=_SPECIAL[3],
        control_symbols=list(_SPECIAL[4:]),
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())
