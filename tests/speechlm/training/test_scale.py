"""One process or two, killed or not: the same numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleet
import lm_runs
import pytest
import torch
from accelerate.state import AcceleratorState
from hf import write as write_hf
from lm_runs import config_of, make_data, numbers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from audio_codec import checkpoint
from audio_codec.errors import UserError
from speechlm.training import lm, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("scale"))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run, "tune_allocator", lambda: None)
    yield
    AcceleratorState._reset_state(True)  # it keeps one precision a process


def plain(made: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return config_of(made, run_dir, **changes).model_dump(mode="json")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run_dir / "lm").tensors


def together(config: dict[str, Any], world: int, **options: Any) -> None:
    codes = fleet.run(
        lm_runs.train,
        config,
        options.get("resume", False),
        options.get("double", False),
        options.get("gradients", ""),
        world=world,
    )
    assert codes == [0] * world


def largest_gap(a: Path, b: Path) -> float:
    """The largest difference between what two runs logged."""
    one, other = numbers(a), numbers(b)
    assert [row.keys() for row in one] == [row.keys() for row in other]
    return max(
        abs(left[key] - right[key])
        for left, right in zip(one, other, strict=True)
        for key in left
        if key in ("norm", "loss") or "/" in key
    )


# --- Two processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(made: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        config = plain(made, tmp_path / f"w{world}", run={"steps": 50, "save_every": 50})
        together(config, world, double=True)
    assert len(numbers(tmp_path / "w1")) == 50 + 9
    assert largest_gap(tmp_path / "w1", tmp_path / "w2") < 1e-8
    one, two = weights(tmp_path / "w1"), weights(tmp_path / "w2")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6  # stored float32
    assert not (tmp_path / "w2" / "checkpoint.pt").exists()
    assert (tmp_path / "w2" / "checkpoint-50" / "__1_0.distcp").exists()


@pytest.mark.slow
def test_the_first_gradients_of_two_processes_are_those_of_one(made: Path, tmp_path: Path) -> None:
    found = []
    for world in (1, 2):
        path = tmp_path / f"gradients-{world}.pt"
        config = plain(made, tmp_path / f"w{world}", run={"steps": 1}, accumulate=world)
        together(config, world, gradients=str(path))
        found.append(torch.load(path, weights_only=True))
    one, two = found
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        gap, size = (one[name] - two[name]).norm(), one[name].norm()
        assert float(gap) <= 1e-5 * float(size), name


@pytest.mark.slow
def test_every_switch_at_once_gives_the_numbers_of_one_process(made: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "separate_states": True,
        "accumulate": 2,
        "recompute": True,
        "lookahead": 2,
        "text_mask": 0.3,
        "user_mask": 0.5,
        "user_spans": 0.2,
        "audio_share": 0.5,
        "average_from": 0.4,
        "weights": {"jitter": 0.3, "semantic": 100, "user": 0.5},
        "loss": {"z": 1e-3},
        "rates": {"temporal": 0.5, "text": 0.75},
        "run": {"steps": 8, "log_spaced": True},
    }
    shape = config_of(made, tmp_path).model.model_dump(mode="json", exclude_unset=True)
    changes["model"] = {**shape, "predicts_user": True, "acoustic_delay": 2}
    for world in (1, 2):
        together(plain(made, tmp_path / f"w{world}", **changes), world, double=True)
    assert largest_gap(tmp_path / "w1", tmp_path / "w2") < 1e-8
    one, two = weights(tmp_path / "w1"), weights(tmp_path / "w2")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    kept = {path.name for path in (tmp_path / "w2").glob("checkpoint*")}
    assert kept == {f"checkpoint-{step}" for step in (1, 2, 4, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("begun", ["anew", "ours", "hf"])
def test_no_rank_ever_holds_the_whole_model(made: Path, tmp_path: Path, begun: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("asks Linux how much memory was taken")
    wide = {"dim": 512, "layers": 10, "heads": 8, "window": 20}
    shape = {"temporal": wide, "depth": {"dim": 16, "layers": 1, "heads": 2}}
    config = plain(made, tmp_path / "run", model=shape)
    if begun == "ours":
        together({**config, "run": {**config["run"], "steps": 1}, "dtype": "bf16"}, 1)
        config = plain(made, tmp_path / "next", init_from=str(tmp_path / "run" / "lm"))
        config["model"] = {}
    elif begun == "hf":
        sizes = {"hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1376}
        write_hf(tmp_path / "hf", "llama", **sizes)
        config["model"], config["init_from"] = {"depth": shape["depth"]}, str(tmp_path / "hf")
    assert fleet.run(lm_runs.build_apart, config, tmp_path, world=2) == [0, 0]
    for rank in (0, 1):
        took, here, whole = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert whole > 100e6 and here < 0.55 * whole
        assert here <= took < 0.8 * whole, f"{took / whole:.2f} of the model at a time"


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_any_number_of_processes(made: Path, tmp_path: Path) -> None:
    together(plain(made, tmp_path / "whole", ema=0.9), 1, double=True)
    for name, worlds in (("fewer", (2, 1, 2)), ("more", (1, 2, 1))):
        for steps, world in zip((4, 8, 12), worlds, strict=True):
            # The rates of the whole run: without a decay they depend on the step alone.
            config = plain(
                made,
                tmp_path / name,
                ema=0.9,
                run={"steps": steps},
                optimizer={"lr": 3e-3, "warmup": 2, "decay": 0.0},
            )
            together(config, world, resume=True, double=True)
    together(
        plain(
            made,
            tmp_path / "open",
            ema=0.9,
            optimizer={"lr": 3e-3, "warmup": 2, "decay": 0.0},
        ),
        1,
        double=True,
    )
    for name in ("fewer", "more"):
        steps = {row["step"]: row["loss"] for row in numbers(tmp_path / name) if "loss" in row}
        whole = {row["step"]: row["loss"] for row in numbers(tmp_path / "open") if "loss" in row}
        assert steps.keys() == whole.keys()
        assert max(abs(steps[at] - whole[at]) for at in whole) < 1e-8
        held = [path.name for path in (tmp_path / name).glob("checkpoint*")]
        assert held == (["checkpoint-12"] if name == "fewer" else ["checkpoint.pt"])


@pytest.mark.slow
def test_rows_that_cannot_be_shared_are_named(made: Path, tmp_path: Path) -> None:
    config = plain(
        made, tmp_path / "run", sources=[{"kind": "quiz", "rows": 3, "turns": 1}], validation=[]
    )
    codes = fleet.run(lm_runs.train, config, world=2)
    assert codes == [1, 1] and not (tmp_path / "run" / "lm").exists()


# --- Death ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_twenty_random_points_it_ends_with_the_same_bits(
    made: Path, tmp_path: Path
) -> None:
    changes = {"run": {"steps": 64, "save_every": 2}, "ema": 0.9}
    together(plain(made, tmp_path / "whole", **changes), 1)
    config = plain(made, tmp_path / "parts", **changes)
    dice, killed = random.Random(0), 0
    while killed < 20:
        point = dice.choice(["optimizer", "checkpoint", "data"])
        count = dice.randint(0, 1) if point == "checkpoint" else dice.randint(0, 5)
        (code,) = fleet.run(lm_runs.train_until, config, point, count)
        assert code == -9, f"{point} {count} after {killed} deaths: it came to its end"
        killed += 1
        if (tmp_path / "parts" / "checkpoint.pt").exists():
            torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    together(config, 1, resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_a_rank_killed_by_its_piece_of_a_checkpoint_leaves_the_one_before(
    made: Path, tmp_path: Path
) -> None:
    together(plain(made, tmp_path / "whole"), 2)
    config = plain(made, tmp_path / "parts")
    codes = fleet.run(lm_runs.train_until, config, "pieces", 1, world=2)
    assert codes[1] == -9 and codes[0] != 0
    left = [path for path in (tmp_path / "parts").glob("checkpoint-*/.metadata")]
    assert [path.parent.name for path in left] == ["checkpoint-4"]
    assert (tmp_path / "parts" / "checkpoint-8" / "__0_0.distcp").exists()
    together(config, 2, resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(made: Path, tmp_path: Path) -> None:
    together(plain(made, tmp_path / "whole"), 1)
    config = plain(made, tmp_path / "parts")
    (code,) = fleet.run(lm_runs.train_until, config, "optimizer", 5)
    assert code == -9
    path = tmp_path / "parts" / "checkpoint.pt"
    before = path.read_bytes()
    (code,) = fleet.run(lm_runs.train_on_a_full_disk, config, len(before) // 2)
    assert code == 3
    assert path.read_bytes() == before and not path.with_suffix(".new").exists()
    together(config, 1, resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- Spikes, averages, kept checkpoints, pieces ---------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, at: set[int], by: float) -> None:
    """Losses of some steps are a multiple of what they would be."""
    real, steps = lm.Objective.forward, []
    rate = run.OptimizerConfig.rate

    def noting(self: run.OptimizerConfig, step: int, total: int) -> float:
        steps.append(step)
        return rate(self, step, total)

    def forward(self: Any, *args: Any) -> Any:
        loss, *rest = real(self, *args)
        return (loss * by if torch.is_grad_enabled() and steps[-1] in at else loss), *rest

    monkeypatch.setattr(run.OptimizerConfig, "rate", noting)
    monkeypatch.setattr(lm.Objective, "forward", forward)


SPIKES = {"window": 4, "deviations": 6.0, "limit": 2}


def test_a_spike_rolls_back_and_its_batch_is_passed_over(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {6}, 100.0)
    changes = {"run": {"spikes": SPIKES}, "validation": []}
    lm.train(config_of(made, tmp_path / "a", **changes))
    AcceleratorState._reset_state(True)
    logged = numbers(tmp_path / "a")
    assert [row["step"] for row in logged] == list(range(12))
    losses = [row["loss"] for row in logged]
    assert losses[6] != losses[6] and max(losses[:6] + losses[7:]) < 100  # nothing at step 6
    kept = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert kept["guard"]["skipped"] == [6]

    # Killed after the roll-back and before the next checkpoint, it comes to the same end.
    step, calls = torch.optim.AdamW.step, iter(range(9))

    def dies(self: Any, *args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", dies)
        lm.train(config_of(made, tmp_path / "b", **changes))
    AcceleratorState._reset_state(True)
    lm.train(config_of(made, tmp_path / "b", **changes), resume=True)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_too_many_spikes_end_the_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {6, 7, 8}, 100.0)
    with pytest.raises(UserError, match=r"run\.spikes\.limit is 2"):
        lm.train(config_of(made, tmp_path, run={"spikes": SPIKES}, validation=[]))


def test_a_gradient_that_is_no_number_changes_nothing_and_is_counted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {3, 5}, float("nan"))
    lm.train(config_of(made, tmp_path, validation=[]))
    logged = numbers(tmp_path)
    assert [row["bad_gradients"] for row in logged] == [0, 0, 0, 1, 1] + [2] * 7
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_pieces_and_recomputation_leave_the_numbers(made: Path, tmp_path: Path) -> None:
    losses = {}
    for name, changes in {
        "whole": {},
        "pieces": {"accumulate": 3},
        "again": {"recompute": True},
        "waiting": {"ahead": 0},
    }.items():
        lm.train(config_of(made, tmp_path / name, validation=[], **changes))
        AcceleratorState._reset_state(True)
        losses[name] = torch.tensor([row["loss"] for row in numbers(tmp_path / name)])
    assert torch.equal(losses["whole"], losses["waiting"])
    assert torch.allclose(losses["whole"], losses["again"], rtol=1e-6)
    assert torch.allclose(losses["whole"], losses["pieces"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # torch warns of what its own compiler does
def test_compiled_blocks_leave_the_numbers(made: Path, tmp_path: Path) -> None:
    shape = config_of(made, tmp_path).model.model_dump(mode="json", exclude_unset=True)
    shape["temporal"]["layers"] = 1
    changes = {
        "model": shape,
        "run": {"steps": 2},
        "sources": [{"kind": "dialogues", "path": made / "shards", "rows": 2}],
        "validation": [],
    }
    losses = []
    for compiled in (False, True):
        lm.train(config_of(made, tmp_path / str(compiled), compile=compiled, **changes))
        AcceleratorState._reset_state(True)
        losses.append([row["loss"] for row in numbers(tmp_path / str(compiled))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2


def test_log_spaced_checkpoints_are_kept_and_the_mean_of_the_last_is_saved(
    made: Path, tmp_path: Path
) -> None:
    changes = {"run": {"log_spaced": True, "save_every": 3}, "average_from": 0.4}
    lm.train(config_of(made, tmp_path, **changes))
    kept = {path.name for path in tmp_path.glob("checkpoint-*.pt")}
    assert kept == {"checkpoint-1.pt", "checkpoint-2.pt", "checkpoint-4.pt", "checkpoint-8.pt"}
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert last["state"]["counts"]["averaged"] == 3  # after 6, 9 and 12 steps
    found = weights(tmp_path)
    for name, mean in last["state"]["average"].items():
        assert torch.allclose(found[name], mean, atol=1e-6)
        assert name.endswith("norm.weight") or not torch.equal(mean, last["state"]["model"][name])
    with pytest.raises(ValueError, match="choose one"):
        config_of(made, tmp_path, ema=0.9, average_from=0.5)


def test_a_run_tells_what_any_of_its_steps_saw(made: Path, tmp_path: Path) -> None:
    parts = [{"path": str(made / "shards")}, {"path": str(made / "worse"), "weight": 0.5}]
    changes: dict[str, Any] = {
        "sources": [
            {"kind": "dialogues", "path": parts, "rows": 2},
            {"kind": "quiz", "rows": 1, "turns": 2},
        ],
        "run": {"log_spaced": True, "steps": 9},
        "lookahead": 3,
        "validation": [],
    }
    seen: dict[int, list[Any]] = {}
    real = lm.Mixture.next

    def noting(self: Any) -> Any:
        batches = real(self)
        seen[len(seen)] = [placed for packer in self.packers for placed in packer.placed]
        return batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.Mixture, "next", noting)
        lm.train(config_of(made, tmp_path, **changes))
    config = config_of(made, tmp_path, **changes)
    for step in (0, 3, 8):
        found = lm.samples(config, step)
        assert [placed for _, placed in found] == seen[step]
        assert {name for name, _ in found} == {"dialogues", "quiz"}
    assert all(" " in placed.name for name, placed in found if name == "quiz")
    assert {placed.name.split("-")[0] for s in seen.values() for placed in s} >= {"shards", "worse"}


def test_more_epochs_than_allowed_are_refused_before_the_run(made: Path, tmp_path: Path) -> None:
    parts = [{"path": str(made / "shards"), "epochs": 4}]
    changes = {"sources": [{"kind": "dialogues", "path": parts, "rows": 4}], "validation": []}
    with pytest.raises(
        UserError, match=r"would be seen 7\.1 times in 12 steps; its epochs allow 4"
    ):
        lm.train(config_of(made, tmp_path, **changes))
    assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("given", [{}, {"warmup": 3}, {"lr": None, "weight_decay": None}])
def test_a_rate_is_proposed_from_the_size(
    made: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    config = config_of(made, tmp_path, run={"steps": 1}, optimizer=given, validation=[])
    lm.train(config)
    resolved = lm.TrainConfig.model_validate_json((tmp_path / "config.json").read_text())
    with lm.planned(config) as (model, _):
        size = lm.body_parameters(model)
    expected = config.optimizer.proposed(size)
    assert resolved.optimizer == expected and expected.lr is not None
    assert 1e-3 < expected.lr < 0.1 and expected.weight_decay == 0.1


def test_progress_says_how_fast_and_how_long_yet(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm.train(config_of(made, tmp_path))
    shown = capsys.readouterr().err
    assert "lm 5/12 (0:00:" in shown and " left) loss " in shown
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "mfu" in line]
    for line in steps:
        assert 0 < line["mfu"] < 1 and 0 < line["loader_busy"] <= 1
        # Four of six rows are talk: at most each of their columns has 80 ms of sound.
        audio = line["audio_hours_per_second"] * 3600 * 12.5 / line["columns_per_second"]
        assert audio == pytest.approx(4 / 6, abs=0.02)
        assert line["tokens_per_second"] > line["columns_per_second"]
    assert {"dialogues/text", "dialogues/semantic", "dialogues/acoustic/1"} <= steps[0].keys()
    for name in ("tokens_per_second", "audio_hours_per_second", "mfu"):
        assert f" {name} " in shown
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(curves.Scalars("tokens_per_second")) == 12


def test_one_hears_the_model_answer(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[torch.Tensor] = []
    play = run.Run.play

    def noting(self: run.Run, step: int, name: str, pcm: torch.Tensor, rate: int) -> None:
        heard.append(pcm)
        play(self, step, name, pcm, rate)

    monkeypatch.setattr(run.Run, "play", noting)
    lm.train(config_of(made, tmp_path / "a", listen_every=6))
    AcceleratorState._reset_state(True)
    assert [len(pcm) for pcm in heard] == [38 * 1920] * 2 and heard[0].dtype == torch.float32
    sounds = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert [event.step for event in sounds.Audio("validation/voice")] == [5, 11]
    lm.train(config_of(made, tmp_path / "b"))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")  # listening changes nothing
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match="no conversation"):
        lm.train(config_of(made, tmp_path / "c", listen_every=6, validation=[]))
