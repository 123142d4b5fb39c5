"""How often the host waits for the device, and passes that only ZeRO 2 and 3 need."""

import hashlib
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from radio_distill.config import (
    DataConfig,
    EngineConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    StudentConfig,
)
from radio_distill.distill.micro_batches import MicroBatchSchedule
from radio_distill.system.compiled import compile_blocks
from radio_distill.system.distributed import World
from radio_distill.train.deepspeed_engine import build_engine
from radio_distill.train.health import NonFiniteGuard, agree
from radio_distill.train.optim import build_optimizer, parameter_groups

from .test_equal_gradients import CPU, TEACHERS, build, images

STEPS = 4  # DeepSpeed's timer, which is off, would begin to wait in the third


def recipe(zero_stage: int) -> Recipe:
    """Two partitions, three passes for one rank and one for the other."""
    parts = (
        PartitionConfig(name="low", size=64, teachers=("vit",), batch_size=3, ranks=1),
        PartitionConfig(name="high", size=96, teachers=("vit", "sam"), batch_size=1, ranks=1),
    )
    optimizer = "lamb" if zero_stage == 0 else "adamw"
    return Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        student=StudentConfig(architecture="test_vit", max_size=256, registers=1, head_hidden=16),
        teachers=TEACHERS,
        stages={"stage1": StageConfig(partitions=parts, freeze_body_steps=0, optimizer=optimizer)},
        engine=EngineConfig(
            precision="float32", device="cpu", micro_batch=1, zero_stage=zero_stage
        ),
    )


class Waits(TorchDispatchMode):
    """Counts reads of numbers on the host, and DeepSpeed's synchronisations.

    Steps that an optimizer counts lie on the host on every device, so that reading them waits for
    nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frame, files = sys._getframe(), ""
            while frame is not None:
                files += frame.f_code.co_filename + "\n"
                frame = frame.f_back
            if "/torch/optim/adam" not in files and "/timm/optim/" not in files:
                self.count += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        from deepspeed.accelerator import get_accelerator

        self._accelerator = get_accelerator()
        self._accelerator.synchronize = self._synchronize
        return super().__enter__()

    def __exit__(self, *error):
        del self._accelerator.synchronize
        return super().__exit__(*error)

    def _synchronize(self, *_):
        self.count += 1


def train(
    rank: int, zero_stage: int, pads: bool, compiled: bool, runs_student: bool
) -> tuple[list[int], str, int]:
    """Return waits of each step, a digest of the weights, and the number of encodes."""
    world = World(rank, 2, rank)
    run = build(recipe(zero_stage), world)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(run.engine.model, backend="aot_eager", fullgraph=True)
    stage = run.stage
    padding = replace(stage.recipe.engine, zero_stage=2 if pads else zero_stage)
    padded = replace(stage, recipe=replace(stage.recipe, engine=padding))
    run.schedule = MicroBatchSchedule(padded, world, run.draws)
    optimizer = build_optimizer(stage.config.optimizer, parameter_groups(run.engine.model, 0.02))
    # To clip, ZeRO 1 to 3 read the norm again for each group of parameters, which is there by then.
    clip = 0.0 if zero_stage else 1.0
    run.engine = build_engine(run.engine.model, optimizer, stage.engine, clip, world, CPU)
    run.ema = None
    if runs_student:
        run.engine.zero = lambda: None
    waits, encoded = [], []
    for teacher in run.targets.teachers.values():
        teacher.tower.register_forward_hook(lambda *_: encoded.append(1))
    for step in range(STEPS):
        batches, guard = images(run, step), NonFiniteGuard()
        # torch compiles nothing within a mode that sees all operators.
        with nullcontext() if compiled else Waits() as counted:
            agreement = run.forward_backward(step, batches, guard, agree)
            is_taken = run.engine.step({"body": 1e-2, "head": 1e-2})
        assert is_taken
        assert not agreement.read().is_bad
        run.end_step(is_taken=True)
        waits.append(counted.count if counted else -1)
    weights = run.engine.model_tensors()
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().tobytes())
    return waits, digest.hexdigest(), len(encoded)


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_step__waits_once_and_runs_no_teacher_for_padding(two_processes, zero_stage):
    found = two_processes(train, zero_stage, False, False, False)
    for waits, _, _ in found:
        assert waits[1:] == [1] * (STEPS - 1)  # ZeRO 3 sets itself up in the first step
    assert sorted(encodes for _, _, encodes in found) == [2 * STEPS, 3 * STEPS]
    if zero_stage < 2:
        padded = two_processes(train, zero_stage, True, False, False)
        assert found[0][1] == padded[0][1], "the same weights with padding passes and without"


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_step__compiled_blocks_end_with_the_same_weights(two_processes, zero_stage):
    (_, eager, _), (_, compiled, _) = (
        two_processes(train, zero_stage, False, is_compiled, False)[0]
        for is_compiled in (False, True)
    )
    assert compiled == eager


@pytest.mark.distributed
def test_step__padding_without_the_student_ends_with_the_same_weights(two_processes):
    (_, zeros, _), (_, student, _) = (
        two_processes(train, 2, False, False, runs_student)[0] for runs_student in (False, True)
    )
    assert zeros == student
