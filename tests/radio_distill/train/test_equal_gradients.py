"""A step has the same gradient on one process as on many, whatever the recipe combines."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radio_distill.config import (
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    HeadConfig,
    HeadsConfig,
    LossConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    UpsamplerConfig,
    check,
)
from radio_distill.data.rendering import render
from radio_distill.distill.loss_weights import TermWeights
from radio_distill.distill.micro_batches import MicroBatchSchedule
from radio_distill.distill.randomness import StepRandomness
from radio_distill.distill.targets import TargetMaker
from radio_distill.distill.task import Distillation
from radio_distill.models.ema import Ema
from radio_distill.models.heads import build_student
from radio_distill.normalize.normalizers import build_normalizers
from radio_distill.stage import resolve_stage
from radio_distill.system.distributed import World
from radio_distill.train.deepspeed_engine import build_engine
from radio_distill.train.health import NonFiniteGuard, agree
from radio_distill.train.optim import build_optimizer, parameter_groups
from radio_distill.types import ImageBatch, ViewOrigin
from teachers import build_teacher
from upsamplers import build_upsampler

CPU = torch.device("cpu")
TEACHERS = {
    "vit": TeacherConfig(preset="tiny_vit", input_size="match", dtype="float32"),
    "cnn": TeacherConfig(preset="tiny_cnn", dtype="float32"),
    "sam": TeacherConfig(preset="tiny_samvit", summary_weight=0, dtype="float32"),
}
HEADS = {
    "vit": HeadsConfig(
        summary=HeadConfig(name="shared"),
        features=HeadConfig(name="attention", options={"heads": 2, "layer_scale": 0.5}),
        inner={"1": 0.5},
    ),
    "cnn": HeadsConfig(summary=HeadConfig(name="ladder"), features=HeadConfig(name="conv")),
    "sam": HeadsConfig(features=HeadConfig(name="ln_mlp")),
}


@st.composite
def recipes(draw) -> Recipe:
    """One or two partitions, perhaps of the same images, with or without everything else."""
    yes = st.booleans()
    low_sizes = draw(st.sampled_from([(64,), (32, 64), (64, 96)]))
    low_teachers = draw(st.sampled_from([("vit", "sam"), ("vit", "cnn", "sam"), ("sam",)]))
    low = PartitionConfig(
        name="low",
        sizes=low_sizes,
        teachers=low_teachers,
        batch_size=draw(st.integers(1, 7)),
        mosaic=("sam",) if max(low_sizes) <= 64 and draw(yes) else (),
        teacher_sizes={"cnn": (32, 64)} if "cnn" in low_teachers and draw(yes) else {},
    )
    partitions = [low]
    if draw(yes):
        shares = draw(yes)
        high = PartitionConfig(
            name="high",
            sizes=draw(st.sampled_from([(128,), (96, 128)] + ([] if shares else [((64, 96),)]))),
            teachers=("vit", "sam"),
            upsample=("vit",) if draw(yes) else (),
            batch_size=low.batch_size if shares else draw(st.integers(1, 3)),
            weight=draw(st.sampled_from([1.0, 2.5])),
            images_of="low" if shares else "",
        )
        partitions.append(high)
    own = draw(st.sampled_from([{}, {"arkd": 0.0}, {"rkd_distance": 3.0}]))
    weighting = draw(st.sampled_from(["fixed", "uncertainty", "adaloss"]))
    recipe = Recipe(
        name="any",
        seed=draw(st.integers(0, 99)),
        data=DataConfig(shards=("none",)),
        student=StudentConfig(
            architecture="test_vit",
            max_size=256,
            registers=1,
            head_hidden=16,
            heads=draw(st.sampled_from([{}, HEADS])),
            final_norm=draw(yes),
            spectral_reparametrization=draw(yes),
        ),
        teachers={**TEACHERS, "vit": replace(TEACHERS["vit"], relation=own)},
        loss=LossConfig(
            summary=draw(st.sampled_from(["cosine", "angle"])),
            relation=draw(st.sampled_from([{}, {}, {}, {"arkd": 2.0, "rkd_angle": 1.0}])),
            reduction=draw(st.sampled_from(["image", "token"])),
            rebalance=draw(yes),
            weighting=weighting,
            drop_teachers=draw(st.sampled_from([0.0, 0.5])) if weighting == "fixed" else 0.0,
            mesa=draw(st.sampled_from([0.0, 0.5])),
        ),
        augmentation=AugmentationConfig(
            shift=draw(st.integers(0, 1 if 32 in low_sizes else 2)),
            window_share=draw(st.sampled_from([0.0, 1.0])),
            window_sizes=(2, 4),
            weight_noise=draw(st.sampled_from([0.0, 0.1])),
            jitter=draw(st.sampled_from([(0.0,) * 4, (0.4, 0.4, 0.2, 0.1)])),
            blur_share=draw(st.sampled_from([0.0, 0.5])),
        ),
        stages={
            "stage1": StageConfig(
                partitions=tuple(partitions),
                ema_decay=0.9,
                freeze_body_steps=0,
                start_from="start",
                anchor=draw(st.sampled_from([0.0, 0.5])),
            )
        },
        engine=EngineConfig(
            precision="float32", device="cpu", name="single", micro_batch=draw(st.integers(0, 3))
        ),
    )
    check(recipe)
    return recipe


@cache
def teacher(name: str):
    return build_teacher(name, TEACHERS[name])


def build(recipe: Recipe, world: World) -> Distillation:
    """One process of a run, the same student and teachers whoever asks.

    The student is one of float64: a relation of summaries that are nearly equal magnifies what
    float32 rounds away, which depends on the images beside.
    """
    torch.manual_seed(0)
    teachers = {name: teacher(name) for name in TEACHERS}
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    stage = resolve_stage(recipe, "stage1", specs)
    upsampler = build_upsampler(UpsamplerConfig(name="bilinear", factor=2), {})
    targets = TargetMaker(teachers, build_normalizers("none", teachers), upsampler)
    model = build_student(
        recipe.student,
        specs,
        learned_weights=recipe.loss.weighting == "uncertainty",
        weight_noise=recipe.augmentation.weight_noise,
    ).double()
    draws = StepRandomness.of_stage(stage)
    schedule = MicroBatchSchedule(stage, world, draws)
    weights = TermWeights(stage, {"vit": 0.5, "cnn": 2.0}, CPU)
    optimizer = build_optimizer(stage.config.optimizer, parameter_groups(model, 0.02))
    engine = build_engine(model, optimizer, stage.engine, stage.config.gradient_clip, World(), CPU)
    other = Ema(model)
    with torch.no_grad():  # an average, or a start, that is not the student: it has a gradient
        for average in other.model.parameters():
            average.mul_(1.1)
    return Distillation(
        stage, world, engine, targets, None, schedule, draws, weights, ema=other, anchor=other
    )  # type: ignore[arg-type]


def images(run: Distillation, step: int) -> list[ImageBatch]:
    """The views of each micro-batch; an image looks the same wherever it is rendered."""
    batches = []
    for item in run.schedule.slices(step):
        pixels = {view: [] for view in item.views}
        for index in range(item.start, item.stop):
            noise = np.random.default_rng(100 * step + index).integers(0, 256, (24, 24, 3))
            image = torch.from_numpy(noise.astype(np.uint8)).permute(2, 0, 1)
            for view, crops in item.views.items():
                crop = None if crops is None else crops[index - item.start]
                pixels[view].append(
                    render(image, ViewOrigin((24, 24), 0, 0, 24, 24), view.size, crop)
                )
        views = {view: torch.stack(rows) for view, rows in pixels.items()}
        batches.append(ImageBatch(views, tuple(map(str, range(item.start, item.stop)))))
    return batches


def gradient(recipe: Recipe, world: World, steps: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's part of the gradient, one step after another, and of the loss."""
    run = build(recipe, world)
    gradients, losses = [], []
    for step in range(steps):
        guard, parts = NonFiniteGuard(), []

        def agree_here(loss, guard, parts=parts):
            parts.append(loss)
            return agree(loss, guard)

        assert not run.forward_backward(step, images(run, step), guard, agree_here).is_bad
        run.end_step(is_taken=True)
        gradients.append(torch.cat([p.grad.flatten() for p in run.engine.model.parameters()]))
        losses += parts
        run.engine.model.zero_grad()
    return torch.stack(gradients), torch.stack(losses)


def on_ranks(recipe: Recipe, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of simulated ranks, of whose summaries a first round finds the sums."""

    def one_round(sums: Callable[[int, torch.Tensor], torch.Tensor]):
        parts = []
        for rank in range(world_size):
            with patch("radio_distill.distill.relations.all_reduce_sum", partial(sums, rank)):
                parts.append(gradient(recipe, World(rank, world_size)))
        return parts

    tables: list[list[torch.Tensor]] = [[] for _ in range(world_size)]

    def write_down(rank: int, table: torch.Tensor) -> torch.Tensor:
        tables[rank].append(table.clone())
        return table

    if not any(losses.relation for losses in recipe.losses.values()):
        return one_round(lambda rank, table: table)
    one_round(write_down)
    sums = [list(map(sum, zip(*tables, strict=True))) for _ in range(world_size)]
    return one_round(lambda rank, table: sums[rank].pop(0))


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().amax(-1, keepdim=True).clamp(min=1e-3)
        assert float(((one - other).abs() / scale).max()) <= 1e-5


def without_past(recipe: Recipe) -> Recipe:
    """AdaLoss adapts to sums over real processes; see the test with two of them."""
    if recipe.loss.weighting != "adaloss":
        return recipe
    return replace(recipe, loss=replace(recipe.loss, weighting="fixed"))


SLOW = settings(
    max_examples=16,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@SLOW
@given(recipes(), st.integers(2, 5))
def test_gradient__of_one_process_is_the_sum_over_many(recipe, world_size):
    recipe = without_past(recipe)
    parts = on_ranks(recipe, world_size)
    summed = [sum(part[index] for part in parts) for index in range(2)]
    expected = gradient(recipe, World())
    assert float(expected[0].abs().max()) > 0
    assert_equal(summed, expected)


def test_gradient__of_relations_and_dropped_teachers_is_the_sum_over_many():
    """Seven images in micro-batches of two, and the same at another size, in a second partition."""
    low = PartitionConfig(name="low", size=64, teachers=("vit", "cnn", "sam"), batch_size=7)
    high = replace(low, name="high", size=96, teachers=("vit", "cnn"), images_of="low", weight=2.0)
    recipe = Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        student=StudentConfig(
            architecture="test_vit", max_size=256, registers=1, head_hidden=16, drop_path=0.3
        ),
        teachers=TEACHERS,
        loss=LossConfig(relation={"arkd": 2.0, "rkd_angle": 1.0}, drop_teachers=0.5),
        stages={"stage1": StageConfig(partitions=(low, high), freeze_body_steps=0)},
        engine=EngineConfig(precision="float32", device="cpu", name="single", micro_batch=2),
    )
    check(recipe)
    whole = replace(recipe, student=replace(recipe.student, drop_path=0.0))
    expected = gradient(replace(whole, engine=replace(whole.engine, micro_batch=0)), World())
    for world_size in (2, 5):
        parts = on_ranks(whole, world_size)
        assert_equal([sum(part[index] for part in parts) for index in range(2)], expected)
    without = gradient(replace(whole, loss=LossConfig(drop_teachers=0.5)), World())
    assert float((expected[0] - without[0]).abs().max()) > 1e-3
    # What stochastic depth drops is the same ahead and in the pass.
    for first, again in zip(gradient(recipe, World()), gradient(recipe, World()), strict=True):
        assert torch.equal(first, again)


def plain(partitions: tuple[PartitionConfig, ...], **fields) -> Recipe:
    """Partitions without draws, trained towards the maps of `vit` alone, from a start."""
    stage = StageConfig(partitions=partitions, freeze_body_steps=0, start_from="start")
    recipe = Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        student=StudentConfig(
            architecture="test_vit", max_size=256, registers=1, head_hidden=16, position_dropout=0.0
        ),
        teachers={**TEACHERS, "vit": replace(TEACHERS["vit"], summary_weight=0.0)},
        loss=LossConfig(**fields),
        stages={"stage1": stage},
        engine=EngineConfig(precision="float32", device="cpu", name="single"),
    )
    check(recipe)
    return recipe


def test_gradient__where_tokens_count_alike_is_that_of_partitions_weighed_by_their_cells():
    """Two partitions of 2 and 3 images, of 16 and 36 cells: each cell weighs 1 / 140."""
    low = PartitionConfig(name="low", size=64, teachers=("vit",), batch_size=2, weight=2.0)
    high = PartitionConfig(name="high", size=96, teachers=("vit",), batch_size=3, weight=3.0)
    found = gradient(plain((low, high), reduction="token"), World())
    by_cells = (replace(low, weight=2.0 * 16), replace(high, weight=3.0 * 36))
    assert_equal(found, gradient(plain(by_cells), World()))


def test_mean_cells__of_shifted_crops():
    """Crops of 4x4 patches that lie (a, b) patches apart share (4 - |a|)(4 - |b|) of them."""
    recipe = plain((PartitionConfig(name="low", size=64, teachers=("vit",), batch_size=5),))
    run = build(replace(recipe, augmentation=AugmentationConfig(shift=2)), World())
    (micro,) = run.schedule.micro_batches(7)
    apart = run.draws.views(7, micro, micro.passes[0], {}).shift("vit") * 4
    expected = (4 - apart.abs()).prod(1).mean()
    assert 4 < float(expected) < 16
    assert run.schedule.mean_cells(7)["vit"] == pytest.approx(float(expected))


def summed_gradient(rank: int, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's gradient and loss, summed over both."""
    parts = gradient(recipe, World(rank, 2))
    for part in parts:
        dist.all_reduce(part)
    return parts


@pytest.mark.distributed
@settings(SLOW, max_examples=6)
@given(recipes())
def test_gradient__of_two_real_processes(two_processes, recipe):
    expected = gradient(recipe, World())
    for answer in two_processes(summed_gradient, recipe):
        assert_equal(answer, expected)


def test_gradient__another_step_has_another():
    """What the tests above compare is not the same number over and over."""
    recipe = Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        student=StudentConfig(architecture="test_vit", max_size=256, registers=1, head_hidden=16),
        teachers=TEACHERS,
        augmentation=AugmentationConfig(shift=1),
        stages={
            "stage1": StageConfig(
                partitions=(PartitionConfig(name="low", size=64, teachers=("vit",), batch_size=2),),
                freeze_body_steps=0,
            )
        },
        engine=EngineConfig(precision="float32", device="cpu", name="single"),
    )
    first, second = gradient(recipe, World())[0]
    assert float((first - second).abs().max()) > 1e-3
    other = gradient(replace(recipe, seed=random.Random(0).randrange(1, 99)), World())[0]
    assert float((first - other[0]).abs().max()) > 1e-4, "other crops of the same images"
