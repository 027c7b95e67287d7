"""Shards of interleaved documents: text of which parts are spoken by a text-to-token model.

A document is laid out first (``synth_data.interleave``), then all that is to be spoken in a shard
is said at once, whatever document it belongs to: a thousand short lines of about the same length
fill the batches of the model, which is what makes it fast.

    corpus ─ documents ─ layout ─┬─ text segments ───────────────────────────────┬─ samples
                                 └─ speech segments ─ lines ─ codes ─ (verified) ─┘

A sample's ``codes`` are those of its speech segments one after the other; ``meta`` holds the
segments in order (``synth_data.interleave.WrittenSegment``) and the rule of its layout. A document
of which a line could not be said is dropped and counted.

    speechlm synth interleave configs/synth/interleave.yaml workers=2

Texts are read where they lie: a plan holds a place in a file for every shard, never the text.
"""

import functools
import hashlib
import itertools
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, NamedTuple, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from audio_codec import checkpoint
from audio_codec.codec import load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.precision import Precision, settle
from synth_data import quiz
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.corpus import bounded_lines, is_binary
from synth_data.interleave import (
    QUESTION_RULES,
    SPAN_RULES,
    InterleaveConfig,
    Layout,
    QuestionRule,
    Rule,
    Segment,
    WrittenSegment,
    choose,
    continuation,
    interleave,
    question_answer,
    repetition,
)
from synth_data.mixture import GuardConfig, Shares
from synth_data.shards import Folder, Sample
from synth_data.text import Token, spell_out, tokenize
from synth_data.text_to_token import (
    GenerationConfig,
    Line,
    generate,
    kept_model,
    kept_tokenizer,
    load_text_to_token,
    transcribe,
)
from synth_data.verify import WordErrors, word_errors

# A line of a file beyond this is no document: what is read at a time stays bounded.
_LONGEST_LINE = 2**20
_PLAIN_RULES: tuple[Rule, ...] = (*SPAN_RULES, "asr", "tts", "continuation")


class DocumentsSource(BaseModel):
    """JSON, an object a line: what ``speechlm synth text`` wrote, or a file of that kind.

    An object has a ``text``, or a ``question`` and an ``answer``; its own ``source`` and
    ``licence``, where it has them, go before the ones here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["documents"]
    path: Path
    """A ``.jsonl`` or ``.jsonl.xz`` file, or a folder of ``synth text``."""
    licence: str
    human: bool = True
    """Whether people wrote it; false for what a language model wrote."""


class SentencesSource(BaseModel):
    """A plain text file, one sentence a line; neighbours make a document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text"]
    path: Path
    """A ``.txt`` or ``.txt.xz`` file."""
    licence: str
    human: bool = True
    """Whether people wrote it."""
    lines: int = Field(default=8, gt=0)
    """Sentences a document."""


class QuestionsSource(BaseModel):
    """Questions and answers of the built-in quiz world."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quiz"]
    documents: int = Field(gt=0)
    split: Literal["train", "heldout"] = "train"
    categories: quiz.CategoryWeights | None = None
    """Weights of the quiz categories; None weighs all alike."""


Source = Annotated[DocumentsSource | SentencesSource | QuestionsSource, Field(discriminator="kind")]


class CheckConfig(BaseModel):
    """Read every line back off its codes, with the tokenizer's own CTC head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: str
    """Checkpoint of the tokenizer whose codes the model speaks, or of a codec around it."""
    drop_above: float = Field(gt=0)
    """Documents with a larger word error rate are dropped; the others carry theirs."""


class InterleaveRecipe(BaseModel):
    """Shards of interleaved documents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Folder
    """Folder of the shards, or its URL in a store (``s3://…``)."""
    model: str
    """Checkpoint of the text-to-token model."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Each is used once from end to end."""
    spans: InterleaveConfig = InterleaveConfig()
    """How documents with spans are laid out."""
    mixture: dict[Rule, float] = Field(
        default={
            "speech_first": 1.0,
            "text_first": 1.0,
            "asr": 0.1,
            "tts": 0.1,
            "continuation": 0.3,
            "question_speech_answer_text": 1.0,
            "question_text_answer_speech": 1.0,
            "question_speech_answer_speech": 1.0,
        }
    )
    """How often each rule is taken, beside the others that fit a document."""
    max_words: int = Field(default=150, gt=0)
    """Longer documents are cut at the ends of sentences."""
    line_words: int = Field(default=20, gt=0)
    """More words are never said at once."""
    pace: tuple[float, float] = (0.9, 1.1)
    """How many times as long as expected a document's speech takes: uniform."""
    generation: GenerationConfig = GenerationConfig()
    check: CheckConfig | None = None
    guard: GuardConfig = GuardConfig()
    """The least that people must have made of it; its speech never is."""
    precision: Precision = "auto"
    """Of the products of the model's transformer; `auto`: bf16 where `device` has units for it."""
    device: str = "cpu"
    """Where the model runs."""
    seed: int = Field(default=0, ge=0)
    shard_size: int = Field(default=1000, gt=0)
    """Documents a shard, before cutting and dropping."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""
    ray: str | None = None
    """Address of a Ray cluster that makes the shards in their place; ``auto`` finds one."""

    @field_validator("mixture")
    @classmethod
    def _weights(cls, mixture: dict[Rule, float]) -> dict[Rule, float]:
        if min(mixture.values(), default=0.0) < 0 or not any(mixture.values()):
            raise ValueError("weights must be positive or 0, and one of them positive")
        return mixture


@dataclass(frozen=True)
class Part:
    """The documents of one shard: where they lie."""

    source: int
    file: int
    """Which of the source's."""
    first: int
    """Number of the first document in its source."""
    offset: int
    """Where it begins in the (uncompressed) file, in bytes."""
    count: int


def build_interleaved(config: InterleaveRecipe) -> BuildReport:
    """Write interleaved documents into ``config.output/interleave-*.tar``.

    Raises:
        UserError: a source or model is missing or cannot be read, the folder holds another build,
            or too little of it is what people made.
    """
    config = config.model_copy(update={"precision": settle(config.precision, config.device)})
    human = any(getattr(source, "human", False) for source in config.sources)
    config.guard.check(Shares(0.0, float(human)), "the planned documents")
    load_text_to_token(config.model)  # A broken one shows here, before hours of work.
    weights = [checkpoint.digest(config.model)]
    if config.check is not None:
        load_tokenizer_of(config.check.tokenizer)
        weights.append(checkpoint.digest(config.check.tokenizer))
    parts, contents = plan(config)
    described = config.model_dump_json(exclude={"workers", "output", "ray", "guard"})
    fingerprint = hashlib.sha256(repr((described, weights, contents)).encode()).hexdigest()
    make = functools.partial(_interleaved, config=config)
    return run_shards(
        config.output,
        "interleave",
        parts,
        make,
        workers=config.workers,
        fingerprint=fingerprint,
        ray=config.ray,
        guard=config.guard,
        source=_texts(parts, config),
    )


# --- Documents ------------------------------------------------------------------------------------


def plan(config: InterleaveRecipe) -> tuple[list[Part], list[str]]:
    """Where the documents of every shard lie, and a digest of every file, read once through.

    Raises UserError for a file that is missing, of another kind, broken, or without a document.
    """
    parts: list[Part] = []
    contents: list[str] = []
    for number, source in enumerate(config.sources):
        if isinstance(source, QuestionsSource):
            firsts = range(0, source.documents, config.shard_size)
            parts += [
                Part(number, 0, first, 0, min(config.shard_size, source.documents - first))
                for first in firsts
            ]
            continue
        group = source.lines if isinstance(source, SentencesSource) else 1
        first = 0
        for which, path in enumerate(_files(source)):
            digest, offsets, lines = hashlib.sha256(), list[int](), 0
            with _opened(path) as file:
                for offset, line in _lines(file):
                    if lines % (group * config.shard_size) == 0:
                        offsets.append(offset)
                    digest.update(line or b"\0")
                    lines += 1
            documents = -(-lines // group)
            for done, offset in zip(itertools.count(step=config.shard_size), offsets):
                count = min(config.shard_size, documents - done)
                parts.append(Part(number, which, first + done, offset, count))
            first += documents
            contents.append(digest.hexdigest())
        if first == 0:
            raise UserError(f"source {str(source.path)!r} holds no document")
    return parts, contents


def _files(source: DocumentsSource | SentencesSource) -> list[Path]:
    """Raises UserError when there is none of the right kind."""
    path, kind = source.path, ".txt" if source.kind == "text" else ".jsonl"
    if path.is_dir() and source.kind == "documents":
        if found := sorted(path.glob("text-*.jsonl")):
            return found
        raise UserError(f"source {str(path)!r} holds no text-*.jsonl of speechlm synth text")
    if not path.is_file():
        raise UserError(f"source {str(path)!r} is not a file")
    if not path.name.endswith((kind, kind + ".xz")):
        raise UserError(f"source {str(path)!r} must end in {kind} or {kind}.xz")
    return [path]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"source {str(path)!r} cannot be read: {error}") from error


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not empty, each with where it begins; None for one longer than a document."""
    offset = file.tell()
    for line in bounded_lines(file, _LONGEST_LINE):
        if line is None or line.strip():
            yield offset, line
        offset = file.tell()


class Document(NamedTuple):
    """One or two utterances in spoken form: a text, or a question and its answer."""

    id: str
    utterances: tuple[str, ...]
    source: str
    licence: str
    human: bool


def documents(part: Part, config: InterleaveRecipe) -> Iterator[Document | Dropped]:
    """The documents of a part, in order."""
    source = config.sources[part.source]
    names = (
        f"i{config.seed}-{part.source}-{number:08d}"
        for number in range(part.first, part.first + part.count)
    )
    if isinstance(source, QuestionsSource):
        for name, number in zip(names, itertools.count(part.first)):
            rng = np.random.default_rng([config.seed, part.source, number, 1])
            category = quiz.draw_category(rng, source.categories)
            drawn = quiz.draw(rng, source.split, category)
            said = (spell_out(drawn.text), spell_out(drawn.answer))
            yield Document(name, said, "quiz", "Apache-2.0", human=False)
        return
    with _opened(_files(source)[part.file]) as file:
        file.seek(part.offset)
        lines = (line for _, line in _lines(file))
        for name in names:
            if isinstance(source, SentencesSource):
                yield _joined(name, list(itertools.islice(lines, source.lines)), source)
            else:
                yield _parsed(name, next(lines), source)


def _joined(
    name: str, lines: Sequence[bytes | None], source: SentencesSource
) -> Document | Dropped:
    try:
        sentences = [line.decode().strip() for line in lines if line is not None]
    except UnicodeDecodeError as error:
        return Dropped(name, f"not UTF-8 text: {error}")
    text = " ".join(sentences)
    if is_binary(text):
        return Dropped(name, "binary")
    return Document(name, (spell_out(text),), source.path.name, source.licence, source.human)


def _parsed(name: str, line: bytes | None, source: DocumentsSource) -> Document | Dropped:
    if line is None:
        return Dropped(name, f"its line is longer than {_LONGEST_LINE} bytes")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Dropped(name, f"no JSON: {error}")
    keys = ("question", "answer") if isinstance(found, dict) and "question" in found else ("text",)
    texts = [found.get(key) for key in keys] if isinstance(found, dict) else []
    said = [text for text in texts if isinstance(text, str)]
    if len(said) < len(keys):
        return Dropped(name, "neither a text nor a question and an answer in it")
    if any(map(is_binary, said)):
        return Dropped(name, "binary")
    return Document(
        name,
        tuple(map(spell_out, said)),
        str(found.get("source", source.path.name)),
        str(found.get("licence", source.licence)),
        source.human,
    )


def _texts(parts: Iterable[Part], config: InterleaveRecipe) -> Iterator[str]:
    """What all documents say, in order."""
    for part in parts:
        for document in documents(part, config):
            if isinstance(document, Document):
                yield from document.utterances


def sentence_ends(text: str, tokens: Sequence[Token]) -> list[int]:
    """How many words have been said at the end of each sentence; the last is ``len(tokens)``."""
    ends = [
        number
        for number, token in enumerate(tokens, start=1)
        if text[token.start : token.end].endswith((".", "?", "!"))
    ]
    return ends if ends and ends[-1] == len(tokens) else [*ends, len(tokens)]


def cut(ends: Sequence[int], longest: int) -> list[int]:
    """Where to cut a text so that no piece has more than ``longest`` words: at ends of sentences.

    A sentence that is longer is cut into even parts. ``ends``: as of ``sentence_ends``.
    """
    cuts = [0]
    for before, end in itertools.pairwise([0, *ends]):
        if end - cuts[-1] <= longest:
            continue
        if before > cuts[-1]:
            cuts.append(before)
        if (words := end - before) > longest:
            count = -(-words // longest)
            cuts += [before + round(words * part / count) for part in range(1, count)]
    return [*cuts[1:], ends[-1]]


# --- Layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Laid:
    """A document with its layout, and the lines that its speech segments are said in."""

    id: str
    document: Document
    tokens: tuple[tuple[Token, ...], ...]
    """Words of each utterance."""
    layout: Layout
    lines: tuple[tuple[Line, ...], ...]
    """Of each segment; none for text."""

    def text(self, segment: Segment) -> str:
        """What a segment says."""
        tokens, spoken = self.tokens[segment.utterance], self.document.utterances[segment.utterance]
        return spoken[tokens[segment.start].start : tokens[segment.end - 1].end]


def lay_out(document: Document, number: int, config: InterleaveRecipe) -> list[_Laid | Dropped]:
    """Choose rules and spans for a document, or for each piece of one that is too long."""
    tokens = [tokenize(text) for text in document.utterances]
    if not all(tokens):
        return [Dropped(document.id, "it has no word to say")]
    rng = np.random.default_rng([config.seed, number])
    if len(tokens) == 2:
        rule = choose(rng, config.mixture, QUESTION_RULES)
        if rule is None:
            return [Dropped(document.id, "the mixture has no rule for questions")]
        layout = question_answer(len(tokens[0]), len(tokens[1]), cast(QuestionRule, rule))
        return [_with_lines(document.id, document, tokens, layout, rng, config)]
    (said,) = tokens
    ends = sentence_ends(document.utterances[0], said)
    laid: list[_Laid | Dropped] = []
    for piece, (first, last) in enumerate(itertools.pairwise([0, *cut(ends, config.max_words)])):
        words = said[first:last]
        inside = [end - first for end in ends if first < end < last] + [last - first]
        name = f"{document.id}-{piece:02d}"
        rule = choose(rng, config.mixture, _PLAIN_RULES)
        if rule is None:
            laid.append(Dropped(name, "the mixture has no rule for plain text"))
            continue
        layout = _layout(rng, rule, inside, config.spans)
        laid.append(_with_lines(name, document, [words], layout, rng, config))
    return laid


def _layout(
    rng: np.random.Generator, rule: Rule, ends: Sequence[int], spans: InterleaveConfig
) -> Layout:
    words = ends[-1]
    if rule == "asr" or rule == "tts":
        return repetition(words, rule)
    if rule == "continuation" and words > 1:
        return continuation(rng, words)
    return interleave(rng, words, spans, ends, first="speech" if rule == "speech_first" else "text")


def _with_lines(
    name: str,
    document: Document,
    tokens: Sequence[Sequence[Token]],
    layout: Layout,
    rng: np.random.Generator,
    config: InterleaveRecipe,
) -> _Laid:
    pace = float(rng.uniform(*config.pace))
    lines: list[tuple[Line, ...]] = []
    for segment in layout.segments:
        if segment.modality == "text":
            lines.append(())
            continue
        spoken = document.utterances[segment.utterance]
        words = tokens[segment.utterance][segment.start : segment.end]
        cuts = cut(sentence_ends(spoken, words), config.line_words)
        lines.append(
            tuple(
                Line(
                    spoken[words[first].start : words[last - 1].end],
                    int(rng.integers(2**62)),
                    pace,
                )
                for first, last in itertools.pairwise([0, *cuts])
            )
        )
    whole = tuple(tuple(said) for said in tokens)
    return _Laid(name, document, whole, layout, tuple(lines))


# --- Speech ---------------------------------------------------------------------------------------


def _interleaved(part: Part, config: InterleaveRecipe) -> Iterator[Sample | Dropped]:
    """The samples of one shard."""
    laid: list[_Laid] = []
    for number, document in enumerate(documents(part, config), start=part.first):
        if isinstance(document, Dropped):
            yield document
            continue
        # Numbers of different sources differ in their upper half.
        for made in lay_out(document, (part.source << 40) + number, config):
            if isinstance(made, Dropped):
                yield made
            else:
                laid.append(made)
    model = kept_model(config.model, config.precision, config.device)
    lines = [line for made in laid for segment in made.lines for line in segment]
    spoken = generate(model, lines, config.generation)
    heard: Sequence[str | None] = [None] * len(lines)
    if config.check is not None:
        tokenizer = kept_tokenizer(config.check.tokenizer, config.device)
        heard = transcribe(tokenizer, [said.codes for said in spoken], 64, config.precision)
    said = iter(zip(lines, spoken, heard, strict=True))
    spans = config.spans.model_dump()
    for made in laid:
        segments: list[WrittenSegment] = []
        codes: list[np.typing.NDArray[np.uint16]] = []
        errors: list[WordErrors] = []
        faults: list[str] = []
        frames = 0
        for segment, parts in zip(made.layout.segments, made.lines, strict=True):
            first = frames
            for line, speech, text in itertools.islice(said, len(parts)):
                codes.append(speech.codes)
                frames += len(speech.codes)
                if speech.fault is not None:
                    faults.append(f"{speech.fault}: {line.text!r}")
                if text is not None:
                    errors.append(word_errors(line.text, text))
            written = WrittenSegment(
                modality=segment.modality,
                text=made.text(segment),
                utterance=segment.utterance,
                first=first,
                last=frames,
            )
            segments.append(written)
        if faults:
            yield Dropped(made.id, f"could not be said ({'; '.join(faults)})")
            continue
        wer = sum(errors[1:], errors[0]).rate if errors else None
        if config.check is not None and wer is not None and wer > config.check.drop_above:
            yield Dropped(made.id, f"word error rate {wer:.2f}")
            continue
        row = np.concatenate(codes) if codes else np.zeros(0, np.uint16)
        yield Sample(
            id=made.id,
            text=" ".join(segment.text for segment in _once(segments, made.layout.rule)),
            words=((),),
            voices=("text-to-token",),
            source=made.document.source,
            licence=made.document.licence,
            synthetic=True,
            human_text=made.document.human,
            seconds=len(row) / model.config.rate,
            wer=wer,
            meta={
                "rule": made.layout.rule,
                "model": config.model,
                **({"spans": spans} if made.layout.rule in SPAN_RULES else {}),
                "segments": [segment.model_dump() for segment in segments],
            },
            codes=row[None, None],
            coded_by=model.config.coded_by,
        )


def _once(segments: Sequence[WrittenSegment], rule: Rule) -> Sequence[WrittenSegment]:
    """The segments that say every word once."""
    return segments[:1] if rule in ("asr", "tts") else segments
