"""The recipes that come with the project: they load, their names exist, what they ask can be done.

``test_published`` compares their figures with the papers'.
"""

import pytest

from radio_distill.config import Recipe, build, by_student, check, dump
from radio_distill.config.recipes import recipe_names
from radio_distill.evals.run import BENCHMARKS
from radio_distill.models.student import create_body
from radio_distill.normalize import NORMALIZERS
from stages.recipes import describe_stage, load_recipe
from teachers import TEACHERS, teacher_spec
from upsamplers import UPSAMPLERS

PHI_S = ("phi_s_b", "phi_s_l", "radio_v2_5_b", "radio_v2_5_l", "radio_v2_5_h", "featsharp_radio_l")
C_RADIO = ("c_radio_v4_so400m", "c_radio_v4_h")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__loads_and_comes_back_equal(name):
    import yaml

    recipe = load_recipe(name)
    again = build(Recipe, yaml.safe_load(dump(recipe)))
    check(again)
    assert again == recipe
    assert recipe.name == name


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__names_exist(name):
    recipe = load_recipe(name)
    assert recipe.normalizer.name in NORMALIZERS.names()
    assert set(recipe.evaluation.benchmarks) <= set(BENCHMARKS.names())
    for stage in recipe.stages.values():
        assert stage.upsampler.name in UPSAMPLERS.names()
    for teacher, config in recipe.teachers.items():
        assert config.preset in TEACHERS.names()
        assert teacher_spec(teacher, config, recipe).channels > 0


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__stages_start_from_the_one_before(name):
    recipe = load_recipe(name)
    for names in by_student(recipe):
        starts = [recipe.stages[stage].start_from for stage in names]
        assert starts == ["", *names[:-1]]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__optimizer_and_zero_stage_agree(name):
    recipe = load_recipe(name)
    if any(stage.optimizer == "lamb" for stage in recipe.stages.values()):
        assert recipe.engine.zero_stage == 0  # LAMB needs whole parameters


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [
        ("am_radio", 1280, 32, 16),
        ("phi_s_b", 768, 12, 12),
        ("phi_s_l", 1024, 24, 16),
        ("radio_v2_5_b", 768, 12, 12),
        ("radio_v2_5_l", 1024, 24, 16),
        ("radio_v2_5_h", 1280, 32, 16),
        ("featsharp_radio_l", 1024, 24, 16),
        ("c_radio_v4_so400m", 1152, 27, 16),
        ("c_radio_v4_h", 1280, 32, 16),
    ],
)
def test_recipe__student_has_the_published_shape(name, width, depth, heads):
    import torch
    from torch import nn

    student = load_recipe(name).student
    with torch.device("meta"):
        body = create_body(student.architecture, pretrained=False, drop_path=0)
    assert (body.embed_dim, len(body.blocks), body.blocks[0].attn.num_heads) == (
        width,
        depth,
        heads,
    )
    assert student.patch_size == 16
    # A LayerScale could not be exported to the format that others load.
    assert isinstance(body.blocks[0].ls1, nn.Identity)


def seen_in(recipe: Recipe, stage: str) -> dict[tuple[str, int], dict[str, tuple]]:
    """Return what the teachers see, by partition and height of the student's input.

    Of each teacher its input in pixels, the grid of its target, and the images on one input.
    """
    return {
        (partition.name, size[0]): {
            name: (view.encoded, view.grid, view.images_per_input)
            for name, view in partition.views[size].items()
        }
        for partition in describe_stage(recipe, stage).partitions
        for size in partition.sizes
    }


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__every_view_fits_its_teacher(name):
    recipe = load_recipe(name)
    for stage in recipe.stages:
        assert all(seen_in(recipe, stage).values())


@pytest.mark.parametrize("name", PHI_S)
def test_phi_s_recipes__each_teacher_has_a_partition_and_in_stage_3_another(name):
    recipe = load_recipe(name)
    teachers = list(recipe.teachers)
    for stage, size in (("stage1", 256), ("stage2", 432), ("stage3", 432)):
        low = recipe.stages[stage].partitions[:4]
        assert [item.teachers for item in low] == [(teacher,) for teacher in teachers]
        assert {item.size for item in low} == {size}
        assert [item.mosaic for item in low] == [(), (), (), ("sam",)]
    high = recipe.stages["stage3"].partitions[4:]
    assert [item.teachers for item in high] == [(teacher,) for teacher in teachers]
    assert sum(item.batch_size for item in high) == 128
    assert all(not item.mosaic for item in high)


def test_phi_s_b__what_sam_sees():
    recipe = load_recipe("phi_s_b")
    first, third = seen_in(recipe, "stage1"), seen_in(recipe, "stage3")
    assert first["sam", 256] == {"sam": ((1024, 1024), (16, 16), 16)}
    assert third["sam", 432] == {"sam": ((1024, 1024), (27, 27), 4)}
    assert third["sam_hires", 1024] == {"sam": ((1024, 1024), (64, 64), 1)}


def test_featsharp_radio_l__differs_from_radio_v2_5_l_in_its_upsampler_only():
    base, sharp = load_recipe("radio_v2_5_l"), load_recipe("featsharp_radio_l")
    assert (sharp.student, sharp.teachers, sharp.loss, sharp.augmentation) == (
        base.student,
        base.teachers,
        base.loss,
        base.augmentation,
    )
    assert (sharp.stages["stage1"], sharp.stages["stage2"]) == (
        base.stages["stage1"],
        base.stages["stage2"],
    )
    stage = sharp.stages["stage3"]
    assert stage.upsampler.weights == {}, "a fit of the recipe is found by itself"
    upsampled = {item.name: item.upsample for item in stage.partitions if item.upsample}
    assert upsampled == {"dfn_clip_hires": ("dfn_clip",), "siglip_hires": ("siglip",)}  # [FS 4.5]


@pytest.mark.parametrize("name", C_RADIO)
def test_c_radio_recipes__what_the_teachers_see(name):
    recipe = load_recipe(name)
    seen = seen_in(recipe, "stage2")
    assert seen["low", 128] == {
        "siglip2": ((384, 384), (24, 24), 1),
        "dinov3": ((128, 128), (8, 8), 1),
        "sam3": ((1008, 1008), (8, 8), 16),  # of 81 that a canvas has room for
    }
    assert seen["high", 1152] == {
        "siglip2": ((384, 384), (72, 72), 1),  # 1152 px at patch 16
        "dinov3": ((1152, 1152), (72, 72), 1),
        "sam3": ((1008, 1008), (72, 72), 1),
    }
    assert [seen["high", size]["sam3"][2] for size in (512, 768, 1024)] == [4, 1, 1]


@pytest.mark.parametrize("name", C_RADIO)
def test_c_radio_recipes__use_everything_that_the_report_adds(name):
    recipe = load_recipe(name)
    augmentation = recipe.augmentation
    assert recipe.loss.summary == "angle"
    assert recipe.loss.mesa > 0
    assert all(stage.ema_decay for stage in recipe.stages.values())
    assert min(augmentation.shift, augmentation.window_share, augmentation.weight_noise) > 0
