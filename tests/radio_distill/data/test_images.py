import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from radio_distill.config import DataConfig
from radio_distill.data.images import (
    BadImageError,
    decode_image,
    decode_pixels,
    image_suffix,
    readable_suffixes,
)
from radio_distill.data.order import view_generator
from radio_distill.data.rendering import random_origin, render, to_float
from radio_distill.types import ViewOrigin

CONFIG = DataConfig(shards=())
BICUBIC = Image.Resampling.BICUBIC


def gradient(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    row, column = np.mgrid[0:height, 0:width]
    pixels = np.stack([column * 255 // width, row * 255 // height, 0 * row], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def tensor_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_view(image, size, config, generator):
    origin = random_origin((image.height, image.width), size, config, generator)
    return render(tensor_of(image), origin, size), origin


def by_pillow(image: Image.Image, origin: ViewOrigin, size, crop=(0, 0, 1, 1)) -> torch.Tensor:
    """The view as Pillow alone makes it: cut, flip, resize across, then down."""
    right, bottom = origin.left + origin.width, origin.top + origin.height
    view = image.crop((origin.left, origin.top, right, bottom))
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if origin.flipped else view
    top, left, height, width = crop
    shares = np.array([left, top, left + width, top + height])
    box = shares * (view.width, view.height, view.width, view.height)
    across = view.resize((size[1], view.height), BICUBIC, (box[0], 0, box[2], view.height))
    return tensor_of(across.resize(size[::-1], BICUBIC, (0, box[1], size[1], box[3])))


def photographs(real: Path, count: int) -> list[bytes]:
    """The bytes of some real JPEGs."""
    paths = sorted(real.rglob("*.jpg"))
    return [path.read_bytes() for path in paths[:: len(paths) // count][:count]]


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, lambda x: np.rot90(x)),
        (77, lambda x: x),
    ],
)
def test_decode_image__exif_orientation(encode, orientation, undo):
    stored = gradient(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encode(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(pixels_of(upright), undo(pixels_of(stored)))


def test_decode_image__damaged_exif_is_ignored(encode):
    data = encode(gradient(16, 16), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode_image(data).size == (16, 16)


def test_decode_image__sixteen_bit_grey_is_scaled_not_clipped(encode):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    expected = np.repeat((ramp / 257).round().astype(int)[..., None], 3, axis=-1)
    for kind in ("PNG", "TIFF"):
        image = decode_image(encode(Image.fromarray(ramp), kind))
        np.testing.assert_array_equal(pixels_of(image), expected)


def test_decode_image__transparency_goes_on_white(encode):
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    half.putpixel((0, 0), (200, 0, 0, 255))
    half.putpixel((1, 0), (200, 0, 0, 51))  # a fifth of red on four fifths of white
    pixels = pixels_of(decode_image(encode(half)))
    np.testing.assert_array_equal(pixels[0, 0], [200, 0, 0])
    np.testing.assert_allclose(pixels[0, 1], [244, 204, 204], atol=1)
    np.testing.assert_array_equal(pixels[1], 255)


def test_decode_image__palette_with_transparent_entry(encode):
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    pixels = pixels_of(decode_image(encode(palette, transparency=0)))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [10, 20, 30]])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_decode_image__animation_gives_first_frame(encode, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    np.testing.assert_allclose(pixels_of(decode_image(data))[8, 8], [255, 0, 0], atol=8)


def test_decode_image__limits_are_inclusive(encode):
    data = encode(1, size=(40, 50))
    assert decode_pixels(data, max_pixels=2000, min_size=40).shape == (3, 40, 50)
    with pytest.raises(BadImageError, match=r"50x40.*1999") as error:
        decode_pixels(data, max_pixels=1999, min_size=1)
    assert error.value.kind == "too_large"
    with pytest.raises(BadImageError, match="41") as error:
        decode_pixels(data, max_pixels=2000, min_size=41)
    assert error.value.kind == "too_small"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_image__truncated(encode, kind):
    data = encode(3, kind, size=(64, 64))
    decode_image(data)
    with pytest.raises(BadImageError) as error:
        decode_image(data[: len(data) // 2])
    assert error.value.kind == "undecodable"
    assert "\n" not in str(error.value)


def test_decode_image__floating_point_is_refused(encode):
    with pytest.raises(BadImageError, match="floating point"):
        decode_image(encode(Image.new("F", (8, 8)), "TIFF"))


@given(st.data())
def test_decode_image__damage_gives_a_image_or_a_bad_image(data):
    buffer = io.BytesIO()
    gradient(24, 24).save(
        buffer, data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]))
    )
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_pixels(bytes(raw), max_pixels=100_000)
    except BadImageError:
        return
    assert len(pixels) == 3


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_image_suffix__follows_the_bytes(encode, kind, suffix):
    assert image_suffix(encode(1, kind)) == suffix


def test_decode_image__avif_where_pillow_can(encode):
    if "avif" not in readable_suffixes():
        pytest.skip("Pillow without AVIF")
    data = encode(gradient(20, 30), "AVIF", quality=95)
    np.testing.assert_allclose(pixels_of(decode_image(data)), pixels_of(gradient(20, 30)), atol=16)
    assert image_suffix(data) == "avif"
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(gradient(20, 30), "AVIF", exif=exif)).size == (20, 30)


def test_decode_image__heic_where_pillow_heif_is(encode):
    pytest.importorskip("pillow_heif")
    assert {"heic", "heif", "hif"} <= readable_suffixes()
    data = encode(gradient(20, 30), "HEIF", quality=95)
    np.testing.assert_allclose(pixels_of(decode_image(data)), pixels_of(gradient(20, 30)), atol=16)
    assert image_suffix(data) == "heic"


def test_decode_image__heic_says_what_reads_it():
    if "heic" in readable_suffixes():
        pytest.skip("pillow-heif is installed")
    with pytest.raises(BadImageError, match="pip install pillow-heif"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(900))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"%PDF-1.4", "a PDF file"),
        (bytes(50), "only zeros"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    ],
)
def test_decode_image__says_what_is_no_image(data, kind):
    with pytest.raises(BadImageError, match=f"{kind}"):
        decode_image(data)


@pytest.mark.filterwarnings("error")
def test_decode_image__the_limit_is_ours_alone(encode, monkeypatch):
    """Neither Pillow's limit nor its warning comes before or after ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    large, data = gradient(40, 50), encode(gradient(40, 50))
    with pytest.raises(BadImageError, match=r"50x40.*1999"):
        decode_pixels(data, max_pixels=1999)
    image = Image.fromarray(decode_pixels(data, max_pixels=2000).permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(pixels_of(image.crop((0, 0, 50, 40))), pixels_of(large))


def test_decode_pixels__of_a_jpeg_are_pillows(real):
    for data in photographs(real, 40):
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        found = decode_pixels(data)
        assert found.is_contiguous(memory_format=torch.channels_last) or found.stride(0) == 1
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 5},
        {"optimize": True, "restart_marker_blocks": 2},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_pixels__any_jpeg_is_as_pillow_decodes_it(mode, options):
    buffer = io.BytesIO()
    gradient(37, 51).convert(mode).save(buffer, "JPEG", **options)
    expected = Image.open(buffer).convert("RGB")
    assert torch.equal(decode_pixels(buffer.getvalue()), tensor_of(expected))


def test_decode_pixels__a_jpeg_with_faults_is_what_pillow_makes_of_it(real):
    """Of stray bytes libjpeg warns; Pillow takes the image as it is, and so do we."""
    data = bytearray(photographs(real, 1)[0])
    data[len(data) // 2] ^= 0xFF
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert torch.equal(decode_pixels(bytes(data)), tensor_of(expected))


def test_render__differs_from_pillow_by_rounding(real):
    """The same crop, by another resampler of the same filter.

    Pillow goes down first where that is less work, and rounds and clips in between; this alone
    moves a few pixels at sharp edges by more, see docs/results/decoding.md.
    """
    most, means = 0, []
    for position, data in enumerate(photographs(real, 24)):
        image = decode_image(data)
        for size in ((224, 224), (432, 432), (96, 64)):
            view, origin = random_view(image, size, CONFIG, view_generator(5, position))
            difference = (view.int() - by_pillow(image, origin, size)).abs()
            most = max(most, int(difference.max()))
            means.append(float(difference.float().mean()))
    assert most <= 2
    assert np.mean(means) <= 0.02


@pytest.mark.parametrize("flipped", [False, True])
def test_render__part_is_that_of_the_flipped_view(flipped):
    image, crop = gradient(60, 80), (0.1, 0.25, 0.5, 0.75)
    origin = ViewOrigin((60, 80), 3, 7, 50, 70, flipped)
    found = render(tensor_of(image), origin, (20, 30), crop)
    assert (found.int() - by_pillow(image, origin, (20, 30), crop)).abs().max() <= 1


def test_render__antialiases_as_exact_numbers_do():
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    )
    view = render(tensor_of(image), ViewOrigin((160, 160), 0, 0, 160, 160), (20, 20))
    exact = torch.nn.functional.interpolate(
        tensor_of(image)[None].float(), (20, 20), mode="bicubic", antialias=True
    )[0]
    assert (view - exact).abs().max() <= 1


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    position=st.integers(0, 1 << 40),
)
def test_random_view__crop_lies_inside_and_fills_the_view(height, width, size, position):
    image = Image.new("RGB", (width, height))
    view, origin = random_view(image, size, CONFIG, view_generator(0, position))
    assert view.shape == (3, *size)
    assert view.dtype == torch.uint8
    assert origin.source_size == (height, width)
    assert 0 <= origin.top < origin.top + origin.height <= height
    assert 0 <= origin.left < origin.left + origin.width <= width


def test_random_view__keeps_to_scale_and_ratio():
    image, size = Image.new("RGB", (1000, 800)), (10, 15)
    origins = [random_view(image, size, CONFIG, view_generator(1, p))[1] for p in range(300)]
    shares = np.array([origin.height * origin.width / 800_000 for origin in origins])
    distortions = np.array([origin.width / origin.height / 1.5 for origin in origins])
    assert 0.499 < shares.min() < 0.52
    assert shares.max() > 0.85
    assert distortions.min() > 0.745
    assert distortions.max() < 1.345
    assert 110 < sum(origin.flipped for origin in origins) < 190  # 4.6 standard deviations


def test_random_view__flip_mirrors_the_crop():
    image = gradient(50, 50)
    always, never = (DataConfig(shards=(), flip=p) for p in (1.0, 0.0))
    flipped, _ = random_view(image, (25, 25), always, view_generator(0, 7))
    plain, origin = random_view(image, (25, 25), never, view_generator(0, 7))
    assert not origin.flipped
    assert (flipped.flip(-1).int() - plain.int()).abs().max() <= 1


def test_random_view__takes_the_middle_where_no_crop_fits():
    _, origin = random_view(gradient(1, 300), (50, 50), CONFIG, view_generator(0, 0))
    assert (origin.top, origin.left, origin.height, origin.width) == (0, 149, 1, 1)


def test_to_float__spans_zero_to_one():
    pixels = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(pixels, torch.tensor([0.0, 0.2, 1.0]))
