"""A teacher whose answer is known."""

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.types import Size, TeacherSpec
from teachers.base import FrozenTeacher


class MeanColours(FrozenTeacher):
    """Each cell is linear in the mean colour of its patch; the summary is that of the image.

    Notes (images, height) of each call.

    Args:
        patch: pixels a side of a cell.
        channels: of the map; three are the colours themselves.
        context: share of the whole image's mean colour that is added to every cell.
        size: its native one.
        limits: further fields of its spec.
    """

    def __init__(
        self,
        patch: int,
        channels: int = 3,
        context: float = 0.0,
        size: Size = (16, 16),
        **limits: object,
    ):
        fields = {"summary_channels": 3, "max_size": None, **limits}
        zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        spec = TeacherSpec(
            "colours", channels, patch_size=patch, native_size=size, mean=zero, std=one, **fields
        )
        super().__init__(self._answer, spec)
        draw = torch.Generator().manual_seed(1)
        self.mix = torch.eye(3) if channels == 3 else torch.randn(channels, 3, generator=draw)
        self.context = context
        self.calls: list[tuple[int, int]] = []

    def map_of(self, pixels: Tensor, patch: int) -> Tensor:
        """Return the map ``[B, C, h, w]`` that patches of another size would have."""
        return torch.einsum("ck,bkhw->bchw", self.mix, F.avg_pool2d(pixels, patch))

    def _answer(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        self.calls.append((len(pixels), pixels.shape[2]))
        mean = pixels.mean((2, 3))
        shift = self.context * torch.einsum("ck,bk->bc", self.mix, mean)[..., None, None]
        summary = mean if self.spec.summary_channels else None
        return summary, self.map_of(pixels, self.spec.patch_size) + shift
