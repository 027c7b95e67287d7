"""Are words that differ in one sound told apart by a codec's semantic codes?

A machine ABX test (Schatz et al., "Evaluating speech features with the minimal-pair ABX task",
2013), on words instead of phones cut from running speech: A and X are two sayings of one word, B is
a saying of another that differs from it in exactly one phone; the trial fails when X lies nearer to
B than to A, and half fails when they are equally near. Chance is 50%, better is less.

    within speakers    A: beat  carrier 1  voice s       B: bit  carrier 1  voice s
                                     X: beat  carrier 2  voice s
    across speakers    A: beat  carrier c  voice s       B: bit  carrier c  voice s
                                     X: beat  any carrier, any voice but s

A and B always share their sentence, so that what stands around a word helps neither.

*Words*: `SETS`; within a set any two differ in one phone (the vowel, the first or the last
consonant), which makes 66 contrasts, as in the triphones of the ZeroSpeech challenges (context and
centre, all three phones in the token). *Voices*: synthesized ones that nothing was trained on, with
other speed and pitch each time. *Times*: the speech engines' own word times (forced: the engine
knows what it says when). *Place on the frame grid*: each sentence begins after a silence of a
random part of 80 ms, so that it shows when a code depends on where the frame falls.

A token is the frames that overlap its word. Two tokens are compared by dynamic time warping: the
mean distance along the cheapest path that steps on in either or both. The distance of two frames is
the Euclidean one of what their codes stand for (`Semantic.embed_semantic`), the distance by which
quantizers themselves choose.

The failures of a contrast are averaged over its voices, carriers and both directions; the measure
is the mean over contrasts, its interval a bootstrap over them.

Letters: P pairs of tokens, N and M frames of theirs, D numbers of a frame, T frames of a sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, Pcm
from speechlm.evaluation.report import Metric, bootstrap_mean
from synth_data.tts import speak, user_voices

SETS: Final = (
    ("beat", "bit", "bet", "bat", "boot", "boat", "bait", "bite"),
    ("pat", "bat", "cat", "fat", "mat", "sat", "rat", "hat"),
    ("big", "bid", "bin", "bit", "bill"),
)
"""Words of three phones; any two of a set differ in one of them."""
CARRIERS: Final = ("Now say {} again.", "They wrote {} down.")
VOICES: Final = 7
"""Of the held-out voices, at most so many speak."""

Features = npt.NDArray[np.floating]

_CHUNK = 2048  # Pairs compared at once; bounds the memory.


@runtime_checkable
class Semantic(Protocol):
    """A codec whose first codebook's codes are points of a space."""

    def embed_semantic(self, codes: Tensor) -> Tensor:
        """Codes of codebook 0 [B, T] → what they stand for [B, T, D]."""


@dataclass(frozen=True, slots=True)
class Saying:
    """A word in a sentence, by a voice."""

    word: str
    carrier: str
    voice: str
    pcm: Pcm  # [S] at 24 kHz, the whole sentence
    start: float
    """Of the word, in seconds."""
    end: float

    def frames(self, features: Features, rate: float) -> Features:
        """The part of the sentence's features [T, D], `rate` a second, that overlaps the word."""
        first, last = int(self.start * rate), int(np.ceil(self.end * rate))
        return features[first : max(last, first + 1)]


def words() -> list[str]:
    """Every word of the test, once."""
    return sorted(set(itertools.chain(*SETS)))


def contrasts() -> list[tuple[str, str]]:
    """Pairs of words that differ in one phone, each once."""
    pairs = itertools.chain(*(itertools.combinations(sorted(group), 2) for group in SETS))
    return sorted(set(pairs))


def sayings(voices: int, seed: int) -> Iterator[Saying]:
    """Every word in every carrier, by so many of the held-out voices (at most `VOICES`)."""
    rng = np.random.default_rng(seed)
    everybody = user_voices("heldout")
    count = min(voices, VOICES)
    chosen = [everybody[i * len(everybody) // count] for i in range(count)]
    for voice, carrier, word in itertools.product(chosen, CARRIERS, words()):
        spoken = speak(carrier.format(word), voice.jitter(rng))
        lead = int(rng.integers(FRAME_SIZE))
        (timed,) = (timed for timed in spoken.words if timed.text == word)
        pcm = np.concatenate([np.zeros(lead, np.float32), spoken.pcm])
        start, end = (seconds + lead / SAMPLE_RATE for seconds in (timed.start, timed.end))
        yield Saying(word, carrier, str(voice), pcm, start, end)


def dtw(
    costs: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], columns: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Mean cost along the cheapest warping path of each pair.

    Args:
        costs: of matching frame n with frame m, [P, N, M]; beyond a pair's own frames anything.
        rows: frames of each pair's first token, [P].
        columns: of its second.

    A path goes from the first frames to the last ones by steps of one in either or both; among
    steps of equal cost, both comes first. Returns [P].
    """
    pairs, height, width = costs.shape
    total = np.full((pairs, height + 1, width + 1), np.inf)
    total[:, 0, 0] = 0
    steps = np.zeros((pairs, height + 1, width + 1))
    for n, m in itertools.product(range(height), range(width)):
        before = ((n, m), (n, m + 1), (n + 1, m))
        options = np.stack([total[:, i, j] for i, j in before])
        best = options.argmin(0)[None]
        total[:, n + 1, m + 1] = costs[:, n, m] + np.take_along_axis(options, best, 0)[0]
        walked = np.stack([steps[:, i, j] for i, j in before])
        steps[:, n + 1, m + 1] = 1 + np.take_along_axis(walked, best, 0)[0]
    every = np.arange(pairs)
    return total[every, rows, columns] / steps[every, rows, columns]


def distances(tokens: Sequence[Features]) -> npt.NDArray[np.float64]:
    """Warped distance of every two tokens [N, D] (each its own N): symmetric, zero on itself."""
    lengths = np.array([len(token) for token in tokens])
    padded = np.zeros((len(tokens), lengths.max(), tokens[0].shape[1]))
    for row, token in zip(padded, tokens, strict=True):
        row[: len(token)] = token
    found = np.zeros((len(tokens), len(tokens)))
    firsts, seconds = np.triu_indices(len(tokens), 1)
    for start in range(0, len(firsts), _CHUNK):
        i, j = firsts[start : start + _CHUNK], seconds[start : start + _CHUNK]
        a, b = padded[i], padded[j]
        size = (a**2).sum(-1)[:, :, None] + (b**2).sum(-1)[:, None]
        squares = size - 2 * np.einsum("pnd,pmd->pnm", a, b)
        # Equal codes must be at no distance at all: what rounding leaves would decide a tie.
        squares[squares < 1e-12 * size] = 0
        found[i, j] = found[j, i] = dtw(np.sqrt(squares), lengths[i], lengths[j])
    return found


def errors(
    distance: npt.NDArray[np.float64], said: Sequence[Saying], *, across: bool
) -> list[float]:
    """Share of failed trials of each contrast, from the distances of every two sayings."""
    word, carrier, voice = (
        np.array([getattr(saying, name) for saying in said])
        for name in ("word", "carrier", "voice")
    )
    found = []
    for pair in contrasts():
        failures = []
        for one, other in (pair, pair[::-1]):
            for a in np.flatnonzero(word == one):
                (b,) = np.flatnonzero(
                    (word == other) & (carrier == carrier[a]) & (voice == voice[a])
                )
                if across:
                    x = np.flatnonzero((word == one) & (voice != voice[a]))
                else:
                    x = np.flatnonzero(
                        (word == one) & (voice == voice[a]) & (carrier != carrier[a])
                    )
                near, far = distance[a, x], distance[b, x]
                failures.append(float(np.mean((near > far) + 0.5 * (near == far))))
        found.append(float(np.mean(failures)))
    return found


def discrimination(tokens: Sequence[Features], said: Sequence[Saying]) -> dict[str, Metric]:
    """`abx_within` and `abx_across` of the tokens [N, D] of sayings by two voices or more.

    Without a value where nothing was said.
    """
    if not said:
        nothing = Metric(None, n=0, reason="nobody said the minimal pairs")
        return {"abx_within": nothing, "abx_across": nothing}
    distance = distances(tokens)
    return {
        "abx_within": bootstrap_mean(errors(distance, said, across=False)),
        "abx_across": bootstrap_mean(errors(distance, said, across=True)),
    }
