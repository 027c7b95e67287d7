from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_duplex

from audio_codec.errors import UserError
from speechlm.duplex import Duplex
from streaming import bench
from streaming.engine import (
    Core,
    Engine,
    Frame,
    Full,
    Refused,
    ResponseMeter,
    Session,
    SessionEnded,
    Status,
    chat,
    dbfs,
    pipeline_ms,
    voiced_level,
)
from streaming.protocol import FRAME_SIZE, Pcm, SessionParams
from streaming.testing import EchoModel, EchoOutput, EchoState


def noise(frames: int, seed: int = 0) -> Pcm:
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.5, 0.5, frames * FRAME_SIZE).astype(np.float32)


def tone(samples: int) -> Pcm:
    return (0.3 * np.sin(np.arange(samples) / 10)).astype(np.float32)


def take(session: Session, frames: int) -> list[Frame]:
    return [session.wait(5) for _ in range(frames)]


def sound(frames: list[Frame]) -> Pcm:
    return np.concatenate([frame.pcm for frame in frames])


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


@given(st.lists(st.integers(1, 3 * FRAME_SIZE), min_size=1, max_size=8))
@settings(deadline=None, max_examples=20)
def test_any_fragmentation_of_pcm(sizes: list[int]) -> None:
    pcm = noise(1 + sum(sizes) // FRAME_SIZE)[: sum(sizes)]
    with Engine(EchoModel()) as engine:
        session = engine.open(SessionParams(seed=3))
        start = 0
        for size in sizes:
            assert session.offer(pcm[start : start + size]) == size
            start += size
        frames = take(session, len(pcm) // FRAME_SIZE)
    echoed = sound(frames) if frames else np.zeros(0, np.float32)
    np.testing.assert_array_equal(echoed[FRAME_SIZE:], pcm[: max(len(echoed) - FRAME_SIZE, 0)])
    assert "".join(frame.text for frame in frames) == ("defgabc" * 9)[: len(frames)]
    assert [frame.index for frame in frames] == list(range(len(frames)))


def test_full_engine_says_so_at_once_and_takes_the_next_when_a_slot_is_free() -> None:
    with Engine(EchoModel(), slots=2) as engine:
        first, second = engine.open(), engine.open()
        assert {first.slot, second.slot} == {0, 1}
        began = time.monotonic()
        with pytest.raises(Full, match="all 2 are taken"):
            engine.open()
        assert time.monotonic() - began < 0.1
        first.close()
        assert engine.open().slot == first.slot
        assert engine.stats().refused == 1


def test_a_closed_session_is_erased_from_the_state() -> None:
    with Engine(EchoModel(), slots=2) as engine:
        session = engine.open(SessionParams(seed=5))
        session.offer(noise(2))
        take(session, 2)
        state = engine.core.state
        assert state.held[session.slot].abs().sum() > 0
        session.close()
        assert eventually(lambda: all(not t[session.slot].any() for t in state.tensors()))
        with pytest.raises(SessionEnded, match="closed"):
            session.offer(noise(1))


def test_a_slot_is_silent_for_the_next_caller() -> None:
    with Engine(EchoModel()) as engine:
        first = engine.open()
        first.offer(noise(3))
        first.close()  # in the middle of its frames
        second = engine.open()
        second.offer(np.zeros(3 * FRAME_SIZE, np.float32))
        assert not sound(take(second, 3)).any()


def converse(engine: Engine[Any], pcm: Pcm, seed: int) -> tuple[Pcm, str]:
    session = engine.open(SessionParams(seed=seed))
    start = 0
    frames: list[Frame] = []
    while len(frames) < len(pcm) // FRAME_SIZE:
        start += session.offer(pcm[start : start + 700])
        if (frame := session.poll()) is not None:
            frames.append(frame)
        else:
            time.sleep(0.0005)
    session.close()
    return sound(frames), "".join(frame.text for frame in frames)


def test_two_sessions_do_not_hear_each_other_and_each_is_as_if_alone() -> None:
    inputs = {seed: noise(20, seed) for seed in range(3)}
    alone = {}
    for seed, pcm in inputs.items():
        with Engine(EchoModel()) as engine:
            alone[seed] = converse(engine, pcm, seed)
    together: dict[int, tuple[Pcm, str]] = {}
    with Engine(EchoModel(), slots=3) as engine:
        threads = [
            threading.Thread(
                target=lambda seed=seed, pcm=pcm: together.update(
                    {seed: converse(engine, pcm, seed)}
                )
            )
            for seed, pcm in inputs.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in inputs:
        np.testing.assert_array_equal(together[seed][0], alone[seed][0])
        np.testing.assert_array_equal(together[seed][0][FRAME_SIZE:], inputs[seed][:-FRAME_SIZE])
        assert together[seed][1] == alone[seed][1]


def test_a_slow_client_is_frozen_and_the_others_go_on() -> None:
    with Engine(EchoModel(), slots=2, queue_frames=4) as engine:
        slow, quick = engine.open(), engine.open()
        pcm = noise(8)
        sent = 0
        while sent < len(pcm):  # four frames of output nobody takes, four of input that wait
            sent += slow.offer(pcm[sent:])
        state = engine.core.state
        assert eventually(lambda: int(state.count[slow.slot]) == 4)
        assert slow.offer(noise(1)) == 0
        frozen = state.held[slow.slot].clone()
        for _ in range(10):
            quick.offer(noise(1))
            take(quick, 1)
        assert int(state.count[slow.slot]) == 4
        assert torch.equal(state.held[slow.slot], frozen)
        # It thaws where it stood: nothing is lost.
        np.testing.assert_array_equal(sound(take(slow, 8))[FRAME_SIZE:], pcm[:-FRAME_SIZE])


def test_sessions_that_come_together_are_stepped_together() -> None:
    with Engine(EchoModel(on_step=lambda: time.sleep(0.03)), slots=2) as engine:
        sessions = [engine.open(), engine.open()]
        for _ in range(3):  # after one step they know of each other
            for session in sessions:
                session.offer(noise(1))
            for session in sessions:
                take(session, 1)
        before = engine.stats().steps
        for _ in range(5):
            sessions[0].offer(noise(1))
            time.sleep(0.005)  # less than a step costs
            sessions[1].offer(noise(1))
            for session in sessions:
                take(session, 1)
        assert engine.stats().steps - before <= 7  # 5, unless this machine was busy elsewhere


def test_a_model_that_fails_ends_every_call_and_refuses_more() -> None:
    calls = iter([None] * 4 + [RuntimeError("boom")])

    def on_step() -> None:
        error = next(calls)
        if error is not None:
            raise error

    with Engine(EchoModel(on_step=on_step)) as engine:
        session = engine.open()
        session.offer(noise(2))
        with pytest.raises(SessionEnded, match="model failed"):
            take(session, 2)
        assert eventually(lambda: engine.status is Status.FAILED)
        with pytest.raises(Refused, match="failed"):
            engine.open()


def test_draining_lets_the_living_finish_and_takes_no_more() -> None:
    with Engine(EchoModel(), slots=2) as engine:
        session = engine.open()
        engine.drain()
        with pytest.raises(Refused, match="draining"):
            engine.open()
        session.offer(noise(1))
        assert len(take(session, 1)) == 1


def test_closing_ends_live_calls() -> None:
    engine = Engine(EchoModel())
    engine.start()
    session = engine.open()
    session.offer(noise(1))
    take(session, 1)
    engine.close()
    with pytest.raises(SessionEnded, match="shutting down"):
        session.wait(1)
    engine.close()
    assert engine.status is Status.CLOSED and engine.active == 0


def test_restart_begins_from_silence_and_pause_drops() -> None:
    with Engine(EchoModel()) as engine:
        session = engine.open(SessionParams(seed=0))
        session.offer(noise(3))
        take(session, 3)
        session.restart()
        session.pause()
        assert session.offer(noise(2)) == 2 * FRAME_SIZE
        session.resume()
        session.offer(noise(1))
        (frame,) = take(session, 1)
    assert (frame.index, frame.text) == (0, "a")
    assert not frame.pcm.any()


def test_a_pause_holds_back_what_waits_and_lets_a_sender_go() -> None:
    async def run() -> None:
        with Engine(EchoModel(), queue_frames=2) as engine:
            session = engine.open(SessionParams(seed=0), loop=asyncio.get_running_loop())
            sender = asyncio.create_task(session.send(noise(12)))
            await asyncio.sleep(0.05)
            session.pause()
            await asyncio.wait_for(sender, 1)  # what found no room is dropped
            held = session.queued_frames
            for _ in range(2):
                session.poll()
            await asyncio.sleep(0.05)
            assert session.queued_frames == held == 2 and session.poll() is None
            session.resume()
            assert (await asyncio.wait_for(session.receive(), 1)).index == 2

    asyncio.run(run())


def test_a_restart_lets_a_sender_go_on() -> None:
    async def run() -> None:
        with Engine(EchoModel(), queue_frames=2) as engine:
            session = engine.open(loop=asyncio.get_running_loop())
            sender = asyncio.create_task(session.send(noise(6)))
            await asyncio.sleep(0.05)
            assert not sender.done()
            session.restart()
            await asyncio.wait_for(sender, 1)

    asyncio.run(run())


def test_async_send_waits_for_room_and_receive_for_frames() -> None:
    async def run() -> Pcm:
        with Engine(EchoModel(), queue_frames=2) as engine:
            session = engine.open(loop=asyncio.get_running_loop())
            sender = asyncio.create_task(session.send(noise(12)))
            await asyncio.sleep(0.05)
            assert not sender.done()  # two queues of two frames do not hold twelve
            frames = [await session.receive() for _ in range(12)]
            await sender
            session.close()
            with pytest.raises(SessionEnded):
                await session.receive()
            return sound(frames)

    np.testing.assert_array_equal(asyncio.run(run())[FRAME_SIZE:], noise(12)[:-FRAME_SIZE])


def test_input_is_clipped() -> None:
    with Engine(EchoModel()) as engine:
        session = engine.open()
        session.offer(np.full(2 * FRAME_SIZE, 7, np.float32))
        assert sound(take(session, 2)).max() == 1


def test_stats_count_steps_and_overruns() -> None:
    with Engine(EchoModel(on_step=lambda: time.sleep(0.09))) as engine:
        seconds: list[float] = []
        engine.on_step.append(seconds.append)
        session = engine.open()
        session.offer(noise(2))
        take(session, 2)
        assert eventually(lambda: len(seconds) == 2)
        stats = engine.stats()
    assert (stats.steps, stats.overruns, stats.active) == (2, 2, 1)
    assert stats.frame_ms_max == pytest.approx(max(seconds) * 1000)
    assert 90 <= stats.frame_ms_p50 <= stats.frame_ms_p95 <= stats.frame_ms_max


def test_core_steps_only_what_it_is_given() -> None:
    core = Core(EchoModel(), 3)
    for slot in range(3):
        core.begin(slot, SessionParams(seed=slot))
    core.step({1: noise(1)})
    assert core.state.count.tolist() == [0, 1, 0]


def test_response_meter_counts_framing_and_compute() -> None:
    meter = ResponseMeter()
    silence = np.zeros(FRAME_SIZE, np.float32)
    spoken = silence.copy()
    spoken[:960] = tone(960)  # ends 40 ms into frame 0
    answer = silence.copy()
    answer[480:] = tone(1440)  # begins 20 ms into frame 5, which sounds from 480 ms + compute on
    assert meter.feed(spoken, silence, 10) is None
    for _ in range(4):
        assert meter.feed(silence, silence, 10) is None
    assert meter.feed(silence, answer, 10) == pytest.approx(6 * 80 + 20 + 10 - 40)
    assert meter.feed(silence, answer, 10) is None  # once an answer


def test_response_meter_ignores_an_answer_that_was_sounding_already() -> None:
    meter = ResponseMeter()
    both = tone(FRAME_SIZE)
    meter.feed(np.zeros_like(both), both, 0)
    assert [meter.feed(both, both, 0) for _ in range(5)] == [None] * 5
    assert [meter.feed(np.zeros_like(both), both, 0) for _ in range(5)] == [None] * 5


def test_response_meter_waits_until_the_turn_has_settled() -> None:
    meter = ResponseMeter()
    spoken, silence = tone(FRAME_SIZE), np.zeros(FRAME_SIZE, np.float32)
    meter.feed(spoken, silence, 0)
    assert meter.feed(silence, spoken, 0) is None  # audible 160 ms after the turn, perhaps
    assert meter.feed(spoken, silence, 0) is None  # no: it goes on
    reports = [meter.feed(silence, silence, 0) for _ in range(3)]
    reports += [meter.feed(silence, spoken, 0) for _ in range(3)]
    assert reports == [None] * 6  # the output was audible just before the turn ended


class Answering(EchoModel):
    """Silent for `wait` frames, speaks for `frames`, silent again."""

    def __init__(self, wait: int, frames: int) -> None:
        super().__init__()
        self._span = range(wait, wait + frames)

    def step(self, pcm: torch.Tensor, state: EchoState) -> EchoOutput:
        speaks = int(state.count[0]) in self._span
        output = super().step(pcm, state)
        voice = torch.from_numpy(tone(FRAME_SIZE)) * speaks
        return EchoOutput(voice[None, None], output.text * speaks, output.heard)


def test_chat_measures_the_answer() -> None:
    answer = chat(Answering(wait=20, frames=10), tone(24_000), seed=0)
    assert answer.metrics["answer_seconds"].value == pytest.approx(0.8)
    assert len(answer.pcm) == 10 * FRAME_SIZE
    # 30 frames, then the first 1.5 s of silence in whole frames.
    assert len(answer.stream) == (30 + 19) * FRAME_SIZE
    compute = answer.metrics["frame_ms_p50"].value
    assert compute is not None
    assert answer.metrics["pipeline_ms_p50"].value == pytest.approx(160 + compute)
    latency = answer.metrics["response_latency_ms"].value
    assert latency is not None
    assert 21 * 80 - 1000 <= latency <= 21 * 80 - 1000 + 100  # plus that frame's compute
    assert answer.text == "gabcdefgab"
    assert answer.heard == "+" * 13
    assert answer.metrics["frame_ms_max"].n == 49


def test_noise_under_a_recording_is_no_voice() -> None:
    hiss = np.random.default_rng(0).normal(0, 0.02, 72_000).astype(np.float32)
    recording = hiss + np.pad(tone(24_000), (0, 48_000))  # 25 dB louder, for the first second
    answer = chat(Answering(wait=25, frames=10), recording)
    latency = answer.metrics["response_latency_ms"].value
    assert latency is not None and 26 * 80 - 1000 <= latency <= 26 * 80 - 1000 + 100
    assert len(answer.stream) < 62 * FRAME_SIZE  # to the end of the recording and of the silence
    assert voiced_level(tone(24_000)) < dbfs(tone(24_000))
    assert voiced_level(np.zeros(24_000, np.float32)) == -70


def test_an_answer_that_began_too_early_has_no_latency() -> None:
    answer = chat(Answering(wait=5, frames=12), tone(24_000))
    latency = answer.metrics["response_latency_ms"]
    assert latency.value is None and latency.reason.startswith("the answer began before")
    assert len(answer.stream) == (17 + 19) * FRAME_SIZE


def test_chat_waits_no_longer_than_its_cap() -> None:
    answer = chat(Answering(wait=10_000, frames=1), tone(2400), max_seconds=2)
    assert len(answer.stream) == (2 + 25) * FRAME_SIZE
    assert answer.metrics["answer_seconds"].value == 0
    assert answer.metrics["response_latency_ms"].reason == "no audible answer"
    assert len(answer.pcm) == len(answer.stream)


def test_chat_says_what_a_live_session_says() -> None:
    pcm = noise(10)
    answer = chat(EchoModel(), pcm, seed=4, max_seconds=0)
    with Engine(EchoModel(), slots=2) as engine:
        live, text = converse(engine, pcm, 4)
    np.testing.assert_array_equal(answer.stream, live)
    assert answer.text == text


def test_chat_needs_samples() -> None:
    with pytest.raises(UserError, match="no samples"):
        chat(EchoModel(), np.zeros(0, np.float32))


def test_pipeline_adds_the_codec() -> None:
    class Late(EchoModel):
        codec = type(EchoModel.codec)(delay=240)

    assert pipeline_ms(Late(), 30) == 80 + 80 + 10 + 30


def test_bench_measures_every_batch_size() -> None:
    assert bench.batch_sizes(6) == [1, 2, 4, 6]
    metrics = bench.frame_times(EchoModel(), slots=2, frames=5)
    assert metrics["real_time_slots"].value == 2
    p50, p95 = metrics["frame_ms_p50_b2"].value, metrics["frame_ms_p95_b2"].value
    assert p50 is not None and p95 is not None and 0 < p50 <= p95


@pytest.fixture(scope="module")
def duplex() -> Duplex:
    return small_duplex()


def test_the_real_model_talks_to_each_caller_as_if_alone(duplex: Duplex) -> None:
    pcm = noise(12)
    with Engine(duplex, slots=3) as engine:
        alone, text = converse(engine, pcm, 1)
        stop = threading.Event()

        def shout() -> None:
            other = engine.open(SessionParams(seed=9))
            while not stop.is_set():
                other.offer(noise(1, 5))
                other.poll()
            other.close()

        threads = [threading.Thread(target=shout) for _ in range(2)]
        for thread in threads:
            thread.start()
        together, same = converse(engine, pcm, 1)
        stop.set()
        for thread in threads:
            thread.join()
    assert same == text
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.abs(alone).max() > 0


def test_chat_with_the_real_model_is_a_live_session(duplex: Duplex) -> None:
    pcm = noise(12)
    answer = chat(duplex, pcm, seed=1, max_seconds=0)
    with Engine(duplex) as engine:
        live, text = converse(engine, pcm, 1)
    np.testing.assert_array_equal(answer.stream, live)
    assert answer.text == text.strip()
    assert answer.metrics["pipeline_ms_p50"].value is not None
