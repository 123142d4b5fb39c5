"""What teachers are shown, and what the student is asked for."""

import pytest
import torch

from radio_distill.config import (
    DataConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    TeacherConfig,
    UpsamplerConfig,
)
from radio_distill.distill.targets import TargetMaker, encode
from radio_distill.distill.views import Views, resize
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import Corrector
from radio_distill.stage import resolve_stage
from teachers import build_teacher
from upsamplers import build_upsampler


def views_in(teachers, configs, *partitions, upsampler="tile"):
    """How teachers see each of some partitions, at its first size."""
    stage = StageConfig(partitions=partitions, upsampler=UpsamplerConfig(name=upsampler, factor=2))
    recipe = Recipe(
        name="any", data=DataConfig(shards=("none",)), teachers=configs, stages={"stage1": stage}
    )
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    resolved = resolve_stage(recipe, "stage1", specs).partitions
    return [item.views[item.sizes[0]] for item in resolved]


def test_resize__stays_in_range_and_keeps_constants():
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1
    resized = resize(edge, (48, 80))
    assert resized.shape == (1, 3, 48, 80)
    assert resized.min() >= 0
    assert resized.max() <= 1
    grey = torch.full((1, 3, 20, 30), 0.3)
    torch.testing.assert_close(resize(grey, (7, 11)), torch.full((1, 3, 7, 11), 0.3))
    assert resize(edge, (32, 32)) is edge


class AnySize(dict):
    """Views of one image at whatever size is asked for."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def __missing__(self, view):
        return self.setdefault(view, resize(self.pixels, view.size))


def views_of(pixels, size):
    views = Views(AnySize(pixels), size)
    views.of_student()
    return views


@pytest.mark.parametrize("upsampler", ["bilinear", "tile"])
def test_target_maker__grids_scale_and_upsampler(upsampler):
    configs = {
        "vit": TeacherConfig(preset="tiny_vit"),
        "sam": TeacherConfig(preset="tiny_samvit", summary_weight=0),
    }
    teachers = {name: build_teacher(name, config) for name, config in configs.items()}
    normalizers = {}
    for name, teacher in teachers.items():
        moments = Moments(teacher.spec.channels)
        size = teacher.spec.native_size
        moments.update(teacher.encode(torch.rand(4, 3, *size)).spatial)
        normalizers[name] = NORMALIZERS.get("global_standardise")().fit(moments)
    up = build_upsampler(UpsamplerConfig(name=upsampler, factor=2), {"vit": teachers["vit"]})
    targets = TargetMaker(teachers, normalizers, up)
    partition = PartitionConfig(
        name="high", size=128, teachers=("vit", "sam"), batch_size=2, upsample=("vit",)
    )
    (shown,) = views_in(teachers, configs, partition)
    pixels = torch.rand(2, 3, 128, 128)
    views = views_of(pixels, (128, 128))
    made = targets(views, shown.values())

    low = teachers["vit"].spec.grid(teachers["vit"].spec.native_size)
    assert made["vit"].spatial.shape[-2:] == (2 * low[0], 2 * low[1])
    assert made["sam"].summary is None
    plain = teachers["sam"].encode(resize(pixels, teachers["sam"].spec.native_size))
    torch.testing.assert_close(made["sam"].spatial, normalizers["sam"].apply(plain.spatial))
    size = shown["vit"].rendered
    assert size == tuple(2 * side for side in teachers["vit"].spec.native_size)
    raw = up(teachers["vit"], resize(pixels, size), (2 * low[0], 2 * low[1]))
    torch.testing.assert_close(made["vit"].spatial, normalizers["vit"].apply(raw.spatial))
    view = shown["vit"].without_upsampler()
    own = encode(teachers["vit"], views.of_teacher("vit", view.size), view)
    assert own.spatial.shape[-2:] == low, "statistics are of the teacher's own grid"


class Correcting:
    """An upsampler that adds one to a teacher's own grid, and notes what it was asked for."""

    factor = 2

    def __init__(self):
        self.corrected = []

    def __call__(self, teacher, pixels, grid):
        low = teacher.encode(resize(pixels, teacher.spec.native_size))
        return low._replace(spatial=low.spatial.repeat(1, 1, 2, 2))

    def cost(self, grid):
        return 1

    def correct(self, name, spatial):
        self.corrected.append(name)
        return spatial + 1


def made_with(upsampler, upsample=()):
    configs = {"vit": TeacherConfig(preset="tiny_vit"), "cnn": TeacherConfig(preset="tiny_cnn")}
    teachers = {name: build_teacher(name, config) for name, config in configs.items()}
    normalizers = {name: NORMALIZERS.get("none")() for name in teachers}
    targets = TargetMaker(teachers, normalizers, upsampler)
    partition = PartitionConfig(
        name="low", size=64, teachers=("vit", "cnn"), batch_size=2, upsample=upsample
    )
    side = 2 * teachers["vit"].spec.native_size[0]
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    views = views_of(pixels, (64, 64))
    (shown,) = views_in(teachers, configs, partition)
    own = {}
    for name, view in shown.items():
        view = view.without_upsampler()
        own[name] = encode(teachers[name], views.of_teacher(name, view.size), view)
    return targets(views, shown.values()), own


def test_target_maker__a_fitted_upsampler_corrects_what_is_not_upsampled():
    upsampler = Correcting()
    assert isinstance(upsampler, Corrector)
    made, own = made_with(upsampler)
    assert upsampler.corrected == ["vit", "cnn"]
    for name, features in own.items():
        torch.testing.assert_close(made[name].spatial, features.spatial + 1)
        torch.testing.assert_close(made[name].summary, features.summary)


def test_target_maker__what_is_upsampled_is_not_corrected_again():
    upsampler = Correcting()
    made, own = made_with(upsampler, upsample=("vit",))
    assert upsampler.corrected == ["cnn"]
    torch.testing.assert_close(made["vit"].spatial, own["vit"].spatial.repeat(1, 1, 2, 2))


def test_target_maker__other_upsamplers_leave_the_teacher_as_it_is():
    upsampler = build_upsampler(UpsamplerConfig(name="tile", factor=2), {})
    assert not isinstance(upsampler, Corrector)
    made, own = made_with(upsampler)
    for name, features in own.items():
        assert torch.equal(made[name].spatial, features.spatial)


class Counting:
    """A teacher that counts the images it is shown."""

    def __init__(self, teacher):
        self.spec, self._teacher, self.images = teacher.spec, teacher, 0

    def encode(self, pixels):
        self.images += len(pixels)
        return self._teacher.encode(pixels)


@pytest.fixture
def counted():
    """Two counting teachers, and a target maker over them."""
    configs = {
        "vit": TeacherConfig(preset="tiny_vit"),
        "sam": TeacherConfig(preset="tiny_samvit", summary_weight=0),
    }
    teachers = {name: Counting(build_teacher(name, config)) for name, config in configs.items()}
    normalizers = {name: NORMALIZERS.get("none")() for name in teachers}
    bilinear = build_upsampler(UpsamplerConfig(name="bilinear", factor=2), {})
    return teachers, configs, TargetMaker(teachers, normalizers, bilinear)


def test_target_maker__partitions_of_the_same_images_ask_a_teacher_once(counted):
    teachers, configs, targets = counted
    pixels = torch.rand(3, 3, 128, 128)
    low = PartitionConfig(name="low", size=64, teachers=("vit", "sam"), batch_size=3)
    high = PartitionConfig(
        name="high",
        size=128,
        teachers=("vit", "sam"),
        batch_size=3,
        images_of="low",
        upsample=("vit",),
    )
    seen_low, seen_high = views_in(teachers, configs, low, high)
    cache = {}
    first = targets(views_of(pixels, (64, 64)), seen_low.values(), cache)
    second = targets(views_of(pixels, (128, 128)), seen_high.values(), cache)
    assert teachers["sam"].images == 3, "both see its canvas"
    assert torch.equal(first["sam"].spatial, second["sam"].spatial)
    assert teachers["vit"].images == 6, "one sees it upsampled, the other does not"
    apart = targets(views_of(pixels, (128, 128)), seen_high.values())
    for name, features in apart.items():
        assert torch.equal(features.spatial, second[name].spatial)


def test_target_maker__mosaic_is_what_the_teacher_says_of_the_canvas(counted):
    teachers, configs, targets = counted
    spec = teachers["sam"].spec
    height, width = (side // 2 for side in spec.native_size)
    partition = PartitionConfig(
        name="low", size=(height, width), teachers=("sam",), batch_size=5, mosaic=("sam",)
    )
    pixels = torch.rand(5, 3, height, width)
    (shown,) = views_in(teachers, configs, partition)
    made = targets(views_of(pixels, (height, width)), shown.values())
    assert teachers["sam"].images == 2, "four of the five on the first canvas"
    assert shown["sam"].images_per_input == 4
    canvas = torch.cat(
        [torch.cat([pixels[0], pixels[1]], -1), torch.cat([pixels[2], pixels[3]], -1)], -2
    )
    whole = teachers["sam"].encode(canvas[None]).spatial[0]
    rows, columns = (side // 2 for side in whole.shape[-2:])
    torch.testing.assert_close(made["sam"].spatial[3], whole[:, rows:, columns:])
    assert made["sam"].spatial.shape == (5, spec.channels, rows, columns)
