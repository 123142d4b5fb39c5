"""Masks as data sets have them: what is read, what is refused, what is passed over with a word."""

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.errors import DataError
from radio_distill.evals.masks import find_pairs, labelled_classes, open_set, read_mask
from radio_distill.evals.metrics import IGNORED
from radio_distill.evals.segmentation import Segmentation

NUMBERS = np.array([[0, 0, 1, 1], [2, 2, 255, 255], [3, 3, 3, 0], [1, 2, 3, 0]], dtype=np.uint8)
SIDES = (32, 24)  # width, height


def _image(path, size=SIDES, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 40)).save(path, **options)


def _mask(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = numbers if isinstance(numbers, Image.Image) else Image.fromarray(numbers)
    image.save(path)


def _stripes(*numbers, dtype=np.uint8):
    """A mask of vertical stripes, 32 x 24 px."""
    return np.array(numbers, dtype=dtype).repeat(32 // len(numbers))[None].repeat(24, 0)


@pytest.fixture
def masks(tmp_path):
    """Make a set of two images a split whose masks are given, or three stripes of 0, 1, 2."""

    def make(train=None, val=None, names=("a", "b")):
        for split, mask in (("train", train), ("val", val)):
            for name in names:
                _image(tmp_path / "images" / split / f"{name}.jpg")
                _mask(
                    tmp_path / "masks" / split / f"{name}.png",
                    _stripes(0, 1, 2, 2) if mask is None else mask,
                )
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("ignore", "classes"),
    [
        (255, [0, 1, 2, 3]),
        ((255,), [0, 1, 2, 3]),
        (0, [1, 2, 3, 255]),
        ((0, 255), [1, 2, 3]),
        ((), [0, 1, 2, 3, 255]),
    ],
)
@pytest.mark.parametrize("palette", [False, True])
def test_labelled_classes__those_that_are_not_ignored(tmp_path, ignore, classes, palette):
    mask = Image.fromarray(NUMBERS)
    if palette:  # indices count, not the colours that they stand for
        mask = mask.copy()
        mask.putpalette(np.random.default_rng(1).integers(0, 255, 768, dtype=np.uint8).tobytes())
        assert mask.mode == "P"
    _mask(tmp_path / "a.png", mask)
    assert labelled_classes([tmp_path / "a.png"], ignore).tolist() == classes
    found = read_mask(tmp_path / "a.png", 4, np.array(classes)).numpy()
    known = np.isin(NUMBERS, classes)
    np.testing.assert_array_equal(np.array(classes)[found[known]], NUMBERS[known])
    assert (found[~known] == IGNORED).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_open_set__nobody_said_what_255_is(masks, split):
    folder = masks(**{split: _stripes(0, 1, 2, 255)})
    with pytest.raises(DataError, match=r"evaluation\.segmentation_ignore") as caught:
        open_set(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert f"masks/{split}/a.png" in message
    assert "segmentation_ignore 255" in message
    assert "segmentation_ignore 0" in message
    assert open_set(str(folder), ignore=255).classes.tolist() == [0, 1, 2]
    assert 1 in open_set(str(folder), ignore=0).classes


def test_open_set__nobody_said_what_65535_is(masks):
    folder = masks(_stripes(0, 300, 255, 65535, dtype=np.uint16))
    with pytest.raises(DataError, match="65535"):
        open_set(str(folder))
    classes = open_set(str(folder), ignore=(0, 65535)).classes
    assert classes.tolist() == [255, 300]  # of 16 bits, 255 is a number as any other


def test_open_set__binary_masks(masks):
    folder = masks(_stripes(0, 255), _stripes(0, 255))
    with pytest.raises(DataError, match=r"'\[\]'"):
        open_set(str(folder))
    assert open_set(str(folder), ignore=()).classes.tolist() == [0, 255]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_open_set__grey_of_few_bits_is_read_as_stored(masks, bits):
    """A decoder for people brings them to 0 to 255; in a mask 1 is 1."""
    most = 2**bits - 1
    numbers = _stripes(0, 1, most - 1, most)
    folder = masks()
    for path in folder.glob("masks/*/*.png"):
        _write_grey(path, numbers, bits)
    classes = open_set(str(folder), ignore=()).classes
    assert classes.tolist() == sorted({0, 1, most - 1, most})


def _write_grey(path, numbers, bits):
    """Write a grey PNG of 1, 2 or 4 bits a pixel, which Pillow cannot."""
    import struct
    import zlib

    spread = (numbers[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(spread.reshape(len(numbers), -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    height, width = numbers.shape
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("RGB", r"not 3 \(RGB\)"), ("RGBA", r"not 4 \(RGBA\)"), ("LA", r"not 2 \(LA\)")],
)
def test_open_set__colours_are_refused(masks, mode, reason):
    folder = masks(Image.fromarray(_stripes(0, 60, 120, 60)).convert(mode))
    with pytest.raises(DataError, match=f"{reason}"):
        open_set(str(folder))


def test_open_set__lossy_and_damaged_masks_are_refused(masks):
    folder = masks()
    path = folder / "masks" / "val" / "b.png"
    whole = path.read_bytes()
    Image.fromarray(_stripes(0, 1)).save(path, format="JPEG")
    with pytest.raises(DataError, match=r"val/b\.png: not a PNG file"):
        open_set(str(folder))
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"val/b\.png"):
        open_set(str(folder))


def test_open_set__one_class_is_no_task(masks):
    folder = masks(_stripes(0, 7))
    with pytest.raises(DataError, match=r" 7, .*\(0\)"):
        open_set(str(folder))
    assert open_set(str(folder), ignore=()).classes.tolist() == [0, 7]


def test_open_set__what_only_validation_shows_is_counted(masks, caplog):
    caplog.set_level("INFO")
    data = open_set(str(masks(val=_stripes(0, 1, 5, 6))))
    assert data.classes.tolist() == [1, 2]
    assert "ignored: 0 (25.0% of" in caplog.text
    assert "50.0% of the validation pixels show 2 classes that no training mask shows (5, 6)" in (
        caplog.text
    )


def test_open_set__sizes_that_differ_name_the_pair(masks):
    folder = masks()
    _mask(folder / "masks" / "val" / "b.png", _stripes(0, 1, 2, 2)[:12, :16])
    with pytest.raises(DataError, match=r"b\.jpg .*32x24 .*b\.png 16x12"):
        open_set(str(folder))
    assert len(open_set(str(folder), limit=1).val) == 1  # of what is used


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_open_set__turned_image_with_a_mask_of_the_stored_pixels(masks):
    folder = masks()
    image = folder / "images" / "train" / "a.jpg"
    _image(image, exif=_exif(6))  # is shown as 24 x 32
    with pytest.raises(DataError, match="EXIF") as caught:
        open_set(str(folder))
    assert f"exiftool -Orientation= {image}" in str(caught.value)
    _mask(folder / "masks" / "train" / "a.png", np.rot90(_stripes(0, 1, 2, 2), -1))
    assert len(open_set(str(folder)).train) == 2


def test_open_set__both_turned_are_read_as_shown(masks):
    folder = masks()
    stored = np.rot90(_stripes(0, 1, 2, 2))  # orientation 6 turns it back
    path = folder / "masks" / "train" / "a.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=_exif(6))
    _image(folder / "images" / "train" / "a.jpg", (24, 32), exif=_exif(6))
    data = open_set(str(folder))
    turned, plain = (data.mask(pair, 16) for pair in data.train)
    assert torch.equal(turned, plain)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_open_set__turns_that_sizes_do_not_show_are_said(masks, caplog, orientation):
    folder = masks()
    _image(folder / "images" / "val" / "a.jpg", exif=_exif(orientation))
    open_set(str(folder))
    assert "mirrored by EXIF" in caplog.text


def test_find_pairs__hidden_files_are_passed_over_and_foreign_ones_counted(masks, caplog):
    folder = masks()
    expected = find_pairs(str(folder), "val")
    for kind in ("images", "masks"):
        for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
            (folder / kind / "val" / name).write_bytes(b"\0")
        (folder / kind / "val" / ".ipynb_checkpoints").mkdir()
        _image(folder / kind / "val" / ".ipynb_checkpoints" / "a-checkpoint.png")
    assert find_pairs(str(folder), "val") == expected
    assert not caplog.records
    (folder / "images" / "val" / "c.heix").write_bytes(b"")
    Image.fromarray(_stripes(1)).save(folder / "masks" / "val" / "a.jpg")
    assert find_pairs(str(folder), "val") == expected
    first, second = caplog.messages
    assert "images/val: 2 images; passed over: 1 .heix" in first
    assert "masks/val: 2 masks; passed over: 1 .jpg" in second


def test_find_pairs__linked_folders_and_files(masks, tmp_path):
    folder, linked = masks(), tmp_path / "linked"
    for kind in ("images", "masks"):
        (linked / kind / "val").mkdir(parents=True)
        (linked / kind / "train").symlink_to(folder / kind / "train")
        for path in (folder / kind / "val").iterdir():
            (linked / kind / "val" / path.name).symlink_to(path)
    data = open_set(str(linked))
    assert (len(data.train), len(data.val)) == (2, 2)


def test_find_pairs__two_images_of_one_mask(masks):
    folder = masks()
    _image(folder / "images" / "val" / "b.jpeg")
    with pytest.raises(DataError, match=r"b\.jpe?g .*b\.jpe?g"):
        find_pairs(str(folder), "val")


def test_find_pairs__what_has_no_partner_is_counted(masks, caplog):
    folder = masks(names=("a", "b", "c", "d"))
    (folder / "masks" / "train" / "b.png").unlink()
    (folder / "masks" / "train" / "c.png").unlink()
    (folder / "images" / "train" / "d.jpg").unlink()
    assert [pair.image.name for pair in find_pairs(str(folder), "train")] == ["a.jpg"]
    first, second = caplog.messages
    assert "2 images of train without mask" in first
    assert "train/b.jpg" in first
    assert "1 masks of train without image" in second
    assert "train/d.png" in second


def test_find_pairs__names_that_never_meet(masks):
    folder = masks()
    for mask in (folder / "masks" / "train").iterdir():
        mask.rename(mask.with_stem(mask.stem + "_labels"))
    with pytest.raises(DataError, match=r"a\.jpg.*a_labels\.png"):
        find_pairs(str(folder), "train")


def test_find_pairs__folders_dots_and_capital_letters(tmp_path):
    for name, suffix in (("aachen/x.01", "PNG"), ("x.01", "png"), ("x.02", "Png")):
        _image(tmp_path / "Images".lower() / "Train" / f"{name}.JPG", format="JPEG")
        path = tmp_path / "masks" / "training" / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_stripes(1, 2)).save(path, format="PNG")
    pairs = find_pairs(str(tmp_path), "train")
    assert len(pairs) == 3
    for pair in pairs:
        assert pair.image.relative_to(tmp_path / "images" / "Train").with_suffix("") == (
            pair.mask.relative_to(tmp_path / "masks" / "training").with_suffix("")
        )


def test_find_pairs__other_layout_says_what_is_there(tmp_path):
    _image(tmp_path / "JPEGImages" / "a.jpg")
    with pytest.raises(DataError, match=r"images/train.*JPEGImages"):
        find_pairs(str(tmp_path), "train")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="train"):
        find_pairs(str(tmp_path), "train")


def test_segmentation__score_says_how_many_classes_it_is_of(colours, masks):
    (score,) = Segmentation(str(masks(val=_stripes(0, 2))), 16, steps=2, ignore=()).run(colours(4))
    assert score.details == {"classes": 2, "ignored": "nothing"}
    assert score.num_samples == 2
