"""What an upsampler leaves of its teacher's space: a probe of the teacher's maps, on finer ones.

A student that learns upsampled features should end up with the teacher's; so the probe is trained
on the low-resolution map and only applied to the upsampled one, the "feature-space preservation"
of AnyUp (arXiv 2510.12764). Upsamplers that are good under a probe of their own can fail here.
Applied to its own training images the probe shows a shift of features most sharply, but then it
also counts against a finer map what the teacher did not see at low resolution.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from radio_distill.errors import DataError
from radio_distill.evals.metrics import (
    IGNORED,
    Sums,
    check_finite,
    confusion_matrix,
    mean_iou,
)
from radio_distill.evals.probes import training_set


class LinearProbe:
    """Multinomial logistic regression on a teacher's own tokens, the same every time.

    Tokens are standardised; the whole set is one batch for L-BFGS, so there is no draw and no
    learning rate. A token that covers several classes is trained on their shares.

    Args:
        num_classes: K.
        weight_decay: half of it times the squared weights joins the mean cross-entropy.
        steps: at most this many of L-BFGS.
    """

    def __init__(self, num_classes: int, weight_decay: float = 1e-2, steps: int = 100):
        self.num_classes, self.weight_decay, self.steps = num_classes, weight_decay, steps

    def fit(self, features: Tensor, labels: Tensor) -> "LinearProbe":
        """Train on low-resolution maps.

        Args:
            features: ``[B, C, h, w]``, all images of the training set.
            labels: ``[B, H, W]``, classes from 0 to K - 1, or ``IGNORED`` (-1).

        Raises:
            DataError: features that are not finite, or labels of other images or classes.
        """
        check_finite(features, "preservation", "the teacher's map")
        _check_labels(features, labels, self.num_classes)
        tokens, shares = training_set(list(features), list(labels), self.num_classes)
        known = shares.sum(dim=1) > 0
        if not known.any():
            raise DataError("preservation: the training labels are all ignored; nothing to learn")
        tokens, shares = tokens[known].float(), shares[known]
        std, mean = torch.std_mean(tokens, dim=0)
        std = std.clamp(min=1e-6)
        weight, bias = self._solve((tokens - mean) / std, shares)
        self.weight = weight / std  # [K, C]; standardising is linear: fold it in
        self.bias = bias - self.weight @ mean
        return self

    def _solve(self, tokens: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        weight = tokens.new_zeros(self.num_classes, tokens.shape[1])
        bias = tokens.new_zeros(self.num_classes)
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

    def predict(self, features: Tensor) -> Tensor:
        """Return the class of each cell of ``[B, C, h, w]``: ``[B, h, w]``."""
        weight = rearrange(self.weight, "k c -> k c 1 1")
        return F.conv2d(features.to(weight), weight, self.bias).argmax(dim=1)


class Preservation(Sums):
    """Does a probe that was trained on low-resolution maps still work on upsampled ones?

    Every pixel takes the class of the nearest cell: interpolated logits would be those of the
    bilinearly upsampled map and would hide the grid. The same measure of the low-resolution maps
    themselves is what to compare with.

    Args:
        probe: trained on the teacher's own maps.
        device: where the sums live.
    """

    def __init__(self, probe: LinearProbe, device: torch.device | str | None = None):
        super().__init__(probe.num_classes**2, device)
        self.probe = probe

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add maps ``[B, C, *, *]`` of images with ``labels`` ``[B, H, W]``, as in training.

        Raises:
            DataError: features that are not finite, or labels of other images or classes.
        """
        check_finite(features, "preservation", "the map")
        _check_labels(features, labels, self.probe.num_classes)
        classes = self.probe.predict(features)
        size = (labels.shape[1], labels.shape[2])
        pixels = F.interpolate(classes[:, None].float(), size, mode="nearest-exact")[:, 0].long()
        confusion = confusion_matrix(pixels.to(labels), labels, self.probe.num_classes)
        self.sums += confusion.flatten().to(self.sums)

    def compute(self) -> dict[str, float]:
        """Return ``accuracy`` of pixels and ``miou`` of the classes that occur, both in [0, 1].

        Raises:
            DataError: no pixel had a label.
        """
        confusion = self.sums.view(self.probe.num_classes, -1)
        if not confusion.any():
            raise DataError("preservation: no pixel of the set is labelled")
        accuracy = (confusion.trace() / confusion.sum()).item()
        return {"accuracy": accuracy, "miou": mean_iou(confusion)}


def _check_labels(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(features) != len(labels):
        raise DataError(f"preservation: {len(features)} maps but {len(labels)} label images")
    least, most = labels.min().item(), labels.max().item()
    if least < IGNORED or most >= num_classes:
        raise DataError(
            f"preservation: labels from {least} to {most}; they must be classes from 0 to "
            f"{num_classes - 1}, or {IGNORED} to be ignored"
        )
