"""What student and teachers see of one image: the same crop of it, each at its own size.

Every view is rendered straight from the photograph. Nothing is enlarged unless the photograph has
fewer pixels, and no view is resized from another's: a second resampling takes detail away too, most
where sizes are near each other (``python -m benchmarks.views`` has the figures). Only an upsampler
resizes its teacher's low-resolution input from the larger view that it looks at.

With shifts (C-RADIOv4, arXiv 2601.17237: shift-equivariant loss) every encoder gets a crop of its
own, moved by whole patches of the student within a view that is larger by the range of the shifts.
What a teacher adds to fixed places of its map then has no fixed place in the image, and cannot be
learned. Losses are taken over the part that both crops show; :func:`warp_to_student` brings a map
there.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..system.transfer import to_device
from ..types import Size, View

STUDENT, EMA = "the student", "the average student"
"""Names of the encoders that are no teachers; a teacher's name is an identifier without blanks."""


def resize(pixels: Tensor, size: Size) -> Tensor:
    """Resize ``[B, 3, H, W]`` to ``size`` pixels, bicubic and antialiased, staying in [0, 1]."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 1)


class Views:
    """The views of a micro-batch's images in one partition.

    Args:
        pixels: ``[B, 3, *size]`` in [0, 1] of each view.
        size: of the student's input, (height, width) in pixels.
        offsets: where the crop of a named encoder begins, ``[B, 2]`` whole patches of the student
            down and right; None where all see the same.
        cells: patches of the student's input, down and right; asked for with ``offsets`` only.
        partition: whose crops these are; asked for with ``offsets`` only.
    """

    def __init__(
        self,
        pixels: Mapping[View, Tensor],
        size: Size,
        offsets: Callable[[str], Tensor] | None = None,
        cells: Size = (1, 1),
        partition: str = "",
    ):
        self.size = size
        self._pixels = pixels
        self._offsets = offsets
        self._cells = cells
        self._partition = partition

    def __len__(self) -> int:
        return len(next(iter(self._pixels.values())))

    @property
    def are_shifted(self) -> bool:
        """Whether each encoder has a crop of its own."""
        return self._offsets is not None

    def of_student(self, name: str = STUDENT) -> Tensor:
        """Return the student's pixels ``[B, 3, *self.size]``."""
        return self.of_teacher(name, self.size)

    def of_teacher(self, name: str, size: Size) -> Tensor:
        """Return a teacher's pixels ``[B, 3, *size]``."""
        return self._pixels[View(size, crop_of(self._partition, name) if self._offsets else "")]

    def shift(self, name: str) -> Tensor | None:
        """Return how far the student's crop lies behind an encoder's, ``[B, 2]`` in crop sides."""
        if self._offsets is None:
            return None
        sides = torch.tensor(self._cells, dtype=torch.float32)
        return (self._offsets(STUDENT) - self._offsets(name)) / sides


def crop_of(partition: str, encoder: str) -> str:
    """Name the crop that an encoder has of its own in a partition."""
    return f"{partition}/{encoder}"


def warp_to_student(features: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Warp another encoder's map to where the student's crop lies.

    Args:
        features: ``[B, C, h, w]``, at the grid of the comparison.
        shift: ``[B, 2]``, how far the student's crop lies behind the other, in crop sides. Where it
            is no whole number of cells the map is interpolated bilinearly.

    Returns:
        The warped map ``[B, C, h, w]``, and which cells both crops show, ``[B, h, w]``.
    """
    height, width = features.shape[-2:]
    shift = to_device(shift.float(), features.device)
    down, right = shift.unbind(1)  # [B] each
    rows = torch.arange(height, device=features.device) + down[:, None] * height  # [B, h]
    columns = torch.arange(width, device=features.device) + right[:, None] * width  # [B, w]
    points = torch.stack(
        torch.broadcast_tensors(
            (2 * columns[:, None, :] + 1) / width - 1, (2 * rows[:, :, None] + 1) / height - 1
        ),
        dim=-1,
    )
    warped = F.grid_sample(
        features,
        points.to(features.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return warped, shown_by_both(shift, (height, width))


def shown_by_both(shift: Tensor, grid: Size) -> Tensor:
    """Return which cells of a grid two crops show that lie ``[B, 2]`` apart: ``[B, *grid]``."""
    inside = []
    for axis, length in enumerate(grid):
        places = torch.arange(length, device=shift.device) + shift[:, axis, None] * length
        inside.append(_inside(places, length))
    return inside[0][:, :, None] & inside[1][:, None, :]


def _inside(positions: Tensor, length: int) -> Tensor:
    tolerance = 1e-3  # of a cell: a whole number of cells may be off by rounding
    return (positions >= -tolerance) & (positions <= length - 1 + tolerance)
