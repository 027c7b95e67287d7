"""The quiz world: the questions the default model is taught to answer, and how an answer is judged.

Everything is words as they are spoken (no digits), so that one string serves the synthesizer, the
recognizer and the text stream. Phrasings and facts are data (``quiz_data/``); this file fills them
in, splits them and scores what was said.

What is held out, once and by hash, so that no seed can leak it:

- every category: phrasings (``heldout`` lists of ``quiz.yaml``);
- plus and minus: 10% of the unordered operand pairs {a, b}, with their inverses (a + b) - a;
- repeat: 10% of all word sequences of two words and more;
- outside the world: templates, fillers and questions of ``open.yaml``.

Finite facts (capitals, opposites, times tables ...) are all trained: nobody can guess a capital.

    >>> questions("train", 2, seed=0, categories=["plus", "capitals"])
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import numpy as np
import yaml
from pydantic import AfterValidator, Field, PositiveFloat

from synth_data.text import normalize as word_form
from synth_data.text import number_words

_T = TypeVar("_T")
Split = Literal["train", "heldout"]
Kind = Literal[
    "number",
    "day",
    "month",
    "letter",
    "opposite",
    "plural",
    "color",
    "sound",
    "capital",
    "country",
    "social",
    "spelling",
    "counting",
    "repeat",
    "refusal",
]

MAX_OPERAND = 20
"""Arithmetic goes up to twenty: no operand (nor minuend) is larger."""

MAX_NUMBER = 40
"""Largest number said alone or asked about in "what comes after"."""

UNKNOWN = "unknown"
"""The category of what lies outside the world."""

_HELDOUT_SHARE = 0.1

_LETTERS = [chr(c) for c in range(ord("A"), ord("Z") + 1)]

# How an open-vocabulary recognizer writes a letter that was said alone.
_LETTER_NAMES = {
    "be": "b", "bee": "b", "see": "c", "sea": "c", "dee": "d", "ef": "f", "gee": "g", "aitch": "h",
    "eye": "i", "jay": "j", "kay": "k", "el": "l", "ell": "l", "em": "m", "en": "n", "oh": "o",
    "owe": "o", "pea": "p", "pee": "p", "cue": "q", "queue": "q", "are": "r", "ar": "r", "ess": "s",
    "tea": "t", "tee": "t", "you": "u", "vee": "v", "ex": "x", "why": "y", "zee": "z", "zed": "z",
}  # fmt: skip

_CONTRACTIONS = {
    "don't": "do not",
    "i'm": "i am",
    "what's": "what is",
    "you're": "you are",
    "it's": "it is",
    "can't": "cannot",
    "grey": "gray",
    "colour": "color",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question with everything needed to judge what is said in reply.

    Attributes:
        text: the question as spoken, with case and punctuation.
        answer: the reference answer, a short sentence.
        keys: normalized wordings of the fact, the first one canonical; for the kinds that answer
            with a sequence (spelling, counting, repeat) the whole sequence as one string.
        category: one of :data:`CATEGORIES`, or :data:`UNKNOWN`.
        split: what this question may be used for.
        kind: what kind of thing the key is; it says which other candidates would be wrong.
        given: candidates of the same kind that the question itself names ("seven" and "five" in
            "seven plus five"); an answer may echo them.
        fact: id of the fact, e.g. ``"plus:3+5"``.
        fact_heldout: whether the fact itself, not only the phrasing, is held out.
        pause: a speaker may pause before any of the words (whitespace-separated, of ``text``) with
            index in ``pause[0]..pause[1]``: what was said by then is no question yet. Empty where
            every beginning is a question of its own ("Thank you" of "Thank you very much").
    """

    text: str
    answer: str
    keys: tuple[str, ...]
    category: str
    split: Split
    kind: Kind
    given: tuple[str, ...] = ()
    fact: str = ""
    fact_heldout: bool = False
    pause: tuple[int, int] | tuple[()] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every canonical answer of this kind (empty for open sequences)."""
        return candidates(self.kind)


# --------------------------------------------------------------------------------------- the data


@cache
def _data() -> dict[str, Any]:
    text = resources.files("synth_data").joinpath("quiz_data/quiz.yaml").read_text("utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


@cache
def _open() -> dict[str, Any]:
    text = resources.files("synth_data").joinpath("quiz_data/open.yaml").read_text("utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


_DAYS: tuple[str, ...] = tuple(_data()["sequences"]["days"])
_MONTHS: tuple[str, ...] = tuple(_data()["sequences"]["months"])


@cache
def vocabulary() -> tuple[str, ...]:
    """About a thousand common words for "repeat after me", no two of which sound alike."""
    text = resources.files("synth_data").joinpath("quiz_data/words.txt").read_text("utf-8")
    return tuple(text.split())


def _bucket(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


@cache
def heldout_pairs() -> frozenset[tuple[int, int]]:
    """The held-out unordered operand pairs (a <= b) of plus; minus holds out their inverses.

    One pair in ten, drawn alike from the pairs that have an inverse within range (sum at most
    :data:`MAX_OPERAND`) and from those that have not.
    """
    pairs = list(itertools.combinations_with_replacement(range(MAX_OPERAND + 1), 2))
    held: set[tuple[int, int]] = set()
    for small in (True, False):
        stratum = [p for p in pairs if (sum(p) <= MAX_OPERAND) == small]
        stratum.sort(key=lambda p: _bucket(f"pair {p[0]} {p[1]}"))
        held.update(stratum[: round(_HELDOUT_SHARE * len(stratum))])
    return frozenset(held)


def sequence_heldout(words: Sequence[str]) -> bool:
    """Whether "repeat after me" holds this word sequence out (single words are all trained)."""
    return len(words) > 1 and _bucket("repeat " + " ".join(words)) < _HELDOUT_SHARE


# ------------------------------------------------------------------------------------ normal form


def normalize(text: str) -> str:
    """The word form of ``text.normalize``, with contractions written out ("don't" → "do not")."""
    return " ".join(_CONTRACTIONS.get(word, word) for word in word_form(text).split())


def _number_mentions(words: list[str]) -> list[str]:
    """Maximal number phrases, left to right: "twenty one" is one mention, and not of "one"."""
    unit = {number_words(n): n for n in range(20)}
    ten = {number_words(n): n for n in range(20, 100, 10)}

    def below_hundred(i: int) -> tuple[int, int] | None:
        """The value of the phrase that begins at ``i``, and where it ends."""
        if i < len(words) and words[i] in ten:
            following = unit.get(words[i + 1], 0) if i + 1 < len(words) else 0
            if 1 <= following <= 9:
                return ten[words[i]] + following, i + 2
            return ten[words[i]], i + 1
        if i < len(words) and words[i] in unit:
            return unit[words[i]], i + 1
        return None

    mentions: list[str] = []
    i = 0
    while i < len(words):
        if words[i : i + 2] == ["a", "hundred"]:
            value, i = 1, i + 1
        else:
            found = below_hundred(i)
            if found is None:
                i += 1
                continue
            value, i = found
        if 1 <= value <= 9 and i < len(words) and words[i] == "hundred":
            value, i = value * 100, i + 1
            # "three hundred and five" is one number as much as "three hundred five".
            rest = below_hundred(i + 1 if words[i : i + 1] == ["and"] else i)
            if rest is not None:
                value, i = value + rest[0], rest[1]
        mentions.append(number_words(value))
    return mentions


# ----------------------------------------------------------------------------------------- scoring


@cache
def _wordings(kind: Kind) -> dict[tuple[str, ...], str]:
    """Every accepted wording of every candidate of a kind, as words → its canonical form."""
    data = _data()
    canonical: dict[str, str] = {}
    if kind == "day":
        canonical = {normalize(x): normalize(x) for x in _DAYS}
    elif kind == "month":
        canonical = {normalize(x): normalize(x) for x in _MONTHS}
    elif kind == "opposite":
        canonical = {x: x for pair in data["opposites"] for x in pair}
    elif kind == "plural":
        canonical = {many: many for _, many in data["plurals"]}
    elif kind == "color":
        colors = set(data["colors"].values()) | {c for mix in data["color_mixing"] for c in mix}
        canonical = {c: c for c in colors}
    elif kind == "sound":
        canonical = {w: ways[0] for ways in data["animal_sounds"].values() for w in ways}
    elif kind == "capital":
        canonical = {normalize(x): normalize(x) for x in data["capitals"].values()}
    elif kind == "country":
        canonical = {normalize(x): normalize(x) for x in data["capitals"]}
    elif kind == "social":
        canonical = {k: e["keys"][0] for e in data["social"].values() for k in e["keys"]}
    elif kind == "repeat":
        canonical = {w: w for w in vocabulary()}
    elif kind == "refusal":
        canonical = {"do not know": "do not know"}
    return {tuple(wording.split()): name for wording, name in canonical.items()}


@cache
def candidates(kind: Kind) -> tuple[str, ...]:
    """Every canonical answer of a kind, sorted; empty where answers are open sequences."""
    if kind == "number":
        top = MAX_OPERAND * MAX_OPERAND
        return tuple(number_words(n) for n in range(top + 1))
    if kind == "letter":
        return tuple(x.lower() for x in _LETTERS)
    if kind in ("spelling", "counting", "repeat"):
        return ()
    return tuple(sorted(set(_wordings(kind).values())))


def mentions(said: str, kind: Kind) -> list[str]:
    """The candidates of a kind that a sentence names, canonical, in order, longest match first."""
    words = normalize(said).split()
    if kind in ("number", "counting"):
        return _number_mentions(words)
    if kind in ("letter", "spelling"):
        joined = " ".join(words).replace("double you", "w").replace("double u", "w")
        letters = (_LETTER_NAMES.get(word, word) for word in joined.split())
        return [x for x in letters if len(x) == 1 and x.isalpha()]
    wordings = _wordings(kind)
    longest = max(len(w) for w in wordings)
    found: list[str] = []
    i = 0
    while i < len(words):
        for size in range(longest, 0, -1):
            name = wordings.get(tuple(words[i : i + size]))
            if name is not None:
                found.append(name)
                i += size
                break
        else:
            i += 1
    return found


def is_refusal(said: str) -> bool:
    """Whether a sentence says that the answer is not known."""
    return "do not know" in normalize(said)


def score(said: str, question: Question) -> bool:
    """Whether ``said`` answers ``question``: its key is named and no other candidate of its kind.

    What the question itself names may be echoed ("Seven plus five is twelve."), as often as it
    was given, and never in the place of the key: the key has to stand at the end where the
    reference answer has it, so "Seven comes after eight" is wrong for "what comes after seven".
    Spelling, counting and repeating are right when the whole sequence is, and nothing more.
    """
    if question.kind == "refusal":
        return is_refusal(said)
    if is_refusal(said):
        return False
    found = mentions(said, question.kind)
    key = question.keys[0]
    if question.kind == "spelling":
        return found == key.split()
    if question.kind == "counting":
        return found == _number_mentions(key.split())
    if question.kind == "repeat":
        return found == key.split() and len(normalize(said).split()) == len(found)
    if key not in found:
        return False
    rest = Counter(found)
    rest[key] -= 1
    if any(n > Counter(question.given)[name] for name, n in rest.items()):
        return False
    reference = mentions(question.answer, question.kind)
    return found[-1] == key if reference[-1] == key else found[0] == key


# ------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class _Fact:
    """What a category asks for: the words to fill in, the answer, and how it is judged."""

    fill: Mapping[str, str]
    answer: str
    keys: tuple[str, ...]
    kind: Kind
    given: tuple[str, ...]
    name: str
    weight: float = 1.0
    heldout: bool = False


def _arithmetic(category: str) -> Iterator[_Fact]:
    span = range(MAX_OPERAND + 1)
    for a, b in itertools.product(span, span):
        if category == "minus" and b > a:
            continue
        value = {"plus": a + b, "minus": a - b, "times": a * b}[category]
        pair = (a, b) if category == "plus" else (value, b)
        held = category != "times" and (min(pair), max(pair)) in heldout_pairs()
        # People ask small sums more often; small products, much more often.
        largest = max(a, b)
        weight = (
            1.0 if category != "times" else 6.0 if largest <= 10 else 3.0 if largest <= 12 else 1.0
        )
        fact = _arithmetic_fact(category, a, b, value)
        yield replace(fact, weight=weight, heldout=held)


def _arithmetic_fact(category: str, a: int, b: int, value: int) -> _Fact:
    sign = {"plus": "+", "minus": "-", "times": "*"}[category]
    wa, wb, wc = number_words(a), number_words(b), number_words(value)
    name = f"{category}:{a}{sign}{b}"
    return _Fact(
        {"a": wa, "b": wb}, f"{wa} {category} {wb} is {wc}.", (wc,), "number", (wa, wb), name
    )


def _sequence(
    items: Sequence[str], kind: Kind, noun: str, step: int, cyclic: bool
) -> Iterator[_Fact]:
    """Facts of "what comes after/before": ``step`` is 1 for after, -1 for before."""
    side = "after" if step == 1 else "before"
    for i, item in enumerate(items):
        j = (i + step) % len(items)
        if abs(j - i) != 1 and not cyclic:
            continue
        key = normalize(items[j])
        if kind == "letter":
            # A letter is said most clearly last: a synthesizer reads a leading "A" as the article.
            answer = f"The letter {side} {item} is {items[j]}."
        else:
            answer = f"{items[j]} comes {side} {item}."
        # Small numbers are asked about more often than large ones.
        weight = 3.0 if kind == "number" and i <= 20 else 1.0
        yield _Fact(
            {"x": item}, answer, (key,), kind, (normalize(item),), f"{noun}_{side}:{item}", weight
        )


def _listed_facts(category: str) -> Iterator[_Fact]:
    data = _data()
    if category == "opposites":
        for one, other in data["opposites"]:
            for x, y in ((one, other), (other, one)):
                yield _Fact(
                    {"x": x},
                    f"The opposite of {x} is {y}.",
                    (y,),
                    "opposite",
                    (x,),
                    f"opposites:{x}",
                )
    elif category == "plurals":
        for x, y in data["plurals"]:
            given = (x,) if x == y else ()
            yield _Fact(
                {"x": x}, f"The plural of {x} is {y}.", (y,), "plural", given, f"plurals:{x}"
            )
    elif category == "colors":
        for x, y in data["colors"].items():
            yield _Fact({"x": x}, f"{x} is {y}.", (y,), "color", (), f"colors:{x}")
    elif category == "color_mixing":
        for a, b, c in data["color_mixing"]:
            for x, y in ((a, b), (b, a)):
                yield _Fact(
                    {"a": x, "b": y},
                    f"{x} and {y} make {c}.",
                    (c,),
                    "color",
                    (x, y),
                    f"color_mixing:{x}+{y}",
                )
    elif category == "animal_sounds":
        for x, ways in data["animal_sounds"].items():
            yield _Fact(
                {"x": x}, f"{x} says {ways[0]}.", (ways[0],), "sound", (), f"animal_sounds:{x}"
            )
    elif category == "capitals":
        for x, y in data["capitals"].items():
            yield _Fact(
                {"x": x},
                f"The capital of {x} is {y}.",
                (normalize(y),),
                "capital",
                (),
                f"capitals:{x}",
            )
    elif category == "countries":
        for x, y in data["capitals"].items():
            yield _Fact(
                {"x": y},
                f"{y} is the capital of {x}.",
                (normalize(x),),
                "country",
                tuple(mentions(y, "country")),  # "Mexico City" names Mexico
                f"countries:{y}",
            )


def _spelling() -> Iterator[_Fact]:
    for word in _data()["spelling"]:
        letters = ", ".join(word.upper())
        yield _Fact(
            {"x": word},
            f"{word} is spelled {letters}.",
            (" ".join(word),),
            "spelling",
            (),
            f"spelling:{word}",
        )


def _counting() -> Iterator[_Fact]:
    for a, length in itertools.product(range(16), range(4, 10)):
        numbers = [number_words(n) for n in range(a, a + length)]
        fill = {"a": numbers[0], "b": numbers[-1]}
        key = " ".join(numbers)
        yield _Fact(
            fill, ", ".join(numbers) + ".", (key,), "counting", (), f"counting:{a}-{a + length - 1}"
        )


@cache
def _facts(category: str) -> tuple[_Fact, ...]:
    """All facts of a category that has finitely many."""
    numbers = [number_words(n) for n in range(MAX_NUMBER + 1)]
    sequences: dict[str, tuple[Sequence[str], Kind, bool]] = {
        "number": (numbers, "number", False),
        "day": (_DAYS, "day", True),
        "month": (_MONTHS, "month", True),
        "letter": (_LETTERS, "letter", False),
    }
    if category in ("plus", "minus", "times"):
        facts = _arithmetic(category)
    elif category == "next_number":
        facts = (
            _Fact(
                {"x": number_words(n)},
                f"{number_words(n + 1)}.",
                (number_words(n + 1),),
                "number",
                (number_words(n),),
                f"next_number:{n}",
                3.0 if n <= 20 else 1.0,
            )
            for n in range(MAX_NUMBER + 1)
        )
    elif category == "spelling":
        facts = _spelling()
    elif category == "counting":
        facts = _counting()
    elif category.rpartition("_")[0] in sequences:
        noun, _, side = category.rpartition("_")
        items, kind, cyclic = sequences[noun]
        facts = _sequence(items, kind, noun, 1 if side == "after" else -1, cyclic)
    else:
        facts = _listed_facts(category)
    return tuple(facts)


# --------------------------------------------------------------------------------------- questions

GROUPS: Mapping[str, tuple[str, ...]] = {
    "plus": ("plus",),
    "minus": ("minus",),
    "times": ("times",),
    "numbers": ("number_after", "number_before"),
    "next_number": ("next_number",),
    "days": ("day_after", "day_before"),
    "months": ("month_after", "month_before"),
    "letters": ("letter_after", "letter_before"),
    "opposites": ("opposites",),
    "plurals": ("plurals",),
    "colors": ("colors", "color_mixing"),
    "animals": ("animal_sounds",),
    "capitals": ("capitals", "countries"),
    "spelling": ("spelling",),
    "counting": ("counting",),
    "repeat": ("repeat",),
    "social": ("hello", "good_morning", "good_night", "goodbye", "how_are_you", "thanks"),
    "identity": ("name", "abilities", "nature"),
}
"""Category → the sets of phrasings it is made of."""

CATEGORIES: tuple[str, ...] = tuple(GROUPS)
"""The categories of the world, in the order in which they are reported."""


def _known(weights: dict[str, float]) -> dict[str, float]:
    for category in weights:
        if category not in CATEGORIES:
            raise ValueError(f"no category {category!r}; choices: {', '.join(CATEGORIES)}")
    return weights


CategoryWeights = Annotated[dict[str, PositiveFloat], Field(min_length=1), AfterValidator(_known)]
"""In a recipe: how often each category comes up beside the others; one that is not named, never."""

RESTATING = ("plus", "minus", "times", "opposites", "plurals", "colors", "animals", "capitals")
"""Categories whose answers say again what was asked, and then the key."""

BEYOND = ("plus", "minus")
"""Categories that :func:`draw_beyond` knows."""


def _pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def draw_category(rng: np.random.Generator, weights: Mapping[str, float] | None = None) -> str:
    """A category of the world, as often as ``weights`` say; default: all alike."""
    if weights is None:
        return _pick(rng, CATEGORIES)
    bounds = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]


def _sentence(text: str) -> str:
    """Raise the first letter of each sentence (and leave the rest: names keep their case)."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def _open_with(rng: np.random.Generator, split: Split, text: str, chance: float) -> str:
    """Now and then an opener before the question: "Okay, what is ..."."""
    if rng.random() >= chance:
        return _sentence(text)
    opener = _pick(rng, _data()["openers"]["heldout" if split == "heldout" else "train"])
    keep = re.match(r"(I|I'm)\b", text) or text.split()[0].strip(",.?!") in _proper()
    return f"{opener}, {text if keep else text[0].lower() + text[1:]}"


@cache
def _proper() -> frozenset[str]:
    """First words that keep their capital inside a sentence."""
    capitals = _data()["capitals"]
    names = {name.split()[0] for pair in capitals.items() for name in pair}
    return frozenset(names | set(_DAYS) | set(_MONTHS) | set(_LETTERS))


@cache
def _phrasings(source: str, split: Split) -> tuple[str, ...]:
    return tuple(_data()["phrasings"][source][split])


@cache
def _weights(
    source: str, heldout: bool
) -> tuple[tuple[_Fact, ...], np.ndarray[Any, np.dtype[np.float64]]]:
    """The facts of a source that are (not) held out, and their cumulative weights."""
    facts = tuple(f for f in _facts(source) if f.heldout == heldout)
    weights = np.cumsum([f.weight for f in facts])
    return facts, weights / weights[-1]


def _repeat_fact(rng: np.random.Generator, heldout: bool) -> _Fact:
    words = vocabulary()
    lengths, shares = ((1, 2, 3, 4, 5, 6, 8), (0.12, 0.28, 0.25, 0.15, 0.08, 0.06, 0.06))
    while True:
        length = int(rng.choice(lengths, p=shares))
        chosen = [words[int(i)] for i in rng.choice(len(words), size=length, replace=False)]
        # An evaluation of repeating asks for sequences only: a single word is a trained fact.
        if sequence_heldout(chosen) == heldout:
            break
    text = " ".join(chosen)
    return _Fact({"x": text}, f"{text}.", (text,), "repeat", (), f"repeat:{text}", heldout=heldout)


def _pause(phrasing: str, fill: Mapping[str, str], opener: int) -> tuple[int, int] | tuple[()]:
    """Where a speaker may hesitate: anywhere up to the last word that the answer depends on.

    Not within the facts themselves ("twenty | one" is answered after "twenty"), and not after a
    fact that stands first ("seven | plus five": seven alone is a question).
    """
    last = max(phrasing.rindex("{" + name + "}") for name in fill)
    words = phrasing[:last].format(**fill).split()
    first = opener + 1
    if phrasing.startswith("{"):
        first = opener + len(words)  # "Seven plus | five?"
    final = opener + len(words)
    return (first, final) if words and first <= final else ()


def draw(
    rng: np.random.Generator, split: Split, category: str, *, opener: float = 0.12
) -> Question:
    """Draw one question of a category.

    A held-out question always has something that training never saw: its fact where facts are
    held out (three quarters of plus and minus, so half of all arithmetic; all of repeat), else its
    phrasing. A held-out fact is asked in any phrasing, trained or not.

    Args:
        rng: the source of every choice.
        split: ``"train"`` or ``"heldout"``.
        category: one of :data:`CATEGORIES` or :data:`UNKNOWN`.
        opener: probability of an opening word ("Okay, ...").
    """
    if category == UNKNOWN:
        return _draw_unknown(rng, split, opener)
    source = _pick(rng, GROUPS[category])
    if category in ("social", "identity"):
        entry = _data()["social"][source]
        return Question(
            _pick(rng, entry[split]),
            entry["answer"],
            tuple(entry["keys"]),
            category,
            split,
            "social",
            fact=f"social:{source}",
        )
    new_fact = split == "heldout" and (
        category == "repeat" or (category in ("plus", "minus") and rng.random() < 0.75)
    )
    if category == "repeat":
        fact = _repeat_fact(rng, new_fact)
    else:
        facts, cumulative = _weights(source, new_fact)
        fact = facts[int(np.searchsorted(cumulative, rng.random(), side="right"))]
    phrasings = _phrasings(source, split)
    if new_fact:
        phrasings += _phrasings(source, "train")
    phrasing = _pick(rng, phrasings)
    text = phrasing.format(**fact.fill)
    # A number said alone is the whole utterance.
    chance = 0.0 if category == "next_number" else opener
    opened = _open_with(rng, split, text, chance)
    return Question(
        opened,
        _sentence(fact.answer),
        fact.keys,
        category,
        split,
        fact.kind,
        fact.given,
        fact.name,
        new_fact,
        _pause(phrasing, fact.fill, len(opened.split()) - len(text.split())),
    )


def draw_beyond(rng: np.random.Generator, category: str) -> Question:
    """Draw a sum or difference of which some number is beyond the world's operands, none above 99.

    For training in text alone: the world's few hundred sums can be remembered one by one, and
    then no held-out one is known; these are too many. No difference undoes a held-out sum.

    Args:
        rng: the source of every choice.
        category: one of :data:`BEYOND`.
    """
    while True:
        a, b = int(rng.integers(100)), int(rng.integers(100))
        value = a + b if category == "plus" else a - b
        pair = sorted((a, b) if category == "plus" else (value, b))
        if max(a, b) > MAX_OPERAND and 0 <= value < 100 and (*pair,) not in heldout_pairs():
            break
    fact = _arithmetic_fact(category, a, b, value)
    phrasing = _pick(rng, _phrasings(category, "train"))
    return Question(
        _sentence(phrasing.format(**fact.fill)),
        _sentence(fact.answer),
        fact.keys,
        category,
        "train",
        fact.kind,
        fact.given,
        fact.name,
    )


def number_alone(word: str) -> Question:
    """The question that a number (``"seven"``) said alone is. ValueError for any other word."""
    for fact in _facts("next_number"):
        if fact.fill["x"] == word:
            answer = _sentence(fact.answer)
            return Question(
                _sentence(word) + ".",
                answer,
                fact.keys,
                "next_number",
                "train",
                fact.kind,
                fact.given,
                fact.name,
            )
    raise ValueError(f"no number of the quiz world: {word!r}")


def _draw_unknown(rng: np.random.Generator, split: Split, opener: float) -> Question:
    data = _open()[split]
    # Whole questions are few and varied, templates many and alike: half and half.
    if rng.random() < 0.5:
        text = _pick(rng, data["questions"])
    else:
        fillers = {name: _pick(rng, values) for name, values in data["fillers"].items()}
        text = _pick(rng, data["templates"]).format(**fillers)
    opened = _open_with(rng, split, text, opener)
    # The first half of an open question asks nothing that could be answered.
    half = len(opened.split()) // 2
    return Question(
        opened,
        _data()["refusal"],
        ("do not know",),
        UNKNOWN,
        split,
        "refusal",
        fact=f"{UNKNOWN}:{normalize(text)}",
        pause=(2, half) if half >= 2 else (),
    )


def questions(
    split: Split,
    n: int,
    seed: int,
    categories: Sequence[str] | Mapping[str, float] | None = None,
) -> list[Question]:
    """Draw ``n`` questions, the same for the same arguments.

    Args:
        split: ``"train"`` or ``"heldout"``.
        n: how many.
        seed: of the draw.
        categories: names (each gets an equal share, to within one), or name → weight (drawn at
            random); default: all of :data:`CATEGORIES`, equally.
    """
    assert split in get_args(Split), split
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    names = list(categories) if categories is not None else list(CATEGORIES)
    unknown = set(names) - {*CATEGORIES, UNKNOWN}
    if unknown:
        raise ValueError(
            f"no such category: {sorted(unknown)}; choose from {[*CATEGORIES, UNKNOWN]}"
        )
    if isinstance(categories, Mapping):
        weights = np.array([categories[name] for name in names], dtype=float)
        order = [names[int(i)] for i in rng.choice(len(names), size=n, p=weights / weights.sum())]
    else:
        order = [names[i % len(names)] for i in range(n)]
    return [draw(rng, split, category) for category in order]


def out_of_world(split: Split, n: int, seed: int) -> list[Question]:
    """``n`` questions from outside the world; distinct as long as there are enough."""
    rng = np.random.default_rng([seed, 2 if split == "train" else 3])
    found: dict[str, Question] = {}
    extra: list[Question] = []
    for _ in range(10 * n):
        if len(found) == n:
            break
        question = draw(rng, split, UNKNOWN)
        if found.setdefault(question.fact, question) is not question:
            extra.append(question)
    return (list(found.values()) + extra)[:n]


def sentences(
    split: Split, n: int, seed: int, categories: Mapping[str, float] | None = None
) -> list[str]:
    """``n`` things that are said in this world: questions, answers, and questions outside it.

    For training recognizers and codecs on its language; words only. ``categories`` weighs those of
    the world; default: all alike.
    """
    rng = np.random.default_rng([seed, 4 if split == "train" else 5])
    said: list[str] = []
    while len(said) < n:
        category = UNKNOWN if rng.random() < 0.15 else draw_category(rng, categories)
        question = draw(rng, split, category)
        said.append(question.text if rng.random() < 0.6 else question.answer)
    return said


def all_answers(repeat: int = 3000, seed: int = 0) -> list[str]:
    """Every answer of the world, once each, for a recognizer's language model.

    Repeated word sequences are without end: ``repeat`` of them are drawn, from neither split's
    questions in particular, after every single word of the vocabulary.
    """
    finite = [s for c in CATEGORIES if c not in ("repeat", "social", "identity") for s in GROUPS[c]]
    answers = {_sentence(fact.answer): None for source in finite for fact in _facts(source)}
    answers |= {entry["answer"]: None for entry in _data()["social"].values()}
    answers[_data()["refusal"]] = None
    answers |= {_sentence(f"{word}."): None for word in vocabulary()}
    rng = np.random.default_rng([seed, 6])
    for _ in range(repeat):
        answers[_sentence(_repeat_fact(rng, heldout=bool(rng.random() < 0.5)).answer)] = None
    return list(answers)


def greeting() -> str:
    """What the assistant says when a conversation begins with its own greeting."""
    return str(_data()["social"]["hello"]["answer"])
