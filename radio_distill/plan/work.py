"""What the images of a stage cost, as the processes of a run share them out."""

from dataclasses import replace

from ..stage import ImageWork, Stage
from .cost import ModelCosts, TeacherCost

FLOAT32 = 15
"""Times that an operation in float32 takes, where others are in bfloat16: 14.8 on an H100, 16 on an
A100 (data sheets, without TF32)."""


def needs_work(stage: Stage, world_size: int) -> bool:
    """Return whether it matters for a stage what its images cost: there are several kinds."""
    groups = [item for item in stage.partitions if not item.images_of]
    return world_size > 1 and len(groups) > 1 and not all(item.ranks for item in groups)


def with_work(stage: Stage, costs: ModelCosts) -> Stage:
    """Return a stage with what its images cost, counted."""
    work = {}
    for partition in stage.partitions:
        for size, cost in costs.partition(stage, partition).passes.items():
            image = cost.student_flops * _slowness(stage.engine.precision)
            image += sum(
                item.other_flops * _slowness(other_dtype(stage, item)) for item in cost.teachers
            )
            inputs = {
                item.view.teacher: float(item.encode_flops)
                * _slowness(stage.teachers[item.view.teacher].dtype)
                for item in cost.teachers
            }
            work[partition.name, size] = ImageWork(float(image), inputs)
    return replace(stage, work=work)


def other_dtype(stage: Stage, teacher: TeacherCost) -> str:
    """Return the type in which an upsampler computes, or where there is none, the normalizer."""
    return stage.engine.precision if teacher.view.is_upsampled else "float32"


def _slowness(dtype: str) -> float:
    return FLOAT32 if dtype == "float32" else 1
