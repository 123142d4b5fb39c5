"""What the student learns from: teachers x upsampler x normalizer, the only place where they meet.

The training loop asks for the targets of a batch in a partition and never learns which upsampler is
in use. Upsampled teachers are seen through the upsampler at ``factor`` times their own grid; those
of a mosaic see several images on one canvas (:mod:`.mosaic`); the others are seen at their own
grid. :mod:`radio_distill.distill.alignment` brings student and teacher together.
"""

import math
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager

from ..config import PartitionConfig, TeacherConfig, partition_sizes
from ..errors import ConfigError
from ..protocols import Corrector, Normalizer, Teacher, Upsampler
from ..system.memory import explain_oom
from ..types import Features, Size, TeacherSpec
from .mosaic import Mosaic, plan_mosaic
from .views import Views

Seen = MutableMapping[tuple[object, ...], Features]
"""Targets of images that several partitions show, by teacher and how it saw them."""


def input_size(
    config: TeacherConfig,
    spec: TeacherSpec,
    partition: PartitionConfig,
    view: Size,
    student_patch_size: int,
) -> Size:
    """Return the size at which a teacher sees the images of a partition, in pixels.

    The partition's ``teacher_sizes`` goes before the teacher's ``input_size``. ``match`` is the
    size whose grid equals the student's; so is that of an image in a mosaic. A number, or the
    native size, is the side of a square; for views that are not square it stands for their longer
    side, and the shorter side keeps the aspect ratio to the nearest whole patch. A teacher of fixed
    size sees that size, and no other may be asked for, unless in a mosaic.

    Args:
        config: the teacher's section of the recipe.
        spec: the teacher's.
        partition: who shows the images.
        view: student input, (height, width) in pixels.
        student_patch_size: the student's.

    Raises:
        ConfigError: where the patch does not divide a given side, or the teacher cannot take it.
    """
    in_mosaic = spec.name in partition.mosaic
    wanted = partition.teacher_sizes.get(spec.name, "match" if in_mosaic else config.input_size)
    if spec.fixed_size and not in_mosaic:
        if wanted not in ("native", *spec.native_size):
            raise ConfigError(
                f"teacher {spec.name!r} takes {spec.native_size[0]}x{spec.native_size[1]} pixels "
                f"only, not {wanted}; set its size to native, or show it in a mosaic"
            )
        return spec.native_size
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


def rendered_size(
    config: TeacherConfig,
    spec: TeacherSpec,
    partition: PartitionConfig,
    view: Size,
    student_patch_size: int,
    factor: int = 1,
) -> Size:
    """Return the size, in pixels, at which a teacher's images of a partition are rendered.

    It is the :func:`input_size`; for an upsampled teacher ``factor`` times that, the most that an
    upsampler looks at. So tiles and guidance are the photograph's own pixels, and a comparison of
    upsamplers shows all of them the same. The upsampler resizes the low-resolution input down from
    it, as a fit does: the one view that is resampled twice.
    """
    height, width = input_size(config, spec, partition, view, student_patch_size)
    scale = factor if spec.name in partition.upsample else 1
    return height * scale, width * scale


def _within(spec: TeacherSpec, size: Size, partition: PartitionConfig) -> Size:
    if spec.max_size is not None and max(size) > spec.max_size:
        raise ConfigError(
            f"teacher {spec.name!r} would see {size[0]}x{size[1]} pixels in partition "
            f"{partition.name!r}, above its largest {spec.max_size}; set "
            f"teacher_sizes.{spec.name} of the partition"
        )
    return size


def plan_canvas(spec: TeacherSpec, size: Size) -> Mosaic:
    """Return how images of ``size`` pixels lie on a teacher's canvas, its native size."""
    return plan_mosaic(spec.name, spec.native_size, size, spec.patch_size)


def check_partition(
    partition: PartitionConfig,
    configs: Mapping[str, TeacherConfig],
    specs: Mapping[str, TeacherSpec],
    student_patch_size: int,
) -> None:
    """Raise ConfigError where a teacher cannot give what a partition asks of it."""
    for name in partition.teachers:
        spec, config = specs[name], configs[name]
        if spec.summary_channels is None and config.summary_weight:
            raise ConfigError(
                f"teachers.{name}.summary_weight: this teacher has no summary; set it to 0"
            )
        for view in partition_sizes(partition):
            size = input_size(config, spec, partition, view, student_patch_size)
            if name in partition.mosaic:
                plan_canvas(spec, size)


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

    def __call__(
        self, views: Views, partition: PartitionConfig, seen: Seen | None = None
    ) -> dict[str, Features]:
        """Return the normalised targets of a partition's images for each teacher shown them.

        Args:
            views: the images; a mosaic canvas holds consecutive ones, from the first on.
            partition: the teachers, and how they see the images.
            seen: targets of the same images, made for another partition; taken where the teacher
                would see the same again, and added to.
        """
        targets = {}
        for name in partition.teachers:
            key = self._way_of_seeing(name, views, partition)
            if seen is None or views.are_shifted or key not in seen:
                with self._naming(name, views):
                    features = self._encode(name, views, partition)
                    spatial = self.normalizers[name].apply(features.spatial)
                targets[name] = Features(features.summary, spatial)
                if seen is not None:
                    seen[key] = targets[name]
            else:
                targets[name] = seen[key]
        return targets

    def own_grid(self, name: str, views: Views, partition: PartitionConfig) -> Features:
        """Return a teacher's features as they are: its own grid and scale, no upsampler."""
        pixels = views.of_teacher(name, self.size(name, partition, views.size))
        if name not in partition.mosaic:
            return self.teachers[name].encode(pixels)
        mosaic = self.mosaic(name, partition, views.size)
        canvases = mosaic.pack(pixels, self.teachers[name].spec.mean)
        spatial = self.teachers[name].encode(canvases).spatial
        return Features(None, mosaic.slice(spatial, len(pixels)))

    def size(self, name: str, partition: PartitionConfig, view: Size) -> Size:
        """Return the size at which a teacher sees the images of a partition, in pixels."""
        teacher = self.teachers[name]
        return input_size(
            self._configs[name], teacher.spec, partition, view, self._student_patch_size
        )

    def rendered_size(self, name: str, partition: PartitionConfig, view: Size) -> Size:
        """Return the size at which a teacher's images are rendered; see :func:`rendered_size`."""
        config, spec = self._configs[name], self.teachers[name].spec
        patch_size, factor = self._student_patch_size, self._upsampler.factor
        return rendered_size(config, spec, partition, view, patch_size, factor)

    def mosaic(self, name: str, partition: PartitionConfig, view: Size) -> Mosaic:
        """Return how the images of a partition lie on a teacher's canvas."""
        return plan_canvas(self.teachers[name].spec, self.size(name, partition, view))

    def images_together(self, partition: PartitionConfig, view: Size) -> int:
        """Return how many images must stay together, because they share canvases."""
        mosaics = [self.mosaic(name, partition, view) for name in partition.mosaic]
        return math.lcm(*(mosaic.images for mosaic in mosaics))

    def _way_of_seeing(
        self, name: str, views: Views, partition: PartitionConfig
    ) -> tuple[object, ...]:
        size = self.size(name, partition, views.size)
        return name, size, name in partition.upsample, name in partition.mosaic

    def _naming(self, name: str, views: Views) -> AbstractContextManager[None]:
        """Name a teacher whose targets do not fit into memory, where its encoder alone does."""
        images, (height, width) = len(views), views.size
        return explain_oom(
            f"the targets of teacher {name!r}",
            f"{height}x{width} px of the student, {images} images",
            "lower engine.micro_batch, or the stage's upsampler.micro_batch",
        )

    def _encode(self, name: str, views: Views, partition: PartitionConfig) -> Features:
        if name in partition.mosaic:
            return self.own_grid(name, views, partition)
        if name not in partition.upsample:
            return self._corrected(name, self.own_grid(name, views, partition))
        teacher, factor = self.teachers[name], self._upsampler.factor
        height, width = teacher.spec.grid(self.size(name, partition, views.size))
        grid = (height * factor, width * factor)
        pixels = views.of_teacher(name, self.rendered_size(name, partition, views.size))
        return self._upsampler(teacher, pixels, grid)

    def _corrected(self, name: str, features: Features) -> Features:
        """Take out a fitted upsampler's bias, so that both partitions teach the same.

        A mosaic keeps it: where on the canvas an image lies has nothing to do with the fit.
        """
        if not isinstance(self._upsampler, Corrector):
            return features
        return Features(features.summary, self._upsampler.correct(name, features.spatial))
