"""Files of every kind come in as one kind; the features are causal."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec import audio
from audio_codec.errors import UserError
from audio_codec.files import replacing


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def test_the_clock_is_consistent() -> None:
    assert audio.SAMPLE_RATE / audio.FRAME_SIZE == audio.FRAME_RATE == 12.5


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_keeps_time_pitch_and_level(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate), rate)
    heard = audio.load(tmp_path / "a.wav")
    assert heard.dtype == np.float32 and abs(len(heard) - 12_000) <= 2
    middle, expected = heard[2_000:10_000], tone(24_000)[2_000:10_000]
    # In phase with the true tone: the filter moves nothing in time.
    assert float(np.abs(middle - expected).max()) < 5e-3


def test_eight_channels_at_192_khz_is_used_with_one_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([tone(192_000)] * 8, axis=1), 192_000)
    with caplog.at_level(logging.WARNING):
        heard = audio.load(tmp_path / "a.wav")
    assert len(heard) == 12_000
    assert audio.loudness_dbfs(heard) == pytest.approx(-9.03, abs=0.2)
    (notice,) = caplog.messages
    assert "8 channels" in notice and "192000 Hz" in notice


def test_an_mp3_named_wav_is_used_with_one_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audio.save(tmp_path / "a.mp3", tone(24_000))
    (tmp_path / "a.mp3").rename(tmp_path / "a.wav")
    with caplog.at_level(logging.WARNING):
        heard = audio.load(tmp_path / "a.wav")
    assert len(heard) >= 12_000 and len(caplog.messages) == 1
    assert "whatever its name says" in caplog.text


def test_ordinary_sound_is_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([tone(44_100)] * 2, axis=1), 44_100)
    assert len(audio.load(tmp_path / "a.wav")) == 12_000
    assert caplog.messages == []


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no sound at all, whatever its name says")
    rng = np.random.default_rng(0)
    (tmp_path / "noise.mp3").write_bytes(rng.bytes(5_000))
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, np.float32), 24_000)
    soundfile.write(tmp_path / "one.wav", np.zeros(1, np.float32), 24_000)
    broken = tone(24_000)
    broken[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 24_000, subtype="FLOAT")
    (tmp_path / "headerless.raw").write_bytes(rng.bytes(5_000))
    whole = tmp_path / "whole.flac"
    audio.save(whole, tone(24_000))
    (tmp_path / "cut.flac").write_bytes(whole.read_bytes()[:100])
    for name, says in {
        "missing.wav": "no sound file",
        "": "folder",
        "empty.wav": "empty",
        "text.wav": "decoded",
        "noise.mp3": "decoded",
        "zero.wav": "0 samples",
        "one.wav": "1 sample;",
        "nan.wav": "NaN",
        "cut.flac": "cut.flac",
        "headerless.raw": "decoded",
    }.items():
        with pytest.raises(UserError, match=says) as caught:
            audio.load(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_save_and_load_round_trip(tmp_path: Path, suffix: str) -> None:
    pcm = tone(24_000)
    audio.save(tmp_path / f"new/a{suffix}", pcm)
    np.testing.assert_allclose(audio.load(tmp_path / f"new/a{suffix}"), pcm, atol=1 / 32_000)


def test_a_flac_that_ends_early_or_does_not_say_when_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    audio.save(path, 0.1 * np.random.default_rng(0).standard_normal(72_000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for read in (audio.load, lambda path: list(audio.load_blocks(path, seconds=1))):
        with pytest.raises(UserError, match="cannot be decoded as sound to its end"):
            read(path)
    # 36 bits of STREAMINFO hold the number of samples; who writes into a pipe leaves them 0.
    path.write_bytes(whole[:21] + bytes([whole[21] & 0xF0, 0, 0, 0, 0]) + whole[26:])
    assert audio.duration(path) is None
    for read in (audio.load, audio.read_header):
        with pytest.raises(UserError, match="does not say how long it is"):
            read(path)


def test_pipes_and_links_are_not_written_over(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="is a pipe or a device"), replacing(pipe):
        raise AssertionError("it must not begin")
    assert pipe.is_fifo()
    with pytest.raises(UserError, match="is a pipe or a device; give a file, or -"):
        audio.load(pipe)
    (tmp_path / "real.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to("real.txt")
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and (tmp_path / "real.txt").read_text() == "new"


def test_save_leaves_no_scrap_and_refuses_unknown_suffixes(tmp_path: Path) -> None:
    audio.save(tmp_path / "a.ogg", tone(24_000))
    with pytest.raises(UserError, match=r"\.xyz.*\.wav, \.flac"):
        audio.save(tmp_path / "a.xyz", tone(24_000))
    with pytest.raises(UserError, match="folder"):
        (tmp_path / "b.wav").mkdir()
        audio.save(tmp_path / "b.wav", tone(24_000))
    with pytest.raises(UserError, match="no folder"):
        audio.save(tmp_path / "a.ogg" / "c.wav", tone(24_000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ogg", "b.wav"]


def test_what_stood_there_survives_a_failed_write(tmp_path: Path) -> None:
    target = tmp_path / "kept.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*odd\.opus"):
        audio.save(tmp_path / "odd.opus", tone(24_000), 32_000)
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(UserError, match="Cannot write /proc/none.json"),
        replacing(Path("/proc/none.json")) as temporary,
    ):
        temporary.write_text("x")
    # An error of what the body reads is its own.
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        (tmp_path / "missing").read_text()


@given(
    rates=st.sampled_from([8_000, 16_000, 22_050, 24_000, 48_000]).flatmap(
        lambda a: st.tuples(st.just(a), st.sampled_from([8_000, 16_000, 24_000]))
    ),
    count=st.integers(1, 3_000),
)
@settings(max_examples=30, deadline=None)
def test_resampling_gives_the_promised_length(rates: tuple[int, int], count: int) -> None:
    source, target = rates
    resampled = audio.resample(np.ones((2, count), np.float32), source, target)
    assert resampled.shape == (2, math.ceil(count * target / source))
    assert resampled.dtype == np.float32


def test_resampling_down_removes_what_would_alias() -> None:
    heard = audio.resample(tone(48_000, hertz=20_000.0), 48_000, 24_000)
    assert audio.loudness_dbfs(heard[500:-500]) < -70


@given(level=st.floats(-60, -15), gain=st.floats(1e-3, 1))
@settings(max_examples=30, deadline=None)
def test_normalize_reaches_the_level(level: float, gain: float) -> None:
    reached = audio.loudness_dbfs(audio.normalize(gain * tone(24_000), level))
    assert reached == pytest.approx(level, abs=0.01)


def test_normalize_neither_clips_nor_divides_by_silence() -> None:
    assert np.abs(audio.normalize(tone(24_000), 6.0)).max() <= 1.0
    assert audio.loudness_dbfs(np.zeros(10, np.float32)) == -math.inf
    assert not audio.normalize(np.zeros(10, np.float32), -20).any()


def test_filterbank_columns_are_averages() -> None:
    filters = audio.mel_filterbank(24_000, 1024, 80, 0.0, 8_000.0)
    assert filters.shape == (513, 80)
    torch.testing.assert_close(filters.sum(0), torch.ones(80))
    with pytest.warns(UserWarning), pytest.raises(AssertionError, match="too many"):
        audio.mel_filterbank(24_000, 256, 200, 0.0, 8_000.0)


def test_features_of_white_noise_and_of_silence() -> None:
    mel = audio.LogMel()
    noise = mel(0.1 * torch.randn(1, 1, 48_000))[:, 3:]
    level = (noise * mel.DEVIATION + mel.MEAN).exp().mean()
    assert float(level) == pytest.approx(0.01, rel=0.05)  # the variance of the noise
    silence = mel(torch.zeros(1, 1, 480))
    torch.testing.assert_close(
        silence, torch.full_like(silence, (math.log(mel.FLOOR) - mel.MEAN) / mel.DEVIATION)
    )


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_any_chunking_equals_offline(cuts: list[int]) -> None:
    mel = audio.LogMel()
    pcm = torch.randn(2, 1, sum(cuts) * mel.stride)
    state = mel.new_state(2)
    chunks = torch.split(pcm, [cut * mel.stride for cut in cuts], dim=-1)
    streamed = torch.cat([mel(chunk, state) for chunk in chunks], dim=1)
    torch.testing.assert_close(streamed, mel(pcm), rtol=1e-5, atol=1e-5)


def test_the_future_never_changes_a_past_feature() -> None:
    mel = audio.LogMel()
    pcm = torch.randn(1, 1, 2_400)
    changed = pcm.clone()
    changed[..., 1_200:] = 0
    before, after = mel(pcm)[:, :5], mel(changed)[:, :5]
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert not torch.equal(mel(pcm)[:, 5:], mel(changed)[:, 5:])


def test_a_frozen_or_reset_slot_leaves_the_others_alone() -> None:
    mel = audio.LogMel()
    first, second = torch.randn(2, 3, 1, 960)
    state = mel.new_state(3)
    mel(first, state)
    state.active[1] = False
    mel(torch.randn(3, 1, 960), state.clone())
    kept = state.tail[1].clone()
    mel(second, state)
    assert torch.equal(state.tail[1], kept)
    state.reset([0])
    third = torch.randn(3, 1, 960)
    out = mel(third, state)
    torch.testing.assert_close(out[0], mel(third)[0], rtol=1e-5, atol=1e-5)
    whole = mel(torch.cat([first, second, third], dim=-1))
    torch.testing.assert_close(out[2], whole[2, -4:], rtol=1e-5, atol=1e-5)


def test_a_half_precision_model_keeps_exact_tables() -> None:
    mel, pcm = audio.LogMel(), torch.randn(1, 1, 960)
    rounded = torch.nn.Sequential(audio.LogMel()).to(torch.bfloat16)[0]
    assert torch.equal(rounded(pcm), mel(pcm)) and rounded(pcm).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mel(pcm), rounded(pcm))


@pytest.mark.data
def test_recorded_speech_has_about_zero_mean_and_unit_variance(data_dir: Path) -> None:
    mel = audio.LogMel()
    files = sorted((data_dir / "audio" / "librispeech_many").iterdir())[:40]
    features = []
    for file in files:
        pcm = torch.from_numpy(audio.load(file))
        whole = len(pcm) // mel.stride * mel.stride
        features.append(mel(pcm[None, None, :whole])[0])
    together = torch.cat(features)
    assert abs(float(together.mean())) < 0.3
    assert 0.8 < float(together.std()) < 1.2


def test_a_level_is_taken_every_ten_milliseconds() -> None:
    steps = np.repeat(np.float32([0.1, 1.0, 0.0]), audio.WINDOW)
    levels = audio.window_levels(np.append(steps, np.float32(1)))  # the last window is not whole
    assert levels == pytest.approx([-20, 0, -100], abs=1e-3)
    assert audio.audible(steps).tolist() == [True, True, False]
