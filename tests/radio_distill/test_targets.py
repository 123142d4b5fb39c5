"""What teachers are shown, and what the student is asked for."""

import pytest
import torch

from radio_distill.config import PartitionConfig, TeacherConfig, UpsamplerConfig, size_pair
from radio_distill.distill.targets import TargetMaker, check_partition, input_size
from radio_distill.distill.views import Views, resize
from radio_distill.errors import ConfigError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.moments import Moments
from radio_distill.protocols import Corrector
from radio_distill.types import TeacherSpec
from teachers import build_teacher
from upsamplers import build_upsampler


def spec_of(**changes) -> TeacherSpec:
    values = dict.fromkeys(("mean", "std"), (0.5, 0.5, 0.5)) | {
        "name": "t", "channels": 8, "summary_channels": None, "patch_size": 14,
        "native_size": (224, 224), "max_size": None,
    }  # fmt: skip
    return TeacherSpec(**(values | changes))


def partition_of(size, **changes) -> PartitionConfig:
    return PartitionConfig(name="p", size=size, teachers=("t",), batch_size=1, **changes)


def seen_at(config, spec, partition):
    return input_size(config, spec, partition, size_pair(partition.size), 16)


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
def test_input_size__rules(wanted, size, expected):
    config = TeacherConfig(preset="x", input_size=wanted)
    assert seen_at(config, spec_of(), partition_of(size)) == expected


def test_input_size__the_partition_goes_first_and_a_fixed_teacher_never_gives_way():
    config = TeacherConfig(preset="x", input_size=224)
    partition = partition_of(512, teacher_sizes={"t": 448})
    assert seen_at(config, spec_of(), partition) == (448, 448)
    fixed = spec_of(fixed_size=True, native_size=(1022, 1022))
    assert seen_at(TeacherConfig(preset="x"), fixed, partition_of(512)) == (1022, 1022)
    assert seen_at(config, fixed, partition_of(512, teacher_sizes={"t": 1022})) == (1022, 1022)
    for asked in (partition, partition_of(512)):
        with pytest.raises(ConfigError, match="takes 1022x1022 pixels only, not"):
            seen_at(config, fixed, asked)


def test_input_size__what_cannot_be():
    with pytest.raises(ConfigError, match=r"500 is not a multiple of its patch 14 \(nearest 504\)"):
        seen_at(TeacherConfig(preset="x", input_size=500), spec_of(), partition_of(512))
    match = TeacherConfig(preset="x", input_size="match")
    with pytest.raises(ConfigError, match=r"448x448 .* above its largest 224; set teacher_sizes"):
        seen_at(match, spec_of(max_size=224), partition_of(512))


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
    configs = {"vit": TeacherConfig(preset="tiny_vit"), "sam": TeacherConfig(preset="tiny_samvit")}
    teachers = {name: build_teacher(name, config) for name, config in configs.items()}
    normalizers = {}
    for name, teacher in teachers.items():
        moments = Moments(teacher.spec.channels)
        size = teacher.spec.native_size
        moments.update(teacher.encode(torch.rand(4, 3, *size)).spatial)
        normalizers[name] = NORMALIZERS.get("global_standardise")().fit(moments)
    up = build_upsampler(UpsamplerConfig(name=upsampler, factor=2), {"vit": teachers["vit"]})
    targets = TargetMaker(teachers, configs, up, normalizers, student_patch_size=16)
    partition = PartitionConfig(
        name="high", size=128, teachers=("vit", "sam"), batch_size=2, upsample=("vit",)
    )
    pixels = torch.rand(2, 3, 128, 128)
    views = views_of(pixels, (128, 128))
    made = targets(views, partition)

    low = teachers["vit"].spec.grid(teachers["vit"].spec.native_size)
    assert made["vit"].spatial.shape[-2:] == (2 * low[0], 2 * low[1])
    assert made["sam"].summary is None
    plain = teachers["sam"].encode(resize(pixels, teachers["sam"].spec.native_size))
    torch.testing.assert_close(made["sam"].spatial, normalizers["sam"].apply(plain.spatial))
    size = targets.rendered_size("vit", partition, (128, 128))
    assert size == tuple(2 * side for side in teachers["vit"].spec.native_size)
    raw = up(teachers["vit"], resize(pixels, size), (2 * low[0], 2 * low[1]))
    torch.testing.assert_close(made["vit"].spatial, normalizers["vit"].apply(raw.spatial))
    own = targets.own_grid("vit", views, partition)
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
    targets = TargetMaker(teachers, configs, upsampler, normalizers, student_patch_size=16)
    partition = PartitionConfig(
        name="low", size=64, teachers=("vit", "cnn"), batch_size=2, upsample=upsample
    )
    side = 2 * teachers["vit"].spec.native_size[0]
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    views = views_of(pixels, (64, 64))
    own = {name: targets.own_grid(name, views, partition) for name in teachers}
    return targets(views, partition), own


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
    return teachers, TargetMaker(teachers, configs, bilinear, normalizers, student_patch_size=16)


def test_target_maker__partitions_of_the_same_images_ask_a_teacher_once(counted):
    teachers, targets = counted
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
    seen = {}
    first = targets(views_of(pixels, (64, 64)), low, seen)
    second = targets(views_of(pixels, (128, 128)), high, seen)
    assert teachers["sam"].images == 3, "both see its canvas"
    assert torch.equal(first["sam"].spatial, second["sam"].spatial)
    assert teachers["vit"].images == 6, "one sees it upsampled, the other does not"
    apart = targets(views_of(pixels, (128, 128)), high)
    for name, features in apart.items():
        assert torch.equal(features.spatial, second[name].spatial)


def test_target_maker__mosaic_is_what_the_teacher_says_of_the_canvas(counted):
    teachers, targets = counted
    spec = teachers["sam"].spec
    height, width = (side // 2 for side in spec.native_size)
    partition = PartitionConfig(
        name="low", size=(height, width), teachers=("sam",), batch_size=5, mosaic=("sam",)
    )
    pixels = torch.rand(5, 3, height, width)
    made = targets(views_of(pixels, (height, width)), partition)
    assert teachers["sam"].images == 2, "four of the five on the first canvas"
    assert targets.images_together(partition, (height, width)) == 4
    canvas = torch.cat(
        [torch.cat([pixels[0], pixels[1]], -1), torch.cat([pixels[2], pixels[3]], -1)], -2
    )
    whole = teachers["sam"].encode(canvas[None]).spatial[0]
    rows, columns = (side // 2 for side in whole.shape[-2:])
    torch.testing.assert_close(made["sam"].spatial[3], whole[:, rows:, columns:])
    assert made["sam"].spatial.shape == (5, spec.channels, rows, columns)


def check(spec, partition, **config):
    configs = {"t": TeacherConfig(preset="x", **config)}
    check_partition(partition, configs, {"t": spec}, 16)


def test_check_partition__summary_of_a_teacher_without():
    with pytest.raises(ConfigError, match=r"teachers.t.summary_weight: .*no summary; set it to 0"):
        check(spec_of(), partition_of(512))
    check(spec_of(), partition_of(512), summary_weight=0)
    check(spec_of(summary_channels=8), partition_of(512))


def test_check_partition__view_larger_than_the_canvas_in_any_size():
    spec = spec_of(patch_size=16, native_size=(256, 256), fixed_size=True)
    partition = PartitionConfig(
        name="p", sizes=(128, 512), teachers=("t",), batch_size=1, mosaic=("t",)
    )
    with pytest.raises(ConfigError, match="512x512"):
        check(spec, partition, summary_weight=0)
