"""Native: the teacher itself, shown ``factor`` times more pixels a side.

What tiles and fitted upsamplers are measured against where the teacher can do it (FeatSharp, arXiv
2502.16025, Figures 15 and 16). A teacher far above the size it was trained at says other things, so
it is a reference of detail, not of truth; a teacher of one fixed size cannot do it at all.
"""

from dataclasses import dataclass

from torch import Tensor

from radio_distill.distill.views import resize
from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher
from radio_distill.types import Features, Size, TeacherSpec

from . import tiling


@dataclass(frozen=True)
class Native(tiling.Method):
    """Encode the whole image twice: small for its summary, large for the map.

    The large one counts ``factor ** 2`` images; attention makes it dearer than that, for it grows
    with the square of the pixels.
    """

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        height, width = tiling.low_resolution(teacher, grid, self.factor)
        size = (height * self.factor, width * self.factor)
        _check_takes(teacher.spec, size)
        low = tiling.encode_low(teacher, pixels, grid, self.factor, self.micro_batch)
        if self.factor == 1:
            return low
        micro_batch = self.micro_batch and max(1, self.micro_batch // self.factor**2)
        fine = tiling.encode(teacher, resize(pixels, size), grid, micro_batch)
        return Features(low.summary, fine.spatial)


def _check_takes(spec: TeacherSpec, size: Size) -> None:
    limit = ""
    if spec.fixed_size and size != spec.native_size:
        limit = f"takes {spec.native_size[0]}x{spec.native_size[1]} only"
    elif spec.max_size is not None and max(size) > spec.max_size:
        limit = f"takes at most {spec.max_size}"
    if limit:
        raise ConfigError(
            f"upsampler 'native' would show teacher {spec.name!r} {size[0]}x{size[1]} pixels, "
            f"which {limit}; use 'tile', or a smaller factor"
        )
