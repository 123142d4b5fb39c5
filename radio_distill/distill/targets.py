"""What the student learns from: teachers x upsampler x normalizer, the only place where they meet.

The trainer asks for the targets of a micro-batch and never learns which upsampler is in use. How
each teacher sees the images is its :class:`~radio_distill.teacher_view.TeacherView`: through the
upsampler at ``factor`` times its own grid, several images on one canvas, or at its own grid.
:mod:`.alignment` brings student and teacher together.

A mosaic is several small views on the one canvas that a fixed-size teacher accepts. SAM takes
1024x1024 pixels and nothing else, at a high price, and a student's view is often a quarter of that
or less. RADIOv2.5 (arXiv 2412.07679, finding 3) therefore lays a grid of views on one canvas, runs
the teacher once, and cuts its map into one map a view. A canvas with room for one view only is the
zero-padded canvas of PHI-S (arXiv 2410.01680, A.7).

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

A mosaic has no summary: it would be one of the whole canvas and so of no view.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..config import of_summary
from ..protocols import (
    Corrector,
    MovingNormalizer,
    NormalisedUpsampler,
    Normalizer,
    Teacher,
    Upsampler,
)
from ..system.memory import explain_oom
from ..system.transfer import to_device
from ..teacher_view import Mosaic, TeacherView
from ..types import Features, Size
from .views import Views

TargetCache = MutableMapping[TeacherView, Features]
"""Targets of images that several partitions show, by how their teacher saw them."""


class TargetMaker:
    """Makes the targets of a partition's images.

    Args:
        teachers: the frozen encoders, by name.
        normalizers: of each teacher's features, under its name, and of its summaries where they
            have one, see :attr:`.Recipe.normalizers`.
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
        self._moving = {
            name: item for name, item in normalizers.items() if isinstance(item, MovingNormalizer)
        }

    @property
    def needs_whole_step(self) -> bool:
        """Whether a process must encode all its images of a step before it normalises any."""
        return any(item.needs_whole_step for item in self._moving.values())

    def begin_step(self, device: torch.device) -> None:
        """Say that the step's images were all encoded; every process calls."""
        for normalizer in self._moving.values():
            normalizer.begin_step(device)

    def end_step(self, progress: float | None, device: torch.device) -> None:
        """Let statistics follow a step at this share of the stage; None where it was skipped."""
        for normalizer in self._moving.values():
            if progress is None:
                normalizer.forget_step()
            else:
                normalizer.end_step(progress, device)

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
        for view in teacher_views:
            if cache is not None and not views.are_shifted and view in cache:
                targets[view.teacher] = cache[view]
                continue
            with _explain_oom(views, view):
                targets[view.teacher] = self._target(views, view)
            if cache is not None:
                cache[view] = targets[view.teacher]
        return targets

    def encoded(self, views: Views, teacher_views: Iterable[TeacherView]) -> dict[str, Features]:
        """Return what teachers say of some images in their own spaces; see :meth:`__call__`."""
        features = {}
        for view in teacher_views:
            with _explain_oom(views, view):
                features[view.teacher] = self._encoded(views, view)
        return features

    def normalised(self, encoded: Mapping[str, Features]) -> dict[str, Features]:
        """Return the targets of what :meth:`encoded` gave."""
        return {name: scaled(item, name, self.normalizers) for name, item in encoded.items()}

    def _target(self, views: Views, view: TeacherView) -> Features:
        name = view.teacher
        if not view.is_upsampled:
            return scaled(self._encoded(views, view), name, self.normalizers)
        assert self._upsampler is not None, f"no upsampler for teacher {name}"
        teacher, pixels = self.teachers[name], self._pixels(views, view)
        features = upsampled(self._upsampler, teacher, pixels, view.grid, self.normalizers[name])
        of_summaries = self.normalizers.get(of_summary(name))
        return Features(scaled_summary(features.summary, of_summaries), features.spatial)

    def _pixels(self, views: Views, view: TeacherView) -> Tensor:
        return self.teachers[view.teacher].spec.seen(views.of_teacher(view.teacher, view.rendered))

    def _encoded(self, views: Views, view: TeacherView) -> Features:
        """Return what a teacher says of some images, in its own space.

        At its own grid it is observed by statistics that move. What a fitted upsampler takes out of
        its own maps is taken out there too, so that all partitions teach the same; but not of a
        mosaic, since where on the canvas an image lies has nothing to do with the fit.
        """
        teacher, pixels = self.teachers[view.teacher], self._pixels(views, view)
        if view.is_upsampled:
            assert self._upsampler is not None, f"no upsampler for teacher {view.teacher}"
            return self._upsampler(teacher, pixels, view.grid)
        summary, spatial = encode(teacher, pixels, view)
        if view.mosaic is None and isinstance(self._upsampler, Corrector):
            spatial = self._upsampler.correct(view.teacher, spatial)
        if (normalizer := self._moving.get(view.teacher)) is not None:
            normalizer.observe(spatial)
        summaries = self._moving.get(of_summary(view.teacher))
        if summaries is not None and summary is not None:
            summaries.observe(summary[:, :, None, None])
        return Features(summary, spatial)


def _explain_oom(views: Views, view: TeacherView) -> AbstractContextManager[None]:
    height, width = views.size
    return explain_oom(
        f"the targets of teacher {view.teacher!r}",
        f"{height}x{width} px of the student, {len(views)} images",
        "lower engine.micro_batch, or the stage's upsampler.micro_batch",
    )


def scaled(features: Features, teacher: str, normalizers: Mapping[str, Normalizer]) -> Features:
    """Bring a teacher's features from its own spaces to the normalised ones."""
    summary = scaled_summary(features.summary, normalizers.get(of_summary(teacher)))
    return Features(summary, normalizers[teacher].apply(features.spatial))


def scaled_summary(summary: Tensor | None, normalizer: Normalizer | None) -> Tensor | None:
    """Normalise summaries ``[B, S]``, each as a map of one cell; without a normalizer they stay."""
    if summary is None or normalizer is None:
        return summary
    return normalizer.apply(summary[:, :, None, None])[:, :, 0, 0]


def upsampled(
    upsampler: Upsampler, teacher: Teacher, pixels: Tensor, grid: Size, normalizer: Normalizer
) -> Features:
    """Return a teacher's features of ``[B, 3, H, W]``, upsampled to ``grid`` and normalised."""
    if isinstance(upsampler, NormalisedUpsampler):
        return upsampler.normalised(teacher, pixels, grid, normalizer)
    features = upsampler(teacher, pixels, grid)
    return Features(features.summary, normalizer.apply(features.spatial))


def encode(teacher: Teacher, pixels: Tensor, view: TeacherView) -> Features:
    """Return a teacher's features of ``[B, 3, *view.size]`` at its own grid and scale.

    In a mosaic there is no summary: it would be one of the whole canvas.
    """
    if view.mosaic is None:
        return teacher.encode(pixels)
    canvases = pack(view.mosaic, pixels, teacher.spec.mean)
    spatial = teacher.encode(canvases).spatial
    return Features(None, unpack(view.mosaic, spatial, len(pixels)))


def pack(mosaic: Mosaic, images: Tensor, mean: tuple[float, ...]) -> Tensor:
    """Lay ``[B, 3, *view]`` in [0, 1] on canvases ``[canvases(B), 3, *canvas]``.

    Every other pixel is ``mean``, the teacher's, so that it is zero once the teacher has normalised
    it. The canvases are float32 at least: bfloat16 would round the mean.
    """
    size = tuple(images.shape[-2:])
    assert size == mosaic.view, f"images of {size} pixels in a mosaic of {mosaic.view}"
    dtype = torch.promote_types(images.dtype, torch.float32)
    padding = to_device(torch.tensor(mean, dtype=dtype), images.device).view(1, -1, 1, 1)
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
