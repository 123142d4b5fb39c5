"""Images of any number of bands: arrays, multi-band TIFFs, and photographs beside them.

A satellite's scene has ten bands, a slide under a microscope five. What a photograph is to the rest
of the project, ``[3, H, W]`` of 8 bits, they are as ``[bands, H, W]``: numbers of other types are
scaled by ``data.band_range`` and rounded to 8 bits, so that shards, views and batches are those of
photographs.

Read are ``.npy``, ``.npz`` of one array, TIFF where tifffile is installed (its first series), and
what Pillow gives without a change of colours (grey, RGB, and either with a further band). The axis
of the bands is the first or the last, whichever has as many entries.
"""

import io
import math
import zipfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import ConfigError
from ..system.files import printable, reason_of
from .images import (
    MAX_MEMBER_BYTES,
    BadImageError,
    check_extent,
    decode_pixels,
    image_suffix,
    open_header,
    upright,
)

_NUMPY, _ZIP = b"\x93NUMPY", b"PK\3\4"
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_BYTES = 8 * MAX_MEMBER_BYTES
"""Largest array that a compressed file is unpacked to."""
_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I;16L", "I;16B")
"""Pillow's whose numbers are those of the file."""


def decode(data: bytes, config: DataConfig) -> Tensor:
    """Decode an image as a recipe's section `data` says, ``[bands, H, W]`` uint8, channels last.

    Raises:
        BadImageError: it cannot be decoded, has other bands, or is too small or too large.
        ConfigError: a TIFF without the package that reads it.
    """
    if config.photographs:
        return decode_pixels(data, max_pixels=config.max_pixels, min_size=config.min_size)
    try:
        array = _with_bands_last(_read(data, config), config.bands)
        height, width, _ = array.shape
        check_extent((width, height), config.max_pixels, config.min_size)
        pixels = np.ascontiguousarray(_to_bytes(array, config.band_range))
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except (BadImageError, ConfigError):
        raise
    except Exception as error:  # decoders fail on hostile bytes with nearly any exception
        reason = printable(reason_of(error)) or type(error).__name__
        raise BadImageError("undecodable", reason) from error


def suffix_of(data: bytes) -> str:
    """Return the file suffix that fits the bytes of an image of bands, or of a photograph."""
    for magics, suffix in (((_NUMPY,), "npy"), ((_ZIP,), "npz"), (_TIFFS, "tif")):
        if data.startswith(magics):
            return suffix
    return image_suffix(data)


def _read(data: bytes, config: DataConfig) -> np.ndarray:
    if data.startswith(_NUMPY):
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        return array
    if data.startswith(_ZIP):
        return _unpacked(data)
    if data.startswith(_TIFFS):
        return _tiff(data)
    image = open_header(data)
    if image.mode not in _MODES:
        raise BadImageError("undecodable", f"its mode is {image.mode}, whose bands are not its own")
    check_extent(image.size, config.max_pixels, config.min_size)  # before any pixel is decoded
    return upright(np.array(image), image)


def _unpacked(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) != 1:
            raise BadImageError("undecodable", f"{len(members)} arrays in one file; one is wanted")
        _check_bytes(members[0].file_size)
        array: np.ndarray = np.load(io.BytesIO(archive.read(members[0])), allow_pickle=False)
    return array


def _tiff(data: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise ConfigError("data.bands: TIFFs need tifffile: pip install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        _check_bytes(math.prod(series.shape) * (series.dtype or np.dtype(np.uint8)).itemsize)
        array: np.ndarray = series.asarray(maxworkers=1)
    return array.squeeze()


def _check_bytes(size: int) -> None:
    if size > _MOST_BYTES:
        raise BadImageError("too_large", f"an array of {size} bytes, more than {_MOST_BYTES}")


def _with_bands_last(array: np.ndarray, bands: int) -> np.ndarray:
    """Return ``[H, W, bands]`` of an array whose first or last axis has the bands, or has none."""
    if array.ndim == 2:
        array = array[:, :, None]
    first, last = array.shape[0] == bands, array.shape[-1] == bands
    if array.ndim != 3 or not (first or last):
        shape = "x".join(map(str, array.shape))
        raise BadImageError("undecodable", f"an array of {shape}, and data.bands is {bands}")
    if first and last and bands > 1:
        shape = "x".join(map(str, array.shape))
        raise BadImageError("undecodable", f"which axis of {shape} has the bands cannot be told")
    return array if last else np.moveaxis(array, 0, 2)


def _to_bytes(pixels: np.ndarray, ranges: Sequence[tuple[float, float]]) -> np.ndarray:
    """Bring ``[H, W, bands]`` to 8 bits: by the ranges, else by that of the type."""
    if ranges:
        if not np.isfinite(pixels).all():
            raise BadImageError("undecodable", "pixels that are not finite")
        low, high = np.array(ranges, np.float32).T  # [bands], or one for all
        shares = (pixels.astype(np.float32) - low) / (high - low)
        return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.newbyteorder("=") == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise BadImageError("undecodable", f"{pixels.dtype} has no known range; set data.band_range")
