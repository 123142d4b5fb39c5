"""What every teacher must do, checked on the random tiny variant of each family."""

from functools import cache

import pytest
import torch

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher
from teachers import TEACHERS, build_module, build_teacher, teacher_spec
from teachers.presets import PRESETS

TINY = [name for name in TEACHERS.names() if name.startswith("tiny_")]
ANY_SIZE = [name for name in TINY if not PRESETS[name].fixed_size]


@cache
def tiny(name):
    return build_teacher(name, TeacherConfig(preset=name))


def images(spec, rows=4, columns=4, batch=3):
    size = spec.native_size
    if not spec.fixed_size:
        size = (rows * spec.patch_size, columns * spec.patch_size)
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def centre(teacher, pixels, row, column):
    """The cell whose features change most when an object appears at cell (row, column)."""
    patch = teacher.spec.patch_size
    changed = pixels.clone()
    rows = slice(row * patch, (row + 1) * patch)
    columns = slice(column * patch, (column + 1) * patch)
    checks = torch.arange(patch) // 2 % 2
    changed[:, :, rows, columns] = (checks[:, None] ^ checks[None]).float()
    difference = teacher.encode(changed).spatial - teacher.encode(pixels).spatial
    index = int(difference.norm(dim=1).mean(0).argmax())  # over the images
    return divmod(index, difference.shape[-1])


@pytest.mark.parametrize("name", TINY)
def test_encode__gives_the_shapes_that_the_spec_promises(name):
    teacher = tiny(name)
    spec = teacher.spec
    pixels = images(spec)
    summary, spatial = teacher.encode(pixels)
    assert isinstance(teacher, Teacher)
    assert spatial.shape == (3, spec.channels, *spec.grid(pixels.shape[-2:]))
    assert spatial.is_contiguous(memory_format=torch.channels_last)
    assert spatial.dtype == torch.float32
    assert torch.isfinite(spatial).all()
    if spec.summary_channels is None:
        assert summary is None
    else:
        assert summary.shape == (3, spec.summary_channels)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_encode__takes_any_size_that_the_patch_divides(name):
    teacher = tiny(name)
    for rows, columns in ((3, 5), (7, 2)):
        pixels = images(teacher.spec, rows, columns, batch=1)
        assert teacher.encode(pixels).spatial.shape[-2:] == (rows, columns)


@pytest.mark.parametrize("name", TINY)
def test_encode__carries_no_gradient_and_nothing_of_it_can_train(name):
    teacher = tiny(name)
    summary, spatial = teacher.encode(images(teacher.spec).requires_grad_(True))
    assert not spatial.requires_grad
    assert not spatial.is_inference()
    assert summary is None or not summary.requires_grad
    assert not any(value.requires_grad for value in teacher.tower.parameters())
    assert not any(module.training for module in teacher.tower.modules())
    assert not isinstance(teacher, torch.nn.Module)


@pytest.mark.parametrize("name", TINY)
def test_encode__micro_batches_equal_the_whole(name):
    whole = tiny(name)
    parts = build_teacher(name, TeacherConfig(preset=name, micro_batch=2))
    pixels = images(whole.spec, batch=5)
    (one, one_map), (two, two_map) = whole.encode(pixels), parts.encode(pixels)
    torch.testing.assert_close(one_map, two_map, rtol=1e-5, atol=1e-5)
    if one is not None:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_encode__a_moved_object_moves_in_the_map(name):
    """No prefix token in the map, rows and columns not swapped: the cell follows the object."""
    teacher = tiny(name)
    pixels = images(teacher.spec, 4, 6, batch=8)
    reach = 1 if name == "tiny_sam" else 0  # its neck convolves 3x3 cells
    for row, column in ((0, 0), (1, 0), (1, 3), (3, 1)):
        found = centre(teacher, pixels, row, column)
        assert abs(found[0] - row) <= reach
        assert abs(found[1] - column) <= reach


@pytest.mark.parametrize("name", TINY)
def test_encode__normalises_inside(name):
    teacher = tiny(name)
    spec = teacher.spec
    pixels = images(spec, batch=1)
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    with torch.no_grad():
        _, direct = teacher.tower((pixels - mean) / std)
    torch.testing.assert_close(teacher.encode(pixels).spatial, direct)


LAYERED = sorted(set(TINY) - {"tiny_cnn", "tiny_sam"})
WITHOUT_CLASS_TOKEN = {"tiny_siglip", "tiny_vit_pooled", "tiny_samvit"}
PROJECTIONS = {
    "tiny_clip": lambda tower, token: tower.model.visual_projection(token),
    "tiny_open_clip": lambda tower, token: token @ tower.visual.proj,
}
"""What makes a CLIP's summary of its class token."""


@pytest.mark.parametrize("name", LAYERED)
def test_layers__the_last_is_the_output_and_an_inner_one_that_of_a_model_cut_there(name):
    """So the final norm is applied, class tokens are told from others, and the layer is meant."""
    teacher, pixels = tiny(name), images(tiny(name).spec)
    inner, last = teacher.layers(pixels, 2)
    whole = teacher.encode(pixels)
    assert torch.equal(last.spatial, whole.spatial)
    assert not torch.equal(inner.spatial, last.spatial)
    cut = build_teacher(name, TeacherConfig(preset=name, micro_batch=2))
    (blocks,) = (
        module
        for key, module in cut.tower.named_modules()
        if key.rpartition(".")[2] in ("blocks", "layers", "layer", "resblocks")
        and isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
    )
    del blocks[len(blocks) // 2 :]
    features = cut.encode(pixels)
    torch.testing.assert_close(inner.spatial, features.spatial)
    assert len(cut.layers(pixels, 4)) == 4
    if name in WITHOUT_CLASS_TOKEN:
        assert inner.summary is last.summary is None
    else:
        project = PROJECTIONS.get(name, lambda tower, token: token)
        torch.testing.assert_close(project(teacher.tower, last.summary), whole.summary)
        torch.testing.assert_close(project(teacher.tower, inner.summary), features.summary)


@pytest.mark.parametrize("name", ["tiny_cnn", "tiny_sam"])
def test_layers__a_model_whose_layers_are_no_such_maps_is_named(name):
    with pytest.raises(ConfigError, match=f"teacher '{name}' has no inner layers"):
        tiny(name).layers(images(tiny(name).spec), 4)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_encode__names_the_nearest_sizes_where_the_patch_does_not_divide(name):
    patch = tiny(name).spec.patch_size
    low, high = 3 * patch, 4 * patch
    with pytest.raises(ConfigError, match=rf"{low}x{low}.*{low}x{high}"):
        tiny(name).encode(torch.zeros(1, 3, low, low + 1))


@pytest.mark.parametrize("name", sorted(set(TINY) - set(ANY_SIZE)))
def test_encode__a_fixed_canvas_takes_no_other_size(name):
    with pytest.raises(ConfigError, match="64x64"):
        tiny(name).encode(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("name", TINY)
def test_encode__in_bfloat16_stays_near_float32(name):
    reduced = build_teacher(name, TeacherConfig(preset=name, dtype="bfloat16"))
    pixels = images(reduced.spec, batch=2)
    exact, rough = tiny(name).encode(pixels).spatial, reduced.encode(pixels).spatial
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", TINY)
def test_build_teacher__is_the_same_every_time_and_leaves_the_generator_alone(name):
    state = torch.random.get_rng_state()
    again = build_teacher(name, TeacherConfig(preset=name))
    assert torch.equal(torch.random.get_rng_state(), state)
    pixels = images(again.spec, batch=1)
    assert torch.equal(again.encode(pixels).spatial, tiny(name).encode(pixels).spatial)
    assert again.spec.weights_hash == ""


@pytest.mark.parametrize("name", TINY)
def test_build_module__has_the_same_tensors_on_the_meta_device(name):
    planned = build_module(TeacherConfig(preset=name))
    shapes = {key: value.shape for key, value in tiny(name).tower.state_dict().items()}
    assert {key: value.shape for key, value in planned.state_dict().items()} == shapes
    assert all(value.is_meta for value in planned.parameters())
    assert teacher_spec(name, TeacherConfig(preset=name)) == tiny(name).spec
