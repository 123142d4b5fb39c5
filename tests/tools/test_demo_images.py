"""The demo's images are real, disjoint, and the same every time."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radio_distill.data.folder import labelled_images
from radio_distill.errors import ConfigError
from tools.demo_images import HELD_OUT, TRAIN, main, photograph, write_demo_images, write_faces

Images = dict[str, bytes]


def images_of(out: Path) -> tuple[Images, Images]:
    """Return the training and the held-out images by the names of their crops."""
    train = {}
    for shard in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                train[member.name.partition("-")[2]] = tar.extractfile(member).read()
    return train, {path.name: path.read_bytes() for path in (out / "held_out").iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Images, Images]:
    out = tmp_path_factory.mktemp("images")
    write_demo_images(out)
    return images_of(out)


def test_photograph__every_listed_one_is_in_the_packages():
    for name in {**TRAIN, **HELD_OUT}:
        image = photograph(name)
        assert image.mode == "RGB"
        assert min(image.size) >= 300


def test_photograph__missing_one_says_what_to_install():
    with pytest.raises(ConfigError, match=r"nowhere\.png.*scikit-image"):
        photograph("nowhere.png")


def test_demo_images__counts_and_sizes(demo):
    assert [len(images) for images in demo] == [sum(TRAIN.values()), sum(HELD_OUT.values())]
    sizes = set()
    for data in [*demo[0].values(), *demo[1].values()]:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.mode, image.format) == ("RGB", "JPEG")
            assert 190 <= min(image.size) <= max(image.size) <= 640
            sizes.add(image.size)
    assert len(sizes) > 300


def test_write_faces__are_labelled_half_known_and_half_asked(tmp_path):
    write_faces(tmp_path)
    train, val, names = labelled_images(str(tmp_path))
    assert list(names) == ["face", "other"]
    for split in (train, val):
        assert [[label for _, label in split].count(kind) for kind in (0, 1)] == [50, 50]
    assert not {path.name for path, _ in train} & {path.name for path, _ in val}
    with Image.open(train[0][0]) as image:
        assert image.size == (25, 25)


def test_demo_images__held_out_photographs_are_never_learnt_from(demo):
    assert not set(TRAIN) & set(HELD_OUT)
    train, held_out = ({name.partition("_")[2] for name in images} for images in demo)
    assert held_out == {f"{Path(name).stem}.jpg" for name in HELD_OUT}
    assert not train & held_out
    assert not set(demo[0].values()) & set(demo[1].values())


def test_demo_images__first_ones_show_different_photographs(demo):
    first = {name.partition("_")[2] for name in list(demo[0])[: len(TRAIN)]}
    assert len(first) == len(TRAIN)


def test_demo_images__crops_are_cut_from_their_photograph(demo):
    """It lies somewhere in its source, pixel for pixel but for JPEG."""
    crop = np.asarray(Image.open(io.BytesIO(demo[0]["05_astronaut.jpg"])), np.int16)
    source = np.asarray(photograph("astronaut.png"), np.int16)
    height, width = crop.shape[:2]
    best = min(
        np.abs(source[top : top + height : 8, left : left + width : 8] - crop[::8, ::8]).mean()
        for top in range(source.shape[0] - height + 1)
        for left in range(source.shape[1] - width + 1)
    )
    assert best < 3


def test_demo_images__same_again_and_what_is_there_stays(demo, tmp_path):
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "left_over.png").write_bytes(b"")
    assert main(["--output", str(tmp_path)]) == 0
    assert images_of(tmp_path) == demo
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["--output", str(tmp_path)]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_demo_images__folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file")]) == 2
    assert "cannot write images to" in capsys.readouterr().err
