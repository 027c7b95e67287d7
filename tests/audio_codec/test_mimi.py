"""Mimi: the same numbers as `transformers`, both public formats, streaming, no delay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from streams import (
    Streaming,
    Tick,
    assert_chunks_equal_offline,
    assert_streams,
    chunkings,
    scripts,
    streaming_settings,
)
from torch import Tensor, nn
from transformers import MimiConfig as PeerConfig
from transformers import MimiModel as Peer
from transformers.utils import logging

from audio_codec.codec import Codec, load_codec
from audio_codec.errors import UserError
from audio_codec.mimi import MimiCodec, MimiConfig, read_hf, read_kyutai, save_hf, to_public

logging.disable_progress_bar()

# 40 samples a frame, a window of two and a half frames.
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "upsample_groups": 16,
    "num_filters": 4,
    "num_residual_layers": 2,
    "upsampling_ratios": [5, 4],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "sliding_window": 5,
    "num_quantizers": 5,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}
SMALL_FRAME = 40
# What is published, but narrow: its rates, its window of 10 s, its 32 codebooks.
NARROW: dict[str, Any] = {**SMALL, "upsampling_ratios": [8, 6, 5, 4], "sliding_window": 250}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def make_peer(fields: dict[str, Any]) -> Peer:
    """A `transformers` model whose every tensor matters and whose signals stay near 1."""
    torch.manual_seed(1)
    peer = Peer(PeerConfig(**fields)).eval()
    for module in peer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.ConvTranspose1d) and name == "weight":
                parameter.normal_(std=(2 * len(parameter) / module.groups) ** -0.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name in ("weight", "scale"):  # of a norm, of a residual branch
                parameter.uniform_(0.3, 0.8)
            else:
                parameter.normal_(std=0.1)
    for name, buffer in peer.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(std=0.5)
        elif name.endswith("cluster_usage"):
            buffer.uniform_(0.5, 2.0)
    return peer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `transformers` writes of a small model."""
    path = tmp_path_factory.mktemp("mimi") / "hf"
    make_peer(SMALL).save_pretrained(path)
    return path


@pytest.fixture
def codec(small: Path) -> MimiCodec:
    return read_hf(small).double()


def build(fields: dict[str, Any]) -> MimiCodec:
    """A random codec whose codebooks are used."""
    torch.manual_seed(2)
    codec = MimiCodec(MimiConfig(**fields)).double()
    for name, parameter in codec.named_parameters():
        if "scales" in name:
            nn.init.uniform_(parameter, 0.3, 0.8)
    return codec.eval().requires_grad_(False)


# --- Against transformers -------------------------------------------------------------------------


def latent_of(peer: Peer, pcm: Tensor) -> Tensor:
    latent: Tensor = peer.encoder(pcm).latents
    return latent.transpose(1, 2)


@pytest.mark.parametrize("codebooks", [None, 1, 2, 4, 5])
@torch.no_grad()
def test_the_numbers_are_those_of_transformers(small: Path, codebooks: int | None) -> None:
    peer = Peer.from_pretrained(small).eval().double()
    codec = load_codec(small, codebooks).double()
    assert isinstance(codec, MimiCodec)
    assert len(codec.codebooks) == codebooks or codebooks is None
    pcm = noise(2, 1, 150 * SMALL_FRAME)
    latent, codes = latent_of(peer, pcm), peer.encode(pcm, num_quantizers=codebooks).audio_codes
    torch.testing.assert_close(codec.encode_latent(pcm), latent, rtol=0, atol=1e-5)
    assert torch.equal(codec.encode(pcm), codes)
    assert all(book.unique().numel() > 8 for book in codes.unbind(1))
    sound = peer.decode(codes).audio_values
    torch.testing.assert_close(codec.decode(codes), sound, rtol=0, atol=1e-5)
    assert 0.03 < float(sound.std()) < 10 and 0.1 < float(latent.std()) < 10


@torch.no_grad()
def test_in_float32_all_but_ties_agree(tmp_path: Path) -> None:
    # The published 32 codebooks of 2048. A tie that rounding tips may change every later level of
    # its frame, so the bound stands for 0.8 such frames of 800; on an EPYC it was none of 4000.
    make_peer({**SMALL, "num_quantizers": 32, "codebook_size": 2048}).save_pretrained(tmp_path)
    peer, codec = Peer.from_pretrained(tmp_path).eval(), read_hf(tmp_path)
    pcm = noise(8, 1, 100 * SMALL_FRAME, dtype=torch.float32)
    codes = peer.encode(pcm).audio_codes
    assert codes.shape == (8, 32, 100) and codes.unique().numel() > 1000
    torch.testing.assert_close(codec.encode_latent(pcm), latent_of(peer, pcm), rtol=0, atol=1e-4)
    assert float((codec.encode(pcm) == codes).float().mean()) >= 0.999
    sound = peer.decode(codes).audio_values
    torch.testing.assert_close(codec.decode(codes), sound, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_true_architecture_has_the_same_numbers_past_ten_seconds(tmp_path: Path) -> None:
    make_peer({}).save_pretrained(tmp_path / "hf")
    codec = load_codec(tmp_path / "hf")
    assert isinstance(codec, MimiCodec) and codec.config.num_quantizers == 32
    assert codec.frame_size == 1920 and codec.sample_rate == 24_000
    pcm = 0.3 * noise(1, 1, 150 * 1920)  # 12 s
    # In float32 a tie at the first level costs all 32 codes of its frame, 0.7% of what is here: one
    # may. In the eight levels that Moshi uses none did so far, as in all 32 on an EPYC.
    bounds = {torch.float32: {8: 0.999, 32: 0.99}, torch.float64: {32: 1.0}}
    for dtype, equal in bounds.items():
        # Read anew: the peer keeps its codebooks in the precision of their first use.
        peer = Peer.from_pretrained(tmp_path / "hf").eval().to(dtype)
        codec, pcm = codec.to(dtype), pcm.to(dtype)
        codes = peer.encode(pcm).audio_codes
        assert codes.shape == (1, 32, 150) and codes.unique().numel() > 1000
        same = (codec.encode(pcm) == codes).double()
        for levels, share in equal.items():
            assert float(same[:, :levels].mean()) >= share
        latent, sound = latent_of(peer, pcm), peer.decode(codes).audio_values
        assert 0.1 < float(latent.std()) < 10 and 0.1 < float(sound.std()) < 10
        torch.testing.assert_close(codec.encode_latent(pcm), latent, rtol=0, atol=1e-4)
        torch.testing.assert_close(codec.decode(codes), sound, rtol=0, atol=1e-4)


# --- Streaming ------------------------------------------------------------------------------------


def random_codes(codec: MimiCodec, frames: int, generator: torch.Generator) -> Tensor:
    size, books = codec.config.codebook_size, codec.config.num_quantizers
    return torch.randint(size, (1, books, frames), generator=generator)


@settings(streaming_settings, max_examples=4)
@given(chunks=chunkings(9), script=scripts(8))
def test_encoding_streams(chunks: list[int], script: list[Tick]) -> None:
    codec, generator = build(SMALL), torch.Generator().manual_seed(3)

    def source(frames: int) -> Tensor:
        shape = (1, 1, frames * SMALL_FRAME)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    module = Streaming(codec.encode_latent, codec.new_encoder_state, source, axis=2)
    assert_streams(module, chunks, script)
    module = Streaming(codec.encode, codec.new_encoder_state, source, axis=2, out_axis=2)
    assert_chunks_equal_offline(module, chunks)


@settings(streaming_settings, max_examples=4)
@given(chunks=chunkings(9), script=scripts(8))
def test_decoding_streams(chunks: list[int], script: list[Tick]) -> None:
    codec, generator = build(SMALL), torch.Generator().manual_seed(4)
    module = Streaming(
        codec.decode,
        codec.new_decoder_state,
        lambda frames: random_codes(codec, frames, generator),
        axis=2,
        out_axis=2,
    )
    assert_streams(module, chunks, script)


@torch.no_grad()
def assert_chunks_are_one_pass(codec: MimiCodec, pcm: Tensor, chunk: int) -> None:
    latent = codec.encode_latent(pcm)
    codes = codec.quantizer.encode(latent)
    hearing = codec.new_encoder_state(len(pcm), chunk)
    saying = codec.new_decoder_state(len(pcm), chunk)
    pieces = pcm.split(chunk * codec.frame_size, dim=2)
    latents = [codec.encode_latent(piece, hearing) for piece in pieces]
    torch.testing.assert_close(torch.cat(latents, dim=1), latent, rtol=0, atol=1e-9)
    coded = [codec.quantizer.encode(piece) for piece in latents]
    assert torch.equal(torch.cat(coded, dim=2), codes)
    said = torch.cat([codec.decode(piece, saying) for piece in coded], dim=2)
    torch.testing.assert_close(said, codec.decode(codes), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_the_published_window_wraps_unheard(chunk: int) -> None:
    # 13 s, at the published rates: the window of 250 positions at 25 Hz is passed after 10 s.
    assert_chunks_are_one_pass(build(NARROW), noise(1, 1, 163 * 1920), chunk)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_the_true_architecture_streams_past_ten_seconds(chunk: int) -> None:
    assert_chunks_are_one_pass(build({}), noise(1, 1, 140 * 1920), chunk)


def test_before_the_first_frame_lies_its_first_sample_not_silence() -> None:
    down = build(SMALL).down
    x = noise(2, 4, 16)
    assert not torch.allclose(down(x)[:, 0], down(torch.cat((0 * x, x), 1))[:, 2])
    held = x[:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(down(x)[:, 0], down(torch.cat((held, x), 1))[:, 2])
    # A slot that sleeps through the first tick begins with the second.
    state = down.new_state(2)
    state.active[1] = False
    down(x[:, :2], state)
    state.active[1] = True
    torch.testing.assert_close(down(x[:, 2:], state)[1], down(x[:, 2:])[1])


# --- Delay ----------------------------------------------------------------------------------------


def test_an_impulse_changes_nothing_before_its_frame_and_something_in_it(codec: MimiCodec) -> None:
    assert codec.delay == 0
    pcm = noise(1, 1, 6 * SMALL_FRAME)
    codes, latent = codec.encode(pcm), codec.encode_latent(pcm)
    sound = codec.decode(codes)
    before, frame = slice(2 * SMALL_FRAME), slice(2 * SMALL_FRAME, 3 * SMALL_FRAME)
    for place in (0, 1, SMALL_FRAME // 2, SMALL_FRAME - 1):
        struck = pcm.clone()
        struck[..., 2 * SMALL_FRAME + place] += 20.0
        new_codes = codec.encode(struck)
        assert torch.equal(codec.encode_latent(struck)[:, :2], latent[:, :2])
        assert torch.equal(new_codes[..., :2], codes[..., :2])
        assert not torch.equal(new_codes[..., 2], codes[..., 2])
        new_sound = codec.decode(new_codes)
        assert torch.equal(new_sound[..., before], sound[..., before])
        changed = (new_sound[0, 0, frame] != sound[0, 0, frame]).nonzero()
        assert int(changed.min()) == 0  # a code is heard from its frame's first sample


# --- Codes ----------------------------------------------------------------------------------------


def test_it_is_a_codec(codec: MimiCodec) -> None:
    found: Codec = codec
    codes = found.encode(noise(2, 1, 7 * SMALL_FRAME))
    assert codes.shape == (2, 5, 7) and codes.dtype == torch.int64
    assert found.codebooks == ((16,),) * 5
    assert found.frame_size == SMALL_FRAME and found.sample_rate == 24_000
    assert found.decode(codes).shape == (2, 1, 7 * SMALL_FRAME)
    with pytest.raises(AssertionError, match="whole frames"):
        found.encode(torch.zeros(1, 1, SMALL_FRAME + 1))


def test_the_first_codebook_stands_for_what_it_decodes_to(codec: MimiCodec) -> None:
    codes = codec.encode(noise(2, 1, 7 * SMALL_FRAME))
    meant = codec.embed_semantic(codes[:, 0])
    assert meant.shape == (2, 7, SMALL["hidden_size"])
    torch.testing.assert_close(codec.decode_latent(meant), codec.decode(codes[:, :1]))


def test_any_number_of_codebooks(small: Path) -> None:
    whole = load_codec(small)
    pcm = noise(1, 1, 9 * SMALL_FRAME, dtype=torch.float32)
    codes = whole.encode(pcm)
    for count in range(1, 6):
        codec = load_codec(small, count)
        assert codec.codebooks == ((16,),) * count
        assert torch.equal(codec.encode(pcm), codes[:, :count])
        assert torch.equal(codec.decode(codes[:, :count]), whole.decode(codes[:, :count]))
    for count in (0, 6, -1):
        with pytest.raises(UserError, match=f"codebooks={count}.* 1 … 5"):
            load_codec(small, count)


# --- The format of transformers -------------------------------------------------------------------


def test_what_is_written_is_what_transformers_wrote(small: Path, tmp_path: Path) -> None:
    save_hf(tmp_path / "again", read_hf(small))
    theirs, ours = (
        load_file(small / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    for name, value in json.loads((small / "config.json").read_text()).items():
        if name in config:
            assert config[name] == value, name
    assert config["rope_theta"] == 50.0


@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    codec = build(SMALL).float()
    save_hf(tmp_path / "a", codec)
    peer, info = Peer.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()), info
    assert peer.config.rope_parameters["rope_theta"] == 50.0
    assert peer.config.frame_size == SMALL_FRAME and peer.config.sliding_window == 5
    pcm = noise(1, 1, 30 * SMALL_FRAME, dtype=torch.float32)
    again = read_hf(tmp_path / "a")
    assert again.config == MimiConfig(**json.loads((tmp_path / "a" / "config.json").read_text()))
    assert torch.equal(again.encode(pcm), codec.encode(pcm))
    codes = peer.eval().encode(pcm).audio_codes
    assert float((codes == codec.encode(pcm)).float().mean()) > 0.99
    torch.testing.assert_close(
        peer.decode(codes).audio_values, codec.decode(codes), rtol=0, atol=1e-4
    )


def test_a_codec_of_fewer_codebooks_is_written_as_one(small: Path, tmp_path: Path) -> None:
    for count in (1, 3):
        codec = load_codec(small, count)
        assert isinstance(codec, MimiCodec)
        again = load_codec(save_hf(tmp_path / str(count), codec))
        assert again.codebooks == ((16,),) * count
        assert all(map(torch.equal, again.state_dict().values(), codec.state_dict().values()))


def test_the_layout_of_one_codebook_goes_both_ways(small: Path, tmp_path: Path) -> None:
    """The public module then has no acoustic codebooks, but still the projections around them."""
    cut = {
        name: tensor
        for name, tensor in load_file(small / "model.safetensors").items()
        if ".acoustic_residual_vector_quantizer.layers." not in name
    }
    assert sum("acoustic" in name for name in cut) == 2
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "num_quantizers": 1}))
    save_file(cut, tmp_path / "theirs" / "model.safetensors")
    theirs, kept = load_codec(tmp_path / "theirs"), load_codec(small, 1)
    pcm = noise(1, 1, 9 * SMALL_FRAME, dtype=torch.float32)
    for name, codec in (("again", theirs), ("fewer", kept)):
        assert isinstance(codec, MimiCodec) and codec.codebooks == ((16,),)
        assert torch.equal(codec.encode(pcm), load_codec(small).encode(pcm)[:, :1])
        written = load_file(save_hf(tmp_path / name, codec) / "model.safetensors")
        assert written.keys() == cut.keys()
        assert not [key for key in cut if not torch.equal(written[key], cut[key])]


def test_an_export_never_overwrites_something_else(small: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        save_hf(tmp_path, read_hf(small))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 24}, "head_dim=4 must be 6"),
        ({"use_causal_conv": False}, "field 'use_causal_conv'"),
        ({"use_conv_shortcut": True}, "field 'use_conv_shortcut'"),
        ({"pad_mode": "reflect"}, "field 'pad_mode'.*'constant'"),
        ({"audio_channels": 2}, "field 'audio_channels'"),
        ({"hidden_act": "relu"}, "field 'hidden_act'.*'gelu'"),
        ({"attention_bias": True}, "field 'attention_bias'"),
        ({"num_semantic_quantizers": 2}, "field 'num_semantic_quantizers'"),
        ({"num_quantizers": 0}, "field 'num_quantizers'"),
        ({"upsampling_ratios": []}, "field 'upsampling_ratios'"),
        ({"upsampling_ratios": [5, 0]}, r"field 'upsampling_ratios\.1'"),
        ({"trim_right_ratio": 0.5}, "trim_right_ratio=0.5 must be 1"),
        ({"norm_eps": 1e-3}, "norm_eps=0.001 must be"),
        ({"upsample_groups": 1}, "upsample_groups=1 must be 16"),
        ({"frame_rate": 25.0}, "frame_rate=25.0 must be 600"),
        ({"codebook_dim": 16, "vector_quantization_hidden_dimension": 16}, "codebook_dim=16"),
        ({"codebook_dim": 4}, "vector_quantization_hidden_dimension=8 must be 4"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn'"),
        ({"num_attention_heads": 3}, "hidden_size=16 .* num_attention_heads=3"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ({"compress": 5}, "num_filters=4 .* compress=5"),
        ({"kernel_size": 5}, r"'encoder\.layers\.0\.conv\.weight' has shape .*7\), expected .*5\)"),
        ({"num_quantizers": 6}, r"layers\.4\.codebook\.initialized' is missing, expected"),
        ({"num_hidden_layers": 1}, r"transformer\.layers\.1\..* has no place"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_is_named(
    small: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    config = {**json.loads((small / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=named):
        load_codec(tmp_path)


def test_both_spellings_of_the_rotary_base() -> None:
    assert MimiConfig.model_validate({}).rope_theta == 10_000
    assert MimiConfig.model_validate({"rope_theta": 7.0}).rope_theta == 7
    assert MimiConfig.model_validate({"rope_parameters": {"rope_theta": 8.0}}).rope_theta == 8


# --- Kyutai's own format --------------------------------------------------------------------------

KYUTAI = {  # some of the names and shapes in the published file
    "encoder.model.0.conv.conv.weight": (64, 1, 7),
    "encoder.model.1.block.1.conv.conv.weight": (32, 64, 3),
    "encoder.model.1.block.3.conv.conv.weight": (64, 32, 1),
    "encoder.model.3.conv.conv.weight": (128, 64, 8),
    "encoder.model.12.conv.conv.bias": (1024,),
    "encoder.model.14.conv.conv.weight": (512, 1024, 3),
    "encoder_transformer.transformer.layers.7.self_attn.in_proj_weight": (1536, 512),
    "encoder_transformer.transformer.layers.0.self_attn.out_proj.weight": (512, 512),
    "encoder_transformer.transformer.layers.0.norm1.bias": (512,),
    "encoder_transformer.transformer.layers.0.layer_scale_1.scale": (512,),
    "decoder_transformer.transformer.layers.0.linear1.weight": (2048, 512),
    "decoder_transformer.transformer.layers.0.linear2.weight": (512, 2048),
    "downsample.conv.conv.conv.weight": (512, 512, 4),
    "upsample.convtr.convtr.convtr.weight": (512, 1, 4),
    "quantizer.rvq_first.input_proj.weight": (256, 512, 1),
    "quantizer.rvq_first.vq.layers.0._codebook._initialized": (1,),
    "quantizer.rvq_rest.output_proj.weight": (512, 256, 1),
    "quantizer.rvq_rest.vq.layers.30._codebook.cluster_usage": (2048,),
    "quantizer.rvq_rest.vq.layers.30._codebook.embedding_sum": (2048, 256),
    "decoder.model.0.conv.conv.weight": (1024, 512, 7),
    "decoder.model.2.convtr.convtr.weight": (1024, 512, 16),
    "decoder.model.3.block.1.conv.conv.weight": (256, 512, 3),
    "decoder.model.11.convtr.convtr.bias": (64,),
    "decoder.model.14.conv.conv.weight": (1, 64, 3),
}


def test_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        codec = MimiCodec(MimiConfig())
    tensors = to_public(codec, "kyutai")
    for name, shape in KYUTAI.items():
        assert tuple(tensors[name].shape) == shape, name
    parameters = sum(p.numel() for p in codec.parameters())
    assert round(parameters / 1e6, 1) == 79.3
    derived = {name for name in codec.state_dict() if name.endswith(".codebook")}
    assert len(tensors) == len(codec.state_dict()) - len(derived)


@pytest.mark.parametrize("newer", [False, True])
def test_kyutais_file_comes_back_to_the_bit(codec: MimiCodec, tmp_path: Path, newer: bool) -> None:
    tensors = to_public(codec.float(), "kyutai")
    if newer:
        tensors = {
            name.replace("in_proj_weight", "in_projs.0.weight").replace(
                "out_proj.weight", "out_projs.0.weight"
            ): tensor
            for name, tensor in tensors.items()
        }
        assert any("in_projs.0" in name for name in tensors)
    save_file(tensors, tmp_path / "mimi.safetensors")
    again = read_kyutai(tmp_path / "mimi.safetensors", codec.config)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for name, tensor in codec.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_kyutai_rotates_pairs_where_transformers_rotates_halves(
    small: Path, codec: MimiCodec
) -> None:
    theirs = load_file(small / "model.safetensors")
    ours = to_public(codec.float(), "kyutai")
    size = 4
    for half in ("encoder", "decoder"):
        packed = ours[f"{half}_transformer.transformer.layers.1.self_attn.in_proj_weight"]
        q, k, v = packed.split([4 * size, 2 * size, 2 * size])
        for mine, letter in ((q, "q"), (k, "k")):
            public = theirs[f"{half}_transformer.layers.1.self_attn.{letter}_proj.weight"]
            for head in range(len(mine) // size):
                for pair in range(size // 2):
                    first, second = public[head * size + pair], public[head * size + pair + 2]
                    assert torch.equal(mine[head * size + 2 * pair], first)
                    assert torch.equal(mine[head * size + 2 * pair + 1], second)
        assert torch.equal(v, theirs[f"{half}_transformer.layers.1.self_attn.v_proj.weight"])


@pytest.mark.slow
@torch.no_grad()
def test_kyutais_published_shape_loads_from_file_and_folder(tmp_path: Path) -> None:
    codec = build({}).float()
    folder = tmp_path / "moshi"
    folder.mkdir()
    file = folder / "tokenizer-e351c8d8-checkpoint125.safetensors"
    save_file(to_public(codec, "kyutai"), file)
    # Moshi's folder holds its language model and that one's config too.
    save_file({"text_emb.weight": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dim": 4096, "model_type": "moshi"}))
    pcm = noise(1, 1, 5 * 1920, dtype=torch.float32)
    for place in (file, folder):
        found = load_codec(place, codebooks=8)
        assert found.codebooks == ((2048,),) * 8
        assert torch.equal(found.encode(pcm), codec.encode(pcm)[:, :8])


def test_kyutais_names_are_known_by_their_names(codec: MimiCodec, tmp_path: Path) -> None:
    save_file(to_public(codec.float(), "kyutai"), tmp_path / "x.safetensors")
    for place in (tmp_path, tmp_path / "x.safetensors"):  # ours is smaller than the published one
        with pytest.raises(
            UserError,
            match=r"'encoder\.model\.0\.conv\.conv\.weight' has shape \(4, 1, 7\), "
            r"expected \(64, 1, 7\)",
        ):
            load_codec(place)


def test_a_folder_that_is_no_codec_says_what_would_be(tmp_path: Path) -> None:
    places: list[Callable[[], object]] = [
        lambda: None,
        lambda: (tmp_path / "config.json").write_text("{}"),
        lambda: save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors"),
        lambda: (tmp_path / "config.json").write_text('{"model_type": "moshi"}'),
    ]
    for add in places:
        add()
        with pytest.raises(UserError, match='"kind": "spectral".*"model_type": "mimi".*Kyutai'):
            load_codec(tmp_path)
    with pytest.raises(UserError, match="Kyutai"):
        load_codec(tmp_path / "model.safetensors")
