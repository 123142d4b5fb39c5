"""Encoders under test (a student, a teacher, a public model, or any of them behind an upsampler),
and the images that they are shown.

A benchmark asks for images at *its* size; :meth:`Encoder.nearest_size` says which size the encoder
takes instead. Positions and label maps stay in the benchmark's own pixels, so that encoders of
different patch size are measured with one ruler.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..config import TeacherConfig, of_summary, size_pair
from ..data.folder import ImageRef, in_batches
from ..distill.targets import scaled_summary
from ..errors import ConfigError, NoLayersError
from ..models.backbone import StudentEncoder
from ..protocols import LayeredTeacher, Normalizer, Teacher, TextTower
from ..system.distributed import cores_of_process, current_world, share_out
from ..teacher_view import input_size
from ..types import Features, Report, Size, unheard
from .cache import SummaryCache

AnyImage = Image.Image | Path | ImageRef


@dataclass(frozen=True, slots=True)
class Target:
    """A teacher as it is, at its own grid and behind no upsampler: one yardstick for all heads."""

    teacher: Teacher
    size: Size
    """The size at which it sees the images, in pixels."""
    normalizer: Normalizer | None = None
    """That of the compared head; None where the head predicts in the teacher's own space."""
    digest: str = ""
    """Says which teacher it is, for the scores; empty where not known."""
    summary_normalizer: Normalizer | None = None
    """That of the head's summary; None where it predicts in the teacher's own space."""

    def __call__(self, pixels: Tensor) -> Features:
        """Encode ``[B, 3, *size]`` RGB in [0, 1] to features in the head's space."""
        features = self.teacher.encode(pixels)
        summary, spatial = features
        if self.normalizer is not None:
            spatial = self.normalizer.apply(spatial)
        return Features(scaled_summary(summary, self.summary_normalizer), spatial)


def targets_of(
    teachers: Mapping[str, Teacher],
    configs: Mapping[str, TeacherConfig],
    size: int | Size,
    patch_size: int,
    normalizers: Mapping[str, Normalizer] | None = None,
    digests: Mapping[str, str] | None = None,
) -> dict[str, Target]:
    """Return the teachers as a student's heads are compared with them, whatever it learned from.

    Args:
        teachers: on the student's device.
        configs: their sections of the recipe, which say how large they see an image.
        size: the student's input (``evaluation.size``), in pixels.
        patch_size: the student's.
        normalizers: those of its heads; None where these are folded.
        digests: by teacher, see :class:`.Target`.

    Raises:
        ConfigError: a teacher that cannot take its size.
    """
    view = size_pair(size)
    return {
        name: Target(
            teacher,
            input_size(teacher.spec, configs[name].input_size, view, patch_size),
            (normalizers or {}).get(name),
            (digests or {}).get(name, ""),
            (normalizers or {}).get(of_summary(name)),
        )
        for name, teacher in teachers.items()
    }


@dataclass(frozen=True, slots=True)
class Heads:
    """A student's heads, and the teachers that they imitate."""

    predict: Callable[[Tensor], Mapping[str, Features]]
    """``[B, 3, H, W]`` RGB in [0, 1] on the encoder's device to features by teacher."""
    targets: Mapping[str, Target]


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder under test, and the sizes it takes."""

    name: str
    encode: Callable[[Tensor], Features]
    """``[B, 3, H, W]`` RGB in [0, 1] on ``device`` to features."""
    size_multiple: int
    """Height and width must be multiples of this: the patch size, times a student's window."""
    device: torch.device | str = "cpu"
    max_size: int | None = None
    """Longest side it takes, in pixels; None for any, as a student does: beyond the table of its
    positions they are stretched, here as in :func:`radio_distill.load`."""
    fixed_size: Size | None = None
    """The only size it takes, if there is but one."""
    heads: Heads | None = None
    """For fidelity; None for an encoder that imitates no teacher."""
    inner: Callable[[Tensor, int], list[Features]] | None = None
    """For :meth:`layers`, of pixels as ``encode`` takes them; None where there are none."""
    text: TextTower | None = None
    """Encodes texts into the space of its summary; None where nothing does."""
    before: "Encoder | None" = None
    """The encoder as it is without its upsampler, of images as much smaller as its sizes are; None
    for one behind no upsampler."""
    weights: str = ""
    """Digest of what it is, under which its summaries may be kept; empty where not known."""
    dtype: torch.dtype = torch.float32
    """Of its matrix products, on which the last bits of its summaries depend."""
    cache: SummaryCache | None = None
    """Where its summaries are kept; None for nowhere."""

    def nearest_size(self, size: Size) -> Size:
        """Return the size nearest to ``size`` that the encoder takes, aspect ratio kept."""
        if self.fixed_size is not None:
            return self.fixed_size
        longest = self.max_size or max(size)
        shrink = min(1.0, longest / max(size))
        most = longest // self.size_multiple if self.max_size else None
        height, width = (max(1, round(side * shrink / self.size_multiple)) for side in size)
        if most is not None:
            height, width = min(height, most), min(width, most)
        return height * self.size_multiple, width * self.size_multiple

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        """Encode ``[B, 3, H, W]`` of any size, resized to the nearest that the encoder takes."""
        return self.encode(self._fitted(pixels)).to_float()

    @torch.inference_mode()
    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return the float32 features of ``count`` layers, spread over the depth.

        They lie at 1/count, 2/count ... 1 of it; each has gone through the final norm, and the last
        one's map is that of a call. A layer's summary is its class tokens, if it has any, see
        :class:`..protocols.LayeredTeacher`. ``pixels`` are resized as for a call.

        Raises:
            NoLayersError: the encoder gives none.
        """
        if self.inner is None:
            raise NoLayersError(f"encoder {self.name!r} has no inner layers to read")
        return [layer.to_float() for layer in self.inner(self._fitted(pixels), count)]

    def _fitted(self, pixels: Tensor) -> Tensor:
        size = self.nearest_size((pixels.shape[-2], pixels.shape[-1]))
        pixels = pixels.to(self.device)
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return pixels


def student_encoder(
    student: StudentEncoder,
    device: torch.device | str = "cpu",
    targets: Mapping[str, Target] | None = None,
    name: str = "student",
    head: str = "",
) -> Encoder:
    """Present a student as an encoder.

    Its summary is: the summary tokens of those teachers that have a summary,
    side by side. It takes any size: above ``student.max_size`` its positions are stretched.

    Args:
        student: on ``device``; one in training, :func:`..models.backbone.as_encoder`. It is
            taken as it is: evaluation mode is the caller's to set.
        device: where the images go.
        targets: the teachers that its heads are compared with; None to ask the heads nothing.
        name: what scores and progress bars call it.
        head: teacher whose summary, as its head predicts it, stands for the student's own.
    """

    def encode(pixels: Tensor) -> Features:
        output = student(pixels, (head,) if head else ())
        if head:
            return Features(output.heads[head].summary, output.features)
        return Features(output.summary if student.summary_dim else None, output.features)

    def predict(pixels: Tensor) -> Mapping[str, Features]:
        features: Mapping[str, Features] = student(pixels, tuple(targets or {})).heads
        return features

    heads = Heads(predict, targets) if targets else None
    body = student.student
    _check_rgb(name, body.bands)
    return Encoder(
        name,
        encode,
        body.size_step,
        device,
        fixed_size=body.fixed_size,
        heads=heads,
        inner=student.layers,
    )


def teacher_encoder(
    teacher: Teacher, device: torch.device | str = "cpu", name: str | None = None
) -> Encoder:
    """Present a teacher as an encoder; ``name`` is that of its spec where none is given."""
    spec = teacher.spec
    _check_rgb(spec.name, len(spec.mean))
    fixed = spec.native_size if spec.fixed_size else None
    return Encoder(
        name or spec.name,
        teacher.encode,
        spec.patch_size,
        device,
        spec.max_size,
        fixed,
        inner=teacher.layers if isinstance(teacher, LayeredTeacher) else None,
        dtype=getattr(teacher, "dtype", torch.float32),
    )


def _check_rgb(name: str, bands: int) -> None:
    if bands != 3:
        raise ConfigError(f"{name} sees {bands} bands, and all that is shown here are RGB images")


def open_image(image: AnyImage) -> Image.Image:
    """Return an upright RGB image, read now unless it is one; raises DataError with its name."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Path):
        image = ImageRef(str(image), image.read_bytes)
    return image.load()


def to_pixels(image: AnyImage, size: Size) -> Tensor:
    """Resize to cover ``size``, crop the centre; ``[3, H, W]`` in [0, 1]."""
    height, width = size
    fitted = ImageOps.fit(open_image(image), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def encode_images(
    encoder: Encoder,
    images: Sequence[AnyImage],
    size: Size,
    batch_size: int = 16,
    progress: Report | None = None,
) -> Iterator[Features]:
    """Yield the features of ``images``, a batch at a time, each cropped to ``size``."""
    pixels, report = _decoded(images, size, 2 * batch_size), progress or unheard
    for start in range(0, len(images), batch_size):
        batch = list(islice(pixels, batch_size))
        yield encoder(torch.stack(batch))
        report(start + len(batch), len(images))


def encode_shared(
    encoder: Encoder,
    images: Sequence[AnyImage],
    size: Size,
    keep: Callable[[Features], Tensor],
    batch_size: int = 16,
    progress: Report = unheard,
) -> list[Tensor]:
    """Return what ``keep`` makes of each batch's features, in order, on the host.

    All processes of a run call together: they share the batches, and get all of them.
    """
    batches = in_batches(images, batch_size)
    total, processes = len(images), current_world().world_size

    def report(done: int, _: int) -> None:
        progress(min(done * processes, total), total)

    def encode(own: Sequence[Sequence[AnyImage]]) -> Iterator[Tensor]:
        some = [image for batch in own for image in batch]
        for features in encode_images(encoder, some, size, batch_size, report):
            yield keep(features).cpu()

    return share_out(batches, encode)


def _decoded(images: Sequence[AnyImage], size: Size, ahead: int) -> Iterator[Tensor]:
    """Yield the pixels of images in their order, files decoded in threads before they are asked.

    Members of shards are read by this thread, when they are asked for.
    """
    with ThreadPoolExecutor(min(cores_of_process(os.environ), 16)) as pool:
        coming: deque[Callable[[], Tensor]] = deque()
        for image in images:
            if isinstance(image, Path):
                coming.append(pool.submit(to_pixels, image, size).result)
            else:
                coming.append(partial(to_pixels, image, size))
            if len(coming) > ahead:
                yield coming.popleft()()
        while coming:
            yield coming.popleft()()


def unit_summaries(features: Features) -> Tensor:
    """Return summaries as unit vectors ``[B, S]``, in half precision on the CPU.

    Of an encoder without a summary the mean of its map counts.
    """
    summary, spatial = features
    vectors = spatial.mean(dim=(2, 3)) if summary is None else summary
    return F.normalize(vectors, dim=1).half().cpu()


def encode_summaries(
    encoder: Encoder,
    images: Sequence[AnyImage],
    size: int,
    batch_size: int = 16,
    progress: Report = unheard,
) -> Tensor:
    """Return the summaries of images as unit vectors ``[N, S]``, in half precision on the CPU.

    Each is resized to cover the square nearest to ``size`` that the encoder takes, and its centre
    is cropped, so that it is resampled once. Of an encoder without a summary the mean of its map
    counts. All processes of a run call together: they share the images, and get all.
    """
    square, cache = encoder.nearest_size((size, size)), encoder.cache
    paths = [image for image in images if isinstance(image, Path)]
    if cache is None or len(paths) < len(images):
        found = encode_shared(encoder, images, square, unit_summaries, batch_size, progress)
        return torch.cat(found)
    total, processes = len(images), current_world().world_size

    def kept(own: Sequence[Sequence[Path]]) -> Iterator[Tensor]:
        before = 0

        def encode(piece: Sequence[Path]) -> Tensor:
            batches = encode_images(encoder, piece, square, batch_size, report)
            return torch.cat([unit_summaries(features) for features in batches])

        def report(done: int, _: int) -> None:
            progress(min((before + done) * processes, total), total)

        for piece in own:
            yield cache.get(piece, square, partial(encode, piece))
            before += len(piece)
            report(0, 0)

    return torch.cat(share_out(in_batches(paths, cache.piece), kept))
