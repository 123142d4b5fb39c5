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

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Size


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Where views lie on a canvas: each in the top left corner of its tile.

    Views follow one another along the rows, canvas after canvas. :func:`plan_mosaic` makes one from
    sizes that it has checked.
    """

    canvas: Size
    """What the teacher sees, in pixels."""
    view: Size
    """What one view measures on the canvas, in pixels; a multiple of ``patch_size``."""
    patch_size: int
    """The teacher's: pixels a side of one cell of its map."""

    @property
    def rows(self) -> int:
        """How many views fit above one another."""
        return self.canvas[0] // self.view[0]

    @property
    def columns(self) -> int:
        """How many views fit side by side."""
        return self.canvas[1] // self.view[1]

    @property
    def images(self) -> int:
        """How many views a full canvas shows."""
        return self.rows * self.columns

    @property
    def pitch(self) -> Size:
        """Distance from one tile's corner to the next, in pixels: the canvas divided evenly.

        Floored to whole cells. A tile that began inside a cell would share that cell with its
        neighbour, and every patch of its view would be cut elsewhere than the student's is.
        """
        height, width = self._cells(self.canvas)
        return height // self.rows * self.patch_size, width // self.columns * self.patch_size

    def canvases(self, num_views: int) -> int:
        """Return how many canvases ``num_views`` views take; the last may be partly empty."""
        return ceil(num_views / self.images)

    def pack(self, views: Tensor, mean: tuple[float, float, float]) -> Tensor:
        """Lay ``[B, 3, *view]`` in [0, 1] on canvases ``[canvases(B), 3, *canvas]``.

        Every other pixel is ``mean``, the teacher's, so that it is zero once the teacher has
        normalised it. The canvases are float32 at least: bfloat16 would round the mean.
        """
        size = tuple(views.shape[-2:])
        assert size == self.view, f"views of {size} pixels in a mosaic of {self.view}"
        dtype = torch.promote_types(views.dtype, torch.float32)
        padding = torch.tensor(mean, dtype=dtype, device=views.device).view(1, 3, 1, 1)
        canvases = padding.repeat(self.canvases(len(views)), 1, *self.canvas)  # [N, 3, H, W]
        for place, (rows, columns) in enumerate(_places(self, unit=1)):
            part = views[place :: self.images]  # one view from each canvas
            canvases[: len(part), :, rows, columns] = part
        return canvases

    def slice(self, spatial: Tensor, num_views: int) -> Tensor:
        """Cut the canvases' maps ``[N, C, H/p, W/p]`` into the views' ``[num_views, C, h/p, w/p]``.

        The way back of :meth:`pack`. The result is channels-last in memory.
        """
        found = (len(spatial), *spatial.shape[-2:])
        expected = (self.canvases(num_views), *self._cells(self.canvas))
        assert found == expected, f"maps {found} of {num_views} views, expected {expected}"
        views = torch.empty(
            (num_views, spatial.shape[1], *self._cells(self.view)),
            dtype=spatial.dtype,
            device=spatial.device,
            memory_format=torch.channels_last,
        )
        for place, (rows, columns) in enumerate(_places(self, unit=self.patch_size)):
            part = views[place :: self.images]
            part.copy_(spatial[: len(part), :, rows, columns])
        return views

    def valid(self) -> Tensor:
        """Return which cells of a full canvas show a view, ``[H/p, W/p]`` bool on the CPU."""
        shown = torch.zeros(self._cells(self.canvas), dtype=torch.bool)
        for rows, columns in _places(self, unit=self.patch_size):
            shown[rows, columns] = True
        return shown

    def _cells(self, size: Size) -> Size:
        return size[0] // self.patch_size, size[1] // self.patch_size


def plan_mosaic(teacher_name: str, canvas: Size, view: Size, patch_size: int) -> Mosaic:
    """Lay as many views as fit on a teacher's canvas, each axis by itself; sizes in pixels.

    Raises:
        ConfigError: a view larger than the canvas, or sides that are not whole patches.
    """
    shown = f"mosaic for teacher {teacher_name!r}"
    for what, size in (("canvas", canvas), ("view", view)):
        if min(size) < 1 or any(side % patch_size for side in size):
            near = [max(round(side / patch_size), 1) * patch_size for side in size]
            raise ConfigError(
                f"{shown}: the {what} measures {size[0]}x{size[1]} pixels, which are not whole "
                f"patches of {patch_size}; nearest {near[0]}x{near[1]}"
            )
    if view[0] > canvas[0] or view[1] > canvas[1]:
        raise ConfigError(
            f"{shown}: a view of {view[0]}x{view[1]} pixels is larger than the canvas of "
            f"{canvas[0]}x{canvas[1]}; make the partition's size smaller, or take the teacher out "
            "of its `mosaic`"
        )
    return Mosaic(canvas, view, patch_size)


def _places(mosaic: Mosaic, unit: int) -> list[tuple[slice, slice]]:
    """Rows and columns that each view of a canvas takes, in steps of ``unit`` pixels."""
    (height, width), (down, right) = (
        (size[0] // unit, size[1] // unit) for size in (mosaic.view, mosaic.pitch)
    )
    return [
        (slice(row * down, row * down + height), slice(column * right, column * right + width))
        for row in range(mosaic.rows)
        for column in range(mosaic.columns)
    ]
