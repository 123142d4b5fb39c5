"""What each encoder receives in a real step, against the photographs in the shards."""

import tarfile
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.config import Facts
from radio_distill.data.images import decode_image
from radio_distill.stage import resolve_stage
from radio_distill.system.distributed import World
from radio_distill.train.health import NonFiniteGuard, agree
from stages.build import build_distillation
from stages.recipes import load_recipe
from teachers import teacher_spec

STUDENT = 32
ROUNDING = 2.01 / 255
"""By which two resamplers of one filter differ."""
PARTITION = {
    "name": "low",
    "size": STUDENT,
    "teachers": ["vit", "cnn", "sam"],
    "teacher_sizes": {"vit": 80, "cnn": 96},
    "batch_size": 4,
}


class Recorder:
    """A teacher that keeps what it is shown."""

    def __init__(self, teacher):
        self.spec, self._teacher, self.pixels = teacher.spec, teacher, []

    def encode(self, pixels):
        self.pixels.append(pixels)
        return self._teacher.encode(pixels)


def step_of(recipe_file: Path, tmp_path: Path, partition: dict, *fields: str):
    """Run one step; returns its micro-batches and what each encoder saw of them."""
    overrides = [f"stages.stage1.partitions=[{partition}]", "normalizer.name=none", *fields]
    recipe = load_recipe(str(recipe_file), overrides)
    recipe = replace(recipe, engine=replace(recipe.engine, zero_stage=0))
    specs = {name: teacher_spec(name, config) for name, config in recipe.teachers.items()}
    stage = resolve_stage(recipe, "stage1", specs, Facts(), folder=tmp_path / "run")
    run, _ = build_distillation(stage, World(), torch.device("cpu"), None)
    teachers = {name: Recorder(teacher) for name, teacher in run.targets.teachers.items()}
    run.targets.teachers = teachers
    students = []
    body = run.engine.model.get_submodule("student")
    body.register_forward_pre_hook(lambda module, inputs: students.append(inputs[0]))
    batches = next(run.source.batches(0))
    run.forward_backward(0, batches, NonFiniteGuard(), agree)
    seen = {name: teacher.pixels for name, teacher in teachers.items()}
    return batches, {**seen, "student": students}


def photographs(recipe_file: Path) -> dict[str, Image.Image]:
    """Every image of the shards, by its key."""
    found = {}
    for shard in load_recipe(str(recipe_file)).data.shards:
        for path in Path(shard).glob("*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()
                    found[f"{path.name}:{Path(member.name).stem}"] = decode_image(data)
    return found


def view_of(batch, row: int, images: dict[str, Image.Image]) -> Image.Image:
    """Cut an image's view out of its photograph."""
    shard, _, key = batch.keys[row].rpartition(":")
    image = images[f"{Path(shard).name}:{Path(key).stem}"]
    origin = batch.origins[row]
    assert (image.height, image.width) == origin.source_size
    array = np.asarray(image)
    array = array[origin.top : origin.top + origin.height, origin.left : origin.left + origin.width]
    return Image.fromarray(array[:, ::-1] if origin.flipped else array)


def rendered(view: Image.Image, size: int, box=None) -> torch.Tensor:
    if box is None:  # across, then down, as torch does; Pillow chooses the order by the work
        view = view.resize((size, view.height), Image.Resampling.BICUBIC)
    pixels = np.array(view.resize((size, size), Image.Resampling.BICUBIC, box))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def test_step__every_encoder_sees_the_photograph_at_its_own_size(recipe_file, tmp_path):
    (batch,), seen = step_of(recipe_file, tmp_path, PARTITION)
    images = photographs(recipe_file)
    sizes = {name: pixels[0].shape[-1] for name, pixels in seen.items()}
    assert sizes["student"] == STUDENT
    assert sizes["vit"] == 80
    assert len(set(sizes.values())) == 4, sizes
    for name, (pixels,) in seen.items():
        for row, found in enumerate(pixels):
            torch.testing.assert_close(
                found, rendered(view_of(batch, row, images), sizes[name]), rtol=0, atol=ROUNDING
            )


def test_step__an_upsampled_teacher_sees_the_photographs_own_pixels(recipe_file, tmp_path):
    """Tiles are cut from a rendering as large as all of them, not from the student's view."""
    partition = {
        **PARTITION,
        "teachers": ["vit"],
        "teacher_sizes": {"vit": 48},
        "upsample": ["vit"],
    }
    fields = ["stages.stage1.upsampler.name=tile", "stages.stage1.upsampler.factor=2"]
    (batch,), seen = step_of(recipe_file, tmp_path, partition, *fields)
    images = photographs(recipe_file)
    (encoded,) = seen["vit"]  # the whole images, then four tiles of each
    tiles = encoded[len(batch.keys) :].unflatten(0, (-1, 4))
    for row, found in enumerate(tiles):
        whole = rendered(view_of(batch, row, images), 96)
        expected = [whole[:, y : y + 48, x : x + 48] for y, x in product((0, 48), (0, 48))]
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shift", [1, 2])
def test_step__shifted_crops_lie_at_whole_patches_of_the_photograph(recipe_file, tmp_path, shift):
    partition = {**PARTITION, "size": 64}
    (batch,), seen = step_of(
        recipe_file, tmp_path, partition, f"augmentation.shift={shift}", "loss.mesa=0"
    )
    images = photographs(recipe_file)
    corners = defaultdict(set)
    for name, (pixels,) in seen.items():
        for row, found in enumerate(pixels):
            view = view_of(batch, row, images)
            matches = []
            for place in product(range(shift + 1), repeat=2):
                top, left = (
                    offset / (4 + shift) * side
                    for offset, side in zip(place, (view.height, view.width), strict=True)
                )
                height, width = (4 / (4 + shift) * side for side in (view.height, view.width))
                box = (left, top, min(left + width, view.width), min(top + height, view.height))
                expected = rendered(view, found.shape[-1], box)
                if (found - expected).abs().max() <= 1.5 / 255:
                    matches.append(place)
            assert len(matches) == 1, (name, row)
            corners[row] |= set(matches)
    assert max(map(len, corners.values())) > 1, "encoders have crops of their own"
