"""Untrained models as small as they get, for whatever test needs a real one."""

from typing import Any

import torch

from audio_codec.spectral import SpectralCodec, SpectralConfig
from audio_codec.speech_tokenizer import TokenizerConfig
from audio_codec.transformer import TransformerConfig
from speechlm.duplex import Duplex
from speechlm.model import LMConfig, SpeechLM
from speechlm.streams import Streams
from speechlm.text_tokenizer import train_text_tokenizer
from synth_data.text_to_token import TextToToken, TextToTokenConfig

TOKENIZER = TokenizerConfig(
    front_dim=16,
    front_blocks=1,
    dim=16,
    heads=2,
    layers_before=1,
    layers_after=1,
    window_seconds=0.5,
    levels=(3, 3),
)

CODEC = SpectralConfig(
    tokenizer=TOKENIZER,
    encoder_dim=16,
    encoder_blocks=1,
    encoder_latent_dim=16,
    encoder_latent_blocks=1,
    latent=8,
    codebooks=(16, 16),
    decoder_latent_dim=16,
    decoder_latent_blocks=1,
    decoder_dim=16,
    decoder_blocks=1,
)


def small_codec() -> SpectralCodec:
    """A codec of three codebooks, 9 + 16 + 16 codes."""
    torch.manual_seed(0)
    return SpectralCodec(CODEC).eval()


def small_duplex() -> Duplex:
    """A whole model; its window of 6 frames wraps within half a second."""
    codec = small_codec()
    tokenizer = train_text_tokenizer(["one two three four five six"] * 3, 100)
    config = LMConfig(
        streams=Streams(text_size=tokenizer.size, codebooks=codec.codebooks),
        temporal=TransformerConfig(dim=16, layers=2, heads=2, window=6),
        depth=TransformerConfig(dim=16, layers=1, heads=2),
        codec="codec",
    )
    return Duplex(codec, SpeechLM(config), tokenizer)


def small_text_to_token(**changes: Any) -> TextToToken:
    """A model of 12 codes that ends a line after some frames; in float64, so that sums are exact
    enough for equal draws whatever the shape of a batch.
    """
    layout = {
        "codebook": (3, 2, 2),
        "rate": 12.5,
        "cell": 2,
        "step": 2,
        "length": (0.3, 0.5, 0.5, 2.0),
        "transformer": {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "window": 120},
        "head": 8,
    }
    torch.manual_seed(0)
    model = TextToToken(TextToTokenConfig.model_validate({**layout, **changes})).double()
    end = model.heads[0].bias
    with torch.no_grad():
        end[model.end] = -0.3
    return model.eval().requires_grad_(False)
