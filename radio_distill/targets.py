"""What the student learns from: teachers x upsampler x normalizer, the only place where they meet.

The training loop asks for the targets of a batch in a partition and never learns which upsampler is
in use. Upsampled teachers are seen through the upsampler at ``factor`` times their own grid, the
others at their own grid; :mod:`radio_distill.alignment` brings student and teacher together.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .config import PartitionConfig, TeacherConfig, size_pair
from .errors import ConfigError
from .protocols import Corrector, Normalizer, Teacher, Upsampler
from .types import Features, Size, TeacherSpec


def input_size(
    config: TeacherConfig, spec: TeacherSpec, partition: PartitionConfig, student_patch_size: int
) -> Size:
    """Return the size at which a teacher sees the images of a partition, in pixels.

    The partition's ``teacher_sizes`` goes before the teacher's ``input_size``. ``match`` is the
    size whose grid equals the student's. A number, or the native size, is the side of a square;
    for views that are not square it stands for their longer side, and the shorter side keeps the
    aspect ratio to the nearest whole patch. A teacher of fixed size always sees that size.

    Raises:
        ConfigError: where the patch does not divide a given side, or the teacher cannot take it.
    """
    view = size_pair(partition.size)
    if spec.fixed_size:
        return spec.native_size
    wanted = partition.teacher_sizes.get(spec.name, config.input_size)
    if wanted == "match":
        side = tuple(length // student_patch_size * spec.patch_size for length in view)
        return _within(spec, (side[0], side[1]), partition)
    longest = max(spec.native_size) if wanted == "native" else int(wanted)
    if longest < 1 or longest % spec.patch_size:
        near = max(round(longest / spec.patch_size), 1) * spec.patch_size
        raise ConfigError(
            f"teacher {spec.name!r}: input size {longest} is not a multiple of its patch "
            f"{spec.patch_size} (nearest {near})"
        )
    cells = longest // spec.patch_size
    grid = [max(round(cells * length / max(view)), 1) for length in view]
    return _within(spec, (grid[0] * spec.patch_size, grid[1] * spec.patch_size), partition)


def _within(spec: TeacherSpec, size: Size, partition: PartitionConfig) -> Size:
    if spec.max_size is not None and max(size) > spec.max_size:
        raise ConfigError(
            f"teacher {spec.name!r} would see {size[0]}x{size[1]} pixels in partition "
            f"{partition.name!r}, above its largest {spec.max_size}; set "
            f"teacher_sizes.{spec.name} of the partition"
        )
    return size


def resize(pixels: Tensor, size: Size) -> Tensor:
    """Resize ``[B, 3, H, W]`` to ``size`` pixels, bicubic and antialiased, staying in [0, 1]."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 1)


class TargetMaker:
    """Makes the targets of a partition's images.

    Args:
        teachers: the frozen encoders, by name.
        configs: the recipe's section of each.
        upsampler: for the teachers that a partition upsamples.
        normalizers: one for each teacher; see :attr:`normalizers`.
        student_patch_size: decides the teacher's size under ``match``.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        configs: Mapping[str, TeacherConfig],
        upsampler: Upsampler,
        normalizers: Mapping[str, Normalizer],
        student_patch_size: int,
    ):
        self.teachers = teachers
        self.normalizers = normalizers
        self._configs = configs
        self._upsampler = upsampler
        self._student_patch_size = student_patch_size

    def __call__(self, pixels: Tensor, partition: PartitionConfig) -> dict[str, Features]:
        """Return the normalised targets of ``[B, 3, H, W]`` pixels for each teacher shown them."""
        targets = {}
        for name in partition.teachers:
            features = self._encode(name, pixels, partition)
            spatial = self.normalizers[name].apply(features.spatial)
            targets[name] = Features(features.summary, spatial)
        return targets

    def own_grid(self, name: str, pixels: Tensor, partition: PartitionConfig) -> Features:
        """Return a teacher's features as they are: its own grid and scale, no upsampler."""
        return self.teachers[name].encode(resize(pixels, self.size(name, partition)))

    def size(self, name: str, partition: PartitionConfig) -> Size:
        """Return the size at which a teacher sees the images of a partition, in pixels."""
        teacher = self.teachers[name]
        return input_size(self._configs[name], teacher.spec, partition, self._student_patch_size)

    def _encode(self, name: str, pixels: Tensor, partition: PartitionConfig) -> Features:
        if name not in partition.upsample:
            return self._corrected(name, self.own_grid(name, pixels, partition))
        teacher, factor = self.teachers[name], self._upsampler.factor
        height, width = teacher.spec.grid(self.size(name, partition))
        return self._upsampler(teacher, pixels, (height * factor, width * factor))

    def _corrected(self, name: str, features: Features) -> Features:
        """Take out a fitted upsampler's bias, so that both partitions teach the same."""
        if not isinstance(self._upsampler, Corrector):
            return features
        return Features(features.summary, self._upsampler.correct(name, features.spatial))
