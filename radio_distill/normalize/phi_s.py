"""PHI-S: one rotation and one scalar that give every channel of a teacher unit variance.

"PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation" (arXiv 2410.01680),
section 3.4. With Σ = U Λ Uᵀ, a Hadamard matrix H of rows of length 1 spreads the variances of the
principal axes evenly, since all its entries have the same magnitude:

    y = s R (x - mean),    R = H Uᵀ,    s = sqrt(C / tr Σ).

The map is a similarity: errors keep their proportions, MSE(y, y*) = s² MSE(x, x*) whatever the
student predicts, unlike under whitening. Channels come out with unit variance, not uncorrelated.
"""

import torch
from torch import Tensor

from .affine import Affine, mean_variance
from .hadamard import hadamard
from .statistics import Moments


class PhiS(Affine):
    """The PHI-S standardisation; a normalizer."""

    tensors = ("mean", "scale", "rotation")

    def fit(self, moments: Moments) -> "PhiS":
        """Take the statistics of a teacher's tokens; covariances of any rank will do.

        The decomposition runs on the CPU, so equal moments give equal rotations on one machine.
        Where eigenvalues coincide the basis is the library's choice: send :meth:`state` from one
        process to the others where they run on machines of different kinds.

        Raises:
            ConfigError: where the number of channels has no Hadamard matrix.
            DataError: where the features never vary or are not finite.
        """
        scale = mean_variance(moments).rsqrt()
        spread = hadamard(len(moments.mean)) * len(moments.mean) ** -0.5
        axes = _signed(torch.linalg.eigh(moments.covariance.cpu()).eigenvectors.T)
        self._set(mean=moments.mean, scale=scale, rotation=spread @ axes)
        return self


def _signed(axes: Tensor) -> Tensor:
    """Give each row the sign that makes its largest entry positive.

    An eigenvector is known up to its sign only. The paper (figure 4) goes by the diagonal entry,
    which was seen to be exactly zero for axes along which nothing varies; the largest never is.
    """
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))  # [C, 1]
    return axes * largest.sign()
