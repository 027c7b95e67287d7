"""Look at a sample of a shard: what is said in colours, its sound, a picture; and at a whole set.

    who speaks, when          [assistant]  3.2 - 4.6 s   seven plus five is twelve
    an interleaved document   text in plain, speech in colour: the [quick brown fox] jumps
    a picture                 a row each: waveform and words, events, codes, of every channel

    speechlm synth inspect data/dialogues/dialogues-000000.tar --sample d0-000003-00 --out look
    speechlm synth stats data/dialogues

Letters: C channels, K codebooks, T frames, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from rich.table import Table
from rich.text import Text

from audio_codec.audio import FRAME_RATE, SAMPLE_RATE, resample
from audio_codec.bench import Figure
from audio_codec.codec import AnyCodec
from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data.dialogue import ASSISTANT, USER
from synth_data.mixture import Diversity, Material, Summary, contrast, shares, summarize
from synth_data.shards import Location, Reader, Sample, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from synth_data.bench import Decode

# A pause this long begins a new line of what a speaker says.
_LINE_PAUSE = 0.7
# Of the channels: on the terminal, in pictures.
_COLOURS = (("cyan", "tab:cyan"), ("green", "tab:green"), ("magenta", "tab:pink"))
_NO_SOUND = np.zeros(0, np.float32)
_LISTED = 12  # Names of a kind in a table; there may be thousands of voices.


def find(source: Location, key: str | None = None) -> Sample:
    """A sample by its id, or the first one.

    Raises:
        UserError: there is no shard, or no such sample that can be read.
    """
    reader = Reader(source)
    first, count = None, 0
    for sample in reader:
        if key is None or sample.id == key:
            return sample
        first, count = first or sample.id, count + 1
    broken = f" ({reader.skipped} could not be read)" if reader.skipped else ""
    if key is None or first is None:
        raise UserError(f"there is no sample in '{source}'{broken}.")
    raise UserError(
        f"sample {key!r} is not among the {count} in '{source}'{broken}, such as {first!r}."
    )


# --- In words -------------------------------------------------------------------------------------


def describe(sample: Sample) -> Text:
    """What a sample is, and what is said in it: speech in the colour of its channel, text plain."""
    made = "synthetic" if sample.synthetic else "recorded"
    words = "words of people" if sample.human_text else "words not of people"
    said = Text()
    said.append(f"{sample.id}\n", style="bold")
    said.append(f"{sample.seconds:.2f} s, {made}, {words}; {sample.source} ({sample.licence})")
    if sample.wer is not None:
        said.append(f"; word error rate {sample.wer:.2f}")
    if sample.codes is not None:
        shape = " × ".join(map(str, sample.codes.shape))
        said.append(f"; codes {shape} (channels, codebooks, frames)")
    said.append("\n")
    for channel, voice in enumerate(sample.voices):
        said.append(f"■ {_name(sample, channel)}", style=_colour(channel))
        said.append(f" {voice}\n")
    said.append("\n")
    if "segments" in sample.meta:
        _append_segments(said, sample.meta["segments"])
    elif any(sample.words):
        for start, end, channel, text in _lines(sample):
            said.append(f"{start:7.2f} - {end:6.2f}  ", style="dim")
            said.append(f"{text}\n", style=_colour(channel))
    else:
        # Where nobody knows when it is said.
        said.append(f"{sample.text or '(nothing is known of what is said)'}\n", style=_colour(0))
    for event in sample.events:
        said.append(f"{event.start:7.2f} - {event.end:6.2f}  {event.kind}", style="dim")
        details = ", ".join(f"{k}: {_short(v)}" for k, v in event.meta.items())
        said.append(f" ({details})\n" if details else "\n", style="dim")
    return said


def _append_segments(said: Text, segments: Sequence[Mapping[str, Any]]) -> None:
    """An interleaved document: its text plain, its speech in brackets and colour."""
    for segment in segments:
        if segment["modality"] == "speech":
            frames = segment["last"] - segment["first"]
            said.append(f"[{segment['text']}]", style=f"bold {_colour(0)}")
            said.append(f"·{frames} ", style="dim")
        else:
            said.append(f"{segment['text']} ")
    said.append("\n")


def _lines(sample: Sample) -> list[tuple[float, float, int, str]]:
    """Stretches of speech (start, end, channel, text) without a long pause, by their start."""
    lines = []
    for channel, words in enumerate(sample.words):
        first = 0
        for index in range(1, len(words) + 1):
            ended = index == len(words) or words[index].start - words[index - 1].end > _LINE_PAUSE
            if ended:
                text = " ".join(word.text for word in words[first:index])
                lines.append((words[first].start, words[index - 1].end, channel, text))
                first = index
    return sorted(lines)


def _name(sample: Sample, channel: int) -> str:
    names = {ASSISTANT: "assistant", USER: "user"}
    return names.get(channel, f"channel {channel}") if len(sample.voices) == 2 else "speaker"


def _colour(channel: int) -> str:
    return _COLOURS[channel % len(_COLOURS)][0]


def _paint(channel: int) -> str:
    return _COLOURS[channel % len(_COLOURS)][1]


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- In sound -------------------------------------------------------------------------------------


def sound(sample: Sample, load: Callable[[], AnyCodec]) -> npt.NDArray[np.float32]:
    """What a sample sounds like, float32 [C, S] at 24 kHz: its sound, else its codes decoded.

    ``load`` gives the codec, where one is needed.

    Raises:
        UserError: it has neither, or its codes are not this codec's.
    """
    if sample.pcm is not None:
        return sample.pcm
    if sample.codes is None:
        raise UserError(f"sample {sample.id!r} has neither sound nor codes.")
    if sample.codes.size == 0:  # A document of which nothing is spoken.
        return np.zeros((len(sample.codes), 0), np.float32)
    codec = load()
    sizes = [int(np.prod(factors)) for factors in codec.codebooks]
    k = sample.codes.shape[1]
    highest = sample.codes.max(axis=(0, 2), initial=0)
    fits = k <= len(sizes) and bool((highest < sizes[:k]).all())
    if not fits or codec.sample_rate / codec.frame_size != FRAME_RATE:
        raise UserError(
            f"sample {sample.id!r} has {k} codebooks with codes up to {highest.tolist()}, and the "
            f"codec's have {sizes} codes; name the model that made them with --model."
        )
    with torch.inference_mode():
        pcm = codec.decode(torch.from_numpy(sample.codes.astype(np.int64)))[:, 0].numpy()
    # In step with the words: what the codec gives back late is moved to its place.
    pcm = np.pad(pcm[:, codec.delay :], ((0, 0), (0, codec.delay)))
    return resample(pcm, codec.sample_rate, SAMPLE_RATE)


def speech(sample: Sample, decode: Decode) -> npt.NDArray[np.float32]:
    """What semantic codes alone sound like, float32 [C, S] at 24 kHz: spoken by a token decoder.

    Raises:
        UserError: it has no codes, or more than those.
    """
    if sample.codes is None or sample.codes.shape[1] != 1:
        books = 0 if sample.codes is None else sample.codes.shape[1]
        raise UserError(
            f"sample {sample.id!r} has {books} codebooks, and --decoder speaks the semantic one of "
            "pairs and interleaved documents; leave it out."
        )
    rows = [decode(codes[0]) if codes.size else _NO_SOUND for codes in sample.codes]
    return np.stack(rows)


def save_sound(path: Path, pcm: npt.NDArray[np.float32]) -> None:
    """Write channels [C, S] as a wave file; UserError where it cannot be written."""
    with replacing(path) as temporary:
        soundfile.write(temporary, pcm.T.clip(-1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")


# --- In a picture ---------------------------------------------------------------------------------


def draw(sample: Sample, pcm: npt.NDArray[np.float32] | None, path: Path) -> None:
    """Draw a sample as a PNG: waveforms with words, events, codes; UserError where it cannot be.

    ``pcm`` [C, S] is its sound, if it is known.
    """
    from matplotlib.figure import Figure

    channels = len(sample.voices)
    kinds = sorted({event.kind for event in sample.events})
    heights = [1.2] * channels
    heights += [0.25 * len(kinds) + 0.2] if kinds else []
    coded = sample.codes is not None and sample.codes.size > 0
    heights += [1.2] * channels if coded else []
    # As wide as it is long, within what a viewer opens.
    width = min(max(8.0, sample.seconds * 1.2), 60.0)
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained", dpi=100)
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)
    rows = list(grid[:, 0])
    if pcm is not None:
        pcm = pcm / max(
            float(np.abs(pcm).max(initial=0.0)), 1e-3
        )  # The louder channel fills its row.
    for channel in range(channels):
        _draw_speech(rows.pop(0), sample, channel, None if pcm is None else pcm[channel])
    if kinds:
        _draw_events(rows.pop(0), sample, kinds)
    if sample.codes is not None and coded:
        for channel, codes in enumerate(sample.codes):
            _draw_codes(rows.pop(0), codes, f"{_name(sample, channel)}'s codes")
    grid[-1, 0].set_xlim(0, max(sample.seconds, 1 / FRAME_RATE))
    grid[-1, 0].set_xlabel("s")
    figure.suptitle(f"{sample.id} · {sample.source}", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _draw_speech(
    axis: Axes, sample: Sample, channel: int, pcm: npt.NDArray[np.float32] | None
) -> None:
    colour = _paint(channel)
    if pcm is not None:
        # Lowest and highest of each hundredth of a second: all that a line a pixel wide can show.
        hop = SAMPLE_RATE // 100
        blocks = np.pad(pcm, (0, -len(pcm) % hop)).reshape(-1, hop)
        time = np.arange(len(blocks)) / 100
        axis.fill_between(time, blocks.min(axis=1), blocks.max(axis=1), color=colour, linewidth=0)
    for word in sample.words[channel]:
        axis.axvspan(word.start, word.end, color=colour, alpha=0.12, linewidth=0)
        axis.text(word.start, 1.02, word.text, fontsize=7, rotation=30, clip_on=True)
    for segment in sample.meta.get("segments", ()):
        _draw_segment(axis, segment, colour, sample.seconds)
    axis.set_ylim(-1, 1.9)
    axis.set_yticks([])
    axis.set_ylabel(_name(sample, channel), fontsize=8)


def _draw_segment(axis: Axes, segment: Mapping[str, Any], colour: str, seconds: float) -> None:
    """Of an interleaved document: speech over the time that it takes, text where it stands."""
    start, end = segment["first"] / FRAME_RATE, segment["last"] / FRAME_RATE
    if segment["modality"] == "speech":
        axis.axvspan(start, end, color=colour, alpha=0.12, linewidth=0)
        axis.text(start, 1.02, segment["text"], fontsize=7, clip_on=True)
    else:
        axis.axvline(start, color="black", linewidth=0.8)
        side = "left" if 2 * start < seconds else "right"  # What stands at the end is seen too.
        axis.text(start, 1.45, segment["text"], fontsize=7, style="italic", clip_on=True, ha=side)


def _draw_events(axis: Axes, sample: Sample, kinds: Sequence[str]) -> None:
    for event in sample.events:
        row = kinds.index(event.kind)
        colour = _paint(event.channel)
        if event.end > event.start:
            axis.barh(row, event.end - event.start, left=event.start, height=0.7, color=colour)
        else:
            axis.plot([event.start], [row], marker="|", markersize=12, color=colour)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
    axis.set_ylim(-0.6, len(kinds) - 0.4)
    axis.invert_yaxis()


def _draw_codes(axis: Axes, codes: npt.NDArray[np.uint16], label: str) -> None:
    """Codes [K, T]: the same shade for the same code, each codebook on a scale of its own."""
    top = codes.max(axis=1, keepdims=True).clip(1)
    axis.imshow(
        codes / top,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        extent=(0, codes.shape[1] / FRAME_RATE, len(codes) - 0.5, -0.5),
    )
    axis.set_yticks([0] if len(codes) == 1 else [0, len(codes) - 1])
    axis.set_ylabel(label, fontsize=8)


# --- In numbers -----------------------------------------------------------------------------------


def table(summary: Summary) -> Table:
    """Counts by where they come from; the largest of each kind, where there are many."""
    drawn = Table(title="what it is made of", title_justify="left")
    drawn.add_column("by")
    drawn.add_column("")
    for heading in ("samples", "hours", "words", "codes"):
        drawn.add_column(heading, justify="right")
    for axis, names in summary.by.items():
        largest = sorted(names.items(), key=lambda item: (-item[1].seconds, item[0]))
        for number, (name, count) in enumerate(largest[:_LISTED]):
            hours = f"{count.seconds / 3600:.2f}"
            cells = (str(count.samples), hours, str(count.words), str(count.tokens))
            drawn.add_row(axis if number == 0 else "", name, *cells)
        if len(largest) > _LISTED:
            drawn.add_row("", f"… and {len(largest) - _LISTED} more")
    return drawn


def measure(
    sources: Sequence[Location], against: Location | None = None
) -> tuple[Summary, dict[str, Figure]]:
    """What shards hold, and its numbers by the names under which they are reported.

    ``against``: shards that they were made from, whose diversity is reported beside theirs.

    Raises:
        UserError: there are no shards somewhere.
    """
    summary, skipped = Summary(), 0
    for source in sources:
        found, broken = summarize(source)
        summary += found
        skipped += broken
    total, made = summary.total, shares([(1.0, summary)])
    figures = {
        "samples": Figure(total.samples),
        "skipped": Figure(skipped),
        "hours": Figure(total.seconds / 3600, unit="h"),
        "words": Figure(total.words),
        "tokens": Figure(total.tokens),
    }
    for name, share, unit in (
        ("recorded_speech", made.recorded_speech, "of seconds"),
        ("human_text", made.human_text, "of words"),
    ):
        if share is not None:
            figures[name] = Figure(share, unit=unit)
    material = Material.of(chain.from_iterable(read(source, audio=False) for source in sources))
    if against is None:
        figures |= _entropies("", material.diversity())
    else:
        ours, theirs = contrast(material, Material.of(read(against, audio=False)))
        figures |= _entropies("", ours) | _entropies("source_", theirs)
    return summary, figures


def _entropies(prefix: str, found: Diversity) -> dict[str, Figure]:
    figures = {}
    if found.words:
        for name, value in (
            ("unigram", found.unigrams),
            ("bigram", found.bigrams),
            ("trigram", found.trigrams),
        ):
            figures[f"{prefix}{name}_entropy"] = Figure(value, n=found.words, unit="bits")
    if found.frames:
        for name, value in (("token", found.codes), ("token_pair", found.code_pairs)):
            figures[f"{prefix}{name}_entropy"] = Figure(value, n=found.frames, unit="bits")
    return figures
