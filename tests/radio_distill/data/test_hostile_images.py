"""Images that lie: what they cost, and what becomes of them."""

import io
import os
import resource
import struct
import zipfile
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from radio_distill.data.images import BadImageError, decode_image, readable_suffixes

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Pillow, about what is tested here
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xae\x42\x60\x82"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(size=(8, 8), bits=8, colour=2, rows=None, before=b"", after=b"") -> bytes:
    """A PNG of any header and content; ``colour`` is 0 for grey, 2 for RGB, 6 for RGBA."""
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, 0)
    rows = b"".join(b"\0" + bytes([128]) * 24 for _ in range(8)) if rows is None else rows
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return SIGNATURE + chunk(b"IHDR", header) + before + body + after + END


def noise(kind: str, size: tuple[int, int] = (64, 64), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded_in_child(data: bytes) -> tuple[str, float]:
    """What decoding comes to, and the memory in MB that it takes at most."""
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                result = str(decode_image(data).size)
            except BadImageError as error:
                result = error.kind
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(ends[1], f"{result}|{peak / 1024}".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(ends[1])
    with os.fdopen(ends[0]) as file:
        result, _, peak = file.read().partition("|")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return result, float(peak)


@cache
def bomb() -> bytes:
    """200 MB in 200 kB."""
    return zlib.compress(bytes(200 << 20), 9)


def claiming(height: int, width: int) -> bytes:
    """A JPEG of 64 x 64 whose header claims another size."""
    data = bytearray(noise("JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png((50_000, 50_000), 1, 0, rows=bytes(10_000_000)), id="1 bit"),
        pytest.param(png((50_000, 50_000), 16, 6, rows=bytes(10_000_000)), id="64 bits"),
        pytest.param(png((12_000, 12_000), 8, 2, rows=bytes(10_000_000)), id="Pillow allows it"),
        pytest.param(claiming(65_500, 65_500), id="JPEG"),
    ],
)
def test_decode_image__huge_image_costs_nothing(data):
    assert 3000 < len(data) < 11_000
    result, peak = decoded_in_child(data)
    assert result == "too_large"
    assert peak < 25


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")]
)
def test_decode_image__bomb_in_a_text_costs_little(kind, head, place):
    result, peak = decoded_in_child(png(**{place: chunk(kind, head + bomb())}))
    assert result == "undecodable"
    assert peak < 40


def test_decode_image__many_texts_cost_little():
    text = b"\0\0" + zlib.compress(bytes(1 << 20), 9)
    texts = b"".join(chunk(b"zTXt", b"%d" % number + text) for number in range(200))
    result, peak = decoded_in_child(png(before=texts))
    assert result == "undecodable"
    assert peak < 120


def test_decode_image__more_pixels_than_the_header_says():
    result, peak = decoded_in_child(png(rows=bytes(200 << 20)))
    assert result == "(8, 8)"
    assert peak < 25


def overlapping_tags(num_tags: int, size: int) -> bytes:
    """A TIFF directory of tags that all claim the same bytes: a few kB that stand for gigabytes."""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", num_tags)
    tags = (struct.pack("<HHII", tag, 7, size, 0) for tag in range(num_tags))
    return head + b"".join(tags) + bytes(4)


def with_exif(kind: str, exif: bytes) -> bytes:
    if kind == "PNG":
        return png(before=chunk(b"eXIf", exif))
    if kind == "WEBP":
        return noise("WEBP", exif=b"Exif\0\0" + exif)
    parts = [b"Exif\0\0" + exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    data = noise("JPEG")
    return data[:2] + segments + data[2:]


@pytest.mark.parametrize(
    ("kind", "expected"), [("PNG", "(8, 8)"), ("WEBP", "(64, 64)"), ("JPEG", "(64, 64)")]
)
def test_decode_image__hostile_exif_costs_little(kind, expected):
    result, peak = decoded_in_child(with_exif(kind, overlapping_tags(65_535, 700_000)))
    assert result == expected
    assert peak < 100


def test_decode_image__hostile_tags_cost_little():
    result, peak = decoded_in_child(overlapping_tags(65_535, 700_000))
    assert result == "undecodable"
    assert peak < 100


def tiff(*changes: tuple[int, int, int, int]) -> bytes:
    """A grey TIFF, 8 x 8, with some tags (number, type, count, value) changed."""
    tags = {
        256: (4, 1, 8),
        257: (4, 1, 8),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 300),
        277: (3, 1, 1),
        278: (4, 1, 8),
        279: (4, 1, 64),
    }
    tags.update({number: tuple(rest) for number, *rest in changes})
    directory = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(tags.items()))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory + bytes(4)
    return head.ljust(300, b"\0") + bytes(range(64))


@pytest.mark.parametrize(
    "changes",
    [
        [(256, 4, 1, 9000), (257, 4, 1, 9000)],
        [(259, 3, 1, 5), (256, 4, 1, 9000), (257, 4, 1, 9000)],
        [(259, 3, 1, 8), (278, 4, 1, 1 << 31)],
        [(259, 3, 1, 7), (256, 4, 1, 9000), (257, 4, 1, 9000)],
        [(277, 3, 1, 65_535)],
        [(273, 4, 1, 1 << 31)],
        [(259, 3, 1, 5), (279, 4, 1 << 30, 200)],
        [(259, 3, 1, 5), (322, 4, 1, 1 << 30), (323, 4, 1, 1 << 30), (324, 4, 1, 300)],
        [(258, 3, 1, 0)],
        [(259, 3, 1, 65_000)],
    ],
)
def test_decode_image__tiff_that_lies(changes):
    assert decode_image(tiff()).size == (8, 8)
    result, peak = decoded_in_child(tiff(*changes))
    assert result == "undecodable"
    assert peak < 130


def test_decode_image__long_comment_of_a_gif():
    """Joined block by block, 30 MB would take minutes."""
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 120_000 + b"\0"
    with pytest.raises(BadImageError):
        decode_image(head + comment + b";")


def avif(size: tuple[int, int], claimed: tuple[int, int]) -> bytes:
    """An AVIF of one colour whose header claims another size."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "AVIF", speed=10)
    data = bytearray(buffer.getvalue())
    start = data.index(b"ispe") + 8
    data[start : start + 8] = struct.pack(">II", *claimed)
    return bytes(data)


@pytest.mark.parametrize(
    ("size", "claimed", "expected", "most"),
    [
        ((64, 64), (12_000, 12_000), "too_large", 25),
        ((64, 64), (1 << 31, 1 << 31), "undecodable", 25),
        ((3000, 3000), (64, 64), "(64, 64)", 60),
    ],
)
def test_decode_image__avif_that_lies(size, claimed, expected, most):
    if "avif" not in readable_suffixes():
        pytest.skip("Pillow without AVIF")
    result, peak = decoded_in_child(avif(size, claimed))
    assert result == expected
    assert peak < most


@pytest.mark.parametrize("size", [(9000, 9000), (65_000, 100), (2000, 2000)])
def test_decode_image__jpeg_that_claims_more_than_it_can_hold(size):
    with pytest.raises(BadImageError, match=rf"{size[1]}x{size[0]} pixels.*\d+"):
        decode_image(claiming(*size))


def test_decode_image__jpeg_that_claims_less_is_cut():
    np.testing.assert_array_equal(
        np.asarray(decode_image(claiming(64, 64)))[:8, :8],
        np.asarray(decode_image(noise("JPEG")))[:8, :8],
    )
    assert decode_image(claiming(8, 8)).size == (8, 8)
    for size in ((0, 64), (64, 0)):
        with pytest.raises(BadImageError):
            decode_image(claiming(*size))


def test_decode_image__jpeg_of_two_headers():
    data, large = noise("JPEG"), claiming(9000, 9000)
    start = data.index(b"\xff\xc0")
    for first, second in ((data, large), (large, data)):
        with pytest.raises(BadImageError):
            decode_image(first[: start + 19] + second[start:])


def test_decode_image__emptiest_honest_jpeg_is_taken():
    """The bound on pixels in a byte is no obstacle to an image of one colour."""
    for options in ({}, {"progressive": True}, {"optimize": True}, {"quality": 1}):
        for mode in ("L", "RGB"):
            buffer = io.BytesIO()
            Image.new(mode, (2000, 2000)).save(buffer, "JPEG", **options)
            assert decode_image(buffer.getvalue()).size == (2000, 2000)


@pytest.mark.parametrize(
    ("bits", "colour", "pixel", "expected"),
    [
        (16, 2, b"\xff\x7f\x80\x00\x00\xff", (255, 128, 0)),
        (16, 4, b"\x80\x00\xff\xff", (128, 128, 128)),
        (16, 6, b"\xff\x7f\x80\x00\x00\xff\x00\x00", (255, 255, 255)),  # transparent, so white
        (16, 0, b"\x80\x00", (128, 128, 128)),
        (1, 0, b"\x80", (255, 255, 255)),
    ],
)
def test_decode_image__depths_of_png(bits, colour, pixel, expected):
    image = decode_image(png((1, 1), bits, colour, rows=b"\0" + pixel))
    np.testing.assert_allclose(image.getpixel((0, 0)), expected, atol=1)


def test_decode_image__cmyk_of_adobe():
    """Adobe stores CMYK inverted; its transform 2 is YCCK."""
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (255, 55, 155, 100)).save(buffer, "JPEG", quality=100)
    plain = bytearray(buffer.getvalue())
    place = plain.index(b"Adobe") + 11
    assert plain[place] == 0
    ink = np.array([255, 55, 155])
    expected = (255 - ink) * (255 - 100) / 255
    np.testing.assert_allclose(decode_image(bytes(plain)).getpixel((8, 8)), expected, atol=2)

    plain[place] = 2  # the same bytes, inverted as stored, are now Y, Cb, Cr and K
    luma, blue, red = 255 - ink.astype(float)
    rgb = np.array(
        [
            luma + 1.402 * (red - 128),
            luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            luma + 1.772 * (blue - 128),
        ]
    ).clip(0, 255)
    expected = (255 - rgb) * (255 - 100) / 255  # JFIF: C = 255 - R; inverted once more by Adobe
    np.testing.assert_allclose(decode_image(bytes(plain)).getpixel((8, 8)), expected, atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_decode_image__rotated_by_exif(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(noise(kind, (24, 40), exif=exif))
    assert upright.size == (24, 40)
    stored = np.asarray(decode_image(noise(kind, (24, 40))))
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(stored, -1))


def test_decode_image__animation_with_a_hidden_first_image():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert decode_image(buffer.getvalue()).getpixel((8, 8)) == (255, 0, 0)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.py", "print(1)")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_decode_image__polyglot_is_the_image_it_begins_with(kind):
    data = noise(kind)
    with_archive = decode_image(data + archive())
    np.testing.assert_array_equal(np.asarray(with_archive), np.asarray(decode_image(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%PDF-1.7\n",
        b"#!/bin/sh\n",
        b"\x80\x04\x95",
        b"<html>",
        archive(),
        noise("PPM"),
        noise("ICO"),
        b"8BPS" + bytes(100),
    ],
)
def test_decode_image__other_formats_are_not_even_tried(data):
    with pytest.raises(BadImageError, match="not an image in a known format"):
        decode_image(data)


def test_decode_image__reason_is_fit_for_a_log():
    bad = png(before=chunk(b"\x1b[2J", b"")[:-4] + b"\0\0\0\0")
    with pytest.raises(BadImageError) as error:
        decode_image(bad)
    assert str(error.value).isprintable()
