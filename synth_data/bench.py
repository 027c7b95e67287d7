"""How good the making of data is: what de-duplication finds, and how text becomes codes.

    speechlm bench synth --text-to-token runs/shipped/text_to_token/text_to_token

De-duplication is measured on texts made here, of which everything is known: no corpus is needed.

A text-to-token model is measured against what it replaces:

    round 1   text-to-token │ TTS → tokenizer       the same texts, in the same processes,
    round 2   TTS → tokenizer │ text-to-token       all of them at once, nothing on disk

Each process has one thread and its share of the texts, so that all cores are busy either way; what
else the machine does slows both alike, and the speedup is taken within a round. Of the route
through sound the best setting counts (engine, batch, precision; tried out before the first round).

Word error rates are those of the tokenizer's own CTC head, reading codes of either route: the model
has learned from many voices, so the route through sound is read in the same voices. With a token
decoder, they are also those of an independent recognizer that hears the codes spoken again.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from audio_codec.bench import Figure
from audio_codec.codec import load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.precision import Precision, has_bf16
from audio_codec.token_decoder import check_match, load_token_decoder
from synth_data import quiz
from synth_data.build import start_worker
from synth_data.dedup import KEPT, DedupConfig, deduplicate, jaccard, shingles
from synth_data.recipes.pairs import tokenize
from synth_data.text_to_token import (
    GenerationConfig,
    Line,
    generate,
    kept_model,
    kept_tokenizer,
    load_text_to_token,
    transcribe,
)
from synth_data.tts import Voice, speak, user_voices
from synth_data.verify import default_recognizer, word_errors

EDITS = tuple(range(1, 11))
"""Percent of the words of a copy that are changed, for the recall curve."""

# A planted pair is a duplicate from here on, and a text with no neighbour beyond there is none.
_DUPLICATE, _DISTINCT = 0.92, 0.75

Codes = npt.NDArray[np.uint16]
Ids = npt.NDArray[np.int64]
Decode = Callable[[Codes], npt.NDArray[np.float32]]
"""Codes [T] → sound [S] at 24 kHz."""

FAST_VOICES: Final = ("espeak:en-us+m3", "flite:slt")
"""Of each engine the fastest voice that data is made with (flite's faster diphone voices are held
out from all training)."""
BATCHES: Final = (1, 4, 16, 64)
# Sentences whose errors are counted: enough for an interval of a percent or two.
_READ = 300


# --- De-duplication -------------------------------------------------------------------------------


def measure_dedup(
    documents: int = 4000, seed: int = 0, config: DedupConfig | None = None
) -> dict[str, Figure]:
    """Find planted near duplicates among texts of 20 to 400 words.

    Words follow Zipf's law. Half of the texts have a copy in which words were replaced, deleted or
    inserted; a corpus is all texts, then all copies. Similarities are the true ones, in the
    configured shingles; a text's nearest neighbour is found by comparing it with all.

    Gives ``dedup_recall``: of the copies with a similarity of at least 0.92, the share found.
    ``dedup_false_drop``: of texts and copies whose nearest neighbour is at most 0.75, the share
    dropped. And for copies with N% of the words edited, ``dedup_recall_edit_N``, the share found,
    with ``dedup_similarity_edit_N``, their mean true similarity.
    """
    assert documents >= 20, documents
    config = config or DedupConfig()
    rng = np.random.default_rng(seed)
    vocabulary = _vocabulary()
    texts = [_words(rng, vocabulary, int(rng.integers(20, 401))) for _ in range(documents)]
    # Light edits make duplicates, heavy ones make neighbours that must stay.
    rates = rng.choice([0.002, 0.005, 0.01, 0.1, 0.2, 0.3], size=documents // 2)
    copies = [
        _edited(rng, vocabulary, words, rate) for words, rate in zip(texts, rates, strict=False)
    ]
    corpus = [" ".join(words) for words in (*texts, *copies)]
    verdicts = deduplicate(corpus, config)
    sets = [shingles(text, config.unit, config.size) for text in corpus]
    planted = [
        documents + i
        for i in range(len(copies))
        if jaccard(sets[i], sets[documents + i]) >= _DUPLICATE
    ]
    distinct = np.flatnonzero(nearest(sets) <= _DISTINCT)
    figures = {
        "dedup_recall": _share([verdicts[i] != KEPT for i in planted]),
        "dedup_false_drop": _share([verdicts[i] != KEPT for i in distinct]),
    }
    for percent in EDITS:
        edited = [_edited(rng, vocabulary, words, percent / 100) for words in texts[:500]]
        pairs = [" ".join(words) for words in (*texts[:500], *edited)]
        verdicts = deduplicate(pairs, config)
        near = [
            jaccard(shingles(a, config.unit, config.size), shingles(b, config.unit, config.size))
            for a, b in zip(pairs, pairs[len(edited) :], strict=False)
        ]
        figures[f"dedup_recall_edit_{percent}"] = _share(list(verdicts[len(edited) :] != KEPT))
        figures[f"dedup_similarity_edit_{percent}"] = Figure(float(np.mean(near)), n=len(near))
    return figures


def nearest(sets: Sequence[frozenset[str]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Similarity of each set's nearest neighbour, by an index from shingles to sets: exact."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for number, grams in enumerate(sets):
        for gram in grams:
            holders[gram].append(number)
    best = np.zeros(len(sets))
    for number, grams in enumerate(sets):
        shared = Counter(other for gram in grams for other in holders[gram])
        for other, count in shared.items():
            if other != number:
                union = len(grams) + len(sets[other]) - count
                best[number] = max(best[number], count / union)
    return best


def _vocabulary() -> list[str]:
    words = resources.files("synth_data").joinpath("quiz_data", "words.txt").read_text()
    return list(dict.fromkeys(re.findall(r"[a-z]+", words)))


def _words(rng: np.random.Generator, vocabulary: Sequence[str], count: int) -> list[str]:
    """Words of which the n-th is drawn with a chance of about 1/n."""
    ranks = (len(vocabulary) ** rng.random(count)).astype(int) - 1
    return [vocabulary[rank] for rank in ranks]


def _edited(
    rng: np.random.Generator, vocabulary: Sequence[str], words: Sequence[str], rate: float
) -> list[str]:
    """A copy in which a share of the words, and at least one, is replaced, deleted or doubled."""
    copy: list[str] = list(words)
    count = max(1, round(rate * len(copy)))
    for place in sorted(rng.choice(len(copy), size=count, replace=False), reverse=True):
        new = _words(rng, vocabulary, 1)
        copy[place : place + 1] = ([*new], [], [copy[place], *new])[int(rng.integers(3))]
    return copy


def _share(hits: Sequence[bool]) -> Figure:
    """A share of trials with Wilson's interval (1927), which stays honest near 0 and 1."""
    n, z = len(hits), 1.959964
    share = sum(map(bool, hits)) / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Figure(share, float(max(0.0, centre - half)), float(min(1.0, centre + half)), n)


# --- Text to token --------------------------------------------------------------------------------


def tokenizer_of(model: str) -> str:
    """The tokenizer whose codes a text-to-token model was trained to speak.

    Raises UserError when there is no such model, or it does not say.
    """
    named = load_text_to_token(model).config.tokenizer
    if not named:
        raise UserError(f"model '{model}' does not say whose codes it speaks: name a tokenizer.")
    return named


def measure_text_to_token(
    model: str,
    tokenizer: str,
    texts: int,
    *,
    decoder: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Figure]:
    """`errors` on 300 held-out sentences at most, `speed` on so many; all by name or path.

    Raises UserError where they do.
    """
    said = quiz.sentences("heldout", texts, seed)
    speaking = None if decoder is None else speaker(decoder, tokenizer)
    found = errors(model, tokenizer, said[:_READ], decode=speaking)
    return found | speed(model, tokenizer, said, device=device)


# --- Text to token: speed -------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """One way from texts to codes, as its processes load it."""

    tokenizer: str
    model: str | None = None
    """A text-to-token model; None: through sound."""
    precision: Precision = "auto"
    batch: int = 512
    voice: str = ""
    """Who speaks, on the way through sound."""
    device: str = "cpu"
    """Where the models run; speech is always synthesized on the processor."""


def codes_of(route: Route, texts: Sequence[str]) -> list[Codes]:
    """Take a route in this process; a text that the model could not say has no codes."""
    if route.model is not None:
        lines = [Line(text, seed) for seed, text in enumerate(texts)]
        config = GenerationConfig(batch=route.batch)
        spoken = generate(kept_model(route.model, route.precision, route.device), lines, config)
        return [said.codes if said.fault is None else said.codes[:0] for said in spoken]
    voice = Voice.parse(route.voice)
    sounds = [speak(text, voice).pcm for text in texts]
    return tokenize(
        kept_tokenizer(route.tokenizer, route.device), sounds, route.batch, route.precision
    )


def _count(route: Route, texts: Sequence[str]) -> int:
    return sum(len(codes) for codes in codes_of(route, texts))


Take = Callable[[Route, Sequence[str]], tuple[int, float]]
"""A route and texts → how many codes there were, and seconds of wall clock."""


def in_turns(routes: Mapping[str, Route], texts: Sequence[str], take: Take, rounds: int) -> Rates:
    """Codes a second of each route, round by round; who goes first changes from round to round."""
    rates: Rates = {name: [] for name in routes}
    for number in range(rounds):
        names = list(routes)
        for name in names if number % 2 else names[::-1]:
            codes, seconds = take(routes[name], texts)
            rates[name].append(codes / seconds)
    return rates


Rates = dict[str, list[float]]
"""Route → codes a second, round by round."""


def _start_worker() -> None:
    start_worker()
    torch.set_num_threads(1)


def best_route(
    tokenizer: str, voices: Sequence[str], texts: Sequence[str], take: Take, device: str = "cpu"
) -> Route:
    """The fastest setting of the route through sound."""
    start = Route(tokenizer, batch=16, device=device)
    candidates = [replace(start, voice=voice) for voice in voices]

    def fastest(routes: Sequence[Route]) -> Route:
        for route in routes:  # models are loaded, kernels are compiled
            take(route, texts)
        found = in_turns({repr(route): route for route in routes}, texts, take, 2)
        return max(routes, key=lambda route: max(found[repr(route)]))

    voice = fastest(candidates).voice
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if has_bf16(device) else ("fp32",)
    settings = itertools.product(BATCHES, precisions)
    return fastest([replace(start, voice=voice, batch=batch, precision=p) for batch, p in settings])


def speed(
    model: str,
    tokenizer: str,
    texts: Sequence[str],
    *,
    workers: int = 2,
    rounds: int = 5,
    voices: Sequence[str] = FAST_VOICES,
    device: str = "cpu",
) -> dict[str, Figure]:
    """Seconds of speech a second of wall clock, by the model and by the best route through sound.

    `text_to_token_speedup` is the median of the rounds' ratios; `text_to_token_rate` and
    `tts_path_rate` are the medians that it is made of, `tokens_per_second` the model's codes.

    Args:
        model: checkpoint of a text-to-token model.
        tokenizer: checkpoint of its tokenizer, or of a codec around it.
        texts: in spoken form.
        workers: processes, one thread each.
        rounds: how often each route is taken.
        voices: who may speak on the route through sound.
        device: where the models of either route run.

    Raises:
        UserError: a checkpoint is missing or broken, or a voice is unknown or not installed.
    """
    rate = load_tokenizer_of(tokenizer).rate
    load_text_to_token(model)
    # Every process has texts of all lengths.
    ordered = sorted(texts, key=len)
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    ) as pool:

        def take(route: Route, texts: Sequence[str]) -> tuple[int, float]:
            began = time.perf_counter()
            waiting = [pool.submit(_count, route, texts[at::workers]) for at in range(workers)]
            return sum(future.result() for future in waiting), time.perf_counter() - began

        few = ordered[:: max(1, len(ordered) // 128)]
        routes = {
            "text_to_token": Route(tokenizer, model, device=device),
            "tts_path": best_route(tokenizer, voices, few, take, device),
        }
        for route in routes.values():
            take(route, ordered)
        rates = in_turns(routes, ordered, take, rounds)
    return figures(rates, rate)


def figures(rates: Rates, rate: float) -> dict[str, Figure]:
    """What `speed` gives, from codes a second and the codes of a second of speech."""
    ours, theirs = rates["text_to_token"], rates["tts_path"]
    return {
        "text_to_token_speedup": _median(np.divide(ours, theirs), "×"),
        "text_to_token_rate": _median(np.array(ours) / rate, "s/s"),
        "tts_path_rate": _median(np.array(theirs) / rate, "s/s"),
        "tokens_per_second": _median(np.array(ours), "1/s"),
    }


def _median(values: npt.NDArray[np.float64], unit: str) -> Figure:
    """Median over the rounds with its bootstrap interval."""
    low, high = _interval(len(values), lambda picks: np.median(values[picks], axis=1))
    return Figure(float(np.median(values)), low, high, len(values), unit)


def _interval(count: int, statistic: Callable[[Ids], npt.NDArray[Any]]) -> tuple[float, float]:
    """95% percentile bootstrap over `count` trials: 2000 seeded resamples [2000, count]."""
    picks = np.random.default_rng(0).integers(count, size=(2000, count))
    low, high = np.percentile(statistic(picks), [2.5, 97.5])
    return float(low), float(high)


# --- Text to token: errors ------------------------------------------------------------------------


def speaker(decoder: str, tokenizer: str | None = None) -> Decode:
    """Speaks codes in a token decoder's first voice.

    Raises UserError when it or the tokenizer cannot be loaded, or they do not match.
    """
    model = load_token_decoder(decoder)
    if tokenizer is not None:
        check_match(load_tokenizer_of(tokenizer), model)
    voice = model.voice(model.config.voices[0])[None]

    @torch.inference_mode()
    def decode(codes: Codes) -> npt.NDArray[np.float32]:
        if int(codes.max(initial=0)) >= (size := math.prod(model.config.codebook)):
            raise UserError(f"decoder {decoder!r} speaks {size} codes; {codes.max()} is none.")
        spoken = model.decode(torch.from_numpy(codes.astype(np.int64))[None], voice=voice)
        return spoken[0, 0].float().numpy()

    return decode


def errors(
    model: str,
    tokenizer: str,
    texts: Sequence[str],
    *,
    voices: Sequence[Voice] | None = None,
    decode: Decode | None = None,
) -> dict[str, Figure]:
    """Word error rates of codes of either route, read by the tokenizer, and heard where decoded.

    `text_to_token_wer` and `tts_path_wer`: read off the codes by the tokenizer's CTC head.
    `text_to_token_decoded_wer` and `tts_path_decoded_wer`, with a `decode`: heard by an independent
    recognizer in the sound made of the codes. `text_to_token_faults`: share of the texts that the
    model could not say; they count as silence.

    Args:
        model: checkpoint of a text-to-token model.
        tokenizer: checkpoint of its tokenizer, or of a codec around it.
        texts: in spoken form.
        voices: who speaks them on the route through sound, in turns; None: all training voices.
        decode: a token decoder.

    Raises:
        UserError: a checkpoint is missing or broken, or a speech engine is not installed.
    """
    listener = load_tokenizer_of(tokenizer)
    speakers = voices or user_voices("train")
    ours = codes_of(Route(tokenizer, model), texts)
    sounds = [speak(text, voice).pcm for text, voice in zip(texts, itertools.cycle(speakers))]
    routes = {"text_to_token": ours, "tts_path": tokenize(listener, sounds)}
    found = {
        f"{name}_wer": _wer(texts, transcribe(listener, codes)) for name, codes in routes.items()
    }
    if decode is not None:
        for name, codes in routes.items():
            heard = [
                default_recognizer().transcribe(decode(row)) if len(row) else "" for row in codes
            ]
            found[f"{name}_decoded_wer"] = _wer(texts, heard)
    faults = sum(len(codes) == 0 for codes in ours)
    return found | {"text_to_token_faults": Figure(faults / len(ours), n=len(ours))}


def _wer(texts: Sequence[str], heard: Sequence[str]) -> Figure:
    """Of a corpus, with its bootstrap interval over utterances."""
    found = [word_errors(text, said) for text, said in zip(texts, heard, strict=True)]
    wrong, words = (np.array([getattr(e, name) for e in found]) for name in ("errors", "words"))
    low, high = _interval(len(found), lambda picks: wrong[picks].sum(1) / words[picks].sum(1))
    return Figure(sum(found[1:], found[0]).rate, low, high, len(found))
