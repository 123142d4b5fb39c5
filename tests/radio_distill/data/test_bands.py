"""Arrays of any number of bands: what is read of them, how, and where they are images."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.config import DataConfig
from radio_distill.data.bands import decode, suffix_of
from radio_distill.data.images import BadImageError, decode_pixels
from radio_distill.data.rendering import render
from radio_distill.data.tar_scan import scan_shard
from radio_distill.types import ViewOrigin

SCENE = np.random.default_rng(0).integers(0, 2**16, (40, 50, 5), dtype=np.uint16)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(*arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *arrays)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def read(data: bytes, bands: int = 5, **fields) -> np.ndarray:
    return decode(data, DataConfig(shards=(), bands=bands, **fields)).permute(1, 2, 0).numpy()


def test_decode__the_same_scene_in_every_file():
    first = np.moveaxis(SCENE, 2, 0)
    files = {
        "npy": [npy(SCENE), npy(first), npy(np.asfortranarray(SCENE)), npy(SCENE.astype(">u2"))],
        "npz": [npz(SCENE), npz(first)],
        "tif": [
            tiff(SCENE, planarconfig="contig", photometric="minisblack"),
            tiff(first, photometric="minisblack"),  # a page for each band
            tiff(first, photometric="minisblack", compression="zlib", bigtiff=True),
        ],
    }
    expected = np.rint(SCENE / 257).astype(np.uint8)
    for suffix, contents in files.items():
        for data in contents:
            assert suffix_of(data) == suffix
            np.testing.assert_array_equal(read(data), expected)


def test_decode__the_size_of_a_photograph_is_judged_by_its_header(encode):
    data = bytearray(encode(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">II", 12_000, 12_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(BadImageError) as error:
        read(bytes(data), 1)
    assert error.value.kind == "too_large", "not undecodable, which it is as well"


def test_decode__ranges_become_0_to_255_and_what_lies_beyond_is_clipped():
    low, high = np.arange(5) * 1000.0, np.arange(5) * 1000.0 + 5000
    expected = np.rint(((SCENE - low) / (high - low)).clip(0, 1) * 255)
    pairs = tuple(zip(low.tolist(), high.tolist(), strict=True))
    for dtype in (np.uint16, np.float32, np.int64):
        np.testing.assert_array_equal(read(npy(SCENE.astype(dtype)), band_range=pairs), expected)
    one = read(npy(SCENE), band_range=((0.0, 4000.0),))
    np.testing.assert_array_equal(one, np.rint((SCENE / 4000).clip(0, 1) * 255))


def test_decode__photographs_as_they_are_and_without_a_change_of_colours(encode):
    grey = np.random.default_rng(1).integers(0, 256, (40, 48), dtype=np.uint8)
    np.testing.assert_array_equal(read(encode(Image.fromarray(grey)), 1)[..., 0], grey)
    four = np.random.default_rng(2).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    np.testing.assert_array_equal(read(encode(Image.fromarray(four)), 4), four)
    deep = SCENE[..., 0]
    np.testing.assert_array_equal(
        read(encode(Image.fromarray(deep)), 1)[..., 0], np.rint(deep / 257)
    )
    photograph = encode(0)
    assert torch.equal(decode(photograph, DataConfig(shards=())), decode_pixels(photograph))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(SCENE[..., :4]), "data.bands is 5"),
        (npy(SCENE[0]), "data.bands is 5"),
        (npy(np.zeros((5, 40, 5), np.uint8)), "which axis"),
        (npy(SCENE.astype(np.float32)), "data.band_range"),
        (npy(np.array([{}])), "pickle"),
        (npy(SCENE)[:-10], "reading array data"),
        (npz(SCENE, SCENE), "2 arrays"),
        (npy(SCENE[:20]), "shortest side"),
        (b"no image at all", "not an image"),
    ],
)
def test_decode__what_cannot_be_used_is_a_bad_image(data, reason):
    with pytest.raises(BadImageError, match=reason):
        read(data)


def test_decode__numbers_that_are_none_are_no_pixels():
    holes = SCENE.astype(np.float32)
    holes[3, 4, 1] = np.nan
    with pytest.raises(BadImageError, match="not finite"):
        read(npy(holes), band_range=((0.0, 4000.0),))


@pytest.mark.parametrize("crop", [None, (0.1, 0.2, 0.55, 0.6)])
@pytest.mark.parametrize("flipped", [False, True])
def test_render__each_band_is_what_it_would_be_in_a_photograph(crop, flipped):
    image = torch.from_numpy((SCENE >> 8).astype(np.uint8)).permute(2, 0, 1)
    origin = ViewOrigin((40, 50), 3, 5, 30, 40, flipped)
    view = render(image, origin, (16, 24), crop)
    grey = [torch.stack([band] * 3, -1).permute(2, 0, 1) for band in image]
    alone = [render(photograph, origin, (16, 24), crop)[0] for photograph in grey]
    assert torch.equal(view, torch.stack(alone))


def test_scan__arrays_are_images_only_in_a_shard_that_has_no_others(tmp_path, encode, write_tar):
    arrays = {"a.npy": npy(SCENE), "a.json": b"{}", "b.npz": npz(SCENE)}
    contents = scan_shard(write_tar(tmp_path / "arrays.tar", arrays))
    assert [sample.image_suffix for sample in contents.samples] == ["npy", "npz"]
    beside = {
        "a.jpg": encode(0, "JPEG"),
        "a.npy": npy(SCENE),
        "a.clip.npy": npy(SCENE),
        "b.npy": b"",
    }
    contents = scan_shard(write_tar(tmp_path / "photographs.tar", beside))
    assert [sample.image_suffix for sample in contents.samples] == ["jpg"]
    assert list(contents.left_out) == ["no_image"]
