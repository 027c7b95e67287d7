"""How fast text becomes codes, and how well: a text-to-token model against what it replaces.

    round 1   text-to-token │ TTS → tokenizer       the same texts, in the same processes,
    round 2   TTS → tokenizer │ text-to-token       all of them at once, nothing on disk

Each process has one thread and its share of the texts, so that all cores are busy either way; what
else the machine does slows both alike, and the speedup is taken within a round. Of the route
through sound the best setting counts (engine, batch, precision; tried out before the first round).

Word error rates are those of the tokenizer's own CTC head, reading codes of either route: the model
has learned from many voices, so the route through sound is read in the same voices.

    speechlm bench synth --text-to-token runs/shipped/text_to_token/text_to_token
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from audio_codec.bench import Figure
from audio_codec.codec import load_tokenizer_of
from audio_codec.memory import tune_allocator
from audio_codec.speech_tokenizer import SpeechTokenizer
from synth_data.recipes.pairs import tokenize
from synth_data.text_to_token import (
    GenerationConfig,
    Line,
    TextToToken,
    generate,
    load_text_to_token,
    transcribe,
)
from synth_data.tts import Voice, speak, user_voices
from synth_data.verify import default_recognizer, pooled_rate, word_errors

Precision = Literal["fp32", "bf16"]
Codes = npt.NDArray[np.uint16]
Decode = Callable[[Codes], npt.NDArray[np.float32]]
"""Codes [T] → sound [S] at 24 kHz."""

FAST_VOICES: Final = ("espeak:en-us+m3", "flite:slt")
"""Of each engine the fastest voice that data is made with (flite's faster diphone voices are held
out from all training)."""
BATCHES: Final = (1, 4, 16, 64)


# --- Text to token: speed -------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """One way from texts to codes, as its processes load it."""

    tokenizer: str
    model: str | None = None
    """A text-to-token model; None: through sound."""
    precision: Precision = "bf16"
    batch: int = 512
    voice: str = ""
    """Who speaks, on the way through sound."""


@functools.cache
def _model(name: str, precision: Precision) -> TextToToken:
    tune_allocator()
    return load_text_to_token(name, precision)


@functools.cache
def _tokenizer(name: str) -> SpeechTokenizer:
    tune_allocator()
    return load_tokenizer_of(name)


def codes_of(route: Route, texts: Sequence[str]) -> list[Codes]:
    """Take a route in this process; a text that the model could not say has no codes."""
    if route.model is not None:
        lines = [Line(text, seed) for seed, text in enumerate(texts)]
        config = GenerationConfig(batch=route.batch)
        spoken = generate(_model(route.model, route.precision), lines, config)
        return [said.codes if said.fault is None else said.codes[:0] for said in spoken]
    voice = Voice.parse(route.voice)
    sounds = [speak(text, voice).pcm for text in texts]
    return tokenize(_tokenizer(route.tokenizer), sounds, route.batch, route.precision)


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


def best_route(tokenizer: str, voices: Sequence[str], texts: Sequence[str], take: Take) -> Route:
    """The fastest setting of the route through sound."""
    start = Route(tokenizer, batch=16, precision="bf16")
    candidates = [replace(start, voice=voice) for voice in voices]

    def fastest(routes: Sequence[Route]) -> Route:
        for route in routes:  # models are loaded, kernels are compiled
            take(route, texts)
        found = in_turns({repr(route): route for route in routes}, texts, take, 2)
        return max(routes, key=lambda route: max(found[repr(route)]))

    voice = fastest(candidates).voice
    settings = itertools.product(BATCHES, ("fp32", "bf16"))
    return fastest(
        [replace(start, voice=voice, batch=batch, precision=p) for batch, p in settings]  # type: ignore[arg-type]
    )


def speed(
    model: str,
    tokenizer: str,
    texts: Sequence[str],
    *,
    workers: int = 2,
    rounds: int = 5,
    voices: Sequence[str] = FAST_VOICES,
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
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:

        def take(route: Route, texts: Sequence[str]) -> tuple[int, float]:
            began = time.perf_counter()
            waiting = [pool.submit(_count, route, texts[at::workers]) for at in range(workers)]
            return sum(future.result() for future in waiting), time.perf_counter() - began

        through_sound = best_route(tokenizer, voices, ordered[:: max(1, len(ordered) // 128)], take)
        routes = {"text_to_token": Route(tokenizer, model), "tts_path": through_sound}
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
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Figure(float(np.median(values)), float(low), float(high), len(values), unit)


# --- Text to token: errors ------------------------------------------------------------------------


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
    found = [word_errors(text, said) for text, said in zip(texts, heard, strict=True)]
    return Figure(*pooled_rate(found), n=len(found))
