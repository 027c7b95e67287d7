"""The weights that ship: whole, small enough, measured, and able to hold a conversation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from audio_codec import audio, checkpoint
from audio_codec.audio import audible
from speechlm import convert
from streaming.engine import chat

TINY = checkpoint.resolve("tiny")


def test_they_stay_within_sixty_megabytes() -> None:
    files = [file for file in TINY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 60e6
    assert {file.name for file in files} >= {"model.safetensors", "config.json", "card.json"}


def test_the_card_says_how_they_were_measured() -> None:
    card = json.loads((TINY / "card.json").read_text())
    for question in ("eval spoken-qa", "eval duplex", "eval codec", "eval tokenizer"):
        score = card["scores"][question]
        assert score["commit"] and score["hardware"] and score["date"]
        for name, metric in score["metrics"].items():
            assert metric["value"] is not None or metric["reason"], (question, name)


def test_a_question_is_heard_and_answered(root: Path) -> None:
    example = root / "demo" / "static" / "examples" / "after.mp3"
    answer = chat(convert.load("tiny"), audio.load(example), seed=0)
    assert audible(answer.pcm).mean() > 0.3  # it speaks, and not one click
    assert len(answer.text.split()) >= 2 and len(answer.heard.split()) >= 3
    latency = answer.metrics["response_latency_ms"].value
    assert latency is not None and latency < 2000
    again = chat(convert.load("tiny"), audio.load(example), seed=0)
    np.testing.assert_array_equal(again.stream, answer.stream)
    assert (again.text, again.heard) == (answer.text, answer.heard)


def test_silence_is_not_answered() -> None:
    silence = chat(convert.load("tiny"), np.zeros(48_000, np.float32), seed=0, max_seconds=3)
    assert not audible(silence.stream).any() and not silence.text and not silence.heard
