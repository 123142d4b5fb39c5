"""SPair-71k, NAVI and ImageNet."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.datasets.imagenet import ImageNet
from radio_distill.evals.datasets.navi import Navi
from radio_distill.evals.datasets.spair import Spair


def test_imagenet__classes_are_numbered_as_in_the_challenge(tmp_path):
    data = ImageNet(layouts.imagenet(tmp_path, train=2, val=1))
    assert [number for _, number in data.split("train")] == [0, 0, 2, 2, 9, 9]
    assert all(path.is_file() for path, _ in data.split("val"))
    assert data.check().counts == {"train": 6, "val": 3}


def test_imagenet__val_as_it_is_published_and_a_strange_class(tmp_path):
    layouts.imagenet(tmp_path)
    (tmp_path / "val" / "dogs").mkdir()
    with pytest.raises(DataError, match=r"dogs is no class"):
        ImageNet(tmp_path).split("val")
    (tmp_path / "flat" / "val").mkdir(parents=True)
    layouts.save(
        tmp_path / "flat" / "val" / "ILSVRC2012_val_00000001.JPEG", np.zeros((8, 8, 3), np.uint8)
    )
    with pytest.raises(DataError, match="no class folders"):
        ImageNet(tmp_path / "flat").split("val")
    next((tmp_path / "train" / "n01440764").iterdir()).rename(tmp_path / "moved")
    for path in (tmp_path / "train" / "n01440764").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"n01440764 has no images"):
        ImageNet(tmp_path).split("train")


def test_spair__keypoints_correspond(tmp_path):
    pairs = Spair(layouts.spair(tmp_path)).pairs()
    assert {pair.category for pair in pairs} == {"cat", "train"}
    assert len(pairs) == 12
    for pair in pairs:
        points = pair.keypoints()
        source, target = (
            np.array(Image.open(path)).astype(int) for path in (pair.source, pair.target)
        )
        assert points.source_size == points.target_size == source.shape[:2]
        for (x, y), (u, v) in zip(
            points.source.int().tolist(), points.target.int().tolist(), strict=True
        ):
            assert abs(source[y, x] - target[v, u]).max() < 12


def test_spair__check_and_a_lost_picture(tmp_path):
    data = Spair(layouts.spair(tmp_path))
    assert data.check().counts == {"test": 12, "images": 6}
    (tmp_path / "JPEGImages" / "cat" / "2008_000001.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 3 names .*2008_000001\.jpg"):
        data.pairs()


def test_spair__a_damaged_pair_and_an_empty_split(tmp_path):
    data = Spair(layouts.spair(tmp_path))
    pair = data.pairs()[0]
    pair.file.write_text("{}")
    with pytest.raises(DataError, match="no pair of SPair"):
        pair.keypoints()
    for path in (tmp_path / "PairAnnotation" / "test").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no pairs in"):
        data.pairs()


def test_real__spair(real):
    pairs = Spair(real("evaluation/spair_like")).pairs()
    assert len(pairs) == 90
    assert sum(len(pair.keypoints().source) for pair in pairs if pair.category == "horse") > 0
    for pair in pairs[:20]:
        points = pair.keypoints()
        assert Image.open(pair.source).size == points.source_size[::-1]
        assert (points.target <= torch.tensor(points.target_size[::-1])).all()


def test_navi__depth_and_pose_carry_a_point_into_another_picture(tmp_path):
    images = Navi(layouts.navi(tmp_path)).split("val")
    assert len(images) == 10
    first, second = images[1], images[3]
    size = (layouts.SIZE[1], layouts.SIZE[0])
    depth = first.labels()["depth"]
    assert depth.shape == size
    rows, columns = torch.nonzero(depth, as_tuple=True)
    pixels = torch.stack([columns + 0.5, rows + 0.5, torch.ones(len(rows))])
    seen = first.intrinsics(size).inverse() @ pixels * depth[rows, columns]
    motion = second.pose() @ first.pose().inverse()
    moved = second.intrinsics(size) @ (motion[:3, :3] @ seen + motion[:3, 3:])
    x, y = (moved[:2] / moved[2]).floor().long()
    inside = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
    other = second.labels()["depth"]
    assert inside.float().mean() > 0.5
    at_edge = (other[y[inside], x[inside]] == 0).float().mean()
    assert at_edge < 0.1
    hit = inside.clone()
    hit[inside] = other[y[inside], x[inside]] > 0
    assert (other[y[hit], x[hit]] - moved[2][hit]).abs().max() < 1e-3
    a, b = (
        torch.from_numpy(np.array(Image.open(item.image)).astype(int)) for item in (first, second)
    )
    difference = (a[rows[hit], columns[hit]] - b[y[hit], x[hit]]).abs().float()
    assert difference.mean() < 12


def test_navi__intrinsics_follow_the_size(tmp_path):
    image = Navi(layouts.navi(tmp_path)).split("train")[0]
    whole, double = image.intrinsics((40, 48)), image.intrinsics((80, 96))
    assert torch.equal(double[:2], 2 * whole[:2])


def test_navi__small_copies_go_first_underscores_count_and_lonely_objects_do_not(tmp_path):
    layouts.navi(tmp_path, objects=3, pictures=2)
    folder = tmp_path / "object_0" / "multiview-00-pixel_5"
    for part, suffix in (("images", ".jpg"), ("depth", ".png")):
        (folder / part / f"000{suffix}").rename(folder / part / f"downsampled_000{suffix}")
    folder.rename(folder.with_name("multiview_00_pixel_5"))
    for path in sorted((tmp_path / "object_2" / "wild_set").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "object_2" / "wild_set").rmdir()
    data = Navi(tmp_path)
    train = data.split("train")
    assert [image.key for image in train][:2] == [
        "object_0/multiview_00_pixel_5/000", "object_0/multiview_00_pixel_5/001"
    ]  # fmt: skip
    assert train[0].image.name == "downsampled_000.jpg"
    assert train[0].labels()["depth"].max() > 0
    assert {image.object for image in train} == {"object_0", "object_1"}
    assert data.check().counts == {"multiview": 6, "wild": 4}


def test_navi__a_picture_without_depth_or_annotation(tmp_path):
    folder = layouts.navi(tmp_path) / "object_1" / "wild_set"
    path = folder / "annotations.json"
    items = json.loads(path.read_text())
    path.write_text(json.dumps(items[1:]))
    with pytest.raises(DataError, match=r"000\.jpg lacks a line in"):
        Navi(tmp_path).split("val")
    path.write_text(json.dumps(items))
    (folder / "depth" / "003.png").unlink()
    with pytest.raises(DataError, match=r"003\.jpg lacks .*003\.png"):
        Navi(tmp_path).split("val")
    path.write_text('[{"filename": "000.jpg"}]')
    with pytest.raises(DataError, match=r"annotations\.json"):
        Navi(tmp_path).split("val")


def test_real__poses_carry_depth_from_frame_to_frame(real, tmp_path):
    pytest.importorskip("scipy")
    images = Navi(layouts.navi_of_redwood(tmp_path, real("evaluation/redwood5"))).split("val")
    first, last = images[0], images[4]
    depth, other = (item.labels()["depth"] for item in (first, last))
    camera = first.intrinsics((480, 640))
    rows, columns = torch.nonzero(depth, as_tuple=True)
    pixels = torch.stack([columns + 0.5, rows + 0.5, torch.ones(len(rows))])
    seen = camera.inverse() @ pixels * depth[rows, columns]

    def residual(motion):
        moved = camera @ (motion[:3, :3] @ seen + motion[:3, 3:])
        x, y = (moved[:2] / moved[2]).floor().long()
        inside = (x >= 0) & (x < 640) & (y >= 0) & (y < 480) & (moved[2] > 0)
        found = other[y[inside], x[inside]]
        return (found - moved[2][inside])[found > 0].abs().median()

    motion = last.pose() @ first.pose().inverse()
    assert residual(motion) < 0.012  # the file holds inverse depth in steps of 6 mm at 2 m
    assert residual(motion.inverse()) > 4 * residual(motion)
    assert residual(torch.eye(4)) > 2 * residual(motion)
