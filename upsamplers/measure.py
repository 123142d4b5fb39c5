"""Measures a fitted upsampler on held-out images: fidelity, and how its fine maps look.

Every upsampler is shown the same views of the same images, whatever it was fitted with. What is
reconstructed is the teacher's features as they are: a de-bias is taken off the prediction again, so
that it earns its place by predicting better and not by making the target easier.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from radio_distill.evals.metrics import Fidelity
from radio_distill.geometry import valid_mask
from radio_distill.protocols import Teacher
from radio_distill.system.precision import AUTO, autocast
from radio_distill.types import Size

from .fit.consistency import Consistency
from .fit.lessons import fine_grid
from .fit.views import VIEWS, draw_homographies, render
from .metrics import ConditionalRandomField, MeanDiscrepancy, TotalVariation

VIEWS_PER_PICTURE = 5
_SEED = 20_250_224


@torch.inference_mode()
def measure(
    consistency: Consistency,
    teacher: Teacher,
    batches: Sequence[Tensor],
    size: Size,
    factor: int,
    progress: Callable[[int, int], None] | None = None,
    precision: str = AUTO,
) -> dict[str, float]:
    """Return ``fidelity``, ``total_variation``, ``crf`` and ``mmd`` over all images.

    All are taken in the normalised space (FeatSharp, arXiv 2502.16025, eq. 7 and appendix B.2).

    Args:
        consistency: the model and the downsampler it was fitted with.
        teacher: the teacher.
        batches: images ``[B, 3, H, W]`` of ``factor`` times ``size`` pixels.
        size: the teacher's input in pixels.
        factor: how much finer the fine maps are.
        progress: called with (done, total).
        precision: type of the matrix products, as ``engine.precision`` of a recipe.
    """
    consistency.eval()
    model, channels = consistency.model, teacher.spec.channels
    fidelity, mmd = Fidelity(channels), MeanDiscrepancy(channels)
    variation, crf = TotalVariation(), ConditionalRandomField()
    height, width = teacher.spec.grid(size)
    device = next(consistency.parameters()).device
    for number, batch in enumerate(batches):
        pixels = batch.to(device)
        matrices = _homographies(number, len(pixels)).to(device)  # [(B V), 3, 3]
        seen = model.encode(
            teacher,
            pixels,
            fine_grid(teacher, size, factor),
            factor,
            further=render(pixels, matrices, size),
        )
        with autocast(precision, device):
            fine = model(seen.observation).float()
            views = rearrange(matrices, "(b v) i j -> b v i j", v=VIEWS_PER_PICTURE)
            coarse = consistency.reconstruct(fine, views).float()
        bias = model.de_biased(torch.zeros_like(coarse[:1]))
        fidelity.update(coarse - bias, seen.further, valid_mask(matrices, (height, width)))
        variation.update(fine)
        crf.update(fine, seen.observation.guidance)
        mmd.update(model.de_biased(seen.observation.low), fine)
        if progress is not None:
            progress(number + 1, len(batches))
    return {
        "fidelity": fidelity.compute(),
        "total_variation": variation.compute(),
        "crf": crf.compute(),
        "mmd": mmd.compute(),
    }


def _homographies(number: int, images: int) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=[_SEED, number]))
    return draw_homographies(images * VIEWS_PER_PICTURE, VIEWS["featsharp"], generator)
