"""Corpora in every form become one stream; the build is exact, whole, resumable and says why."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kills import Killed

from audio_codec.errors import UserError
from synth_data import corpus, quiz
from synth_data.corpus import (
    Cleaner,
    CorpusSource,
    Document,
    Removed,
    TextConfig,
    TextReport,
    Turn,
    build_text,
    read,
)
from synth_data.dedup import DedupConfig
from synth_data.quality import QualityConfig
from synth_data.text import sentences_from

SENTENCES = [
    "The lighthouse stood on the cliff above the old town.",
    "Nobody had seen the keeper since the storm of 1984.",
    "Dr. Lee paid $3.50 for the map & left.",
]


def source(path: Path | str, **fields: Any) -> CorpusSource:
    return CorpusSource(path=str(path), licence="CC0-1.0", **fields)


def texts(path: Path | str, **fields: Any) -> list[str]:
    """Texts of the documents of a source, in which nothing may be removed."""
    found = list(read(source(path, **fields)))
    assert not [made for made in found if isinstance(made, Removed)]
    return [made.text for made in found if isinstance(made, Document)]


def reasons(path: Path, **fields: Any) -> list[str | None]:
    return [
        made.reason if isinstance(made, Removed) else None for made in read(source(path, **fields))
    ]


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_plain_text_and_json_lines(tmp_path: Path, suffix: str, pack: Any) -> None:
    plain = tmp_path / f"a.txt{suffix}"
    plain.write_bytes(pack("\n\n".join(SENTENCES).encode()))
    assert texts(plain) == SENTENCES
    records = tmp_path / f"b.jsonl{suffix}"
    records.write_bytes(pack(b"".join(json.dumps({"body": s}).encode() + b"\n" for s in SENTENCES)))
    assert texts(records, field="body") == SENTENCES
    assert texts(tmp_path / f"*.txt{suffix}", limit=2) == SENTENCES[:2]


def test_units_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One\ntwo\n\n\nthree\n")
    assert texts(path) == ["One", "two", "three"]
    assert texts(path, unit="paragraph") == ["One\ntwo", "three"]
    assert texts(path, unit="file") == ["One\ntwo\n\n\nthree"]


@given(st.lists(st.sampled_from([b"ab\n", b"abcdef\n", b"\n", b"abcdefghijkl\n", b"abc"])))
def test_long_lines_are_passed_over_unread(lines: list[bytes]) -> None:
    data = b"".join(lines)
    expected = [
        line if len(line.removesuffix(b"\n")) <= 5 else None for line in data.splitlines(True)
    ]
    assert list(corpus.bounded_lines(io.BytesIO(data), 5)) == expected


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b.txt", "two words"), ("a.jsonl", '{"text": "one word"}'), ("c.png", "x")):
        (tmp_path / name).write_text(text)
    assert texts(tmp_path) == ["one word", "two words"]


def test_dialogues_in_their_public_forms(tmp_path: Path) -> None:
    expected = (Turn("ann", "Hello there."), Turn("bob", "Hi!"))
    records: list[Any] = [
        {"turns": [{"speaker": "ann", "text": "Hello there."}, {"speaker": "bob", "text": "Hi!"}]},
        {"turns": [{"role": "ann", "content": "Hello there."}, {"role": "bob", "content": "Hi!"}]},
        {"turns": [{"from": "ann", "value": "Hello there."}, {"from": "bob", "value": "Hi!"}]},
        [["ann", "Hello there."], ["bob", "Hi!"]],
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    plain = tmp_path / "b.txt"
    plain.write_text("ann: Hello there.\nbob: Hi!\n")
    found = [*read(source(path, turns="turns")), *read(source(plain, unit="dialogue"))]
    assert [made.turns for made in found if isinstance(made, Document)] == [expected] * 5
    assert {made.text for made in found if isinstance(made, Document)} == {"Hello there.\nHi!"}
    path.write_text('["Hello there.", "Hi!", "Bye."]\n{"turns": [7]}\n{"turns": [["a"]]}\n')
    first, *broken = read(source(path, turns="turns"))
    assert isinstance(first, Document) and [turn.speaker for turn in first.turns] == ["a", "b", "a"]
    assert [made.reason for made in broken if isinstance(made, Removed)] == ["no text"] * 2


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": SENTENCES, "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet") == SENTENCES
    with pytest.raises(UserError, match="no column 'body'; choose one of text, other"):
        texts(tmp_path / "a.parquet", field="body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.parquet"):
        texts(tmp_path / "b.parquet")


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"text": SENTENCES})
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": whole}).save_to_disk(str(tmp_path / "dict"))
    assert texts(tmp_path / "one") == SENTENCES
    assert texts(tmp_path / "dict", split="test") == SENTENCES
    with pytest.raises(UserError, match="split 'train'"):
        texts(tmp_path / "dict")
    with pytest.raises(UserError, match="no column 'body'; choose one of text"):
        texts(tmp_path / "one", field="body")


@pytest.mark.parametrize("package", ["pyarrow.parquet", "datasets"])
def test_a_missing_package_is_named(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    form = "parquet" if package == "pyarrow.parquet" else "dataset"
    with pytest.raises(UserError, match=f"pip install {package.split('.')[0]}"):
        list(read(source(tmp_path / "a.parquet", format=form)))


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text " * 9000)[:-30])
    (tmp_path / "c.txt.xz").write_bytes(b"not xz")
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "b.txt.gz", "c.txt.xz", "empty", "missing.txt"):
        with pytest.raises(UserError, match=name):
            list(read(source(tmp_path / name)))
    with pytest.raises(UserError, match="nosuch"):
        list(read(source("nosuch://bucket/a.txt")))


def test_hostile_records_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "Good morning, good people."}',
        b'{"text": "half of a charac\\ud83d"}',
        b'{"text": "a \\u0000 in it"}',
        b'{"text": "\xff\xfe"}',
        b'{"text": ""}',
        b'{"text": 7}',
        b'{"other": "x"}',
        b"[1, 2]",
        b"7",
        b'{"text": "cut',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 10_000_000 + b'"}',
        b'{"text": "' + b"word " * 25_000 + b'"}',
        b'{"text": "Good night, good people."}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert reasons(path) == [
        None, "binary", "binary", "binary", "empty", "no text", "no text", "no text", "no text",
        "malformed", "malformed", "too long", "too long", None,
    ]  # fmt: skip
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"Fine text.\n" + bytes(range(256)) + b"\n" + b"y" * 10_000_000 + b"\nEnd.")
    # The bytes hold one line feed.
    assert reasons(plain) == [None, "binary", "binary", "too long", None]
    assert reasons(plain, unit="file") == ["too long"]
    plain.write_text("no colon here")
    assert reasons(plain, unit="dialogue") == ["malformed"]


# --- Cleaning -------------------------------------------------------------------------------------


def clean(text: str, turns: tuple[Turn, ...] = (), **fields: Any) -> Document | Removed:
    config = TextConfig(output=Path("out"), sources=(source("a.txt"),), **fields)
    return Cleaner(config)(Document("a-0", text, "a", "CC0-1.0", turns))[0]


def test_a_document_comes_out_in_its_spoken_form() -> None:
    made = clean("Dr. Lee paid $3.50 to ann@example.org & left.")
    assert isinstance(made, Document)
    assert made.text == ("doctor Lee paid three dollars and fifty cents to email address and left.")
    raw = clean("Dr. Lee paid $3.50 & left.", spoken=False)
    assert isinstance(raw, Document) and raw.text == "Dr. Lee paid $3.50 & left."


def test_turns_are_cleaned_one_by_one() -> None:
    turns = (Turn("a", "Is it 5 km?"), Turn("b", "…"), Turn("b", "Yes, it is."))
    made = clean("\n".join(turn.text for turn in turns), turns)
    assert isinstance(made, Document)
    assert made.turns == (Turn("a", "Is it five kilometers?"), Turn("b", "Yes, it is."))
    assert made.text == "Is it five kilometers? Yes, it is."


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ("Der Leuchtturm stand am Rande der Klippe.", {"language": "en"}, "language"),
        ("Write to ann@example.org about it.", {"personal": "drop"}, "personal data"),
        ("Yes.", {}, "too short"),
        ("...", {"rules": None}, "unspeakable"),
    ],
)
def test_a_removal_has_its_reason(text: str, fields: dict[str, Any], reason: str) -> None:
    if "language" in fields:
        pytest.importorskip("py3langid")
    made = clean(text, **fields)
    assert isinstance(made, Removed) and made.reason == reason
    assert "@" not in made.example


# --- Building -------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    """Three sources with a bit of everything, in about ten blocks."""
    sentences = quiz.sentences("train", 300, 0)
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join([*sentences, sentences[0].upper(), "x", "mail a@b.org about it"]))
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("\n".join(sentences[5:8]))
    story = "the old lighthouse keeper walked along the cliff with a lantern every autumn night "
    records = [{"text": story * 1 + f"and then came home {tail}"} for tail in ("alone", "late")]
    records += [{"body": "nothing"}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "talk.txt").write_text("ann: How far is it?\nbob: About 5 km, I think.\n")
    return TextConfig(
        output=tmp_path / "out",
        sources=(
            source(plain),
            source(tmp_path / "records.jsonl"),
            source(tmp_path / "talk.txt", unit="dialogue"),
        ),
        heldout=(source(heldout),),
        heldout_words=3,
        dedup=DedupConfig(threshold=0.7),
        shard_characters=5000,
    )


def sentences_of(config: TextConfig) -> list[str]:
    return Path(config.sources[0].path).read_text().splitlines()


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_build_keeps_what_is_good_and_says_why_not(config: TextConfig) -> None:
    report = build_text(config)
    records = [json.loads(line) for path in sorted(config.output.glob("*.jsonl"))
               for line in path.read_text().splitlines()]  # fmt: skip
    kept = Counter(record["source"] for record in records)
    assert report.kept == kept and report.words == sum(len(r["text"].split()) for r in records)
    for label, total in report.read.items():
        assert total == kept[label] + sum(report.removed.get(label, Counter()).values())
    plain, other = report.removed["plain.txt"], report.removed["records.jsonl"]
    assert plain["exact duplicate"] >= 1 and plain["too short"] >= 1 and plain["held out"] >= 3
    assert other == {"near duplicate": 1, "no text": 1}
    assert report.masked == {"e-mail": 1}
    assert report.examples["plain.txt"]["held out"] in sentences_of(config)[:10]
    assert records[-1]["turns"][1] == {"speaker": "bob", "text": "About five kilometers, I think."}
    assert len({record["id"] for record in records}) == len(records)
    assert not (config.output / "work").exists()
    # What was written reads back, here and as sentences for a voice.
    (again,) = [made for made in read(source(config.output / "text-0*.jsonl", turns="turns"))
                if isinstance(made, Document) and made.turns]  # fmt: skip
    assert again.turns[0] == Turn("ann", "How far is it?")
    assert next(sentences_from(config.output)) == records[0]["text"]


@pytest.mark.parametrize(
    ("record", "reason"), [({"question": "How far is it?"}, "no text"), ({"text": "\0"}, "binary")]
)
def test_what_is_held_out_must_be_readable(
    config: TextConfig, tmp_path: Path, record: dict[str, str], reason: str
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"heldout '.*held.jsonl': {reason}"):
        build_text(config.model_copy(update={"heldout": (source(held),)}))


def test_a_long_text_is_held_out_whole(config: TextConfig, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("\n".join(sentences_of(config)[:60]))
    changes = {"heldout": (source(held, unit="file"),), "max_characters": 200}
    report = build_text(config.model_copy(update=changes))
    assert report.removed["plain.txt"]["held out"] >= 60


def test_the_bytes_do_not_depend_on_the_workers(config: TextConfig, tmp_path: Path) -> None:
    one = build_text(config)
    two = build_text(config.model_copy(update={"output": tmp_path / "two", "workers": 2}))
    assert shards(config.output) == shards(tmp_path / "two")
    assert one == two and len(shards(config.output)) > 5


def test_a_killed_build_goes_on_behind_what_is_whole(
    config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at every file that a build writes, one after the other; the end is always the same."""
    build_text(config)
    broken = config.model_copy(update={"output": tmp_path / "broken"})

    whole = corpus.replacing
    written: list[str] = []

    def replacing(path: Path) -> Any:
        if path.name not in written:
            written.append(path.name)
            # What a killed process leaves beside the place of its file.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.12345678.tmp").write_bytes(b"half")
            raise Killed
        return whole(path)

    monkeypatch.setattr(corpus, "replacing", replacing)
    for attempt in range(200):
        try:
            report = build_text(broken)
            break
        except Killed:
            assert not (broken.output / "report.json").exists(), attempt
    assert attempt >= 30
    made = {name: data for name, data in shards(broken.output).items() if name[0] != "."}
    assert made == shards(config.output)
    assert report == build_text(config)


def test_a_finished_build_is_not_read_again(config: TextConfig) -> None:
    report = build_text(config)
    before = {path: path.stat().st_mtime_ns for path in config.output.iterdir()}
    assert build_text(config) == report
    assert {path: path.stat().st_mtime_ns for path in config.output.iterdir()} == before


def test_another_plan_is_refused(config: TextConfig) -> None:
    build_text(config)
    with pytest.raises(UserError, match="holds another build"):
        build_text(config.model_copy(update={"personal": "keep"}))
    Path(config.sources[0].path).write_text("Another text altogether.")
    with pytest.raises(UserError, match="holds another build"):
        build_text(config)


def test_the_judge_removes_word_salad(tmp_path: Path) -> None:
    good = quiz.sentences("train", 800, 0)
    path = tmp_path / "a.txt"
    path.write_text("\n".join([*good, "fcna lpiaact tsi hwat eht fo si, rfo ouy ytcraenl"]))
    config = TextConfig(
        output=tmp_path / "out", sources=(source(path),), dedup=None,
        quality=QualityConfig(examples=500),
    )  # fmt: skip
    report = build_text(config)
    assert report.removed["a.txt"]["quality"] >= 1
    assert report.kept["a.txt"] > 0.9 * len(good)
    assert "fcna" not in "".join(sentences_from(config.output))


def test_empty_corpora_build(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    (tmp_path / "b.txt").write_text("?!\n")
    sources = (source(tmp_path / "a.txt"), source(tmp_path / "b.txt"))
    report = build_text(TextConfig(output=tmp_path / "out", sources=sources))
    assert report.kept.total() == 0 and report.removed == {"b.txt": {"too short": 1}}


def test_an_unwritable_folder_is_named(config: TextConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        build_text(config.model_copy(update={"output": tmp_path / "file" / "out"}))


def test_a_full_disk_is_one_sentence(config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus.np, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        build_text(config)
    monkeypatch.undo()
    assert build_text(config).kept.total() > 0


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"called 'a\.txt'"):
        TextConfig(output=Path("o"), sources=(source("x/a.txt"), source("y/a.txt")))


def test_a_report_reads_back_and_draws_its_table() -> None:
    report = TextReport(read=Counter(a=3), kept=Counter(a=1), words=5, masked=Counter(phone=2))
    report.remove(Removed("a", "too short", "[x]"), 2)
    assert TextReport.from_json(report.as_json()) == report
    table = report.table()
    assert table.row_count == 3 and "1 of 3 documents" in str(table.title)
