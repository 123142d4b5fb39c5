"""Upsamplers side by side: fitted ones out of their files, and those without parameters.

All become a :class:`.fit.consistency.Consistency`, which :func:`.metrics.measure` takes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.config import FitConfig
from radio_distill.errors import DataError, WeightsError
from radio_distill.evals.metrics.segmentation import confusion_matrix, mean_iou
from radio_distill.evals.probes import LinearProbe
from radio_distill.protocols import Normalizer, Teacher, Upsampler
from radio_distill.system.precision import AUTO, autocast
from radio_distill.types import Size

from .fit.consistency import Consistency
from .fitted import UpsamplerModel, load_model
from .fitted_files import read_header, read_tensors
from .methods.tiling import fine_grid
from .metrics import Report
from .networks import Observation

Labelled = Sequence[tuple[Tensor, Tensor]]
"""Images ``[B, 3, H, W]`` with classes ``[B, H, W]``, from 0 to K - 1 or -1 to be ignored."""


def load_fitted(path: str | Path) -> Consistency:
    """Load a fitted upsampler with the downsampler it was fitted through; raises WeightsError."""
    header, parts = read_header(path), read_tensors(path)
    names = ("downsampler", "downsampler_kernel")
    config = FitConfig(
        factor=header.factor, **{name: header.fit[name] for name in names if name in header.fit}
    )
    consistency = Consistency(load_model(path), config, header.channels)
    try:
        consistency.downsampler.load_state_dict(parts.get("downsampler", {}))
    except RuntimeError as error:
        raise WeightsError(
            f"upsampler {path} comes without the downsampler it was fitted through, so its "
            "fidelity is unknown; fit it with radio-distill fit-upsampler"
        ) from error
    return consistency.eval()


class Direct(nn.Module):
    """An upsampler without parameters as a network: it asks the teacher again for its map."""

    tile_levels: tuple[int, ...] = ()

    def __init__(self, upsampler: Upsampler, teacher: Teacher, normalizer: Normalizer):
        super().__init__()
        self._upsampler, self._teacher, self._normalizer = upsampler, teacher, normalizer

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]`` in the normalised space."""
        height, width = observation.low.shape[-2:]
        grid = (height * self._upsampler.factor, width * self._upsampler.factor)
        with torch.autocast(observation.low.device.type, enabled=False):
            fine = self._upsampler(self._teacher, observation.guidance, grid).spatial
            return self._normalizer.apply(fine)


def without_parameters(
    upsampler: Upsampler, teacher: Teacher, reference: Consistency
) -> Consistency:
    """Present an upsampler that has nothing to fit, without de-bias.

    Its scale and its downsampler are those of ``reference``, a fit of the same factor.
    """
    normalizer, channels = reference.model.normalizer, teacher.spec.channels
    model = UpsamplerModel(Direct(upsampler, teacher, normalizer), normalizer, channels, None)
    consistency = Consistency(model, FitConfig(factor=upsampler.factor), channels)
    consistency.downsampler = reference.downsampler
    return consistency.eval()


class Maps(NamedTuple):
    """Maps of some images, in the normalised space."""

    low: Tensor
    """``[B, C, h, w]``: the teacher's, as it is."""
    base: Tensor
    """``[B, C, h, w]``: the same, de-biased; what the upsampler starts from."""
    fine: Tensor
    """``[B, C, h * factor, w * factor]``."""


@torch.inference_mode()
def maps_of(
    model: UpsamplerModel,
    teacher: Teacher,
    pixels: Tensor,
    size: Size,
    factor: int,
    precision: str = AUTO,
) -> Maps:
    """Upsample ``[B, 3, H, W]`` of ``factor`` times ``size`` pixels, as a stage would."""
    output = model.encode(teacher, pixels, fine_grid(teacher, size, factor), factor)
    with autocast(precision, pixels.device):
        fine = model(output.observation).float()
    low = output.observation.low
    return Maps(low, model.de_biased(low), fine)


def fit_probe(teacher: Teacher, images: Labelled, num_classes: int) -> LinearProbe:
    """Train the probe of :func:`preservation` on the teacher's own maps of images of its size."""
    maps = torch.cat([teacher.encode(pixels).spatial.cpu() for pixels, _ in images])
    return LinearProbe(num_classes).fit(maps, torch.cat([classes for _, classes in images]))


def preservation(
    model: UpsamplerModel,
    teacher: Teacher,
    probe: LinearProbe,
    images: Labelled,
    size: Size,
    factor: int,
    progress: Report | None = None,
    precision: str = AUTO,
) -> tuple[float, float]:
    """Return the probe's mIoU, in [0, 1], on upsampled maps and on the teacher's own.

    The feature-space preservation of AnyUp (arXiv 2510.12764): a student that learns upsampled
    features should end up with the teacher's, so the probe is trained on low-resolution maps and
    only applied to upsampled ones. Upsamplers that are good under a probe of their own can fail.
    Both are in the teacher's own space, so that one probe serves all upsamplers. Raises DataError
    where no pixel has a label.
    """
    fine = low = torch.zeros(probe.num_classes, probe.num_classes, dtype=torch.long)
    for number, (pixels, classes) in enumerate(images, 1):
        maps = maps_of(model, teacher, pixels, size, factor, precision)
        fine = fine + preserved(probe, model.normalizer.invert(maps.fine).cpu(), classes)
        low = low + preserved(probe, model.normalizer.invert(maps.low).cpu(), classes)
        if progress is not None:
            progress(number, len(images))
    if not low.any():
        raise DataError("preservation: no pixel of the set is labelled")
    return mean_iou(fine), mean_iou(low)


def preserved(probe: LinearProbe, features: Tensor, labels: Tensor) -> Tensor:
    """Count pixels by (label, prediction), ``[K, K]``, of maps ``[B, C, *, *]``.

    Every pixel takes the class of the nearest cell: interpolated logits would be those of the
    bilinearly upsampled map and would hide the grid.
    """
    probe.check(features, labels)
    classes, size = probe.predict(features), (labels.shape[1], labels.shape[2])
    pixels = F.interpolate(classes[:, None].float(), size, mode="nearest-exact")[:, 0].long()
    return confusion_matrix(pixels.to(labels), labels, probe.num_classes)
