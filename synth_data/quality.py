"""Is a text worth speaking? Rules that name their reason, a small trained judge, personal data.

The rules are those of Gopher (arXiv 2112.11446, appendix A.1) and C4 (arXiv 1910.10683), with what
speech adds: a text that no voice can read is of no use, and a short sentence is. Each is one
comparison whose name is counted, so that a build can say what it removed and why.

What no rule sees, such as words in a random order, a classifier learns from good text against the
same text damaged by rule. It is a logistic regression on hashed n-grams: 1 MB, no library.

    good      the cat sat on the mat
    damaged   mat on the sat the cat │ eht tca tas no │ thecatsaton │ the cat the cat the cat │ …
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from audio_codec.errors import UserError
from audio_codec.files import replacing

# --- Rules ----------------------------------------------------------------------------------------


class RuleConfig(BaseModel):
    """Limits of the rules; a text beyond one of them is removed under that rule's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_words: int = Field(default=3, ge=1)
    """Fewer is "too short"."""
    max_words: int = Field(default=20_000, ge=1)
    """More is "too long"."""
    word_length: tuple[float, float] = (2.0, 10.0)
    """Least and greatest mean length of a word in characters, else "word length"."""
    max_symbols: float = Field(default=0.1, ge=0, le=1)
    """Share of characters that are no letter, digit, space or punctuation, else "symbols"."""
    max_digits: float = Field(default=0.3, ge=0, le=1)
    """Share of characters that are digits, else "digits"."""
    min_speakable: float = Field(default=0.95, ge=0, le=1)
    """Share of letters that are Latin, accents aside, else "unspeakable"."""
    long_words: int = Field(default=50, ge=1)
    """From so many words on, the rules on whole documents apply: repeated lines and n-grams,
    function words, lines that end in an ellipsis or begin with a bullet."""


_PUNCTUATION = frozenset(".,;:?!'\"()-–—…‘’“”%$€£¥&/°")
_BOILERPLATE = re.compile(
    r"lorem ipsum|javascript|cookie policy|terms of (?:use|service)|all rights reserved|[{}]",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"https?://|\bwww\.", re.IGNORECASE)
_STUTTER = re.compile(r"\b(\w+)(?:\W+\1\b){3}", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])

# Gopher's table A1: the greatest share of characters within the most frequent n-gram, and within
# n-grams that occur more than once.
_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_REPEATED_LINES = 0.30


def fault(text: str, config: RuleConfig) -> str | None:
    """The name of the first rule that ``text`` breaks, or None. Pure."""
    words = text.split()
    if len(words) < config.min_words:
        return "too short"
    if len(words) > config.max_words:
        return "too long"
    characters = sum(map(len, words))
    digits = sum(c.isdigit() for c in text)
    letters = [c for c in unicodedata.normalize("NFKD", text) if c.isalpha()]
    symbols = sum(not (c.isalnum() or c.isspace() or c in _PUNCTUATION) for c in text)
    # Marks of accents and of other scripts count as the letters they belong to.
    symbols -= sum(unicodedata.category(c).startswith("M") for c in text)
    if symbols > config.max_symbols * characters:
        return "symbols"
    if digits > config.max_digits * characters:
        return "digits"
    if not letters or sum(map(str.isascii, letters)) < config.min_speakable * len(letters):
        return "unspeakable"
    low, high = config.word_length
    if not low <= characters / len(words) <= high:
        return "word length"
    if _ADDRESS.search(text):
        return "web address"
    if _BOILERPLATE.search(text):
        return "boilerplate"
    if _STUTTER.search(text):
        return "repetition"
    return _document_fault(text, words) if len(words) >= config.long_words else None


def _document_fault(text: str, words: Sequence[str]) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    if sum(line.startswith(("•", "-", "*", "‣")) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(any(c.isalpha() for c in word) for word in words) < 0.8 * len(words):
        return "symbols"
    lower = [word.lower() for word in words]
    if len(_FUNCTION_WORDS.intersection(lower)) < 2:
        return "no function words"
    repeated = sum(count - 1 for count in Counter(lines).values())
    if repeated > _REPEATED_LINES * len(lines) or _repeats(lower):
        return "repetition"
    return None


def _repeats(words: Sequence[str]) -> bool:
    """Whether n-grams repeat beyond Gopher's limits."""
    lengths = [len(word) for word in words]
    total = sum(lengths)
    for size, limit in _TOP_NGRAM.items():
        grams = Counter(zip(*(words[start:] for start in range(size)), strict=False))
        gram, count = grams.most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) > limit * total:
            return True
    for size, limit in _REPEATED_NGRAMS.items():
        seen: set[tuple[str, ...]] = set()
        covered = 0
        end = 0  # Words before it are counted already: an overlap counts once.
        for start in range(len(words) - size + 1):
            gram = tuple(words[start : start + size])
            if gram in seen:
                covered += sum(lengths[max(start, end) : start + size])
                end = start + size
            seen.add(gram)
        if covered > limit * total:
            return True
    return False


# --- Personal data --------------------------------------------------------------------------------

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)")
_PHONE = re.compile(
    r"(?<![\w.,$€£-])(?:"
    r"\+\d[\d ().-]{6,16}\d"
    r"|(?:1[ .-])?(?:\(\d{3}\)[ .-]?|\d{3}[.-])\d{3}[ .-]\d{4}"
    r"|\d{3}-\d{4}|0\d{2,4}[ -]\d{3,4}[ -]?\d{3,4}"
    r")(?![\w-])"
)
_MASKS = {"e-mail": "email address", "card": "card number", "phone": "phone number"}


def luhn(digits: str) -> bool:
    """Whether a card number's check digit is right (H. P. Luhn, US patent 2,950,048)."""
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def mask_personal(text: str) -> tuple[str, Counter[str]]:
    """Replace e-mail addresses, card and phone numbers by words; how many of each were found.

    A run of 13 to 19 digits is a card number when its check digit is right.

    >>> mask_personal("Write to ann@example.org or call (555) 010-9999.")[0]
    'Write to email address or call phone number.'
    """
    found: Counter[str] = Counter()

    def mask(kind: str) -> Callable[[re.Match[str]], str]:
        def replace(match: re.Match[str]) -> str:
            if kind == "card" and not luhn(re.sub(r"\D", "", match[0])):
                return match[0]
            found[kind] += 1
            return _MASKS[kind]

        return replace

    for kind, pattern in (("e-mail", _EMAIL), ("card", _CARD), ("phone", _PHONE)):
        text = pattern.sub(mask(kind), text)
    return text, found


# --- Language -------------------------------------------------------------------------------------


def language_of(text: str) -> str:
    """The ISO 639-1 code of the likeliest language, by py3langid.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import py3langid
    except ImportError:
        raise UserError(
            "language identification is not installed; run: pip install py3langid "
            "(or this package's extra 'text')"
        ) from None
    code: str = py3langid.classify(text)[0]
    return code


# --- The trained judge ----------------------------------------------------------------------------

_BUCKETS = 2**18
# Later words add little to the verdict, and a long document should not cost more than a page.
_JUDGED_WORDS = 512

Damage = Literal["shuffle", "scramble", "join", "vowels", "repeat", "salad"]
DAMAGES: tuple[Damage, ...] = get_args(Damage)


class QualityConfig(BaseModel):
    """The classifier: trained on the corpus's own first texts against damaged ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Texts with a smaller probability of being good are removed."""
    examples: int = Field(default=20_000, ge=2)
    """Good texts to learn from: the first of the corpus that pass the rules."""
    seed: int = 0


def damage(text: str, kind: Damage, rng: np.random.Generator, other: Sequence[str]) -> str:
    """Spoil a text; ``other`` are words of another one, for a salad of both."""
    words = text.split()
    if kind == "shuffle":
        return " ".join(words[i] for i in rng.permutation(len(words)))
    if kind == "scramble":
        return " ".join("".join(word[i] for i in rng.permutation(len(word))) for word in words)
    if kind == "join":
        return "".join(words)
    if kind == "vowels":
        return re.sub(r"[aeiou]", "", text, flags=re.IGNORECASE)
    if kind == "repeat":
        start = int(rng.integers(len(words)))
        piece = words[start : start + int(rng.integers(1, 4))]
        return " ".join(piece * (1 + len(words) // len(piece)))
    mixed = [*words, *other]
    return " ".join(mixed[i] for i in rng.integers(len(mixed), size=len(words)))


class _Features(NamedTuple):
    """A text as hashed n-grams."""

    buckets: npt.NDArray[np.int64]  # [n]
    values: npt.NDArray[np.float32]  # [n]


def _features(text: str) -> _Features:
    """Pairs of words, which know order, triples of letters, which know spelling, and one number:
    the share of words that are repeats of an earlier one.

    The values of either kind of n-gram have the sum 1, so that one does not drown the other.
    """
    words = ["<", *text.lower().split(maxsplit=_JUDGED_WORDS)[:_JUDGED_WORDS], ">"]
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    triples = [f"_{w}_"[i : i + 3] for w in words[1:-1] for i in range(len(w))]
    hashes = [zlib.crc32(gram.encode()) % _BUCKETS for gram in (*pairs, *triples, "repeats")]
    values = [1 / len(pairs)] * len(pairs) + [1 / max(1, len(triples))] * len(triples)
    values.append(1 - len(set(words)) / len(words))
    return _Features(np.array(hashes, np.int64), np.array(values, np.float32))


class Judge(NamedTuple):
    """Logistic regression on hashed n-grams."""

    weights: npt.NDArray[np.float32]  # [buckets]
    bias: float

    def score(self, text: str) -> float:
        """Probability in 0..1 that ``text`` is good."""
        return _probability(self.weights, self.bias, _features(text))

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        with replacing(path) as temporary, temporary.open("wb") as opened:
            np.savez_compressed(opened, weights=self.weights, bias=self.bias)

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Read what ``save`` wrote."""
        with np.load(path) as stored:
            return cls(stored["weights"], float(stored["bias"]))


def train_judge(good: Iterable[str], seed: int = 0, epochs: int = 3) -> Judge:
    """Learn good text against the same text damaged, one of each, by AdaGrad (Duchi et al., 2011).

    Raises:
        UserError: fewer than two good texts.
    """
    texts = [text for text in good if text.split()]
    if len(texts) < 2:
        raise UserError(
            f"quality: {len(texts)} texts passed the rules, but at least 2 are needed to learn from"
        )
    rng = np.random.default_rng(seed)
    examples: list[tuple[_Features, float]] = []
    for index, text in enumerate(texts):
        other = texts[int(rng.integers(len(texts)))].split()
        spoiled = damage(text, DAMAGES[index % len(DAMAGES)], rng, other)
        examples.append((_features(text), 1.0))
        if spoiled != text:  # A text of one word has no other order.
            examples.append((_features(spoiled), 0.0))
    weights = np.zeros(_BUCKETS, np.float32)
    squares = np.full(_BUCKETS, 1e-6, np.float32)
    bias, bias_square = 0.0, 1e-6
    for _ in range(epochs):
        for index in rng.permutation(len(examples)):
            features, target = examples[index]
            error = _probability(weights, bias, features) - target
            buckets, places = np.unique(features.buckets, return_inverse=True)
            slope = error * np.bincount(places, features.values).astype(np.float32)
            squares[buckets] += slope**2
            weights[buckets] -= slope / np.sqrt(squares[buckets])
            bias_square += error**2
            bias -= 0.1 * error / np.sqrt(bias_square)
    return Judge(weights, float(bias))


def _probability(weights: npt.NDArray[np.float32], bias: float, features: _Features) -> float:
    z = float(weights[features.buckets] @ features.values) + bias
    return float(1 / (1 + np.exp(-np.clip(z, -30, 30))))
