"""Text in, words out: one normaliser that synthesis, verification and scoring all share.

Two forms of a sentence matter here. The *spoken form* (``spell_out``) has every number, symbol and
abbreviation written as the words a person would say, and keeps the case and punctuation that give
a synthesizer its prosody. The *word form* (``normalize``) is that, lower-cased and bare: the target
of a recognizer and the unit of word error rate. By construction
``normalize(t).split() == [w.text for w in tokenize(spell_out(t))]``.
"""

import lzma
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from audio_codec.errors import UserError

_ONES = re.findall(
    r"\w+",
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen""",
)
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = (
    (10**12, "trillion"),
    (10**9, "billion"),
    (10**6, "million"),
    (1000, "thousand"),
    (100, "hundred"),
)
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_ABBREVIATIONS = {
    "mr": "mister",
    "mrs": "missus",
    "ms": "miss",
    "dr": "doctor",
    "st": "saint",
    "vs": "versus",
    "etc": "et cetera",
    "prof": "professor",
}
_SYMBOLS = {
    "&": "and",
    "+": "plus",
    "=": "equals",
    "×": "times",
    "*": "times",
    "÷": "divided by",
    "%": "percent",
    "@": "at",
    "#": "number",
    "/": "slash",
}

# Curly quotes, dashes and the slash of ½.
_TYPOGRAPHY = {0x2018: "'", 0x2019: "'", 0x2013: "-", 0x2014: ", ", 0x2044: "/"}

_ABBREVIATION = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\.(?=\s|$)", re.IGNORECASE)
_MONEY = re.compile(r"\$(\d[\d,]*)(?:\.(\d\d))?(?!\d)")
_ORDINAL = re.compile(r"\b(\d[\d,]*)(?:st|nd|rd|th)\b", re.IGNORECASE)
_MINUS = re.compile(r"(?:(?<=^)|(?<=\s))[-−](?=\d)|(?<=\d)\s+[-−]\s+(?=\d)")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_LETTER_DIGIT = re.compile(r"(?<=[a-zA-Z])(?=\d)|(?<=\d)(?=[a-zA-Z])")
_TOKEN = re.compile(r"\S+")


class Token(NamedTuple):
    """A word of a text: lower-case, without outer punctuation, with its character span."""

    text: str
    start: int
    """First character of the whitespace-delimited token (punctuation included)."""
    end: int
    """One past its last character."""


def number_words(value: int) -> str:
    """Spell an integer in American English ("one hundred five"); digits beyond 10^15 - 1.

    >>> number_words(-321)
    'minus three hundred twenty one'
    """
    if value < 0:
        return "minus " + number_words(-value)
    if value < 20:
        return _ONES[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return _TENS[tens] + (f" {_ONES[ones]}" if ones else "")
    if value >= 10**15:
        return " ".join(_ONES[int(digit)] for digit in str(value))
    scale, name = next(pair for pair in _SCALES if value >= pair[0])
    head, rest = divmod(value, scale)
    return f"{number_words(head)} {name}" + (f" {number_words(rest)}" if rest else "")


def ordinal_words(value: int) -> str:
    """Spell an ordinal: 21 -> "twenty first"."""
    *head, last = number_words(value).split()
    if last in _IRREGULAR_ORDINALS:
        last = _IRREGULAR_ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return " ".join([*head, last])


def _decimal(literal: str) -> str:
    whole, _, fraction = literal.replace(",", "").partition(".")
    # A leading zero ("007", a phone number) is read digit by digit.
    digits_apart = len(whole) > 1 and whole.startswith("0")
    words = (
        " ".join(_ONES[int(digit)] for digit in whole) if digits_apart else number_words(int(whole))
    )
    if fraction:
        words += " point " + " ".join(_ONES[int(digit)] for digit in fraction)
    return words


def _money(match: re.Match[str]) -> str:
    dollars = int(match[1].replace(",", ""))
    words = f"{number_words(dollars)} dollar{'' if dollars == 1 else 's'}"
    cents = int(match[2] or 0)
    if cents:
        words += f" and {number_words(cents)} cent{'' if cents == 1 else 's'}"
    return words


def spell_out(text: str) -> str:
    """Write numbers, symbols and abbreviations as words; keep case and sentence punctuation.

    The result holds only ASCII letters, spaces, inner apostrophes and ``. , ; : ? !``, so that
    every synthesizer reads the same words from it.
    """
    text = unicodedata.normalize("NFKD", text).translate(_TYPOGRAPHY)
    text = _MONEY.sub(_money, text)
    text = _ORDINAL.sub(lambda match: ordinal_words(int(match[1].replace(",", ""))), text)
    text = _MINUS.sub(" minus ", text)
    text = _LETTER_DIGIT.sub(" ", text)
    text = _NUMBER.sub(lambda match: f" {_decimal(match[0])} ", text)
    for symbol, word in _SYMBOLS.items():
        text = text.replace(symbol, f" {word} ")
    text = text.encode("ascii", "ignore").decode()  # Accents stand apart since NFKD: "cafe".
    text = re.sub(r"[^A-Za-z'.,;:?!]+", " ", text)
    # A quotation mark is no apostrophe, and "a.m" is two letters to every engine.
    text = re.sub(r"(?<![A-Za-z])'+|'+(?![A-Za-z])", "", text)
    text = re.sub(r"\s+(?=[.,;:?!])", "", text)
    text = re.sub(r"([.,;:?!])[.,;:?!]+", r"\1", text)
    text = re.sub(r"(?<=[A-Za-z])[.,;:?!](?=[A-Za-z])", " ", text)
    text = _ABBREVIATION.sub(lambda match: _ABBREVIATIONS[match[1].lower()], text)
    return " ".join(re.sub(r"^[\s.,;:?!]+", "", text).split())


def tokenize(text: str) -> list[Token]:
    """Words of a text as they lie between spaces; tokens of punctuation alone are left out."""
    tokens = []
    for match in _TOKEN.finditer(text):
        word = match[0].strip("\"'()[]{}<>.,;:?!-–—…").lower()
        if word:
            tokens.append(Token(word, match.start(), match.end()))
    return tokens


def normalize(text: str) -> str:
    """Words alone, lower-case, single spaces, numbers spelled out; "" when nothing is speakable.

    >>> normalize("Dr. Lee's 2nd try cost $3.50!")
    "doctor lee's second try cost three dollars and fifty cents"
    """
    return " ".join(token.text for token in tokenize(spell_out(text)))


def sentences_from(path: Path | str) -> Iterator[str]:
    """Yield the non-empty lines of a ``.txt`` or ``.txt.xz`` file, one sentence a line, in order.

    Raises:
        UserError: the file is missing, of another kind, or not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"text source {str(path)!r} is not a file")
    if not path.name.endswith((".txt", ".txt.xz")):
        raise UserError(f"text source {str(path)!r} must end in .txt or .txt.xz")
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as lines:
            for line in lines:
                if sentence := line.decode("utf-8").strip():
                    yield sentence
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"text source {str(path)!r} cannot be read: {error}") from error
