"""How well words can be read off the semantic codes, and what else the codes say.

Held-out sentences of the quiz world are synthesized, tokenized, and read back by the tokenizer's
own head, greedily; recordings of people likewise:

    sentences ─ speak ─┬──────────── encode ═ codes ─┬─ read back: errors in words and characters
                       │                             └─ count: usage, entropy
                       └─ add noise ─ encode ═ codes ── read back
    recordings ─────────────────────  encode ═ codes ─┬─ read back
                                                      └─ compare those of different speakers

    wer_quantized, cer_quantized      errors through the codes, in held-out voices
    wer_unquantized, cer_unquantized  past the rounding, in the same network: what it alone costs
    wer_twin, cer_twin                in the twin, trained alike but without a bottleneck: all that
                                      its encoder says is read, as wide as it is
    wer_ratio                         wer_quantized over wer_twin: what the bottleneck costs
    …_new_speakers                    all these in those of the held-out voices that are no trained
                                      speaker in another accent, rate or pitch
    …_known                           on the same sentences in voices of the training
    …_recorded                        on sentences new to training, by recorded people who are not
    wer_noise_5db, cer_noise_5db      wer_quantized under pink noise, 5 dB below the speech
    codebook_usage                    share of the codes seen at least once in n codes, those of the
                                      clean sounds above and, up to a number asked for, of more
    codebook_entropy_ratio            entropy of their distribution over log2 of their number (too
                                      low where n is not many times that number)
    codebook_entropy                  the same, by its first name
    speaker_invariance                0 = codes do not tell who speaks; see the function
    speaker_invariance_warped         likewise of what the codes stand for: near counts as near
    resynthesis_wer                   of the codes spoken again by a decoder; see `resynthesis`
    lookahead_ms                      of sound that a code waits for beyond its own frame
    realtime_factor                   seconds of computing a second of sound, streaming
    streaming_agreement               share of n codes that a stream gives as one pass does; and
    streaming_agreement_float64       the same in double precision, where no rounding tips a tie

A tokenizer that reads no text (GLM-4-Voice's, as published) has no errors to count, one without a
bottleneck no codes: those metrics are null, and all others are measured. One that hears at another
rate hears the same sounds, resampled.

Intervals are bootstraps over utterances, of speaker invariance over sentences, of
`realtime_factor` over frames, and Wilson's of `streaming_agreement`. Sounds are made, heard and
forgotten a few at a time, so that memory does not grow with their number.

A comparison of several tokenizers names each one's metrics after its shape, as `wer_ratio` in
`wer_ratio_12_5hz_4375_fsq`; its `wer_quantized` is simply `wer_12_5hz_4375_fsq`. A look-ahead is
part of the shape: `wer_12_5hz_4375_fsq_160ms`.

Letters: B utterances of a batch, S samples, T codes of an utterance, L codes of the codebook,
D numbers of a code, N token sequences.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor
from torchaudio.functional import edit_distance

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, LogMel, Pcm, load, resample
from audio_codec.errors import UserError
from audio_codec.quantize import entropy_bits
from audio_codec.speech_tokenizer import SpeechTokenizer, encode_whole
from audio_codec.token_decoder import load_token_decoder
from speechlm.convert import load_speech_tokenizer_of, tokenizer_folder
from speechlm.evaluation import abx, report, resynthesis
from speechlm.evaluation.conversation import progress_bar
from speechlm.evaluation.report import (
    Metric,
    bootstrap_mean,
    bootstrap_ratio,
    proportion,
    shown,
)
from speechlm.evaluation.twins import check_twin, finished_runs, twin_of
from speechlm.training.tokenizer import Vocabulary, kept_vocabulary, transcribe
from synth_data import quiz, shards
from synth_data.augment import add_noise, pink
from synth_data.recipes.speech import MANIFEST, read_manifest
from synth_data.text import normalize
from synth_data.tts import Voice, new_speakers, speak, user_voices
from synth_data.verify import WordErrors, word_errors

log = logging.getLogger(__name__)

T = TypeVar("T")

NOISE_DB: Final = (0, 5, 10, 20)
"""Signal-to-noise ratios at which robustness is measured."""
TIMED_SECONDS: Final = 16.0
"""Of sound, over which `realtime_factor` is taken, or ten frames where these are longer."""
THREADS: Final = 2
"""What it is taken on; `speechlm bench codec` has its headline on as many."""

_BATCH = 16  # Utterances heard at once.
_TAIL = SAMPLE_RATE // 50  # Silence after an utterance, in which the last window slides off it.
_WARM = 5  # Frames that are not timed: they find the caches full of something else.
_SENTENCES_DRAWN = 256  # At once, where there is no end to them.
_SENTENCES_COMPARED = 10  # With each other; the work grows with its square.
_PASS_SECONDS = 60  # Of a long sound in one pass.
_NO_CODES = "it has no codes, for it has no bottleneck"


# --- What is heard --------------------------------------------------------------------------------


def heldout_speech(
    count: int, seed: int, voices: str = "heldout"
) -> Iterator[tuple[Pcm, str, Voice]]:
    """Held-out quiz sentences in held-out voices: sound [S], text, voice.

    With `voices="train"` the same sentences in the voices that were trained on.
    """
    rng = np.random.default_rng(seed)
    speakers = user_voices(voices)
    for index, text in enumerate(quiz.sentences("heldout", count, seed)):
        voice = speakers[index % len(speakers)]
        yield speak(text, voice.jitter(rng)).pcm, text, voice


def recorded_speech(data: Path) -> Iterator[tuple[Pcm, str, str]]:
    """The sentences that a data folder keeps from training: sound [S], text, speaker.

    Raises UserError when the folder has no manifest, or the manifest no such sentence.
    """
    rows = read_manifest(data / MANIFEST, ("split", "text", "speaker", "path"))
    rows = [row for row in rows if row["split"] == "validation" and row["text"]]
    if not rows:
        raise UserError(f"recorded '{data}': its manifest has no text in the split 'validation'.")
    return ((load(data / row["path"]), row["text"], row["speaker"]) for row in rows)


def endless_speech(seed: int) -> Iterator[Pcm]:
    """More and more held-out sentences [S], in held-out and in known voices by turns."""
    for block in itertools.count(1):
        for voices in ("heldout", "train"):
            for pcm, _, _ in heldout_speech(_SENTENCES_DRAWN, seed + block, voices):
                yield pcm


def shard_speech(folders: Iterable[Path]) -> Iterator[Pcm]:
    """Every channel [S] of every sound in shard folders, in their order.

    Raises UserError when a folder has no shards.
    """
    for folder in folders:
        for sample in shards.read(folder):
            if sample.pcm is not None:
                yield from sample.pcm


def noisy(pcm: Pcm, decibel: float, rng: np.random.Generator) -> Pcm:
    """Pink noise under speech, so many decibels weaker."""
    return add_noise(pcm, pink(len(pcm), rng), decibel)


# --- Through a tokenizer --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """What tokenizers are compared by."""

    rate: float
    """Codes a second."""
    size: int
    """Codes of the codebook, L; 0 where there is none."""
    bottleneck: str
    """Its kind, "fsq", "vq" or "none"."""
    lookahead_ms: float
    """Infinite where every code sees the whole sound."""

    @property
    def bits(self) -> float:
        """Bits a second, were every code equally likely; infinite without a bottleneck."""
        return self.rate * math.log2(self.size) if self.size else math.inf

    @property
    def key(self) -> str:
        """The end of a metric's name: 12_5hz_4375_fsq, with a look-ahead 12_5hz_4375_fsq_160ms."""
        late = f"_{self.lookahead_ms:g}ms" if self.lookahead_ms else ""
        size = f"_{self.size}" if self.size else ""
        return f"{self.rate:g}hz{size}_{self.bottleneck}{late}".replace(".", "_")


def shape_of(tokenizer: SpeechTokenizer) -> Shape:
    """What a tokenizer says of itself."""
    size = 0 if tokenizer.bottleneck == "none" else tokenizer.codebook_size
    return Shape(tokenizer.rate, size, tokenizer.bottleneck, tokenizer.lookahead_ms)


def pad(tokenizer: SpeechTokenizer, sounds: Sequence[Pcm]) -> tuple[Tensor, Tensor]:
    """Sounds [S] with silence after them → [B, 1, S'], and how many frames of 80 ms each fills [B].

    S' is at the tokenizer's own sample rate, in whole frames and in whole codes.
    """
    frames = [-(-(len(pcm) + _TAIL) // FRAME_SIZE) for pcm in sounds]
    frame = round(tokenizer.sample_rate / FRAME_RATE)
    whole = math.lcm(frame, round(tokenizer.sample_rate / tokenizer.rate))
    size = -(-max(frames) * frame // whole) * whole
    padded = np.zeros((len(sounds), 1, size), np.float32)
    for row, pcm in zip(padded, sounds, strict=True):
        heard = resample(pcm, SAMPLE_RATE, tokenizer.sample_rate)
        row[0, : len(heard)] = heard
    return torch.from_numpy(padded), torch.tensor(frames)


def encode(tokenizer: SpeechTokenizer, pcm: Tensor, frames: Tensor) -> list[Tensor]:
    """Codes [T] of each padded sound, without those of the padding."""
    codes = encode_whole(tokenizer, pcm)
    each = [math.ceil(n * tokenizer.rate / FRAME_RATE) for n in frames.tolist()]
    return [row[:n] for row, n in zip(codes, each, strict=True)]


def read(
    tokenizer: SpeechTokenizer,
    pcm: Tensor,
    frames: Tensor,
    *,
    quantized: bool = True,
    vocabulary: Vocabulary | None = None,
) -> list[str]:
    """Transcript of each padded sound, through the codes or past the rounding.

    `vocabulary`: of an attention decoder that reads text pieces.
    """
    mel = tokenizer.mel(pcm)
    return transcribe(tokenizer, mel, frames, quantized=quantized, vocabulary=vocabulary)


@dataclass
class Tally:
    """What transcripts got wrong, utterance by utterance."""

    words: list[WordErrors] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)
    """In characters, spaces included."""
    characters: list[int] = field(default_factory=list)
    """Of the texts."""

    def add(self, text: str, transcript: str) -> None:
        """Count one utterance."""
        self.words.append(word_errors(text, transcript))
        expected = normalize(text)
        self.edits.append(edit_distance(expected, normalize(transcript)))
        self.characters.append(len(expected))

    def part(self, chosen: Sequence[int]) -> Tally:
        """Of some of its utterances."""
        return Tally(
            [self.words[index] for index in chosen],
            [self.edits[index] for index in chosen],
            [self.characters[index] for index in chosen],
        )

    def wer(self) -> Metric:
        """Word error rate."""
        return pooled_wer(self.words)

    def cer(self) -> Metric:
        """Character error rate."""
        return bootstrap_ratio(self.edits, self.characters)


def pooled_wer(errors: Sequence[WordErrors]) -> Metric:
    """Corpus word error rate with a percentile bootstrap over utterances."""
    return bootstrap_ratio([e.errors for e in errors], [e.words for e in errors])


def codes_used(counts: Tensor) -> tuple[Metric, Metric]:
    """Share of codes seen, and entropy over log2 L, from how often each was seen [L]."""
    seen = int(counts.sum())
    entropy = entropy_bits(counts) / max(1.0, math.log2(len(counts)))
    return Metric(float((counts > 0).double().mean()), n=seen), Metric(entropy, n=seen)


def speaker_invariance(
    sayings: Mapping[str, Mapping[str, T]],
    distances: Callable[[list[T]], npt.NDArray[np.float64]],
) -> Metric:
    """How little tokens depend on who speaks: 0 not at all, 1 as much as on what is said.

    `sayings`: sentence → speaker → tokens. The mean distance between every two speakers of one
    sentence is divided by that between different sentences of one speaker (each with the others
    among ten):

                     sentence 1   sentence 2
        speaker a       a1 ───────── a2          ─── what was said differs: the denominator
                         ┊            ┊
        speaker b       b1 ───────── b2          ┊   who said it differs: the numerator

    `distances`: of every two of some tokens, [N, N]. `speaker_invariance` has `edit_distances`, in
    which a code has no neighbours: of thousands of codes two people will seldom hit the same, and
    both means near their largest, 1. `speaker_invariance_warped` has those of `abx.distances`
    between what the codes stand for, which also forgive a difference in tempo. Nobody says a
    sentence twice alike, so that a perfect recognizer would not reach 0. The interval is a
    bootstrap over sentences.
    """
    shared = [by for by in sayings.values() if len(by) > 1]
    same, other = [], []
    for block in _batches(shared, _SENTENCES_COMPARED):
        text, speaker = (
            np.array(labels)
            for labels in zip(*((i, who) for i, by in enumerate(block) for who in by), strict=True)
        )
        far = distances([tokens for by in block for tokens in by.values()])
        for index in range(len(block)):
            here = text == index
            alike = far[here][:, here]
            apart = far[here[:, None] & ~here & (speaker[:, None] == speaker)]
            if len(apart):
                same.append(float(alike[np.triu_indices(len(alike), 1)].mean()))
                other.append(float(apart.mean()))
    if not any(other):
        reason = "needs two sentences, read by the same two people, whose codes differ"
        return Metric(None, n=len(other), reason=reason)
    return bootstrap_ratio(same, other)


def edit_distances(tokens: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Edits between every two code sequences, over the length of the longer one: 0 … 1, [N, N]."""
    found = np.zeros((len(tokens), len(tokens)))
    for (i, one), (j, two) in itertools.combinations(enumerate(tokens), 2):
        found[i, j] = found[j, i] = edit_distance(one, two) / max(len(one), len(two))
    return found


def _no_stream(tokenizer: SpeechTokenizer) -> str | None:
    """Why there is no stream of its codes; None where there is."""
    if tokenizer.bottleneck == "none":
        return _NO_CODES
    return None if tokenizer.streams else "it does not stream"


@torch.inference_mode()
def realtime_factor(tokenizer: SpeechTokenizer) -> Metric:
    """Seconds of computing a second of sound, one frame of one stream at a time on two threads."""
    if reason := _no_stream(tokenizer):
        return Metric(None, reason=reason)
    seconds = tokenizer.frame_size / tokenizer.sample_rate
    timed = max(10, round(TIMED_SECONDS / seconds))
    generator = torch.Generator().manual_seed(0)
    sound = 0.05 * torch.randn(_WARM + timed, 1, 1, tokenizer.frame_size, generator=generator)
    state = tokenizer.new_state(1)
    took, before = [], torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for frame in sound:
            begin = time.perf_counter()
            tokenizer.encode(frame, state)
            took.append((time.perf_counter() - begin) / seconds)
    finally:
        torch.set_num_threads(before)
    return bootstrap_mean(took[_WARM:])


@torch.inference_mode()
def streaming_agreement(
    tokenizer: SpeechTokenizer, sounds: Iterable[Pcm], seconds: float, bar: Progress
) -> dict[str, Metric]:
    """Whether a stream of single frames gives the codes of one pass, over so long a sound.

    The sound is that of `sounds` [S] one after the other, and at least one pass long. No memory
    holds a pass over an hour; but what lies `past_seconds` back is not heard any more, so that a
    pass over a minute and that much before it gives the codes that the hour has in that minute:

        stream   |▪|▪|▪|▪|▪|▪|▪|▪|▪|▪|▪|▪| …
        passes   |── past ──|─ minute ─|
                            .        |── past ──|─ minute ─|

    A pass begins at position 0 wherever it stands: a stream that drifts with its length parts from
    it. In double precision both take the same log-mel features, which are single by definition.
    """
    names = ("streaming_agreement", "streaming_agreement_float64")
    if reason := _no_stream(tokenizer):
        return {name: Metric(None, reason=reason) for name in names}
    size, rate, config = tokenizer.frame_size, tokenizer.sample_rate, tokenizer.config
    # Where positions are a table, a pass begins where the table does.
    table = config.whisper.positions * rate // config.encoder_rate if config.whisper else 1
    unit, past = math.lcm(size, table), math.ceil(tokenizer.past_seconds * rate)
    block = -(-_PASS_SECONDS * rate // size) * size
    listen = tokenizer.mel
    assert isinstance(listen, LogMel)
    with torch.inference_mode(False):
        models = (tokenizer, copy.deepcopy(tokenizer).double())
    states, hearing = [model.new_state(1) for model in models], listen.new_state(1)
    pcm, mel = torch.zeros(1, 1, 0), torch.zeros(1, 0, config.mels)  # since `begin`
    begin = end = seen = 0
    same = [0, 0]
    task = bar.add_task("a stream and passes", total=seconds)
    for minute in _blocks(sounds, rate, block):
        frames = [listen(frame, hearing) for frame in minute.split(size, -1)]
        pcm, mel = torch.cat((pcm, minute), -1), torch.cat((mel, *frames), 1)
        passes = (tokenizer.encode(pcm), models[1].discretize(models[1].features(mel.double())))
        for index, (model, state) in enumerate(zip(models, states, strict=True)):
            dtype = torch.float64 if index else torch.float32
            codes = [model.discretize(model.features(x.to(dtype), state)) for x in frames]
            streamed = torch.cat(codes, 1)
            same[index] += int((streamed == passes[index][:, -streamed.shape[1] :]).sum())
        seen += streamed.numel()
        end += block
        bar.update(task, completed=end / rate)
        if end >= seconds * rate:
            break
        forgotten = max(begin, (end - past) // unit * unit) - begin
        pcm, mel = pcm[..., forgotten:], mel[:, forgotten // listen.stride :]
        begin += forgotten
    assert seen, "the sound is shorter than a pass"
    return {name: proportion(n, seen) for name, n in zip(names, same, strict=True)}


def _blocks(sounds: Iterable[Pcm], rate: int, size: int) -> Iterator[Tensor]:
    """Sounds [S] at 24 kHz → blocks [1, 1, size] at another rate, one sound after the other."""
    held = np.zeros(0, np.float32)
    for pcm in sounds:
        held = np.concatenate((held, resample(pcm, SAMPLE_RATE, rate)))
        while len(held) >= size:
            yield torch.from_numpy(held[:size].copy())[None, None]
            held = held[size:]


# --- The comparison -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tokenizer to measure."""

    name: str
    tokenizer: SpeechTokenizer
    twin: SpeechTokenizer | None = None
    """Of the same config, seed, data and steps, but trained without a bottleneck."""
    vocabulary: Vocabulary | None = None
    """Of either's attention decoder, where that reads text pieces."""

    @classmethod
    def named(cls, name: str, path: str | Path) -> Candidate:
        """By the name or path of its model or checkpoint; UserError when there is none."""
        tokenizer = load_speech_tokenizer_of(path)
        folder = checkpoints.resolve(tokenizer_folder(path))
        return cls(name, tokenizer, vocabulary=kept_vocabulary(tokenizer, folder))

    @property
    def mute(self) -> str | None:
        """Why it reads no text; None where it does."""
        reads = self.tokenizer.reads or self.vocabulary is not None
        return None if reads else "it reads no characters"


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one tokenizer."""

    name: str
    shape: Shape
    metrics: dict[str, Metric]
    """Under their plain names."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokenizers on the same sounds."""

    results: tuple[Result, ...]
    plain: bool
    """Whether the first result's metrics keep their plain names."""
    source: str
    """What the sounds are, in words."""

    def metrics(self) -> dict[str, Metric]:
        """Every metric under its published name."""
        found: dict[str, Metric] = {}
        keys = report.distinct(result.shape.key for result in self.results)
        for index, (key, result) in enumerate(zip(keys, self.results, strict=True)):
            rest = dict(result.metrics)
            if self.plain and index == 0:
                found |= rest
                rest = {"wer_quantized": rest["wer_quantized"]}
            found[f"wer_{key}"] = rest.pop("wer_quantized")
            found |= {f"{name}_{key}": metric for name, metric in rest.items()}
        return found

    def document(self) -> list[report.Block]:
        """The report: a table as the published one, curves, and all errors."""
        return [
            report.Paragraph(
                f"{self.source} In brackets: 95% intervals (bootstrap). ↑ is better when higher, "
                "↓ when lower."
            ),
            self._table(_OVERVIEW, shapes=True),
            report.Heading("Errors over bitrate"),
            self._bitrates(),
            report.Heading("Look-ahead"),
            self._lookaheads(),
            report.Heading("Noise"),
            self._noise(),
            self._table(_NOISE),
            report.Heading("All errors"),
            *(self._table(_errors(group, which)) for group, which in _GROUPS if self._has(group)),
            report.Heading("What the numbers mean"),
            *(report.Paragraph(text) for text in _MEANING),
        ]

    def _has(self, group: str) -> bool:
        return any(f"wer_quantized{group}" in result.metrics for result in self.results)

    def _table(self, columns: Mapping[str, str], *, shapes: bool = False) -> report.Table:
        """A row a tokenizer; `columns`: metric → heading, without those that nobody has."""
        present = {
            name: title
            for name, title in columns.items()
            if any(name in result.metrics for result in self.results)
        }
        rows = []
        for result in self.results:
            shape, known = result.shape, result.metrics
            said = [f"{shape.rate:g}", f"{shape.bits:.0f}", str(shape.size), shape.bottleneck]
            said.append(f"{shape.lookahead_ms:g}")
            cells = [shown(known[name]) if name in known else "" for name in present]
            rows.append([result.name, *(said if shapes else ()), *cells])
        header = ["tokenizer", *(_SHAPE if shapes else ()), *present.values()]
        return report.Table(header, rows)

    def _bitrates(self) -> report.Block:
        def line(shape: Shape) -> str:
            late = f", {shape.lookahead_ms:g} ms ahead" if shape.lookahead_ms else ""
            return f"{shape.rate:g} Hz, {shape.bottleneck}{late}"

        titles = {
            "wer_quantized": "word error rate ↓",
            "wer_ratio": "over the twin's ↓",
            "codebook_entropy_ratio": "entropy / log2(codes) ↑",
        }
        lines = {
            name: self._lines(name, {r.name: line(r.shape) for r in self.results}, "bits")
            for name in titles
        }
        panels = [report.Panel(titles[name], of) for name, of in lines.items() if of]
        if not panels:
            return report.Paragraph("None of them has codes, and so no bitrate.")
        caption = "Tokenizers over bits a second; a line is a rate and a bottleneck."
        return report.Picture("bitrates", caption, report.curves(panels, "bit/s", logarithmic=True))

    def _lookaheads(self) -> report.Picture:
        names = {
            result.name: f"{shape.rate:g} Hz, {shape.size} {shape.bottleneck}"
            for result in self.results
            for shape in [result.shape]
        }
        panels = [
            report.Panel(title, self._lines(name, names, "lookahead_ms"))
            for name, title in (
                ("wer_quantized", "word error rate ↓"),
                ("cer_quantized", "character error rate ↓"),
            )
        ]
        caption = "Errors over the sound that a code waits for beyond its own frame."
        return report.Picture("lookahead", caption, report.curves(panels, "look-ahead, ms"))

    def _lines(
        self, metric: str, names: Mapping[str, str], x: str
    ) -> dict[str, list[tuple[float, Metric]]]:
        """Lines of a metric over a number of the shape; `names`: tokenizer → line."""
        lines: dict[str, list[tuple[float, Metric]]] = {}
        for result in sorted(self.results, key=lambda result: float(getattr(result.shape, x))):
            at = float(getattr(result.shape, x))
            if metric in result.metrics and math.isfinite(at):
                lines.setdefault(names[result.name], []).append((at, result.metrics[metric]))
        return lines

    def _noise(self) -> report.Picture:
        panels = [
            report.Panel(
                title,
                {
                    result.name: [(db, result.metrics[f"{kind}_noise_{db}db"]) for db in NOISE_DB]
                    for result in self.results
                },
            )
            for kind, title in (("wer", "word error rate ↓"), ("cer", "character error rate ↓"))
        ]
        caption = "Errors under pink noise, over the signal-to-noise ratio."
        return report.Picture("noise", caption, report.curves(panels, "dB"))


_SHAPE = ("Hz", "bit/s", "codes", "bottleneck", "look-ahead, ms")
_OVERVIEW = {
    "wer_twin": "WER of the twin without a bottleneck ↓",
    "wer_quantized": "WER quantized ↓",
    "wer_ratio": "ratio ↓",
    "wer_quantized_new_speakers": "WER quantized, new speakers ↓",
    "codebook_usage": "share of codes seen ↑",
    "codebook_entropy_ratio": "entropy / log2(codes) ↑",
    "wer_noise_10db": "WER at 10 dB ↓",
    "speaker_invariance": "speaker invariance ↓",
    "speaker_invariance_warped": "the same, warped ↓",
    "resynthesis_wer": "WER spoken again ↓",
    "resynthesis_wer_added": "points more than the original ↓",
    "realtime_factor": "real-time factor ↓",
    "streaming_agreement": "stream = one pass ↑",
}
_NOISE = {f"wer_noise_{db}db": f"WER at {db} dB ↓" for db in NOISE_DB}
_GROUPS = (
    ("", "held-out voices"),
    ("_new_speakers", "new speakers"),
    ("_known", "known voices"),
    ("_recorded", "recorded voices"),
)
_MEANING = (
    "Errors are those of the tokenizer's own greedy transcript, pooled over utterances. Held-out "
    "voices are synthesized ones of which none is a voice of training, though most are a trained "
    "speaker in another accent, rate or pitch; new speakers are those of them that are not. Known "
    "voices are those of the training. All read the same sentences, which no training has seen. "
    "Recorded voices are people of the training reading sentences kept from it.",
    "The twin has the tokenizer's config, seed, data and steps, but no bottleneck: all that its "
    "encoder says, as wide as it is, goes on to what writes the transcript. Past the rounding "
    "means the tokenizer itself with the few numbers of its bottleneck left as they are.",
    "Entropy and the share of codes seen are too low where there are not many more codes heard "
    "than there are in the codebook.",
    "Speaker invariance is the edit distance between the codes of two people reading one sentence "
    "over that between two sentences of one person, each over the longer one's length: 0 says "
    "nothing of the speaker, 1 as much as of the sentence. Among thousands of codes two people "
    "seldom hit the same one, and it is near 1. Warped, it compares what the codes stand for, "
    "where near counts as near, along the cheapest warping of time.",
    "Spoken again means from the codes alone, by a token decoder, in the voice of the sound: the "
    "assistant reading held-out sentences. An independent recognizer writes down both.",
    "The real-time factor is seconds of computing a second of sound, in a stream of one frame at a "
    "time, on two threads.",
)


def _errors(group: str, which: str) -> dict[str, str]:
    """Columns of all errors of a group of voices."""
    ways = {"twin": "twin", "unquantized": "past the rounding", "quantized": "quantized"}
    return {
        f"{kind}_{way}{group}": f"{kind.upper()}, {which}: {title} ↓"
        for kind in ("wer", "cer")
        for way, title in ways.items()
    }


def hear(
    candidate: Candidate, sounds: Sequence[Pcm], noise: Sequence[float], rng: np.random.Generator
) -> tuple[dict[str, list[str]], list[Tensor]]:
    """Transcripts of a few sounds [S] by each way of reading them, and their codes.

    `noise`: at how many decibels of it they are read too. No transcripts of a tokenizer that reads
    none; of one without a bottleneck no codes, and no transcripts through them.
    """
    tokenizer, coded = candidate.tokenizer, candidate.tokenizer.bottleneck != "none"
    pcm, frames = pad(tokenizer, sounds)
    codes = encode(tokenizer, pcm, frames) if coded else []
    if candidate.mute:
        return {}, codes
    written = functools.partial(read, vocabulary=candidate.vocabulary)
    said = {"unquantized": written(tokenizer, pcm, frames, quantized=False)}
    if candidate.twin is not None:
        said["twin"] = written(candidate.twin, pcm, frames, quantized=False)
    if coded:
        said["quantized"] = written(tokenizer, pcm, frames)
        for db in noise:
            disturbed, _ = pad(tokenizer, [noisy(sound, db, rng) for sound in sounds])
            said[f"noise_{db:g}db"] = written(tokenizer, disturbed, frames)
    return said, codes


@torch.inference_mode()
def measure(
    candidate: Candidate,
    utterances: int,
    seed: int,
    recorded: Path | None = None,
    codes: int = 0,
    codes_from: Sequence[Path] = (),
    stream_hours: float = 0.0,
    progress: bool = False,
) -> Result:
    """Measure one tokenizer; the other arguments are those of `compare`."""
    tokenizer, shape = candidate.tokenizer, shape_of(candidate.tokenizer)
    coded, size = tokenizer.bottleneck != "none", _together(tokenizer)
    groups: dict[str, Iterator[tuple[Pcm, str, Any]]] = {
        "": heldout_speech(utterances, seed),
        "_known": heldout_speech(utterances, seed, "train"),
    }
    if recorded is not None:
        groups["_recorded"] = recorded_speech(recorded)
    found: dict[str, Metric] = {}
    counts = torch.zeros(shape.size, dtype=torch.int64)
    sayings: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rng = np.random.default_rng((seed, 1))
    with progress_bar(progress) as bar:
        for group, speech in groups.items():
            noise = () if group else NOISE_DB
            tallies: dict[str, Tally] = defaultdict(Tally)
            spoken_by: list[Any] = []
            total = None if group == "_recorded" else -(-utterances // size)
            name = candidate.name + group.replace("_", ", ")
            for batch in bar.track(_batches(speech, size), total, description=name):
                sounds, texts, speakers = zip(*batch, strict=True)
                said, heard = hear(candidate, sounds, noise, rng)
                for way, transcripts in said.items():
                    for text, transcript in zip(texts, transcripts, strict=True):
                        tallies[way].add(text, transcript)
                spoken_by += speakers
                counts += _counted(heard, shape.size)
                if group == "_recorded" and coded:
                    for text, speaker, row in zip(texts, speakers, heard, strict=True):
                        sayings[normalize(text)][speaker] = row
            reason = candidate.mute or _NO_CODES
            found |= errors_of(tallies, group, noise, reason)
            if not group:
                new = set(new_speakers(spoken_by))
                chosen = [index for index, voice in enumerate(spoken_by) if voice in new]
                part = {way: tally.part(chosen) for way, tally in tallies.items()}
                found |= errors_of(part, "_new_speakers", (), reason)
        if coded and counts.sum() < codes:
            more = shard_speech(codes_from) if codes_from else endless_speech(seed)
            _count_more(candidate, counts, codes, more, bar)
        if stream_hours:
            sounds_of_hours, seconds = endless_speech(seed), 3600 * stream_hours
            found |= streaming_agreement(tokenizer, sounds_of_hours, seconds, bar)
    share, entropy = codes_used(counts) if coded else (Metric(None, reason=_NO_CODES),) * 2
    found |= {
        "codebook_usage": share,
        "codebook_entropy": entropy,
        "codebook_entropy_ratio": entropy,
        "lookahead_ms": Metric(shape.lookahead_ms, unit="ms")
        if math.isfinite(shape.lookahead_ms)
        else Metric(None, unit="ms", reason="every code sees the whole sound"),
        "realtime_factor": realtime_factor(tokenizer),
    }
    if recorded is not None and coded:
        found["speaker_invariance"] = speaker_invariance(
            sayings, lambda rows: edit_distances([row.tolist() for row in rows])
        )
        found["speaker_invariance_warped"] = speaker_invariance(
            sayings, lambda rows: abx.distances([_points(tokenizer, row) for row in rows])
        )
    elif recorded is not None:
        names = ("speaker_invariance", "speaker_invariance_warped")
        found |= dict.fromkeys(names, Metric(None, reason=_NO_CODES))
    return Result(candidate.name, shape, found)


def errors_of(
    tallies: Mapping[str, Tally], group: str, noise: Sequence[int], reason: str
) -> dict[str, Metric]:
    """All errors of a group of voices; `reason`: why a way of reading that is not there is not."""
    found: dict[str, Metric] = {}
    for way in ("quantized", "unquantized", "twin", *(f"noise_{db}db" for db in noise)):
        if (tally := tallies.get(way)) is not None:
            found |= {f"wer_{way}{group}": tally.wer(), f"cer_{way}{group}": tally.cer()}
        elif way != "twin":
            names = (f"wer_{way}{group}", f"cer_{way}{group}")
            found |= dict.fromkeys(names, Metric(None, reason=reason))
    if "twin" in tallies and "quantized" in tallies:
        ours, theirs = ([e.errors for e in tallies[way].words] for way in ("quantized", "twin"))
        found[f"wer_ratio{group}"] = bootstrap_ratio(ours, theirs)
    return found


def _counted(codes: Sequence[Tensor], size: int) -> Tensor:
    """How often each of `size` codes occurs: [L]."""
    return torch.bincount(torch.cat([torch.zeros(0, dtype=torch.int64), *codes]), minlength=size)


def _points(tokenizer: SpeechTokenizer, codes: Tensor) -> abx.Features:
    """What codes [T] stand for: [T, D]."""
    return tokenizer.embed(codes[None])[0].float().numpy()


def _count_more(
    candidate: Candidate, counts: Tensor, codes: int, sounds: Iterator[Pcm], bar: Progress
) -> None:
    """Add to `counts` [L] until it holds as many codes, or there are no more sounds."""
    task = bar.add_task(f"{candidate.name}, codes", total=codes)
    for batch in _batches(sounds, _together(candidate.tokenizer)):
        heard = encode(candidate.tokenizer, *pad(candidate.tokenizer, batch))
        counts += _counted(heard, len(counts))
        bar.update(task, completed=int(counts.sum()))
        if counts.sum() >= codes:
            return
    log.warning("%s: no more than %d codes to count", candidate.name, int(counts.sum()))


def _together(tokenizer: SpeechTokenizer) -> int:
    """Sounds that are heard at once: one alone where it would hear the silence after it too."""
    return _BATCH if tokenizer.config.causal else 1


def _batches(items: Iterable[T], size: int = _BATCH) -> Iterator[list[T]]:
    """A few items at a time, and no more of them made than these."""
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch


# --- Several of them ------------------------------------------------------------------------------


def candidates_of(folder: Path) -> list[Candidate]:
    """The tokenizers of a sweep with their twins; the fastest rate, then the smallest size first.

    Raises UserError where `finished_runs` does, when every run is a twin, or one is broken.
    """
    runs = finished_runs(folder)
    loaded = {run.name: Candidate.named(run.name, run.checkpoint) for run in runs}
    found, needed = [], set()
    for run in runs:
        if run.config.unquantized:
            continue
        twin = twin_of(run, runs)
        if twin is None:
            found.append(loaded[run.name])
        else:
            found.append(replace(loaded[run.name], twin=loaded[twin.name].tokenizer))
            needed.add(twin.name)
    for run in runs:
        if run.config.unquantized and run.name not in needed:
            log.warning("left out: %s is unquantized, and the twin of no other run", run.name)
    if not found:
        raise UserError(f"sweep '{folder}' holds no quantized tokenizer.")

    def order(candidate: Candidate) -> tuple[float, str, int, float]:
        shape = shape_of(candidate.tokenizer)
        return -shape.rate, shape.bottleneck, shape.size, shape.lookahead_ms

    return sorted(found, key=order)


def compare(
    model: str | None = "tiny",
    utterances: int = 300,
    seed: int = 0,
    twin: str | None = None,
    sweep: Path | None = None,
    recorded: Path | None = None,
    codes: int = 0,
    codes_from: Sequence[Path] = (),
    stream_hours: float = 0.0,
    decoder: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure the tokenizer of a model, those of a sweep, or both, on the same sounds.

    Args:
        model: whose tokenizer comes first and keeps the plain names, or a tokenizer's own
            checkpoint directory; None for none.
        utterances: sentences, each read once by a new voice and once by a known one.
        seed: picks sentences, voices and noise.
        twin: a checkpoint of the model's twin, trained alike with `unquantized=true`.
        sweep: a folder; every finished run of `speechlm train tokenizer` at or below it is
            measured, those trained unquantized as the twins of those with an otherwise equal
            config.
        recorded: a data folder whose manifest has a split 'validation', to hear people too.
        codes: of how many at least the usage of the codebook is judged, where the sounds above do
            not suffice: by more held-out sentences, in held-out and in known voices, or
        codes_from: by the sounds in these shard folders, which need not be made anew.
        stream_hours: over how many hours of speech a stream is held against one pass; 0: none.
        decoder: a token decoder that speaks the model's codes again (`resynthesis`).
        progress: show on the terminal how far it has come.

    Raises UserError when a model, a folder or a speech engine is missing.
    """
    assert model is not None or sweep is not None, "nothing to measure"
    if codes_from and not codes:
        raise UserError("codes_from needs a number of codes: say codes too, as in 1000000.")
    for folder in codes_from:
        shards.shard_paths(folder)  # before minutes are spent on the rest
    if twin is not None and model is None:
        raise UserError(f"twin '{twin}' is of no tokenizer: name its model too (--model).")
    if decoder is not None and model is None:
        raise UserError(f"decoder '{decoder}' speaks codes of one model: name it (--model).")
    candidates = []
    if model is not None:
        first = Candidate.named(model, model)
        if twin is not None:
            other = load_speech_tokenizer_of(twin)
            check_twin(model, first.tokenizer, twin, other)
            first = replace(first, twin=other)
        candidates.append(first)
    if sweep is not None:
        candidates += candidates_of(sweep)
    if decoder is not None:  # before all else: whatever does not fit shows at once
        speaking = load_token_decoder(decoder)
        again = resynthesis.resynthesis_wer(candidates[0].tokenizer, speaking, seed=seed)
    source = f"{utterances} held-out sentences, synthesized"
    if recorded is not None:
        source += f"; recordings in {recorded.name}"
    if codes_from:
        source += f"; codes counted in {', '.join(folder.name for folder in codes_from)}"
    names = report.distinct(candidate.name for candidate in candidates)
    results = [
        measure(
            replace(candidate, name=name),
            utterances,
            seed,
            recorded,
            codes,
            codes_from,
            stream_hours,
            progress,
        )
        for name, candidate in zip(names, candidates, strict=True)
    ]
    if decoder is not None:
        results[0] = replace(results[0], metrics={**results[0].metrics, **again})
    return Comparison(tuple(results), model is not None, f"{source}.")


def evaluate(model: str | None = "tiny", **options: Any) -> dict[str, Metric]:
    """Metrics of a tokenizer, or of those of a sweep; `options` are those of `compare`."""
    return compare(model, **options).metrics()
