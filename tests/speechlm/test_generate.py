"""The fast step against the slow obvious generation, and that slots keep to themselves."""

from __future__ import annotations

import pytest
import torch

from audio_codec.sampling import Sampling
from audio_codec.transformer import TransformerConfig
from speechlm.generate import LMState, generate, new_state, step
from speechlm.model import LMConfig, LMSampling, SpeechLM
from speechlm.streams import BOS, EOS, SPEECH, TEXT, UNKNOWN, Streams

GREEDY = LMSampling(text=Sampling(temperature=0), audio=Sampling(temperature=0))
WARM = LMSampling(
    text=Sampling(temperature=0.9, top_k=7),
    audio=Sampling(temperature=1.0, top_k=4, top_p=0.9),
    repetition_penalty=1.5,
)


def small(heard: bool = True, delay: int | tuple[int, ...] = 1) -> SpeechLM:
    streams = Streams(
        text_size=20, codebooks=((3, 2), (5,), (5,)), heard=heard, acoustic_delay=delay
    )
    config = LMConfig(
        streams=streams,
        temporal=TransformerConfig(dim=16, layers=2, heads=2, window=5),
        depth=TransformerConfig(dim=16, layers=2, heads=2),
        codec="none",
    )
    return SpeechLM(config).eval()


def user_codes(batch: int, time: int) -> torch.Tensor:
    return torch.stack([torch.randint(size, (batch, time)) for size in (6, 5, 5)], dim=1)


def run(
    model: SpeechLM, user: torch.Tensor, state: LMState, sampling: LMSampling
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    outputs = [step(model, user[:, :, t], state, sampling) for t in range(user.shape[2])]
    return [(o.codes, o.ready, o.text, o.heard) for o in outputs]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize(("heard", "delay"), [(True, 1), (False, 2), (True, 0), (True, (2, 1))])
def test_step_equals_generate_past_the_window(
    sampling: LMSampling, heard: bool, delay: int | tuple[int, ...]
) -> None:
    model, user = small(heard, delay), user_codes(3, 14)
    seed = torch.tensor([1, 2, 3])
    slow = generate(model, user, seed, sampling)
    state = new_state(model, 3)
    state.seed.copy_(seed)
    fast = run(model, user, state, sampling)
    assert torch.equal(torch.stack([text for _, _, text, _ in fast], 1), slow.text)
    assert torch.equal(torch.stack([h for _, _, _, h in fast], 1), slow.heard)
    assert [bool(ready.all()) for _, ready, _, _ in fast] == [
        t >= model.streams.longest_delay for t in range(14)
    ]
    voice = [codes for codes, ready, _, _ in fast if bool(ready.all())]
    assert torch.equal(torch.stack(voice, 2), slow.codes)


def test_a_conversation_does_not_depend_on_the_batch() -> None:
    model, user = small(), user_codes(3, 10)
    together = new_state(model, 3)
    together.seed.copy_(torch.tensor([7, 8, 9]))
    alone = new_state(model, 1)
    alone.seed.fill_(8)
    expected = run(model, user, together, WARM)
    for (codes, _, text, _), (one, _, said, _) in zip(
        expected, run(model, user[1:2], alone, WARM), strict=True
    ):
        assert torch.equal(codes[1:2], one) and torch.equal(text[1:2], said)


def test_a_frozen_slot_goes_on_where_it_was() -> None:
    model, user = small(), user_codes(2, 12)
    straight = new_state(model, 2)
    expected = run(model, user, straight, WARM)
    state = new_state(model, 2)
    got = run(model, user[:, :, :6], state, WARM)
    state.active[0] = False
    pause = run(model, user_codes(2, 3), state, WARM)
    assert not any(bool(ready[0]) for _, ready, _, _ in pause)
    state.active[0] = True
    got += run(model, user[:, :, 6:], state, WARM)
    for (codes, _, text, _), (other, _, said, _) in zip(expected, got, strict=True):
        assert torch.equal(codes[0], other[0]) and text[0] == said[0]


def test_a_reset_slot_is_a_fresh_conversation() -> None:
    model, user = small(), user_codes(2, 8)
    state = new_state(model, 2)
    first = run(model, user, state, WARM)
    state.reset([1])
    again = run(model, user, state, WARM)
    assert all(torch.equal(a[0][1], b[0][1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0][0], b[0][0]) for a, b in zip(first, again, strict=True))


def test_the_future_never_changes_the_past() -> None:
    model, user = small(), user_codes(1, 10)
    changed = user.clone()
    changed[:, :, 6:] = 0
    one = run(model, user, new_state(model, 1), WARM)
    other = run(model, changed, new_state(model, 1), WARM)
    for t in range(6):
        assert torch.equal(one[t][0], other[t][0]) and torch.equal(one[t][2], other[t][2])


def test_settings_of_a_slot_are_its_own() -> None:
    model, user = small(), user_codes(1, 10).expand(2, -1, -1)
    state = new_state(model, 2)
    state.text_temperature[1] = state.audio_temperature[1] = -1.0
    warm = run(model, user, state, WARM)
    greedy = run(
        model,
        user,
        new_state(model, 2),
        GREEDY.model_copy(update={"repetition_penalty": WARM.repetition_penalty}),
    )
    assert all(torch.equal(a[0][1], b[0][1]) for a, b in zip(warm, greedy, strict=True))
    assert not all(torch.equal(a[0][0], b[0][0]) for a, b in zip(warm, greedy, strict=True))


def test_special_pieces_are_never_said() -> None:
    model = small()
    with torch.no_grad():
        model.text_head.weight[[UNKNOWN, BOS, EOS, SPEECH, TEXT]] *= 100
    said = run(model, user_codes(4, 12), new_state(model, 4), WARM)
    ids = {int(i) for _, _, text, heard in said for i in (*text, *heard)}
    assert ids.isdisjoint({UNKNOWN, BOS, EOS, SPEECH, TEXT})


def test_the_repetition_guard_makes_repeats_rarer() -> None:
    model, user = small(), user_codes(4, 30)

    def repeats(penalty: float) -> int:
        sampling = WARM.model_copy(update={"repetition_penalty": penalty})
        text = torch.stack([t for _, _, t, _ in run(model, user, new_state(model, 4), sampling)], 1)
        said = [[int(i) for i in row if i > 6] for row in text]
        return sum(len(row) - len(set(row)) for row in said)

    assert repeats(1e6) < repeats(1.0)
