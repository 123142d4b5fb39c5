"""From the bytes of one picture to a view of it: decode, crop, flip, resize.

Only formats whose decoders are common and whose size stands in the header are read. Colour profiles
are ignored, as the data pipelines of CLIP, SigLIP and DINO do. There is no colour jitter: student
and teachers must see the same pixels, and the AM-RADIO recipe has none.
"""

import io
import math
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from ..types import Size, ViewOrigin
from .names import printable

SUFFIX_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind it, from cameras
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_PIXELS = 100_000_000

_FORMATS = [name for name in SUFFIX_OF_FORMAT if name != "MPO"]  # JPEG opens MPO too
_ORIENTATION = 0x0112  # tag of EXIF
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_PIXELS_PER_BYTE = 512
"""Huffman codes take a bit at least for each block of 8x8 pixels. What is missing at the end of a
JPEG libjpeg makes up in grey, and no one is told."""
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


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


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, min_size: int = 1) -> Image.Image:
    """Decode a picture to upright 8-bit RGB.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled, and of an
    animation the first frame is taken. Size is judged by the header, before any pixel is decoded.

    Raises:
        BadImageError: not decodable or truncated; shortest side below ``min_size``; more than
            ``max_pixels`` (Pillow's own limit of 179 million stays in force).
    """
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError("too_large", f"{width}x{height} pixels, more than {max_pixels}")
    if min(width, height) < min_size:
        raise BadImageError("too_small", f"{width}x{height}, shortest side below {min_size}")
    if image.format in ("JPEG", "MPO") and width * height > _JPEG_PIXELS_PER_BYTE * len(data):
        reason = f"header claims {width}x{height} pixels, more than {len(data)} bytes can hold"
        raise BadImageError("undecodable", reason)
    try:
        image.load()
        return _to_rgb(upright(image))
    except BadImageError:
        raise
    except Exception as error:  # decoders fail on hostile bytes with nearly any exception
        raise BadImageError("undecodable", _reason(error)) from error


def image_suffix(data: bytes) -> str:
    """Return the file suffix that fits the bytes of a picture, whatever its file was called."""
    return SUFFIX_OF_FORMAT[_open(data).format or ""]


class Shape(NamedTuple):
    """Size of an image file, and how EXIF says it is to be turned."""

    stored: tuple[int, int]
    """(width, height) of the pixels in the file."""
    orientation: int
    """EXIF's, from 1 (as stored) to 8."""

    @property
    def turned(self) -> bool:
        """Whether width and height change places."""
        return self.orientation >= 5

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as :func:`decode_image` gives it."""
        return (self.stored[1], self.stored[0]) if self.turned else self.stored


def image_shape(file: BinaryIO) -> Shape:
    """Read size and orientation out of a header; raises BadImageError for what is no image."""
    image = _open_file(file)
    return Shape(image.size, _orientation(image))


def _open(data: bytes) -> Image.Image:
    return _open_file(io.BytesIO(data))


def _open_file(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError("too_large", _reason(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError("undecodable", "not a picture in a known format") from error
    except Exception as error:  # as above
        raise BadImageError("undecodable", _reason(error)) from error


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as EXIF says."""
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TRANSPOSE[orientation])


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation; 1, as stored, where there is none that makes sense."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF is frequent on the web, and the pixels are fine
        return 1
    return orientation if orientation in _TRANSPOSE else 1


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
    # Pillow's own conversion clips at 255 and gives a white picture.
    grey = np.asarray(image).astype(np.int32).clip(0, 65535)
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


def random_view(
    image: Image.Image, size: Size, config: DataConfig, generator: np.random.Generator
) -> tuple[Tensor, ViewOrigin]:
    """Cut a random resized crop, perhaps flipped, with antialiased bicubic resampling.

    The crop covers ``crop_scale`` of the area; ``crop_ratio`` is its width to height in relation to
    that of the view, so that a wide view distorts no more than a square one.

    Returns:
        Pixels ``[3, H, W]`` uint8, and where they come from.
    """
    flipped = generator.random() < config.flip
    source = image.height, image.width
    top, left, height, width = _random_box(source, size, config, generator)
    origin = ViewOrigin(source, top, left, height, width, flipped)
    return _cut(image, origin, size), origin


def centre_view(image: Image.Image, size: Size) -> tuple[Tensor, ViewOrigin]:
    """Cut the largest centred crop of the view's aspect ratio; see :func:`random_view`."""
    source = image.height, image.width
    origin = ViewOrigin(source, *_centre_box(source, size))
    return _cut(image, origin, size), origin


def to_float(pixels: Tensor) -> Tensor:
    """Bring uint8 pixels to float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)


def _random_box(
    source: Size, size: Size, config: DataConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as in Inception's crop; the centre where none fits."""
    area, aspect = source[0] * source[1], size[1] / size[0]
    low, high = map(math.log, config.crop_ratio)
    for _ in range(_CROP_ATTEMPTS):
        covered = area * _between(*config.crop_scale, generator)
        ratio = aspect * math.exp(_between(low, high, generator))
        height, width = round(math.sqrt(covered / ratio)), round(math.sqrt(covered * ratio))
        if 0 < height <= source[0] and 0 < width <= source[1]:
            top = int(generator.random() * (source[0] - height + 1))
            left = int(generator.random() * (source[1] - width + 1))
            return top, left, height, width
    return _centre_box(source, size)


def _between(low: float, high: float, generator: np.random.Generator) -> float:
    return low + (high - low) * generator.random()


def _centre_box(source: Size, size: Size) -> tuple[int, int, int, int]:
    scale = min(source[0] / size[0], source[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    return (source[0] - height) // 2, (source[1] - width) // 2, height, width


def _cut(image: Image.Image, origin: ViewOrigin, size: Size) -> Tensor:
    right, bottom = origin.left + origin.width, origin.top + origin.height
    view = image.crop((origin.left, origin.top, right, bottom))
    if origin.flipped:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    view = view.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(view))
    return rearrange(pixels, "h w c -> c h w").contiguous()  # [3, H, W]
