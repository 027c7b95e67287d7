"""The codec streams, has no delay beyond its frame, and decodes from fewer codebooks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from streams import Streaming, Tick, assert_streams, chunkings, scripts, streaming_settings
from torch import Tensor

from audio_codec import layers, spectral
from audio_codec.audio import FRAME_SIZE
from audio_codec.codec import Codec, coded_by
from audio_codec.layers import Linear, lay_out
from audio_codec.spectral import (
    HOP,
    Analysis,
    SemanticConfig,
    SpectralCodec,
    SpectralConfig,
    Synthesis,
)
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig, same_coder

CONFIG = SpectralConfig(
    tokenizer=TokenizerConfig(
        front_dim=8,
        front_blocks=1,
        dim=16,
        heads=2,
        layers_before=1,
        layers_after=1,
        window_seconds=0.16,
        levels=(5, 4, 3),
    ),
    encoder_dim=8,
    encoder_blocks=2,
    encoder_latent_dim=16,
    encoder_latent_blocks=2,
    latent=6,
    codebooks=(16, 16, 16),
    decoder_latent_dim=16,
    decoder_latent_blocks=2,
    decoder_dim=12,
    decoder_blocks=2,
)


def build(config: SpectralConfig = CONFIG) -> SpectralCodec:
    torch.manual_seed(1)
    codec = SpectralCodec(config)
    for parameter in codec.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    for size, level in enumerate(codec.quantizer.levels):
        level.codebook.copy_(torch.randn_like(level.codebook) / 2**size)
    codec.eval().requires_grad_(False)
    if codec.tokenizer is not None:
        calibrate(codec.tokenizer)
    return codec


def calibrate(tokenizer: SpeechTokenizer) -> None:
    """Let the random tokenizer's bottleneck use all of its codes on noise."""
    numbers = tokenizer.features(tokenizer.mel(noise(4, 1, 40 * FRAME_SIZE, seed=9)))
    tokenizer.quantizer.mean.copy_(numbers.mean((0, 1)))
    tokenizer.quantizer.variance.copy_(numbers.var((0, 1)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_of_another_codec_around_the_same_tokenizer_can_be_told() -> None:
    codec, other = build(), build()
    told = coded_by(codec)
    assert told is not None and same_coder(told, coded_by(other))
    other.head[1].weight.mul_(-1)  # what makes sound of codes says nothing of them
    assert same_coder(told, coded_by(other))
    other.front_in.weight.copy_(torch.randn_like(other.front_in.weight))
    assert codec.tokenizer is not None
    assert not same_coder(told, coded_by(other))
    assert same_coder(told, codec.tokenizer.fingerprint()), "a tokenizer knows no codec"
    assert same_coder(None, told) and same_coder(told, None)


# --- Streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [480, 960])
@streaming_settings
@given(chunks=chunkings(16), script=scripts())
def test_analysis_streams(window: int, chunks: list[int], script: list[Tick]) -> None:
    analysis, generator = Analysis(window), torch.Generator().manual_seed(2)
    module = Streaming(
        analysis,
        lambda batch, most: analysis.new_state(batch),
        lambda n: torch.randn(1, n * HOP, generator=generator),
        tolerance=1e-4,
    )
    assert_streams(module, chunks, script)


@pytest.mark.parametrize("window", [480, 960])
@streaming_settings
@given(chunks=chunkings(16), script=scripts())
def test_synthesis_streams(window: int, chunks: list[int], script: list[Tick]) -> None:
    synthesis, generator = Synthesis(window), torch.Generator().manual_seed(3)
    module = Streaming(
        synthesis,
        lambda batch, most: synthesis.new_state(batch),
        lambda n: torch.randn(1, n, window + 2, generator=generator),
        tolerance=1e-5,
    )
    assert_streams(module, chunks, script)


@streaming_settings
@given(chunks=chunkings(10), script=scripts(8))
def test_encoding_streams(chunks: list[int], script: list[Tick]) -> None:
    codec, generator = build(), torch.Generator().manual_seed(4)
    module = Streaming(
        codec.encode,
        codec.new_encoder_state,
        lambda n: 0.1 * torch.randn(1, 1, n * FRAME_SIZE, generator=generator),
        axis=2,
        out_axis=2,
    )
    assert_streams(module, chunks, script)


@streaming_settings
@given(chunks=chunkings(12), script=scripts())
def test_decoding_streams(chunks: list[int], script: list[Tick]) -> None:
    codec, generator = build(), torch.Generator().manual_seed(5)
    module = Streaming(
        codec.decode,
        codec.new_decoder_state,
        lambda n: torch.cat(
            [
                torch.randint(math.prod(factors), (1, 1, n), generator=generator)
                for factors in codec.codebooks
            ],
            dim=1,
        ),
        axis=2,
        out_axis=2,
        tolerance=1e-4,
    )
    assert_streams(module, chunks, script)


DISTILLED = CONFIG.model_copy(update={"semantic": SemanticConfig(size=32, dim=5)})


@streaming_settings
@given(chunks=chunkings(10), script=scripts(8))
def test_a_distilled_codebook_0_streams(chunks: list[int], script: list[Tick]) -> None:
    codec, generator = build(DISTILLED), torch.Generator().manual_seed(6)
    module = Streaming(
        codec.encode,
        codec.new_encoder_state,
        lambda n: 0.1 * torch.randn(1, 1, n * FRAME_SIZE, generator=generator),
        axis=2,
        out_axis=2,
    )
    assert_streams(module, chunks, script)


# --- Delay ----------------------------------------------------------------------------------------


def test_an_impulse_changes_nothing_before_its_frame_and_something_in_it() -> None:
    codec = build()
    assert codec.delay == 0
    pcm = noise(1, 1, 6 * FRAME_SIZE)
    codes = codec.encode(pcm)
    sound = codec.decode(codes)
    for place in (0, 1, 700, FRAME_SIZE - 250):
        sample = 2 * FRAME_SIZE + place
        struck = pcm.clone()
        struck[..., sample] += 3.0
        new_codes = codec.encode(struck)
        assert torch.equal(new_codes[..., :2], codes[..., :2])
        assert not torch.equal(new_codes[..., 2], codes[..., 2])
        new_sound = codec.decode(new_codes)
        assert torch.equal(new_sound[..., : 2 * FRAME_SIZE], sound[..., : 2 * FRAME_SIZE])
        frame = slice(2 * FRAME_SIZE, 3 * FRAME_SIZE)
        assert not torch.equal(new_sound[..., frame], sound[..., frame])


def test_a_new_code_is_heard_from_the_first_hop_of_its_frame() -> None:
    codec = build()
    codes = codec.encode(noise(1, 1, 5 * FRAME_SIZE))
    sound = codec.decode(codes)
    for book in range(codes.shape[1]):
        other = codes.clone()
        other[0, book, 3] = (other[0, book, 3] + 1) % 16
        changed = (codec.decode(other) != sound)[0, 0].nonzero()
        first = int(changed.min()) - 3 * FRAME_SIZE
        # A window begins with its hop; Hann's first sample is nothing.
        assert 0 <= first <= 2


def test_an_analysis_window_ends_with_its_hop() -> None:
    analysis = Analysis(960)
    pcm = torch.zeros(1, 10 * HOP)
    silent = analysis(pcm)
    for sample in (5 * HOP + 1, 5 * HOP + 100, 6 * HOP - 1):  # Hann's first sample is nothing
        struck = pcm.clone()
        struck[0, sample] = 1.0
        changed = (analysis(struck) != silent).any(-1)[0].nonzero().flatten().tolist()
        # Seen by the window of its own hop and the three after it.
        assert changed == [5, 6, 7, 8]


def test_a_synthesis_window_begins_with_its_hop() -> None:
    synthesis = Synthesis(960)
    bins = 481
    silent = torch.cat((torch.full((1, 8, bins), -50.0), torch.zeros(1, 8, bins)), dim=-1)
    loud = silent.clone()
    loud[0, 3, :bins] = 0.0  # a click in the middle of nothing
    loud[0, 3, bins:] = torch.linspace(0, -math.pi * 480, bins)  # delayed to the window's middle
    sound = synthesis(loud)[0]
    assert sound.shape == (8 * HOP,)
    assert bool((sound[: 3 * HOP].abs() < 1e-9).all())
    assert bool((sound[7 * HOP :].abs() < 1e-9).all())
    assert int(sound.abs().argmax()) == 3 * HOP + 480


@pytest.mark.parametrize("window", [480, 720, 960, 1920])
def test_spectra_of_the_right_place_are_resynthesized_exactly(window: int) -> None:
    synthesis, hops = Synthesis(window), 20
    pcm = noise(1, hops * HOP + window)
    frames = pcm.unfold(1, window, HOP)[:, :hops]  # each begins with its hop
    spectrum = torch.fft.rfft(frames)
    head = torch.cat((spectrum.abs().clamp(min=1e-9).log(), spectrum.angle()), dim=-1)
    sound = synthesis(head)
    settled = slice(window - HOP, hops * HOP)  # from here on every window over a sample exists
    torch.testing.assert_close(sound[:, settled], pcm[:, settled], rtol=0, atol=1e-4)


def test_a_derailed_head_stays_finite() -> None:
    head = torch.cat((torch.full((1, 4, 481), 1e4), torch.full((1, 4, 481), 1e6)), dim=-1)
    assert bool(Synthesis(960)(head).isfinite().all())


# --- Codes ----------------------------------------------------------------------------------------


def test_codes_have_the_shape_and_range_that_the_codec_says() -> None:
    codec: Codec = build()
    codes = codec.encode(noise(2, 1, 30 * FRAME_SIZE))
    assert codes.shape == (2, 4, 30) and codes.dtype == torch.int64
    assert codec.codebooks == ((5, 4, 3), (16,), (16,), (16,))
    for book, factors in zip(codes.unbind(1), codec.codebooks, strict=True):
        assert int(book.min()) >= 0 and int(book.max()) < math.prod(factors)
        assert book.unique().numel() > 3
    assert codec.decode(codes).shape == (2, 1, 30 * FRAME_SIZE)
    assert codec.frame_size == FRAME_SIZE and codec.sample_rate == 24_000


def test_codebook_0_is_the_tokenizers() -> None:
    codec = build()
    pcm = noise(2, 1, 8 * FRAME_SIZE)
    assert torch.equal(codec.encode(pcm)[:, 0], codec.tokenizer.encode(pcm))


def test_fewer_codebooks_decode_to_another_coarser_sound() -> None:
    codec = build()
    codes = codec.encode(noise(1, 1, 8 * FRAME_SIZE))
    sounds = [codec.decode(codes[:, :kept]) for kept in range(1, 5)]
    assert all(sound.shape == (1, 1, 8 * FRAME_SIZE) for sound in sounds)
    assert all(bool(sound.isfinite().all()) for sound in sounds)
    gaps = [float((sound - sounds[-1]).square().mean()) for sound in sounds]
    assert gaps[0] > 0 and gaps[1] > 0 and gaps[2] > 0 and gaps[3] == 0
    # The residual is added, not replaced: a zero residual is the semantic sound.
    for level in codec.quantizer.levels:
        level.codebook.zero_()
    torch.testing.assert_close(codec.decode(codes), sounds[0])


def test_training_matches_encoding_and_decoding() -> None:
    codec = build()
    pcm = noise(2, 1, 6 * FRAME_SIZE)
    output = codec(pcm)
    assert torch.equal(output.codes, codec.encode(pcm))
    torch.testing.assert_close(output.pcm, codec.decode(output.codes), rtol=0, atol=1e-4)
    shallow = codec(pcm, torch.tensor([1, 3]))
    torch.testing.assert_close(
        shallow.pcm[:1], codec.decode(output.codes[:1, :2]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(shallow.pcm[1:], output.pcm[1:])


def test_training_moves_the_codec_and_not_the_tokenizer() -> None:
    codec = build().train().requires_grad_(True)
    codec.tokenizer.eval().requires_grad_(False)
    before = {name: t.clone() for name, t in codec.tokenizer.state_dict().items()}
    output = codec(noise(2, 1, 6 * FRAME_SIZE))
    (output.pcm.square().mean() + output.commitment).backward()
    for name, parameter in codec.named_parameters():
        if name.startswith("tokenizer."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), f"{name} gets no gradient"
    assert all(torch.equal(before[n], t) for n, t in codec.tokenizer.state_dict().items())


def as_stored(config: SpectralConfig) -> SpectralCodec:
    """With matrices as a checkpoint in int8 brings them back, laid out."""
    codec = build(config)
    for part in codec.modules():
        if isinstance(part, Linear):
            scale = part.weight.abs().amax(1, keepdim=True) / 127
            part.weight.data = (part.weight / scale).round() * scale
    lay_out(codec)
    return codec


@pytest.mark.parametrize("config", [CONFIG, DISTILLED], ids=["tokenizer", "distilled"])
@torch.inference_mode()
def test_in_compiled_loops_a_stream_is_what_it_is_in_one_pass_of_torchs(
    config: SpectralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, pcm = as_stored(config), noise(2, 1, 12 * FRAME_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "FEW", 0)
        codes = codec.encode(pcm)
        whole = codec.decode(codes)
    # Live, none of what would wake torch's other threads: they spin longer than a frame takes.
    for place, name in ((torch.fft, "rfft"), (torch.fft, "irfft"), (torch, "log"), (F, "gelu")):
        monkeypatch.setattr(place, name, pytest.fail)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", pytest.fail)
    states = codec.new_encoder_state(2), codec.new_decoder_state(2)
    heard, said = [], []
    for frame in pcm.split(FRAME_SIZE, 2):
        heard.append(codec.encode(frame, states[0]))
        said.append(codec.decode(codes[:, :, len(said) : len(said) + 1], states[1]))
    assert float((torch.cat(heard, 2) == codes).float().mean()) > 0.97  # a rounding can tip a tie
    torch.testing.assert_close(torch.cat(said, 2), whole, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_analysis_in_half_precision_is_that_of_single(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = Analysis(960), Analysis(960).bfloat16()
    pcm = noise(2, 6 * HOP)
    for few in (layers.FEW, 0):
        monkeypatch.setattr(layers, "FEW", few)
        torch.testing.assert_close(half(pcm), single(pcm), rtol=0.05, atol=0.02)
        state = half.new_state(2)
        parts = [half(part, state) for part in pcm.split(HOP, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), single(pcm), rtol=0.05, atol=0.02)


@torch.inference_mode()
def test_what_codebook_0_adds_is_known_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = as_stored(CONFIG)
    codes = torch.randint(60, (2, 5))
    table, exact = codec._embed(codes), codec.semantic(codec.embed_semantic(codes))
    assert codec.unchanged()
    torch.testing.assert_close(table, exact, rtol=0, atol=1e-5)
    codec = copy.deepcopy(codec)
    assert not codec.unchanged()
    with torch.inference_mode(False):
        trained = as_stored(CONFIG)
        with torch.no_grad():
            trained.semantic[2].weight.mul_(2)
    assert not trained.unchanged()
    assert not torch.allclose(trained._embed(codes), table)
    many = as_stored(DISTILLED)
    assert many.packed is not None
    monkeypatch.setattr(spectral, "_LISTED", 31)
    many.pack()
    assert many.packed is None  # a table of them all would be too long


@pytest.mark.parametrize("config", [CONFIG, DISTILLED], ids=["tokenizer", "distilled"])
def test_each_row_passes_the_quantizers_in_its_own_way(config: SpectralConfig) -> None:
    codec, pcm = build(config), noise(4, 1, 5 * FRAME_SIZE)
    output = codec(pcm, torch.tensor([0, 2, 3, 0]), torch.tensor([False, False, False, True]))
    codes = codec.encode(pcm)
    assert torch.equal(output.codes, codes)
    for row, kept in ((0, 1), (1, 3), (2, 4)):
        alone = codec.decode(codes[row : row + 1, :kept])
        torch.testing.assert_close(output.pcm[row : row + 1], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(output.pcm[3:], codec.decode(codes[3:]), atol=1e-3)
    # Around the quantizers their codes say nothing.
    for level in codec.quantizer.levels:
        level.codebook.zero_()
    again = codec(pcm, torch.tensor([0, 2, 3, 0]), torch.tensor([False, False, False, True]))
    torch.testing.assert_close(again.pcm[3], output.pcm[3])
    assert not torch.allclose(again.pcm[2], output.pcm[2], atol=1e-3)


def test_a_row_that_keeps_only_codebook_0_teaches_what_it_keeps() -> None:
    codec = build().train().requires_grad_(True)
    codec(noise(2, 1, 4 * FRAME_SIZE), torch.tensor([0, 0])).pcm.square().mean().backward()
    assert codec.front_in.weight.grad is None or not bool(codec.front_in.weight.grad.any())
    assert bool(codec.semantic[0].weight.grad.any()) and bool(codec.up.weight.grad.any())


def test_a_distilled_codec_has_no_tokenizer() -> None:
    codec = build(DISTILLED)
    assert codec.codebooks == ((32,), (16,), (16,), (16,))
    assert codec.tokenizer is None
    assert not [name for name in codec.state_dict() if name.startswith("tokenizer")]
    pcm = noise(2, 1, 6 * FRAME_SIZE)
    output = codec(pcm)
    assert output.semantic is not None and output.semantic.shape == (2, 6, 5)
    torch.testing.assert_close(output.semantic, codec.semantic_vq.decode(output.codes[:, 0]))
    assert output.codes[:, 0].unique().numel() > 3
    torch.testing.assert_close(output.pcm, codec.decode(output.codes), rtol=0, atol=1e-4)
    assert build().forward(pcm).semantic is None


def test_training_moves_all_of_a_distilled_codec() -> None:
    codec = build(DISTILLED).train().requires_grad_(True)
    output = codec(noise(2, 1, 6 * FRAME_SIZE))
    (output.pcm.square().mean() + output.commitment + output.semantic.square().mean()).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), f"{name} gets no gradient"


def test_training_mode_leaves_the_tokenizer_frozen() -> None:
    codec = build().train()
    assert codec.training and codec.quantizer.training
    assert codec.tokenizer is not None and not codec.tokenizer.training
    assert not any(module.training for module in codec.tokenizer.modules())


def test_the_shipped_shape_has_not_changed() -> None:
    codec = SpectralCodec(SpectralConfig())
    names = {name.split(".")[0] for name in codec.state_dict()}
    assert names == {
        *("tokenizer", "front_in", "front", "down", "latent", "to_latent", "semantic"),
        *("quantizer", "from_latent", "decoder_latent", "up", "back", "head"),
    }
    size = sum(p.numel() for n, p in codec.named_parameters() if not n.startswith("tokenizer"))
    assert size == pytest.approx(14.0e6, rel=0.03)


@pytest.mark.gpu
def test_a_gpu_codes_and_decodes_as_the_cpu_does() -> None:
    for config in (CONFIG, DISTILLED):
        here, there = build(config), build(config).cuda()
        pcm = noise(2, 1, 12 * FRAME_SIZE)
        codes = here.encode(pcm)
        agree = (there.encode(pcm.cuda()).cpu() == codes).float().mean()
        assert float(agree) > 0.98  # a rounding can tip a tie
        torch.testing.assert_close(
            there.decode(codes.cuda()).cpu(), here.decode(codes), rtol=1e-3, atol=1e-3
        )
        state = there.new_encoder_state(2)
        chunks = [there.encode(part.cuda(), state) for part in pcm.split(FRAME_SIZE, 2)]
        assert float((torch.cat(chunks, 2).cpu() == codes).float().mean()) > 0.98


def test_silence_in_gives_finite_codes_and_gradients() -> None:
    codec = build().train().requires_grad_(True)
    codec.tokenizer.eval().requires_grad_(False)
    output = codec(torch.zeros(2, 1, 4 * FRAME_SIZE))
    (output.pcm.square().mean() + output.commitment).backward()
    assert bool(output.pcm.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in codec.parameters() if p.grad is not None)


def test_an_untrained_codec_starts_near_silence() -> None:
    codec = SpectralCodec(CONFIG).eval()
    with torch.no_grad():
        sound = codec.decode(codec.encode(noise(1, 1, 8 * FRAME_SIZE)))
    assert float(sound.abs().max()) < 0.2
