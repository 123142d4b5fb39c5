"""Mosaics: several small views on the one canvas that a fixed-size teacher accepts.

SAM takes 1024x1024 pixels and nothing else, at a high price, and a student's view is often a
quarter of that or less. RADIOv2.5 (arXiv 2412.07679, finding 3) therefore lays a grid of views on
one canvas, runs the teacher once, and cuts its map into one map a view. A canvas with room for one
view only is the zero-padded canvas of PHI-S (arXiv 2410.01680, A.7).

What it changes. A teacher gives each view of a mosaic the features that it would give it alone, at
the same place of an otherwise empty canvas, if no layer mixes cells of two views:

* a patch embedding, and layers that work on each cell by itself, never do;
* attention in windows does not if no window touches two views, as where the pitch of the tiles is a
  multiple of the window. None of SAM's windows of 14 cells does in a 2x2 mosaic of views up to 448
  pixels, which lie 32 cells apart; some do in one of 512 pixels, and in 3x3 and 4x4;
* attention over all cells (any plain ViT, and four blocks of SAM) does, everywhere;
* a convolution wider than a cell does as far as its receptive field reaches: the 3x3 neck of SAM
  where two views touch, a deep CNN through much of each view.

So for pretrained teachers it is an approximation; ``python -m benchmarks.mosaic`` measures it. "The
same place" matters as well: a position table makes features depend on where the view lies.

Left out: the summary, which would be one of the whole canvas and so of no view; and the resize of
views to the teacher's scale, which is the caller's.
"""

import torch
from torch import Tensor

from ..teacher_view import Mosaic


def pack(mosaic: Mosaic, images: Tensor, mean: tuple[float, float, float]) -> Tensor:
    """Lay ``[B, 3, *view]`` in [0, 1] on canvases ``[canvases(B), 3, *canvas]``.

    Every other pixel is ``mean``, the teacher's, so that it is zero once the teacher has normalised
    it. The canvases are float32 at least: bfloat16 would round the mean.
    """
    size = tuple(images.shape[-2:])
    assert size == mosaic.view, f"images of {size} pixels in a mosaic of {mosaic.view}"
    dtype = torch.promote_types(images.dtype, torch.float32)
    padding = torch.tensor(mean, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    canvases = padding.repeat(mosaic.canvases(len(images)), 1, *mosaic.canvas)  # [N, 3, H, W]
    for place, (rows, columns) in enumerate(_places(mosaic, unit=1)):
        part = images[place :: mosaic.images]  # one image from each canvas
        canvases[: len(part), :, rows, columns] = part
    return canvases


def unpack(mosaic: Mosaic, spatial: Tensor, num_images: int) -> Tensor:
    """Cut the canvases' maps ``[N, C, H/p, W/p]`` into the images' ``[num_images, C, h/p, w/p]``.

    The way back of :func:`pack`. The result is channels-last in memory.
    """
    shape = (len(spatial), *spatial.shape[-2:])
    expected = (mosaic.canvases(num_images), *mosaic.cells(mosaic.canvas))
    assert shape == expected, f"maps {shape} of {num_images} images, expected {expected}"
    images = torch.empty(
        (num_images, spatial.shape[1], *mosaic.cells(mosaic.view)),
        dtype=spatial.dtype,
        device=spatial.device,
        memory_format=torch.channels_last,
    )
    for place, (rows, columns) in enumerate(_places(mosaic, unit=mosaic.patch_size)):
        part = images[place :: mosaic.images]
        part.copy_(spatial[: len(part), :, rows, columns])
    return images


def _places(mosaic: Mosaic, unit: int) -> list[tuple[slice, slice]]:
    """Return the rows and columns of each image on a canvas, in steps of ``unit`` pixels."""
    (height, width), (down, right) = (
        (size[0] // unit, size[1] // unit) for size in (mosaic.view, mosaic.pitch)
    )
    return [
        (slice(row * down, row * down + height), slice(column * right, column * right + width))
        for row in range(mosaic.rows)
        for column in range(mosaic.columns)
    ]
