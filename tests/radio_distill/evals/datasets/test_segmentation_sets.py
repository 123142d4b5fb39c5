"""ADE20K and VOC: what their files say, and what is wrong with a copy that is not whole."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.datasets import DATASETS
from radio_distill.evals.datasets.ade20k import Ade20k
from radio_distill.evals.datasets.coco import Coco
from radio_distill.evals.datasets.voc import Voc
from radio_distill.evals.metrics import IGNORED


def test_ade20k__zero_is_ignored_and_classes_begin_at_zero(tmp_path):
    items = Ade20k(layouts.ade20k(tmp_path)).split("val")
    assert [item.key for item in items] == ["ADE_val_00000001", "ADE_val_00000002"]
    stored = np.array(Image.open(tmp_path / "annotations/validation/ADE_val_00000001.png"))
    labels = pickle.loads(pickle.dumps(items[0])).labels()["segmentation"]  # as a worker gets it
    assert labels.dtype == torch.int64
    assert (labels[torch.from_numpy(stored) == 0] == IGNORED).all()
    assert torch.equal(labels.where(labels != IGNORED, -1) + 1, torch.from_numpy(stored).long())


def test_ade20k__check_counts_against_the_published_set(tmp_path):
    contents = Ade20k(layouts.ade20k(tmp_path, train=3, val=2)).check()
    assert contents.counts == {"train": 3, "val": 2}
    assert contents.missing == ["train: 3 of 20,210", "val: 2 of 2,000"]


@pytest.mark.parametrize("gone", ["images", "annotations"])
def test_ade20k__unequal_stems(tmp_path, gone):
    layouts.ade20k(tmp_path)
    next((tmp_path / gone / "training").iterdir()).unlink()
    data = Ade20k(tmp_path)
    with pytest.raises(DataError, match=r"1 of 3 files .*ADE_train_00000\d"):
        data.split("train")
    assert data.check().counts == {"val": 2}
    assert [line.partition(":")[0] for line in data.check().missing] == ["train", "val"]


def test_voc__trainaug_has_masks_of_its_own_and_void_is_ignored(tmp_path):
    data = Voc(layouts.voc(tmp_path, train=2, val=1, aug=3))
    assert data.check().counts == {"train": 2, "trainaug": 5, "val": 1}
    assert data.training == "trainaug"
    labels = data.split("trainaug")[4].labels()["segmentation"]
    assert set(labels.unique().tolist()) == {IGNORED, 0, 1, 15}


def test_voc__plain_devkit(tmp_path):
    data = Voc(layouts.voc(tmp_path, aug=0))
    assert data.training == "train"
    assert data.check().counts == {"train": 2, "val": 2}


def test_voc__a_truncated_list_a_lost_file_and_an_empty_list(tmp_path):
    layouts.voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    text = (lists / "train.txt").read_text()
    (lists / "train.txt").write_text(text[:-4])
    with pytest.raises(DataError, match=r"1 of 2 names .*\(first: 2007_000\.jpg\)"):
        Voc(tmp_path).split("train")
    (lists / "train.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt is empty"):
        Voc(tmp_path).split("train")
    (tmp_path / "SegmentationClass" / "2007_000002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 names .*SegmentationClass "):
        Voc(tmp_path).split("val")


def test_labels__of_another_size_or_of_another_set(tmp_path):
    items = Ade20k(layouts.ade20k(tmp_path)).split("train")
    mask = tmp_path / "annotations" / "training" / f"{items[1].key}.png"
    layouts.save(mask, np.ones((48, 40), dtype=np.uint8))
    with pytest.raises(DataError, match=r"is 48x40 px, its segmentation 40x48"):
        items[1].labels()
    layouts.save(mask, np.full((40, 48), 151, dtype=np.uint8))
    with pytest.raises(DataError, match=r"00000002\.png shows 151"):
        items[1].labels()
    assert "train" in Ade20k(tmp_path).check().problems


@pytest.mark.parametrize("name", DATASETS.names())
def test_dataset__a_wrong_folder_and_none_are_one_line(name, tmp_path):
    (tmp_path / "holiday").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError) as error:
            DATASETS.get(name)(folder).check()
        assert "\n" not in str(error.value)
        assert name in str(error.value)


def test_real__ade20k(real, tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "validation").symlink_to(real("evaluation/ade20k_3") / kind)
    for item in Ade20k(tmp_path).split("val"):
        labels = item.labels()["segmentation"]
        assert labels.shape == Image.open(item.image).size[::-1]
        assert int(labels.min()) >= -1
        assert 1 <= int(labels.max()) < 150


def test_real__voc(real, tmp_path):
    for kind in ("JPEGImages", "SegmentationClass"):
        (tmp_path / kind).symlink_to(real("evaluation/voc_3") / kind)
    stems = sorted(path.stem for path in (tmp_path / "JPEGImages").iterdir())
    layouts.write(tmp_path / "ImageSets" / "Segmentation" / "val.txt", "\n".join(stems))
    shown = set()
    for item in Voc(tmp_path).split("val"):
        labels = item.labels()["segmentation"]
        assert labels.shape == Image.open(item.image).size[::-1]
        shown |= set(labels.unique().tolist())
    assert shown > {IGNORED, 0, 15}
    assert max(shown) < 21


def test_real__voc_of_cocos_pictures(real, tmp_path):
    pytest.importorskip("faster_coco_eval")
    data = Voc(layouts.voc_of_coco(tmp_path, Coco(real("evaluation/coco51"))))
    assert data.check().counts == {"train": 26, "val": 25}
    shown = {split: set[int]() for split in ("train", "val")}
    for split, classes in shown.items():
        for item in data.split(split):
            classes |= set(item.labels()["segmentation"].unique().tolist())
    assert {0, 15} <= shown["train"] & shown["val"]
    assert len(shown["train"] & shown["val"]) > 8
