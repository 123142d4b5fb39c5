"""NYUDv2 and PASCAL-Context in the layouts of multi-task works, NYU Depth in that of BTS."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.datasets.nyu_depth import NyuDepth
from radio_distill.evals.datasets.nyud import Nyud
from radio_distill.evals.datasets.pascal_context import PascalContext
from radio_distill.evals.metrics import IGNORED


def test_nyud__labels_cover_each_other(tmp_path):
    data = Nyud(layouts.nyud(tmp_path))
    assert data.check().counts == {"train": 3, "val": 2}
    labels = data.split("val")[0].labels()
    assert set(labels["segmentation"].unique().tolist()) == {IGNORED, 0, 1, 38, 39}
    known = labels["segmentation"] != IGNORED
    wanted = 1 + 0.25 * (labels["segmentation"][known] + 1)
    assert torch.equal(labels["depth"][known], wanted)
    assert (labels["depth"][~known] == 0).all()
    assert labels["normals"].shape == (3, *known.shape)
    assert torch.allclose(labels["normals"].norm(dim=0), torch.ones(known.shape))


def test_nyud__a_list_that_names_more_than_there_is(tmp_path):
    data = Nyud(layouts.nyud(tmp_path))
    (tmp_path / "depth" / "0002.npy").unlink()
    with pytest.raises(DataError, match=r"1 of 3 names .*0002\.npy"):
        data.split("train")
    (tmp_path / "depth" / "0501.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"0501\.npy is no array"):
        data.split("val")[0].labels()


def test_pascal_context__parts_saliency_and_where_normals_count(tmp_path):
    pytest.importorskip("scipy")
    data = PascalContext(layouts.pascal_context(tmp_path))
    assert data.check().counts == {"train": 3, "val": 3}
    for index, item in enumerate(data.split("train")):
        labels = item.labels()
        shown = labels["segmentation"]
        assert set(shown.unique().tolist()) == {IGNORED, 0, 1} | ({15} if index != 1 else set())
        assert torch.equal(labels["saliency"], ((shown == 1) | (shown == 15)).long())
        lengths = labels["normals"].norm(dim=0)
        assert torch.allclose(lengths, (shown != 1).float())  # no class of NYU's flies
        if index == 1:
            assert (labels["parts"] == IGNORED).all()
        else:
            person, half = shown == 15, shown.shape[1] // 2
            assert torch.equal(labels["parts"] > 0, person)
            assert set(labels["parts"][:, :half].unique().tolist()) <= {0, 1}
            assert set(labels["parts"][:, half:].unique().tolist()) <= {0, 6}


def test_pascal_context__lost_and_damaged_files(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    data = PascalContext(layouts.pascal_context(tmp_path))
    (tmp_path / "human_parts" / "2008_000000.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match=r"2008_000000\.mat cannot be read"):
        data.split("train")[0].labels()
    savemat(tmp_path / "human_parts" / "2008_000001.mat", {"anno": {"objects": {"class_ind": 15}}})
    with pytest.raises(DataError, match=r"2008_000001\.mat is no file of PASCAL-Part"):
        data.split("train")[1].labels()
    (tmp_path / "semseg" / "pascal-context" / "2008_000502.png").unlink()
    with pytest.raises(DataError, match=r"1 of 1 names .*2008_000502\.png"):
        data.split("val")
    (tmp_path / "sal_distill" / "2008_000000.png").unlink()
    with pytest.raises(DataError, match=r"sal_distill .*2008_000000\.png"):
        data.split("train")


@pytest.mark.parametrize("place", ["inside", "beside", "as BTS unpacks it"])
def test_nyu_depth__wherever_lists_and_pictures_lie(tmp_path, place):
    root = layouts.nyu_depth(tmp_path / "nyu")
    if place == "beside":
        for path in root.glob("nyu_*.txt"):
            path.rename(tmp_path / path.name)
    if place == "as BTS unpacks it":
        for folder, pattern in (
            ("sync", "kitchen_train*"),
            ("official_splits/test", "kitchen_test*"),
        ):
            (root / folder).mkdir(parents=True)
            for scene in list(root.glob(pattern)):
                shutil.move(scene, root / folder / scene.name)
        (root / "nyu_test.txt").rename(root / "nyudepthv2_test_files_with_gt.txt")
    data = NyuDepth(root)
    assert data.check().counts == {"train": 4, "val": 3}
    item = data.split("val")[2]
    depth = item.labels()["depth"]
    assert depth.shape == Image.open(item.image).size[::-1]
    assert set(depth.unique().tolist()) == {0, 0.5, 1, 1.5, 4}


def test_nyu_depth__truncated_lists(tmp_path):
    data = NyuDepth(layouts.nyu_depth(tmp_path))
    path = tmp_path / "nyu_train.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0].split()[0]]))
    with pytest.raises(DataError, match="no image and depth"):
        data.split("train")
    path.write_text("\n".join([*lines, lines[0].replace("rgb_00000", "rgb_00009")]))
    with pytest.raises(DataError, match=r"rgb_00009\.jpg"):
        data.split("train")
    path.write_text("")
    assert data.check().counts == {"val": 3}
    path.unlink()
    with pytest.raises(DataError, match=r"no nyu_train\.txt"):
        data.split("train")


def test_real__depth_in_millimetres(real, tmp_path):
    scene = tmp_path / "office"
    scene.mkdir()
    for name, source in (("rgb_0.png", "nyu_color.png"), ("sync_depth_0.png", "nyu_depth_mm.png")):
        (scene / name).symlink_to(real("evaluation/rgbd_single") / source)
    layouts.write(tmp_path / "nyu_test.txt", "office/rgb_0.png office/sync_depth_0.png 518.8579\n")
    (item,) = NyuDepth(tmp_path).split("val")
    depth = item.labels()["depth"]
    assert depth.shape == np.array(Image.open(item.image)).shape[:2]
    assert 0.5 < depth[depth > 0].median() < 10
