"""The language model: embeddings, loss, and streaming against offline."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from audio_codec.transformer import TransformerConfig
from speechlm import model as model_module
from speechlm.model import (
    Batch,
    LMConfig,
    LossConfig,
    SpeechLM,
    TokenEmbedding,
    linear_cross_entropy,
)
from speechlm.streams import ABSENT, PAD, Streams


def small(window: int = 6, heard: bool = True, predicts_user: bool = False) -> SpeechLM:
    streams = Streams(text_size=12, codebooks=((3, 2), (5,), (5,)), heard=heard)
    config = LMConfig(
        streams=streams,
        temporal=TransformerConfig(dim=16, layers=2, heads=2, window=window),
        depth=TransformerConfig(dim=16, layers=2, heads=2),
        codec="none",
        predicts_user=predicts_user,
    )
    return SpeechLM(config)


def columns_of(streams: Streams, batch: int, time: int) -> torch.Tensor:
    sizes = torch.tensor(streams.sizes)[:, None]
    return (torch.rand(batch, streams.count, time) * sizes).long()


def batch_of(model: SpeechLM, rows: int = 2, time: int = 10) -> Batch:
    columns = columns_of(model.streams, rows, time + 1)
    weights = torch.ones(rows, model.streams.count, time)
    weights[:, model.streams.user] = 0
    return Batch(columns[:, :, :-1], columns[:, :, 1:], weights, None)


class TestTokenEmbedding:
    def test_a_code_is_the_sum_over_its_factors(self) -> None:
        table = TokenEmbedding(((3, 2),), 4, std=1.0)
        # id = d0 + 3·d1, first factor fastest; rows 0-2 are factor 0, rows 3-4 factor 1.
        code = torch.tensor([[2 + 3 * 1]])
        assert torch.allclose(table(code)[0], table.weight[2] + table.weight[4])

    def test_absent_is_zero_and_start_has_its_own_row(self) -> None:
        table = TokenEmbedding(((3, 2), (5,)), 4, std=1.0)
        assert table(torch.tensor([[ABSENT, ABSENT]])).abs().max() == 0
        start = table(torch.tensor([[6, ABSENT]]))
        assert not any(torch.allclose(start, table(torch.tensor([[c, ABSENT]]))) for c in range(6))

    def test_the_three_ways_to_look_up_agree(self) -> None:
        table = TokenEmbedding(((3, 2), (5,)), 4, std=1.0)
        codes = torch.tensor([[0, 1], [5, 4], [6, 5], [3, 2]])
        each = table.each(codes)
        assert torch.allclose(each.sum(1), table(codes))
        for book in range(2):
            assert torch.allclose(table.one(codes[:, book], book), each[:, book])


class TestLinearCrossEntropy:
    def test_equals_the_plain_one_with_gradients(self) -> None:
        x = torch.randn(7, 4, requires_grad=True)
        weight = torch.randn(9, 4, requires_grad=True)
        target, scale = torch.randint(9, (7,)), torch.rand(7)
        loss, nll, hit = linear_cross_entropy(x, weight, target, scale)
        (3 * loss).backward()
        grads = [x.grad, weight.grad]
        x.grad = weight.grad = None
        logits = x @ weight.T
        plain = F.cross_entropy(logits, target, reduction="none")
        (3 * (plain * scale).sum()).backward()
        assert torch.allclose(nll, plain, atol=1e-5)
        assert torch.equal(hit, logits.argmax(1) == target)
        for mine, theirs in zip(grads, [x.grad, weight.grad], strict=True):
            assert mine is not None and theirs is not None
            assert torch.allclose(mine, theirs, atol=1e-5)

    def test_the_penalty_on_z_has_its_gradient(self) -> None:
        x = torch.randn(7, 4, requires_grad=True)
        weight = torch.randn(9, 4, requires_grad=True)
        target, scale = torch.randint(9, (7,)), torch.rand(7)
        loss, nll, _ = linear_cross_entropy(x, weight, target, scale, z=0.1)
        grads = torch.autograd.grad(loss, (x, weight))
        logits = x @ weight.T
        plain = F.cross_entropy(logits, target, reduction="none")
        wanted = (scale * (plain + 0.1 * logits.logsumexp(1).square())).sum()
        assert torch.allclose(loss, wanted, atol=1e-5) and torch.allclose(nll, plain, atol=1e-5)
        for mine, theirs in zip(grads, torch.autograd.grad(wanted, (x, weight)), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)

    def test_a_frozen_head_gets_no_gradient(self) -> None:
        x, weight = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4)
        loss, _, _ = linear_cross_entropy(x, weight, torch.randint(9, (7,)), torch.ones(7))
        loss.backward()
        assert x.grad is not None and weight.grad is None

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight, target = torch.randn(5, 4), torch.randn(9, 4), torch.randint(9, (5,))
        whole = linear_cross_entropy(x, weight, target, torch.ones(5))
        monkeypatch.setattr(model_module, "_BLOCK", 18)  # two rows at a time
        blocks = linear_cross_entropy(x, weight, target, torch.ones(5))
        assert all(torch.allclose(a, b) for a, b in zip(whole, blocks, strict=True))


class TestTemporal:
    def test_speakers_are_told_apart(self) -> None:
        model = small()
        streams = model.streams
        columns = columns_of(streams, 1, 1)
        swapped = columns.clone()
        swapped[:, streams.own], swapped[:, streams.user] = (
            columns[:, streams.user],
            columns[:, streams.own],
        )
        assert not torch.allclose(model.embed(columns), model.embed(swapped))

    def test_streaming_equals_offline_past_the_wrap(self) -> None:
        model = small(window=6).eval()
        columns = columns_of(model.streams, 2, 25)
        with torch.no_grad():
            offline = model(columns)
            state = model.new_state(2)
            steps = [model(columns[:, :, t : t + 1], state) for t in range(25)]
        assert torch.allclose(torch.cat(steps, dim=1), offline, atol=1e-5)

    def test_packed_documents_do_not_see_each_other(self) -> None:
        model = small().eval()
        columns = columns_of(model.streams, 1, 9)
        segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
        with torch.no_grad():
            packed = model(columns, segments=segments)
            alone = model(columns[:, :, 4:])
        assert torch.allclose(packed[:, 4:], alone, atol=1e-5)


class TestDepth:
    def test_a_step_sees_only_the_tokens_before_it(self) -> None:
        model = small().eval()
        hidden, text = torch.randn(1, 16), torch.tensor([3])
        codes = torch.tensor([[1, 2, 3]])
        changed = torch.tensor([[1, 4, 0]])
        with torch.no_grad():
            one, other = model.depth(hidden, text, codes), model.depth(hidden, text, changed)
        assert torch.allclose(one[:, :2], other[:, :2])
        assert not torch.allclose(one[:, 2], other[:, 2])


class TestLoss:
    def test_equals_the_mean_written_out(self) -> None:
        model = small().eval()
        batch = batch_of(model)
        batch.weights[:, model.streams.own] *= torch.rand_like(batch.weights[:, :3])
        got = model.loss(batch, LossConfig(text=1, heard=0.5, audio=2)).total
        with torch.no_grad():
            hidden = model(batch.inputs).flatten(0, 1)
        target = batch.targets.transpose(1, 2).flatten(0, 1)  # [N, S]
        weight = batch.weights.transpose(1, 2).flatten(0, 1)
        assert model.heard_head is not None
        text = F.cross_entropy(model.text_head(hidden), target[:, 0])
        heard = F.cross_entropy(model.heard_head(hidden), target[:, -1])
        output = model.depth(hidden, target[:, 0], target[:, 1:4])
        audio = torch.zeros(())
        for book in range(3):
            logits = model.depth.logits(output[:, book], book)
            nll = F.cross_entropy(logits, target[:, 1 + book], reduction="none")
            audio = audio + (nll * weight[:, 1 + book]).sum()
        audio = audio / weight[:, 1:4].sum()
        assert torch.allclose(got, text + 0.5 * heard + 2 * audio, atol=1e-4)

    def test_what_weighs_nothing_does_not_matter(self) -> None:
        model = small().eval()
        batch = batch_of(model)
        batch.weights[0] = 0
        before = model.loss(batch).total
        batch.targets[0] = ABSENT
        assert torch.equal(model.loss(batch).total, before)

    def test_text_alone_trains_no_code(self) -> None:
        model = small()
        batch = batch_of(model)
        batch.inputs[:, 1:7] = ABSENT
        batch.targets[:, 1:7] = ABSENT
        batch.weights[:, 1:7] = 0
        losses = model.loss(batch)
        losses.total.backward()
        assert "semantic" not in losses.parts
        assert all(p.grad is None for p in model.depth.parameters())

    def test_delay_gaps_are_not_learned(self) -> None:
        model = small()
        batch = batch_of(model)
        batch.targets[:, 2, 0] = model.streams.sizes[2]  # the start id, out of the head's range
        batch.weights[:, 2, 0] = 0
        assert torch.isfinite(model.loss(batch).total)

    def test_an_overfit_batch_is_learned(self) -> None:
        model = small()
        batch = batch_of(model, rows=1, time=6)
        batch.targets[:, 0, ::2] = PAD
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = model.loss(batch).total.item()
        for _ in range(60):
            optimizer.zero_grad()
            losses = model.loss(batch)
            losses.total.backward()
            optimizer.step()
        assert losses.total.item() < 0.1 * first
        assert losses.parts["semantic_accuracy"] == 1

    def test_without_heard_there_is_no_such_part(self) -> None:
        model = small(heard=False)
        assert "heard" not in model.loss(batch_of(model)).parts

    def test_the_users_codes_are_one_mean_with_the_assistants(self) -> None:
        model = small(predicts_user=True).eval()
        streams, batch = model.streams, batch_of(model)
        batch.weights[:, streams.user] = 0.5
        got = model.loss(batch, LossConfig(text=0, heard=0))
        with torch.no_grad():
            hidden = model(batch.inputs).flatten(0, 1)
        target = batch.targets.transpose(1, 2).flatten(0, 1)
        assert model.depth.user_role is not None
        sums = []
        for x, before, codes in (
            (hidden, target[:, streams.text_index], target[:, streams.own]),
            (
                hidden * model.depth.user_role,
                target[:, streams.heard_index],
                target[:, streams.user],
            ),
        ):
            output = model.depth(x, before, codes)
            logits = [model.depth.logits(output[:, book], book) for book in range(3)]
            sums.append(sum(F.cross_entropy(one, codes[:, b]) for b, one in enumerate(logits)))
        wanted = (sums[0] + 0.5 * sums[1]) / (3 + 3 * 0.5)
        assert torch.allclose(got.total, wanted, atol=1e-4)
        assert {"semantic", "acoustic", "user_semantic", "user_acoustic"} == {
            name for name in got.parts if not name.endswith("accuracy") and "/" not in name
        }

    def test_a_model_that_does_not_predict_the_user_ignores_their_weights(self) -> None:
        model = small().eval()
        batch = batch_of(model)
        before = model.loss(batch).total
        batch.weights[:, model.streams.user] = 1
        assert torch.equal(model.loss(batch).total, before)
