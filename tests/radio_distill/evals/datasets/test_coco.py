"""COCO's files: objects, masks, and the splits for retrieval."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.datasets.captions import CocoRetrieval, Flickr30k
from radio_distill.evals.datasets.coco import Coco


def test_coco__boxes_and_masks_cover_what_the_picture_shows(tmp_path):
    pytest.importorskip("faster_coco_eval")
    data = Coco(layouts.coco(tmp_path)).objects("val")
    assert data.categories == {1: "person", 18: "dog"}
    assert len(data.objects) == 2 * len(data.images) == 4
    for item in data.objects:
        pixels = torch.from_numpy(np.array(Image.open(item.image.path)).astype(int))
        colour = layouts.painted(np.array([[(1, 18)[item.category]]]))[0, 0]
        shown = ((pixels - torch.from_numpy(colour.astype(int))).abs() < 24).all(dim=2)
        assert item.mask().shape == (item.image.height, item.image.width)
        assert item.mask().sum() == item.area
        assert (item.mask() & shown).sum() > 0.9 * item.area
        left, top, width, height = item.box
        assert item.mask()[top : top + height, left : left + width].sum() == item.area
        assert item.crowd == (item.category == 1)


def test_coco__check_counts_every_file(tmp_path):
    layouts.coco(tmp_path)
    assert Coco(tmp_path).check().counts == {"train": 3, "val": 2, "instances": 4}
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-9])
    assert "train: " + str(path) in Coco(tmp_path).check().problems["train"]
    (tmp_path / "val2017" / "000000000001.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 names .*\(first: 000000000001\.jpg\)"):
        Coco(tmp_path).objects("val")


def test_coco__annotations_of_pictures_that_are_not_listed(tmp_path):
    path = layouts.coco(tmp_path) / "annotations" / "instances_val2017.json"
    data = json.loads(path.read_text())
    lost = data | {"images": data["images"][:1]}
    short = data | {"annotations": [item | {"bbox": [1]} for item in data["annotations"]]}
    for damaged in (lost, short):
        path.write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="no whole instances file"):
            Coco(tmp_path).objects("val")


def test_retrieval__every_form_of_a_split_says_the_same(tmp_path):
    wanted = Flickr30k(layouts.flickr30k(tmp_path)).test()
    assert wanted.image_of == [number for number in range(4) for _ in range(5)]
    assert wanted.texts[6] == "1, an image, said in 1.jpg, words"
    items = [
        {
            "filename": image.name,
            "split": "test",
            "sentences": [
                {"raw": text} for text, of in zip(wanted.texts, wanted.image_of, strict=True)
                if of == number
            ],
        }
        for number, image in enumerate(wanted.images)
    ]  # fmt: skip
    items.insert(1, {"filename": "other.jpg", "split": "train", "sentences": [{"raw": "no"}]})
    items.append(items[0] | {"sentences": []})  # listed twice
    (tmp_path / "flickr30k_test_karpathy.txt").unlink()
    layouts.write_json(tmp_path / "dataset_flickr30k.json", {"images": items})
    found = Flickr30k(tmp_path).test()
    assert (found.images, found.texts, found.image_of) == (
        wanted.images, wanted.texts, wanted.image_of
    )  # fmt: skip
    assert found.source != wanted.source


def test_retrieval__coco(tmp_path):
    data = CocoRetrieval(layouts.coco_retrieval(tmp_path, pictures=3))
    assert data.check().counts == {"images": 3, "captions": 15}
    assert data.test().source == "coco_test_karpathy.json"
    assert data.test().images[2].is_file()


@pytest.mark.parametrize(
    "line", ["", "1001.png,no such suffix", "9.jpg,an image that is not there"]
)
def test_retrieval__a_truncated_list(tmp_path, line):
    path = layouts.flickr30k(tmp_path) / "flickr30k_test_karpathy.txt"
    path.write_text(f"image,caption\n{line}\n" if line else "")
    with pytest.raises(DataError, match=r"flickr30k_test_karpathy\.txt"):
        Flickr30k(tmp_path).check()


def test_real__coco(real):
    pytest.importorskip("faster_coco_eval")
    data = Coco(real("evaluation/coco51"))
    assert data.check().counts == {"train": 26, "val": 25, "instances": 213}
    objects = data.objects("val").objects
    for item in objects:
        with Image.open(item.image.path) as image:
            assert image.size == (item.image.width, item.image.height)
        if item.crowd:
            assert item.mask().sum() == sum(item.segmentation["counts"][1::2])
    areas = torch.tensor([(item.mask().sum(), item.area) for item in objects if item.area > 1000])
    assert (areas[:, 0] / areas[:, 1] - 1).abs().max() < 0.1
    retrieval = CocoRetrieval(real("evaluation/coco51")).check()
    assert retrieval.missing == ["images: 25 of 5,000", "captions: 125 of 25,010"]


def test_real__codes_made_of_panoptic_masks(real, tmp_path):
    pytest.importorskip("faster_coco_eval")
    (tmp_path / "annotations").symlink_to(real("evaluation/coco53") / "annotations")
    (tmp_path / "val2017").symlink_to(real("segmentation/coco/images/val"))
    objects = Coco(tmp_path).objects("val").objects
    assert len(objects) == 174
    assert all(item.mask().sum() == item.area for item in objects)
