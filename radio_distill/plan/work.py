"""What the images of a stage cost, as the processes of a run share them out."""

from dataclasses import replace

from ..stage import ImageWork, Stage
from .cost import ModelCosts, TeacherCost
from .meter import Speed, Work

ENCODER_LEFT, STUDENT_LEFT = (0.52, 0.68), (0.72, 0.72)
"""Shares of a block's elementwise traffic and of its kernels that compilation leaves, forward alone
and with the backward pass: medians of what ``python -m benchmarks.compiled_blocks`` counts of the
published recipes' models."""


def needs_work(stage: Stage, world_size: int) -> bool:
    """Return whether it matters for a stage what its images cost: there are several kinds."""
    groups = [item for item in stage.partitions if not item.images_of]
    return world_size > 1 and len(groups) > 1 and not all(item.ranks for item in groups)


def with_work(stage: Stage, costs: ModelCosts, speed: Speed) -> Stage:
    """Return a stage with what its images cost on devices of some speed, in seconds.

    Without what a pass costs however many images it has.
    """
    work = {}
    for partition in stage.partitions:
        for size, cost in costs.partition(stage, partition).passes.items():
            student = of_student(stage, cost.student.growth)
            image = _seconds(speed, student, stage.engine.precision)
            image += sum(
                _seconds(speed, item.other.growth, other_dtype(stage, item))
                for item in cost.teachers
            )
            inputs = {
                item.view.teacher: item.calls
                * _seconds(
                    speed,
                    of_encoder(stage, item.encode.growth),
                    stage.teachers[item.view.teacher].dtype,
                )
                for item in cost.teachers
            }
            work[partition.name, size] = ImageWork(image, inputs)
    return replace(stage, work=work)


def of_encoder(stage: Stage, work: Work) -> Work:
    """Return the work of a teacher's encoder as a stage runs it, compiled or not."""
    return work.fused(*ENCODER_LEFT) if stage.engine.compile is True else work


def of_student(stage: Stage, work: Work) -> Work:
    """Return the work of the student as a stage runs it, compiled or not."""
    return work.fused(*STUDENT_LEFT) if stage.engine.compile is True else work


def other_dtype(stage: Stage, teacher: TeacherCost) -> str:
    """Return the type in which an upsampler computes, or where there is none, the normalizer."""
    return stage.engine.precision if teacher.view.is_upsampled else "float32"


def _seconds(speed: Speed, work: Work, dtype: str) -> float:
    return speed.seconds(replace(work, kernels=0), dtype)
