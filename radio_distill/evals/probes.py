"""One linear probe of frozen features, trained on what each grid cell shows.

Tokens are standardised by the training set (batch normalisation whose batch is the whole set), and
multinomial logistic regression is solved from zero, by one of two solvers:

* :class:`AdamW`, a fixed number of steps of few tokens, as in the mmseg recipes of DINOv2 and
  RADIO: the protocol of the benchmark ``segmentation``.
* :class:`Lbfgs`, the whole set as one batch, so there is no draw and no learning rate: for
  comparisons in which nothing but the features may differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError
from ..types import Size
from .metrics import IGNORED
from .metrics.sums import check_finite

Standardise = Callable[[Tensor], Tensor]


class Solver(Protocol):
    """Finds weight ``[K, C]`` and bias ``[K]`` for tokens ``[N, C]`` with class shares ``[N, K]``.

    ``standardise`` brings tokens to the device, in float32.
    """

    skips_unlabelled: ClassVar[bool]
    """Whether tokens of no class are left out before the tokens are standardised."""

    def __call__(
        self, tokens: Tensor, shares: Tensor, standardise: Standardise
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW with a cosine schedule, on tokens that are drawn with replacement."""

    steps: int = 1000
    tokens_per_step: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0

    skips_unlabelled: ClassVar[bool] = False

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(
        self, tokens: Tensor, shares: Tensor, standardise: Standardise
    ) -> tuple[Tensor, Tensor]:
        """Return weight ``[K, C]`` and bias ``[K]``."""
        device = standardise(tokens[:1]).device
        linear = nn.utils.skip_init(nn.Linear, tokens.shape[1], shares.shape[1], device=device)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.AdamW(
            linear.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            chosen = torch.randint(len(tokens), (self.tokens_per_step,), generator=generator)
            share = shares[chosen].to(device)
            logits = linear(standardise(tokens[chosen]))
            loss = -(share * logits.log_softmax(dim=1)).sum() / share.sum().clamp_min(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return linear.weight.detach(), linear.bias.detach()


@dataclass(frozen=True, slots=True)
class Lbfgs:
    """L-BFGS on all tokens at once, which are kept in float32."""

    weight_decay: float = 1e-2
    """Half of it times the squared weights joins the mean cross-entropy."""
    steps: int = 100
    """At most this many."""

    skips_unlabelled: ClassVar[bool] = True

    def __call__(
        self, tokens: Tensor, shares: Tensor, standardise: Standardise
    ) -> tuple[Tensor, Tensor]:
        """Return weight ``[K, C]`` and bias ``[K]``."""
        tokens = standardise(tokens)
        shares = shares.to(tokens)
        weight = tokens.new_zeros(shares.shape[1], tokens.shape[1])
        bias = tokens.new_zeros(shares.shape[1])
        total, known = shares.sum(), shares.sum(dim=1, keepdim=True)  # a token may be part ignored
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=self.steps, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            # The gradient is written out, so that inference mode may be on.
            log_probability = F.linear(tokens, weight, bias).log_softmax(dim=1)  # [N, K]
            residual = (log_probability.exp() * known - shares) / total
            weight.grad = residual.T @ tokens + self.weight_decay * weight
            bias.grad = residual.sum(dim=0)
            penalty = 0.5 * self.weight_decay * weight.square().sum()
            return penalty - (shares * log_probability).sum() / total

        optimizer.step(loss)
        return weight, bias


@dataclass(slots=True)
class LinearProbe:
    """A linear classifier of the cells of feature maps; a cell of several classes counts by share.

    Args:
        num_classes: K.
        solver: how it is trained.
    """

    num_classes: int
    solver: Solver = field(default_factory=Lbfgs)
    weight: Tensor = field(init=False)
    """``[K, C]``, of features as they come: standardising is linear and folded in."""
    bias: Tensor = field(init=False)
    """``[K]``."""

    def fit(
        self,
        features: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor,
        device: torch.device | str | None = None,
    ) -> "LinearProbe":
        """Train on the maps of a set and what they show.

        Args:
            features: of each image, ``[C, h, w]``.
            labels: of each image, ``[H, W]``: classes from 0 to K - 1, or ``IGNORED`` (-1).
            device: where to train; None for where the features are.

        Raises:
            DataError: features that are not finite, or labels of other images or classes.
        """
        self.check(features, labels)
        tokens, shares = training_set(features, labels, self.num_classes)
        known = shares.sum(dim=1) > 0
        if not known.any():
            raise DataError("linear probe: the training labels are all ignored; nothing to learn")
        if self.solver.skips_unlabelled:
            tokens, shares = tokens[known], shares[known]
        device = tokens.device if device is None else device
        std, mean = torch.std_mean(tokens.float(), dim=0)
        std, mean = std.clamp_min(1e-6).to(device), mean.to(device)

        def standardise(some: Tensor) -> Tensor:
            return (some.to(device).float() - mean) / std

        weight, bias = self.solver(tokens, shares, standardise)
        self.weight = weight / std
        self.bias = bias - self.weight @ mean
        return self

    def check(self, features: Sequence[Tensor] | Tensor, labels: Sequence[Tensor] | Tensor) -> None:
        """Raise DataError for features that are not finite, or labels of other images."""
        if len(features) != len(labels):
            raise DataError(f"linear probe: {len(features)} maps but {len(labels)} label images")
        for spatial, mask in zip(features, labels, strict=True):
            check_finite(spatial, "linear probe", "the map")
            least, most = mask.min().item(), mask.max().item()
            if least < IGNORED or most >= self.num_classes:
                raise DataError(
                    f"linear probe: labels from {least} to {most}; they must be classes from 0 to "
                    f"{self.num_classes - 1}, or {IGNORED} to be ignored"
                )

    def __call__(self, spatial: Tensor) -> Tensor:
        """Return the logits of each cell of ``[B, C, h, w]``: ``[B, K, h, w]``."""
        weight = rearrange(self.weight, "k c -> k c 1 1")
        return F.conv2d(spatial.to(weight), weight, self.bias)

    def predict(self, spatial: Tensor) -> Tensor:
        """Return the class of each cell of ``[B, C, h, w]``: ``[B, h, w]``."""
        return self(spatial).argmax(dim=1)


def training_set(
    features: Sequence[Tensor] | Tensor, masks: Sequence[Tensor] | Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return all cells as tokens ``[N, C]`` and what each shows as class shares ``[N, K]``."""
    tokens = [rearrange(spatial, "c h w -> (h w) c") for spatial in features]
    shares = [
        rearrange(
            class_shares(mask, (spatial.shape[1], spatial.shape[2]), num_classes),
            "k h w -> (h w) k",
        )
        for spatial, mask in zip(features, masks, strict=True)
    ]
    return torch.cat(tokens), torch.cat(shares)


def class_shares(mask: Tensor, grid: Size, num_classes: int) -> Tensor:
    """Return how much of each grid cell each class covers, ``[num_classes, h, w]``.

    Cross-entropy against these shares is cross-entropy per pixel with one logit a cell.
    """
    one_hot = mask == torch.arange(num_classes)[:, None, None]  # [K, H, W], none where IGNORED
    return F.adaptive_avg_pool2d(one_hot.float(), grid)
