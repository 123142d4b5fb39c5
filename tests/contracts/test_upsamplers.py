"""What every upsampler must do, with real (tiny, random) teachers; fitted ones have a file each."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from radio_distill.config import TeacherConfig, UpsamplerConfig
from radio_distill.errors import ConfigError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import Upsampler
from radio_distill.types import TeacherSpec
from teachers import build_teacher
from teachers.base import FrozenTeacher
from upsamplers import UPSAMPLERS, build_upsampler, is_fitted
from upsamplers.fitted import UpsamplerModel, save_model
from upsamplers.fitted_files import FittedHeader
from upsamplers.networks import build_network

EXTERNAL = {"anyup", "jafar", "loftup", "naf", "uplift_published"}
"""They need a clone of another project; tests/upsamplers/test_external.py has stand-ins."""
NAMES = [name for name in UPSAMPLERS.names() if name not in EXTERNAL]
FREE = [name for name in NAMES if not is_fitted(name)]


@cache
def tiny(name):
    return build_teacher(name, TeacherConfig(preset=name))


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Return an upsampler for a teacher, a fitted one from a file as a fit begins with it."""
    folder = tmp_path_factory.mktemp("fitted")

    @cache
    def file_for(name, factor, teacher):
        spec, size = teacher.spec, teacher.spec.native_size
        torch.manual_seed(0)
        network = build_network(name, spec.channels, factor, {})
        moments = Moments(spec.channels)
        moments.update(teacher.encode(torch.rand(8, 3, *size)).spatial)
        kind = "phi_s" if spec.channels > 3 else "global_standardise"
        normalizer = NORMALIZERS.get(kind)().fit(moments)
        model = UpsamplerModel(network, normalizer, spec.channels, spec.grid(size))
        header = FittedHeader(
            name, spec.name, spec.weights_hash, spec.channels, factor, size, normalizer=kind
        )
        path = folder / f"{spec.name}-{name}-{factor}.safetensors"
        save_model(path, model, header)
        return str(path)

    def make(name, factor, teacher, **values):
        if is_fitted(name):
            values["weights"] = {teacher.spec.name: file_for(name, factor, teacher)}
            values["options"] = {"any_size": True}
        config = UpsamplerConfig(name=name, factor=factor, **values)
        return build_upsampler(config, {teacher.spec.name: teacher})

    return make


def tolerance(name):
    """Networks run in bfloat16."""
    return {"rtol": 0.02, "atol": 0.02} if is_fitted(name) else {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("teacher", ["tiny_vit", "tiny_dinov2", "tiny_cnn"])
@pytest.mark.parametrize("name", NAMES)
def test_upsampler__gives_exactly_the_grid_from_any_image(build, name, teacher):
    teacher = tiny(teacher)
    upsampler = build(name, 3, teacher)
    assert isinstance(upsampler, Upsampler)
    assert upsampler.factor == 3
    for size in ((50, 70), (101, 64)):
        summary, spatial = upsampler(teacher, torch.rand(2, 3, *size), (6, 9))
        assert spatial.shape == (2, teacher.spec.channels, 6, 9)
        assert summary.shape == (2, teacher.spec.summary_channels)
        assert spatial.is_contiguous(memory_format=torch.channels_last)
        assert not spatial.requires_grad


@pytest.mark.parametrize("name", FREE)
def test_upsampler__without_parameters_at_factor_one_is_the_teacher(build, name):
    teacher, pixels = tiny("tiny_vit"), torch.rand(2, 3, 32, 48)
    found, expected = build(name, 1, teacher)(teacher, pixels, (4, 6)), teacher.encode(pixels)
    torch.testing.assert_close(found.spatial, expected.spatial)
    torch.testing.assert_close(found.summary, expected.summary)


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__summary_is_that_of_the_whole_image(build, name):
    teacher, pixels = tiny("tiny_vit"), torch.rand(2, 3, 48, 48)
    small = torch.nn.functional.interpolate(pixels, (24, 24), mode="bicubic", antialias=True)
    small = small.clamp(0, 1)
    summary = build(name, 2, teacher)(teacher, pixels, (6, 6)).summary
    torch.testing.assert_close(summary, teacher.encode(small).summary, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__images_do_not_mix_and_micro_batches_change_nothing(build, name):
    teacher, pixels = tiny("tiny_vit"), torch.rand(3, 3, 64, 64)
    whole = build(name, 2, teacher)(teacher, pixels, (8, 8))
    parts = build(name, 2, teacher, micro_batch=4)(teacher, pixels, (8, 8))
    alone = build(name, 2, teacher)(teacher, pixels[1:2], (8, 8))
    torch.testing.assert_close(parts.spatial, whole.spatial, **tolerance(name))
    torch.testing.assert_close(alone.spatial[0], whole.spatial[1], **tolerance(name))


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__an_object_moves_by_its_cells(build, name):
    """The centre of what changes follows an object of one low-resolution cell, on both axes."""
    teacher = tiny("tiny_vit")
    upsampler = build(name, 2, teacher)
    grey = torch.full((1, 3, 64, 96), 0.5)
    blank = upsampler(teacher, grey, (8, 12)).spatial
    for row, column in ((0, 0), (4, 8), (6, 2)):
        image = grey.clone()
        rows, columns = slice(8 * row, 8 * row + 16), slice(8 * column, 8 * column + 16)
        stripes = (torch.arange(16) // 4 % 2).float()
        image[:, :, rows, columns] = stripes[:, None]
        change = (upsampler(teacher, image, (8, 12)).spatial - blank).norm(dim=1)[0]
        change = torch.where(change > change.max() / 2, change, 0)  # attention reaches everywhere
        found = [
            float((change.sum(1 - axis) * torch.arange(change.shape[axis])).sum() / change.sum())
            for axis in (0, 1)
        ]
        assert found == pytest.approx([row + 0.5, column + 0.5], abs=1), (row, column)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lift"])
def test_upsampler__a_constant_image_gives_a_constant_map_of_a_local_teacher(build, name):
    def average(pixels):
        return pixels.mean((2, 3)), torch.nn.functional.avg_pool2d(pixels, 8)

    spec = TeacherSpec("toy", 3, 3, 8, (32, 32), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    teacher = FrozenTeacher(average, spec)
    found = build(name, 3, teacher)(teacher, torch.full((1, 3, 50, 60), 0.3), (6, 9))
    expected = torch.full((1, 3, 6, 9), 0.3)
    if name == "featup":  # its last convolution starts from random weights
        expected = found.spatial[:, :, :1, :1].expand(-1, -1, 6, 9)
    torch.testing.assert_close(found.spatial, expected, **tolerance(name))


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__a_grid_that_does_not_divide_names_the_nearest(build, name):
    teacher = tiny("tiny_vit")
    message = "grid 8x10 does not divide by upsampler.factor 3; nearest 9x9"
    with pytest.raises(ConfigError, match=message):
        build(name, 3, teacher)(teacher, torch.rand(1, 3, 64, 80), (8, 10))


@pytest.mark.parametrize("name", NAMES)
def test_upsampler__a_teacher_that_cannot_take_the_size_says_so_with_the_grid(build, name):
    teacher, pixels = tiny("tiny_sam"), torch.rand(1, 3, 64, 64)
    upsampler = build(name, 2, teacher)
    if name == "native":  # shows it 128 px, which SAM of one size never takes
        with pytest.raises(ConfigError, match=r"'tiny_sam' 128x128.*64x64"):
            upsampler(teacher, pixels, (8, 8))
        return
    with pytest.raises(ConfigError, match=r"4x4 .*'tiny_sam'.*32x32 .*64x64"):
        upsampler(teacher, pixels, (4, 4))
    assert upsampler(teacher, pixels, (8, 8)).spatial.shape[-2:] == (8, 8)


@pytest.mark.parametrize("name", sorted(EXTERNAL))
def test_upsampler__of_another_project_says_where_to_get_it(name):
    teacher = SimpleNamespace(spec=tiny("tiny_vit").spec)
    with pytest.raises(ConfigError, match=r"https://github\.com/") as error:
        build_upsampler(UpsamplerConfig(name=name, factor=2), {"tiny_vit": teacher})
    assert "\n" not in str(error.value)
