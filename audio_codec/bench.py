"""How fast a codec encodes and decodes, against public ones, in one process and in turns.

    round 1   ours │ encodec │ mimi │ ours │ encodec │ mimi     frames of 80 ms, then whole sounds
    round 2   ours │ encodec │ …

A turn is a few frames, so that whatever else the machine does slows all contestants alike, and a
ratio is taken within its round. The first frame of a turn is not counted: it finds the caches of
the processor full of somebody else's weights, which a codec in service does not. Python's
collector of cycles leaves alone what was loaded, as it does in `speechlm serve`. Ours, which is
several times as fast as the others, gets `OWN_SHARE` times their frames: its turn then takes about
as long as theirs, and of one frame in a hundred a few hundred can tell. Each figure says of how
many trials it is (n).

Peers have the true architecture and random weights: speed does not depend on what weights say. All
compute in float32, but they do not read the same: a live frame of ours runs through compiled loops
(`kernels`) over weights as they are stored, int8 in the shipped codec, where the peers read float32
by torch's operations; ours does so too where a whole sound is too wide for the loops. Of a peer
with several implementations the fastest counts, setting by setting. Mimi's are that of
`transformers`, ours, and the public package `moshi` where it can be imported; it asks for an older
torch, but runs with this one when installed apart, without what it asks for:

    speechlm bench codec --against encodec mimi
    uv pip install --no-deps --target side moshi einops
    NO_TORCH_COMPILE=1 PYTHONPATH=side speechlm bench codec --against encodec mimi

Shapes: B batch, S samples, T frames, K codebooks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from audio_codec.codec import Codec
from audio_codec.encodec import random_encodec
from audio_codec.errors import UserError
from audio_codec.layers import lay_out
from audio_codec.mimi import MimiCodec, MimiConfig
from audio_codec.state import State, all_active

OURS: Final = "ours"
THREADS: Final = (1, 2)
BATCHES: Final = (1, 8)
HEADLINE: Final = (2, 1)
"""Threads and batch of the figures without a suffix: one conversation on two cores."""

ROUNDS: Final = 10
OWN_SHARE: Final = 5
"""Frames and sounds of ours for each of a peer's."""
OFFLINE_SECONDS: Final = 2.0
"""Length of a whole sound; a peer codes one a round."""


@dataclass
class CachedState(State):
    """What transformers keeps of a stream."""

    keys: Any  # its cache of keys and values
    convolutions: Any = None  # its cache of the convolutions' past; None before the first chunk


class TransformersMimi:
    """`transformers.MimiModel` with random weights as a `Codec`; Moshi's 8 codebooks, 1.1 kbit/s.

    The encoder streams, with the model's own caches of keys and of convolutions. Of the decoder
    only the transformer does: the model has no cache for its transposed convolutions, which start
    every chunk from zeros. The work is that of a stream all the same.
    """

    sample_rate = SAMPLE_RATE
    frame_size = FRAME_SIZE
    delay = 0

    def __init__(self) -> None:
        from transformers import MimiConfig, MimiModel

        model: Any = MimiModel(MimiConfig())
        self.model = model.eval().requires_grad_(False)
        for module in self.model.quantizer.modules():
            if isinstance(getattr(module, "embed_sum", None), Tensor):
                module.embed_sum.normal_()  # zeros, until somebody trains them

    @property
    def codebooks(self) -> tuple[tuple[int, ...], ...]:
        """Factor sizes of each of the K codebooks."""
        return ((self.model.config.codebook_size,),) * 8

    def encode(self, pcm: Tensor, state: CachedState | None = None) -> Tensor:
        """Waveform [B, 1, S] → codes [B, K, T]."""
        levels = len(self.codebooks)
        if state is None:
            return self.model.encode(pcm, num_quantizers=levels).audio_codes
        made = self.model.encode(
            pcm,
            num_quantizers=levels,
            encoder_past_key_values=state.keys,
            padding_cache=state.convolutions,
            use_streaming=True,
        )
        state.convolutions = made.padding_cache
        return made.audio_codes

    def decode(self, codes: Tensor, state: CachedState | None = None) -> Tensor:
        """Codes [B, K, T] → waveform [B, 1, S]."""
        keys = None if state is None else state.keys
        return self.model.decode(codes, decoder_past_key_values=keys).audio_values

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> CachedState:
        """Empty caches; they grow to the window of the attention."""
        from transformers import DynamicCache

        return CachedState(all_active(batch), DynamicCache(config=self.model.encoder.config))

    def new_decoder_state(self, batch: int, max_chunk: int = 1) -> CachedState:
        """Likewise."""
        from transformers import DynamicCache

        return CachedState(all_active(batch), DynamicCache(config=self.model.decoder.config))


@dataclass
class HiddenState(State):
    """What the package `moshi` keeps of a stream, which it hides on its modules."""

    hidden: Any


class PublicMimi:
    """Mimi of the package `moshi` with random weights as a `Codec`; Moshi's 8 codebooks."""

    sample_rate = SAMPLE_RATE
    frame_size = FRAME_SIZE
    delay = 0

    def __init__(self) -> None:
        from moshi.models import loaders

        self.model: Any = loaders.get_mimi(None, num_codebooks=8)

    @property
    def codebooks(self) -> tuple[tuple[int, ...], ...]:
        """Factor sizes of each of the K codebooks."""
        return ((self.model.cardinality,),) * 8

    def encode(self, pcm: Tensor, state: HiddenState | None = None) -> Tensor:
        """Waveform [B, 1, S] → codes [B, K, T]."""
        with self._resumed(state):
            return self.model.encode(pcm)

    def decode(self, codes: Tensor, state: HiddenState | None = None) -> Tensor:
        """Codes [B, K, T] → waveform [B, 1, S]."""
        with self._resumed(state):
            return self.model.decode(codes)

    def _resumed(self, state: HiddenState | None) -> ExitStack:
        """Within it the model goes on with a stream; without a state it hears all at once."""
        stack = ExitStack()
        if state is not None:
            self.model.set_streaming_state(state.hidden)
            stack.callback(self.model._stop_streaming)
        return stack

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> HiddenState:
        """State of encoder and decoder, as the package has no other."""
        with self.model.streaming(batch):
            return HiddenState(all_active(batch), self.model.get_streaming_state())

    new_decoder_state = new_encoder_state


def _random_mimi() -> MimiCodec:
    """Ours of the same architecture and bitrate."""
    codec = MimiCodec(MimiConfig(num_quantizers=8)).eval().requires_grad_(False)
    lay_out(codec)  # as `load_codec` does
    return codec


PEERS: Final[Mapping[str, Mapping[str, Callable[[], Codec]]]] = {
    # Its lowest bandwidth is the nearest to ours, and the quickest.
    "encodec": {"encodec": lambda: random_encodec(1.5)},
    "mimi": {
        "mimi_transformers": TransformersMimi,
        "mimi": _random_mimi,
        **({"mimi_public": PublicMimi} if find_spec("moshi") else {}),
    },
}
"""Peer → its implementations, each under the name of its figures."""


@dataclass(frozen=True)
class Figure:
    """A measured number, its 95% interval where one is meant, and the number of trials."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""


@dataclass
class Times:
    """Seconds that one contestant took for one kind of trial, round by round."""

    encode: list[list[float]] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)

    def add(self, trials: Sequence[tuple[float, float]]) -> None:
        """Take in a round: (encoding, decoding) of each trial."""
        self.encode.append([encoding for encoding, _ in trials])
        self.decode.append([decoding for _, decoding in trials])

    def both(self) -> list[list[float]]:
        """Encode + decode of each trial."""
        return [
            [e + d for e, d in zip(*both, strict=True)]
            for both in zip(self.encode, self.decode, strict=True)
        ]

    def per_round(self) -> list[float]:
        """Median trial of each round."""
        return [float(np.median(trials)) for trials in self.both()]


@dataclass
class Contest:
    """What one contestant took in one setting."""

    frames: Times = field(default_factory=Times)
    """Of a stream."""
    sounds: Times = field(default_factory=Times)
    """Whole ones, `OFFLINE_SECONDS` long."""


Setting = tuple[int, int]
"""(threads, batch)."""


def measure(
    load: Callable[[], Codec],
    against: Sequence[str],
    frames: int = 100,
    peers: Mapping[str, Mapping[str, Callable[[], Codec]]] = PEERS,
) -> dict[str, Figure]:
    """Time a codec and its peers, in every setting of threads and batch.

    `frames` are timed of every peer in every setting, and `OWN_SHARE` times as many of ours.

    Gives, on two threads with a batch of one: `speed_vs_PEER`, how many times longer the fastest
    implementation of a peer takes to encode and decode a frame in a stream (the median of the
    rounds' ratios), `offline_speed_vs_PEER` the same for whole sounds, and `frame_ms_p50` and
    `frame_ms_p99` of this codec. Then, for every contestant and setting, with the suffix `_tN_bM`:
    of a frame `encode_ms`, `decode_ms` and `frame_ms` for both (p50, p99), of a whole sound
    `offline_encode_ms`, `offline_decode_ms` and `offline_ms` (p50, p90: there are fewer), and
    `real_time_factor`, seconds of computing a second of the clock (all streams of the batch in
    step; below 1 keeps up), streaming and offline.

    Raises UserError for a peer that is not known, and where `load` does.
    """
    assert frames >= ROUNDS, frames
    for peer in against:
        if peer not in peers:
            raise UserError(f"peer '{peer}' is unknown; choices: {', '.join(peers)}.")
    chosen = {peer: peers[peer] for peer in dict.fromkeys(against)}
    contestants = {OURS: load()}
    for implementations in chosen.values():
        contestants |= {name: build() for name, build in implementations.items()}
    gc.collect()
    gc.freeze()
    before = torch.get_num_threads()
    times: dict[Setting, dict[str, Contest]] = {}
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            for batch in BATCHES:
                times[threads, batch] = in_turns(contestants, batch, frames // ROUNDS)
    finally:
        torch.set_num_threads(before)
        gc.unfreeze()
    return figures(times, {peer: list(names) for peer, names in chosen.items()})


@torch.inference_mode()
def in_turns(
    contestants: Mapping[str, Codec], batch: int, turn: int, rounds: int = ROUNDS
) -> dict[str, Contest]:
    """Every round, each contestant streams `turn` frames; then each codes a whole sound.

    Ours does `OWN_SHARE` times as much of either.
    """
    generator = torch.Generator().manual_seed(0)
    times = {name: OWN_SHARE if name == OURS else 1 for name in contestants}
    longest = (turn * max(times.values()) + 1) * FRAME_SIZE
    sound = 0.05 * torch.randn(batch, 1, longest, generator=generator)
    whole_frames = round(OFFLINE_SECONDS * FRAME_RATE)
    whole = 0.05 * torch.randn(batch, 1, whole_frames * FRAME_SIZE, generator=generator)
    states = {}
    for name, codec in contestants.items():
        chunk = FRAME_SIZE // codec.frame_size
        states[name] = codec.new_encoder_state(batch, chunk), codec.new_decoder_state(batch, chunk)
    found = {name: Contest() for name in contestants}
    for _ in range(rounds):
        for name, codec in contestants.items():
            frames = sound[..., : (turn * times[name] + 1) * FRAME_SIZE].split(FRAME_SIZE, 2)
            found[name].frames.add([_code(codec, frame, *states[name]) for frame in frames][1:])
        for name, codec in contestants.items():
            found[name].sounds.add([_code(codec, whole) for _ in range(times[name])])
    return found


def _code(
    codec: Codec, sound: Tensor, encoder: State | None = None, decoder: State | None = None
) -> tuple[float, float]:
    """Seconds that encoding and decoding of a sound [B, 1, S] take."""
    begin = time.perf_counter()
    codes = codec.encode(sound, encoder)
    middle = time.perf_counter()
    codec.decode(codes, decoder)
    return middle - begin, time.perf_counter() - middle


def figures(
    times: Mapping[Setting, Mapping[str, Contest]], peers: Mapping[str, Sequence[str]]
) -> dict[str, Figure]:
    """What `measure` gives, from the times of all contestants; `peers`: peer → its names there."""
    threads, batch = HEADLINE
    first, rest = {}, {}
    for setting, found in times.items():
        suffix = f"_t{setting[0]}_b{setting[1]}"
        for peer, names in peers.items():
            rest[f"speed_vs_{peer}{suffix}"] = _ratio(
                [found[name].frames.per_round() for name in names], found[OURS].frames.per_round()
            )
            rest[f"offline_speed_vs_{peer}{suffix}"] = _ratio(
                [found[name].sounds.per_round() for name in names], found[OURS].sounds.per_round()
            )
        for name, took in found.items():
            frames, sounds = took.frames, took.sounds
            rest |= _percentiles(f"{name}_encode_ms", frames.encode, suffix)
            rest |= _percentiles(f"{name}_decode_ms", frames.decode, suffix)
            rest |= _percentiles(f"{name}_frame_ms", frames.both(), suffix)
            rest |= _percentiles(f"{name}_offline_encode_ms", sounds.encode, suffix, last=90)
            rest |= _percentiles(f"{name}_offline_decode_ms", sounds.decode, suffix, last=90)
            rest |= _percentiles(f"{name}_offline_ms", sounds.both(), suffix, last=90)
            rest[f"{name}_real_time_factor{suffix}"] = Figure(
                float(np.mean(frames.both())) * FRAME_RATE, n=np.size(frames.encode)
            )
            rest[f"{name}_offline_real_time_factor{suffix}"] = Figure(
                float(np.median(sounds.both())) / OFFLINE_SECONDS, n=np.size(sounds.encode)
            )
    suffix = f"_t{threads}_b{batch}"
    for peer in peers:
        for name in (f"speed_vs_{peer}", f"offline_speed_vs_{peer}"):
            first[name] = rest.pop(name + suffix)
    for p in ("p50", "p99"):
        first[f"frame_ms_{p}"] = rest[f"{OURS}_frame_ms_{p}{suffix}"]
    return first | rest


def _percentiles(
    name: str, seconds: list[list[float]], suffix: str, last: int = 99
) -> dict[str, Figure]:
    """The median and the `last` percentile of all rounds together."""
    n = np.size(seconds)
    return {
        f"{name}_p{p}{suffix}": Figure(1000 * float(np.percentile(seconds, p)), n=n, unit="ms")
        for p in (50, last)
    }


def _ratio(theirs: Sequence[Sequence[float]], ours: Sequence[float]) -> Figure:
    """Median over the rounds of (fastest implementation / ours), with its bootstrap interval."""
    fastest = min(theirs, key=lambda rounds: float(np.median(rounds)))
    ratios = np.divide(fastest, ours)
    picks = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Figure(float(np.median(ratios)), float(low), float(high), len(ratios), "×")
