"""The recipes that come with the project: they load, their names exist, their figures agree
with the papers.

Sources: AMR is AM-RADIO (arXiv 2312.06709), PHIS the PHI-S paper (2410.01680), FS FeatSharp
(2502.16025).
"""

import pytest

from radio_distill.balance import NORMALIZERS
from radio_distill.config import Recipe, build, check, dump
from radio_distill.evals.harness import BENCHMARKS
from radio_distill.partitions import images_per_step
from stages.common import load_recipe, recipe_names
from teachers import TEACHERS, teacher_spec
from upsamplers import UPSAMPLERS

PAPERS = ("am_radio", "phi_s_b", "radio_v2_5_l", "featsharp_radio_l")


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
    assert set(recipe.evaluation.benchmarks) <= {"fidelity", *BENCHMARKS.names()}
    for stage in recipe.stages.values():
        assert stage.upsampler.name in UPSAMPLERS.names()
    for teacher, config in recipe.teachers.items():
        assert config.preset in TEACHERS.names()
        assert teacher_spec(teacher, config).channels > 0


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__stages_start_from_the_one_before(name):
    stages = load_recipe(name).stages
    assert [stage.start_from for stage in stages.values()] == ["", *list(stages)[:-1]]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe__optimizer_and_zero_stage_agree(name):
    recipe = load_recipe(name)
    if any(stage.optimizer == "lamb" for stage in recipe.stages.values()):
        assert recipe.engine.zero_stage == 0  # LAMB needs whole parameters


@pytest.mark.parametrize(
    ("name", "architecture", "pretrained"),
    [
        ("am_radio", "vit_huge_patch14_224", ""),  # ViT-H [AMR 4]
        ("phi_s_b", "vit_base_patch16_224", "timm"),  # [PHIS A.7]
        ("radio_v2_5_l", "vit_large_patch16_224", "timm"),  # [PHIS A.7]
        ("featsharp_radio_l", "vit_large_patch16_224", "timm"),  # [FS C]
    ],
)
def test_recipe__student_is_the_papers(name, architecture, pretrained):
    student = load_recipe(name).student
    assert (student.architecture, student.pretrained) == (architecture, pretrained)
    assert student.patch_size == 16
    assert student.max_size == 2048  # the published position tables span 128 cells


@pytest.mark.parametrize(
    ("name", "optimizer", "images"),
    [
        ("am_radio", "adamw", [1024, 1152]),  # [AMR 4]
        ("phi_s_b", "lamb", [1024, 1024, 1152]),  # [PHIS Table 10]
        ("radio_v2_5_l", "lamb", [1024, 1024, 1152]),  # [PHIS Table 10]
        ("featsharp_radio_l", "lamb", [1024, 1024, 1152]),  # [FS C: as RADIOv2.5]
    ],
)
def test_recipe__optimizer_and_batches_are_the_papers(name, optimizer, images):
    stages = load_recipe(name).stages.values()
    assert [images_per_step(stage) for stage in stages] == images
    for stage in stages:
        assert stage.steps == 300_000
        assert (stage.optimizer, stage.learning_rate, stage.weight_decay) == (optimizer, 1e-3, 0.02)


@pytest.mark.parametrize("name", PAPERS)
def test_recipe__resolutions_are_the_papers(name):
    stages = list(load_recipe(name).stages.values())
    sizes = [{partition.size for partition in stage.partitions} for stage in stages]
    # [AMR 4]; [PHIS Table 10], where the size of the last partitions is our reading
    expected = [{256}, {432, 1024}] if name == "am_radio" else [{256}, {432}, {432, 1024}]
    assert sizes == expected


def test_am_radio__losses_and_teachers_are_the_papers():
    recipe = load_recipe("am_radio")
    assert (recipe.loss.summary, recipe.loss.feature) == ("cosine", "am_radio")  # [AMR 3.4]
    assert recipe.loss.alignment == "larger"  # [AMR 3.4]
    assert recipe.normalizer.name == "none"
    sides = {"dfn_clip": 378, "openai_clip": 336, "dinov2": 224, "sam": 1024}  # [AMR 4]
    assert _input_sides(recipe) == sides
    first, second = recipe.stages.values()
    assert {name for item in first.partitions for name in item.teachers} == sides.keys() - {"sam"}
    assert {name for item in second.partitions for name in item.teachers} == sides.keys()


@pytest.mark.parametrize("name", PAPERS[1:])
def test_phi_s_recipes__losses_and_teachers_are_the_papers(name):
    recipe = load_recipe(name)
    assert (recipe.loss.summary, recipe.loss.feature) == ("cosine", "mse")  # [PHIS 3]
    assert recipe.normalizer.name == "phi_s"
    assert recipe.normalizer.images == 3000 * 256  # [PHIS Table 10]
    assert _input_sides(recipe) == {"dfn_clip": 378, "siglip": 378, "dinov2": 378, "sam": 1024}
    assert recipe.teachers["sam"].summary_weight == 0
    for stage in recipe.stages.values():
        assert stage.freeze_body_steps == 5000  # [PHIS Table 10]
        low = [item for item in stage.partitions if item.size != 1024]
        assert [item.batch_size for item in low] == [256] * 4  # [PHIS A.7]
        assert [len(item.teachers) for item in stage.partitions] == [1] * len(stage.partitions)
    hires = [item for item in recipe.stages["stage3"].partitions if item.size == 1024]
    assert sum(item.batch_size for item in hires) == 128  # [PHIS A.7]
    assert {item.teachers[0] for item in hires} == recipe.teachers.keys()


def _input_sides(recipe: Recipe) -> dict[str, int]:
    """Return the side of each teacher's input where a partition says nothing else."""
    return {
        name: teacher_spec(name, config).native_size[0]
        if config.input_size == "native"
        else int(config.input_size)
        for name, config in recipe.teachers.items()
    }


def test_featsharp_radio_l__differs_from_radio_v2_5_l_in_its_upsampler_only():
    base, sharp = load_recipe("radio_v2_5_l"), load_recipe("featsharp_radio_l")
    assert (sharp.student, sharp.teachers, sharp.loss) == (base.student, base.teachers, base.loss)
    assert (sharp.stages["stage1"], sharp.stages["stage2"]) == (
        base.stages["stage1"],
        base.stages["stage2"],
    )
    stage = sharp.stages["stage3"]
    assert (stage.upsampler.name, stage.upsampler.factor) == ("featsharp", 3)  # [FS C]
    assert stage.upsampler.weights == {}, "a fit of the recipe is found by itself"
    upsampled = {item.name: item.upsample for item in stage.partitions if item.upsample}
    assert upsampled == {"dfn_clip_hires": ("dfn_clip",), "siglip_hires": ("siglip",)}  # [FS 4.5]
