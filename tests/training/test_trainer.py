"""The loop: resumed runs end alike, whatever is trained; trouble is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptspec.errors import TrainingError
from adaptspec_training.conversations import Example
from adaptspec_training.trainer import (
    Batch,
    Losses,
    Schedule,
    Trainee,
    Trainer,
    make_batches,
)

EXAMPLES = [Example(f"e{i}", tuple(range(i + 4)), ((2, i + 4),)) for i in range(9)]
SCHEDULE = Schedule(
    epochs=3, batch_tokens=8, warmup_steps=2, evaluations=3, save_seconds=0.0
)


class Killed(Exception):
    pass


class Regression(Trainee):
    """Nothing like heads: the loop must not care. Draws noise, as dropout would."""

    kind = "regression"

    def __init__(self, killed_at: int | None = None, bad_at: int | None = None) -> None:
        torch.manual_seed(1)
        self.module = nn.Linear(3, 1)
        self.bias = self.module.get_parameter("bias")
        self.calls = 0
        self.killed_at, self.bad_at = killed_at, bad_at

    def modules(self) -> Mapping[str, nn.Module]:
        return {"module": self.module}

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        return [
            ([self.module.get_parameter("weight")], 1.0),
            ([self.bias], 4.0),
        ]

    def backward(self, batch: Batch, progress: float) -> Losses:
        self.calls += 1
        if self.calls == self.killed_at:
            raise Killed
        noise = torch.rand(len(batch.indices), 3)
        inputs = torch.tensor([[float(i), 1.0, i % 2] for i in batch.indices]) + noise
        loss = (self.module(inputs)[:, 0] - inputs[:, 0]).pow(2).mean()
        if self.calls == self.bad_at:
            loss = loss * float("nan")
        loss.backward()
        return Losses(float(loss.detach()), {"loss_square": float(loss.detach())})

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
        return {"norm": float(self.module.weight.detach().norm())}


def trainer(trainee: Trainee, folder: Path, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "fingerprint": "f",
        "device": torch.device("cpu"),
        "clock": iter(range(10**6)).__next__,
        "tell": lambda *_: None,
        **changes,
    }
    return Trainer(
        trainee, EXAMPLES, range(7), range(7, 9), SCHEDULE, folder, **arguments
    )


def test_a_run_killed_at_any_step_ends_with_the_weights_of_one_never_killed(
    tmp_path: Path,
) -> None:
    whole = Regression()
    log = trainer(whole, tmp_path / "whole").run() if _made(tmp_path / "whole") else []
    steps = whole.calls
    for killed_at in range(2, steps + 1):
        folder = tmp_path / str(killed_at)
        folder.mkdir()
        with pytest.raises(Killed):
            trainer(Regression(killed_at), folder).run()
        resumed = Regression()
        again = trainer(resumed, folder).run()
        assert resumed.calls == steps - killed_at + 1
        assert torch.equal(resumed.module.weight, whole.module.weight)
        assert torch.equal(resumed.bias, whole.bias)
        assert [e["norm"] for e in again] == [e["norm"] for e in log]


def _made(folder: Path) -> bool:
    folder.mkdir()
    return True


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    trainer(Regression(), tmp_path).run()
    again = Regression()
    log = trainer(again, tmp_path).run()
    assert again.calls == 0
    assert log[0]["step"] == 0
    assert len(log) == 4


def test_every_epoch_holds_every_example_once_in_another_order() -> None:
    epochs = [make_batches(EXAMPLES, range(7), SCHEDULE, e) for e in range(2)]
    orders = [[i for batch in epoch for i in batch.indices] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2
    assert orders[0] != orders[1]
    assert all(batch.positions >= 8 for epoch in epochs for batch in epoch[:-1])


def test_the_rate_rises_falls_and_scales_by_group() -> None:
    schedule = Schedule(learning_rate=1.0, warmup_steps=4)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01


def test_a_loss_that_is_no_number_stops_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"became nan at step 3; lower --lr"):
        trainer(Regression(bad_at=3), tmp_path).run()


def test_lack_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    class Greedy(Regression):
        def backward(self, batch: Batch, progress: float) -> Losses:
            torch.empty(1 << 60)
            raise AssertionError

    with pytest.raises(TrainingError, match="lower --batch-tokens or --chunk"):
        trainer(Greedy(), tmp_path).run()


def test_lack_of_memory_while_measuring_says_what_lowers_this_trainees(
    tmp_path: Path,
) -> None:
    class Greedy(Regression):
        lowers_memory = "--width"

        def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
            torch.empty(1 << 60)
            raise AssertionError

    with pytest.raises(TrainingError, match="lower --width"):
        trainer(Greedy(), tmp_path).run()


def test_a_full_disk_keeps_the_checkpoint_before_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        trainer(Regression(killed_at=4), tmp_path).run()
    (state,) = tmp_path.glob("*.pt")
    before = state.read_bytes()

    def full(value: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(TrainingError, match=r"can't write .*make room"):
            trainer(Regression(), tmp_path).run()
    assert state.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))
    whole = Regression()
    (tmp_path / "whole").mkdir()
    trainer(whole, tmp_path / "whole").run()
    resumed = Regression()
    trainer(resumed, tmp_path).run()
    assert torch.equal(resumed.module.weight, whole.module.weight)


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    class Broken(Regression):
        def backward(self, batch: Batch, progress: float) -> Losses:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer(Broken(), tmp_path).run()


def test_a_damaged_state_is_named_and_another_runs_is_left_alone(
    tmp_path: Path,
) -> None:
    trainer(Regression(), tmp_path).run()
    (state,) = tmp_path.glob("*.pt")
    other = Regression()
    before = copy.deepcopy(other.module.state_dict())
    trainer(other, tmp_path, fingerprint="g").run()
    assert other.calls
    assert not torch.equal(before["weight"], other.module.weight)
    (state,) = tmp_path.glob("*.pt")
    state.write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match=r"can't be read.*--fresh"):
        trainer(Regression(), tmp_path, fingerprint="g").run()


def test_the_log_is_a_line_per_evaluation(tmp_path: Path) -> None:
    log = trainer(Regression(), tmp_path).run()
    lines = (tmp_path / "heads-training.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log
    assert {"stage", "step", "loss", "loss_square", "norm", "rate"} <= set(log[-1])


def test_training_needs_something_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="got 0 and 1"):
        Trainer(
            Regression(),
            EXAMPLES,
            [],
            [1],
            SCHEDULE,
            tmp_path,
            fingerprint="",
            device=torch.device("cpu"),
            clock=lambda: 0.0,
            tell=lambda *_: None,
        )
