"""What the student learns from: teachers x upsampler x normalizer, the only place where they meet.

The trainer asks for the targets of a micro-batch and never learns which upsampler is in use. How
each teacher sees the images is its :class:`~radio_distill.teacher_view.TeacherView`: through the
upsampler at ``factor`` times its own grid, several images on one canvas (:mod:`.mosaic`), or at its
own grid.
:mod:`.alignment` brings student and teacher together.
"""

from collections.abc import Iterable, Mapping, MutableMapping

from torch import Tensor

from ..protocols import Corrector, Normalizer, Teacher, Upsampler
from ..system.memory import explain_oom
from ..teacher_view import TeacherView
from ..types import Features
from .mosaic import pack, unpack
from .views import Views

TargetCache = MutableMapping[TeacherView, Features]
"""Targets of images that several partitions show, by how their teacher saw them."""


class TargetMaker:
    """Makes the targets of a partition's images.

    Args:
        teachers: the frozen encoders, by name.
        normalizers: one for each teacher.
        upsampler: for the views that are upsampled; None where none is.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        normalizers: Mapping[str, Normalizer],
        upsampler: Upsampler | None = None,
    ):
        self.teachers = teachers
        self.normalizers = normalizers
        self._upsampler = upsampler

    def __call__(
        self,
        views: Views,
        teacher_views: Iterable[TeacherView],
        cache: TargetCache | None = None,
    ) -> dict[str, Features]:
        """Return the normalised targets of some images, by teacher.

        Args:
            views: the images; a mosaic canvas holds consecutive ones, from the first on.
            teacher_views: how each teacher sees them.
            cache: targets of the same images, made for another partition; taken where a teacher
                would see the same again, and added to. With shifts no two partitions show the same.
        """
        targets = {}
        height, width = views.size
        for view in teacher_views:
            if cache is not None and not views.are_shifted and view in cache:
                targets[view.teacher] = cache[view]
                continue
            with explain_oom(
                f"the targets of teacher {view.teacher!r}",
                f"{height}x{width} px of the student, {len(views)} images",
                "lower engine.micro_batch, or the stage's upsampler.micro_batch",
            ):
                features = self._encode(views.of_teacher(view.teacher, view.rendered), view)
                spatial = self.normalizers[view.teacher].apply(features.spatial)
            targets[view.teacher] = Features(features.summary, spatial)
            if cache is not None:
                cache[view] = targets[view.teacher]
        return targets

    def _encode(self, pixels: Tensor, view: TeacherView) -> Features:
        """Return what a teacher says of ``[B, 3, *view.rendered]``, in its own space.

        What a fitted upsampler takes out of its own maps is taken out of the teacher's own grid
        too, so that all partitions teach the same. A mosaic keeps it: where on the canvas an image
        lies has nothing to do with the fit.
        """
        teacher, upsampler = self.teachers[view.teacher], self._upsampler
        if view.is_upsampled:
            assert upsampler is not None, f"no upsampler for teacher {view.teacher}"
            return upsampler(teacher, pixels, view.grid)
        features = encode(teacher, pixels, view)
        if view.mosaic is not None or not isinstance(upsampler, Corrector):
            return features
        return Features(features.summary, upsampler.correct(view.teacher, features.spatial))


def encode(teacher: Teacher, pixels: Tensor, view: TeacherView) -> Features:
    """Return a teacher's features of ``[B, 3, *view.size]`` at its own grid and scale.

    In a mosaic there is no summary: it would be one of the whole canvas.
    """
    if view.mosaic is None:
        return teacher.encode(pixels)
    canvases = pack(view.mosaic, pixels, teacher.spec.mean)
    spatial = teacher.encode(canvases).spatial
    return Features(None, unpack(view.mosaic, spatial, len(pixels)))
