"""Measures of upsamplers on held-out images: those of FeatSharp's tables.

Each measure is fed batch by batch and is a ratio of sums over the whole set: a mean of the batches'
ratios would hang on single flat images. They are FeatSharp's (arXiv 2502.16025, section 4.1 and
appendix B.2): fidelity, total variation, the conditional random field, and the maximum mean
discrepancy, here between all pairs, as the paper has it. Fidelity is that of students
(:mod:`radio_distill.evals.metrics.fidelity`). :func:`measure` shows every upsampler the same
views of the same images, whatever it was fitted with.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from radio_distill.errors import DataError
from radio_distill.evals.metrics.fidelity import Fidelity, tokens_of
from radio_distill.evals.metrics.sums import check_finite
from radio_distill.geometry import valid_mask
from radio_distill.protocols import Teacher
from radio_distill.system.precision import AUTO, autocast
from radio_distill.types import Size

from .fit.consistency import Consistency
from .fit.losses import conditional_random_field, variation_sums
from .fit.views import VIEWS, draw_homographies, render
from .methods.tiling import fine_grid

VIEWS_PER_IMAGE = 5
_SEED = 20_250_224

Report = Callable[[int, int], None]
"""Called with (done, total)."""


class TotalVariation:
    """Mean smooth L1 between neighbours, vertical plus horizontal: the TV of Tables 8 and 9."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, 2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, maps: Tensor, valid: Tensor | None = None) -> None:
        """Add ``[B, C, H, W]`` normalised maps, of cells that are ``valid`` ``[B, H, W]``."""
        check_finite(tokens_of(maps, valid), "total variation", "the upsampled map")
        for row, values in zip(self.sums, variation_sums(maps, valid), strict=True):
            row += values.sum(dim=0).to(row)

    def compute(self) -> float:
        """Return the variation; raises DataError without neighbours."""
        sums, pairs = self.sums
        if not pairs.all():
            raise DataError("total variation: no valid neighbours; maps need 2 x 2 cells")
        return (sums / pairs).sum().item()


class ConditionalRandomField:
    """Mean over images of the CRF of Tables 8 and 9 (:func:`~.losses.conditional_random_field`).

    Every image of one size is measured at the same ``points`` pixels, so that upsamplers are
    compared on the same pairs, and in any order.
    """

    def __init__(self, points: int = 1000):
        self.points, self.count, self.total = points, 0, 0.0

    @torch.no_grad()
    def update(self, maps: Tensor, guidance: Tensor) -> None:
        """Add normalised maps ``[B, C, H, W]`` of images ``[B, 3, *, *]`` RGB in [0, 1]."""
        check_finite(maps, "conditional random field", "the upsampled map")
        check_finite(guidance, "conditional random field", "the image")
        values = conditional_random_field(
            maps, guidance, points=self.points, generator=torch.Generator().manual_seed(0)
        )
        self.count += len(values)
        self.total += values.double().sum().item()

    def compute(self) -> float:
        """Return the mean; raises DataError without images."""
        if not self.count:
            raise DataError("conditional random field: no image was measured")
        return self.total / self.count


class MeanDiscrepancy:
    """Squared maximum mean discrepancy of upsampled tokens from the teacher's: MMD of Table 9.

    Of each side at most ``max_samples`` tokens are kept, each token of the set with the same
    probability: those of the smallest random numbers.
    """

    def __init__(self, channels: int, max_samples: int = 4000, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)
        none = torch.zeros(max_samples, channels), torch.full((max_samples,), torch.inf)
        self._low = self._high = none  # tokens and their random numbers

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Add the teacher's map ``[B, C, h, w]`` and the upsampled one ``[B, C, H, W]``."""
        check_finite(low, "mean discrepancy", "the teacher's map")
        self._low = self._kept(*self._low, tokens_of(low))
        check_finite(high, "mean discrepancy", "the upsampled map")
        self._high = self._kept(*self._high, tokens_of(high))

    def _kept(self, tokens: Tensor, numbers: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(len(new), generator=self._generator)
        near = drawn < numbers.max()  # most fail once the sample is full
        tokens = torch.cat([tokens, new[near.to(new.device)].to(tokens)])
        numbers, chosen = torch.cat([numbers, drawn[near]]).topk(len(numbers), largest=False)
        return tokens[chosen], numbers

    @torch.no_grad()
    def compute(self) -> float:
        """Return the estimate; raises DataError where there are too few tokens, or all equal."""
        low, high = (tokens[numbers.isfinite()] for tokens, numbers in (self._low, self._high))
        if min(len(low), len(high)) < 2:
            raise DataError("mean discrepancy: fewer than 2 tokens were seen; give it more maps")
        return squared_mmd(low, high, rbf_gamma(low))


def rbf_gamma(samples: Tensor) -> float:
    """Return 1 / (2 m) with m the median squared distance among different rows of ``[n, C]``.

    The paper prints gamma = m. For normalised features m is about 2 C, so the kernel would be
    exp(-4 C^2), zero between all different tokens; its release takes 1 / (2 m), as done here.
    Raises DataError where at least half of all pairs are equal.
    """
    middle = torch.pdist(samples.double()).square().median().item()
    if not middle:
        raise DataError("mean discrepancy: most of the teacher's tokens are equal; check its maps")
    return 0.5 / middle


def squared_mmd(x: Tensor, y: Tensor, gamma: float, chunk: int = 1024) -> float:
    """Estimate the squared maximum mean discrepancy of ``[m, C]`` and ``[n, C]`` without bias.

    Gretton et al. 2012, eq. 3, with the kernel exp(-gamma |x - y|^2) (FeatSharp's eq. 10). The
    estimate may be negative where the truth is zero. ``chunk`` rows are compared at once, which
    takes a few times ``8 * chunk * max(m, n)`` bytes.
    """
    centre = x.double().mean(dim=0)  # distances from products of centred rows lose fewer digits
    x, y = x.double() - centre, y.double() - centre
    within_x = (_kernel_sum(x, x, gamma, chunk) - len(x)) / (len(x) * (len(x) - 1))
    within_y = (_kernel_sum(y, y, gamma, chunk) - len(y)) / (len(y) * (len(y) - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y, gamma, chunk) / (len(x) * len(y))


def _kernel_sum(x: Tensor, y: Tensor, gamma: float, chunk: int) -> float:
    lengths = y.square().sum(dim=1)
    total = 0.0
    for rows in x.split(chunk):
        squared = rows.square().sum(dim=1, keepdim=True) + lengths - 2 * rows @ y.T  # [chunk, n]
        total += squared.clamp(min=0).mul(-gamma).exp().sum().item()
    return total


@torch.inference_mode()
def measure(
    consistency: Consistency,
    teacher: Teacher,
    batches: Sequence[Tensor],
    size: Size,
    factor: int,
    progress: Report | None = None,
    precision: str = AUTO,
) -> dict[str, float]:
    """Return ``fidelity``, ``total_variation``, ``crf`` and ``mmd`` over all images.

    All are taken in the normalised space (FeatSharp, arXiv 2502.16025, eq. 7 and appendix B.2).
    What is reconstructed is the teacher's features as they are: the de-bias is taken off the
    prediction again, so that it earns its place by predicting better and not by making the target
    easier.

    Args:
        consistency: the model and the downsampler it was fitted with.
        teacher: the teacher.
        batches: images ``[B, 3, H, W]`` of ``factor`` times ``size`` pixels.
        size: the teacher's input in pixels.
        factor: how much finer the fine maps are.
        progress: told after each batch.
        precision: type of the matrix products, as ``engine.precision`` of a recipe.
    """
    consistency.eval()
    model, channels = consistency.model, teacher.spec.channels
    fidelity, mmd = Fidelity(channels), MeanDiscrepancy(channels)
    variation, crf = TotalVariation(), ConditionalRandomField()
    device = next(consistency.parameters()).device
    fine_size = fine_grid(teacher, size, factor)
    for number, batch in enumerate(batches):
        pixels, generator = batch.to(device), np.random.Philox(key=[_SEED, number])
        drawn = draw_homographies(
            len(pixels) * VIEWS_PER_IMAGE, VIEWS["featsharp"], np.random.Generator(generator)
        ).to(device)  # [(B V), 3, 3]
        views = render(pixels, drawn, size)
        output = model.encode(teacher, pixels, fine_size, factor, further=views)
        with autocast(precision, device):
            fine = model(output.observation).float()
            homographies = rearrange(drawn, "(b v) i j -> b v i j", v=VIEWS_PER_IMAGE)
            coarse = consistency.reconstruct(fine, homographies).float()
        bias = model.de_biased(torch.zeros_like(coarse[:1]))
        fidelity.update(coarse - bias, output.further, valid_mask(drawn, teacher.spec.grid(size)))
        variation.update(fine)
        crf.update(fine, output.observation.guidance)
        mmd.update(model.de_biased(output.observation.low), fine)
        if progress is not None:
            progress(number + 1, len(batches))
    values = {"fidelity": fidelity, "total_variation": variation, "crf": crf, "mmd": mmd}
    return {name: value.compute() for name, value in values.items()}  # type: ignore[attr-defined]
