"""How good an upsampler is: measures of FeatSharp's tables, over a whole held-out set.

Each measure is fed batch by batch, adds up over processes, and is a ratio of sums: a mean of the
batches' ratios would hang on single flat images. They are FeatSharp's (arXiv 2502.16025, section
4.1 and appendix B.2): total variation, the conditional random field, and the maximum mean
discrepancy, here between all pairs, as the paper has it. Their fidelity is that of students,
:class:`radio_distill.evals.metrics.Fidelity`; what a probe makes of upsampled maps is
:mod:`upsamplers.preservation`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from radio_distill.errors import DataError
from radio_distill.evals.metrics import Sums, check_finite, tokens_of

from .fit.losses import conditional_random_field, variation_sums


class TotalVariation(Sums):
    """Mean smooth L1 between neighbours, vertical plus horizontal: the TV of Tables 8 and 9."""

    def __init__(self, device: torch.device | str | None = None):
        super().__init__(4, device)

    @torch.no_grad()
    def update(self, maps: Tensor, valid: Tensor | None = None) -> None:
        """Add ``[B, C, H, W]`` normalised maps, of cells that are ``valid`` ``[B, H, W]``.

        Raises:
            DataError: a value that counts is not finite.
        """
        check_finite(tokens_of(maps, valid), "total variation", "the upsampled map")
        sums, pairs = variation_sums(maps, valid)
        self.sums += torch.cat([sums.sum(dim=0), pairs.sum(dim=0)]).to(self.sums)

    def compute(self) -> float:
        """Return the variation; raises DataError without neighbours."""
        sums, pairs = self.sums.view(2, 2)
        if not pairs.all():
            raise DataError("total variation: no valid neighbours; maps need 2 x 2 cells")
        return (sums / pairs).sum().item()


class ConditionalRandomField(Sums):
    """Mean over images of the CRF of Tables 8 and 9 (:func:`~.losses.conditional_random_field`).

    Every image of one size is measured at the same pixels, so that upsamplers are compared on the
    same pairs, and in any order.

    Args:
        points: pixels that are drawn of each image.
        seed: of the draw.
        device: where the sums live.
    """

    def __init__(self, points: int = 1000, seed: int = 0, device: torch.device | str | None = None):
        super().__init__(2, device)
        self.points, self.seed = points, seed

    @torch.no_grad()
    def update(self, maps: Tensor, guidance: Tensor) -> None:
        """Add normalised maps ``[B, C, H, W]`` of images ``[B, 3, *, *]`` RGB in [0, 1].

        Raises:
            DataError: a value is not finite.
        """
        check_finite(maps, "conditional random field", "the upsampled map")
        check_finite(guidance, "conditional random field", "the image")
        generator = torch.Generator().manual_seed(self.seed)
        values = conditional_random_field(
            maps, guidance, points=self.points, generator=generator
        ).to(self.sums)
        self.sums += torch.stack([values.sum(), torch.full_like(values[0], len(values))])

    def compute(self) -> float:
        """Return the mean; raises DataError without images."""
        total, count = self.sums.tolist()
        if not count:
            raise DataError("conditional random field: no image was measured")
        return total / count


class MeanDiscrepancy:
    """Squared maximum mean discrepancy of upsampled tokens from the teacher's: MMD of Table 9.

    Of each side at most ``max_samples`` tokens are kept, each token of the set with the same
    probability: those of the smallest random numbers, which can be merged.

    Args:
        channels: C.
        max_samples: tokens a side.
        seed: of the draw; each process of a run adds its rank.
        device: where the tokens are kept.
    """

    def __init__(
        self,
        channels: int,
        max_samples: int = 4000,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(seed + rank)
        self._low = _Sample(channels, max_samples, generator, device)
        self._high = _Sample(channels, max_samples, generator, device)

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Add the teacher's map ``[B, C, h, w]`` and the upsampled one ``[B, C, H, W]``.

        Raises:
            DataError: a value is not finite.
        """
        for maps, sample, name in (
            (low, self._low, "the teacher's map"),
            (high, self._high, "the upsampled map"),
        ):
            check_finite(maps, "mean discrepancy", name)
            sample.draw(tokens_of(maps))

    def merge(self, other: "MeanDiscrepancy") -> None:
        """Add what ``other`` has seen; its seed must differ."""
        self._low.keep(other._low.tokens, other._low.numbers)
        self._high.keep(other._high.tokens, other._high.numbers)

    def all_reduce(self) -> None:
        """Merge over all processes, once, at the end; alone, do nothing."""
        if dist.is_available() and dist.is_initialized():
            self._low.all_reduce()
            self._high.all_reduce()

    @torch.no_grad()
    def compute(self) -> float:
        """Return the estimate; raises DataError where there are too few tokens, or all equal."""
        low, high = self._low.drawn(), self._high.drawn()
        if min(len(low), len(high)) < 2:
            raise DataError("mean discrepancy: fewer than 2 tokens were seen; give it more maps")
        return squared_mmd(low, high, rbf_gamma(low))


class _Sample:
    """A uniform sample of a stream: the tokens of the ``size`` smallest random numbers."""

    def __init__(
        self,
        channels: int,
        size: int,
        generator: torch.Generator,
        device: torch.device | str | None,
    ):
        self.tokens = torch.zeros(size, channels, device=device)
        self.numbers = torch.full((size,), torch.inf, device=device)
        self._generator = generator

    def draw(self, tokens: Tensor) -> None:
        numbers = torch.rand(len(tokens), generator=self._generator).to(tokens.device)
        self.keep(tokens, numbers)

    def keep(self, tokens: Tensor, numbers: Tensor) -> None:
        near = numbers < self.numbers.max().to(numbers)  # most fail once the sample is full
        tokens = torch.cat([self.tokens, tokens[near].to(self.tokens)])
        numbers = torch.cat([self.numbers, numbers[near].to(self.numbers)])
        self.numbers, chosen = numbers.topk(len(self.numbers), largest=False)
        self.tokens = tokens[chosen]

    def drawn(self) -> Tensor:
        """Return the tokens ``[n, C]``, at most ``size``."""
        return self.tokens[self.numbers.isfinite()]

    def all_reduce(self) -> None:
        everyone = [
            [torch.empty_like(own) for _ in range(dist.get_world_size())]
            for own in (self.tokens, self.numbers)
        ]
        dist.all_gather(everyone[0], self.tokens)
        dist.all_gather(everyone[1], self.numbers)
        self.numbers = torch.full_like(self.numbers, torch.inf)
        self.keep(torch.cat(everyone[0]), torch.cat(everyone[1]))


def rbf_gamma(samples: Tensor) -> float:
    """Return 1 / (2 m) with m the median squared distance among different rows of ``[n, C]``.

    The paper prints gamma = m. For normalised features m is about 2 C, so the kernel would be
    exp(-4 C^2), zero between all different tokens; its release takes 1 / (2 m), as done here.

    Raises:
        DataError: at least half of all pairs are equal.
    """
    median = torch.pdist(samples.double()).square().median().item()
    if not median:
        raise DataError("mean discrepancy: most of the teacher's tokens are equal; check its maps")
    return 0.5 / median


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
