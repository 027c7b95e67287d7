"""Text in, words out: one normaliser that synthesis, verification and scoring all share.

Two forms of a sentence matter here. The *spoken form* (``spell_out``) has every number, symbol and
abbreviation written as the words a person would say, and keeps the case and punctuation that give
a synthesizer its prosody. The *word form* (``normalize``) is that, lower-cased and bare: the target
of a recognizer and the unit of word error rate. By construction
``normalize(t).split() == [w.text for w in tokenize(spell_out(t))]``.

Whole corpora are read and cleaned in ``corpus.py``, judged in ``quality.py`` and freed of
duplicates in ``dedup.py``; each of them takes its spoken form from here.
"""

import json
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
    "jr": "junior",
    "sr": "senior",
    "capt": "captain",
    "sgt": "sergeant",
    "gov": "governor",
    "mt": "mount",
    "ave": "avenue",
    "blvd": "boulevard",
    "dept": "department",
    "approx": "approximately",
    "inc": "incorporated",
    "ltd": "limited",
    "corp": "corporation",
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

_MONTHS = re.findall(
    r"\w+",
    """January February March April May June July August September October November December""",
)
_CURRENCIES = {  # symbol: one, many, a hundredth, hundredths
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"),
}
_MAGNITUDES = {"k": "thousand", "m": "million", "bn": "billion", "b": "billion"}
# Letters that are a word or a name after a number ("5 in the morning", "4 A") are no units here.
_UNITS = {  # symbol: one, many
    "km/h": ("kilometer per hour", "kilometers per hour"),
    "m/s": ("meter per second", "meters per second"),
    "mph": ("mile per hour", "miles per hour"),
    "km": ("kilometer", "kilometers"),
    "cm": ("centimeter", "centimeters"),
    "mm": ("millimeter", "millimeters"),
    "m": ("meter", "meters"),
    "ft": ("foot", "feet"),
    "mi": ("mile", "miles"),
    "kg": ("kilogram", "kilograms"),
    "mg": ("milligram", "milligrams"),
    "g": ("gram", "grams"),
    "lbs": ("pound", "pounds"),
    "lb": ("pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "ml": ("milliliter", "milliliters"),
    "kHz": ("kilohertz", "kilohertz"),
    "MHz": ("megahertz", "megahertz"),
    "GHz": ("gigahertz", "gigahertz"),
    "Hz": ("hertz", "hertz"),
    "KB": ("kilobyte", "kilobytes"),
    "MB": ("megabyte", "megabytes"),
    "GB": ("gigabyte", "gigabytes"),
    "kW": ("kilowatt", "kilowatts"),
    "ms": ("millisecond", "milliseconds"),
    "min": ("minute", "minutes"),
    "hrs": ("hour", "hours"),
    "°C": ("degree Celsius", "degrees Celsius"),
    "°F": ("degree Fahrenheit", "degrees Fahrenheit"),
    "°": ("degree", "degrees"),
}

# Curly quotes, dashes and the slash of ½.
_TYPOGRAPHY = {0x2018: "'", 0x2019: "'", 0x2013: "-", 0x2014: ", ", 0x2044: "/"}

_ABBREVIATION = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\.(?=\s|$)", re.IGNORECASE)
_LATIN = ((re.compile(r"\be\.g\."), "for example"), (re.compile(r"\bi\.e\."), "that is"))
_NUMERO = re.compile(r"\bNo\.\s?(?=\d)")

_YEAR = r"(1[1-9]\d\d|20\d\d)(?!\d)"
_DAY = r"(0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?(?![.,:]?\d)\b"
_MONTH = (
    r"(Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_ISO_DATE = re.compile(rf"(?<![\d-]){_YEAR}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?![\d-])")
_SLASH_DATE = re.compile(rf"(?<![\d/])(0?[1-9]|1[0-2])/(0?[1-9]|[12]\d|3[01])/{_YEAR}(?!/)")
_MONTH_DAY = re.compile(rf"\b{_MONTH}\s+{_DAY}(?:,?\s+{_YEAR})?")
_DAY_MONTH = re.compile(rf"\b(?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}(?:,?\s+{_YEAR})?")
_MONTH_YEAR = re.compile(rf"\b{_MONTH},?\s+{_YEAR}")
_YEARS = re.compile(rf"(?<![\d$€£¥.,]){_YEAR}-{_YEAR}")
# A number of four digits is a year only where a word says so.
_LONE_YEAR = re.compile(rf"(?i:\b(in|since|until|during|year|early|late)\s+){_YEAR}(?![.,]?\d|%)")
_DECADE = re.compile(r"(?<![\w'])(?:(1[1-9]|20)(\d)0|'?([2-9])0)s\b")
# Its full stop may be the sentence's.
_HALF_DAY = r"([ap])\.?m\b(?:\.(?=\s+(?-i:[a-z])|[,;:?!]))?"
_CLOCK = re.compile(
    rf"(?<![\d:])([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?(?![\d:])(?:\s*{_HALF_DAY})?",
    re.IGNORECASE,
)
_HOUR = re.compile(rf"(?<=\d)\s*{_HALF_DAY}", re.IGNORECASE)
_MONEY = re.compile(
    r"([$€£¥])\s?(\d[\d,]*)(?:\.(\d+))?"
    r"(?:\s?(thousand|million|billion|trillion)\b|(k|K|m|M|bn|B)\b)?"
)
_UNIT = re.compile(
    r"(?<![A-Za-z\d.,])(\d[\d,]*(?:\.\d+)?)\s?"
    rf"({'|'.join(sorted(_UNITS, key=len, reverse=True))})(?![A-Za-z\d/])"
)
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


_SPELLED = 15
"""Digits of the longest number that is not read digit by digit."""


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
    if value >= 10**_SPELLED:
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


def _integer(digits: str) -> str:
    """As `number_words` reads it, be it longer than Python makes a number of."""
    if len(digits) > _SPELLED:
        return " ".join(_ONES[int(digit)] for digit in digits)
    return number_words(int(digits))


def _decimal(literal: str) -> str:
    whole, _, fraction = literal.replace(",", "").partition(".")
    # A leading zero ("007", a phone number) is read digit by digit.
    digits_apart = len(whole) > 1 and whole.startswith("0")
    words = " ".join(_ONES[int(digit)] for digit in whole) if digits_apart else _integer(whole)
    if fraction:
        words += " point " + " ".join(_ONES[int(digit)] for digit in fraction)
    return words


def _ordinal(match: re.Match[str]) -> str:
    digits = match[1].replace(",", "")
    # Digit by digit, its last one alone is an ordinal.
    head, last = (digits[:-1], digits[-1]) if len(digits) > _SPELLED else ("", digits)
    return f"{_integer(head)} {ordinal_words(int(last))}" if head else ordinal_words(int(last))


def year_words(value: int) -> str:
    """Read a year: 1984 -> "nineteen eighty four", 1905 -> "nineteen oh five".

    From 2000 to 2009, and outside 1100..2099, a year is a number like others.
    """
    century, rest = divmod(value, 100)
    if not 11 <= century <= 20 or century == 20 and rest < 10:
        return number_words(value)
    if rest == 0:
        return f"{number_words(century)} hundred"
    return f"{number_words(century)} {'oh ' if rest < 10 else ''}{number_words(rest)}"


def _money(match: re.Match[str]) -> str:
    one, many, hundredth, hundredths = _CURRENCIES[match[1]]
    whole, fraction = match[2].replace(",", ""), match[3] or ""
    magnitude = match[4] or (match[5] and _MAGNITUDES[match[5].lower()])
    if magnitude or len(fraction) not in (0, 2):
        amount = _decimal(f"{whole}.{fraction}")
        return f"{amount} {magnitude} {many}" if magnitude else f"{amount} {many}"
    words = f"{_integer(whole)} {one if whole.lstrip('0') == '1' else many}"
    cents = int(fraction or 0)
    if cents:
        words += f" and {number_words(cents)} {hundredth if cents == 1 else hundredths}"
    return words


def _date(month: str, day: str | None, year: str | None) -> str:
    name = _MONTHS[int(month) - 1] if month.isdigit() else _month_name(month)
    words = name if day is None else f"{name} {ordinal_words(int(day))}"
    if year is None:
        return words
    return f"{words}{'' if day is None else ','} {year_words(int(year))}"


def _month_name(word: str) -> str:
    return next(name for name in _MONTHS if name.startswith(word[:3]))


def _decade(match: re.Match[str]) -> str:
    century, tens = match[1], match[2] or match[3]
    words = year_words(int(century + tens + "0")) if century else _TENS[int(tens)]
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


def _clock(match: re.Match[str]) -> str:
    hour, minute = int(match[1]), int(match[2])
    words = number_words(hour)
    if minute:
        words += f" {'oh ' if minute < 10 else ''}{number_words(minute)}"
    elif match[4] is None:
        words += " o'clock" if 1 <= hour <= 12 else " hundred"
    if match[3]:
        words += f" and {number_words(int(match[3]))} seconds"
    return f" {words} {match[4].lower()}m" if match[4] else f" {words}"


def _dates_and_times(text: str) -> str:
    text = _ISO_DATE.sub(lambda m: _date(m[2], m[3], m[1]), text)
    text = _SLASH_DATE.sub(lambda m: _date(m[1], m[2], m[3]), text)
    text = _MONTH_DAY.sub(lambda m: _date(m[1], m[2], m[3]), text)
    text = _DAY_MONTH.sub(
        lambda m: f"the {ordinal_words(int(m[1]))} of {_date(m[2], None, m[3])}", text
    )
    text = _MONTH_YEAR.sub(lambda m: _date(m[1], None, m[2]), text)
    text = _YEARS.sub(lambda m: f"{year_words(int(m[1]))} to {year_words(int(m[2]))}", text)
    text = _LONE_YEAR.sub(lambda m: f"{m[1]} {year_words(int(m[2]))}", text)
    text = _DECADE.sub(_decade, text)
    text = _CLOCK.sub(_clock, text)
    return _HOUR.sub(lambda m: f" {m[1].lower()}m", text)


def _unit(match: re.Match[str]) -> str:
    one, many = _UNITS[match[2]]
    return f"{match[1]} {one if match[1] == '1' else many}"


def spell_out(text: str) -> str:
    """Write numbers, dates, times, money, units, symbols and abbreviations as words.

    Case and sentence punctuation stay. The result holds only ASCII letters, spaces, inner
    apostrophes and ``. , ; : ? !``, so that every synthesizer reads the same words from it.

    >>> spell_out("On 2 Jan. 1984, at 3:05 p.m.: 5 °C!")
    'On the second of January nineteen eighty four, at three oh five pm: five degrees Celsius!'
    """
    text = unicodedata.normalize("NFKD", text).translate(_TYPOGRAPHY)
    for pattern, words in _LATIN:
        text = pattern.sub(words, text)
    text = _NUMERO.sub("number ", text)
    text = _dates_and_times(text)
    text = _MONEY.sub(_money, text)
    text = _UNIT.sub(_unit, text)
    text = _ORDINAL.sub(_ordinal, text)
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


def split_sentences(spoken: str) -> list[str]:
    """Cut a text in its spoken form (see ``spell_out``: no stop but a sentence's) into sentences.

    >>> split_sentences("Hello there. Who is it?")
    ['Hello there.', 'Who is it?']
    """
    return re.findall(r"\S(?:[^.?!]|[.?!](?!\s|$))*[.?!]*", spoken)


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
    """Yield the sentences of a text file, or of the shards of ``speechlm synth text``, in order.

    Raises UserError as ``labelled_sentences``.
    """
    for sentence, _ in labelled_sentences(path):
        yield sentence


def labelled_sentences(path: Path | str) -> Iterator[tuple[str, dict[str, str]]]:
    """Sentences as of ``sentences_from``, each with its own ``source`` and ``licence`` if told.

    Of a ``.txt`` or ``.txt.xz`` file these are its non-empty lines. Of a ``.jsonl`` shard, or a
    folder of them, they are the sentences of each document's text.

    Raises:
        UserError: the file is missing, of another kind, or not UTF-8 text.
    """
    path = Path(path)
    if path.is_dir() and (shards := sorted(path.glob("*.jsonl"))):
        for shard in shards:
            yield from labelled_sentences(shard)
        return
    if not path.is_file():
        raise UserError(f"text source {str(path)!r} is not a file")
    if not path.name.endswith((".txt", ".txt.xz", ".jsonl")):
        raise UserError(f"text source {str(path)!r} must end in .txt, .txt.xz or .jsonl")
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as lines:
            for line in lines:
                if path.suffix == ".jsonl":
                    found = json.loads(line)
                    told = {key: str(found[key]) for key in ("source", "licence") if key in found}
                    for sentence in split_sentences(found["text"]):
                        yield sentence, told
                elif sentence := line.decode("utf-8").strip():
                    yield sentence, {}
    except (ValueError, KeyError, TypeError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"text source {str(path)!r} cannot be read: {error}") from error
