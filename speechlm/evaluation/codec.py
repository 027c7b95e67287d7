"""How much of speech survives a codec, at each of its bitrates.

Sounds are coded whole, decoded from their first 1 … K codebooks, put back in step (`Codec.delay`)
and compared with what went in:

    sounds ─ encode ═ codes ─┬─ first k codebooks ─ decode ─ compare (fidelity.py), transcribe
                             └─ counts of each codebook: usage, entropy
    minimal pairs ─ encode ═ codes 0 ─ compare among themselves (abx.py)

The sounds are held-out sentences in the assistant's voice (the one that is heard); metrics ending
in `_users`, and the likeness of voices, are over voices that nothing was trained on. Or they are
any folder of recordings, whose texts and speakers are known from a manifest or side files; of one
longer than 30 s the first 30 s are taken, and its text, which says more than they do, is not.

    bitrate_bps              of all codebooks, were every code equally likely
    stoi, stoi_users, pesq, si_sdr, mel_distance, stft_distance
                             see fidelity.py; means over sounds
    wer_original, wer_decoded
                             word errors of an independent recognizer before and after, pooled
    speaker_similarity       0 = as another speaker, 1 = as the same one on another occasion
    speaker_trust            how far that can be believed: 0.5 = not at all, 1 = fully
    codebook_usage_k         share of the codes of codebook k that were seen
    codebook_entropy_k       entropy of their distribution over log2 of their number (too low where
                             there are not many more frames, n, than codes)
    abx_within, abx_across   share of wrong answers, chance 0.5; the same `…_mel` for log-mel
                             spectra at 25 Hz of the sound itself, as a yardstick

Intervals are bootstraps over sounds, of `abx` over contrasts. A point of the rate-quality curve is
named `…_at_<bits a second>bps`. Of several codecs the first one's metrics have these plain names,
the others' begin with the codec's name.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from audio_codec.audio import SAMPLE_RATE, SUFFIXES, LogMel, Pcm, load_blocks, resample
from audio_codec.codec import Codec, load_codec
from audio_codec.errors import Unreachable, UserError
from speechlm.convert import load_codec_of
from speechlm.evaluation import abx, fidelity, report
from speechlm.evaluation.conversation import progress_bar
from speechlm.evaluation.report import Metric, bootstrap_mean, shown
from speechlm.evaluation.tokenizer import codes_used, heldout_speech, pooled_wer
from synth_data import quiz
from synth_data.recipes.speech import MANIFEST, read_manifest
from synth_data.tts import ASSISTANT, speak
from synth_data.verify import WordErrors, default_recognizer, word_errors

log = logging.getLogger(__name__)

SHORTEST: Final = 0.5
"""Seconds; of a shorter sound STOI has nothing to say."""
LONGEST: Final = 30.0
"""Seconds of a recording; of a longer one its beginning is measured on."""
EXAMPLES: Final = 4
"""Sounds to look at and listen to in a report."""

_CURVES = (  # What has a value at each bitrate, and which way is better.
    ("stoi", "STOI ↑"),
    ("stoi_users", "STOI, unheard voices ↑"),
    ("pesq", "PESQ, MOS ↑"),
    ("wer_decoded", "word error rate ↓"),
    ("speaker_similarity", "speaker similarity ↑"),
    ("mel_distance", "mel distance ↓"),
    ("stft_distance", "STFT distance ↓"),
    ("si_sdr", "SI-SDR, dB ↑"),
)


# --- Sounds ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A sound to measure on."""

    name: str
    pcm: Pcm  # [S] at 24 kHz
    text: str | None = None
    """What is said, when that is known and word errors are to be counted."""
    speaker: str | None = None
    """Whose voice it is, when that is known and likeness is to be measured."""
    group: Literal["main", "users"] = "main"


def synthesized(utterances: int, seed: int) -> list[Item]:
    """Held-out sentences of the quiz world by the assistant, and by the held-out voices.

    Word errors are counted for the assistant: of the other voices some are hard for any recognizer.
    Likeness is measured on the others: the assistant is one speaker.
    """
    items = []
    for index, text in enumerate(quiz.sentences("heldout", utterances, seed)):
        items.append(Item(f"assistant {index}: {text}", speak(text, ASSISTANT).pcm, text))
    for index, (pcm, text, voice) in enumerate(heldout_speech(utterances, seed)):
        items.append(Item(f"{voice} {index}: {text}", pcm, None, voice.name, "users"))
    return [item for item in items if len(item.pcm) >= SHORTEST * SAMPLE_RATE]


def recordings(folder: Path, count: int, seed: int) -> list[Item]:
    """Up to `count` sounds at or below `folder`, drawn by seed; 0.5 to 30 s each.

    Of a longer one these are the first 30 s, as its name and a notice in the log say; its text is
    then taken for unknown. A shorter one is left out with a notice.
    Texts and speakers come from the nearest `manifest.tsv.gz` in the folder or above it (columns
    `path`, relative to it, and `text`, `speaker`), else the text from a file beside the sound that
    is named as it is, but `.txt`. What cannot be read is left out with a notice in the log.

    Raises UserError when there is no such folder or nothing in it can be measured on.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise UserError(f"audio '{folder}' is no folder.")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    known = _manifest(root)
    items: list[Item] = []
    for index in np.random.default_rng(seed).permutation(len(files)):
        path = files[index]
        try:
            pcm, whole = _beginning(path)
        except UserError as error:
            log.warning("left out: %s", error)
            continue
        if len(pcm) < SHORTEST * SAMPLE_RATE:
            log.warning("left out: %s lasts %.1f s", path, len(pcm) / SAMPLE_RATE)
            continue
        name = str(path.relative_to(root))
        text, speaker = known.get(path, (None, None))
        side = path.with_suffix(".txt")
        if text is None and side.is_file():
            text = side.read_text(encoding="utf-8", errors="replace").strip() or None
        if not whole:
            name, text = f"{name}, first {LONGEST:g} s", None
            log.warning("only the first %g s of %s are measured on", LONGEST, path)
        items.append(Item(name, pcm, text, speaker))
        if len(items) == count:
            break
    if not items:
        raise UserError(
            f"audio '{folder}' holds no sound of at least {SHORTEST:g} s in a file that ends in "
            f"{', '.join(sorted(SUFFIXES))}."
        )
    return items


def _beginning(path: Path) -> tuple[Pcm, bool]:
    """A file's sound, of a long one the first `LONGEST` seconds, and whether that is all of it."""
    most, blocks, count = round(LONGEST * SAMPLE_RATE), [], 0
    for block in load_blocks(path):
        blocks.append(block)
        count += len(block)
        if count > most:
            break  # an hour need not be read for half a minute
    return np.concatenate(blocks)[:most], count <= most


def _manifest(folder: Path) -> dict[Path, tuple[str | None, str | None]]:
    """Text and speaker of each file that the nearest manifest names."""
    for root in (folder, *folder.parents):
        path = root / MANIFEST
        if not path.is_file():
            continue
        return {
            root / row["path"]: (row.get("text") or None, row.get("speaker") or None)
            for row in read_manifest(path, ("path",))
            if row["path"]
        }
    return {}


# --- Through a codec ------------------------------------------------------------------------------


def bitrate(codec: Codec, codebooks: int | None = None) -> float:
    """Bits a second of the first `codebooks`; None is all."""
    bits = sum(math.log2(math.prod(factors)) for factors in codec.codebooks[:codebooks])
    return codec.sample_rate / codec.frame_size * bits


def encode(codec: Codec, pcm: Pcm) -> Tensor:
    """Codes [1, K, T] of a sound [S] at 24 kHz.

    Silence is put after it, to whole frames that hold what the codec gives back late.
    """
    samples = resample(pcm, SAMPLE_RATE, codec.sample_rate)
    frames = math.ceil((len(samples) + codec.delay) / codec.frame_size)
    padded = np.pad(samples, (0, frames * codec.frame_size - len(samples)))
    return codec.encode(torch.from_numpy(padded)[None, None])


def decode(codec: Codec, codes: Tensor, samples: int) -> Pcm:
    """Codes [1, K' ≤ K, T] → the sound [samples] at 24 kHz, in step with what was encoded.

    encoded  |------- sound -------|..silence..|
    decoded  |delay|------- sound -------|.....|
    """
    late = codec.decode(codes)[0, 0].float().numpy()[codec.delay :]
    return resample(late, codec.sample_rate, SAMPLE_RATE)[:samples]


def parse_levels(text: str | None, codebooks: int) -> list[int]:
    """Numbers of codebooks to decode from, ascending, with all of them at the end.

    `text`: "all", or numbers with commas, of which those beyond `codebooks` are left out; None is
    1, 2, 4, 8 …. Raises UserError for anything else.
    """
    if text is None:
        wanted = {2**power for power in range(codebooks.bit_length())}
    elif text == "all":
        wanted = set(range(1, codebooks + 1))
    elif re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        wanted = {int(number) for number in text.split(",")}
    else:
        raise UserError(f"levels '{text}' must be 'all' or numbers of codebooks, as in '1,2,4,8'.")
    return sorted({level for level in wanted if level <= codebooks} | {codebooks})


@dataclass(frozen=True, slots=True)
class Score:
    """What became of one sound at one bitrate; None where the measure says nothing of it."""

    stoi: float | None
    pesq: float | None
    si_sdr: float | None
    mel_distance: float
    stft_distance: float | None
    errors: WordErrors | None
    voice: npt.NDArray[np.float64] | None


def score(item: Item, decoded: Pcm) -> Score:
    """Compare a sound with what came back of it."""
    original = item.pcm
    return Score(
        fidelity.stoi(original, decoded),
        fidelity.pesq(original, decoded) if fidelity.pesq_installed() else None,
        fidelity.si_sdr(original, decoded),
        fidelity.mel_distance(original, decoded),
        fidelity.stft_distance(original, decoded),
        transcription_errors(item, decoded),
        fidelity.voice_print(decoded) if item.speaker is not None else None,
    )


def transcription_errors(item: Item, pcm: Pcm) -> WordErrors | None:
    """What the recognizer gets wrong of the item's text in `pcm`; None when the text is unknown."""
    if item.text is None:
        return None
    return word_errors(item.text, default_recognizer().transcribe(pcm))


# --- From scores to metrics -----------------------------------------------------------------------


def quality(
    items: Sequence[Item],
    scores: Sequence[Score],
    voices: Sequence[npt.NDArray[np.float64] | None],
) -> dict[str, Metric]:
    """The metrics that a bitrate has a point of the curve of.

    `voices`: the voice prints of the originals.
    """
    main = [one for item, one in zip(items, scores, strict=True) if item.group == "main"]
    users = [one for item, one in zip(items, scores, strict=True) if item.group == "users"]

    def mean(name: str, of: Sequence[Score], unit: str = "") -> Metric:
        values = [getattr(one, name) for one in of]
        return bootstrap_mean([value for value in values if value is not None], unit)

    found = {"stoi": mean("stoi", main)}
    if users:
        found["stoi_users"] = mean("stoi", users)
    found["pesq"] = (
        mean("pesq", main, "MOS")
        if fidelity.pesq_installed()
        else Metric(None, unit="MOS", reason="the package pesq is not installed")
    )
    found |= {
        "si_sdr": mean("si_sdr", main, "dB"),
        "mel_distance": mean("mel_distance", main),
        "stft_distance": mean("stft_distance", main),
        "wer_decoded": word_error_rate([one.errors for one in main]),
        "speaker_similarity": likeness(items, [one.voice for one in scores], voices)[0],
    }
    return found


def word_error_rate(errors: Sequence[WordErrors | None]) -> Metric:
    """Pooled over those whose text is known."""
    known = [one for one in errors if one is not None]
    return pooled_wer(known) if known else Metric(None, n=0, reason="no sound has a known text")


def likeness(
    items: Sequence[Item],
    decoded: Sequence[npt.NDArray[np.float64] | None],
    originals: Sequence[npt.NDArray[np.float64] | None],
) -> tuple[Metric, Metric]:
    """`speaker_similarity` and `speaker_trust` of the items whose speaker is known."""
    known = [
        (item.speaker, before, after)
        for item, before, after in zip(items, originals, decoded, strict=True)
        if item.speaker is not None and before is not None and after is not None
    ]
    if known:
        speakers, before, after = zip(*known, strict=True)
        measured = fidelity.speaker_similarity(np.stack(before), np.stack(after), speakers)
        if measured is not None:
            return bootstrap_mean(list(measured[0])), Metric(measured[1], n=len(known))
    reason = "needs two known speakers with two sounds each, whose voice prints can be told apart"
    return Metric(None, n=len(known), reason=reason), Metric(None, n=len(known), reason=reason)


def usage(counts: Sequence[Tensor]) -> dict[str, Metric]:
    """Usage and entropy of each codebook, from how often each of its codes was seen [L]."""
    found = {}
    for level, count in enumerate(counts):
        share, entropy = codes_used(count)
        found[f"codebook_usage_{level}"] = share
        found[f"codebook_entropy_{level}"] = entropy
    return found


def discrimination(codec: Codec, said: Sequence[abx.Saying], bar: Progress) -> dict[str, Metric]:
    """ABX of the codec's first codebook; see abx.py."""
    if not isinstance(codec, abx.Semantic):
        reason = "the codec does not say what its codes stand for (embed_semantic)"
        return {name: Metric(None, reason=reason) for name in ("abx_within", "abx_across")}
    rate = codec.sample_rate / codec.frame_size
    tokens = []
    for saying in bar.track(said, description="minimal pairs"):
        numbers = codec.embed_semantic(encode(codec, saying.pcm)[:, 0])[0]
        tokens.append(saying.frames(numbers.float().numpy(), rate))
    return abx.discrimination(tokens, said)


def mel_discrimination(said: Sequence[abx.Saying]) -> dict[str, Metric]:
    """The same test of the sound's own log-mel spectrum, four frames of 10 ms averaged to one."""
    mel, tokens = LogMel(), []
    for saying in said:
        padded = np.pad(saying.pcm, (0, -len(saying.pcm) % (4 * mel.stride)))
        bands = mel(torch.from_numpy(padded)[None, None])[0].unflatten(0, (-1, 4)).mean(1)
        tokens.append(saying.frames(bands.numpy(), SAMPLE_RATE / (4 * mel.stride)))
    return {f"{name}_mel": metric for name, metric in abx.discrimination(tokens, said).items()}


# --- The comparison -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one codec."""

    name: str
    rates: dict[int, float]
    """Codebooks decoded from → bits a second, ascending; the last is all of them."""
    sizes: tuple[int, ...]
    """Codes of each codebook."""
    curve: dict[int, dict[str, Metric]]
    """Codebooks decoded from → metrics."""
    usage: dict[str, Metric]
    abx: dict[str, Metric]
    examples: dict[int, list[Pcm]]
    """Codebooks decoded from → the first examples, as decoded."""

    def metrics(self) -> dict[str, Metric]:
        """All of them under their plain names."""
        last = max(self.rates)
        found = {"bitrate_bps": Metric(self.rates[last], unit="bit/s")}
        found |= self.curve[last] | self.abx | self.usage
        for level, rate in self.rates.items():
            for name, metric in self.curve[level].items():
                found[f"{name}_at_{rate:.0f}bps"] = metric
        return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """Codecs on the same sounds."""

    items: tuple[Item, ...]
    source: str
    originals: dict[str, Metric]
    """What was measured of the sounds alone."""
    results: tuple[Result, ...]
    examples: tuple[int, ...]
    """Which of the sounds are shown in the report."""
    missing: tuple[str, ...] = ()
    """Of each codec that was left out, the sentence that says why."""

    def metrics(self) -> dict[str, Metric]:
        """Every metric under its published name."""
        first, *others = self.results
        found = first.metrics() | self.originals
        for result in others:
            found |= {f"{result.name}_{name}": m for name, m in result.metrics().items()}
        return found

    def document(self) -> list[report.Block]:
        """The report: numbers, curves, codebooks, and examples to look at and listen to."""
        minutes = sum(len(item.pcm) for item in self.items) / SAMPLE_RATE / 60
        blocks: list[report.Block] = [
            report.Paragraph(
                f"{len(self.items)} sounds, {minutes:.1f} minutes: {self.source}. In brackets: 95% "
                "intervals (bootstrap). ↑ is better when higher, ↓ when lower."
            ),
            *(report.Paragraph(f"Left out: {sentence}") for sentence in self.missing),
            report.Heading("All codebooks"),
            self._numbers(),
            report.Heading("Quality over bitrate"),
            self._curves(),
            *self._points(),
            report.Heading("Codebooks"),
            *self._codebooks(),
            report.Heading("Examples"),
            *self._examples(),
            report.Heading("What the numbers mean"),
            *(report.Paragraph(text) for text in _MEANING),
        ]
        return blocks

    def _numbers(self) -> report.Table:
        rows = []
        rates = [f"{result.rates[max(result.rates)]:.0f} bit/s" for result in self.results]
        rows.append(["bitrate", *rates])
        for name, title in (*_CURVES, *_ABX):
            metrics = [(r.curve[max(r.rates)] | r.abx).get(name) for r in self.results]
            if any(metric is not None for metric in metrics):
                rows.append([title, *("" if m is None else shown(m) for m in metrics)])
        for name, metric in self.originals.items():
            rows.append([_ORIGINALS[name], shown(metric), *[""] * (len(self.results) - 1)])
        return report.Table(["measure", *(result.name for result in self.results)], rows)

    def _curves(self) -> report.Picture:
        panels = []
        for name, title in _CURVES:
            lines = {
                result.name: [
                    (rate, result.curve[level][name])
                    for level, rate in result.rates.items()
                    if name in result.curve[level]
                ]
                for result in self.results
            }
            if any(metric.value is not None for line in lines.values() for _, metric in line):
                panels.append(report.Panel(title, lines))
        caption = "Each measure over bits a second; bars are 95% intervals."
        return report.Picture("curves", caption, report.curves(panels, "bit/s", logarithmic=True))

    def _points(self) -> Iterator[report.Table]:
        """The numbers behind the curves."""
        for result in self.results:
            names = [pair for pair in _CURVES if pair[0] in result.curve[max(result.rates)]]
            rows = [
                [
                    f"{rate:.0f} bit/s",
                    str(level),
                    *(shown(result.curve[level][n]) for n, _ in names),
                ]
                for level, rate in result.rates.items()
            ]
            yield report.Table([result.name, "codebooks", *(title for _, title in names)], rows)

    def _codebooks(self) -> Iterator[report.Block]:
        lines: dict[str, dict[str, list[tuple[float, Metric]]]] = {"usage": {}, "entropy": {}}
        for result in self.results:
            rows = []
            for level, size in enumerate(result.sizes):
                pair = [result.usage[f"codebook_{what}_{level}"] for what in lines]
                rows.append([str(level), str(size), *map(shown, pair), str(pair[0].n)])
                for what, metric in zip(lines, pair, strict=True):
                    lines[what].setdefault(result.name, []).append((level, metric))
            header = [result.name, "codes", "share seen", "entropy / log2(codes)", "frames"]
            yield report.Table(header, rows)
        titles = {"usage": "share of codes seen", "entropy": "entropy / log2(codes)"}
        panels = [report.Panel(titles[what], of) for what, of in lines.items()]
        caption = "Usage and entropy of each codebook; 0 is the semantic one."
        yield report.Picture("codebooks", caption, report.curves(panels, "codebook"))

    def _examples(self) -> Iterator[report.Sound]:
        for number, index in enumerate(self.examples):
            item = self.items[index]
            original = f"{item.name} - original"
            yield report.Sound(f"example-{number}-original", original, item.pcm, SAMPLE_RATE)
            for result in self.results:
                for level, decoded in result.examples.items():
                    caption = f"{item.name} - {result.name}, {result.rates[level]:.0f} bit/s"
                    name = f"example-{number}-{result.name}-{level}"
                    yield report.Sound(name, caption, decoded[number], SAMPLE_RATE)


_ABX = (
    ("abx_within", "ABX errors of codebook 0, within speakers ↓"),
    ("abx_across", "ABX errors of codebook 0, across speakers ↓"),
)
_ORIGINALS = {
    "wer_original": "word error rate of the originals",
    "speaker_trust": "trust in the speaker similarity",
    "abx_within_mel": "ABX errors of log-mel spectra, within speakers",
    "abx_across_mel": "ABX errors of log-mel spectra, across speakers",
}
_MEANING = (
    "STOI and PESQ predict what listeners understand and how they rate it; both were fitted to "
    "noisy and telephone speech, not to neural codecs.",
    "SI-SDR compares waveforms: a codec that redraws phases sounds better than it says. Mel and "
    "STFT distance compare magnitudes at several resolutions; 0 is equal.",
    "The word error rate is that of an independent recognizer (pocketsphinx), pooled over sounds.",
    "Speaker similarity compares average cepstra with other recordings of the same speaker: 1 is "
    "as alike as the originals are among each other, 0 as alike as two speakers. It is no trained "
    "speaker encoder; trust is how often its prints order two pairs rightly, 0.5 being chance.",
    "ABX: of words that differ in one sound, how often the codes of one lie nearer to the other; "
    "chance is 0.5.",
    "Usage and entropy are too low where there are not many more frames than codes.",
)


def slugs(names: Sequence[str]) -> list[str]:
    """Short distinct names, fit for a metric: "hf://kyutai/mimi" is "mimi", the next "mimi_2"."""
    last = (name.rstrip("/").rpartition("/")[2].lower() for name in names)
    return report.distinct(re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "codec" for name in last)


@torch.inference_mode()
def measure(
    codecs: Mapping[str, Codec],
    items: Sequence[Item],
    said: Sequence[abx.Saying],
    *,
    source: str,
    missing: Sequence[str] = (),
    levels: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare codecs (by the names that their metrics get) on sounds and on minimal pairs.

    Args:
        source: what the sounds are, in words.
        missing: what the report says of codecs that could not be compared.
        levels: see `parse_levels`.
        progress: show on the terminal how far it has come, and how long it will take.
    """
    steps = {name: parse_levels(levels, len(codec.codebooks)) for name, codec in codecs.items()}
    per_group = EXAMPLES // len({item.group for item in items})
    examples = [
        index
        for group in ("main", "users")
        for index in [i for i, item in enumerate(items) if item.group == group][:per_group]
    ]
    sizes = {name: [math.prod(f) for f in codec.codebooks] for name, codec in codecs.items()}
    counts = {
        name: [torch.zeros(size, dtype=torch.int64) for size in sizes[name]] for name in codecs
    }
    scores: dict[tuple[str, int], list[Score]] = {
        (name, level): [] for name in codecs for level in steps[name]
    }
    kept: dict[str, dict[int, list[Pcm]]] = {
        name: {level: [] for level in sorted({steps[name][0], steps[name][-1]})} for name in codecs
    }
    before, voices = [], []
    with progress_bar(progress) as bar:
        for index, item in enumerate(bar.track(items, description="sounds")):
            before.append(transcription_errors(item, item.pcm))
            voices.append(None if item.speaker is None else fidelity.voice_print(item.pcm))
            for name, codec in codecs.items():
                codes = encode(codec, item.pcm)
                for count, row in zip(counts[name], codes[0], strict=True):
                    count += torch.bincount(row, minlength=len(count))
                for level in steps[name]:
                    decoded = decode(codec, codes[:, :level], len(item.pcm))
                    scores[name, level].append(score(item, decoded))
                    if index in examples and level in kept[name]:
                        kept[name][level].append(decoded)
        results = tuple(
            Result(
                name,
                {level: bitrate(codec, level) for level in steps[name]},
                tuple(sizes[name]),
                {level: quality(items, scores[name, level], voices) for level in steps[name]},
                usage(counts[name]),
                discrimination(codec, said, bar),
                kept[name],
            )
            for name, codec in codecs.items()
        )
    originals = {
        "wer_original": word_error_rate(before),
        "speaker_trust": likeness(items, voices, voices)[1],
        **mel_discrimination(said),
    }
    return Comparison(tuple(items), source, originals, results, tuple(examples), tuple(missing))


def compare(
    model: str | None = "tiny",
    utterances: int = 100,
    seed: int = 0,
    codecs: Sequence[str] = (),
    audio: Path | None = None,
    levels: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure the codec of a model and other codecs side by side.

    Args:
        model: whose codec comes first, or a codec's own checkpoint directory; None for none.
        utterances: sounds at most (of the assistant, and as many of the held-out voices); the
            minimal pairs are said by a twelfth as many voices, 2 to 7.
        seed: picks sentences, recordings, and how the minimal pairs are said.
        codecs: further codecs, as `load_codec` knows them. All but the very first are peers: one
            whose weights cannot be fetched is left out, with a notice in log and report.
        audio: a folder of recordings to measure on instead.
        levels: numbers of codebooks to decode from; see `parse_levels`.
        progress: show on the terminal how far it has come.

    Raises UserError when a model, a codec, the folder or a speech engine is missing.
    """
    assert model is not None or codecs, "nothing to measure"
    parse_levels(levels, 1)  # before minutes are spent on loading
    judged, *peers = [*([] if model is None else [model]), *codecs]
    slug, *slugs_of_peers = slugs([judged, *peers])
    loaded = {slug: (load_codec if model is None else load_codec_of)(judged)}
    missing = []
    for slug, peer in zip(slugs_of_peers, peers, strict=True):
        try:
            loaded[slug] = load_codec(peer)
        except Unreachable as error:
            missing.append(" ".join(str(error).split()))
            log.warning("left out: %s", missing[-1])
    if audio is None:
        items, source = synthesized(utterances, seed), "held-out sentences, synthesized"
    else:
        items, source = recordings(audio, utterances, seed), f"recordings in {audio.name}"
    try:
        said = list(abx.sayings(max(2, utterances // 12), seed))
    except UserError as error:
        if audio is None:
            raise
        log.warning("no ABX test: %s", error)  # recordings can be measured without an engine
        said = []
    return measure(
        loaded,
        items,
        said,
        source=source,
        missing=missing,
        levels=levels,
        progress=progress,
    )


def evaluate(model: str | None = "tiny", **options: Any) -> dict[str, Metric]:
    """Metrics of the codec inside a model, or of any codec; `options` are those of `compare`."""
    return compare(model, **options).metrics()
