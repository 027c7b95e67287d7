"""Corpora in, clean spoken text out: read, judge, mask, spell out, de-duplicate, write.

    speechlm synth text configs/synth/text.yaml workers=2

A corpus is any number of sources: plain text, JSON lines, Parquet, Hugging Face datasets, or
dialogues, on this disk or wherever fsspec reaches (``hf://``, ``s3://``, ``https://``). Each is
read as a stream of ``Document``s, one record at a time, so that nothing need fit in memory.

    sources ─ blocks ─┬─ worker: language, personal data, rules, judge, ─┬─ work/clean-*.jsonl
      (one reader)    └─ worker: spoken form, held-out overlap, keys   ──┘  work/clean-*.npy
                                                                            │ dedup.duplicates
                                                                            ▼
                                     report.json  ←  text-000000.jsonl, text-000001.jsonl, …

A block is cut by its number of characters alone, and its output is a pure function of it: the bytes
do not depend on the number of workers. Each file appears only when whole, and a build that was
killed goes on behind the last of them. ``work`` is removed in the end.

``text.py`` holds the spoken form, ``quality.py`` the rules and the judge, ``dedup.py`` duplicates
and held-out overlap.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data.build import start_worker
from synth_data.dedup import EXACT, KEPT, NEAR, DedupConfig, Heldout, duplicates, key_rows, sketch
from synth_data.quality import (
    Judge,
    QualityConfig,
    RuleConfig,
    fault,
    language_of,
    mask_personal,
    train_judge,
)
from synth_data.text import spell_out, tokenize

Format = Literal["auto", "text", "jsonl", "parquet", "dataset"]

_SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
# Of a turn of a dialogue, in public data sets.
_SPEAKER_KEYS = ("speaker", "role", "from", "name")
_TEXT_KEYS = ("text", "content", "value", "utterance")
# Under which a dialogue in plain text has its turns.
_TURNS = "turns"
# What a record costs in a block besides its characters.
_RECORD = 100
_EXAMPLE = 80
"""Characters of a removed text that a report shows."""


class CorpusSource(BaseModel):
    """Where documents come from, and what they may be used for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file, a folder, a pattern with ``*``, or an address that fsspec knows; for a dataset its
    folder on disk or ``hf://datasets/organisation/name``."""
    licence: str
    name: str = ""
    """Under which its documents are counted; the last part of the path where empty."""
    format: Format = "auto"
    """By the file's suffix where "auto"; .gz, .xz, .bz2 and .zst are opened on the way."""
    unit: Literal["line", "paragraph", "file", "dialogue"] = "line"
    """Of plain text: what a document is. A dialogue is a paragraph of lines ``Name: words``."""
    field: str = "text"
    """Of records: which holds the text."""
    turns: str = ""
    """Of records: which holds a dialogue, where there is one, in place of ``field``: a list of
    strings, of pairs (speaker, text), or of objects with a speaker (speaker, role, from, name) and
    a text (text, content, value, utterance). A record that is a list is a dialogue itself."""
    subset: str | None = None
    """Of a dataset: its configuration."""
    split: str = "train"
    """Of a dataset."""
    limit: int | None = Field(default=None, gt=0)
    """Documents to read at most."""

    @property
    def label(self) -> str:
        """The name, or the last part of the path."""
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


class TextConfig(BaseModel):
    """A build of clean text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path
    """Folder of the shards ``text-*.jsonl`` and of ``report.json``."""
    sources: tuple[CorpusSource, ...] = Field(min_length=1)
    max_characters: int = Field(default=100_000, gt=0)
    """A longer document is removed, unread where it is a line."""
    language: str | None = None
    """An ISO 639-1 code; text in another language is removed. Null asks nobody."""
    personal: Literal["mask", "drop", "keep"] = "mask"
    """What happens to e-mail addresses, phone and card numbers, or to texts with one."""
    rules: RuleConfig | None = RuleConfig()
    """Null applies none."""
    quality: QualityConfig | None = None
    """The trained judge; null goes without."""
    spoken: bool = True
    """Write documents in their spoken form (``text.spell_out``)."""
    heldout: tuple[CorpusSource, ...] = ()
    """Texts that must not be trained on."""
    heldout_words: int = Field(default=8, gt=0)
    """Length of the n-grams that may not be shared with them."""
    heldout_share: float = Field(default=0.0, ge=0, lt=1)
    """A text with a greater share of such n-grams is removed."""
    dedup: DedupConfig | None = DedupConfig()
    """Null keeps duplicates."""
    shard_characters: int = Field(default=16_000_000, gt=0)
    """Read for a shard, before anything is removed."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""

    @model_validator(mode="after")
    def _labels_differ(self) -> TextConfig:
        labels = [source.label for source in self.sources]
        if twice := [label for label, count in Counter(labels).items() if count > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}; give one of them a name")
        return self


# --- Documents ------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one speaker of a dialogue says before another does."""

    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is from."""

    id: str
    text: str
    """Of a dialogue, its turns, one a line; in the spoken form one after the other."""
    source: str
    licence: str
    turns: tuple[Turn, ...] = ()

    def line(self) -> str:
        """One line of JSON, as a source of format "jsonl" reads it."""
        record: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "source": self.source,
            "licence": self.licence,
        }
        if self.turns:
            record["turns"] = [turn._asdict() for turn in self.turns]
        return json.dumps(record, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Removed:
    """A record that was no document, or not a good one."""

    source: str
    reason: str
    example: str = ""


def read(source: CorpusSource, max_characters: int = 100_000) -> Iterator[Document | Removed]:
    """Stream a source, in order; what is no document comes as ``Removed`` with its reason.

    Raises:
        UserError: the source is missing, of an unknown kind, or broken; or a package that its kind
            needs is not installed.
    """
    records = itertools.islice(_records(source, max_characters), source.limit)
    for number, record in enumerate(records):
        made = record if isinstance(record, Removed) else _document(record, number, source)
        if isinstance(made, Document) and len(made.text) > max_characters:
            made = Removed(source.label, "too long", made.text[:_EXAMPLE])
        yield made


Record = Mapping[str, Any]


def _document(record: Any, number: int, source: CorpusSource) -> Document | Removed:
    label = source.label
    turns: tuple[Turn, ...] = ()
    key = _TURNS if source.unit == "dialogue" else source.turns
    try:
        items = record if isinstance(record, list) else record.get(key)
        if items:
            turns = tuple(_turn(item, i) for i, item in enumerate(items))
            text = "\n".join(turn.text for turn in turns)
        else:
            text = record[source.field]
    except (LookupError, TypeError, ValueError, AttributeError):
        text = None
    if not isinstance(text, str):
        return Removed(label, "no text", repr(record)[:_EXAMPLE])
    if not text.strip():
        return Removed(label, "empty")
    if is_binary(text):
        return Removed(label, "binary", ascii(text[:_EXAMPLE]))
    return Document(f"{label}-{number:09d}", text, label, source.licence, turns)


def is_binary(text: str) -> bool:
    """Whether there is something in a text that is no character of one."""
    # JSON can spell half of a character, which no file can hold.
    return any(c < " " and c not in "\t\n\r\f\v" or "\ud800" <= c <= "\udfff" for c in text)


def _turn(item: Any, index: int) -> Turn:
    """A turn in one of the public forms; speakers without a name are "a" and "b" in turn."""
    if isinstance(item, str):
        return Turn("ab"[index % 2], item)
    if isinstance(item, list):
        speaker, text = item
        return Turn(str(speaker), str(text))
    text = next((item[key] for key in _TEXT_KEYS if key in item), None)
    if not isinstance(text, str):
        raise TypeError(text)
    speaker = next((item[key] for key in _SPEAKER_KEYS if key in item), "ab"[index % 2])
    return Turn(str(speaker), text)


# --- Reading --------------------------------------------------------------------------------------


def _records(source: CorpusSource, max_characters: int) -> Iterator[Any | Removed]:
    kind = source.format
    if kind == "auto" and _is_dataset(source.path):
        kind = "dataset"
    if kind == "dataset":
        yield from _dataset(source)
        return
    system, files = _files(source)
    for file in files:
        form = _format_of(file, source) if kind == "auto" else kind
        try:
            if form == "parquet":
                yield from _parquet(system, file, source)
                continue
            with system.open(file, "rb", compression="infer") as stream:
                # Bytes: a character has up to four, and JSON may escape it with six.
                reader = _json_lines if form == "jsonl" else _texts
                yield from reader(stream, source, 8 * max_characters)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise UserError(f"text source {file!r} cannot be read: {error}") from error


def _is_dataset(path: str) -> bool:
    """A folder of ``Dataset.save_to_disk``, or a repository on the hub."""
    if path.startswith("hf://datasets/"):
        return len(path.removeprefix("hf://datasets/").split("/")) <= 2 and "*" not in path
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files(source: CorpusSource) -> tuple[Any, list[str]]:
    """The file system of a source, and its files in the order of their names."""
    try:
        system, root = fsspec.core.url_to_fs(source.path)
        if any(sign in root for sign in "*?["):
            files = sorted(system.glob(root))
        elif system.isdir(root):
            files = sorted(file for file in system.find(root) if _format_of(file) is not None)
        else:
            files = [root] if system.exists(root) else []
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"text source {source.path!r} cannot be opened: {error}") from error
    if not files:
        raise UserError(f"text source {source.path!r}: there is no such file, or none to read")
    return system, files


def _format_of(file: str, source: CorpusSource | None = None) -> Format | None:
    """By suffix, below that of a compression; with a ``source``, a file of none is a mistake."""
    path = Path(file)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix not in _SUFFIXES and source is not None:
        raise UserError(
            f"text source {file!r}: the suffix must be one of {', '.join(_SUFFIXES)}, perhaps "
            f"followed by {', '.join(_COMPRESSED)}; or name its format"
        )
    return _SUFFIXES.get(suffix)


def bounded_lines(stream: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines of a stream; None for one of more than ``limit`` bytes, which is never held whole."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
            pass
        yield None


def _json_lines(stream: IO[bytes], source: CorpusSource, limit: int) -> Iterator[Any | Removed]:
    for line in bounded_lines(stream, limit):
        if line is None:
            yield Removed(source.label, "too long")
        elif line.strip():
            try:
                yield json.loads(line)
            except UnicodeDecodeError:
                yield Removed(source.label, "binary", ascii(line[:_EXAMPLE]))
            except (ValueError, RecursionError):
                yield Removed(source.label, "malformed", ascii(line[:_EXAMPLE]))


def _texts(stream: IO[bytes], source: CorpusSource, limit: int) -> Iterator[Record | Removed]:
    for piece in _pieces(stream, source.unit, limit):
        if piece is None:
            yield Removed(source.label, "too long")
            continue
        try:
            text = piece.decode("utf-8").strip()
        except UnicodeDecodeError:
            yield Removed(source.label, "binary", ascii(piece[:_EXAMPLE]))
            continue
        if not text:
            continue
        record: dict[str, Any] = {source.field: text}
        if source.unit == "dialogue":
            spoken = [line.partition(":") for line in text.splitlines() if line.strip()]
            if not all(colon for _, colon, _ in spoken):
                yield Removed(source.label, "malformed", text[:_EXAMPLE])
                continue
            record[_TURNS] = [{"speaker": a.strip(), "text": b.strip()} for a, _, b in spoken]
        yield record


def _pieces(stream: IO[bytes], unit: str, limit: int) -> Iterator[bytes | None]:
    """Lines, paragraphs (between empty lines) or the whole; None for one beyond the limit."""
    if unit == "line":
        yield from bounded_lines(stream, limit)
        return
    pending = io.BytesIO()
    over = False
    for line in itertools.chain(bounded_lines(stream, limit), [b""]):
        blank = line is not None and not line.strip()
        if line == b"" or (blank and unit != "file"):
            yield None if over else pending.getvalue()
            pending, over = io.BytesIO(), False
        elif line is None or pending.tell() + len(line) > limit:
            over = True
        else:
            pending.write(line)


def _parquet(system: Any, file: str, source: CorpusSource) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "reading Parquet needs the package pyarrow; "
            "run: pip install pyarrow (or this package's extra 'text')"
        ) from None
    column = source.turns or source.field
    with system.open(file, "rb") as opened:
        table = pyarrow.parquet.ParquetFile(opened)
        if column not in table.schema_arrow.names:
            raise UserError(
                f"text source {file!r} has no column {column!r}; "
                f"choose one of {', '.join(table.schema_arrow.names)}"
            )
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.to_pylist()


def _dataset(source: CorpusSource) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading a Hugging Face dataset needs the package datasets; "
            "run: pip install datasets (or this package's extra 'text')"
        ) from None
    path = source.path.removeprefix("hf://datasets/")
    try:
        if path == source.path and _is_dataset(path):
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                found = found[source.split]
        else:
            found = datasets.load_dataset(path, source.subset, split=source.split, streaming=True)
    except Exception as error:  # Whatever a hub, a script or a broken folder can raise.
        first = str(error).partition("\n")[0]
        raise UserError(
            f"text source {source.path!r}, split {source.split!r}, cannot be opened: {first}"
        ) from error
    column = source.turns or source.field
    if found.column_names is not None and column not in found.column_names:
        raise UserError(
            f"text source {source.path!r} has no column {column!r}; "
            f"choose one of {', '.join(found.column_names)}"
        )
    yield from found


def _fingerprint(config: TextConfig) -> str:
    """Names the plan: the configuration, and the state of every file it reads."""
    described = config.model_dump(mode="json", exclude={"output", "workers"})
    if config.dedup is not None:
        del described["dedup"]["memory_mb"]
    states = [
        system.ukey(file)
        for source in (*config.sources, *config.heldout)
        if source.format != "dataset" and not _is_dataset(source.path)
        for system, files in [_files(source)]
        for file in files
    ]
    return hashlib.sha256(json.dumps([described, states]).encode()).hexdigest()


# --- Cleaning -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cleaner:
    """Turns a document into a clean one, or says why not."""

    config: TextConfig
    heldout: Heldout | None = None
    judge: Judge | None = None

    def __call__(self, document: Document) -> tuple[Document | Removed, Counter[str]]:
        """The clean document or the reason it is none, and what was masked in it. Pure."""
        config, masked = self.config, Counter[str]()

        def removed(reason: str) -> tuple[Removed, Counter[str]]:
            return Removed(document.source, reason, document.text[:_EXAMPLE]), Counter()

        if config.language and language_of(document.text) != config.language:
            return removed("language")
        if config.personal != "keep":
            masking = functools.partial(_masked, masked=masked)
            document = _mapped(document, masking, "\n")
            if masked and config.personal == "drop":
                return removed("personal data")
        if config.rules is not None and (reason := fault(document.text, config.rules)):
            return removed(reason)
        if config.spoken:
            document = _mapped(document, spell_out, " ")
            if not tokenize(document.text):
                return removed("unspeakable")
        judge, quality = self.judge, config.quality
        if judge and quality and judge.score(document.text) < quality.threshold:
            return removed("quality")
        if self.heldout and self.heldout.overlap(document.text) > config.heldout_share:
            return removed("held out")
        return document, masked


def _masked(text: str, masked: Counter[str]) -> str:
    text, found = mask_personal(text)
    masked.update(found)
    return text


def _mapped(document: Document, function: Callable[[str], str], joint: str) -> Document:
    """A document with its text, or each of its turns, replaced; turns left empty go."""
    if not document.turns:
        return replace(document, text=function(document.text))
    turns = tuple(Turn(turn.speaker, function(turn.text)) for turn in document.turns)
    turns = tuple(turn for turn in turns if turn.text)
    return replace(document, text=joint.join(turn.text for turn in turns), turns=turns)


# --- Building -------------------------------------------------------------------------------------


@dataclass
class TextReport:
    """What a build read, kept, removed and masked."""

    read: Counter[str] = field(default_factory=Counter)
    """Documents of each source."""
    kept: Counter[str] = field(default_factory=Counter)
    """Likewise."""
    words: int = 0
    """Kept."""
    removed: dict[str, Counter[str]] = field(default_factory=dict)
    """Source → reason → documents."""
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    """Source → reason → the beginning of the first text removed."""
    masked: Counter[str] = field(default_factory=Counter)
    """Kind of personal data → places where it was replaced."""

    def remove(self, removed: Removed, count: int = 1) -> None:
        """Count a removal."""
        self.removed.setdefault(removed.source, Counter())[removed.reason] += count
        if removed.example:
            examples = self.examples.setdefault(removed.source, {})
            examples.setdefault(removed.reason, removed.example)

    def add(self, other: TextReport) -> None:
        """Count what another report counted; the earlier example stands."""
        self.read += other.read
        self.kept += other.kept
        self.words += other.words
        self.masked += other.masked
        for source, reasons in other.removed.items():
            examples = other.examples.get(source, {})
            for reason, count in reasons.items():
                self.remove(Removed(source, reason, examples.get(reason, "")), count)

    def as_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps(vars(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TextReport:
        """What ``as_json`` wrote."""
        stored = json.loads(text)
        return cls(
            read=Counter(stored["read"]),
            kept=Counter(stored["kept"]),
            words=stored["words"],
            removed={name: Counter(reasons) for name, reasons in stored["removed"].items()},
            examples=stored["examples"],
            masked=Counter(stored["masked"]),
        )

    def table(self) -> Table:
        """What was removed and why, source by source, most first."""
        total, kept = self.read.total(), self.kept.total()
        table = Table(title=f"{kept} of {total} documents kept, {self.words} words")
        table.add_column("source", overflow="fold")
        table.add_column("what became of it", no_wrap=True)
        table.add_column("documents", justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
        table.add_column("for example", max_width=40)
        for source, count in sorted(self.read.items()):
            rows = [("kept", self.kept[source], "")]
            examples = self.examples.get(source, {})
            rows += [
                (f"removed: {reason}", number, examples.get(reason, ""))
                for reason, number in self.removed.get(source, Counter()).most_common()
            ]
            for what, number, example in rows:
                # A text, not markup: an example may hold brackets.
                shown = example.replace("\n", " ").replace("[", "\\[")
                table.add_row(source, what, str(number), f"{number / count:.1%}", shown)
            table.add_section()
        for kind, count in sorted(self.masked.items()):
            table.add_row("", f"masked: {kind}", str(count), "", "")
        return table


@dataclass(frozen=True)
class _Work:
    """The files between the stages; each appears only when whole."""

    folder: Path

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.npy"

    @property
    def judge(self) -> Path:
        return self.folder / "judge.npz"

    @property
    def blocks(self) -> Path:
        """The number of blocks, once all are clean."""
        return self.folder / "blocks.json"

    @property
    def joined(self) -> Path:
        """The keys of all blocks."""
        return self.folder / "keys.npy"

    @property
    def verdicts(self) -> Path:
        return self.folder / "verdicts.npy"

    def text(self, block: int) -> Path:
        return self.folder / f"clean-{block:06d}.jsonl"

    def starts(self, block: int) -> Path:
        """Where each line of the text begins, int64 [n]."""
        return self.folder / f"clean-{block:06d}.starts.npy"

    def keys(self, block: int) -> Path:
        """Of its documents, uint64 [1 + B, n]."""
        return self.folder / f"clean-{block:06d}.keys.npy"

    def report(self, block: int) -> Path:
        """Written last: with it the block is done."""
        return self.folder / f"clean-{block:06d}.json"


def build_text(config: TextConfig) -> TextReport:
    """Write clean documents into ``config.output/text-*.jsonl``, and ``report.json``.

    Raises:
        UserError: a source is missing or broken, a package is not installed, the folder cannot be
            written or holds another build, or a worker died (start again: the build goes on).
    """
    done, work = config.output / "report.json", _Work(config.output / "work")
    try:
        _claim(config.output / "corpus.json", _fingerprint(config))
        if not done.exists():
            with Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"), TimeElapsedColumn(),
            ) as progress:  # fmt: skip
                _prepare(config, work)
                blocks = _clean(config, work, progress)
                _judge_duplicates(config, work, blocks, progress)
                report = _write(config, work, blocks, progress)
            with replacing(done) as temporary:
                temporary.write_text(report.as_json())
        if work.folder.exists():
            shutil.rmtree(work.folder)
    except OSError as error:
        raise UserError(
            f"output {str(config.output)!r}: {error.strerror or error}; "
            "start again to go on when this is put right"
        ) from error
    except BrokenProcessPool as error:
        raise UserError("a worker died (out of memory?); start again to go on") from error
    return TextReport.from_json(done.read_text())


def _claim(marker: Path, fingerprint: str) -> None:
    if not marker.exists():
        with replacing(marker) as temporary:
            temporary.write_text(json.dumps({"fingerprint": fingerprint}))
    elif json.loads(marker.read_text())["fingerprint"] != fingerprint:
        raise UserError(
            f"output {str(marker.parent)!r} holds another build (its configuration or its texts "
            "have changed); choose another folder or delete it"
        )


def _stream(sources: Iterable[CorpusSource], config: TextConfig) -> Iterator[Document | Removed]:
    for source in sources:
        yield from read(source, config.max_characters)


def _documents(sources: Iterable[CorpusSource], config: TextConfig) -> Iterator[Document]:
    return (made for made in _stream(sources, config) if isinstance(made, Document))


_ANY_LENGTH = 2**40


def _guarded(sources: Iterable[CorpusSource]) -> Iterator[Document]:
    """What is held out, whole: a text that the guard misses would be trained on."""
    for source in sources:
        for made in read(source, _ANY_LENGTH):
            if isinstance(made, Document):
                yield made
            elif made.reason != "empty":
                raise UserError(
                    f"heldout {str(source.path)!r}: {made.reason}; all of it must be readable."
                )


def _prepare(config: TextConfig, work: _Work) -> None:
    """What the workers need to know of the whole: held-out n-grams, the trained judge."""
    if config.heldout and not work.heldout.exists():
        texts = (document.text for document in _guarded(config.heldout))
        found = Heldout.of(map(spell_out, texts) if config.spoken else texts, config.heldout_words)
        _save(work.heldout, found.hashes)
    if config.quality is not None and not work.judge.exists():
        cleaner = Cleaner(config)
        cleaned = (cleaner(document)[0] for document in _documents(config.sources, config))
        good = (made.text for made in cleaned if isinstance(made, Document))
        judge = train_judge(itertools.islice(good, config.quality.examples), config.quality.seed)
        judge.save(work.judge)


@functools.lru_cache(maxsize=1)
def _cleaner(config: TextConfig, work: _Work) -> Cleaner:
    """A worker's own, loaded once."""
    return Cleaner(
        config,
        Heldout(np.load(work.heldout), config.heldout_words) if config.heldout else None,
        Judge.load(work.judge) if config.quality is not None else None,
    )


def _blocks(config: TextConfig) -> Iterator[list[Document | Removed]]:
    """Records in blocks of ``shard_characters``, the last shorter."""
    block: list[Document | Removed] = []
    size = 0
    for made in _stream(config.sources, config):
        block.append(made)
        size += _RECORD + (len(made.text) if isinstance(made, Document) else 0)
        if size >= config.shard_characters:
            yield block
            block, size = [], 0
    if block:
        yield block


def _clean(config: TextConfig, work: _Work, progress: Progress) -> int:
    """Clean every block that is not clean yet; how many there are."""
    if work.blocks.exists():
        return int(json.loads(work.blocks.read_text()))
    task = progress.add_task("cleaning", total=None, unit="documents")
    count = 0

    def todo() -> Iterator[tuple[int, list[Document | Removed]]]:
        nonlocal count
        for number, block in enumerate(_blocks(config)):
            count = number + 1
            if not work.report(number).exists():
                yield number, block
            progress.advance(task, len(block))

    make = functools.partial(_clean_block, config=config, work=work)
    for _ in _in_order(make, todo(), config.workers):
        pass
    with replacing(work.blocks) as temporary:
        temporary.write_text(json.dumps(count))
    return count


Item = TypeVar("Item")
Result = TypeVar("Result")


def _in_order(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Iterator[Result]:
    """``map`` over processes, with no more than two items a worker read ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    )
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _clean_block(
    item: tuple[int, Sequence[Document | Removed]], config: TextConfig, work: _Work
) -> None:
    number, block = item
    cleaner = _cleaner(config, work)
    report = TextReport()
    clean: list[Document] = []
    for record in block:
        report.read[record.source] += 1
        made, masked = cleaner(record) if isinstance(record, Document) else (record, Counter())
        report.masked += masked
        if isinstance(made, Removed):
            report.remove(made)
        else:
            clean.append(made)
    lines = [document.line().encode() for document in clean]
    with replacing(work.text(number)) as temporary:
        temporary.write_bytes(b"".join(lines))
    lengths = np.array([len(line) for line in lines], np.int64)
    _save(work.starts(number), np.cumsum(lengths) - lengths)
    if config.dedup is not None:
        _save(work.keys(number), sketch([document.text for document in clean], config.dedup))
    with replacing(work.report(number)) as temporary:
        temporary.write_text(report.as_json())


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as opened:
        np.save(opened, array)


@dataclass(frozen=True)
class _Texts:
    """The text of any clean document, by its number over all blocks."""

    work: _Work
    first: npt.NDArray[np.int64]
    """Number of the first document of each block, and behind the last the count of all."""

    def __call__(self, number: int) -> str:
        block = int(np.searchsorted(self.first, number, side="right")) - 1
        starts = np.load(self.work.starts(block), mmap_mode="r")
        with self.work.text(block).open("rb") as lines:
            lines.seek(int(starts[number - self.first[block]]))
            text: str = json.loads(lines.readline())["text"]
        return text


def _judge_duplicates(config: TextConfig, work: _Work, blocks: int, progress: Progress) -> None:
    """Write the verdict on every clean document."""
    if config.dedup is None or work.verdicts.exists():
        return
    counts = [np.load(work.starts(b), mmap_mode="r").shape[0] for b in range(blocks)]
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if first[-1] == 0:
        _save(work.verdicts, np.zeros(0, np.uint8))
        return
    task = progress.add_task("duplicates", total=key_rows(config.dedup), unit="rows of keys")
    with replacing(work.joined) as temporary:
        # One file for all blocks, row behind row: each is then read from end to end.
        shape = key_rows(config.dedup), int(first[-1])
        joined = np.lib.format.open_memmap(temporary, "w+", np.uint64, shape)
        for block in range(blocks):
            joined[:, first[block] : first[block + 1]] = np.load(work.keys(block))
        joined.flush()
    keys = np.load(work.joined, mmap_mode="r")
    advance = functools.partial(progress.advance, task)
    _save(work.verdicts, duplicates(keys, _Texts(work, first), config.dedup, advance))


def _write(config: TextConfig, work: _Work, blocks: int, progress: Progress) -> TextReport:
    """The shards: what is clean and no duplicate, block by block."""
    verdicts = np.load(work.verdicts) if config.dedup is not None else None
    names = {EXACT: "exact duplicate", NEAR: "near duplicate"}
    report = TextReport()
    number = 0
    task = progress.add_task("writing", total=blocks, unit="shards")
    for block in range(blocks):
        report.add(TextReport.from_json(work.report(block).read_text()))
        with (
            replacing(config.output / f"text-{block:06d}.jsonl") as temporary,
            temporary.open("wb") as shard,
            work.text(block).open("rb") as lines,
        ):
            for line in lines:
                record = json.loads(line)
                verdict = KEPT if verdicts is None else int(verdicts[number])
                if verdict == KEPT:
                    shard.write(line)
                    report.kept[record["source"]] += 1
                    report.words += len(record["text"].split())
                else:
                    example = record["text"][:_EXAMPLE]
                    report.remove(Removed(record["source"], names[verdict], example))
                number += 1
        progress.advance(task)
    return report
