"""Whole recipes on a cluster: pairs and interleaved documents, a worker killed in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray_cluster
import torch
from small import TOKENIZER, small_text_to_token

from audio_codec import checkpoint
from audio_codec.speech_tokenizer import SpeechTokenizer
from synth_data.build import BuildReport
from synth_data.recipes.interleave import InterleaveRecipe, build_interleaved
from synth_data.recipes.pairs import PairsConfig, build_pairs
from synth_data.shards import read

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = ray_cluster.MARKS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster.two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return checkpoint.save(folder, TOKENIZER, SpeechTokenizer(TOKENIZER).state_dict(), dtype="fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = small_text_to_token(codebook=(3, 3))
    folder = tmp_path_factory.mktemp("model") / "text_to_token"
    return checkpoint.save(folder, made.config, made.float().state_dict(), dtype="fp32")


def same_on(
    cluster: Any,
    folder: Path,
    build: Callable[[Path, str | None], BuildReport],
    shards: int,
) -> BuildReport:
    """Build here, and on a cluster of which a worker is killed: the same bytes."""
    here, there = folder / "here", folder / "there"
    report = build(here, None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build, there, cluster.address)
        done = ray_cluster.kill_a_worker(there, shards=2)
        again = waiting.result(timeout=400)
    assert 2 <= done < shards == len(list(here.glob("*.tar")))
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in here.iterdir()
    }
    # A shard whose maker died before it could report is found there: kept, not made.
    assert again.kept + again.written == shards
    assert again.summary == report.summary
    return report


def test_pairs_of_a_cluster_are_those_of_this_machine(
    cluster: Any, tokenizer: Path, tmp_path: Path
) -> None:
    pytest.importorskip("espeakng_loader", reason="speech engine espeak is not installed")

    def build(output: Path, ray: str | None) -> BuildReport:
        config = {
            "output": output,
            "tokenizer": str(tokenizer),
            "utterances": 120,
            "engines": ("espeak",),
            "sources": [{"kind": "quiz", "pool": 200}],
            "drop_above": 99.0,
            "shard_size": 8,
            "ray": ray,
        }
        return build_pairs(PairsConfig.model_validate(config))

    report = same_on(cluster, tmp_path, build, shards=15)
    assert report.samples == 120
    assert all(sample.codes is not None for sample in read(tmp_path / "there"))


def test_interleaved_documents_of_a_cluster_are_those_of_this_machine(
    cluster: Any, model: Path, tokenizer: Path, tmp_path: Path
) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("".join(f"Number {n} is one more than {n - 1}.\n" for n in range(1, 400)))

    def build(output: Path, ray: str | None) -> BuildReport:
        config = {
            "output": output,
            "model": str(model),
            "sources": [
                {"kind": "text", "path": text, "licence": "CC0", "lines": 2},
                {"kind": "quiz", "documents": 300},
            ],
            "generation": {"batch": 64, "shortest": 0, "longest": 4, "stuck": 999},
            "check": {"tokenizer": str(tokenizer), "drop_above": 99.0},
            "precision": "fp32",
            "shard_size": 25,
            "ray": ray,
        }
        return build_interleaved(InterleaveRecipe.model_validate(config))

    report = same_on(cluster, tmp_path, build, shards=20)
    assert report.samples > 400
    rules = {sample.meta["rule"] for sample in read(tmp_path / "there")}
    assert {"speech_first", "text_first", "question_speech_answer_text"} <= rules
