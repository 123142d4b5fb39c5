"""With the work of published recipes, processes wait less than a twentieth of a step."""

from dataclasses import replace

import pytest

from radio_distill.distill.micro_batches import MicroBatch, assign_micro_batches, teachers_of
from radio_distill.plan.time import _draws
from radio_distill.stage import ImageWork, Stage
from radio_distill.system.distributed import World
from stages.recipes import describe_stage, load_recipe

# TFLOP of one image, without teachers' encoders, by the student's size; and of each encoder's
# input, by the image's size where it depends on that: as `plan` counts them.
WORK = {
    "phi_s_b": (
        {256: 0.15, 432: 0.45, 1024: 4.02},
        {"dfn_clip": 1.007, "siglip": 0.67, "dinov2": {1024: 13.43, 0: 1.796}, "sam": 5.961},
    ),
    "featsharp_radio_l": (
        {256: 0.51, 432: 1.51, 1024: 12.5, ("dfn_clip", 1024): 13.18, ("siglip", 1024): 13.04},
        {
            "dfn_clip": {1024: 10.07, 0: 1.007},
            "siglip": {1024: 6.703, 0: 0.67},
            "dinov2": {1024: 13.43, 0: 1.796},
            "sam": 5.961,
        },
    ),
    "c_radio_v4_h": (
        {
            128: 0.456, 192: 0.951, 224: 1.279, 256: 1.664, 384: 3.809, 432: 4.895,
            512: 7.09, 768: 18.3, 1024: 38.5, 1152: 53.3,
        },
        {
            "siglip2": {512: 13.93, 768: 13.93, 1024: 13.93, 1152: 13.93, 0: 1.393},
            "dinov3": {
                128: 0.93, 192: 2.015, 224: 2.725, 256: 3.549, 384: 8.023, 432: 10.21,
                512: 14.51, 768: 34.5, 1024: 66.09, 1152: 87.32,
            },
            "sam3": 5.399,
        },
    ),
}  # fmt: skip


def counted(recipe: str, name: str) -> Stage:
    """A stage of a published recipe with what its images cost."""
    stage = describe_stage(load_recipe(recipe), name)
    own, encoders = WORK[recipe]
    work = {}
    for partition in stage.partitions:
        for size in partition.sizes:
            image = own.get((partition.teachers[0], size[0]), own[size[0]])
            inputs = {}
            for teacher in partition.teachers:
                cost = encoders[teacher]
                inputs[teacher] = cost.get(size[0], cost.get(0)) if isinstance(cost, dict) else cost
            work[partition.name, size] = ImageWork(image, inputs)
    return replace(stage, work=work)


def cost_of(stage: Stage, micro: MicroBatch) -> float:
    """What a micro-batch costs; partitions of these recipes share no images."""
    (one,) = micro.passes
    work, images = stage.work[one.partition.name, one.size], micro.stop - micro.start
    encoding = sum(view.inputs(images) * work.inputs[name] for name, view in one.views.items())
    return (images * work.image + encoding) if one.image_weight else 0.0


STAGES = [(recipe, f"stage{number}") for recipe in WORK for number in (1, 2, 3)]


@pytest.mark.parametrize("devices", [8, 64])
@pytest.mark.parametrize(("recipe", "name"), STAGES[:-1])  # C-RADIOv4 has two
def test_assign_micro_batches__processes_are_busy(recipe, name, devices):
    stage = counted(recipe, name)
    mean = largest = 0.0
    for sizes in _draws(stage):
        loads = [
            sum(cost_of(stage, micro) for micro in work)
            for work in assign_micro_batches(stage, sizes, devices)
        ]
        mean += sum(loads) / devices
        largest += max(loads)
    assert mean / largest >= 0.95


def test_teachers_of__few_on_a_process():
    stage = counted("phi_s_b", "stage1")
    counts = [len(teachers_of(stage, World(rank, 64))) for rank in range(64)]
    assert max(counts) <= 3
    assert sum(counts) / 64 < 2, "of four"
