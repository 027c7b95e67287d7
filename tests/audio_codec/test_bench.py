"""The race is fair and its figures are what their names say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from audio_codec import bench
from audio_codec.audio import FRAME_SIZE
from audio_codec.bench import OURS, Contest, PublicMimi, Times, TransformersMimi
from audio_codec.codec import Codec
from audio_codec.errors import UserError
from audio_codec.state import State, all_active

Call = tuple[str, str, tuple[int, ...], bool]


class Noted:
    """A codec of frames of 320 samples that does nothing and writes down what it is asked."""

    sample_rate, frame_size, delay = 24_000, 320, 0
    codebooks = ((4,),)

    def __init__(self, name: str, calls: list[Call]) -> None:
        self.name, self.calls = name, calls

    def encode(self, pcm: Tensor, state: Any = None) -> Tensor:
        self.calls.append((self.name, "encode", tuple(pcm.shape), state is not None))
        return torch.zeros(len(pcm), 1, pcm.shape[2] // 320, dtype=torch.int64)

    def decode(self, codes: Tensor, state: Any = None) -> Tensor:
        self.calls.append((self.name, "decode", tuple(codes.shape), state is not None))
        return torch.zeros(len(codes), 1, codes.shape[2] * 320)

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> State:
        assert max_chunk == 6
        return State(all_active(batch))

    new_decoder_state = new_encoder_state


def test_contestants_take_turns() -> None:
    calls: list[Call] = []
    codecs: dict[str, Codec] = {name: Noted(name, calls) for name in "ab"}
    times = bench.in_turns(codecs, batch=2, turn=3, rounds=2)
    streamed = [
        (name, what, shape, True)
        for name in "ab"
        for _ in range(4)  # three, and the one that is not counted
        for what, shape in (("encode", (2, 1, FRAME_SIZE)), ("decode", (2, 1, 6)))
    ]
    whole = [
        (name, what, shape, False)
        for name in "ab"
        for what, shape in (("encode", (2, 1, 25 * FRAME_SIZE)), ("decode", (2, 1, 150)))
    ]
    assert calls == 2 * (streamed + whole)
    for took in times.values():
        assert [len(frames) for frames in took.frames.both()] == [3, 3]
        assert [len(sounds) for sounds in took.sounds.both()] == [1, 1]
        assert all(second > 0 for frames in took.frames.both() for second in frames)


def test_ours_does_more_in_its_turn() -> None:
    calls: list[Call] = []
    codecs: dict[str, Codec] = {name: Noted(name, calls) for name in (OURS, "peer")}
    times = bench.in_turns(codecs, batch=1, turn=2, rounds=3)
    assert [name for name, what, _, _ in calls if what == "encode"] == 3 * (
        [OURS] * 11 + ["peer"] * 3 + [OURS] * 5 + ["peer"]
    )
    ours, peer = times[OURS], times["peer"]
    assert [len(frames) for frames in ours.frames.both()] == [10, 10, 10]
    assert [len(frames) for frames in peer.frames.both()] == [2, 2, 2]
    assert [len(ours.sounds.encode[0]), len(peer.sounds.decode[0])] == [5, 1]


def times(
    encode: float, decode: float, offline: float, slow: Sequence[float] = (1, 2, 1)
) -> Contest:
    """Three rounds of four frames and a sound; the second round is slow for all alike."""
    frames, sounds = Times(), Times()
    for by in slow:
        frames.add([(encode * by, decode * by)] * 4)
        sounds.add([(0.75 * offline * by, 0.25 * offline * by)])
    return Contest(frames, sounds)


def test_figures_are_what_their_names_say() -> None:
    found = {
        OURS: times(0.004, 0.006, 0.5),
        "quick": times(0.010, 0.020, 2.0),
        "slow": times(0.1, 0.1, 1.0),
    }
    other = {name: times(1.0, 1.0, 1.0) for name in found}
    settings = {(1, 1): other, (2, 1): found}
    made = bench.figures(settings, {"rival": ["slow", "quick"]})
    assert next(iter(made)) == "speed_vs_rival"
    ratio = made["speed_vs_rival"]  # of the quicker one; what slows a round slows both
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (
        pytest.approx(3.0), pytest.approx(3.0), pytest.approx(3.0), 3,
    )  # fmt: skip
    assert made["offline_speed_vs_rival"].value == pytest.approx(2.0)
    assert made["speed_vs_rival_t1_b1"].value == pytest.approx(1.0)
    assert made["frame_ms_p50"].value == pytest.approx(10.0)
    assert made["frame_ms_p99"].value == pytest.approx(20.0) and made["frame_ms_p99"].n == 12
    assert made["ours_encode_ms_p50_t2_b1"].value == pytest.approx(4.0)
    assert made["quick_decode_ms_p99_t2_b1"].value == pytest.approx(40.0)
    # A third of 10, 20 and 10 ms a frame of 80 ms; half a second for a sound of two.
    assert made["ours_real_time_factor_t2_b1"].value == pytest.approx(40 / 3 / 80)
    assert made["ours_offline_real_time_factor_t2_b1"].value == pytest.approx(0.25)
    assert made["ours_offline_encode_ms_p50_t2_b1"].value == pytest.approx(375)
    assert made["quick_offline_decode_ms_p90_t2_b1"].value == pytest.approx(900)
    assert made["ours_offline_ms_p50_t2_b1"].n == 3 and "ours_offline_ms_p99_t2_b1" not in made


def test_the_whole_bench_covers_every_setting_and_leaves_the_threads_alone() -> None:
    calls: list[Call] = []

    def build(name: str) -> Callable[[], Codec]:
        return lambda: Noted(name, calls)

    peers = {"rival": {"rival_a": build("a"), "rival_b": build("b")}}
    before = torch.get_num_threads()
    made = bench.measure(build("o"), ["rival", "rival"], frames=20, peers=peers)
    assert torch.get_num_threads() == before
    assert made["frame_ms_p99"].n == 100 and "speed_vs_mimi" not in made
    assert made["ours_frame_ms_p99_t1_b8"].n == 100 and made["rival_a_frame_ms_p99_t1_b8"].n == 20
    assert made["ours_offline_decode_ms_p90_t2_b8"].n == 50
    for setting in ("t1_b1", "t1_b8", "t2_b1", "t2_b8"):
        for name in ("ours", "rival_a", "rival_b"):
            assert made[f"{name}_frame_ms_p50_{setting}"].value > 0
    assert {shape[0] for _, _, shape, _ in calls} == {1, 8}
    assert {name for name, *_ in calls} == {"o", "a", "b"}


def test_an_unknown_peer_is_told_before_anything_is_built() -> None:
    def load() -> Codec:
        raise AssertionError("loaded for nothing")

    with pytest.raises(UserError, match="peer 'opus' is unknown; choices: encodec, mimi"):
        bench.measure(load, ["encodec", "opus"])


@pytest.mark.slow
@torch.inference_mode()
def test_the_public_mimi_streams_its_encoder() -> None:
    codec = TransformersMimi()
    pcm = 0.1 * torch.randn(1, 1, 4 * FRAME_SIZE)
    encoder, decoder = codec.new_encoder_state(1), codec.new_decoder_state(1)
    whole = codec.encode(pcm)
    chunks = [codec.encode(frame, encoder) for frame in pcm.split(FRAME_SIZE, 2)]
    assert whole.shape == (1, 8, 4)
    # A rounding may tip a tie between random codebooks.
    assert float((torch.cat(chunks, 2) == whole).float().mean()) > 0.9
    heard = [codec.decode(codes, decoder) for codes in chunks]
    assert torch.cat(heard, 2).shape == pcm.shape == codec.decode(whole).shape
    assert decoder.keys.get_seq_length() == 8  # the transformer steps at 25 Hz
    assert sum(p.numel() for p in codec.model.parameters()) > 60e6


@pytest.mark.slow
@torch.inference_mode()
def test_the_public_package_streams_as_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moshi", reason="the package moshi is installed apart, see bench.py")
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    codec = PublicMimi()
    assert "mimi_public" in bench.PEERS["mimi"]
    pcm = 0.1 * torch.randn(2, 1, 3 * FRAME_SIZE)
    whole = codec.encode(pcm)
    assert whole.shape == (2, 8, 3) and codec.decode(whole).shape == pcm.shape
    states = [codec.new_encoder_state(1) for _ in pcm]
    found: list[list[Tensor]] = [[], []]
    for frame in pcm.split(FRAME_SIZE, 2):  # two streams by turns: neither hears the other
        for row, state in enumerate(states):
            found[row].append(codec.encode(frame[row : row + 1], state))
    streamed = torch.cat([torch.cat(row, 2) for row in found])
    assert float((streamed == whole).float().mean()) > 0.9
    said, state = [], codec.new_decoder_state(2)
    for codes in whole.split(1, 2):
        said.append(codec.decode(codes, state))
    torch.testing.assert_close(torch.cat(said, 2), codec.decode(whole), rtol=0, atol=1e-4)
