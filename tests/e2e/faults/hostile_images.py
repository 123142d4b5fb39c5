"""Images that are broken, bombs, or no images at all, from a seed."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from random import Random

from PIL import Image, PngImagePlugin

SIDE = 48


def images(draw: Random) -> Iterator[tuple[str, str, bytes]]:
    """Yield a description, a file name, and the bytes of an image."""
    wholes = list(_every_mode())
    for mode, suffix, data in wholes:
        yield f"{mode} {suffix}", f"a.{suffix}", data
    for number in range(50):
        mode, suffix, data = draw.choice(wholes)
        yield f"damaged {number} {mode} {suffix}", f"a.{suffix}", _damaged(data, draw)
    for name, data in [*_bombs(), *_lies(), *_exif(), *_animations()]:
        yield name, "a.png", data
    for name, data in _impostors():
        yield name, "a.jpg", data
    for name in ("a\nINJECTED.png", "-rf.png", "\u202egnp.png", "a" * 250 + ".png", "..png",
                 "\udcff.png", "\x1b[31mINJECTED.png", "a.b.c.png", " .png",
                 "%s%n.png"):  # fmt: skip
        yield f"called {name[:20]!r}", name, wholes[0][2] if "INJ" not in name else b"no image"


def saved(image: Image.Image, form: str, **options) -> bytes:
    """Return an image in a format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _every_mode() -> Iterator[tuple[str, str, bytes]]:
    gradient = Image.linear_gradient("L").resize((SIDE, SIDE))
    for form, suffix, modes in (
        ("PNG", "png", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("JPEG", "jpg", ("L", "RGB", "CMYK")),
        ("TIFF", "tif",
        ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")),
        ("GIF", "gif", ("1", "L", "P", "RGB")),
        ("BMP", "bmp", ("1", "L", "P", "RGB", "RGBA")),
        ("WEBP", "webp", ("RGB", "RGBA")),
    ):  # fmt: skip
        for mode in modes:
            through = gradient.convert("RGB") if mode in ("LAB", "P") else gradient
            image = Image.new(mode, (SIDE, SIDE)) if mode == "LAB" else through.convert(mode)
            yield mode, suffix, saved(image, form)


def _damaged(data: bytes, draw: Random) -> bytes:
    """Flip some bytes, mostly of the header, or cut."""
    changed = bytearray(data)
    if draw.random() < 0.3:
        return bytes(changed[: draw.randrange(len(changed))])
    for _ in range(draw.choice((1, 1, 3, 10))):
        end = draw.choice((64, len(changed)))
        changed[draw.randrange(min(end, len(changed)))] = draw.randrange(256)
    return bytes(changed)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *, bits: int = 1, before: bytes = b"") -> bytes:
    """Return a grey PNG that says it has a size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Yield small files that become large, or say so."""
    small = zlib.compress(bytes(10**7), 9)
    yield "PNG of 50,000x50,000 in 10 kB", png(50_000, 50_000, small)
    yield "whole PNG of 20,000x20,000", png(20_000, 20_000, zlib.compress(bytes(20_000 * 2501), 9))
    yield "whole PNG of 10,000x10,000", png(10_000, 10_000, zlib.compress(bytes(10_000 * 1251), 9))
    yield "PNG of 2^31-1 rows", png(64, 2**31 - 1, small)
    yield "PNG of 0x0", png(0, 0, small)
    yield "PNG of 100,000x32", png(100_000, 32, zlib.compress(bytes(32 * 12_501), 9))
    own = zlib.compress(bytes(SIDE * (SIDE // 8 + 1)))
    text = zlib.compress(bytes(2 * 10**8), 9)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        yield (
            f"PNG with a bomb in {kind.decode()}",
            png(SIDE, SIDE, own, before=chunk(kind, head + text)),
        )
    yield (
        "PNG with 10,000 texts",
        png(SIDE, SIDE, own, before=chunk(b"tEXt", b"a\0" + b"x" * 999) * 10_000),
    )
    yield (
        "GIF of 65,535x65,535",
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
    )
    jpeg = bytearray(saved(Image.new("L", (SIDE, SIDE)), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = b"\xff" * 4
    yield "JPEG of 65,535x65,535", bytes(jpeg)
    jpeg[place : place + 4] = struct.pack(">HH", 9000, 9000)
    yield "JPEG that lacks 80 million pixels", bytes(jpeg)
    webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff"
    yield "WEBP of 16,777,216 squared", webp + b"VP8 \0\0\0\0"


def _lies() -> Iterator[tuple[str, bytes]]:
    """Yield headers that contradict their content."""
    for width, height, bits in (
        (2**31 - 1, 1, 24),
        (SIDE, -SIDE, 24),
        (-1, -1, 8),
        (SIDE, SIDE, 3),
    ):
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 2**32 - 1, 0)
        yield f"BMP of {width}x{height}x{bits}", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    for name, tags, following in (
        ("loop", ((256, 4, 1, SIDE), (257, 4, 1, SIDE)), 8),
        ("strips", ((256, 4, 1, SIDE), (257, 4, 1, SIDE), (273, 4, 2**31, 8), (279, 4, 2**31, 8)),
        0),
        ("negative", ((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), (273, 4, 1, 0)), 0),
        ("compression", ((256, 4, 1, SIDE), (257, 4, 1, SIDE), (259, 3, 1, 65535)), 0),
    ):  # fmt: skip
        body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        yield (
            f"TIFF {name}",
            b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", following),
        )
    yield (
        "PNG whose chunk lies about its length",
        png(SIDE, SIDE, b"x").replace(b"\0\0\0\1IDAT", b"\x7f\xff\xff\xffIDAT"),
    )
    yield "GIF without end", b"GIF89a\x30\0\x30\0\x80\0\0" + b"!\xfe\xff" * 1000


def _exif() -> Iterator[tuple[str, bytes]]:
    image = Image.new("RGB", (SIDE, SIDE))
    for orientation in (0, 1, 6, 8, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"EXIF orientation {orientation}", saved(image, "JPEG", exif=exif)
    head = b"Exif\0\0MM\0*\0\0\0\x08"
    entry = struct.pack(">HHII", 0x8769, 4, 1, 8)  # a sub-directory that is its parent
    yield "EXIF loop", saved(image, "JPEG", exif=head + b"\0\1" + entry + struct.pack(">I", 8))
    huge = struct.pack(">HHII", 0x0112, 3, 2**31, 2**31)
    yield "EXIF with a huge count", saved(image, "JPEG", exif=head + b"\0\1" + huge + bytes(4))
    yield "EXIF rubbish", saved(image, "JPEG", exif=b"Exif\0\0" + b"\xff" * 60_000)


def _animations() -> Iterator[tuple[str, bytes]]:
    frames = [Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)) for shade in range(0, 250, 10)]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        yield f"animated {form}", saved(frames[0], form, save_all=True, append_images=frames[1:])
    info = PngImagePlugin.PngInfo()
    info.add_text("a\nINJECTED", "b\nINJECTED")
    yield "PNG with text of several lines", saved(frames[0], "PNG", pnginfo=info)


def _impostors() -> Iterator[tuple[str, bytes]]:
    """Yield what is no image, or an image and something else."""
    good = saved(Image.new("RGB", (SIDE, SIDE)), "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil", "x")
    script = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    entity = b"<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><svg>&a;</svg>"
    yield from {
        "nothing": b"", "one byte": b"\xff", "zeros": bytes(10**6), "text": b"no image\n" * 100,
        "SVG": script, "SVG with an entity": entity, "HTML": b"<html><img src=x></html>",
        "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(evil) run",
        "ICO": saved(Image.new("RGB", (SIDE, SIDE)), "ICO"), "zip": archive.getvalue(),
        "PPM": b"P6 99999 99999 255\n", "XBM": b"#define a_width 48\n#define a_height 48\n",
        "PNG and zip": good + archive.getvalue(), "GIF and script": b"GIF89a/*" + bytes(50) + b"*/",
        "PNG and rubbish": good + b"\xff" * 10_000, "only a signature": good[:8],
        "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 30_000,
        30_000) + b"\0\x08\0\3",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "DICOM": bytes(128) + b"DICM",
    }.items()  # fmt: skip
