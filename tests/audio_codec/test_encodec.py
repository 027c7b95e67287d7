"""EnCodec as a codec: the package's own numbers, the bandwidths, weights from everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import encodec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio_codec.audio import FRAME_RATE, FRAME_SIZE
from audio_codec.codec import Codec, kind_of, load_codec
from audio_codec.encodec import BANDWIDTHS, EncodecCodec, load_encodec, random_encodec
from audio_codec.errors import UserError

FIRST = "encoder.model.0.conv.conv.bias"


def liven(encoder: nn.Module) -> None:
    """Untrained convolutions let nearly nothing through: no code would ever change."""
    for name, tensor in encoder.state_dict().items():
        if name.endswith(("weight_g", "original0")):
            tensor.mul_(2.5)


@pytest.fixture(scope="module")
def source() -> EncodecCodec:
    """Random weights as the package holds them, weight norm unfolded."""
    torch.manual_seed(3)
    codec = EncodecCodec(24.0).eval().requires_grad_(False)
    liven(codec.model.encoder)
    return codec


@pytest.fixture(scope="module")
def file(source: EncodecCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those weights in a file of the package."""
    path = tmp_path_factory.mktemp("encodec") / "weights.th"
    torch.save(source.model.state_dict(), path)
    return path


def noise(batch: int = 1, frames: int = 12) -> Tensor:
    return 0.1 * torch.randn(batch, 1, frames * 320, generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
def test_numbers_are_the_packages_own(source: EncodecCodec, file: Path) -> None:
    codec, pcm = load_encodec(file, 6.0), noise(2)
    source.model.set_target_bandwidth(6.0)
    ((expected, _),) = source.model.encode(pcm)
    codes = codec.encode(pcm)
    assert torch.equal(codes, expected) and codes.unique().numel() > 30
    heard = source.model.decode([(codes, None)])
    torch.testing.assert_close(codec.decode(codes), heard, rtol=1e-4, atol=1e-5)
    # Nothing is normalized anew at every call.
    assert not any(name.endswith("weight_g") for name, _ in codec.named_parameters())


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_a_bandwidth_is_so_many_codebooks(source: EncodecCodec, bandwidth: float) -> None:
    codec: Codec = EncodecCodec(bandwidth)
    levels = len(codec.codebooks)
    assert levels * 10 * codec.sample_rate / codec.frame_size == 1000 * bandwidth
    assert codec.codebooks == ((1024,),) * levels
    assert codec.encode(noise()).shape == (1, levels, 12)


def test_six_frames_fill_one_of_the_clock() -> None:
    assert EncodecCodec.sample_rate / EncodecCodec.frame_size == 6 * FRAME_RATE
    assert random_encodec(1.5).encode(torch.zeros(1, 1, FRAME_SIZE)).shape == (1, 2, 6)


@torch.inference_mode()
def test_fewer_codebooks_are_the_first_of_more(file: Path) -> None:
    narrow, wide = load_encodec(file, 1.5), load_encodec(file, 6.0)
    codes = wide.encode(noise())
    assert torch.equal(narrow.encode(noise()), codes[:, :2])
    assert torch.equal(narrow.decode(codes[:, :2]), wide.decode(codes[:, :2]))


@torch.inference_mode()
def test_the_first_codebook_stands_for_what_it_decodes_to(file: Path) -> None:
    codec = load_encodec(file, 1.5)
    codes = codec.encode(noise(2))
    meant = codec.embed_semantic(codes[:, 0])
    assert meant.shape == (2, 12, 128)
    alone = codec.model.decoder(meant.transpose(1, 2))
    torch.testing.assert_close(alone, codec.decode(codes[:, :1]))


@torch.inference_mode()
def test_every_call_is_coded_alone(file: Path) -> None:
    codec, pcm = load_encodec(file), noise(2, 24)
    encoder, decoder = codec.new_encoder_state(2), codec.new_decoder_state(2)
    assert list(encoder.tensors()) == [] and encoder.batch == 2
    for chunk in pcm.split(FRAME_SIZE, 2):
        codes = codec.encode(chunk, encoder)
        assert torch.equal(codes, codec.encode(chunk))
        assert torch.equal(codec.decode(codes, decoder), codec.decode(codes))
        assert torch.equal(codes[1:], codec.encode(chunk[1:].contiguous()))
    assert not torch.equal(codec.encode(pcm)[:, :, 6:12], codec.encode(pcm[..., 1920:3840]))


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """transformers' own model with random weights, saved in its layout."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(5)
    model = EncodecModel(EncodecConfig()).eval().requires_grad_(False)
    liven(model.encoder)
    for level in model.quantizer.layers:
        level.codebook.embed.normal_()
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("old_names", [False, True])
@torch.inference_mode()
def test_the_layout_of_transformers_gives_its_codes(
    transformers_folder: tuple[Path, nn.Module], tmp_path: Path, old_names: bool
) -> None:
    folder, theirs = transformers_folder
    if old_names:  # as the public checkpoint on the hub still has them
        tensors = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        folder = tmp_path
    assert kind_of(folder) == "encodec"
    codec, pcm = load_codec(folder), noise(frames=30)
    expected = theirs.encode(pcm, bandwidth=6.0).audio_codes[0]
    codes = codec.encode(pcm)
    assert torch.equal(codes, expected) and codes.unique().numel() > 30
    heard = theirs.decode(expected[None], [None])[0]
    torch.testing.assert_close(codec.decode(codes), heard, rtol=1e-4, atol=1e-5)


def test_names_choose_the_bandwidth(
    monkeypatch: pytest.MonkeyPatch, source: EncodecCodec, file: Path
) -> None:
    make = encodec.EncodecModel.encodec_model_24khz

    def fetch(pretrained: bool) -> Any:
        model = make(pretrained=False)
        if pretrained:
            model.load_state_dict(source.model.state_dict())
        return model

    monkeypatch.setattr(encodec.EncodecModel, "encodec_model_24khz", fetch)
    codes = load_encodec(file).encode(noise())
    for name, levels in (("encodec", 8), ("encodec:1.5", 2)):
        codec = load_codec(name)
        assert kind_of(name) == "encodec" and isinstance(codec, EncodecCodec)
        assert torch.equal(codec.encode(noise()), codes[:, :levels])
        assert not codec.training and not any(p.requires_grad for p in codec.parameters())
    for name in ("encodec:5", "encodec:much", "encodec:nan"):
        with pytest.raises(UserError, match="bandwidth"):
            load_codec(name)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"'encodec'.*no route to host.*\.th file") as caught:
        load_codec("encodec")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t | {"extra": torch.zeros(1)}, "'extra' has no place"),
        (lambda t: {name: t[name] for name in t if name != FIRST}, f"{FIRST}' is missing"),
        (lambda t: t | {FIRST: torch.zeros(7)}, r"shape \(7,\), expected \(32,\)"),
        (lambda t: t | {FIRST: torch.full((32,), torch.nan)}, f"{FIRST}' holds NaN"),
        (lambda t: list(t.values()), "table of tensors"),
        (lambda t: {"best": 1}, "table of tensors"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_sentence(
    source: EncodecCodec, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], says: str
) -> None:
    torch.save(change(source.model.state_dict()), tmp_path / "a.th")
    with pytest.raises(UserError, match=says):
        load_codec(tmp_path / "a.th")


def test_a_truncated_or_absent_file_is_one_sentence(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "no": b"", "text": b"hello"}.items():
        (tmp_path / f"{name}.th").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.th' are truncated or corrupt"):
            load_codec(tmp_path / f"{name}.th")
    with pytest.raises(UserError, match="neither a directory"):
        load_codec(tmp_path / "none.th")
    with pytest.raises(UserError, match=r"5 is none.*1\.5, 3, 6, 12, 24"):
        EncodecCodec(5)
