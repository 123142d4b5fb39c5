import logging
import os

import numpy as np
import pytest

from radio_distill.data.folder import labelled_images, list_images, load_images
from radio_distill.data.shards import write_shards
from radio_distill.errors import DataError


@pytest.fixture
def folder(tmp_path, put):
    return put(tmp_path / "images", ("b/2.png", "b/10.png", "a/1.png", "c.png"))


def test_load_images__folder_is_sorted_and_lazy(folder, encode):
    images = load_images(str(folder))
    assert [key for key, _ in images] == ["a/1.png", "b/10.png", "b/2.png", "c.png"]
    assert len(images) == 4
    (folder / "a" / "1.png").write_bytes(encode(0, size=(9, 7)))
    assert images[0][1].size == (7, 9)
    assert [key for key, _ in images[2:]] == ["b/2.png", "c.png"]


def test_load_images__shards_hold_the_same(folder, tmp_path):
    write_shards(folder, tmp_path / "out", images_per_shard=3)
    plain, packed = load_images(str(folder)), load_images(str(tmp_path / "out"))
    assert len(packed) == 4
    assert packed[3][0] == "shard-000001.tar:00000003-c.png"
    for (_, one), (_, other) in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_load_images__limit_spreads_over_all(folder):
    assert [key for key, _ in load_images(str(folder), 2)] == ["a/1.png", "b/2.png"]
    for limit in (None, 0, 4, 99):
        assert len(load_images(str(folder), limit)) == 4


def test_load_images__bad_image_is_named(folder):
    (folder / "c.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"c\.png"):
        load_images(str(folder))[3]
    (folder / "c.png").unlink()
    (folder / "c.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"c\.png: No such file"):
        load_images(str(folder))[3]


def test_list_images__nothing_there(tmp_path):
    with pytest.raises(DataError, match="no images and no shards"):
        list_images(str(tmp_path))
    with pytest.raises(DataError, match="missing"):
        list_images(str(tmp_path / "missing"))


def test_load_images__pipe_does_not_block(folder):
    (folder / "c.png").unlink(missing_ok=True)
    os.mkfifo(folder / "c.png")
    with pytest.raises(DataError, match=r"c\.png: not a regular file"):
        load_images(str(folder))[3]


def test_list_images__unclean_shard_is_refused(tmp_path, encode, write_tar):
    """Else two evaluations of one name would be of different images."""
    path = write_tar(tmp_path / "a.tar", {"a.png": encode(0), "../b.png": encode(1)})
    with pytest.raises(DataError, match=r"a\.tar.* 1 unsafe_name \(\.\./b\.png\)"):
        list_images(str(path))


@pytest.fixture
def classes(tmp_path, put):
    names = ("train/dog/1.png", "train/dog/0.png", "train/cat/0.png", "val/dog/5.png")
    return put(tmp_path / "set", names)


@pytest.mark.parametrize("level", ["set", "."])
def test_labelled_images__numbers_classes_by_name(classes, level):
    train, val, names = labelled_images(str(classes.parent / level))
    assert names == ("cat", "dog")
    assert [(path.parent.name, path.stem, label) for path, label in train] == [
        ("cat", "0", 0),
        ("dog", "0", 1),
        ("dog", "1", 1),
    ]
    assert val == [(classes / "val" / "dog" / "5.png", 1)]


def test_labelled_images__wrong_layout(classes):
    (classes / "val" / "emu").mkdir()
    with pytest.raises(DataError, match="val/emu"):
        labelled_images(str(classes))
    with pytest.raises(DataError, match="train/CLASS"):
        labelled_images(str(classes / "train"))
    (classes / "val" / "emu").rmdir()
    (classes / "val" / "dog" / "5.png").unlink()
    with pytest.raises(DataError, match="class folders"):
        labelled_images(str(classes))


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("TRAIN", "validation"), ("training", "Valid")]
)
def test_labelled_images__usual_names_of_splits(classes, train, val):
    expected = labelled_images(str(classes)).class_names
    (classes / "train").rename(classes / train)
    (classes / "val").rename(classes / val)
    found = labelled_images(str(classes))
    assert found.class_names == expected
    assert {path.parent.parent.name for path, _ in found.val} == {val}
    (classes / "Training").mkdir()
    with pytest.raises(DataError, match="several"):
        labelled_images(str(classes))


def test_labelled_images__what_is_no_class_is_passed_over(classes, caplog):
    expected = labelled_images(str(classes))
    assert not caplog.records
    for name in (".ipynb_checkpoints", ".Trash-0", "train/.ipynb_checkpoints", "val/.cache"):
        (classes / name).mkdir()
        (classes / name / "0.png").write_bytes(b"")
    for name in (".DS_Store", "train/.DS_Store", "val/Thumbs.db", "train/dog/._0.png"):
        (classes / name).write_bytes(b"")
    assert labelled_images(str(classes)) == expected
    assert not caplog.records
    (classes / "train" / "yak").mkdir()
    (classes / "val" / "yak").mkdir()
    (classes / "train" / "loose.png").write_bytes(b"")
    assert labelled_images(str(classes)) == expected
    assert "1 (first: yak)" in caplog.text
    assert "1 (first: loose.png)" in caplog.text


def test_labelled_images__a_class_that_cannot_be_right_is_refused(classes, encode):
    (classes / "train" / "emu").mkdir()
    (classes / "val" / "emu").mkdir()
    (classes / "val" / "emu" / "0.png").write_bytes(encode(0))
    with pytest.raises(DataError, match="val/emu"):
        labelled_images(str(classes))


def test_labelled_images__one_class_alone_is_refused(classes):
    (classes / "train" / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match=r"\(dog\)"):
        labelled_images(str(classes))


def test_labelled_images__numbers_as_names(tmp_path, put):
    put(tmp_path, ("train/10/0.png", "train/9/0.png", "train/09/0.png", "val/9/0.png"))
    train, val, names = labelled_images(str(tmp_path))
    assert names == ("09", "10", "9")
    assert [names[label] for _, label in train] == ["09", "10", "9"]
    assert [names[label] for _, label in val] == ["9"]


def test_labelled_images__real_set(real):
    train, val, names = labelled_images(str(real / "classification"))
    assert len(names) == 20
    assert {label for _, label in train} == {label for _, label in val} == set(range(20))
    assert not {path for path, _ in train} & {path for path, _ in val}
    assert all(path.parent.name == names[label] for path, label in train + val)


def test_list_images__links_are_followed_and_the_rest_is_said(folder, tmp_path, encode, caplog):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a").symlink_to(folder)
    (folder / "back").symlink_to(tmp_path / "held")
    (tmp_path / "held" / "x.jfif").write_bytes(encode(0, "JPEG"))
    for name in ("x.nef", "y.nef", "x.txt", ".x.png"):
        (tmp_path / "held" / name).write_bytes(b"")
    keys = [ref.key for ref in list_images(str(tmp_path / "held"))]
    assert keys == ["a/a/1.png", "a/b/10.png", "a/b/2.png", "a/c.png", "x.jfif"]
    (record,) = caplog.records
    assert "5 images; passed over: 2 .nef, 1 hidden, 1 links back" in record.getMessage()


def test_list_images__images_beside_shards_are_said(folder, tmp_path, caplog):
    write_shards(folder / "a", folder / "shards")
    assert len(list_images(str(folder))) == 1
    assert "4 images beside" in caplog.text


def test_list_images__empty_shards(tmp_path, encode, write_tar):
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(DataError, match="no images"):
        list_images(str(tmp_path))
    write_tar(tmp_path / "b.tar", {"a.png": encode(0)})
    assert len(list_images(str(tmp_path))) == 1


def test_labelled_images__hidden_folders_are_no_classes(classes, encode, put, caplog):
    caplog.set_level(logging.INFO)
    hidden = ("train/.ipynb_checkpoints/a.png", "val/.ipynb_checkpoints/a.png")
    put(classes, (*hidden, "train/loose.png"))
    (classes / "train" / ".DS_Store").write_bytes(b"")
    (classes / "train" / "emu").mkdir()
    (classes / "train" / "dog" / "deep").mkdir()
    (classes / "train" / "dog" / "deep" / "2.jpe").write_bytes(encode(0, "JPEG"))
    train, val, names = labelled_images(str(classes))
    assert names == ("cat", "dog")
    assert ([label for _, label in train], [label for _, label in val]) == ([0, 1, 1, 1], [1])
    assert "2 hidden" in caplog.text


def test_labelled_images__linked_classes(classes, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "linked" / split).mkdir(parents=True)
        (tmp_path / "linked" / split / "dog").symlink_to(classes / "train" / "dog")
        (tmp_path / "linked" / split / "cat").symlink_to(classes / "train" / "cat")
    train, val, names = labelled_images(str(tmp_path / "linked"))
    assert (len(train), len(val), names) == (3, 3, ("cat", "dog"))
