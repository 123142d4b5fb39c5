"""A recipe resolved: how each teacher sees each partition, and what cannot be."""

from dataclasses import replace

import pytest

from radio_distill.config import (
    DataConfig,
    Facts,
    FitConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    TeacherConfig,
    UpsamplerConfig,
    size_pair,
)
from radio_distill.errors import ConfigError
from radio_distill.stage import FIT, Stage, resolve_stage
from radio_distill.teacher_view import TeacherView
from radio_distill.types import TeacherSpec

SPEC = TeacherSpec("t", 8, None, 14, (224, 224), None, (0.5,) * 3, (0.5,) * 3)
CANVAS = replace(SPEC, patch_size=16, native_size=(256, 256), fixed_size=True)


def recipe_of(size=512, sizes=(), teacher=None, stage=None, **partition) -> Recipe:
    values = {"name": "p", "teachers": ("t",), "batch_size": 1, "sizes": sizes} | partition
    return Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        teachers={"t": TeacherConfig(preset="x", **({"summary_weight": 0} | (teacher or {})))},
        stages={
            "stage1": StageConfig(
                partitions=(PartitionConfig(size=0 if sizes else size, **values),),
                upsampler=UpsamplerConfig(name="tile", factor=3),
                **(stage or {}),
            )
        },
    )


def stage_of(spec=SPEC, **changes) -> Stage:
    return resolve_stage(recipe_of(**changes), "stage1", {"t": spec})


def view_of(spec=SPEC, size=512, **changes) -> TeacherView:
    return stage_of(spec, size=size, **changes).partitions[0].views[size_pair(size)]["t"]


@pytest.mark.parametrize(
    ("wanted", "size", "expected"),
    [
        ("native", 512, (224, 224)),
        ("match", 512, (448, 448)),  # 32 cells of 16 px, of 14 px
        ("match", (256, 512), (224, 448)),
        (336, 512, (336, 336)),
        (336, (256, 512), (168, 336)),  # the longer side, aspect kept
        ("native", (512, 320), (224, 140)),
        ("native", (512, 16), (224, 14)),  # never less than a cell
    ],
)
def test_view__input_size(wanted, size, expected):
    view = view_of(size=size, teacher={"input_size": wanted})
    assert view.size == view.rendered == view.encoded == expected
    assert view.grid == (expected[0] // 14, expected[1] // 14)


def test_view__the_partition_goes_first_and_a_fixed_teacher_never_gives_way():
    teacher = {"input_size": 224}
    assert view_of(teacher=teacher, teacher_sizes={"t": 448}).size == (448, 448)
    fixed = replace(SPEC, fixed_size=True, native_size=(1022, 1022))
    assert view_of(fixed).size == (1022, 1022)
    assert view_of(fixed, teacher=teacher, teacher_sizes={"t": 1022}).size == (1022, 1022)
    for sizes in ({}, {"t": 448}):
        with pytest.raises(ConfigError, match="1022x1022"):
            view_of(fixed, teacher=teacher, teacher_sizes=sizes)


def test_view__upsampled_is_finer_and_rendered_larger():
    view = view_of(upsample=("t",))
    assert (view.size, view.rendered, view.grid) == ((224, 224), (672, 672), (48, 48))
    plain = view.without_upsampler()
    assert (plain.size, plain.rendered, plain.grid) == ((224, 224), (224, 224), (16, 16))
    assert plain == view_of()
    assert len({view, plain, view_of()}) == 2, "equal views are one key"


def test_view__in_a_mosaic_images_share_a_canvas():
    view = view_of(CANVAS, size=(64, 128), mosaic=("t",))
    assert (view.size, view.encoded, view.grid) == ((64, 128), (256, 256), (4, 8))
    assert view.images_per_input == 8
    assert [view.inputs(images) for images in (1, 8, 9)] == [1, 1, 2]
    assert not stage_of(CANVAS, size=64, mosaic=("t",)).partitions[0].has_summaries["t"]


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        (SPEC, {"teacher": {"input_size": 500}}, r"500 .* multiple of its patch 14 \(nearest 504"),
        (replace(SPEC, max_size=224), {"teacher": {"input_size": "match"}}, "448x448 .* 224; set"),
        (SPEC, {"teacher": {"summary_weight": 1}}, "teachers.t.summary_weight: .*no summary"),
        (CANVAS, {"sizes": (128, 512), "mosaic": ("t",)}, "512x512"),
    ],
)
def test_resolve_stage__what_a_teacher_cannot_give(spec, changes, words):
    with pytest.raises(ConfigError, match=rf"stages.stage1.partitions.p: .*{words}"):
        stage_of(spec, **changes)


def test_resolve_stage__a_teacher_with_a_summary_is_asked_for_it():
    with_summary = replace(SPEC, summary_channels=8)
    assert view_of(with_summary, teacher={"summary_weight": 1}) == view_of()


def test_resolve_stage__an_unknown_stage():
    with pytest.raises(ConfigError, match="stage9"):
        resolve_stage(recipe_of(), "stage9", {"t": SPEC})


def test_resolve_stage__auto_stays_without_facts_and_is_settled_with_them():
    early = stage_of(stage={"steps": 10})
    assert early.normalizer.images == "auto"
    settled = resolve_stage(early.recipe, early.name, early.specs, Facts())
    assert (settled.normalizer.images, settled.frozen_steps) == (10, 0)
    assert settled.partitions == early.partitions
    assert (settled.steps, settled.images_per_step) == (10, 1)


def test_resolve_stage__each_stage_draws_otherwise():
    recipe = recipe_of()
    recipe = replace(recipe, stages={**recipe.stages, "stage2": recipe.stages["stage1"]})
    seeds = {resolve_stage(recipe, name, {"t": SPEC}).seed for name in recipe.stages}
    assert len(seeds) == 2


def fit_of(spec=SPEC, **fit) -> Stage:
    recipe = replace(recipe_of(), stages={}, fit=FitConfig(teacher="t", **fit))
    return resolve_stage(recipe, FIT, {"t": spec})


def test_resolve_stage__a_fit_is_one_teacher_upsampled():
    stage = fit_of(size=448, factor=2, batch_size=5, steps=7)
    assert (stage.is_fit, stage.steps, stage.images_per_step) == (True, 7, 5)
    ((partition, view),) = stage.views("t")
    assert view == TeacherView("t", (448, 448), (64, 64), True, 2)
    assert stage.statistics_partition("t") is partition
    assert fit_of().views("t")[0][1].size == (224, 224)


@pytest.mark.parametrize(("spec", "size", "near"), [(SPEC, 500, 504), (CANVAS, 128, 256)])
def test_resolve_stage__a_size_that_a_fit_cannot_have(spec, size, near):
    with pytest.raises(ConfigError, match=rf"fit.size: .*{size} px.*{near}"):
        fit_of(spec, size=size)


def test_views__of_a_teacher_whose_size_is_drawn_too():
    stage = stage_of(sizes=(256, 512), teacher_sizes={"t": (224, 448)})
    partition = stage.partitions[0]
    assert [view.size for _, view in stage.views("t")] == [(224, 224), (448, 448)] * 2
    assert all(views["t"].size == (448, 448) for views in partition.views.values())
    drawn = partition.views_drawn({"p": (256, 256), "p/t": (224, 224)})
    assert drawn["t"].grid == (16, 16)
    assert partition.views_drawn({"p": (256, 256)}) == {}, "the largest, where nothing is drawn"
    with pytest.raises(ConfigError, match="input size 225"):
        stage_of(teacher_sizes={"t": (224, 225)})
