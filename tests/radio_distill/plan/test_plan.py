"""The arithmetic of a plan against operations counted by hand and memory measured for real."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from radio_distill.config import (
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    Facts,
    HeadConfig,
    LossConfig,
    NormalizerConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    UpsamplerConfig,
)
from radio_distill.distill.losses import distillation_loss
from radio_distill.distill.micro_batches import MicroBatch, Pass, assign_micro_batches
from radio_distill.models.heads import build_student
from radio_distill.models.position import NUM_DRAWS
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.phi_s import PhiS
from radio_distill.plan.cost import ModelCosts, WorkBySize
from radio_distill.plan.memory import (
    GIB,
    SAFETY,
    Memory,
    micro_batches_that_fit,
    state_memory,
    step_memory,
)
from radio_distill.plan.meter import (
    Speed,
    Work,
    fake_module,
    fake_tensors,
    measure_work,
    peak_memory,
    share_equal_blocks,
)
from radio_distill.plan.step_time import Schedule, StepTime, step_time
from radio_distill.plan.time import (
    DECODE_SECONDS,
    RENDER_SECONDS,
    DeviceType,
    StagePlan,
    plan_stage,
)
from radio_distill.plan.work import STUDENT_LEFT, with_work
from radio_distill.stage import Partition, Stage, resolve_stage
from radio_distill.teacher_view import Mosaic, TeacherView
from radio_distill.types import Features, TeacherSpec
from upsamplers import build_upsampler

WIDTH, DEPTH, MLP, HIDDEN, CHANNELS = 64, 6, 192, 32, 12
DEVICE = DeviceType(bfloat16=2e-3, float32=0.5e-3, memory=1.0)  # slower than what launches


class PatchTeacher:
    """A linear map of 8 x 8 patches: 2 * 3 * 64 * C operations a cell, and no summary."""

    spec = TeacherSpec(
        "patches", CHANNELS, None, 8, (48, 48), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )

    def __init__(self) -> None:
        self.tower = nn.Conv2d(3, CHANNELS, 8, 8).requires_grad_(False)

    def encode(self, pixels: Tensor) -> Features:
        return Features(None, self.tower(pixels))

    def to(self, device: object) -> "PatchTeacher":
        return self


def make_recipe(**engine: object) -> Recipe:
    low = PartitionConfig(name="low", size=64, teachers=("patches",), batch_size=6)
    high = PartitionConfig(
        name="high", size=128, teachers=("patches",), batch_size=2, upsample=("patches",)
    )
    stage = StageConfig(
        steps=100,
        partitions=(low, high),
        upsampler=UpsamplerConfig(name="tile", factor=3),
    )
    return Recipe(
        name="tiny",
        data=DataConfig(shards=("none",)),
        student=StudentConfig(
            architecture="test_vit", max_size=128, registers=3, head_hidden=HIDDEN
        ),
        teachers={"patches": TeacherConfig(preset="none", dtype="float32", summary_weight=0)},
        normalizer=NormalizerConfig(images=1000),
        stages={"stage1": stage},
        engine=EngineConfig(**({"precision": "bfloat16"} | engine)),
    )


@contextmanager
def fake_costs(recipe: Recipe) -> Iterator[ModelCosts]:
    # Built outside the mode: timm reads numbers out of tensors, which fake tensors do not have.
    with torch.device("meta"):
        student = build_student(recipe.student, {"patches": PatchTeacher.spec})
        teachers = {"patches": PatchTeacher()}
    upsamplers = {
        name: build_upsampler(stage.upsampler, teachers) for name, stage in recipe.stages.items()
    }
    with fake_tensors():
        fake_module(student)
        fake_module(teachers["patches"].tower)
        specs = {"patches": PatchTeacher.spec}
        stages = {name: resolve_stage(recipe, name, specs, Facts()) for name in recipe.stages}
        yield ModelCosts(stages, student, teachers, upsamplers)


def stage_and(costs: ModelCosts, name: str) -> tuple[Stage, Partition]:
    stage = costs.stages["stage1"]
    return stage, next(item for item in stage.partitions if item.name == name)


def stage_and_pass(costs: ModelCosts) -> tuple[Stage, list[Pass]]:
    stage, low = stage_and(costs, "low")
    return stage, [Pass(low, low.sizes[0], low.image_weight)]


def block_flops(tokens: int) -> int:
    matrices = 2 * tokens * WIDTH * (3 * WIDTH + WIDTH + 2 * MLP)
    attention = 2 * 2 * tokens**2 * WIDTH
    return matrices + attention


def head_flops(cells: int) -> int:
    return 2 * cells * (WIDTH * HIDDEN + HIDDEN * CHANNELS)


def test_measure_work__of_a_product_and_its_backward():
    with fake_tensors():
        left, right = torch.empty(3, 5, requires_grad=True), torch.empty(5, 7, requires_grad=True)
        assert measure_work(lambda: left @ right).flops == 2 * 3 * 5 * 7
        assert measure_work(lambda: (left @ right).sum().backward()).flops == 3 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("grad", [False, True])
def test_measure_work__of_attention_is_two_products(grad):
    with fake_tensors():
        query = torch.empty(2, 3, 11, 8, requires_grad=grad)
        flops = measure_work(lambda: F.scaled_dot_product_attention(query, query, query)).flops
    assert flops == 2 * (2 * 2 * 3 * 11 * 11 * 8)


def test_share_equal_blocks__counts_and_remembers_what_all_blocks_take():
    def blocks() -> nn.Sequential:
        parts = [
            nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 16))
            for width in (4, 16, 16, 16)
        ]
        return nn.Sequential(*parts)

    with fake_tensors(), torch.no_grad():
        whole, shared = blocks(), blocks()
        runs: list[int] = []
        for block in shared:
            block[0].register_forward_hook(lambda *_: runs.append(1))
        share_equal_blocks(shared)
        for images in (2, 5):
            pixels = torch.empty(images, 4)
            expected = measure_work(lambda pixels=pixels: whole(pixels))
            found = measure_work(lambda pixels=pixels: shared(pixels))
            assert found == expected.inside_blocks()
            peak = peak_memory(lambda pixels=pixels: whole(pixels))
            assert peak_memory(lambda pixels=pixels: shared(pixels)) == peak
    assert len(runs) == 2 * 2 * 2, "two kinds of blocks, for two inputs, by two meters"


def test_peak_memory__of_tensors_that_come_and_go():
    def run() -> None:
        first = torch.zeros(1000)  # 4000 bytes
        second = first.view(10, 100) + 1  # 8000: a view is not a copy
        del first
        third = second.repeat(2, 1)  # 4000 + 8000
        del second
        third.add_(1)  # 8000: in place

    assert peak_memory(run) == 12_000


def test_partition__counts_what_the_student_computes():
    recipe = make_recipe()
    tokens, cells = 16 + 1 + 3, 16  # one summary token, three registers
    forward_and_backward = 3 * (DEPTH * block_flops(tokens) + head_flops(cells))
    patches = 2 * (2 * cells * 3 * 256 * WIDTH)  # pixels want no gradient
    with fake_costs(recipe) as costs:
        cost = costs.partition(*stage_and(costs, "low"))
    assert cost.tokens == tokens
    assert cost.student_flops == forward_and_backward + patches


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("attention", 2 * (24 * 16 * WIDTH**2 + 4 * 16**2 * WIDTH) + head_flops(16)),
        ("ladder", 2 * 16 * (5 + 4) * HIDDEN * (WIDTH + CHANNELS)),
        ("conv", 2 * 16 * WIDTH * (2 * 9 * WIDTH + CHANNELS)),
        ("linear", 2 * 16 * WIDTH * CHANNELS),
    ],
)
def test_partition__counts_what_each_kind_of_head_computes(name, forward):
    def count(head):
        recipe = make_recipe()
        student = replace(recipe.student, feature_head=HeadConfig(name=head))
        with fake_costs(replace(recipe, student=student)) as costs:
            return costs.partition(*stage_and(costs, "low")).student_flops

    assert count(name) - count("mlp") == 3 * (forward - head_flops(16))


def test_partition__counts_recomputed_blocks():
    recipe = make_recipe()
    checkpointed = replace(recipe, student=replace(recipe.student, gradient_checkpointing=True))
    with fake_costs(recipe) as costs:
        plain = costs.partition(*stage_and(costs, "low")).student_flops
    with fake_costs(checkpointed) as costs:
        more = costs.partition(*stage_and(costs, "low")).student_flops - plain
    # torch leaves out the end of a block, whose results no gradient needs
    assert 0.6 * DEPTH * block_flops(20) < more <= DEPTH * block_flops(20)


def test_partition__counts_a_teacher_with_its_tiles_and_normalizer():
    recipe = make_recipe()
    with fake_costs(recipe) as costs:
        (plain,) = costs.partition(*stage_and(costs, "low")).teachers
        (tiled,) = costs.partition(*stage_and(costs, "high")).teachers
    encode = 2 * 36 * 3 * 64 * CHANNELS  # a grid of 6 x 6
    assert (plain.view, plain.calls) == (TeacherView("patches", (48, 48), (6, 6)), 1)
    fine = TeacherView("patches", (48, 48), (18, 18), True, 3)
    assert (tiled.view, tiled.calls) == (fine, 10)
    assert (plain.encode_flops, tiled.encode_flops) == (encode, 10 * encode)
    assert plain.other_flops == 2 * 36 * CHANNELS**2  # the rotation of PHI-S
    assert tiled.other_flops == 9 * plain.other_flops


class Halved:
    """A normalizer of the user's, with tensors of its own and no base class of ours."""

    uses_statistics = True

    def fit(self, moments):
        self.halves = moments.mean.reshape(2, -1).float()
        return self

    def apply(self, spatial):
        return spatial - self.halves.flatten()[:, None, None]

    def load_state(self, state):
        self.halves = state["halves"]
        return self


class Turned(PhiS):
    """One of ours with a tensor more."""

    tensors = (*PhiS.tensors, "angle")

    def fit(self, moments):
        super().fit(moments)
        self._set(**self._state, angle=torch.zeros(()))
        return self


@pytest.mark.parametrize(("kind", "flops"), [(Halved, 0), (Turned, 2 * 36 * CHANNELS**2)])
def test_partition__counts_a_normalizer_of_the_users_own(monkeypatch, kind, flops):
    monkeypatch.setitem(NORMALIZERS._entries, "own", f"{__name__}:{kind.__name__}")
    recipe = replace(make_recipe(), normalizer=NormalizerConfig(name="own", images=1000))
    with fake_costs(recipe) as costs:
        (plain,) = costs.partition(*stage_and(costs, "low")).teachers
    assert plain.other_flops == flops
    assert plain.other.one.traffic > 0


def _allocated(run) -> int:
    """Return the most memory that torch's allocator held for ``run`` on real tensors."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("precision", "checkpointing", "tolerance"),
    [("float32", False, 0.03), ("bfloat16", True, 0.2)],  # bfloat16 kernels take room of their own
)
def test_step_memory__is_that_of_a_real_step(precision, checkpointing, tolerance):
    recipe = make_recipe(precision=precision)
    recipe = replace(recipe, student=replace(recipe.student, gradient_checkpointing=checkpointing))
    with fake_costs(recipe) as costs:
        estimate = step_memory(costs, *stage_and_pass(costs), 4)

    student, teacher = build_student(recipe.student, {"patches": PatchTeacher.spec}), PatchTeacher()
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        pixels = torch.rand(4, 3, 64, 64)
        small = F.interpolate(pixels, (48, 48))  # both views are there until the end
        targets = {"patches": teacher.encode(small)}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            predictions = student(pixels, ("patches",), draws=torch.rand(4, NUM_DRAWS))
        weights = {"patches/summary": 0.0, "patches/features": 1.0}
        report = distillation_loss(predictions.features, targets, {"patches": recipe.loss}, weights)
        report.total.sum().backward()

    step()  # the first pass makes caches
    assert estimate == pytest.approx(_allocated(step), rel=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_memory__of_a_deep_student_is_what_all_its_blocks_run_take(checkpointing, monkeypatch):
    recipe = make_recipe()
    student = replace(
        recipe.student, architecture="vit_tiny_patch16_224", gradient_checkpointing=checkpointing
    )
    with fake_costs(replace(recipe, student=student)) as costs:
        few = step_memory(costs, *stage_and_pass(costs), 4)
    monkeypatch.setattr(
        "radio_distill.plan.memory._peaks", lambda costs, inputs, measure: measure()
    )
    with fake_costs(replace(recipe, student=student)) as costs:
        assert step_memory(costs, *stage_and_pass(costs), 4) == few


def test_step_memory__grows_with_the_images_and_not_with_the_weights():
    recipe = make_recipe()
    with fake_costs(recipe) as costs:
        one, two, four = (
            step_memory(costs, *stage_and_pass(costs), images) for images in (8, 16, 32)
        )
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


@pytest.mark.parametrize(
    ("zero_stage", "weights", "gradients", "optimizer"),
    [(0, 4000, 4000, 8000), (1, 5000, 4000, 2000), (2, 5000, 1000, 2000), (3, 2000, 1000, 2000)],
)
def test_state_memory__for_each_zero_stage(zero_stage, weights, gradients, optimizer):
    memory = state_memory(1000, zero_stage, devices=4)
    assert memory == Memory(weights, gradients, optimizer)
    assert memory.total == weights + gradients + optimizer


def test_fits__leaves_a_tenth_of_the_device():
    assert Memory(0.89 * GIB, 0, 0).fits(DEVICE.memory)
    assert not Memory(0.91 * GIB, 0, 0).fits(DEVICE.memory)


def test_plan_stage__adds_up_on_one_device():
    recipe = make_recipe(precision="bfloat16")
    with fake_costs(recipe) as costs:
        plan = plan_stage(costs, "stage1", 1, DEVICE, teacher_bytes=77, utilisation=0.5)
    low, high = plan.partitions
    assert plan.stage.images_per_step == 8
    assert plan.tokens == 6 * low.tokens + 2 * high.tokens
    assert plan.student_flops == 6 * low.student_flops + 2 * high.student_flops
    assert plan.teacher_flops == 6 * low.teacher_flops + 2 * high.teacher_flops
    # half of 2 GFLOP/s in bfloat16, for the student and what comes behind an upsampled teacher, and
    # half of 0.5 GFLOP/s in float32, for teachers and what comes behind the others
    upsampling = 2 * high.teachers[0].other_flops
    seconds = (plan.student_flops + upsampling) / 1e9
    seconds += (plan.teacher_flops - upsampling) / 0.25e9
    assert plan.step_seconds == pytest.approx(seconds)
    assert plan.busy == 1
    encode = 2 * 36 * 3 * 64 * CHANNELS
    assert plan.statistics_seconds == pytest.approx(1000 * encode / 0.25e9)
    assert plan.memory.teachers == 77
    assert plan.memory.weights == 4 * costs.parameters  # one process has no ZeRO
    assert plan.hours == pytest.approx((100 * seconds + plan.statistics_seconds) / 3600)


def test_plan_stage__counts_the_decoding_of_every_size_once():
    recipe = make_recipe()
    with fake_costs(recipe) as costs:
        plan = plan_stage(costs, "stage1", 1, DEVICE, 0, utilisation=1)
    low, high = plan.partitions
    assert low.rendered == [(48, 48), (64, 64)]
    assert high.rendered == [(128, 128), (144, 144)], "tiles: three times the teacher's size"
    pixels = 6 * (48**2 + 64**2) + 2 * (128**2 + 144**2)
    seconds = 8 * DECODE_SECONDS + RENDER_SECONDS * pixels
    assert plan.decoding_cores == pytest.approx(seconds / plan.step_seconds)


def test_plan_stage__shares_the_work_out_evenly():
    recipe = make_recipe(zero_stage=2)
    with fake_costs(recipe) as costs:
        one = plan_stage(costs, "stage1", 1, DEVICE, 0, utilisation=1)
        two = plan_stage(costs, "stage1", 2, DEVICE, 0, utilisation=1)
    low, high = (item.student_flops / 2e9 + item.teacher_flops / 0.5e9 for item in two.partitions)
    high += two.partitions[1].teachers[0].other_flops * (1 / 2e9 - 1 / 0.5e9)
    assert two.step_seconds == pytest.approx(high + 3 * low)  # half of both partitions
    assert two.busy == pytest.approx(1)
    assert two.device_hours == pytest.approx(2 * two.hours)
    assert 2 * two.step_seconds * two.busy == pytest.approx(one.step_seconds)
    assert two.memory.gradients == 2 * costs.parameters


def with_partitions(*partitions: PartitionConfig, **fields: object) -> Recipe:
    recipe = make_recipe()
    stage = replace(recipe.stages["stage1"], partitions=partitions, **fields)
    return replace(recipe, stages={"stage1": stage})


def encode_flops(cells: int) -> int:
    return 2 * cells * 3 * 64 * CHANNELS


def rotate_flops(cells: int) -> int:
    return 2 * cells * CHANNELS**2


def test_partition__in_a_mosaic_shares_the_canvas():
    config = PartitionConfig(
        name="low", size=32, teachers=("patches",), mosaic=("patches",), batch_size=12
    )
    recipe = with_partitions(config)
    with fake_costs(recipe) as costs:
        (cost,) = costs.partition(*stage_and(costs, "low")).teachers
        plan = plan_stage(costs, "stage1", 1, DEVICE, 0, utilisation=1)
    # views of 2 x 2 cells of 8 pixels, nine of them on 48 x 48 pixels
    mosaic = Mosaic((48, 48), (16, 16), 8)
    assert cost.view == TeacherView("patches", (16, 16), (2, 2), mosaic=mosaic)
    assert cost.encode_flops == encode_flops(36)
    assert plan.teacher_flops == pytest.approx(12 * (encode_flops(36) / 9 + rotate_flops(4)))
    # twelve images take two canvases, the second partly empty
    teachers = (2 * encode_flops(36) + 12 * rotate_flops(4)) / 0.5e9
    assert plan.step_seconds == pytest.approx(plan.student_flops / 2e9 + teachers)
    assert plan.statistics_seconds == pytest.approx(1000 * encode_flops(36) / 9 / 0.5e9)


def test_plan_stage__takes_the_mean_time_and_the_largest_memory_of_the_sizes():
    def plans(**size: object) -> StagePlan:
        config = PartitionConfig(name="low", teachers=("patches",), batch_size=4, **size)
        with fake_costs(with_partitions(config)) as costs:
            return plan_stage(costs, "stage1", 2, DEVICE, 0, utilisation=1)

    small, large = plans(size=32), plans(size=64)
    drawn = plans(sizes=(32, 64))
    for name in ("tokens", "student_flops", "teacher_flops", "step_seconds"):
        mean = (getattr(small, name) + getattr(large, name)) / 2
        assert getattr(drawn, name) == pytest.approx(mean), name
    assert drawn.memory == large.memory
    assert small.memory.step < large.memory.step


def test_work_by_size__between_three_sizes_lies_a_parabola():
    """Attention, and so a transformer, is a parabola in its tokens: nothing is lost."""
    counted = []

    def count(size: tuple[int, int], images: int) -> Work:
        counted.append((size, images))
        return Work(flops=DEPTH * block_flops(size[0] // 16 * (size[1] // 16)))

    sizes = [(16 * side, 32 * side) for side in range(1, 9)]
    work = WorkBySize(count, sizes)
    assert [work(size).one.flops for size in sizes] == [
        DEPTH * block_flops(2 * side * side) for side in range(1, 9)
    ]
    assert sorted(counted) == sorted([(sizes[0], 1), (sizes[0], 2), (sizes[4], 1), (sizes[-1], 1)])


def test_partition__many_sizes_cost_what_each_of_them_costs_alone():
    sizes = tuple(range(16, 96, 16))
    part = {"name": "low", "teachers": ("patches",), "batch_size": 4}
    with fake_costs(with_partitions(PartitionConfig(sizes=sizes, **part))) as costs:
        together = costs.partition(*stage_and(costs, "low"))
    for size in sizes:
        with fake_costs(with_partitions(PartitionConfig(size=size, **part))) as costs:
            alone = costs.partition(*stage_and(costs, "low"))
        one, other = together.passes[size, size], alone.passes[size, size]
        assert (one.student_flops, one.tokens) == (other.student_flops, other.tokens)
        assert one.teachers[0].flops == other.teachers[0].flops
        for work, exact in ((one.student, other.student), (one.teachers[0].encode,) * 2):
            assert work.one.traffic == pytest.approx(exact.one.traffic, rel=0.01)


def test_step_time__products_alone_are_operations_over_rate_and_launches_hide_behind_them():
    with fake_costs(make_recipe()) as costs:
        stage = costs.stages["stage1"]
        counted = {item.name: costs.partition(stage, item) for item in stage.partitions}
        ranks = assign_micro_batches(
            stage, {item.name: item.sizes[0] for item in stage.partitions}, 1
        )

        def price(speed: Speed, **schedule: object) -> StepTime:
            return step_time(costs, stage, counted, ranks, speed, Schedule(**schedule))

        still = price(Speed(2e12, 0.5e12, math.inf), launch=0)
        student = sum(cost.student_flops * cost.partition.batch_size for cost in counted.values())
        assert still.learn == pytest.approx(student / 2e12)
        assert still.total == pytest.approx(still.device)
        assert still.exchange == still.elementwise == still.optimizer == 0
        real = Speed(2e12, 0.5e12, 1e9)
        slow, fast = price(real, launch=1.0), price(real, launch=1e-12)
        assert (slow.bound, fast.bound) == ("launches", "elementwise")
        assert fast.total < slow.total < price(real, launch=1.0, float_copies=True).total
        assert slow.passes == pytest.approx(slow.launches)
        assert price(real, waits=True).passes >= price(real).passes
        host = price(replace(real, launch=1e-6))
        alone = price(replace(real, launch=1e-30))
        assert host.launches == host.copies == host.waits == 0
        kernels = slow.launches / 1.0
        assert host.total - alone.total == pytest.approx(1e-6 * kernels), (
            "launches are its own work"
        )
        parts = host.encode + host.learn + host.other + host.waiting
        assert parts == pytest.approx(host.device) == pytest.approx(host.passes)
        first = ranks[0][0].passes[0]
        padding = replace(ranks[0][0], start=0, stop=1, passes=(replace(first, image_weight=0.0),))
        for zero_stage, runs_student in ((2, False), (3, True)):
            engine = replace(stage.engine, zero_stage=zero_stage)
            cut = replace(stage, recipe=replace(stage.recipe, engine=engine))
            idle = step_time(costs, cut, counted, [[padding]], real)
            assert idle.encode == idle.learn == 0
            assert (idle.device > 0) == runs_student


@pytest.mark.parametrize("is_compiled", [False, True])
def test_with_work__an_image_costs_what_a_step_with_one_more_takes_longer(is_compiled):
    speed = Speed(2e12, 0.5e12, 1e9)
    with fake_costs(make_recipe(compile=is_compiled)) as costs:
        stage = with_work(costs.stages["stage1"], costs, speed)
        counted = {item.name: costs.partition(stage, item) for item in stage.partitions}
        for partition in stage.partitions:
            (size,) = partition.sizes
            alone = (Pass(partition, size, partition.image_weight),)
            few, many = (
                step_time(costs, stage, counted, [[MicroBatch(0, stop, alone)]], speed)
                for stop in (1, 3)
            )
            work = stage.work[partition.name, size]
            assert (many.device - few.device) / 2 == pytest.approx(
                work.image + work.inputs["patches"], rel=1e-6
            )


def test_step_time__compiled_blocks_keep_a_share_of_traffic_and_kernels_and_all_products():
    with fake_costs(make_recipe()) as costs:
        stage, passes = stage_and_pass(costs)
        counted = {"low": costs.partition(stage, passes[0].partition)}
        student = counted["low"].passes[64, 64].student(6)
        assert 0 < student.block_kernels < student.kernels, "embedding and heads lie outside"

        def price(speed: Speed, is_compiled: bool) -> StepTime:
            engine = replace(stage.engine, compile=is_compiled)
            asked = replace(stage, recipe=replace(stage.recipe, engine=engine))
            work = [[MicroBatch(0, 6, tuple(passes))]]
            return step_time(costs, asked, counted, work, speed, Schedule(launch=1.0))

        still, slow = Speed(2e12, 0.5e12, math.inf), Speed(math.inf, math.inf, 1e9)
        assert price(still, True).learn == price(still, False).learn
        eager, fused = price(slow, False), price(slow, True)
        traffic, kernels = STUDENT_LEFT
        saved = (1 - traffic) * student.block_traffic / 1e9
        assert eager.learn - fused.learn == pytest.approx(saved)
        saved = (1 - kernels) * student.block_kernels
        assert eager.launches - fused.launches == pytest.approx(saved)


def test_matrices__are_derived_once_a_step_and_not_in_each_pass():
    def count(**student: bool) -> tuple[Work, Work]:
        recipe = make_recipe()
        recipe = replace(recipe, student=replace(recipe.student, **student))
        with fake_costs(recipe) as costs:
            stage, low = stage_and(costs, "low")
            return costs.partition(stage, low).passes[64, 64].student(1), costs.matrices

    (plain, nothing), (spectral, matrices) = count(), count(spectral_reparametrization=True)
    assert nothing == Work()
    assert spectral.kernels == plain.kernels
    learned = 4 * DEPTH * WIDTH * (3 * WIDTH + WIDTH + 2 * MLP)
    assert matrices.traffic > 4 * learned, "derived twice, and their gradients handed on"


@pytest.mark.parametrize(("shift", "runs"), [(0, 1), (2, 2)])
def test_plan_stage__a_teacher_that_sees_the_same_twice_runs_once(shift, runs):
    low = PartitionConfig(name="low", size=64, teachers=("patches",), batch_size=3)
    high = replace(low, name="high", size=96, images_of="low")
    recipe = with_partitions(low, high)
    recipe = replace(recipe, augmentation=AugmentationConfig(shift=shift))
    with fake_costs(recipe) as costs:
        plan = plan_stage(costs, "stage1", 1, DEVICE, 0, utilisation=1)
    assert plan.stage.images_per_step == 3
    assert plan.teacher_flops == runs * 3 * (encode_flops(36) + rotate_flops(36))
    seconds = plan.student_flops / 2e9 + plan.teacher_flops / 0.5e9
    assert plan.step_seconds == pytest.approx(seconds)


def test_plan_stage__mesa_costs_a_forward_pass_and_an_averaged_student():
    low = PartitionConfig(name="low", size=64, teachers=("patches",), batch_size=3)
    plain = with_partitions(low)
    mesa = with_partitions(low, ema_decay=0.9)
    mesa = replace(mesa, loss=LossConfig(mesa=1.0))
    with fake_costs(plain) as costs:
        before = plan_stage(costs, "stage1", 2, DEVICE, 0)
    with fake_costs(mesa) as costs:
        after = plan_stage(costs, "stage1", 2, DEVICE, 0)
    forward = DEPTH * block_flops(20) + 2 * 16 * 3 * 256 * WIDTH
    assert after.student_flops - before.student_flops == 3 * forward
    assert after.memory == replace(before.memory, average=4 * costs.parameters)


def test_plan_stage__utilisation_scales_time_alone():
    recipe = make_recipe()
    with fake_costs(recipe) as costs:
        full = plan_stage(costs, "stage1", 2, DEVICE, 0, utilisation=1)
        half = plan_stage(costs, "stage1", 2, DEVICE, 0, utilisation=0.5)
    assert half.hours == pytest.approx(2 * full.hours)
    assert half.memory == full.memory


def test_plan_stage__a_step_takes_as_long_as_the_host_launches():
    fast = replace(DEVICE, bfloat16=2e3, float32=5e2)
    with fake_costs(make_recipe()) as costs:
        plan, half = (plan_stage(costs, "stage1", 1, fast, 0, utilisation=u) for u in (1, 0.5))
    assert plan.parts.bound == "launches"
    assert plan.step_seconds == half.step_seconds == plan.parts.launches > 0


def test_plan_stage__micro_batch_saves_memory_and_changes_no_count():
    plans = []
    for micro_batch in (0, 1):
        with fake_costs(make_recipe(micro_batch=micro_batch)) as costs:
            plans.append(plan_stage(costs, "stage1", 1, DEVICE, 0, utilisation=1))
    assert plans[1].memory.step < plans[0].memory.step
    assert plans[1].student_flops == plans[0].student_flops
    assert plans[1].hours == pytest.approx(plans[0].hours)


def test_micro_batches_that_fit__the_largest_power_of_two_with_room():
    low = PartitionConfig(name="low", sizes=(32, 64), teachers=("patches",), batch_size=40)
    with fake_costs(with_partitions(low)) as costs:
        stage, partition = stage_and(costs, "low")

        def needed(size: tuple[int, int], images: int) -> int:
            passes = [Pass(partition, size, partition.image_weight)]
            return step_memory(costs, stage, passes, images)

        room = needed((64, 64), 9) / SAFETY
        found = micro_batches_that_fit(costs, stage, room)
        assert found["low", (64, 64)] == 8
        for size in partition.sizes:
            images = found["low", size]
            assert needed(size, images) <= SAFETY * room < needed(size, 2 * images)
        few = micro_batches_that_fit(costs, stage, 0)
        many = micro_batches_that_fit(costs, stage, 1e15)
    assert set(few.values()) == {1}, "one image has to do"
    assert set(many.values()) == {32}, "no more than there are"


@pytest.mark.parametrize("images", [1.5, 3, 7, 20])
def test_micro_batches_that_fit__where_copies_of_weights_are_much_of_the_room(images):
    """At smaller sizes too what is found fits, and is half of the most at least."""
    name, sizes = "learning", (32, 64, 128)
    config = PartitionConfig(name=name, sizes=sizes, teachers=("patches",), batch_size=64)
    recipe = with_partitions(config)
    with fake_costs(replace(recipe, engine=replace(recipe.engine, precision="bfloat16"))) as costs:
        stage, partition = stage_and(costs, name)

        def needed(size: tuple[int, int], images: int) -> float:
            return step_memory(costs, stage, [Pass(partition, size, 1.0)], images)

        one, two = needed((128, 128), 1), needed((128, 128), 2)
        assert 2 * one > 1.1 * two, "a part does not grow"
        room = one + (images - 1) * (two - one)
        for (_, size), number in micro_batches_that_fit(costs, stage, room / SAFETY).items():
            assert needed(size, number) <= room
            assert number == 64 or needed(size, 4 * number) > room


def test_plan_stage__auto_fills_the_memory_and_changes_no_count():
    def plan(micro_batch: object, gib: float = 1.0) -> StagePlan:
        with fake_costs(make_recipe(micro_batch=micro_batch)) as costs:
            device = DeviceType(bfloat16=2.0, float32=0.5, memory=gib)
            return plan_stage(costs, "stage1", 1, device, 0, utilisation=1)

    one, auto, roomy = plan(1), plan("auto", 0.001), plan("auto")
    assert auto.stage.micro_batch("low", (64, 64)) < roomy.stage.micro_batch("low", (64, 64)) == 4
    assert one.memory.step <= auto.memory.step < roomy.memory.step
    assert one.student_flops == auto.student_flops == roomy.student_flops
