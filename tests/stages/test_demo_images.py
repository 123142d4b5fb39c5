"""The demo's images are real, disjoint, and the same every time."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radio_distill.data.shards import find_images
from radio_distill.errors import ConfigError, DataError
from stages.commands.demo_images import (
    HELD_OUT,
    TRAIN,
    DemoImages,
    gather_demo_images,
    photograph,
)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in find_images(folder)
    }


def save(path: Path, seed: int = 0, size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> DemoImages:
    return gather_demo_images(tmp_path_factory.mktemp("images"))


def test_photograph__every_listed_one_is_in_the_packages():
    for name in {**TRAIN, **HELD_OUT}:
        image = photograph(name)
        assert image.mode == "RGB"
        assert min(image.size) >= 300


def test_photograph__missing_one_says_what_to_install():
    with pytest.raises(ConfigError, match=r"nowhere\.png is missing: install scikit-image"):
        photograph("nowhere.png")


def test_gather__counts_and_sizes(demo):
    assert demo.num_train == sum(TRAIN.values()) == len(list(find_images(demo.train)))
    assert demo.num_held_out == sum(HELD_OUT.values()) == len(list(find_images(demo.held_out)))
    sizes = set()
    for path in [*find_images(demo.train), *find_images(demo.held_out)]:
        with Image.open(path) as image:
            assert (image.mode, image.format) == ("RGB", "JPEG")
            assert 190 <= min(image.size) <= max(image.size) <= 640
            sizes.add(image.size)
    assert len(sizes) > 300


def test_gather__held_out_photographs_are_never_learnt_from(demo):
    assert not set(TRAIN) & set(HELD_OUT)
    sources = {path.stem.split("_", 1)[1] for path in find_images(demo.held_out)}
    assert sources == {Path(name).stem for name in HELD_OUT}
    assert not sources & {path.stem.split("_", 1)[1] for path in find_images(demo.train)}
    assert not set(digest(demo.train).values()) & set(digest(demo.held_out).values())


def test_gather__first_files_show_different_photographs(demo):
    first = [path.stem.split("_", 1)[1] for path in find_images(demo.train)][: len(TRAIN)]
    assert len(set(first)) == len(TRAIN)


def test_gather__crops_are_cut_from_their_photograph(demo):
    """It lies somewhere in its source, pixel for pixel but for JPEG."""
    crop = np.asarray(Image.open(demo.train / "05_astronaut.jpg"), np.int16)
    source = np.asarray(photograph("astronaut.png"), np.int16)
    height, width = crop.shape[:2]
    best = min(
        np.abs(source[top : top + height : 8, left : left + width : 8] - crop[::8, ::8]).mean()
        for top in range(source.shape[0] - height + 1)
        for left in range(source.shape[1] - width + 1)
    )
    assert best < 3


def test_gather__same_again(demo, tmp_path):
    (tmp_path / "train").mkdir()
    save(tmp_path / "train" / "left_over.png")
    again = gather_demo_images(tmp_path)
    assert digest(again.train) == digest(demo.train)
    assert digest(again.held_out) == digest(demo.held_out)


def test_gather__own_images_with_captions_and_folders(tmp_path):
    data = tmp_path / "my images"
    for index in range(25):
        image = save(data / f"class {index % 2}" / f"{index}.png", seed=index)
        image.with_suffix(".txt").write_text(f"caption {index}")
    (data / "notes.md").write_text("no image")
    result = gather_demo_images(tmp_path / "out", data)
    assert (result.num_train, result.num_held_out) == (22, 3)
    union = {**digest(result.train), **digest(result.held_out)}
    assert union == digest(data)
    for folder in (result.train, result.held_out):
        for path in find_images(folder):
            assert path.with_suffix(".txt").read_text() == f"caption {path.stem}"


def test_gather__own_images_are_held_out_by_path_not_by_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for index in range(20):
        save(first / f"{index}.png", seed=index)
    for index in reversed(range(20)):
        save(second / f"{index}.png", seed=index)
    held_out = [
        sorted(digest(gather_demo_images(tmp_path / name, data).held_out))
        for name, data in (("out_a", first), ("out_b", second))
    ]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 2


@pytest.mark.parametrize("count", [0, 1])
def test_gather__too_few_own_images(tmp_path, count):
    (tmp_path / "data").mkdir()
    for index in range(count):
        save(tmp_path / "data" / f"{index}.png")
    with pytest.raises(DataError, match=f"{count} images in .*at least 2"):
        gather_demo_images(tmp_path / "out", tmp_path / "data")


def test_gather__no_such_folder(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        gather_demo_images(tmp_path / "out", tmp_path / "nowhere")


@pytest.mark.parametrize(("out", "data"), [("a/out", "a"), ("a", "a/b"), ("a", "a")])
def test_gather__never_eats_its_own_output(tmp_path, out, data):
    image = save(tmp_path / data / "train" / "1.png")
    with pytest.raises(ConfigError, match="move the images apart"):
        gather_demo_images(tmp_path / out, tmp_path / data)
    assert image.is_file()


def test_gather__folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write images to"):
        gather_demo_images(tmp_path / "file")
