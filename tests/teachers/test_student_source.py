"""A student as a teacher: the same features, and what it says of itself."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import radio_distill
from radio_distill.config import TeacherConfig
from radio_distill.errors import CheckpointError, ConfigError, UnknownNameError, WeightsError
from radio_distill.export.folded import folded
from radio_distill.export.timm import Timm
from radio_distill.export.transformers import Transformers
from radio_distill.export.write import export
from radio_distill.train import checkpoint
from radio_distill.train.checkpointer import save
from teachers import build_module, build_teacher, teacher_spec
from teachers.options import chosen
from teachers.sources import student
from teachers.sources.student import described

PIXELS = ("student.mean", "student.std")


def teacher(path, **options):
    return build_teacher(
        "mine", TeacherConfig(preset="student", weights=str(path), options=options)
    )


def check_equal(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_run__is_its_backbone(write_run):
    run = write_run()
    model, mine = radio_distill.load(run), teacher(run)
    spec = mine.spec
    assert (spec.channels, spec.summary_channels, spec.patch_size) == (64, 128, 16)
    assert (spec.native_size, spec.max_size, spec.fixed_size) == ((96, 96), 256, False)
    assert spec.licence == "student of: clip (mit), sam (apache-2.0), dino (dinov3-license)"
    for size in ((64, 64), (96, 64)):
        pixels = torch.rand(2, 3, *size)
        output = model(pixels)
        check_equal(mine.encode(pixels), (output.summary, output.features))


@torch.no_grad()
def test_run__a_head_speaks_in_its_teacher_s_space(write_run):
    run = write_run(head_layers=1)
    model, pixels = radio_distill.load(run), torch.rand(1, 3, 64, 64)
    output = model(pixels, ("dino", "sam")).heads
    dino, sam = teacher(run, head="dino"), teacher(run, head="sam")
    assert (dino.spec.channels, dino.spec.summary_channels) == (4, 4)
    assert (sam.spec.channels, sam.spec.summary_channels) == (8, None)
    check_equal(dino.encode(pixels), output["dino"])
    assert sam.encode(pixels).summary is None
    torch.testing.assert_close(sam.encode(pixels).spatial, output["sam"].spatial)


def test_run__the_plan_sees_the_same_tensors_without_weights(write_run):
    config = TeacherConfig(preset="student", weights=str(write_run()), options={"head": "clip"})
    planned, built = build_module(config), build_teacher("mine", config)
    shapes = {key: value.shape for key, value in built.tower.state_dict().items()}
    assert {key: value.shape for key, value in planned.state_dict().items()} == shapes
    spec = teacher_spec("mine", config)
    assert (spec.channels, spec.summary_channels, spec.weights_hash) == (12, 5, "")


def with_own_pixels(run):
    """Add a checkpoint whose mean and std are no architecture's; returns the run."""
    old = checkpoint.find(run / "stage1")
    tensors = old.tensors("student")
    tensors["student.mean"] = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    tensors["student.std"] = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    parts = {"student": tensors, "statistics": old.tensors("statistics")}
    folder = checkpoint.folder_of(old.folder.parent, 8)
    save(replace(old, folder=folder, step=8), parts, 1)
    return run


BODIES = {
    "vit": {"registers": 3, "spectral_reparametrization": True},
    "timm": {"body": "timm", "architecture": "test_convnext", "patch_size": 32, "registers": 0},
}


@pytest.mark.parametrize("is_export", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_describing__tells_what_the_loaded_one_is_from_its_mean_and_std_alone(
    write_run, tmp_path, body, is_export
):
    folder = run = with_own_pixels(write_run(**BODIES[body]))
    if is_export:
        folder = tmp_path / "export"
        format = Transformers() if body == "vit" else Timm()
        export(folded(checkpoint.find(run / "stage1")), folder, format)
    weights = {"preset": "student", "weights": str(folder)}
    configs = [
        TeacherConfig(**weights, options={"head": head} if head else {})
        for head in ("", "dino", "sam")
    ]
    loaded = [
        described(chosen(config), radio_distill.load(folder, [*config.options.values()]))
        for config in configs
    ]
    for file in folder.rglob("*.safetensors"):  # and nothing else is there to be read
        kept = {name: value for name, value in load_file(file).items() if name in PIXELS}
        save_file(kept, file)
    with pytest.raises((CheckpointError, WeightsError)):
        radio_distill.load(folder)
    for config, preset in zip(configs, loaded, strict=True):
        assert preset.mean == pytest.approx((0.1, 0.2, 0.3))
        assert student.complete(chosen(config), config.weights) == preset


def test_run__its_hash_is_that_of_its_weights(write_run):
    first, again = teacher(write_run()), teacher(write_run())
    other = teacher(write_run("another"))
    assert first.spec.weights_hash == again.spec.weights_hash != other.spec.weights_hash


@torch.no_grad()
def test_run__of_windows_takes_sizes_that_the_patch_divides(write_run):
    mine = teacher(write_run(window_size=2, global_blocks=1))
    assert mine.encode(torch.rand(1, 3, 48, 80)).spatial.shape == (1, 64, 3, 5)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["student", "radio"])
def test_export__is_the_run(write_run, tmp_path, preset):
    """As a student, and as any RADIO: with the mean and std that its body was trained with."""
    run, folder = write_run(), tmp_path / "export"
    export(folded(checkpoint.find(run / "stage1")), folder, Transformers())
    mine = build_teacher("mine", TeacherConfig(preset=preset, weights=str(folder)))
    assert mine.spec.native_size == (96, 96)
    pixels = torch.rand(1, 3, 64, 96)
    check_equal(mine.encode(pixels), teacher(run).encode(pixels))


@torch.no_grad()
def test_timm_export__is_the_run(write_run, tmp_path):
    run, folder = write_run(), tmp_path / "export"
    export(folded(checkpoint.find(run / "stage1")), folder, Timm())
    mine = build_teacher("mine", TeacherConfig(preset="timm", weights=str(folder)))
    pixels = torch.rand(1, 3, 64, 96)
    expected = teacher(run).encode(pixels)
    torch.testing.assert_close(mine.encode(pixels).spatial, expected.spatial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(  # timm has one class token
        mine.encode(pixels).summary, expected.summary[:, :64], rtol=1e-5, atol=1e-5
    )


def test_student__needs_weights():
    for options in ({}, {"head": "clip"}, {"adaptor": "clip"}):  # the last as in earlier recipes
        with pytest.raises(ConfigError, match=r"teachers\.mine: `weights`"):
            build_teacher("mine", TeacherConfig(preset="student", options=options))


def test_student__bad_input_is_named(write_run, tmp_path):
    run = write_run()
    with pytest.raises(UnknownNameError, match=r"teachers\.mine: .*'clipp'.*'clip'"):
        teacher(run, head="clipp")
    with pytest.raises(ConfigError, match=r"'hed'.*'head'"):
        teacher(run, hed="clip")
    with pytest.raises(WeightsError, match=r"teachers\.mine: .*absent"):
        teacher(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no run"):
        teacher(tmp_path)


def test_encode__normalised_pixels_are_not_taken_for_wrong_ones(write_run):
    """White is 2.6 in the units of a student that was normalised with a small deviation."""
    options = {"std": [0.1, 0.1, 0.1]}
    config = TeacherConfig(preset="student", weights=str(write_run()), options=options)
    teacher = build_teacher("former", config)
    found = teacher.encode(torch.ones(1, 3, *teacher.spec.native_size))
    assert torch.isfinite(found.spatial).all()
