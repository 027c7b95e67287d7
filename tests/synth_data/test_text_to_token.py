"""Text to codes: fast equals slow, alone equals in company, and what goes wrong is seen."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import TOKENIZER, small_text_to_token
from torch import Tensor

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.quantize import FSQ
from audio_codec.sampling import Sampling
from audio_codec.speech_tokenizer import SpeechTokenizer
from synth_data import text_to_token as room
from synth_data.text_to_token import (
    CHARACTERS,
    NO_DIGIT,
    GenerationConfig,
    Line,
    TextToToken,
    TextToTokenConfig,
    cells,
    clock,
    digits,
    expected_frames,
    fit_length,
    generate,
    generate_slowly,
    load_text_to_token,
    stuck,
    transcribe,
)

TEXTS = [
    "Yes.",
    "The cat sat on the mat.",
    "one",
    "Where, oh where, are you going tonight?",
    "seven plus five is twelve",
    "A b c.",
    "It's late; go home now, please!",
]
# Whatever is drawn is accepted, and drawn once.
ANY = GenerationConfig(
    sampling=Sampling(temperature=1.0), batch=3, shortest=0, longest=3, stuck=999, attempts=1
)


def lines(pace: float = 1.0) -> list[Line]:
    return [Line(text, 100 + number, pace) for number, text in enumerate(TEXTS)]


def codes_of(model: TextToToken, asked: list[Line], config: GenerationConfig) -> list[list[int]]:
    return [said.codes.tolist() for said in generate(model, asked, config)]


# --- Text and codes as numbers --------------------------------------------------------------------


def test_a_word_looks_the_same_wherever_it_stands() -> None:
    found = cells("The cat, the CAT 2", 3)
    said = ["".join(CHARACTERS[i] for i in row if i >= 0) for row in found]
    assert said == [" th", "e", " ca", "t,", " th", "e", " ca", "t", " tw", "o"]
    assert cells("", 2).shape == (0, 2)
    assert ["".join(CHARACTERS[i] for i in row) for row in cells("ab", 1)] == [" ", "a", "b"]


@given(st.lists(st.integers(0, 4374), max_size=30))
def test_digits_are_those_of_the_quantizer(codes: list[int]) -> None:
    levels = (7, 5, 5, 5, 5)
    found = torch.from_numpy(digits(np.array(codes, np.uint16), levels))
    assert torch.equal(FSQ(levels).codes(found), torch.tensor(codes, dtype=torch.int64))


def test_codes_are_put_together_as_they_were_taken_apart() -> None:
    model = small_text_to_token()
    codes = np.arange(12)
    apart = torch.from_numpy(digits(codes, model.config.codebook)).view(6, -1)
    assert model.frames(apart).flatten().tolist() == codes.tolist()


def test_lengths_are_learned_and_never_nothing() -> None:
    texts = [*TEXTS, "no", "well, well", "twenty seven boats at sea", "hm! hm! hm!"]
    truth = (0.8, 1.5, 3.0, 4.0)
    config = TextToTokenConfig(codebook=(3,), rate=12.5, length=truth)
    pairs = [(text, expected_frames(text, config)) for text in texts]
    assert fit_length(pairs) == pytest.approx(truth)  # type: ignore[arg-type]
    less = config.model_copy(update={"length": (0.0, 0.0, 0.0, -3.0)})
    assert expected_frames("yes", less) == 1.0


@given(st.lists(st.sampled_from(["cat", "sat,", "I", "don't", "well?"]), min_size=1, max_size=9))
def test_cells_are_said_one_after_the_other_in_the_time_of_the_text(words: list[str]) -> None:
    text = " ".join(words)
    for size in (1, 3):
        config = TextToTokenConfig(codebook=(3,), rate=12.5, length=(0.8, 1.5, 3.0, 4.0), cell=size)
        times = clock(cells(text, size), config)
        assert (np.diff(times) >= 0).all() and times[0] > 2
        assert times[-1] < expected_frames(text, config) - 2
    # By hand: half of what every text takes, the word and its letters; the mark is in a cell apart.
    config = config.model_copy(update={"cell": 3})
    assert clock(cells("go now,", 3), config) == pytest.approx([3.55, 6.65, 10.1])


# --- The head -------------------------------------------------------------------------------------


def test_the_digits_of_a_frame_have_a_distribution() -> None:
    model = small_text_to_token(step=1)
    hidden = torch.randn(1, 16, dtype=torch.float64)
    everything = torch.tensor(list(itertools.product(range(3), range(2), range(2))))
    logits = model.logits(hidden.expand(len(everything), -1), everything)
    log_p = [torch.log_softmax(logits[f][:, 0], 1) for f in range(3)]
    joint = sum(log_p[f].gather(1, everything[:, f, None]).squeeze(1) for f in range(3))
    end = log_p[0][0, model.end]
    assert isinstance(joint, Tensor)
    assert float(joint.exp().sum() + end.exp()) == pytest.approx(1.0)
    # A digit depends on the ones before it, and on none behind.
    assert not torch.allclose(log_p[2][0], log_p[2][4])
    assert torch.equal(log_p[0][0], log_p[0][-1])


def test_the_loss_is_the_surprise_at_every_digit() -> None:
    model = small_text_to_token()
    text = model.text_rows(cells("hm", 2))
    rows = torch.from_numpy(np.concatenate((text, model.start_row()[None])))[None]
    steps = torch.tensor([[1, 0, 1, model.end, NO_DIGIT, NO_DIGIT]])
    times = torch.arange(rows.shape[1], dtype=torch.float64)[None]
    index = torch.tensor([rows.shape[1] - 1])
    nats = 0.0
    hidden = model(rows, times)[:, -1]
    for slot, digit in enumerate(steps[0, :4].tolist()):
        so_far = torch.full((1, 6), NO_DIGIT)
        so_far[0, :slot] = steps[0, :slot]
        frame, factor = divmod(slot, 3)
        logits = model.logits(hidden, so_far)[factor][0, frame]
        nats -= float(torch.log_softmax(logits, 0)[digit])
    # A frame and the end are two; padding changes nothing.
    assert float(model.loss(rows, times, index, steps)) == pytest.approx(nats / 2, rel=1e-6)
    padded = torch.cat((rows, torch.zeros_like(rows)), dim=1)
    more = torch.cat((steps, torch.full_like(steps, NO_DIGIT)))
    times = torch.cat((times, torch.zeros_like(times)), dim=1)
    again = model.loss(padded, times, torch.tensor([int(index), 0]), more)
    assert float(again) == pytest.approx(nats / 2, rel=1e-6)


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "step"), [(2, 2), (1, 3), (4, 1)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fast_equals_slow(cell: int, step: int, temperature: float) -> None:
    model = small_text_to_token(cell=cell, step=step)
    config = ANY.model_copy(update={"sampling": Sampling(temperature=temperature, top_p=0.95)})
    fast = generate(model, lines(1.2), config)
    slow = [generate_slowly(model, line, config) for line in lines(1.2)]
    assert [(a.codes.tolist(), a.fault) for a in fast] == [
        (b.codes.tolist(), b.fault) for b in slow
    ]
    if temperature:
        lengths = {len(said.codes) for said in fast}
        assert len(lengths) > 3 and any(length % step for length in lengths) == (step > 1)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(TEXTS))), batch=st.integers(1, 8))
def test_company_changes_nothing(order: list[int], batch: int) -> None:
    model = small_text_to_token()
    asked = lines()
    alone = [codes_of(model, [line], ANY)[0] for line in asked]
    config = ANY.model_copy(update={"batch": batch})
    assert codes_of(model, [asked[at] for at in order], config) == [alone[at] for at in order]


def test_seeds_and_paces_tell_lines_apart() -> None:
    model = small_text_to_token()
    with torch.no_grad():  # Untrained, it hardly listens.
        for name, weight in model.transformer.named_parameters():
            if "attention" in name:
                weight.mul_(10)
    same = Line("the cat sat", 1)
    others = [same._replace(seed=2), same._replace(pace=1.5), same._replace(seed=-(2**62))]
    found = codes_of(model, [same, same, *others], ANY)
    assert found[0] == found[1]
    assert all(codes != found[0] for codes in found[2:])


def test_rows_leave_once_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    draw = TextToToken.draw

    def watched(self: TextToToken, hidden: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return draw(self, hidden, *rest)

    monkeypatch.setattr(TextToToken, "draw", watched)
    asked = [Line("the cat sat on the mat", seed) for seed in range(150)]
    together = ANY.model_copy(update={"batch": 150})
    found = codes_of(small_text_to_token(), asked, together)
    assert sizes[0] == 150 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 32
    assert found[::10] == codes_of(small_text_to_token(), asked[::10], ANY)


def always(model: TextToToken, factor: int, digit: int, weight: float) -> TextToToken:
    with torch.no_grad():
        model.heads[factor].bias[digit] += weight
    return model


def test_what_goes_wrong_is_seen() -> None:
    line = Line("the cat sat on the mat", 0)
    config = GenerationConfig(attempts=1, stuck=8)

    early = generate(always(small_text_to_token(), 0, 3, 50), [line], config)[0]
    assert early.fault == "early" and len(early.codes) == 0

    never = always(small_text_to_token(), 0, 3, -99)
    endless = generate(never, [line], config)[0]
    limit = math.ceil(2 * expected_frames(line.text, never.config))
    assert endless.fault == "endless" and len(endless.codes) == limit

    for factor in range(3):
        always(never, factor, 1, 50)
    loop = generate(never, [line], config)[0]
    assert loop.fault == "stuck" and set(loop.codes.tolist()) == {1 + 3 + 6}

    long = generate(small_text_to_token(), [line._replace(text="cat " * 300), line], config)
    assert long[0].fault == "long" and len(long[0].codes) == 0 and long[1].fault != "long"

    slow = generate_slowly(small_text_to_token(), line, config)
    assert slow.fault == generate(small_text_to_token(), [line], config)[0].fault


def test_a_fault_is_drawn_again_with_other_noise() -> None:
    model = small_text_to_token()
    asked = [Line("the cat sat on the mat", seed) for seed in range(40)]
    strict = GenerationConfig(shortest=0.3, longest=3, stuck=99, attempts=1)
    once = generate(model, asked, strict)
    bad = [at for at, said in enumerate(once) if said.fault]
    assert 3 < len(bad) < 37
    twice = generate(model, asked, strict.model_copy(update={"attempts": 2}))
    again = generate(
        model, [asked[at]._replace(seed=asked[at].seed + room._AGAIN) for at in bad], strict
    )
    for at, (first, second) in enumerate(zip(once, twice, strict=True)):
        expected = again[bad.index(at)] if at in bad else first
        assert second.codes.tolist() == expected.codes.tolist() and second.fault == expected.fault
    assert sum(said.fault is not None for said in twice) < len(bad)


def test_loops_are_found_whatever_their_period() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4000, (6, 40))
    codes[1, 20:30] = 7  # ten times the same: nine repeats
    codes[2, 5:15] = np.tile([1, 2], 5)
    codes[3, 5:20] = np.tile([1, 2, 3, 4, 5], 3)  # a longer period than is looked for
    codes[4, 30:40] = 7
    lengths = np.array([40, 40, 40, 40, 35, 0])
    assert stuck(codes, lengths, 8).tolist() == [False, True, True, False, False, False]
    assert stuck(codes, lengths, 9).tolist() == [False, True, False, False, False, False]
    assert stuck(codes[:, :1], np.minimum(lengths, 1), 1).tolist() == [False] * 6


def test_nothing_to_say_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError, match="nothing to say"):
        generate(small_text_to_token(), [Line("...", 0)])
    assert generate(small_text_to_token(), []) == []


def test_a_checkpoint_comes_back_in_either_precision(tmp_path: Path) -> None:
    model = small_text_to_token().float()
    checkpoint.save(tmp_path / "model", model.config, model.state_dict(), dtype="fp32")
    assert codes_of(load_text_to_token(tmp_path / "model"), lines(), ANY) == codes_of(
        model, lines(), ANY
    )
    lower = load_text_to_token(tmp_path / "model", "bf16")
    assert next(lower.transformer.parameters()).dtype == torch.bfloat16
    assert lower.table.dtype == torch.float32
    assert sum(map(len, codes_of(lower, lines(), ANY))) > 0


@pytest.mark.parametrize(
    "changes",
    [{"transformer": {"dim": 16, "layers": 1, "heads": 2}}, {"cell": 0}, {"codebook": ()}],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        small_text_to_token(**changes)


def test_codes_of_many_lengths_are_read_back_as_each_alone() -> None:
    tokenizer = SpeechTokenizer(TOKENIZER).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    spoken = [rng.integers(0, 9, size) for size in (5, 0, 12, 1, 7)]
    alone = [
        tokenizer.transcribe(torch.from_numpy(codes)[None])[0] if len(codes) else ""
        for codes in spoken
    ]
    assert transcribe(tokenizer, spoken, batch=2) == alone and any(alone)
    deaf = SpeechTokenizer(TOKENIZER.model_copy(update={"ctc": False}))
    with pytest.raises(UserError, match="no CTC head"):
        transcribe(deaf, [])
