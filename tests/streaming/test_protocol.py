from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.errors import UserError
from streaming import protocol
from streaming.protocol import AudioFormat, Kind, ProtocolError, SessionParams

# The first example of a run pays for imports; a busy machine would miss a deadline.
relaxed = settings(deadline=None)
U32 = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
MESSAGES = st.one_of(
    st.builds(protocol.Handshake, U32, U32),
    st.builds(protocol.Audio, st.binary(max_size=64)),
    st.builds(protocol.Text, TEXT),
    st.builds(protocol.Control, st.sampled_from(protocol.Action)),
    st.builds(protocol.Metadata, st.dictionaries(TEXT, JSON, max_size=4)),
    st.builds(protocol.Error, TEXT),
    st.just(protocol.Ping()),
    st.builds(protocol.ColoredText, st.integers(0, 255), TEXT),
    st.builds(protocol.Unknown, st.integers(8, 255), st.binary(max_size=16)),
)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """The data in pieces of the given sizes, over and over."""
    pieces = []
    while data:
        for size in sizes:
            pieces.append(data[:size])
            data = data[size:]
    return pieces


def tone(samples: int, hertz: float = 300.0) -> protocol.Pcm:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / 24_000)).astype(np.float32)


@relaxed
@given(MESSAGES)
def test_wire_round_trip(message: protocol.Message) -> None:
    assert protocol.decode(protocol.encode(message)) == message


def test_bytes_are_those_of_the_public_protocol() -> None:
    assert protocol.encode(protocol.Handshake(1, 0x0203)) == bytes([0, 1, 0, 0, 0, 3, 2, 0, 0])
    assert protocol.encode(protocol.Audio(b"OggS")) == b"\x01OggS"
    assert protocol.encode(protocol.Text("é")) == b"\x02\xc3\xa9"
    assert protocol.encode(protocol.Control(protocol.Action.RESTART)) == b"\x03\x03"
    assert protocol.encode(protocol.Ping()) == b"\x06"
    assert protocol.encode(protocol.ColoredText(4, "x")) == b"\x07\x04x"


def test_a_handshake_may_be_its_kind_alone() -> None:
    assert protocol.decode(b"\x00") == protocol.Handshake(0, 0)


@relaxed
@given(st.integers(8, 255), st.binary(max_size=8))
def test_unknown_kinds_are_tolerated(kind: int, payload: bytes) -> None:
    assert protocol.decode(bytes([kind]) + payload) == protocol.Unknown(kind, payload)


def test_unknown_control_action_is_tolerated() -> None:
    assert protocol.decode(b"\x03\x09") == protocol.Unknown(Kind.CONTROL, b"\x09")


@relaxed
@given(st.binary(max_size=32))
def test_any_bytes_decode_or_raise_protocol_error(data: bytes) -> None:
    try:
        message = protocol.decode(data)
    except ProtocolError as error:
        assert str(error)
    else:
        assert protocol.decode(protocol.encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\x00\x01", b"\x02\xff", b"\x04[1]", b"\x04{", b"\x07"])
def test_broken_payloads_are_named(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"\w"):
        protocol.decode(data)


@relaxed
@given(
    st.lists(st.floats(-1, 1, width=32), max_size=50),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([AudioFormat.PCM_F32, AudioFormat.PCM_S16]),
)
def test_pcm_survives_any_fragmentation(
    samples: list[float], sizes: list[int], audio_format: AudioFormat
) -> None:
    pcm = np.array(samples, np.float32)
    data = protocol.audio_encoder(audio_format).encode(pcm)
    decoder = protocol.audio_decoder(audio_format)
    parts = [decoder.decode(piece) for piece in cut(data, sizes)]
    decoded = np.concatenate([np.zeros(0, np.float32), *parts])
    exact = audio_format is AudioFormat.PCM_F32
    np.testing.assert_allclose(decoded, pcm, rtol=0, atol=0 if exact else 0.51 / 32767)


def test_s16_clips() -> None:
    data = protocol.audio_encoder(AudioFormat.PCM_S16).encode(np.array([2, -2], np.float32))
    assert np.frombuffer(data, "<i2").tolist() == [32767, -32767]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pcm_that_is_not_finite_is_refused(value: float) -> None:
    decoder = protocol.audio_decoder(AudioFormat.PCM_F32)
    with pytest.raises(ProtocolError, match="finite"):
        decoder.decode(np.array([0, value], "<f4").tobytes())


@pytest.mark.parametrize("bytes_a_message", [7, 200, 4096])
@pytest.mark.parametrize("samples_a_write", [1920, 480, 777])
def test_opus_round_trip(bytes_a_message: int, samples_a_write: int) -> None:
    pcm = tone(24_000)
    encoder, decoder = (
        protocol.audio_encoder(AudioFormat.OPUS),
        protocol.audio_decoder(AudioFormat.OPUS),
    )
    data = b"".join(
        encoder.encode(pcm[i : i + samples_a_write]) for i in range(0, len(pcm), samples_a_write)
    )
    assert data.startswith(b"OggS")
    decoded = np.concatenate([decoder.decode(piece) for piece in cut(data, [bytes_a_message])])
    # All but a packet that is not full yet comes back, a codec's look-ahead later.
    assert len(pcm) - 1920 < len(decoded) <= len(pcm)
    correlation = [float(pcm[4000:16_000] @ decoded[4000 + d : 16_000 + d]) for d in range(240)]
    assert max(correlation) > 0.95 * float(pcm[4000:16_000] @ pcm[4000:16_000])


def test_an_opus_message_may_hold_a_whole_recording_but_no_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pcm = np.tile(tone(24_000), 8)
    data = protocol.audio_encoder(AudioFormat.OPUS).encode(pcm)
    decoded = protocol.audio_decoder(AudioFormat.OPUS).decode(data)
    assert len(pcm) - 1920 < len(decoded) <= len(pcm)
    monkeypatch.setattr(protocol.OpusDecoder, "LONGEST", 3)
    with pytest.raises(ProtocolError, match="at most 3 s of sound"):
        protocol.audio_decoder(AudioFormat.OPUS).decode(data)


def test_bad_opus_page_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="Ogg-Opus"):
        protocol.audio_decoder(AudioFormat.OPUS).decode(b"no page at all" * 20)


def test_query_of_public_clients() -> None:
    query = protocol.parse_query(
        {
            "text_temperature": "0.7",
            "text_topk": "25",
            "audio_temperature": "0.8",
            "audio_topk": "250",
            "pad_mult": "0",
            "text_seed": "12",
            "audio_seed": "34",
            "repetition_penalty": "1.0",
            "repetition_penalty_context": "64",
            "of_a_newer_client": "x",
        }
    )
    assert query.format is AudioFormat.OPUS
    assert query.params.given() == {
        "seed": (12 * 1_000_003 + 34) % 2**31,
        "text_temperature": 0.7,
        "audio_temperature": 0.8,
        "text_topk": 25,
        "audio_topk": 250,
    }
    assert query.ignored == ("pad_mult", "repetition_penalty", "repetition_penalty_context")


def test_negative_public_seed_means_any() -> None:
    assert protocol.parse_query({"text_seed": "-1", "audio_seed": "5"}).params.seed is None


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"format": "mp3"}, "format='mp3' .* opus, pcm_f32, pcm_s16"),
        ({"seed": "many"}, "seed='many' is not a whole number"),
        ({"seed": "-3"}, "seed=-3 is out of range"),
        ({"text_temperature": "nan"}, "text_temperature=nan is out of range"),
        ({"audio_topk": "-1"}, "audio_topk=-1 is out of range"),
    ],
)
def test_bad_query_is_one_sentence(query: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        protocol.parse_query(query)


def test_params_given_leaves_out_none() -> None:
    assert SessionParams(seed=0).given() == {"seed": 0}


def test_client_side_imports_no_torch() -> None:
    code = (
        "import sys, streaming.protocol, streaming.client, streaming.audio_io;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
