"""How English words sound, from a pronouncing dictionary (CMUdict, as pocketsphinx brings it).

A word that the dictionary lacks has no phones here: guessing is left to those who may guess.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pocketsphinx

from synth_data.text import normalize

# fmt: off
PHONES: Final = (
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH",
    "IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH",
    "UH", "UW", "V", "W", "Y", "Z", "ZH",
)
# fmt: on
"""ARPAbet without stress."""


DICTIONARY: Final = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
"""One pronunciation a line: the word, its phones."""


@functools.cache
def pronunciations() -> Mapping[str, tuple[str, ...]]:
    """Word → its phones, the first of its pronunciations."""
    entries = (line.split() for line in DICTIONARY.read_text().splitlines())
    return {word: tuple(sounds) for word, *sounds in entries if not word.endswith(")")}


def phones_of(text: str) -> tuple[str, ...] | None:
    """The phones of a sentence, without word boundaries; None when a word is not known."""
    known = pronunciations()
    words = normalize(text).split()
    if not all(word in known for word in words):
        return None
    return tuple(phone for word in words for phone in known[word])
