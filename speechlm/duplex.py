"""The whole model as one streaming module: 80 ms of sound in, 80 ms of sound and text out.

    pcm ──▶ codec encoder ──▶ codes ──▶ language model ──▶ own codes ──▶ codec decoder ──▶ pcm
                                             └──▶ text, heard

Latency from a sound to a voice that takes it into account: 80 ms for the frame to fill, 80 ms for
each column of acoustic delay, the codec's own delay, and the time to compute.

Shapes: B conversations (slots); a tick is one frame of 1920 samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from audio_codec.codec import Codec
from audio_codec.errors import UserError
from audio_codec.state import State, all_active
from speechlm.generate import MAX_TOP_K, LMState, new_state, step
from speechlm.model import LMSampling, SpeechLM
from speechlm.streams import PAD
from speechlm.text_tokenizer import TextTokenizer


@dataclass(slots=True)
class DuplexState(State):
    """Everything that `B` conversations remember; a row of it is a conversation."""

    encoder: State
    lm: LMState
    decoder: State


@dataclass(frozen=True, slots=True)
class DuplexOutput:
    """What one tick gives."""

    pcm: Tensor  # [B, 1, 1920] float32, silence where a conversation is frozen or has just begun
    text: Tensor  # [B] int64, what it says; PAD and EPAD are no text
    heard: Tensor  # [B] int64, what it hears the user say


class Duplex:
    """Codec and language model in step. It has no state of its own: see `new_state`."""

    def __init__(
        self,
        codec: Codec,
        model: SpeechLM,
        tokenizer: TextTokenizer,
        sampling: LMSampling | None = None,
    ) -> None:
        """Raises UserError when the three were not made for each other."""
        if tuple(codec.codebooks) != model.streams.codebooks:
            raise UserError(
                f"codec: its codebooks are {codec.codebooks}, but the language model was trained "
                f"on {model.streams.codebooks}."
            )
        if tokenizer.size != model.streams.text_size:
            raise UserError(
                f"text.model: it has {tokenizer.size} pieces, but the language model was trained "
                f"with {model.streams.text_size}."
            )
        self.codec = codec
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling or model.config.sampling
        self.sample_rate = codec.sample_rate
        self.frame_size = codec.frame_size
        self.delay_frames = model.streams.longest_delay
        self._pieces = tokenizer.pieces()

    def new_state(self, batch: int) -> DuplexState:
        """The state of `batch` conversations that have not begun."""
        return DuplexState(
            all_active(batch, self.model.text_head.weight.device),
            self.codec.new_encoder_state(batch),
            new_state(self.model, batch),
            self.codec.new_decoder_state(batch),
        )

    def configure(
        self,
        state: DuplexState,
        slot: int,
        *,
        seed: int | None = None,
        text_temperature: float | None = None,
        audio_temperature: float | None = None,
        text_topk: int | None = None,
        audio_topk: int | None = None,
    ) -> None:
        """Settings of one conversation; what is not given stays. A reset forgets them all.

        A temperature of 0 takes the likeliest token; a top-k of 0 means the model's own. Raises
        UserError for a value out of range.
        """
        lm = state.lm
        if seed is not None:
            if not 0 <= seed < 2**63:
                raise UserError(f"seed is {seed}; it must be from 0 to 2^63 − 1.")
            lm.seed[slot] = seed
        for name, value, top_k in (
            ("text_topk", text_topk, lm.text_top_k),
            ("audio_topk", audio_topk, lm.audio_top_k),
        ):
            if value is not None:
                if value < 0:
                    raise UserError(f"{name} is {value}; it must be 0 or more.")
                top_k[slot] = min(value, MAX_TOP_K)
        for name, heat, temperature in (
            ("text_temperature", text_temperature, lm.text_temperature),
            ("audio_temperature", audio_temperature, lm.audio_temperature),
        ):
            if heat is not None:
                if not 0 <= heat <= 10:
                    raise UserError(f"{name} is {heat}; it must be from 0 to 10.")
                temperature[slot] = heat if heat > 0 else -1.0

    @torch.inference_mode()
    def step(self, pcm: Tensor, state: DuplexState) -> DuplexOutput:
        """One tick: pcm float32 [B, 1, 1920] of the users in, the assistants' out.

        Conversations that are not active are left as they are, and are silent.
        """
        codes = self.codec.encode(pcm, state.encoder)[:, :, 0]
        drawn = step(self.model, codes, state.lm, self.sampling)
        active = state.active.clone()
        # A conversation that has just begun has no whole frame yet: its decoder waits.
        state.active.copy_(drawn.ready)
        voice = drawn.codes.masked_fill(~drawn.ready[:, None], 0)
        sound = self.codec.decode(voice[:, :, None], state.decoder)
        state.active.copy_(active)
        return DuplexOutput(
            pcm=sound * drawn.ready[:, None, None],
            text=drawn.text.masked_fill(~active, PAD),
            heard=drawn.heard.masked_fill(~active, PAD),
        )

    def piece(self, token: int) -> str:
        """What a token adds to the transcript: a piece of a word, " " in front of a new word."""
        return self._pieces[token]
