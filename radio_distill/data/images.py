"""From the bytes of one image to its pixels; views of it are :mod:`.rendering`'s.

Pillow reads every header, and libjpeg-turbo (by simplejpeg) the pixels of JPEGs in which nothing is
amiss; all others are Pillow's, which says what is damaged. Both give a JPEG the same pixels.

Only formats whose decoders are common and whose size stands in the header are read; AVIF where
Pillow was built with it, HEIC where pillow-heif is installed. Colour profiles
are ignored, as the data pipelines of CLIP, SigLIP and DINO do. What changes colours comes later, on
the device and alike for all encoders (:mod:`radio_distill.distill.colours`).
"""

import io
import struct
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import GifImagePlugin, Image, TiffImagePlugin
from torch import Tensor

from ..errors import DataError
from ..system.files import open_regular, printable, reason_of

SUFFIX_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further images behind it, from cameras
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
    "HEIF": "heic",
}
ARRAY_SUFFIXES = ("npy", "npz")
"""Suffixes of images that are arrays, in shards and folders of ``data.bands``."""
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("jfif", "jfi", "jif", "jpe", "pjpeg", "pjp", "apng", "avif", "heic", "heif", "hif"),
)
"""Suffixes of members of shards that are images, the first being preferred where two bear one name.

They do not depend on what this machine can decode, for an index is used by others too.
"""
_HEIC_SUFFIXES = ("heic", "heif", "hif")
_NEEDED = {
    "avif": "Pillow with AVIF: pip install 'pillow>=11.3'",
    **dict.fromkeys(_HEIC_SUFFIXES, "pillow-heif: pip install pillow-heif"),
}
MAX_PIXELS = 100_000_000
MAX_MEMBER_BYTES = 256 << 20
"""Largest file in a shard or in a folder of images that is read, in bytes."""
FIELD_OF_KIND = {"too_small": "data.min_size", "too_large": "data.max_pixels"}
"""The field whose limit an image of this kind of badness is beyond."""

_LONGEST_MAGIC = 64  # bytes that tell formats apart
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG opens MPO too
_NO_IMAGES = {  # what stands in place of images, by the first bytes
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML file",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF file",
    b"8bps": "a Photoshop file",
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cjxl ": "a JPEG XL image",
    b"\0\0\0\x0cjp": "a JPEG 2000 image",
    b"pk\3\4": "a zip file",
    b"\x1f\x8b": "a gzip file",
    b"\x93numpy": "an array, which data.bands reads",
    b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched",
}
_ORIENTATION = 0x0112  # tag of EXIF
_TURNS_JPEGS = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
"""What Pillow's ``getexif`` looks at; it takes a fiftieth of a decoding to find none of them."""
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: partial(np.rot90, k=2),
    4: np.flipud,
    5: partial(np.swapaxes, axis1=0, axis2=1),
    6: partial(np.rot90, k=-1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
_JPEG_PIXELS_PER_BYTE = 512
"""Huffman codes take a bit at least for each block of 8x8 pixels. What is missing at the end of a
JPEG libjpeg makes up in grey, and no one is told."""
_MOST_COMMENTS = 4096  # blocks of 255 bytes: a megabyte before an image, and half a second


class BadImageError(DataError):
    """One image that cannot be used; the run goes on without it.

    Args:
        kind: under which it counts: ``undecodable``, ``too_small`` or ``too_large``, and of bytes
            out of shards ``checksum``, ``unreadable`` or ``stalled``.
        reason: what is wrong, for the log.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def decode_image(data: bytes) -> Image.Image:
    """Decode an image as :func:`decode_pixels` does, for those who draw or resize with Pillow."""
    return Image.fromarray(decode_pixels(data).permute(1, 2, 0).numpy())


def decode_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS, min_size: int = 1) -> Tensor:
    """Decode an image to upright 8-bit RGB, ``[3, H, W]`` uint8, channels last.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled, and of an
    animation the first frame is taken. Size is judged by the header, before any pixel is decoded.
    Where ``max_pixels`` lets an image in that Pillow warns of, Pillow's limit is raised to it.

    Raises:
        BadImageError: not decodable or truncated; shortest side below ``min_size``; more than
            ``max_pixels``.
    """
    image = open_header(data)
    width, height = image.size
    check_extent(image.size, max_pixels, min_size)
    is_jpeg = image.format in ("JPEG", "MPO")
    if is_jpeg and width * height > _JPEG_PIXELS_PER_BYTE * len(data):
        reason = f"header claims {width}x{height} pixels, more than {len(data)} bytes can hold"
        raise BadImageError("undecodable", reason)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # else each crop would warn, or fail
    try:
        pixels = _flawless_jpeg(data, image) if is_jpeg else None
        if pixels is None:
            image.load()
            pixels = np.array(_to_rgb(image))
        return torch.from_numpy(upright(pixels, image)).permute(2, 0, 1)
    except BadImageError:
        raise
    except Exception as error:  # decoders fail on hostile bytes with nearly any exception
        raise BadImageError("undecodable", _reason(error)) from error


def check_extent(size: tuple[int, int], max_pixels: int, min_size: int) -> None:
    """Raise BadImageError for a (width, height) that is too large or too small."""
    width, height = size
    if width * height > max_pixels:
        raise BadImageError("too_large", f"{width}x{height} pixels, more than {max_pixels}")
    if min(size) < min_size:
        raise BadImageError("too_small", f"{width}x{height}, shortest side below {min_size}")


def _flawless_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """Decode a JPEG to RGB ``[H, W, 3]``; None for one that Pillow must judge, or convert.

    Args:
        data: the file.
        image: its header. The pixels must fit into what it says, so that a second header
            costs nothing.
    """
    if image.mode not in ("RGB", "L"):
        return None
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    try:
        decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels, strict=True)
    except ValueError:  # also of what libjpeg only warns of
        return None
    return pixels if decoded.shape == pixels.shape else None


def read_image(path: Path) -> bytes:
    """Read a file of a folder; raises BadImageError where it is too large, or no file at all."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise BadImageError("unreadable", reason_of(error)) from error
    if len(data) > MAX_MEMBER_BYTES:
        raise BadImageError("too_large", f"more than {MAX_MEMBER_BYTES} bytes")
    return data


def image_suffix(data: bytes) -> str:
    """Return the file suffix that fits the bytes of an image, whatever its file was called."""
    return SUFFIX_OF_FORMAT[open_header(data).format or ""]


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of images that this installation decodes, in lower case."""
    lacking: set[str] = set()
    if "AVIF" not in _formats():
        lacking.add("avif")
    if "HEIF" not in _formats():
        lacking.update(_HEIC_SUFFIXES)
    return frozenset(IMAGE_SUFFIXES) - lacking


def what_reads(suffix: str) -> str:
    """Return the package that decodes images of a suffix, and how to get it; else nothing."""
    return _NEEDED.get(suffix.lower().removeprefix("."), "")


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are read: a list of what is allowed, not of what Pillow can."""
    formats = list(_FORMATS)
    Image.init()
    bound_older_pillow()
    if "AVIF" in Image.OPEN:  # also where Pillow has no decoder; then its open says so
        from PIL import AvifImagePlugin

        if AvifImagePlugin.SUPPORTED:
            formats.append("AVIF")
            # Else each image takes a thread a core, in each of the decoding processes.
            AvifImagePlugin.DEFAULT_MAX_THREADS = AvifImagePlugin.DEFAULT_MAX_THREADS or 1
    if find_spec("pillow_heif") is not None:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    return tuple(formats)


class Shape(NamedTuple):
    """Size of an image file, and how EXIF says it is to be turned."""

    stored: tuple[int, int]
    """(width, height) of the pixels in the file."""
    orientation: int
    """EXIF's, from 1 (as stored) to 8."""

    @property
    def turned(self) -> bool:
        """True where width and height change places."""
        return self.orientation >= 5

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as :func:`decode_image` gives it."""
        return (self.stored[1], self.stored[0]) if self.turned else self.stored


def image_shape(file: BinaryIO) -> Shape:
    """Read size and orientation out of a header; raises BadImageError for what is no image."""
    image = _open_file(file)
    return Shape(image.size, _orientation(image))


def open_header(data: bytes) -> Image.Image:
    """Read the header of an image alone; raises BadImageError for what is none."""
    return _open_file(io.BytesIO(data))


def _open_file(file: BinaryIO) -> Image.Image:
    """Read the header of an image.

    As ``Image.open`` does, without its warning and its limit: the caller judges the size.
    """
    failure: Exception | None = None
    start = file.read(_LONGEST_MAGIC)
    for name in _formats():
        factory, accept = Image.OPEN[name]
        try:
            if accept is None or accept(start[:16]) is True:
                file.seek(0)
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # not of this format
        except Exception as error:  # decoders fail on hostile bytes with nearly any exception
            failure = error
    if failure is not None:
        raise BadImageError("undecodable", _reason(failure)) from failure
    raise BadImageError("undecodable", _what_it_is(start))


def _what_it_is(data: bytes) -> str:
    """Say of bytes in no known format what they are, where their beginning tells."""
    if data[4:8] == b"ftyp":
        suffix = "avif" if data[8:12] in (b"avif", b"avis") else "heic"
        needed = "" if suffix in readable_suffixes() else _NEEDED[suffix]
        if needed:
            return f"not an image in a known format; {suffix.upper()} needs {needed}"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((text for magic, text in _NO_IMAGES.items() if start.startswith(magic)), "")
    if not data.strip(b"\0"):
        kind = "only zeros" if data else "empty"
    return "not an image in a known format" + (f", but {kind}" if kind else "")


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turn the pixels of an image, ``[H, W]`` or ``[H, W, 3]``, as its EXIF says."""
    orientation = _orientation(image)
    return pixels if orientation == 1 else np.ascontiguousarray(_UPRIGHT[orientation](pixels))


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation; 1, as stored, where there is none that makes sense."""
    if image.format == "JPEG" and image.info.keys().isdisjoint(_TURNS_JPEGS):
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF is frequent on the web, and the pixels are fine
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(image)
    if image.mode == "F":
        raise BadImageError("undecodable", "floating point pixels have no known range")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255 and gives a white image.
    grey = np.asarray(image).astype(np.int32).clip(0, 65535)
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


def bound_older_pillow() -> None:
    """Bound Pillow 12.3, the last of Python 3.10, as versions from 13 on bound themselves.

    Without it a directory of a few kB, whose tags all claim the same bytes, is read into gigabytes,
    and a long comment of a GIF takes time by the square of its length.
    """
    if int(Image.__version__.partition(".")[0]) >= 13:
        return
    load = TiffImagePlugin.ImageFileDirectory_v2.load
    block = GifImagePlugin.GifImageFile.data

    def load_within(self: TiffImagePlugin.ImageFileDirectory_v2, fp: IO[bytes]) -> None:
        load(self, ReadOnce(fp))  # type: ignore[arg-type]

    def block_within(self: GifImagePlugin.GifImageFile) -> bytes | None:
        self.blocks = getattr(self, "blocks", 0) + 1  # type: ignore[attr-defined]
        if self.blocks > _MOST_COMMENTS:  # type: ignore[attr-defined]
            raise ValueError(f"more than {_MOST_COMMENTS} blocks of comments")
        return block(self)

    TiffImagePlugin.ImageFileDirectory_v2.load = load_within  # type: ignore[method-assign]
    GifImagePlugin.GifImageFile.data = block_within  # type: ignore[method-assign]


class ReadOnce:
    """A file that gives as many bytes as it has, wherever they are read, and then none."""

    def __init__(self, file: IO[bytes]):
        self.tell, self.seek = file.tell, file.seek
        self._read = file.read
        start = file.tell()
        self._left = file.seek(0, 2)
        file.seek(start)

    def read(self, size: int) -> bytes:
        data = self._read(min(size, self._left))
        self._left -= len(data)
        return data
