"""The normalizers that the PHI-S paper (arXiv 2410.01680) compares PHI-S with, behind one face.

Its whitenings (PCA, ZCA, Hadamard) are left out: they blow up the directions in which teachers
hardly vary, and lose to PHI-S in the paper for that reason.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import Recipe, of_summary
from ..errors import CheckpointError, ConfigError
from ..protocols import Normalizer
from ..system.files import reason_of
from ..train.checkpoint import STATISTICS, Checkpoint
from ..types import TeacherSpec
from . import NORMALIZERS
from .affine import Affine, mean_variance
from .statistics import Moments

logger = logging.getLogger(__name__)


class GlobalStandardise(Affine):
    """One mean and one standard deviation for all channels together."""

    def fit(self, moments: Moments) -> "GlobalStandardise":
        """Take the statistics; raises DataError where the features never vary."""
        mean = moments.mean.mean()
        variance = mean_variance(moments) + moments.mean.var(correction=0).cpu()
        self._set(mean=mean.expand(len(moments.mean)).clone(), scale=variance.rsqrt())
        return self


class PerChannelStandardise(Affine):
    """A mean and a standard deviation for each channel.

    A channel that never varies (under 1e-12 of the mean variance) is centred and not scaled.
    """

    def fit(self, moments: Moments) -> "PerChannelStandardise":
        """Take the statistics; raises DataError where no channel varies."""
        variance = moments.covariance.diagonal()
        dead = variance <= 1e-12 * mean_variance(moments).to(variance)
        if dead.any():
            logger.warning("%d of %d channels never vary: not scaled", int(dead.sum()), len(dead))
        self._set(mean=moments.mean, scale=torch.where(dead, 1.0, variance).rsqrt())
        return self


class Identity:
    """No normalisation: features stay in the teacher's space, in float32."""

    uses_statistics = False

    def fit(self, moments: Moments) -> "Identity":
        """Take nothing."""
        return self

    def apply(self, spatial: Tensor) -> Tensor:
        """Return ``[B, C, h, w]`` as it is."""
        return spatial.to(torch.promote_types(spatial.dtype, torch.float32))

    invert = apply

    def fold(self, linear: nn.Linear) -> nn.Linear:
        """Return the linear itself: it predicts in the teacher's space already."""
        return linear

    unfold = fold

    def state(self) -> dict[str, Tensor]:
        """Return nothing: there is no state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> "Identity":
        """Take nothing; raises CheckpointError for another normalizer's state."""
        if state:
            raise CheckpointError(
                f"statistics hold {', '.join(sorted(state))} where {type(self).__name__} has none: "
                "they belong to another normalizer; restore normalizer.name or start the stage anew"
            )
        return self


class LayerNorm(Identity):
    """Each token to mean 0 and variance 1 over its channels, without weights.

    Every token loses its own mean and scale, which no later step can know: there is no inverse.
    """

    def apply(self, spatial: Tensor) -> Tensor:
        """Normalise ``[B, C, h, w]`` over C."""
        tokens = rearrange(super().apply(spatial), "b c h w -> b h w c")
        return rearrange(F.layer_norm(tokens, tokens.shape[-1:]), "b h w c -> b c h w")

    def invert(self, spatial: Tensor) -> Tensor:
        """Raise ConfigError: tokens have lost their mean and scale."""
        raise ConfigError(_NO_INVERSE)

    def fold(self, linear: nn.Linear) -> nn.Linear:
        """Raise ConfigError: there is no inverse to fold."""
        raise ConfigError(_NO_INVERSE)

    unfold = fold


_NO_INVERSE = (
    "layer_norm cannot be inverted: it drops each token's mean and scale, so a student trained "
    "with it cannot predict in the teacher's own space; train with phi_s for that"
)


def build_normalizers(name: str, teachers: Iterable[str]) -> dict[str, Normalizer]:
    """Make an unfitted normalizer of a kind for each of some teachers."""
    kind = NORMALIZERS.get(name)
    return {teacher: kind() for teacher in teachers}


def recipe_normalizers(recipe: Recipe, specs: Mapping[str, TeacherSpec]) -> dict[str, Normalizer]:
    """Make the unfitted normalizers of a recipe, named as :attr:`.Recipe.normalizers` has them."""
    without = [of_summary(name) for name, spec in specs.items() if spec.summary_channels is None]
    return {
        name: NORMALIZERS.get(kind)()
        for name, kind in recipe.normalizers.items()
        if name not in without
    }


def load_normalizers(normalizers: Mapping[str, Normalizer], tensors: Mapping[str, Tensor]) -> None:
    """Restore the states of normalizers from ``{"<teacher>/<tensor>": tensor}``."""
    for name, normalizer in normalizers.items():
        prefix = f"{name}/"
        state = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        normalizer.load_state(state)


def normalizers_of(checkpoint: Checkpoint) -> dict[str, Normalizer]:
    """Restore the normalizers that a checkpoint's heads were trained with."""
    normalizers = recipe_normalizers(checkpoint.recipe, checkpoint.teachers)
    restore_normalizers(normalizers, checkpoint)
    return normalizers


def restore_normalizers(normalizers: Mapping[str, Normalizer], checkpoint: Checkpoint) -> None:
    """Load a checkpoint's statistics; raises CheckpointError where they are none of these."""
    try:
        load_normalizers(normalizers, checkpoint.tensors(STATISTICS))
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {STATISTICS} has not the statistics of its teachers: "
            f"{reason_of(error)}"
        ) from error
