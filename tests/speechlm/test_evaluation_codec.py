"""Codec and tokenizer are measured on a small untrained codec, where the answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small import CODEC, small_codec

from audio_codec import checkpoint as checkpoints
from speechlm.convert import load_codec_of, load_speech_tokenizer_of
from speechlm.evaluation import codec as codec_evaluation
from speechlm.evaluation import tokenizer as tokenizer_evaluation
from synth_data.verify import word_errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "codec"
    return checkpoints.save(path, CODEC, small_codec().state_dict(), dtype="fp32")


def test_codec_metrics_of_an_untrained_codec(folder: Path) -> None:
    found = codec_evaluation.evaluate(str(folder), utterances=4)
    assert {"stoi", "pesq", "wer_original", "wer_decoded", "bitrate_bps"} <= found.keys()
    assert found["bitrate_bps"].value == pytest.approx(12.5 * (np.log2(9) + 8))
    assert found["wer_decoded"].value is not None and found["wer_decoded"].value >= 0.9
    assert found["wer_original"].value is not None and found["wer_original"].value < 0.5
    assert found["stoi"].value is not None and found["stoi"].value < 0.6
    if found["pesq"].value is None:
        assert found["pesq"].reason


def test_tokenizer_metrics_of_an_untrained_tokenizer(folder: Path) -> None:
    found = tokenizer_evaluation.evaluate(str(folder), utterances=8)
    assert found["wer_quantized"].value is not None and found["wer_quantized"].value > 0.9
    usage = found["codebook_usage"]
    assert usage.value is not None and 0 < usage.value <= (usage.n or 0) / 9
    assert 0 <= (found["codebook_entropy"].value or 0) <= 1


def test_both_are_found_by_the_codec_s_own_folder(folder: Path) -> None:
    codec, tokenizer = load_codec_of(folder), load_speech_tokenizer_of(folder)
    pcm = torch.randn(1, 1, 5 * 1920)
    assert torch.equal(codec.encode(pcm)[:, 0], tokenizer.encode(pcm))


def test_pooled_wer_weighs_utterances_by_their_words() -> None:
    errors = [word_errors("one two three four", "one two three four"), word_errors("five", "six")]
    assert tokenizer_evaluation.pooled_wer(errors).value == pytest.approx(1 / 5)
