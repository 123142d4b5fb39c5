"""The fit: it learns, goes on where it was, and does not depend on how its work is shared out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import FitConfig, Recipe, build, check
from radio_distill.data.loader import StepSlice
from radio_distill.errors import ConfigError, DivergedError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.statistics import Moments
from radio_distill.stage import resolve_stage
from radio_distill.system.distributed import World
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.health import NonFiniteGuard, agree
from radio_distill.train.trainer import Trainer
from radio_distill.types import Features, ImageBatch, View
from upsamplers.fit.batches import assign_images, step_homographies
from upsamplers.fit.consistency import Consistency
from upsamplers.fit.halvings import Halvings
from upsamplers.fit.task import (
    MODULES,
    Fit,
    build_fit_engine,
    parameter_groups,
    passes_of_step,
)
from upsamplers.fitted import TeacherOutput, UpsamplerModel
from upsamplers.networks import Observation, build_network

SIZE, FACTOR, CHANNELS = (48, 48), 2, 32
FIT = {
    "teacher": "tiny_vit",
    "factor": FACTOR,
    "size": SIZE[0],
    "steps": 6,
    "batch_size": 3,
    "views": 2,
    "warmup_steps": 2,
    "learning_rate": 0.003,
    "downsampler_kernel": 4,
    "images_every": 0,
}


def recipe_of(**values) -> Recipe:
    recipe = {
        "name": "fits",
        "seed": 5,
        "data": {"shards": ["unused"]},
        "teachers": {"tiny_vit": {"preset": "tiny_vit"}},
        "stages": {},
        "engine": {"precision": "float32", "device": "cpu"},
        "log": {"every": 1, "save_every": 3, "keep_last": 9, "trackers": []},
        "watch": {"max_skipped": 2},
        "fit": {**FIT, **values},
    }
    made = build(Recipe, recipe)
    check(made)
    return made


def image(number: int, size) -> torch.Tensor:
    """Soft colours with two rectangles of stripes: a function of the number alone."""
    generator = np.random.default_rng(number)
    coarse = torch.from_numpy(generator.random((1, 3, 4, 4), dtype=np.float32))
    made = F.interpolate(coarse, size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    for top, left in generator.integers(0, size[0] * 2 // 3, (2, 2)):
        stripes = (torch.arange(size[0] // 3) // 2 % 2).float()
        part = made[:, top : top + len(stripes), left : left + len(stripes)]
        part[:] = stripes[: part.shape[2]] * torch.from_numpy(generator.random((3, 1, 1)))
    return made


class Images:
    """Generated images in the order of steps; notes which steps were asked for."""

    def __init__(self, slices, batch_size):
        self.slices, self.batch_size = slices, batch_size
        self.steps: list[int] = []
        self.fingerprint, self.bad = "generated", {}

    def batches(self, start_step):
        step = start_step
        while True:
            self.steps.append(step)
            yield [self.batch(step, item) for item in self.slices]
            step += 1

    def batch(self, step, item):
        numbers = [step * self.batch_size + at for at in range(item.start, item.stop)]
        pixels = torch.stack([image(number, item.size) for number in numbers])
        pixels = (pixels * 255).round().to(torch.uint8)
        return ImageBatch({View(item.size): pixels}, tuple(map(str, numbers)))


@pytest.fixture(scope="session")
def normalizer(tiny):
    """PHI-S of the tiny teacher on such images."""
    moments = Moments(CHANNELS)
    pixels = torch.stack([image(1000 + number, SIZE) for number in range(16)])
    moments.update(tiny("tiny_vit").encode(pixels).spatial)
    return NORMALIZERS.get("phi_s")().fit(moments)


@pytest.fixture
def run_of(tmp_path, tiny, normalizer):
    """Return a run as one process has it."""

    def make(
        upsampler="featup",
        folder="run",
        world=None,
        micro_batch=0,
        teacher=None,
        precision="float32",
        **values,
    ):
        recipe = recipe_of(upsampler=upsampler, **values)
        recipe = replace(recipe, engine=replace(recipe.engine, precision=precision))
        config, world = recipe.fit, world or World()
        teacher = teacher or tiny("tiny_vit")
        stage = resolve_stage(
            recipe, "fit", {teacher.spec.name: teacher.spec}, folder=tmp_path / folder
        )
        fine = (SIZE[0] * FACTOR, SIZE[1] * FACTOR)
        slices = assign_images(config, world, micro_batch, fine)
        torch.manual_seed(0)
        network = build_network(upsampler, CHANNELS, FACTOR, config.options)
        grid = (6, 6) if config.de_bias else None
        model = UpsamplerModel(network, normalizer, CHANNELS, grid)
        asked = Halvings(model, config) if config.halvings else None
        consistency = asked or Consistency(model, config, CHANNELS)
        engine = build_fit_engine(consistency, stage, World(), torch.device("cpu"))
        images = Images(slices, config.batch_size)
        num_passes = passes_of_step(stage, world.world_size, micro_batch, len(slices))
        return Fit(stage, world, teacher, consistency, engine, images, slices, num_passes)

    return make


def fit(run: Fit, resumed: Checkpoint | None = None) -> None:
    if resumed is not None:
        run.restore(resumed)
    Trainer(run.stage, run, run.world, resumed=resumed).run()


def batches_of(run: Fit, steps: int, start: int = 0):
    images = run.batches(start)
    return [run.fit_batches(step, next(images)) for step in range(start, start + steps)]


def losses(run: Fit) -> list[float]:
    lines = (run.stage.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def tensors(run: Fit, part: str):
    return checkpoints.find(run.stage.folder).tensors(part)


@pytest.mark.parametrize("upsampler", ["featup", "featsharp"])
def test_fit__lowers_its_loss_on_the_same_images(run_of, upsampler):
    """With a pool of one step every step meets the same views, so that losses compare."""
    run = run_of(upsampler, steps=30, pool=3, rates={"bias": 0.03})
    fit(run)
    values = losses(run)
    assert len(values) == 30
    assert values[-1] < 0.8 * values[0]
    assert float(run.consistency.model.bias.detach().abs().max()) > 0.01


def test_fit__keeps_bf16_autocast_finite(run_of):
    run = run_of("featsharp", steps=2, precision="bfloat16")
    fit(run)
    assert np.isfinite(losses(run)).all()


@pytest.mark.parametrize("pool", [0, 6])
@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_fit__resumed_at_half_ends_bit_for_bit_the_same(run_of, pool, downsampler):
    settings = {"pool": pool, "downsampler": downsampler, "uncertainty": True, "crf": 0.001}
    whole = run_of(folder="whole", **settings)
    fit(whole)
    assert sorted(path.name for path in (whole.stage.folder / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    half = run_of(folder="half", **settings)
    fit(half, checkpoints.read(whole.stage.folder / "checkpoints" / "step-00000003"))
    assert losses(half) == losses(whole)[3:]
    for part in (MODULES, checkpoints.OPTIMIZER):
        expected, found = tensors(whole, part), tensors(half, part)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), f"{part}/{name}"


def test_fit__images_are_written_where_asked(run_of):
    run = run_of("featsharp", steps=2, images_every=1)
    fit(run)
    names = sorted(path.name for path in (run.stage.folder / "images").iterdir())
    assert names == ["step-00000001.png", "step-00000002.png"]


def test_batches__a_pool_comes_again_and_is_read_once(run_of):
    run = run_of("featsharp", pool=6)
    first, second, third, fourth = batches_of(run, 4)
    assert run.source.steps == [0, 1]
    for early, late in ((first, third), (second, fourth)):
        assert torch.equal(early[0].homographies, late[0].homographies)
        assert torch.equal(early[0].output.further, late[0].output.further)
        assert torch.equal(
            early[0].output.observation.tiles[2], late[0].output.observation.tiles[2]
        )
    assert not torch.equal(first[0].homographies, second[0].homographies)
    fresh = batches_of(run_of("featsharp"), 2)
    for kept, new in zip((first, second), fresh, strict=True):
        assert torch.equal(kept[0].homographies, new[0].homographies)
        torch.testing.assert_close(
            kept[0].output.observation.low, new[0].output.observation.low, rtol=1e-3, atol=1e-3
        )


def test_batches__a_pool_that_another_fit_began_is_filled_in_order(run_of):
    expected = batches_of(run_of(pool=9), 3)
    begun = run_of(pool=9)
    batches_of(begun, 1)
    other = run_of(pool=9)
    other.pool = begun.pool
    found = batches_of(other, 3)
    assert other.source.steps == [1, 2]
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one[0].homographies, two[0].homographies)
        assert torch.equal(one[0].output.further, two[0].output.further)


def test_batches__a_pool_refuses_features_that_half_precision_cannot_hold(run_of, tiny):
    class Loud:
        spec = tiny("tiny_vit").spec

        def encode(self, pixels):
            summary, spatial = tiny("tiny_vit").encode(pixels)
            return Features(summary, spatial * 1e7)

    with pytest.raises(ConfigError, match=r"fit.pool .*'tiny_vit' overflow.*phi_s.*fit.pool to 0"):
        batches_of(run_of(pool=6, teacher=Loud()), 1)
    (lesson,) = batches_of(run_of(teacher=Loud()), 1)
    assert lesson[0].output.further.isfinite().all()


@pytest.mark.parametrize("pool", [0, 6])
def test_batches__from_a_later_step_on_are_the_same(run_of, pool):
    expected = batches_of(run_of(pool=pool), 4)[3]
    (found,) = batches_of(run_of(pool=pool), 1, start=3)
    assert torch.equal(found[0].homographies, expected[0].homographies)
    assert torch.equal(found[0].output.further, expected[0].output.further)


def test_batches__encode_image_tiles_and_views_in_one_call(run_of, spy):
    teacher = spy("tiny_vit")
    batches_of(run_of("featsharp", teacher=teacher), 2)
    assert teacher.calls == [3 * (1 + 4 + 2)] * 2


def test_step_homographies__are_of_seed_and_step_alone():
    config = FitConfig(batch_size=3, views=2)
    drawn = step_homographies(5, 7, config)
    assert drawn.shape == (3, 2, 3, 3)
    torch.rand(3)
    assert torch.equal(step_homographies(5, 7, config), drawn)
    assert not torch.equal(step_homographies(5, 8, config), drawn)
    assert not torch.equal(step_homographies(6, 7, config), drawn)
    few = step_homographies(5, 7, replace(config, batch_size=2))
    assert torch.equal(few, drawn[:2])


def terms_of(run: Fit):
    """Run forward and backward of the first step; returns its terms on this process."""
    guard = NonFiniteGuard()
    run.forward_backward(0, next(run.batches(0)), guard, agree)
    assert not guard.causes()
    return {
        name: value
        for name, value in run.log_values().items()
        if "_" not in name or name == "total_variation"
    }


VIEWED = {"downsampler": "simple", "total_variation": 0.1, "crf": 0.01}
HALVED = {"size": 64, "halvings": 3, "de_bias": False, "options": {"cell_pixels": 2}}


@pytest.mark.parametrize(
    ("upsampler", "settings", "world_size"),
    [("featsharp", VIEWED, 2), ("featsharp", VIEWED, 3), ("uplift", HALVED, 2)],
)
def test_forward_backward__processes_and_passes_add_up_to_one(
    run_of, upsampler, settings, world_size
):
    """Nothing is dropped by the simple downsampler, so that the draws are all there is."""
    whole = run_of(upsampler, **settings)
    terms = terms_of(whole)
    expected = [item.grad.clone() for item in whole.consistency.parameters()]
    summed = [torch.zeros_like(item) for item in expected]
    totals = dict.fromkeys(terms, 0.0)
    for rank in range(world_size):
        run = run_of(upsampler, world=World(rank, world_size), micro_batch=1, **settings)
        for name, value in terms_of(run).items():
            totals[name] += float(value)
        for total, item in zip(summed, run.consistency.parameters(), strict=True):
            total += item.grad
    for name, value in terms.items():
        assert totals[name] == pytest.approx(float(value), rel=1e-4), name
    for total, wanted in zip(summed, expected, strict=True):
        largest = float(wanted.abs().max())
        assert float((total - wanted).abs().max()) <= 1e-4 * max(largest, 1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
def test_assign_images__every_image_once_in_passes_of_the_micro_batch(world_size, micro_batch):
    config = FitConfig(batch_size=5)
    shares = [
        assign_images(config, World(r, world_size), micro_batch, (8, 8)) for r in range(world_size)
    ]
    flat = [at for share in shares for item in share for at in range(item.start, item.stop)]
    assert flat == list(range(5))
    assert all(shares), "a process without work"
    if micro_batch:
        assert all(item.stop - item.start <= micro_batch for share in shares for item in share)
    else:
        assert all(len(share) == 1 for share in shares)
    assert shares[0][0].size == (8, 8)


def test_assign_images__more_processes_than_images():
    message = "fit.batch_size: 2 .*3 processes"
    with pytest.raises(ConfigError, match=message):
        assign_images(FitConfig(batch_size=2), World(0, 3), 0, (8, 8))
    assert assign_images(FitConfig(batch_size=3), World(2, 3), 0, (8, 8)) == [
        StepSlice(2, 3, (8, 8))
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0}, "fit.factor: 0 is below 1"),
        ({"steps": 0}, "fit.steps: 0 is below 1"),
        ({"batch_size": 0}, "fit.batch_size: 0 is below 1"),
        ({"views": 0}, "fit.views: 0 is below 1"),
        ({"pool": -3}, "fit.pool: -3 is below 0"),
        ({"pool": 4}, "fit.pool: 4 is not a multiple of fit.batch_size 3"),
        ({"size": -1}, "fit.size: -1 is below 0"),
        ({"downsampler_kernel": 0}, "fit.downsampler_kernel: 0 is below 1"),
        ({"learning_rate": -1.0}, "fit.learning_rate: -1.0 is below 0"),
        ({"warmup_steps": -1}, "fit.warmup_steps: -1 is below 0"),
        ({"gradient_clip": -1.0}, "fit.gradient_clip: -1.0 is below 0"),
        ({"total_variation": -0.1}, "fit.total_variation: -0.1 is below 0"),
        ({"crf": -0.1}, "fit.crf: -0.1 is below 0"),
        ({"teacher": "tiny_vti"}, "fit.teacher: no teacher 'tiny_vti' (did you mean 'tiny_vit'?)"),
        (
            {"downsampler": "mean"},
            "fit.downsampler: 'mean' is not one of attention, featup, simple",
        ),
        ({"view_range": "wild"}, "fit.view_range: 'wild' is not one of featup, featsharp"),
        ({"stpes": 3}, "did you mean 'steps'?"),
        ({"halvings": 1}, "fit.de_bias: is learned of views"),
        ({"distance": "cosine"}, "fit.distance: cosine is of fit.halvings"),
    ],
)
def test_check__a_fit_that_cannot_be_is_one_line(values, message):
    with pytest.raises(ConfigError) as error:
        recipe_of(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def observed(batch=2, views=2):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    low, tiles = normal(batch, CHANNELS, 6, 6), normal(batch, CHANNELS, 12, 12)
    guidance = torch.rand(batch, 3, 96, 96, generator=generator)
    further = normal(batch * views, CHANNELS, 6, 6)
    drawn = step_homographies(0, 0, FitConfig(batch_size=batch, views=views))
    return TeacherOutput(None, Observation(guidance, low, {2: tiles}), further), drawn


@pytest.mark.parametrize("upsampler", ["featup", "featsharp", "carafe"])
def test_consistency__trains_everything_it_has(run_of, upsampler):
    modules = run_of(upsampler, uncertainty=True).consistency
    for parameter in modules.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loss, terms = modules(*observed(), torch.Generator())
    assert loss.shape == (2,)
    assert set(terms) == {"consistency"}
    loss.sum().backward()
    for name, parameter in modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("values", [{"total_variation": 0.5}, {"crf": 0.5}])
def test_consistency__each_prior_adds_its_weight_times_itself(run_of, values):
    (name, weight), *_ = values.items()
    loss, terms = run_of(**values).consistency.eval()(*observed(), torch.Generator().manual_seed(3))
    assert set(terms) == {"consistency", name}
    torch.testing.assert_close(loss, terms["consistency"] + weight * terms[name])
    assert float(terms[name].detach().abs().min()) > 0
    plain, _ = run_of().consistency.eval()(*observed(), torch.Generator().manual_seed(3))
    torch.testing.assert_close(plain, terms["consistency"])


@pytest.mark.parametrize("values", [{"total_variation": 0.5}, {"crf": 0.5}, {"uncertainty": True}])
def test_consistency__each_weight_changes_the_gradient_of_the_network(run_of, values):
    def gradients(**values):
        modules = run_of(**values).consistency.eval()
        if modules.uncertainty is not None:
            torch.nn.init.constant_(modules.uncertainty.linear.weight, 0.05)
        modules(*observed(), torch.Generator().manual_seed(3))[0].sum().backward()
        network = modules.model.network
        return torch.cat([item.grad.flatten() for item in network.parameters()])

    plain, weighted = gradients(), gradients(**values)
    assert float((weighted - plain).norm() / plain.norm()) > 1e-3


def test_consistency__of_views_that_see_nothing_of_the_image_is_zero(run_of):
    """Not NaN: a mean over no cell."""
    seen, drawn = observed()
    far = drawn.clone()
    far[:, :, :2, 2] += 50
    loss, _ = run_of().consistency(seen, far, torch.Generator())
    assert torch.equal(loss, torch.zeros(2))


def test_consistency__of_the_teacher_s_own_map_and_the_whole_image(run_of):
    """Views that are the image itself, a map that is constant: nothing is left to learn."""
    modules = run_of("bilinear", downsampler="simple").consistency
    low = torch.randn(2, CHANNELS, 1, 1).expand(-1, -1, 6, 6)
    drawn = torch.eye(3).expand(2, 3, 3, 3)
    seen = TeacherOutput(
        None, Observation(torch.rand(2, 3, 96, 96), low, {}), low.repeat_interleave(3, 0)
    )
    loss, _ = modules(seen, drawn, torch.Generator())
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-10, rtol=0)


def test_parameter_groups__a_part_of_a_name_has_its_own_rate(run_of):
    run = run_of("featup", rates={"bias": 0.5}, learning_rate=0.25)
    modules = run.consistency
    groups = parameter_groups(modules, run.stage.fit)
    rates = {id(item): group["lr"] for group in groups for item in group["params"]}
    assert len(rates) == len(list(modules.parameters()))
    assert rates[id(modules.model.bias)] == 0.5
    assert rates[id(modules.downsampler.w)] == 0.25


def test_parameter_groups__an_unknown_part_is_warned_of_with_the_nearest(run_of, caplog):
    run = run_of("featup", rates={"satck": 0.5}, learning_rate=0.25)
    groups = parameter_groups(run.consistency, run.stage.fit)
    assert [group["lr"] for group in groups] == [0.25]
    assert "fit.rates: no parameter of featup is part of 'satck' (did you mean 'stack'?)" in (
        caplog.text
    )


class Broken:
    """A teacher that gives NaN for the image, or for its views alone."""

    def __init__(self, teacher, views_alone):
        self.teacher, self.spec, self.views_alone = teacher, teacher.spec, views_alone

    def encode(self, pixels):
        summary, spatial = self.teacher.encode(pixels)
        spatial[-1 if self.views_alone else 1, 0, 0, 0] = float("nan")
        return Features(summary, spatial)

    def to(self, device):
        return self


@pytest.mark.parametrize("views_alone", [False, True])
def test_fit__a_teacher_s_nan_stops_it_and_names_the_teacher(run_of, tiny, views_alone):
    run = run_of(teacher=Broken(tiny("tiny_vit"), views_alone))
    with pytest.raises(DivergedError, match="step 3, the 3rd") as error:
        fit(run)
    first = "1, 4, 7" if not views_alone else "2, 5, 8"
    assert f"teacher tiny_vit for {first.split(', ')[-1]};" in str(error.value)
    found = [
        json.loads(line) for line in (run.stage.folder / "skipped.jsonl").read_text().splitlines()
    ]
    expected = [["teacher tiny_vit", [key]] for key in first.split(", ")]
    assert [[row["found"][0]["cause"], row["found"][0]["keys"]] for row in found] == expected
    assert not (run.stage.folder / "checkpoints").exists()


def test_fit__a_loss_that_diverges_names_the_last_good_checkpoint(run_of):
    run = run_of(learning_rate=1e30, gradient_clip=0.0, warmup_steps=0)
    with pytest.raises(DivergedError, match=r"step 4, the 3rd .*loss"):
        fit(run)
