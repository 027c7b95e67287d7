"""Documents packed into a row are none of each other's business, in every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audio_codec.attention import Documents, attend, attend_documents
from audio_codec.transformer import Transformer, TransformerConfig
from speechlm import documents
from speechlm.data import Packer
from speechlm.documents import Document, WeightConfig
from speechlm.model import Batch, LMConfig, LossConfig, SpeechLM
from speechlm.streams import ABSENT, Streams
from speechlm.text_tokenizer import train_text_tokenizer
from synth_data import quiz

LENGTH = 64
WEIGHTS = WeightConfig()
TOKENIZER = train_text_tokenizer(quiz.sentences("train", 200, 0), 200)
STREAMS = Streams(text_size=TOKENIZER.size, codebooks=((3, 2), (5,), (5,)))


def codes(rng: np.random.Generator, frames: int) -> np.ndarray:
    return np.stack([rng.integers(0, size, frames) for size in STREAMS.code_sizes])


def text(rng: np.random.Generator) -> Document:
    words = rng.choice(["four", "seven", "water", "is", "cold"], rng.integers(2, 9))
    return documents.sentence_document(" ".join(words), STREAMS, TOKENIZER)


def question(rng: np.random.Generator) -> Document:
    return documents.question_document(
        [("What is two plus two?", "Four.")], STREAMS, TOKENIZER, WEIGHTS, lambda n: n + 1
    )


def interleaved(rng: np.random.Generator) -> Document:
    spans = [TOKENIZER.encode("water is"), codes(rng, int(rng.integers(3, 12))), [9, 10]]
    return documents.interleaved_document(
        spans, STREAMS, WEIGHTS, "own" if rng.random() < 0.7 else "user"
    )


def duplex(rng: np.random.Generator) -> Document:
    frames = int(rng.integers(5, 30))
    pieces = rng.integers(7, STREAMS.text_size, (2, frames)).astype(np.int32)
    said = np.where(rng.random(frames) < 0.3, pieces[0], 0)
    heard = np.where(rng.random(frames) < 0.3, pieces[1], 0)
    both = np.stack([codes(rng, frames), codes(rng, frames)]).astype(np.uint16)
    dialogue = documents.Dialogue(both, said, heard, rng.random((2, frames)) < 0.5)
    return documents.dialogue_document(dialogue, STREAMS, WEIGHTS, rng)


FORMATS = {"text": text, "question": question, "interleaved": interleaved, "duplex": duplex}


class Listed:
    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def document(self, lane: int, number: int) -> Document:
        return self.documents[number]


def alone(documents: list[Document]) -> Batch:
    """Each document in a row of its own, with nothing behind it."""
    shape = (len(documents), STREAMS.count, LENGTH)
    inputs, targets = np.full(shape, ABSENT, np.int64), np.full(shape, ABSENT, np.int64)
    weights = np.zeros(shape, np.float32)
    for row, document in enumerate(documents):
        size = document.weights.shape[1]
        inputs[row, :, :size] = document.columns[:, :-1]
        targets[row, :, :size] = document.columns[:, 1:]
        weights[row, :, :size] = document.weights
    return Batch(*(torch.from_numpy(x) for x in (inputs, targets, weights)), None)


@pytest.fixture(scope="module")
def model() -> SpeechLM:
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": 2, "heads": 2}
    return SpeechLM(
        LMConfig(
            streams=STREAMS,
            temporal=TransformerConfig(window=12, kv_heads=1, **shape),
            depth=TransformerConfig(**shape),
            codec="none",
        )
    )


@pytest.mark.parametrize("kinds", [*([kind] for kind in FORMATS), list(FORMATS)], ids=str)
def test_the_loss_of_packed_documents_is_that_of_each_alone(
    model: SpeechLM, kinds: list[str]
) -> None:
    rng = np.random.default_rng(0)
    made = [FORMATS[kinds[number % len(kinds)]](rng) for number in range(40)]
    documents, room = [], LENGTH
    for document in made:
        if (size := document.weights.shape[1]) <= room:
            documents.append(document)
            room -= size
    assert len(documents) > 2
    filler = Document(
        np.zeros((STREAMS.count, 99), np.int32), np.zeros((STREAMS.count, 98), np.float32), True
    )
    # A packer begins a document that is not whole in its middle; here all are to be seen whole.
    whole = [Document(d.columns, d.weights, True) for d in documents]
    packed = Packer(Listed([*whole, filler]), STREAMS, 1, LENGTH).next()
    assert packed.segments is not None and len(packed.segments.unique()) >= len(documents)
    found = {}
    for name, batch in (("packed", packed), ("alone", alone(documents))):
        model.zero_grad()
        losses = model.loss(batch, LossConfig())
        losses.total.backward()
        parts = {key: float(value) for key, value in losses.parts.items()}
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[name] = (float(losses.total.detach()), parts, grads)
    total, parts, grads = found["packed"]
    assert total == pytest.approx(found["alone"][0], rel=1e-5, abs=1e-5)
    assert parts == pytest.approx(found["alone"][1], rel=1e-5, abs=1e-5)
    for one, other in zip(grads, found["alone"][2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([None, 1, 3, 50]))
@settings(max_examples=25, deadline=None)
def test_a_mask_gives_what_document_by_document_gives(sizes: list[int], window: int | None) -> None:
    time = sum(sizes)
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    fresh = torch.ones(2, time, dtype=torch.bool)
    fresh[:, 1:] = (segments[:, 1:] != segments[:, :-1]).expand(2, -1)
    documents = Documents.of(fresh)
    assert documents.longest == max(sizes) and len(documents.bounds) == 2 * len(sizes) + 1
    q, k, v = torch.randn(2, 4, time, 8), torch.randn(2, 2, time, 8), torch.randn(2, 2, time, 8)
    back = torch.arange(time)[:, None] - torch.arange(time)
    mask = (back >= 0) & (back < (window or time)) & (segments[0][:, None] == segments[0])
    expected = attend(q, k, v, mask[None, None])
    assert torch.allclose(attend_documents(q, k, v, documents, window), expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_of_a_gpu_gives_what_a_mask_gives(window: int | None, packed: bool) -> None:
    config = TransformerConfig(dim=128, layers=2, heads=2, kv_heads=1, window=window)
    model = Transformer(config).cuda()
    x = torch.randn(2, 96, 128, device="cuda", requires_grad=True)
    segments = (torch.arange(96, device="cuda") // 25).expand(2, -1) if packed else None
    found: list[tuple[Tensor, Tensor]] = []
    for half in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            y = model(x, segments=segments)
        (grad,) = torch.autograd.grad(y.float().square().mean(), x)
        found.append((y.float(), grad))
    for exact, fast in zip(*found, strict=True):
        assert float((exact - fast).norm() / exact.norm()) < 0.03
