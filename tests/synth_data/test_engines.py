"""Neural engines, servers, the guard and the cache: the same bytes, or one clear sentence."""

from __future__ import annotations

import ctypes.util
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_codec.audio import SAMPLE_RATE
from audio_codec.errors import UserError
from synth_data.recipes.speech import SpeechConfig, build_speech
from synth_data.shards import read
from synth_data.text import tokenize
from synth_data.tts import (
    Cached,
    EngineFailure,
    InProcess,
    Isolated,
    SynthesisConfig,
    Utterance,
    Voice,
    get_engine,
    get_synthesizer,
    speak,
)
from synth_data.tts.piper import Piper
from synth_data.tts.speech import sixteen_bit, spread

flite = pytest.mark.skipif(ctypes.util.find_library("flite") is None, reason="needs flite")


# --- Estimated times ------------------------------------------------------------------------------


def test_estimated_words_share_the_sound_by_their_length() -> None:
    pcm = np.zeros(4000, np.float32)
    pcm[1000:3000] = 0.5
    words = spread(tokenize("I know why."), pcm, 1000)
    assert [word.text for word in words] == ["i", "know", "why"]
    assert words[0].start == 1 and words[-1].end == 3
    assert [round(word.end - word.start, 3) for word in words] == [0.364, 0.909, 0.727]
    assert spread(tokenize("silence"), np.zeros(500, np.float32), 1000)[0].end == 0.5


# --- Piper ----------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(kind: str, inputs: list[str], output: str, attribute: bytes = b"") -> bytes:
    names = b"".join(_field(1, name) for name in inputs) + _field(2, output)
    return _field(1, names + _field(4, kind) + (_field(5, attribute) if attribute else b""))


def _constant(name: str, values: np.ndarray) -> bytes:
    dims = b"".join(_field(1, size) for size in values.shape)
    kind = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}[values.dtype]
    return _field(5, dims + _field(2, kind) + _field(8, name) + _field(9, values.tobytes()))


def _port(number: int, name: str, kind: int, *dims: str) -> bytes:
    shape = b"".join(_field(1, _field(2, dim)) for dim in dims)
    return _field(
        number, _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, shape)))
    )


def piper_voice(folder: Path, speakers: int = 1, aligned: bool = True) -> Path:
    """A voice of Piper's format: each letter is 256 samples of a tone as loud as its number."""
    tone = np.sin(np.arange(256) / 4).astype(np.float32)[None, None]
    graph = (
        _node("Cast", ["input"], "x", _field(1, "to") + _field(3, 1) + _field(20, 2))
        + _node("Unsqueeze", ["x", "last"], "column")
        + _node("Mul", ["column", "tone"], "tones")
        + _node("Reshape", ["tones", "flat"], "output")
        + _field(2, "voice")
        + _constant("last", np.array([2], np.int64))
        + _constant("tone", tone)
        + _constant("flat", np.array([1, -1], np.int64))
        + _port(11, "input", 7, "b", "t")
        + _port(11, "input_lengths", 7, "b")
        + _port(11, "scales", 1, "three")
        + (_port(11, "sid", 7, "b") if speakers > 1 else b"")
        + _port(12, "output", 1, "b", "s")
    )
    if aligned:  # Frames of a letter: the length scale.
        graph += (
            _node("Pow", ["x", "nought"], "ones")
            + _node("Gather", ["scales", "one"], "length")
            + _node("Mul", ["ones", "length"], "durations")
            + _constant("nought", np.zeros(1, np.float32))
            + _constant("one", np.array([1], np.int64))
            + _port(12, "durations", 1, "b", "t")
        )
    path = folder / "voice.onnx"
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    symbols = "_^$ .,?abcdefghijklmnopqrstuvwxyzT"
    config = {
        "num_symbols": len(symbols),
        "num_speakers": speakers,
        "audio": {"sample_rate": 16_000},
        "espeak": {"voice": "en-us"},
        "phoneme_type": "text",
        "phoneme_id_map": {symbol: [number] for number, symbol in enumerate(symbols)},
    }
    (folder / "voice.onnx.json").write_text(json.dumps(config))
    return path


def test_piper_speaks_with_the_times_of_its_model(tmp_path: Path) -> None:
    pytest.importorskip("piper")
    voice = Voice("piper", str(piper_voice(tmp_path)))
    made = get_engine("piper").synthesize("The hot tea.", voice)
    assert made.sample_rate == 16_000 and not made.estimated
    assert [word.text for word in made.words] == ["the", "hot", "tea"]
    # Beginning and its padding, then a letter and its padding at a time.
    step = 256 / 16_000
    assert [word.start / step for word in made.words] == pytest.approx([2, 10, 18])
    assert [word.end / step for word in made.words] == pytest.approx([8, 16, 24])
    np.testing.assert_array_equal(made.pcm, sixteen_bit(made.pcm))
    again = get_engine("piper").synthesize("The hot tea.", voice)
    np.testing.assert_array_equal(made.pcm, again.pcm)
    quick = get_engine("piper").synthesize("The hot tea.", Voice("piper", voice.name, rate=2))
    assert quick.words[-1].end == pytest.approx(made.words[-1].end / 2)
    assert speak("The hot tea.", voice).sample_rate == SAMPLE_RATE


def test_piper_times_are_estimated_where_the_model_tells_none(tmp_path: Path) -> None:
    pytest.importorskip("piper")
    path = piper_voice(tmp_path, speakers=3, aligned=False)
    made = get_engine("piper").synthesize("The hot tea.", Voice("piper", f"{path}#2"))
    assert made.estimated and [word.text for word in made.words] == ["the", "hot", "tea"]
    with pytest.raises(UserError, match=r"speaker '3'; choose 0\.\.2"):
        get_engine("piper").synthesize("hot", Voice("piper", f"{path}#3"))


def test_piper_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("piper")
    with pytest.raises(UserError, match=r"no\.onnx"):
        get_engine("piper").synthesize("hot", Voice("piper", str(tmp_path / "no.onnx")))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "bad.onnx.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.onnx"):
        get_engine("piper").synthesize("hot", Voice("piper", str(tmp_path / "bad.onnx")))
    with pytest.raises(UserError, match="no word"):
        get_engine("piper").synthesize("?!", Voice("piper", str(tmp_path / "bad.onnx")))
    monkeypatch.setitem(sys.modules, "piper", None)
    with pytest.raises(UserError, match="pip install piper-tts"):
        Piper()


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VITS of 28,000 random parameters and three speakers."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder = tmp_path_factory.mktemp("vits")
    letters = folder / "letters.json"
    letters.write_text(json.dumps({c: i for i, c in enumerate("_ 'abcdefghijklmnopqrstuvwxyz-")}))
    tokenizer = VitsTokenizer(
        str(letters), phonemize=False, is_uroman=False, pad_token="_", unk_token="_"
    )
    config = VitsConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, window_size=2,
        ffn_dim=16, flow_size=16, spectrogram_bins=9, num_speakers=3, speaker_embedding_size=8,
        upsample_initial_channel=16, upsample_rates=[8, 4, 2, 2],
        upsample_kernel_sizes=[16, 8, 4, 4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
        depth_separable_num_layers=1, duration_predictor_num_flows=2,
        duration_predictor_filter_channels=16, duration_predictor_flow_bins=4,
        wavenet_dilation_rate=1,
    )  # fmt: skip
    torch.manual_seed(0)
    VitsModel(config).eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def test_transformers_models_speak(vits: Path, tmp_path: Path) -> None:
    engine = get_engine("transformers")
    voice = Voice("transformers", f"{vits}#1")
    made = engine.synthesize("Hello there, you.", voice)
    assert made.sample_rate == 16_000 and made.estimated and len(made.pcm) > 1000
    assert [word.text for word in made.words] == ["hello", "there", "you"]
    np.testing.assert_array_equal(made.pcm, sixteen_bit(made.pcm))
    torch.manual_seed(7)  # Whoever draws elsewhere changes nothing here, and is not disturbed.
    before = torch.get_rng_state()
    engine.synthesize("Something in between.", Voice("transformers", f"{vits}#0", rate=0.7))
    np.testing.assert_array_equal(made.pcm, engine.synthesize("Hello there, you.", voice).pcm)
    assert torch.equal(torch.get_rng_state(), before)
    other = engine.synthesize("Hello there, you.", Voice("transformers", f"{vits}#2"))
    assert other.pcm.tobytes() != made.pcm.tobytes()
    slow = engine.synthesize("Hello there, you.", Voice("transformers", f"{vits}#1", rate=0.5))
    assert len(slow.pcm) > len(made.pcm)
    moved = tmp_path / "elsewhere"
    shutil.copytree(vits, moved)
    again = engine.synthesize("Hello there, you.", Voice("transformers", f"{moved}#1"))
    np.testing.assert_array_equal(made.pcm, again.pcm)


def test_transformers_names_what_is_wrong(vits: Path, tmp_path: Path) -> None:
    engine = get_engine("transformers")
    with pytest.raises(UserError, match=r"speaker 'ann'; choose 0\.\.2"):
        engine.synthesize("hello", Voice("transformers", f"{vits}#ann"))
    with pytest.raises(UserError, match="no text-to-speech checkpoint"):
        engine.synthesize("hello", Voice("transformers", str(tmp_path)))
    assert engine.version(Voice("transformers", f"{vits}#1")) == engine.version(
        Voice("transformers", str(vits))
    )


# --- A server -------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Speaks a tone a word; ``script`` says what it does instead, request by request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closing = threading.Event()

    @property
    def voice(self) -> Voice:
        return Voice("http", f"http://127.0.0.1:{self.server_port}/speech?model=tone#ann")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        what = self.server.script.pop(0) if self.server.script else "speak"
        if what == "hang":
            self.server.closing.wait(60)
            return
        if what.isdecimal():
            self.send_error(int(what))
            return
        words = len(body["input"].split())
        pcm = 0.3 * np.sin(np.arange(2000 * words) / 5)
        sound = io.BytesIO()
        soundfile.write(sound, pcm, 16_000, format="WAV", subtype="PCM_16")
        self.send_response(200)
        if what == "short":  # it promises more than it sends
            self.send_header("Content-Length", "999999")
        self.end_headers()
        self.wfile.write(b"no sound" if what == "noise" else sound.getvalue())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def test_a_server_speaks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHLM_TTS_KEY", "secret")
    voice = Voice("http", server.voice.name, rate=1.5)
    made = get_engine("http").synthesize("Hello there, you.", voice)
    assert made.sample_rate == 16_000 and len(made.pcm) == 6000 and made.estimated
    assert [word.text for word in made.words] == ["hello", "there", "you"]
    assert server.asked == [
        {"input": "Hello there, you.", "voice": "ann", "model": "tone", "speed": 1.5,
         "response_format": "wav"}
    ]  # fmt: skip
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("what", "passing"),
    [
        ("404", False),
        ("400", False),
        ("429", True),
        ("503", True),
        ("noise", True),
        ("short", True),
    ],
)
def test_a_server_that_fails(server: Server, what: str, passing: bool) -> None:
    server.script = [what]
    with pytest.raises(UserError, match="127.0.0.1") as raised:
        get_engine("http").synthesize("hello", server.voice)
    assert isinstance(raised.value, EngineFailure) == passing


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EngineFailure, match="no answer"):
        get_engine("http").synthesize("hello", Voice("http", "http://127.0.0.1:9/speech#ann"))
    with pytest.raises(UserError, match="is no address"):
        get_engine("http").synthesize("hello", Voice("http", "http://127.0.0.1:8o0/speech#ann"))
    with pytest.raises(UserError, match="begin with http"):
        get_engine("http").synthesize("hello", Voice("http", "host/speech#ann"))
    with pytest.raises(UserError, match="no word"):
        get_engine("http").synthesize("", Voice("http", "http://127.0.0.1:9/speech#ann"))


# --- The guard ------------------------------------------------------------------------------------


@pytest.fixture
def isolated() -> Iterator[Isolated]:
    guard = Isolated(seconds=1.0, attempts=3)
    yield guard
    guard.close()


def test_a_hanging_engine_is_tried_again_then_given_up(server: Server, isolated: Isolated) -> None:
    server.script = ["speak", "hang", "503", "speak", "hang", "503", "hang", "speak"]
    first = isolated.synthesize("hello there", server.voice)
    assert isinstance(first, Utterance) and not isolated.counts
    again = isolated.synthesize("hello there", server.voice)
    np.testing.assert_array_equal(again.pcm, first.pcm)
    assert isolated.counts == {"retried": 2}
    started = time.monotonic()
    with pytest.raises(EngineFailure, match="given up after 3 tries.*took longer than 1 s"):
        isolated.synthesize("hello there", server.voice)
    assert time.monotonic() - started < 30
    assert isolated.counts == {"retried": 4, "failed": 1}
    assert isolated.synthesize("good bye", server.voice).words[1].text == "bye"


def test_an_engine_that_dies_is_started_again(server: Server, isolated: Isolated) -> None:
    isolated.synthesize("hello", server.voice)
    assert isolated._child is not None and isolated._child.pid is not None
    os.kill(isolated._child.pid, signal.SIGKILL)
    assert isolated.synthesize("hello", server.voice).words[0].text == "hello"
    assert isolated.counts == {"retried": 1}


def test_a_mistake_is_not_tried_again(server: Server, isolated: Isolated) -> None:
    server.script = ["404"]
    for text in ("hello", "?!"):
        with pytest.raises(UserError) as raised:
            isolated.synthesize(text, server.voice)
        assert not isinstance(raised.value, EngineFailure)
    assert not isolated.counts and len(server.asked) == 1


def test_a_build_skips_and_counts_what_no_engine_speaks(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One two.\nThree four.\nFive six.\n")
    config = SpeechConfig.model_validate(
        {
            "output": tmp_path / "out",
            "sources": [{"kind": "text", "path": tmp_path / "a.txt", "licence": "CC0-1.0"}],
            "utterances": 3,
            "voices": [str(server.voice)],
            "jitter": False,
            "synthesis": {"seconds": 0.7, "attempts": 2, "cache": tmp_path / "cache"},
        }
    )
    server.script = ["speak", "speak", "hang", "503"]  # The first is a trial of the voice.
    report = build_speech(config)
    assert report.samples == 2 and len(report.dropped) == 1
    assert "given up after 2 tries" in report.dropped[0].reason
    assert len(list(read(tmp_path / "out"))) == 2
    cached = get_synthesizer(config.synthesis)
    assert isinstance(cached, Cached) and isinstance(cached.inner, Isolated)
    assert cached.counts == {"made": 3} and cached.inner.counts == {"retried": 1, "failed": 1}
    cached.inner.close()


# --- The cache ------------------------------------------------------------------------------------


class Counting(InProcess):
    """Counts what is really spoken."""

    def __init__(self) -> None:
        self.spoken = 0

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        self.spoken += 1
        return super().synthesize(text, voice)


@flite
@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "another"])
def test_a_broken_entry_is_made_again(tmp_path: Path, harm: str) -> None:
    inner = Counting()
    cached = Cached(inner, tmp_path)
    voice = Voice("flite", "kal16")
    plain = get_engine("flite").synthesize("hello there", voice)
    first, second = (cached.synthesize("hello there", voice) for _ in range(2))
    for made in (first, second):
        np.testing.assert_array_equal(made.pcm, plain.pcm)
        assert (made.words, made.sample_rate, made.estimated) == (
            plain.words, plain.sample_rate, plain.estimated,
        )  # fmt: skip
    assert cached.counts == {"made": 1, "found": 1} and inner.spoken == 1

    path = cached.path("hello there", voice)
    data = path.read_bytes()
    middle = len(data) // 2
    if harm == "another":
        with path.open("wb") as opened:
            np.savez(opened, other=np.zeros(3))
    else:
        path.write_bytes(
            {
                "truncated": data[:-100],
                "empty": b"",
                "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            }[harm]
        )
    np.testing.assert_array_equal(cached.synthesize("hello there", voice).pcm, plain.pcm)
    assert cached.counts == {"made": 2, "found": 1, "broken": 1}
    np.testing.assert_array_equal(cached.synthesize("hello there", voice).pcm, plain.pcm)
    assert cached.counts["found"] == 2


@flite
def test_a_key_is_engine_version_voice_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = Cached(InProcess(), tmp_path)
    voice = Voice("flite", "kal16")
    paths = [
        cached.path("one", voice),
        cached.path("two", voice),
        cached.path("one", Voice("flite", "kal16", rate=1.1)),
        cached.path("one", Voice("flite", "kal")),
    ]
    monkeypatch.setattr(InProcess, "version", lambda self, voice: "another")
    paths.append(cached.path("one", voice))
    assert len(set(paths)) == 5


@flite
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        Cached(InProcess(), tmp_path / "file").synthesize("one", Voice("flite", "kal16"))


def test_settings_choose_the_layers(tmp_path: Path) -> None:
    assert isinstance(get_synthesizer(SynthesisConfig()), InProcess)
    cached = get_synthesizer(SynthesisConfig(cache=tmp_path))
    assert isinstance(cached, Cached) and isinstance(cached.inner, InProcess)
    assert get_synthesizer(SynthesisConfig(cache=tmp_path)) is cached
