"""The loop itself, over a task of one parameter."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from radio_distill.config import (
    EngineConfig,
    EvaluationConfig,
    LogConfig,
    Recipe,
    WatchConfig,
    build,
)
from radio_distill.errors import DataError, DivergedError
from radio_distill.system.distributed import World
from radio_distill.train.checkpoint import find
from radio_distill.train.engine import SingleProcessEngine
from radio_distill.train.optim import build_optimizer
from radio_distill.train.trackers import read_json_lines
from radio_distill.train.trainer import Trainer
from radio_distill.types import Features, Score

CPU = torch.device("cpu")
RECIPE = build(Recipe, {"name": "r", "data": {"shards": []}, "teachers": {}, "stages": {}})


def stage_of(folder, steps=6, best="", **log):
    log = {"every": 2, "save_every": 4, "trackers": (), **log}
    return SimpleNamespace(
        name="stage1",
        folder=folder,
        steps=steps,
        images_per_step=2,
        specs={},
        recipe=RECIPE,
        log=LogConfig(**log),
        watch=WatchConfig(max_skipped=2),
        evaluation=EvaluationConfig(best=best),
        engine=EngineConfig(precision="float32"),
    )


class Descent:
    """Minimises the square of one number; ``bad`` are the steps, from 0, that are not finite."""

    def __init__(self, bad=(), every=0, score=lambda step: float(step), higher=True):
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1, bias=False)
        groups = [{"name": "body", "params": list(self.model.parameters())}]
        optimizer = build_optimizer("adamw", groups)
        config = EngineConfig(precision="float32")
        self.engine = SingleProcessEngine(self.model, optimizer, config, 0.0, CPU)
        self.source = SimpleNamespace(fingerprint="none", bad={})
        self.evaluate_every, self.bad = every, set(bad)
        self.score, self.higher = score, higher
        self.evaluated, self.taken = [], []

    def batches(self, start_step):
        while True:
            yield torch.ones(2, 1)

    def learning_rates(self, step):
        return {"body": 0.1}

    def forward_backward(self, step, batches, guard, agree):
        value = math.nan if step in self.bad else 1.0
        guard.add_targets({"t": Features(None, torch.full((2, 1, 1, 1), value))}, ("a", "b"))
        loss = self.engine.forward(batches).square().sum()
        status = agree(loss.detach(), guard)
        self.engine.backward(loss, last=True, skip=status.is_bad)
        return status

    def end_step(self, is_taken):
        self.taken.append(is_taken)

    def log_values(self):
        return {"draw": float(torch.rand(())) + random.random() + float(np.random.rand())}

    def evaluate(self, step, beat, write_image):
        torch.rand(3), random.random(), np.random.rand(3)
        self.evaluated.append(step)
        beat()
        return [Score("toy", "height", self.score(step), "1", self.higher, "Toys", 1)]

    def tensors(self):
        return {
            "student": self.engine.model_tensors(),
            "optimizer": self.engine.optimizer_tensors(),
        }


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def test_run__logs_evaluates_and_saves_at_its_steps(tmp_path):
    task = Descent(every=4)
    last = Trainer(stage_of(tmp_path), task, World()).run()
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row.get("eval/toy/height") for row in rows] == [None, 4.0, 6.0]
    assert task.evaluated == [4, 6], "the last step is evaluated too"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        last.name,
    ]
    assert rows[0]["loss/total"] > rows[2]["loss/total"]


def test_run__asks_for_the_next_batches_while_the_device_works(tmp_path):
    """Behind the passes of a step, before its update is waited for; and for no step too many."""
    events = []

    class Recording(Descent):
        def batches(self, start_step):
            for step in range(start_step, 3):
                events.append(f"batches {step}")
                yield torch.ones(2, 1)

        def forward_backward(self, step, *rest):
            events.append(f"passes {step}")
            return super().forward_backward(step, *rest)

        def learning_rates(self, step):
            events.append(f"update {step}")
            return super().learning_rates(step)

    Trainer(stage_of(tmp_path, steps=3), Recording(), World()).run()
    each = [[f"passes {step}", f"batches {step + 1}", f"update {step}"] for step in range(3)]
    assert events == ["batches 0", *each[0], *each[1], "passes 2", "update 2"]


def test_run__an_evaluation_draws_nothing_from_the_run(tmp_path):
    found = []
    for name, every in (("without", 0), ("with", 1)):
        (tmp_path / name).mkdir()
        seed()
        Trainer(stage_of(tmp_path / name), Descent(every=every), World()).run()
        rows = read_json_lines(tmp_path / name / "metrics.jsonl")
        found.append([(row["draw"], row["loss/total"]) for row in rows if "draw" in row])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("score", "higher", "best"),
    [
        (lambda step: -abs(step - 3), True, 3),
        (lambda step: abs(step - 3), False, 3),
        (lambda step: math.nan if step == 1 else 1.0, True, 2),
    ],
)
def test_run__keeps_the_best_by_its_direction(tmp_path, score, higher, best):
    stage = stage_of(tmp_path, best="toy/height", keep_last=1)
    Trainer(stage, Descent(every=1, score=score, higher=higher), World()).run()
    assert find(tmp_path / "checkpoints" / "best").step == best
    assert find(tmp_path).step == 6


def test_run__a_resumed_run_compares_with_the_best_before(tmp_path):
    stage = stage_of(tmp_path, best="toy/height", keep_last=9)
    Trainer(stage, Descent(every=1, score=lambda step: -step), World()).run()
    resumed = find(tmp_path / "checkpoints" / "step-00000004")
    assert resumed.best.step == 1
    Trainer(stage, Descent(every=1, score=lambda step: -step), World(), resumed=resumed).run()
    assert find(tmp_path / "checkpoints" / "best").step == 1


def test_run__a_best_score_that_no_benchmark_gives_is_warned_of(tmp_path, caplog):
    stage = stage_of(tmp_path, best="toy/hieght")
    Trainer(stage, Descent(every=3), World()).run()
    assert "toy/hieght" in caplog.text
    assert "toy/height" in caplog.text
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_run__an_evaluation_that_fails_is_warned_of(tmp_path, caplog):
    def fail(step):
        raise DataError("no images")

    Trainer(stage_of(tmp_path), Descent(every=2, score=fail), World()).run()
    assert caplog.text.count("is not evaluated: no images") == 3


def test_run__skips_what_is_not_finite_and_stops_after_too_many(tmp_path):
    task = Descent(bad={1})
    Trainer(stage_of(tmp_path), task, World()).run()
    assert task.taken == [True, False, True, True, True, True]
    assert find(tmp_path).counts == {"skipped_steps": 1, "skipped_in_a_row": 0}
    (tmp_path / "worse").mkdir()
    with pytest.raises(DivergedError, match="teacher t for a, b"):
        Trainer(stage_of(tmp_path / "worse"), Descent(bad={1, 2, 3}), World()).run()


def test_run__a_resumed_run_tells_of_a_skipped_step_once(tmp_path):
    stage = stage_of(tmp_path)
    Trainer(stage, Descent(bad={1, 4}), World()).run()
    resumed = find(tmp_path / "checkpoints" / "step-00000004")
    Trainer(stage, Descent(bad={1, 4}), World(), resumed=resumed).run()
    assert [row["step"] for row in read_json_lines(tmp_path / "skipped.jsonl")] == [2, 5]


def test_run__the_best_is_not_saved_while_steps_are_skipped(tmp_path):
    stage = stage_of(tmp_path, best="toy/height", save_every=100)
    score = lambda step: 9.0 if step == 2 else float(step)  # noqa: E731
    Trainer(stage, Descent(bad={1}, every=1, score=score), World()).run()
    assert find(tmp_path / "checkpoints" / "best").step == 6
