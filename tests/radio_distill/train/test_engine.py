"""What an engine promises, on one process; several are compared in tests/e2e."""

import math

import pytest
import torch

from radio_distill.config import EngineConfig, PartitionConfig, StageConfig, StudentConfig
from radio_distill.errors import ConfigError
from radio_distill.models.heads import build_student
from radio_distill.train.deepspeed_engine import engine_name
from radio_distill.train.engine import SingleProcessEngine
from radio_distill.train.optim import build_optimizer, parameter_groups
from radio_distill.types import TeacherSpec

STUDENT = StudentConfig(architecture="test_vit", max_size=128, head_hidden=16)
PARTITION = PartitionConfig(name="p", size=32, teachers=("t",), batch_size=2)
RATES = {"body": 1e-2, "head": 1e-2}


def stage_of(**values) -> StageConfig:
    return StageConfig(partitions=(PARTITION,), **values)


def engine_of(stage: StageConfig) -> SingleProcessEngine:
    torch.manual_seed(0)
    spec = TeacherSpec("t", 6, 4, 16, (32, 32), None, (0.5,) * 3, (0.5,) * 3)
    model = build_student(STUDENT, {"t": spec})
    groups = parameter_groups(model, stage.weight_decay)
    optimizer = build_optimizer(stage.optimizer, groups, stage.betas)
    config, cpu = EngineConfig(precision="float32"), torch.device("cpu")
    return SingleProcessEngine(model, optimizer, config, stage.gradient_clip, cpu)


def take_step(engine: SingleProcessEngine, scale: float = 1.0) -> float:
    predicted = engine.forward(torch.full((2, 3, 32, 32), 0.4), ("t",)).features["t"]
    engine.backward(scale * predicted.spatial.square().sum(), last=True)
    assert engine.step(RATES) == math.isfinite(engine.gradient_norm())
    return engine.gradient_norm()


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_load__a_second_engine_goes_on_with_the_same_numbers(optimizer):
    first, second = (engine_of(stage_of(optimizer=optimizer)) for _ in range(2))
    for _ in range(3):
        take_step(first)
    second.load(first.model_tensors(), first.optimizer_tensors())
    assert take_step(first) == take_step(second)
    for name, value in first.model_tensors().items():
        assert torch.equal(value, second.model_tensors()[name]), name


def test_step__a_gradient_that_is_not_finite_moves_nothing():
    engine = engine_of(stage_of(optimizer="adamw"))
    before = {name: value.clone() for name, value in engine.model_tensors().items()}
    assert not torch.isfinite(torch.tensor(take_step(engine, float("inf"))))
    for name, value in engine.model_tensors().items():
        assert torch.equal(value, before[name]), name
    assert take_step(engine) > 0, "the bad gradient was cleared"


def test_step__clipping_limits_the_gradient_and_reports_it_whole():
    norms = [take_step(engine_of(stage_of(gradient_clip=clip)), 100.0) for clip in (0.0, 1e-3)]
    assert norms[0] == norms[1] > 1


@pytest.mark.parametrize(
    ("engine", "stage", "world_size", "expected"),
    [
        ({}, {}, 1, "single"),
        ({"zero_stage": 0}, {}, 2, "deepspeed"),
        ({}, {"optimizer": "adamw"}, 2, "deepspeed"),
        ({"name": "single"}, {}, 2, "engine.name: single"),
        ({}, {}, 2, "deepspeed"),
        ({"zero_stage": 1}, {}, 2, "lamb"),
        (
            {"zero_stage": 3},
            {"optimizer": "adamw", "ema_decay": 0.9},
            2,
            "ema_decay",
        ),
        ({"zero_stage": 3, "compile": True}, {"optimizer": "adamw"}, 2, "compile"),
    ],
)
def test_engine_name__choice_and_refusals(engine, stage, world_size, expected):
    config = stage_of(**stage)
    arguments = (EngineConfig(**engine), world_size, config.optimizer, bool(config.ema_decay))
    if expected in ("single", "deepspeed"):
        assert engine_name(*arguments) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            engine_name(*arguments)
