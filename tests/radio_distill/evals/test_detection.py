"""Detection: boxes come back where they are, a good map finds them, and the metric is COCO's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

import layouts
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.detection import CATEGORIES, CocoDetection, cells_of
from radio_distill.evals.metrics.detection import BoxPrecision
from radio_distill.evals.probe_training import train

from .probe_sets import perfect_encoder, random_encoder

pytest.importorskip("faster_coco_eval")

KINDS = {1: "person", 18: "dog"}
"""Number in COCO's files, and colour of :func:`layouts.painted`."""


def scenes(root: Path, count: int = 6) -> Path:
    """COCO with two objects an image, of any kind, anywhere; those of both splits are the same."""
    categories = [{"id": number, "name": name} for number, name in KINDS.items()]
    for split in ("train", "val"):
        generator, images, objects = np.random.default_rng(0), [], []
        for number in range(1, count + 1):
            shown = np.zeros((48, 64), dtype=np.uint8)
            image = {"id": number, "file_name": f"{number:012d}.jpg", "height": 48, "width": 64}
            for first in (0, 32):
                kind = int(generator.choice(list(KINDS)))
                width, height = (int(side) for side in generator.integers(10, 26, 2))
                left = first + int(generator.integers(32 - width))
                top = int(generator.integers(48 - height))
                shown[top : top + height, left : left + width] = kind
                item = {"id": len(objects) + 1, "image_id": number, "category_id": kind}
                item |= {"bbox": [left, top, width, height], "area": width * height}
                objects.append(item | {"iscrowd": 0, "segmentation": []})
            layouts.save(root / f"{split}2017" / image["file_name"], layouts.painted(shown))
            images.append(image)
        data = {"images": images, "annotations": objects, "categories": categories}
        layouts.write_json(root / "annotations" / f"instances_{split}2017.json", data)
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def benchmark(folder: Path, **values) -> CocoDetection:
    defaults = {"crop": (64, 64), "width": 64, "images_per_step": 4, "warmup_steps": 10}
    rates = {"learning_rate": 4e-3, "gradient_clip": 10.0}
    return CocoDetection(data=str(folder), **{**defaults, **rates, **values})


def found_by(probe: CocoDetection, encoder) -> dict[str, float]:
    return {score.metric: score.value for score in probe.run(encoder)}


def test_coco_detection__a_map_that_shows_the_objects_finds_them_and_noise_does_not(coco):
    probe = benchmark(coco, steps=60, learning_rate=2e-3, quick=True)
    right, wrong = (found_by(probe, encoder()) for encoder in (perfect_encoder, random_encoder))
    assert right.keys() == wrong.keys() == {"ap", "ap50", "ap75", "ap/small", "ar"}
    assert right["ap50"] > 95
    assert right["ap"] > 75
    assert wrong["ap"] < 15


def output_of(probe: CocoDetection, objects: torch.Tensor) -> torch.Tensor:
    """What a head says that knows all boxes ``[M, 5+]``, of the crop: one cell for each."""
    cells = torch.cat(cells_of(probe.crop)).double()
    centres, sides = (cells[:, :2] + cells[:, 2:]) / 2, cells[:, 2:] - cells[:, :2]
    output = torch.full((1, len(cells), len(CATEGORIES) + 5), -20.0)
    for cell, (number, *box) in enumerate(objects[:, :5].tolist()):
        corners = torch.tensor(box).double().reshape(2, 2)
        distances = torch.stack([centres[cell] - corners[0], corners[1] - centres[cell]])
        output[0, cell, int(number)] = 20
        output[0, cell, -5:-1] = (distances / sides[cell]).flatten().float()
        output[0, cell, -1] = 20
    return output


def test_shown__are_the_true_boxes_and_those_that_were_found(coco):
    probe = benchmark(coco, crop=(96, 40))
    example = probe.test_example(probe.images()[1][0])
    objects = example.labels["objects"].clone()
    objects[:, 1:5] *= 40 / 64
    found = output_of(probe, objects)
    shown = probe.shown(example.pixels, example.labels, {"objects": found})
    assert shown.pixels.shape == (3, 30, 40), "without what fills up the crop"
    order = [shown.prediction_names.index(name) for name in shown.truth_names]
    if len(set(shown.truth_names)) == 2:
        torch.testing.assert_close(shown.prediction[order], shown.truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(shown.truth, objects[:, 1:5].float())
    assert sorted(shown.prediction_names) == sorted(shown.truth_names)


@pytest.mark.parametrize("crop", [(64, 64), (96, 40), (512, 512)])
def test_measure__the_boxes_of_the_truth_are_at_1_and_moved_ones_are_not(coco, crop):
    probe = replace(benchmark(coco), crop=crop)
    factor = min(crop[0] / 48, crop[1] / 64)
    for moved, expected in ((0, 1.0), (0.4, 0.0)):
        meters = probe.meters("cpu")
        for image in probe.images()[1]:
            example = probe.test_example(image)
            objects = example.labels["objects"].clone()
            objects[:, 1:5] *= factor
            objects[:, 1:5] += moved * (objects[:, 3:5] - objects[:, 1:3]).repeat(1, 2)
            probe.measure(meters, {"objects": output_of(probe, objects)}, example.labels)
        assert meters["precision"].compute()["ap"] == pytest.approx(expected, abs=1e-9)


def test_training_example__boxes_stay_around_what_they_show(coco):
    probe, seen = benchmark(coco, scale=(0.5, 2.0)), 0
    for number, image in enumerate(8 * probe.images()[0]):
        example = probe.training_example(image, np.random.default_rng(number))
        assert example.pixels.shape == (3, 64, 64)
        assert example.labels["objects"].shape == (2, 5)
        for kind, *box in example.labels["objects"].tolist():
            if kind < 0:
                continue
            left, top, right, bottom = (round(side) for side in box)
            colour = layouts.painted(np.array([[{0: 1, 16: 18}[kind]]]))[0, 0].astype(int)
            shown = np.abs(example.pixels.permute(1, 2, 0).numpy() - colour).max(axis=2) < 40
            inside = np.zeros_like(shown)
            inside[top:bottom, left:right] = True
            if inside.sum() > 40:
                seen += 1
                assert shown[inside].mean() > 0.7
                around = np.zeros_like(shown)
                around[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = True
                assert shown[around & ~inside].mean() < 0.4
    assert seen > 40


def test_images__crowds_are_no_training_targets_and_images_without_objects_are_left_out(tmp_path):
    probe = benchmark(layouts.coco(tmp_path, train=2))
    (first, _), _ = probe.images()
    assert first.objects[:, 6].tolist() == [0, 1]
    assert probe.training_example(first, None).labels["objects"][:, 0].tolist() == [0, -1]
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    assert probe.images()[0] == []
    path.write_text(path.read_text().replace('"dog"', '"wolf"'))
    with pytest.raises(DataError, match="'wolf', which is no category"):
        probe.images()


def test_images__of_another_size_than_their_boxes_are_named(tmp_path):
    probe = benchmark(layouts.coco(tmp_path))
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"width": ', '"width": 1'))
    with pytest.raises(DataError, match=r"000000000001\.jpg is .* px, its boxes are of"):
        probe.test_example(probe.images()[1][0])


def test_heads__a_width_without_groups_is_one_line():
    with pytest.raises(ConfigError, match="no multiple of 64"):
        benchmark(Path(), width=96).heads([8])


def trained_output(probe: CocoDetection) -> torch.Tensor:
    """Train a little; what the heads say of a test image."""
    train_images, (image, *_) = probe.images()
    heads = train(probe, perfect_encoder(), train_images, lambda done: None)
    return probe.predict(perfect_encoder(), heads, probe.test_example(image).pixels)["objects"]


def run_on_rank(rank: int, coco: Path):
    probe = benchmark(coco, steps=2, warmup_steps=0, learning_rate=1e-3, images_per_step=3)
    output = trained_output(probe)
    metric = BoxPrecision()
    for item in guessed()[rank::2]:
        metric.update(*item)
    metric.all_reduce()
    return output, metric.compute()


@pytest.mark.distributed
def test_coco_detection__two_processes_equal_one(coco, two_processes):
    """Three images a step: two on one process, one on the other; the test's are shared, too."""
    answers = two_processes(run_on_rank, coco)
    probe = benchmark(coco, steps=2, warmup_steps=0, learning_rate=1e-3, images_per_step=3)
    output = trained_output(probe)
    metric = BoxPrecision()
    for item in guessed():
        metric.update(*item)
    for found, values in answers:
        assert values == metric.compute()
        torch.testing.assert_close(found, output, rtol=1e-3, atol=1e-3)  # a step changes it by 1


def guessed() -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Six images of five objects of one class, each with six guesses, some of one score."""
    generator, images = torch.Generator().manual_seed(0), []
    for image in range(6):
        corner, side = (torch.rand(5, 2, generator=generator) for _ in range(2))
        boxes = torch.cat([200 * corner, 200 * corner + 20 + 80 * side], dim=1)
        guesses = boxes[[0, 1, 2, 3, 4, 4]] + 12 * torch.rand(6, 4, generator=generator)
        scores = (10 * torch.rand(6, 1, generator=generator)).round() / 10
        found = torch.cat([torch.zeros(6, 1), guesses, scores], dim=1)
        truth = torch.cat([torch.zeros(5, 1), boxes, torch.full((5, 1), 2000.0)], dim=1)
        images.append((image, found, torch.cat([truth, torch.zeros(5, 1)], dim=1)))
    return images


def plain_precision(found: torch.Tensor, truth: torch.Tensor, bound: float) -> float:
    """Average precision of one class; ``[N, 6]`` and ``[M, 5]`` begin with the image."""
    found = found[found[:, 5].argsort(descending=True, stable=True)]
    taken, right = set(), []
    for image, *box, _ in found.tolist():
        best, at = bound, None
        for index, (other, *target) in enumerate(truth.tolist()):
            iou = box_iou(torch.tensor([box]), torch.tensor([target])).item()
            if other == image and index not in taken and iou >= best:
                best, at = iou, index
        right.append(at is not None)
        taken.add(at)
    hits = np.cumsum(right)
    recall, precision = hits / len(truth), hits / np.arange(1, len(right) + 1)
    wanted = np.linspace(0, 1, 101)
    return float(np.mean([max(precision[recall >= it], default=0.0) for it in wanted]))


def test_box_precision__equals_a_plain_computation_and_sees_no_order():
    metric, other, images = BoxPrecision(), BoxPrecision(), guessed()
    for item, last in zip(images, reversed(images), strict=True):
        metric.update(*item)
        other.update(*last)
    values = metric.compute()
    assert values == other.compute()
    found, truth = (
        torch.cat([F.pad(it[n][:, 1:], (1, 0), value=it[0]) for it in images]) for n in (1, 2)
    )
    bounds = np.linspace(0.5, 0.95, 10)
    plain = [plain_precision(found, truth[:, :5], bound) for bound in bounds]
    assert values["ap"] == pytest.approx(np.mean(plain), abs=1e-6)
    assert values["ap50"] == pytest.approx(plain[0], abs=1e-6)
    assert 0.2 < values["ap"] < values["ap50"] < 1
    assert values.keys() == {"ap", "ap50", "ap75", "ap/medium", "ar"}


def test_box_precision__a_crowd_is_neither_right_nor_wrong():
    box = [10.0, 10.0, 40.0, 40.0]
    truth = torch.tensor([[0, *box, 900, 0], [0, 60, 60, 100, 100, 1600, 1]])
    in_crowd = torch.tensor([[0, 62, 62, 80, 80, 0.9], [0, *box, 0.5]])
    metric = BoxPrecision()
    metric.update(7, in_crowd, truth)
    assert metric.compute()["ap"] == 1.0
    with pytest.raises(DataError, match="shows an object"):
        BoxPrecision().compute()


def test_real__boxes_of_coco(real):
    probe = CocoDetection(data=str(real("evaluation/coco51")))
    train, test = probe.images()
    assert (len(train), len(test)) == (26, 25)
    meters = probe.meters("cpu")
    for image in test:
        example = probe.test_example(image)
        objects = example.labels["objects"].clone()
        objects[:, 1:5] *= 512 / max(image.size)
        probe.measure(meters, {"objects": output_of(probe, objects)}, example.labels)
    assert meters["precision"].compute()["ap"] > 0.95  # neighbours of one class are one box
