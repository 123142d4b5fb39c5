"""The step benchmark: what it counts is what the planner counts, and it runs without files."""

import pytest
import torch
import yaml

from benchmarks import train_step
from benchmarks.synthetic import build_task, one_partition
from e2e import RECIPE
from radio_distill.config import load
from stages.planning import build_models, measured

CPU = torch.device("cpu")


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "shards": ["none"]}}))
    return path


def test_step_flops__are_the_planners(recipe_file):
    """Counted on a real step of two passes, and on fake tensors for one image."""
    recipe = train_step.with_engine(load(recipe_file), "cpu")
    task = build_task(one_partition(recipe, "stage3", "high", 2, 2, recipe.engine), "stage3", CPU)
    stepping = train_step.Stepping(task, next(task.batches(0)))
    with measured(build_models(recipe, "float32")) as costs:
        partition = next(p for p in costs.stages["stage3"].partitions if p.name == "high")
        cost = costs.partition(costs.stages["stage3"], partition)
        expected = 4 * (cost.student_flops + cost.teacher_flops)
    assert train_step.step_flops(stepping, CPU) == pytest.approx(expected, rel=0.02)


def test_main__prints_every_phase(recipe_file, capsys):
    options = ["--partition", "low", "--images", "2", "3", "--steps", "1", "--device", "cpu"]
    assert train_step.main([str(recipe_file), *options]) == 0
    printed = capsys.readouterr().out
    for name in (*train_step.PHASES, "cnn's encoder", "whole step", "host waits", "2 x 3"):
        assert name in " ".join(printed.split()), name


def test_main__no_such_partition(recipe_file, capsys):
    assert train_step.main([str(recipe_file), "--partition", "hihg", "--stage", "stage3"]) == 2
    assert "'hihg' (did you mean 'high'" in capsys.readouterr().err
