"""The front door answers at once, hands over to one room, and complains in one sentence."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from pydantic import BaseModel
from small import small_codec

from audio_codec import audio
from audio_codec.bench import Figure
from audio_codec.errors import UserError
from speechlm import cli
from speechlm.evaluation.report import Metric, Paragraph
from synth_data.build import BuildReport, Dropped

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["speechlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        code = done.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return invoke


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a fake module, with the given functions, where the front door would look for a room."""

    def fake(name: str, **content: Any) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, leaf = name.rpartition(".")
        monkeypatch.setattr(sys.modules[package], leaf, module, raising=False)

    import demo
    import speechlm.evaluation
    import speechlm.training
    import streaming
    import synth_data.recipes

    assert demo and speechlm and streaming and synth_data
    return fake


def test_help_answers_within_a_second_and_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "import sys; sys.argv[1:] = ['--help']; from speechlm.cli import app; "
    program += "app(standalone_mode=False); print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *help_text, modules = done.stdout.splitlines()
    heavy = {"torch", "numpy", "scipy", "transformers", "gradio", "omegaconf", "pydantic"}
    assert not heavy & set(modules.split())
    # Processor time: the wall clock of a busy machine says nothing about this program.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    commands = ("chat", "serve", "talk", "demo", "codec", "bench", "train", "synth", "eval")
    for command in commands:
        assert any(command in line for line in help_text), command


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        ("train", ["tokenizer", "codec", "text-to-token", "token-decoder", "lm"]),
        ("synth", ["text", "speech", "dialogues", "pairs", "interleave"]),
        ("eval", ["codec", "tokenizer", "spoken-qa", "duplex"]),
        ("codec", ["encode", "decode", "info"]),
        ("bench", ["codec", "synth"]),
    ],
)
def test_the_fixed_commands_exist(run: Run, group: str, commands: list[str]) -> None:
    for command in commands:
        status, out, _ = run(group, command, "--help")
        assert status == 0 and command in out
    assert run(group, "nonsense")[0] == 2


def commands(group: Any) -> Iterator[Any]:
    for command in group.commands.values():
        yield from commands(command) if hasattr(command, "commands") else [command]


def test_help_hides_nothing_as_markup(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(typer.main.get_command(cli.app)):
        for parameter in command.params:
            shown = f"{getattr(parameter, 'help', '')} {parameter.metavar}"
            assert "[" not in shown and "..." not in shown, (command.name, parameter.name)
    monkeypatch.setenv("COLUMNS", "200")
    out = run("eval", "spoken-qa", "--help")[1]
    for default in ("300", "(panel)", "(espeak and flite)", "(all)", "flite:rms"):
        assert f"[default: {default}]" in out
    assert "[OPTIONS] {CONFIG} [A.B=C]...\n" in re.sub(
        " +\n", "\n", run("train", "lm", "--help")[1]
    )


class Config(BaseModel):
    steps: int = 10
    output: Path = Path("shards")


@pytest.mark.parametrize("trainee", ["tokenizer", "codec", "text-to-token", "token-decoder", "lm"])
def test_train_hands_over_the_validated_recipe(
    run: Run, room: Callable[..., None], tmp_path: Path, trainee: str
) -> None:
    calls: list[tuple[int, bool]] = []

    def train(config: Config, resume: bool) -> Path:
        calls.append((config.steps, resume))
        return tmp_path / "checkpoint"

    room(
        f"speechlm.training.{trainee.replace('-', '_')}",
        TrainConfig=Config,
        train=train,
    )
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    status, out, _ = run("train", trainee, tmp_path / "c.yaml")
    assert (status, out.strip()) == (0, str(tmp_path / "checkpoint"))
    assert run("train", trainee, tmp_path / "c.yaml", "steps=4", "--resume")[0] == 0
    assert calls == [(3, False), (4, True)]
    status, out, err = run("train", trainee, tmp_path / "c.yaml", "step=4")
    assert status == 2 and out == "" and "did you mean 'steps'?" in err
    assert run("train", trainee, tmp_path / "c.yaml", "steps=many")[0] == 2
    assert len(calls) == 2


class SynthConfig(Config):
    ray: str | None = None


def test_synth_hands_over_the_validated_recipe(
    run: Run, room: Callable[..., None], tmp_path: Path
) -> None:
    calls: list[tuple[str, int, str | None]] = []

    def built(what: str) -> Callable[[SynthConfig], BuildReport]:
        def build(config: SynthConfig) -> BuildReport:
            calls.append((what, config.steps, config.ray))
            dropped = [Dropped("talk/3", "too long: 41 s"), Dropped("talk/5", "too long: 52 s")]
            return BuildReport(samples=7, seconds=1800.0, written=2, kept=1, dropped=dropped)

        return build

    room("synth_data.recipes.speech", SpeechConfig=SynthConfig, build_speech=built("speech"))
    room(
        "synth_data.recipes.dialogues",
        DialoguesConfig=SynthConfig,
        build_dialogues=built("dialogues"),
    )
    room("synth_data.recipes.pairs", PairsConfig=SynthConfig, build_pairs=built("pairs"))
    room(
        "synth_data.recipes.interleave",
        InterleaveRecipe=SynthConfig,
        build_interleaved=built("interleave"),
    )
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    status, out, _ = run("synth", "speech", tmp_path / "c.yaml")
    assert status == 0 and out.startswith("shards: 7 samples, 0.50 h in 2 new shards; 1 stood")
    assert out.endswith("2 samples dropped (2 × too long).\n")
    ray = "ray://head:10001"
    assert run("synth", "dialogues", tmp_path / "c.yaml", "steps=4", "--ray", ray)[0] == 0
    assert calls == [("speech", 3, None), ("dialogues", 4, ray)]
    for what in ("pairs", "interleave"):
        assert run("synth", what, tmp_path / "c.yaml", "--ray", ray)[0] == 0
    assert calls[2:] == [("pairs", 3, ray), ("interleave", 3, ray)]
    assert run("synth", "speech", tmp_path / "none.yaml")[0] == 2


def test_synth_text_prints_what_was_removed_and_why(run: Run, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("How far is it?\nHow far is it?\nx\nMail a@b.org now.\n")
    recipe = tmp_path / "text.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'out'}\n"
        f"sources: [{{path: {tmp_path / 'words.txt'}, licence: CC0-1.0, name: words}}]\n"
    )
    status, out, _ = run("synth", "text", recipe)
    assert status == 0
    for shown in ("2 of 4 documents kept", "exact duplicate", "too short", "masked: e-mail"):
        assert shown in out, out
    status, _, err = run("synth", "text", recipe, "personal=keep")
    assert status == 2 and "holds another build" in err


def test_bench_synth_prints_what_was_measured(
    run: Run, room: Callable[..., None], tmp_path: Path
) -> None:
    from audio_codec.bench import Figure

    asked: list[tuple[object, ...]] = []

    def measured(*names: object, **options: object) -> dict[str, Figure]:
        asked.append((*names, *options.values()))
        return {"text_to_token_wer": Figure(0.25)}

    room(
        "synth_data.bench",
        measure_dedup=lambda seed: {"dedup_recall": Figure(0.5, n=seed)},
        measure_text_to_token=measured,
        tokenizer_of=lambda model: f"{model}/its",
    )
    room("speechlm.convert", tokenizer_folder=lambda name: Path(name) / "codec")
    status, out, _ = run("bench", "synth", "--seed", "7", "--json", tmp_path / "m.json")
    assert status == 0 and "dedup_recall" in out and not asked
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["dedup_recall"]["n"] == 7
    said = ("bench", "synth", "--text-to-token", "t", "--texts", "16")
    status, out, _ = run(*said)
    assert status == 0 and "text_to_token_wer" in out and "dedup_recall" in out
    assert run(*said, "--tokenizer", "tiny", "--decoder", "d")[0] == 0
    assert asked == [
        ("t", "t/its/codec", 16, None, "cpu", 0),
        ("t", "tiny/codec", 16, "d", "cpu", 0),
    ]
    assert run("bench", "synth", "--decoder", "d")[0] == 2


def test_synth_shows_a_sample_and_a_set(run: Run, tmp_path: Path) -> None:
    from synth_data.shards import Sample, write

    known = {"id": "s1", "text": "two plus two", "words": ((),), "voices": ("ann",)}
    known |= {"source": "people", "licence": "CC0", "synthetic": False, "seconds": 0.2}
    pcm = np.zeros((1, 4800), np.float32)
    codes = np.zeros((1, 99, 2), np.uint16)
    write(
        tmp_path / "a.tar",
        [Sample(**known, pcm=pcm), Sample(**{**known, "id": "s2"}, codes=codes)],
    )
    status, out, _ = run("synth", "inspect", tmp_path / "a.tar", "--out", tmp_path / "look")
    assert status == 0 and "two plus two" in out and "recorded" in out
    assert {path.name for path in (tmp_path / "look").iterdir()} == {"s1.wav", "s1.png"}
    # No codec has so many codebooks: the codes are drawn, and the sentence says why no more is.
    asked = ("--sample", "s2", "--out", tmp_path / "look")
    status, _, err = run("synth", "inspect", tmp_path / "a.tar", *asked)
    assert status == 2 and "99 codebooks" in err
    assert (tmp_path / "look" / "s2.png").exists()
    assert run("synth", "inspect", tmp_path / "a.tar", "--sample", "s3")[0] == 2
    written = tmp_path / "numbers.json"
    status, out, _ = run("synth", "stats", tmp_path / "a.tar", "--json", written)
    assert status == 0 and "people" in out and "recorded_speech" in out
    metrics = json.loads(written.read_text())["metrics"]
    assert metrics["samples"]["value"] == 2 and metrics["recorded_speech"]["value"] == 1
    assert run("synth", "stats", tmp_path / "none")[0] == 2


@pytest.mark.parametrize("question", ["codec", "tokenizer", "spoken-qa", "duplex"])
def test_eval_writes_the_envelope_and_prints_the_table(
    run: Run, room: Callable[..., None], tmp_path: Path, question: str
) -> None:
    def evaluate(model: str, **options: Any) -> dict[str, Metric]:
        if model != "tiny":
            raise UserError(f"There is no model {model!r}; shipped is tiny.")
        return {"score": Metric(0.5, 0.4, 0.6, 10)}

    room(f"speechlm.evaluation.{question.replace('-', '_')}", evaluate=evaluate)
    status, out, _ = run("eval", question, "--json", tmp_path / "a.json")
    assert status == 0 and "score" in out
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["command"] == f"eval {question}"
    assert written["metrics"]["score"]["n"] == 10 and "options" not in written
    if question == "spoken-qa":  # a card holds the scores of either way of asking
        run("eval", question, "--voices", "heldout", "--json", tmp_path / "c.json")
        assert json.loads((tmp_path / "c.json").read_text())["options"] == {"voices": "heldout"}
        named = ("--voices", "espeak:en-us", "--engine", "espeak")
        status, _, err = run("eval", question, *named)
        assert status == 2 and err.startswith(
            "speechlm: --engine chooses voices of panel and heldo"
        )
        assert run("eval", question, *named, "--voices", "panel")[0] == 0
    else:
        run("eval", question, "--seed", 3, "--json", tmp_path / "c.json")
        assert json.loads((tmp_path / "c.json").read_text())["options"] == {"seed": 3}
    status, out, err = run("eval", question, "--model", "huge", "--json", tmp_path / "b.json")
    assert (status, out, err) == (2, "", "speechlm: There is no model 'huge'; shipped is tiny.\n")
    assert not (tmp_path / "b.json").exists()


def test_eval_codec_hands_over_codecs_sounds_and_levels(
    run: Run, room: Callable[..., None], tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def evaluate(model: str | None, **options: Any) -> dict[str, Metric]:
        calls.append({"model": model, **options})
        return {"stoi": Metric(0.9)}

    def compare(model: str | None, **options: Any) -> SimpleNamespace:
        metrics = evaluate(model, **options)
        return SimpleNamespace(metrics=lambda: metrics, document=lambda: [Paragraph("Said.")])

    room("speechlm.evaluation.codec", evaluate=evaluate, compare=compare)
    assert run("eval", "codec")[0] == 0
    assert run("eval", "codec", "--codec", "encodec", "--codec", "b", "--levels", "all")[0] == 0
    report, written = tmp_path / "report", tmp_path / "a.json"
    status, out, _ = run(
        "eval", "codec", "--model", "m", "--codec", "b", "--audio", tmp_path,
        "--report", report, "--json", written, "--seed", 3, "--utterances", 7,
    )  # fmt: skip
    assert status == 0 and "stoi" in out
    assert "Said." in (report / "report.md").read_text()
    assert json.loads(written.read_text())["metrics"]["stoi"]["value"] == 0.9
    plain = {"seed": 0, "utterances": 100, "codecs": (), "audio": None, "levels": None}
    assert calls == [
        {**plain, "model": "tiny"},
        {**plain, "model": None, "codecs": ["encodec", "b"], "levels": "all"},
        {**plain, "model": "m", "codecs": ["b"], "audio": tmp_path, "seed": 3, "utterances": 7},
    ]
    status, out, err = run("eval", "codec", "--report", written)
    assert (status, out) == (2, "") and "name a folder" in err
    assert len(calls) == 3


@pytest.fixture
def chatty(room: Callable[..., None]) -> None:
    """A model that answers with what it heard."""

    def answer(model: str, pcm: np.ndarray, seed: int) -> SimpleNamespace:
        return SimpleNamespace(pcm=pcm, text="four.", metrics={"frame_ms_p50": Metric(7.0)})

    room("speechlm.convert", load=lambda name: name)
    room("streaming.engine", chat=answer)


@pytest.mark.usefixtures("chatty")
def test_chat_reads_answers_and_reports(run: Run, tmp_path: Path) -> None:
    question = np.sin(np.arange(24_000, dtype=np.float32)) / 2
    audio.save(tmp_path / "q.wav", question)
    status, out, _ = run(
        "chat", "--input", tmp_path / "q.wav", "--output", tmp_path / "a.wav",
        "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert status == 0 and "four." in out
    np.testing.assert_allclose(audio.load(tmp_path / "a.wav"), question, atol=1e-3)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["text"] == "four." and written["metrics"]["frame_ms_p50"]["value"] == 7.0


@pytest.mark.usefixtures("chatty")
def test_chat_with_bad_input_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    good, kept = tmp_path / "q.wav", tmp_path / "kept.wav"
    audio.save(good, np.zeros(2_400, np.float32))
    kept.write_text("precious")
    for question, output, extra in [
        (tmp_path / "none.wav", kept, []),
        (tmp_path / "empty.wav", kept, []),
        (good, tmp_path / "a.xyz", []),
        (good, tmp_path, []),
        (good, kept, ["--json", tmp_path]),
        (good, kept, ["--json", good / "a.json"]),
    ]:
        status, out, err = run("chat", "--input", question, "--output", output, *extra)
        assert status == 2 and out == "" and len(err.splitlines()) == 1, err
        assert "Traceback" not in err
    assert kept.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.wav", "kept.wav", "q.wav"]


def test_serve_talk_demo_and_bench_hand_over(
    run: Run, room: Callable[..., None], tmp_path: Path
) -> None:
    calls: list[Any] = []
    room(
        "streaming.server",
        ServerConfig=lambda api_keys: sorted(api_keys),
        serve=lambda model, **options: calls.append((model, options)),
    )
    room("streaming.client", talk=lambda url, api_key: calls.append((url, api_key)))
    room("demo.app", launch=lambda model, **options: calls.append((model, options)))
    room("speechlm.convert", load=lambda name: name)
    room("streaming.bench", frame_times=lambda model, slots: {"slots": Metric(slots)})
    assert run("serve", "--port", 1, "--slots", 3, "--api-key", "b", "--api-key", "a")[0] == 0
    assert run("talk", "--url", "ws://x", "--api-key", "a")[0] == 0
    assert run("demo", "--host", "0.0.0.0")[0] == 0
    assert run("bench", "--slots", 2, "--json", tmp_path / "b.json")[0] == 0
    options = {"host": "127.0.0.1", "port": 1, "slots": 3, "config": ["a", "b"]}
    assert calls == [
        ("tiny", options),
        ("ws://x", "a"),
        ("tiny", {"host": "0.0.0.0", "port": 7860}),
    ]
    written = json.loads((tmp_path / "b.json").read_text())
    assert (written["command"], written["metrics"]["slots"]["value"]) == ("bench", 2)


def test_codec_turns_files_into_codes_and_back(
    run: Run, room: Callable[..., None], tmp_path: Path
) -> None:
    room("speechlm.convert", load_codec_of=lambda name: small_codec())
    wav, npz, back = (tmp_path / name for name in ("a.wav", "a.npz", "b.wav"))
    audio.save(wav, np.sin(np.arange(24_000, dtype=np.float32)) / 2)
    status, out, _ = run("codec", "encode", wav, npz, "--codebooks", 2)
    assert (status, out) == (
        0, f"{npz}: 1.00 s of sound in 13 frames of 2 codebooks, 0.09 kbit/s\n",
    )  # fmt: skip
    assert run("codec", "decode", npz, back)[0] == 0 and len(audio.load(back)) == 24_000
    status, out, _ = run("codec", "info", npz)
    assert status == 0 and "length       1.000 s, 24000 samples\n" in out
    status, out, _ = run("codec", "info", "tiny")
    assert status == 0 and "codebooks    3 of sizes 9, 16, 16\n" in out
    npz.write_bytes(npz.read_bytes()[:-10])
    kept = back.read_bytes()
    for arguments in (("decode", npz, back), ("info", npz), ("encode", npz, "a.wav")):
        status, out, err = run("codec", *arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert back.read_bytes() == kept


def test_codec_works_in_a_pipe(
    run: Run, room: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    room("speechlm.convert", load_codec_of=lambda name: small_codec())
    audio.save(tmp_path / "a.wav", np.zeros(1_920, np.float32))
    stdin = SimpleNamespace(buffer=io.BytesIO((tmp_path / "a.wav").read_bytes()))
    stdout = SimpleNamespace(buffer=io.BytesIO())
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("codec", "encode", "-", "-")[0] == 0
    with np.load(io.BytesIO(stdout.buffer.getvalue())) as archive:
        assert archive["codes"].shape == (3, 1)


def test_codec_info_reads_a_pipe(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    audio.save(tmp_path / "a.wav", np.zeros(2_400, np.float32))
    wav = io.BytesIO((tmp_path / "a.wav").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=wav))
    status, out, _ = run("codec", "info", "-")
    assert status == 0 and "length       0.100 s\n" in out


def test_bench_codec_takes_its_peers_as_one_would_write_them(
    run: Run, room: Callable[..., None], tmp_path: Path
) -> None:
    calls: list[tuple[str, list[str], int]] = []

    def measure(load: Callable[[], str], against: list[str], frames: int) -> dict[str, Figure]:
        calls.append((load(), against, frames))
        return {"speed_vs_mimi": Figure(6.5, 6.0, 7.0, 10, "×")}

    room("speechlm.convert", load_codec_of=lambda name: name)
    room("audio_codec.bench", measure=measure)
    status, out, _ = run(
        "bench", "codec", "--against", "encodec", "mimi", "--json", tmp_path / "b.json"
    )
    assert status == 0 and "speed_vs_mimi" in out
    assert run("bench", "codec", "--against", "mimi", "--against", "encodec")[0] == 0
    assert run("bench", "codec", "--model", "x", "--frames", 30)[0] == 0
    assert calls == [
        ("tiny", ["encodec", "mimi"], 100),
        ("tiny", ["mimi", "encodec"], 100),
        ("x", [], 30),
    ]
    written = json.loads((tmp_path / "b.json").read_text())
    metric = {"value": 6.5, "low": 6.0, "high": 7.0, "n": 10, "unit": "×"}
    assert written["command"] == "bench codec" and written["metrics"] == {"speed_vs_mimi": metric}
    status, _, err = run("bench", "--slots", 2, "codec")
    assert status == 2 and "behind the word 'codec'" in err and len(calls) == 3


def test_a_real_process_exits_with_two_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "speechlm.cli", "eval", "codec", "--json", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"speechlm: {tmp_path} is a folder; name a file.\n"
