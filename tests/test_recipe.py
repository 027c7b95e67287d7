"""The whole recipe from nothing, at a size of seconds, through the front door.

The same commands and YAML as `make tiny`, made smaller by overrides: text → speech → tokenizer →
codec → conversations → language model → evaluation → a spoken answer.
"""

import json
import shlex
from pathlib import Path

import pytest
import soundfile
from typer.testing import CliRunner

from speechlm.cli import app

TINY_TOKENIZER = (
    "model.front_dim=16 model.front_blocks=1 model.dim=32 model.heads=2 "
    "model.layers_before=1 model.layers_after=1"
)
TINY_CODEC = (
    "model.encoder_dim=16 model.encoder_latent_dim=16 model.decoder_dim=16 model.latent=8 "
    "model.decoder_latent_dim=16 model.decoder_blocks=1 model.codebooks=[16,16]"
)
TINY_LM = (
    "model.temporal.dim=32 model.temporal.layers=1 model.temporal.heads=2 model.temporal.hidden=32 "
    "model.depth.dim=16 model.depth.layers=1 model.depth.heads=2 model.depth.hidden=16 "
    "text.vocab=200 text.quiz=500 length=100"
)


def speechlm(command: str) -> str:
    """Run a command as a user would; its output. A failure shows why."""
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 0, f"speechlm {command}\n{done.output}\n{done.exception!r}"
    return done.output


def short_run(folder: Path, name: str, steps: int) -> str:
    return (
        f"run.dir={folder}/{name} run.steps={steps} run.log_every=1 run.save_every=2 "
        f"run.eval_every={steps}"
    )


@pytest.mark.timeout(300)
def test_from_text_to_a_spoken_answer(root: Path, tmp_path: Path) -> None:
    configs = root / "configs"
    speech, heldout, talks = (tmp_path / name for name in ("speech", "heldout", "dialogues"))
    speechlm(
        f"synth speech {configs}/synth/speech_tiny.yaml output={speech} hours=null utterances=24 "
        "workers=1"
    )
    speechlm(
        f"synth speech {configs}/synth/speech_tiny_heldout.yaml output={heldout} utterances=6 "
        "workers=1"
    )
    assert list(speech.glob("*.tar")) and list(heldout.glob("*.tar"))

    speechlm(
        f"train tokenizer {configs}/tokenizer/tiny.yaml data.train=[{speech}] "
        f"data.validation=[{heldout}] data.batch_seconds=8 {short_run(tmp_path, 'tokenizer', 4)} "
        f"{TINY_TOKENIZER} --resume"
    )
    speechlm(
        f"train codec {configs}/codec/tiny.yaml tokenizer={tmp_path}/tokenizer/tokenizer "
        f"'sources=[{{path: {speech}}}]' validation={heldout} validation_utterances=2 batch=2 "
        f"{short_run(tmp_path, 'codec', 3)} {TINY_CODEC} --resume"
    )
    codec = tmp_path / "codec" / "codec"
    speechlm(
        f"synth dialogues {configs}/synth/dialogues_tiny.yaml output={talks} codec={codec} "
        "hours=0.01 dialogue.seconds=20 sample_seconds=10 workers=1"
    )
    sources = f"[{{kind: dialogues, path: {talks}, rows: 1}}, {{kind: quiz, rows: 1}}]"
    speechlm(
        f"train lm {configs}/lm/tiny.yaml codec={codec} 'sources={sources}' "
        f"{short_run(tmp_path, 'lm', 3)} {TINY_LM} --resume"
    )
    model = tmp_path / "lm" / "lm"
    logged = (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()
    assert len(logged) >= 3, "a logged line a step"

    measured = tmp_path / "tokenizer.json"
    speechlm(f"eval tokenizer --model {model} --utterances 4 --json {measured}")
    assert {"command", "commit", "hardware", "date", "metrics"} <= json.loads(
        measured.read_text()
    ).keys()

    speechlm(f"synth inspect {heldout} --sample s1-0000004 --out {tmp_path}")
    question = tmp_path / "s1-0000004.wav"
    answer, report = tmp_path / "answer.wav", tmp_path / "chat.json"
    speechlm(f"chat --model {model} --input {question} --output {answer} --json {report}")
    content = json.loads(report.read_text())
    assert "text" in content and content["metrics"]["frame_ms_p95"]["value"] > 0
    assert soundfile.info(answer).samplerate == 24_000
