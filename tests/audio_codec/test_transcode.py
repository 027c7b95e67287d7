"""Codes in files: those of the whole sound, written as a stream, refused when they do not fit."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small import small_codec

from audio_codec import audio, transcode
from audio_codec.errors import UserError
from audio_codec.spectral import SpectralCodec
from audio_codec.transcode import DECODE, ENCODE


@pytest.fixture(scope="module")
@torch.no_grad()
def codec() -> SpectralCodec:
    """A small codec that uses all of its codebooks."""
    model = small_codec()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    for size, level in enumerate(model.quantizer.levels):
        level.codebook.copy_(torch.randn_like(level.codebook) / 2**size)
    tokenizer, noise = model.tokenizer, torch.from_numpy(sound(4, seed=1))[None, None]
    numbers = tokenizer.features(tokenizer.mel(noise))
    tokenizer.quantizer.mean.copy_(numbers.mean((0, 1)))
    tokenizer.quantizer.variance.copy_(numbers.var((0, 1)))
    return model.requires_grad_(False)


def sound(seconds: float, rate: int = 24_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def offline(codec: SpectralCodec, pcm: np.ndarray) -> np.ndarray:
    """Codes [K, T] of the whole sound at once."""
    whole = np.pad(pcm, (0, -len(pcm) % codec.frame_size))
    with torch.inference_mode():
        return codec.encode(torch.from_numpy(whole)[None, None])[0].numpy()


@pytest.fixture
def blocks_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcode, "BLOCK_SECONDS", 1.0)


@pytest.mark.usefixtures("blocks_of_a_second")
@pytest.mark.parametrize("rate", [24_000, 44_100, 8_000])
def test_codes_are_those_of_the_whole_file(codec: SpectralCodec, tmp_path: Path, rate: int) -> None:
    # Past ten seconds, so that the file is read in blocks too and the attention's window wraps.
    soundfile.write(tmp_path / "a.wav", np.stack([sound(12.345, rate)] * 2, axis=1), rate)
    pcm = audio.load(tmp_path / "a.wav")
    header = transcode.encode(codec, tmp_path / "a.wav", tmp_path / "a.npz")
    assert (header.samples, header.frames, header.sizes) == (len(pcm), 155, (9, 16, 16))
    assert header == transcode.read_header(tmp_path / "a.npz")
    expected = offline(codec, pcm)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["codes"].dtype == np.uint16
        np.testing.assert_array_equal(archive["codes"], expected)
        assert int(archive["samples"]) == len(pcm) and str(archive["codec"]) == "SpectralCodec"
    assert len(np.unique(expected)) > 8

    transcode.decode(codec, tmp_path / "a.npz", tmp_path / "b.wav")
    with torch.inference_mode():
        heard = codec.decode(torch.from_numpy(expected)[None])[0, 0, : len(pcm)].numpy()
    back = audio.load(tmp_path / "b.wav")
    np.testing.assert_allclose(back, heard.clip(-1, 1), atol=1e-4)


def test_equal_sound_gives_equal_bytes(codec: SpectralCodec, tmp_path: Path) -> None:
    audio.save(tmp_path / "a.wav", sound(1))
    for name in ("a.npz", "b.npz"):
        transcode.encode(codec, tmp_path / "a.wav", tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_fewer_codebooks_are_the_first_of_all(codec: SpectralCodec, tmp_path: Path) -> None:
    audio.save(tmp_path / "a.wav", sound(1))
    few = transcode.encode(codec, tmp_path / "a.wav", tmp_path / "few.npz", codebooks=2)
    full = transcode.encode(codec, tmp_path / "a.wav", tmp_path / "all.npz")
    assert few.sizes == (9, 16) and few.bitrate < full.bitrate
    first = np.load(tmp_path / "all.npz")["codes"][:2]
    np.testing.assert_array_equal(np.load(tmp_path / "few.npz")["codes"], first)
    transcode.decode(codec, tmp_path / "few.npz", tmp_path / "few.wav")
    transcode.decode(codec, tmp_path / "all.npz", tmp_path / "two.wav", codebooks=2)
    assert (tmp_path / "few.wav").read_bytes() == (tmp_path / "two.wav").read_bytes()
    for asked in (0, 4):
        with pytest.raises(UserError, match=f"codebooks {asked} .* 1 to 3"):
            transcode.encode(codec, tmp_path / "a.wav", tmp_path / "no.npz", codebooks=asked)
    with pytest.raises(UserError, match="codebooks 3 .* holds 1 to 2"):
        transcode.decode(codec, tmp_path / "few.npz", tmp_path / "no.wav", codebooks=3)
    assert not list(tmp_path.glob("no.*"))


class Delayed(torch.nn.Module):
    """Each code is the sign of one sample, said two samples late."""

    sample_rate, frame_size, delay = 24_000, 1, 2
    codebooks = ((2,),)

    def encode(self, pcm: torch.Tensor, state: Any = None) -> torch.Tensor:
        return (pcm > 0).long()

    def decode(self, codes: torch.Tensor, state: Any = None) -> torch.Tensor:
        late = torch.cat((state.tail, codes - 0.5), dim=2)
        state.tail = late[:, :, -2:]
        return late[:, :, :-2]

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> Any:
        active = torch.ones(batch, dtype=torch.bool)
        return SimpleNamespace(active=active, tail=torch.zeros(batch, 1, 2))

    new_decoder_state = new_encoder_state


@pytest.mark.usefixtures("blocks_of_a_second")
def test_a_codec_with_delay_gives_the_sound_back_in_time(tmp_path: Path) -> None:
    pcm = np.where(sound(2.01) > 0, 0.5, -0.5).astype(np.float32)
    audio.save(tmp_path / "a.wav", pcm)
    header = transcode.encode(Delayed(), tmp_path / "a.wav", tmp_path / "a.npz")
    assert (header.samples, header.frames) == (len(pcm), len(pcm) + 2)
    transcode.decode(Delayed(), tmp_path / "a.npz", tmp_path / "b.wav")
    np.testing.assert_array_equal(audio.load(tmp_path / "b.wav"), pcm)


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(codec: SpectralCodec, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file of codes."""
    folder = tmp_path_factory.mktemp("encoded")
    audio.save(folder / "a.wav", sound(2))
    transcode.encode(codec, folder / "a.wav", folder / "a.npz")
    return (folder / "a.npz").read_bytes()


def refused(codec: SpectralCodec, folder: Path, says: str) -> None:
    """Decoding `a.npz` complains in one sentence and leaves what stood at the target."""
    (folder / "kept.wav").write_text("precious")
    with pytest.raises(UserError, match=says) as caught:
        transcode.decode(codec, folder / "a.npz", folder / "kept.wav")
    assert "\n" not in str(caught.value) and str(folder / "a.npz") in str(caught.value)
    assert (folder / "kept.wav").read_text() == "precious"
    assert {path.name for path in folder.iterdir()} <= {"kept.wav", "a.npz"}


def test_truncated_corrupt_or_foreign_files_are_refused(
    codec: SpectralCodec, tmp_path: Path, encoded: bytes
) -> None:
    refused(codec, tmp_path, "There is no file")
    middle = encoded.index(b"codes.npy") + 60
    for content in (
        b"",
        b"RIFF",
        encoded[: len(encoded) // 2],
        encoded[:-1],
        encoded[:middle] + bytes([encoded[middle] ^ 1]) + encoded[middle + 1 :],
    ):
        (tmp_path / "a.npz").write_bytes(content)
        refused(codec, tmp_path, "is no whole file of codes: .+")


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_flipped_bit_is_harmless_or_refused(
    tmp_path_factory: pytest.TempPathFactory, encoded: bytes, place: float, bit: int
) -> None:
    spoilt = bytearray(encoded)
    spoilt[int(place * len(spoilt))] ^= 1 << bit
    (path := tmp_path_factory.getbasetemp() / "flipped.npz").write_bytes(spoilt)
    try:
        header = transcode.read_header(path)
    except UserError:
        return
    with np.load(io.BytesIO(encoded)) as archive:
        read = np.concatenate(list(transcode.read_codes(path, header, 7)), axis=1)
        np.testing.assert_array_equal(read, archive["codes"])


def change(path: Path, encoded: bytes, **entries: Any) -> None:
    """Save the file as numpy would, with other entries; None leaves one out."""
    with np.load(io.BytesIO(encoded)) as archive:
        content = {name: archive[name] for name in archive.files} | entries
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"codes": None}, "no whole file .*codes.npy"),
        ({"samples": None}, "no whole file .*samples.npy"),
        ({"codes": np.zeros((3, 25))}, "codes are float64"),
        ({"codes": np.zeros((2, 25), np.uint16)}, r"\[2, T\] for 3 codebooks"),
        ({"codes": np.zeros((3, 24), np.uint16)}, "24 frames cannot hold 48000 samples"),
        ({"codes": np.array([None])}, "no whole file"),
        ({"samples": 0}, "cannot hold 0 samples"),
        ({"sample_rate": 0}, "below one"),
        ({"sample_rate": 16_000}, "its sample rate is 16000, not 24000"),
        ({"frame_size": 1_921}, "its frame size is 1921, not 1920"),
        ({"codec": "Mimi"}, "its codec is Mimi, not SpectralCodec"),
        ({"sizes": np.array([9, 16, 17])}, r"codebooks is \(9, 16, 17\), not \(9, 16, 16\)"),
        ({"codes": np.full((3, 25), 9, np.uint16)}, "code 9 in codebook 0, which ends at 8"),
    ],
)
def test_codes_that_do_not_fit_are_refused(
    codec: SpectralCodec, tmp_path: Path, encoded: bytes, entries: dict[str, Any], says: str
) -> None:
    change(tmp_path / "a.npz", encoded, **entries)
    refused(codec, tmp_path, says)


@pytest.mark.usefixtures("blocks_of_a_second")
def test_codes_saved_again_by_numpy_are_read(
    codec: SpectralCodec, tmp_path: Path, encoded: bytes
) -> None:
    (tmp_path / "a.npz").write_bytes(encoded)
    with np.load(io.BytesIO(encoded)) as archive:
        change(tmp_path / "b.npz", encoded, codes=np.ascontiguousarray(archive["codes"]))
    for name in "ab":
        transcode.decode(codec, tmp_path / f"{name}.npz", tmp_path / f"{name}.wav")
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_other_weights_decode_with_a_notice(
    codec: SpectralCodec, tmp_path: Path, encoded: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.npz").write_bytes(encoded)
    transcode.decode(codec, tmp_path / "a.npz", tmp_path / "a.wav")
    assert caplog.messages == []
    transcode.decode(small_codec(), tmp_path / "a.npz", tmp_path / "a.wav")
    (notice,) = caplog.messages
    assert "other weights" in notice and transcode.fingerprint(codec) in notice


def test_a_failed_encoding_leaves_what_stood_there(codec: SpectralCodec, tmp_path: Path) -> None:
    broken = sound(30)
    broken[-1] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 24_000, subtype="FLOAT")
    (tmp_path / "kept.npz").write_text("precious")
    with pytest.raises(UserError, match="NaN"):
        transcode.encode(codec, tmp_path / "nan.wav", tmp_path / "kept.npz")
    assert (tmp_path / "kept.npz").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


# --- Files, folders, pipes ------------------------------------------------------------------------


class Terminal:
    """Runs a direction with pipes and a terminal made of memory."""

    def __init__(self, codec: SpectralCodec, terminal: bool = False) -> None:
        self.codec = codec
        self.drawn = io.StringIO()
        self.console = Console(file=self.drawn, force_terminal=terminal, width=80)

    def run(self, direction: transcode.Direction, *place: object, stdin: bytes = b"") -> bytes:
        source, target = map(str, place)
        stdout = io.BytesIO()
        self.done = transcode.run(
            direction, lambda: self.codec, source, target,
            stdin=io.BytesIO(stdin), stdout=stdout, console=self.console,
        )  # fmt: skip
        return stdout.getvalue()


def test_folders_are_mirrored(codec: SpectralCodec, tmp_path: Path) -> None:
    for name in ("in/a.wav", "in/deep/er/b.flac", "in/.hidden/c.ogg"):
        audio.save(tmp_path / name, sound(0.5))
    (tmp_path / "in" / "notes.txt").write_text("no sound")
    terminal = Terminal(codec)
    assert terminal.run(ENCODE, tmp_path / "in", tmp_path / "codes") == b""
    made = sorted(str(p.relative_to(tmp_path / "codes")) for p, _ in terminal.done)
    assert made == [".hidden/c.npz", "a.npz", "deep/er/b.npz"]
    terminal.run(DECODE, tmp_path / "codes", tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert [name for name in found if name != ".hidden"] == [
        ".hidden/c.wav", "a.wav", "deep/er/b.wav",
    ]  # fmt: skip
    assert len(audio.load(tmp_path / "out" / "deep/er/b.wav")) == 12_000
    assert terminal.drawn.getvalue() == ""


def test_a_broken_file_in_a_folder_stops_no_other(
    codec: SpectralCodec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ac":
        audio.save(tmp_path / f"in/{name}.wav", sound(0.5))
    (tmp_path / "in" / "b.wav").write_text("no sound at all")
    with pytest.raises(UserError, match="1 of 3 files could not be read"):
        Terminal(codec).run(ENCODE, tmp_path / "in", tmp_path / "out")
    (said,) = caplog.messages
    assert "b.wav cannot be decoded" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npz", "c.npz"]


def test_places_that_cannot_be_are_told_before_any_work(
    codec: SpectralCodec, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("two/a.wav", "two/a.flac", "one/a.wav"):
        audio.save(tmp_path / name, sound(0.5))

    def load() -> SpectralCodec:
        raise AssertionError("loaded for nothing")

    for source, target, says in (
        ("none.wav", "a.npz", "no file or folder"),
        ("one/a.wav", "a.wav", r"suffix must be \.npz"),
        ("one/a.wav", "one", r"suffix must be \.npz"),
        ("one/a.wav", "one/a.wav/b.npz", "no folder"),
        ("one", "-", "cannot go to one pipe"),
        ("one", "one/a.wav", "no folder"),
        ("empty", "out", r"no file to read; looked for \.aac"),
        ("two", "out", r"a\.flac and .*a\.wav would both become"),
    ):
        place = target if target == "-" else str(tmp_path / target)
        with pytest.raises(UserError, match=says):
            transcode.run(
                ENCODE, load, str(tmp_path / source), place,
                stdin=io.BytesIO(), stdout=io.BytesIO(), console=Console(file=io.StringIO()),
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_pipes_carry_whole_files(codec: SpectralCodec, tmp_path: Path) -> None:
    audio.save(tmp_path / "a.wav", sound(1))
    wav, terminal = (tmp_path / "a.wav").read_bytes(), Terminal(codec)
    codes = terminal.run(ENCODE, "-", "-", stdin=wav)
    terminal.run(ENCODE, tmp_path / "a.wav", tmp_path / "a.npz")
    assert codes == (tmp_path / "a.npz").read_bytes()
    back = terminal.run(DECODE, "-", "-", stdin=codes)
    terminal.run(DECODE, "-", tmp_path / "b.wav", stdin=codes)
    assert back == (tmp_path / "b.wav").read_bytes() and back[:4] == b"RIFF"
    # A recorder that writes into a pipe does not know the length, and says so with its maximum.
    endless = wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:]
    assert wav[36:40] == b"data" and terminal.run(ENCODE, "-", "-", stdin=endless) == codes
    for spoilt in (codes[:-5], b""):
        with pytest.raises(UserError, match="standard-input is no whole file"):
            terminal.run(DECODE, "-", "-", stdin=spoilt)


def test_progress_is_for_terminals(codec: SpectralCodec, tmp_path: Path) -> None:
    audio.save(tmp_path / "speech.wav", sound(2))
    for shown in (False, True):
        terminal = Terminal(codec, terminal=shown)
        terminal.run(ENCODE, tmp_path / "speech.wav", tmp_path / "a.npz")
        assert ("speech.wav" in terminal.drawn.getvalue()) == shown
        assert ("2 s of sound" in terminal.drawn.getvalue()) == shown


def test_descriptions_agree(codec: SpectralCodec, tmp_path: Path, encoded: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(encoded)
    header = transcode.read_header(tmp_path / "a.npz")
    model, file = transcode.describe(codec), transcode.describe_codes(header)
    assert all(model[name] == file[name] for name in ("codec", "weights", "bitrate", "codebooks"))
    assert file["length"] == "2.000 s, 48000 samples"
    assert model["codebooks"] == "3 of sizes 9, 16, 16"


def info(what: str | Path, stdin: bytes = b"") -> dict[str, str]:
    def load(name: str) -> SpectralCodec:
        raise UserError(f"asked for the model {name}")

    return dict(transcode.info(str(what), load, io.BytesIO(stdin)))


def test_info_takes_codes_and_sound_from_files_and_pipes(tmp_path: Path, encoded: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(encoded)
    soundfile.write(tmp_path / "b.wav", np.zeros((8_000, 2)), 16_000)
    wav = (tmp_path / "b.wav").read_bytes()
    codes, talk = info(tmp_path / "a.npz"), info(tmp_path / "b.wav")
    assert codes["codebooks"] == "3 of sizes 9, 16, 16"
    assert talk == {
        "length": "0.500 s", "sample rate": "16000 Hz", "channels": "2", "container": "WAV",
    }  # fmt: skip
    assert info("-", encoded) == codes and info("-", wav) == talk
    (tmp_path / "notes.txt").write_text("no sound at all")
    for what, stdin in ((tmp_path / "notes.txt", b""), ("-", b""), ("-", encoded[:-5])):
        with pytest.raises(UserError, match=r"choices: a file of codes or sound, a folder") as told:
            info(what, stdin)
        assert "\n" not in str(told.value)
    for name in ("none.wav", "none.npz"):
        with pytest.raises(UserError, match="There is no .*file"):
            info(name)
    for name in ("tiny", "a.safetensors"):
        with pytest.raises(UserError, match=f"asked for the model {name}"):
            info(name)


def test_info_tells_a_folder_of_files_from_a_model_s(
    tmp_path: Path, encoded: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("in/a.npz", "in/deep/b.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded)
    audio.save(tmp_path / "in" / "c.wav", sound(0.5))
    assert info(tmp_path / "in") == {
        str(tmp_path / "in/a.npz"): "2.00 s of sound in 25 frames of 3 codebooks, 0.14 kbit/s",
        str(tmp_path / "in/c.wav"): "0.50 s of sound, 24000 Hz, 1 channel, WAV",
        str(tmp_path / "in/deep/b.npz"): "2.00 s of sound in 25 frames of 3 codebooks, 0.14 kbit/s",
    }
    (tmp_path / "in" / "a.npz").write_bytes(encoded[:-5])
    with pytest.raises(UserError, match="1 of 3 files could not be read"):
        info(tmp_path / "in")
    (said,) = caplog.messages
    assert "a.npz is no whole file of codes" in said
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="asked for the model"):
        info(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file to read; looked for \.aac"):
        info(tmp_path / "empty")


def test_a_member_is_readable_by_any_zip_tool(encoded: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(encoded)) as archive:
        assert archive.testzip() is None
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


# --- Memory ---------------------------------------------------------------------------------------

# VmHWM and not getrusage: the latter also counts what the parent was before it became the child.
PEAK = """
import sys
from pathlib import Path
import torch
from small import small_codec
from audio_codec import transcode
torch.set_num_threads(1)
codec, folder = small_codec(), Path(sys.argv[1])
transcode.encode(codec, folder / "a.wav", folder / "a.npz")
transcode.decode(codec, folder / "a.npz", folder / "b.flac")
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_length(tmp_path: Path, root: Path) -> None:
    def peak(minutes: int) -> int:
        # 8 kHz, so that the resampler works too; an hour is 346 MB inside, as float32.
        minute = (3_000 * np.sin(np.arange(60 * 8_000) / 20)).astype(np.int16)
        with soundfile.SoundFile(tmp_path / "a.wav", "w", 8_000, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(minute)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path)], cwd=root, capture_output=True,
            text=True, check=True, env={"PYTHONPATH": f"{root}:{root / 'tests'}"},
        )  # fmt: skip
        assert audio.duration(tmp_path / "b.flac") == 60 * minutes
        return int(done.stdout)

    assert peak(60) < 1.05 * peak(1)
