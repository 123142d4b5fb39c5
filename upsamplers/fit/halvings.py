"""The own training of UPLiFT and LiFT: the map of a smaller image becomes that of a larger one.

The teacher sees each image whole and halved, once or more. Of the map of a halved image a network
of steps of 2x is to make what the teacher says of the next larger one (LiFT, Suri et al., ECCV
2024: from a half and from a quarter, by the cosine), or of all larger ones, step by step (UPLiFT,
arXiv 2601.17950: from three halvings, by the squared error). Nothing beyond the teacher's own grid
is asked for: what the network adds there is what it has learned to add to coarser maps.

Ours: images are halved with antialiasing, where LiFT drops every other pixel; the comparisons of an
image weigh alike; and the optimizer is that of all fits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.config import FitConfig
from radio_distill.errors import ConfigError

from ..fitted import TeacherOutput, UpsamplerModel
from ..networks import Observation
from .losses import masked_mse


class Halvings(nn.Module):
    """The loss of such a fit, called as :class:`.consistency.Consistency` is.

    Args:
        model: what is fitted; its network has ``steps(observation, count)``.
        config: the recipe's section ``fit``.

    Raises:
        ConfigError: a network without steps of 2x.
    """

    def __init__(self, model: UpsamplerModel, config: FitConfig):
        super().__init__()
        if not hasattr(model.network, "steps"):
            raise ConfigError(
                f"fit.halvings: {config.upsampler} takes no steps of 2x; take uplift or lift, or "
                "set it to 0"
            )
        self.model = model
        self.downsampler = nn.Identity()  # none is needed, and files say so by its absence
        self._config = config

    def forward(
        self, seen: TeacherOutput, homographies: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each image ``[B]``, and it once more as the only term."""
        levels = [seen.observation.low, *seen.halves]  # each half as fine as the one before
        network: Any = self.model.network
        losses = []
        for start in range(1, len(levels)):
            observation = Observation(seen.observation.guidance, levels[start])
            maps = network.steps(observation, start if self._config.chain else 1)
            for number, fine in enumerate(maps, 1):
                losses.append(self._distance(fine.float(), levels[start - number]))
        loss = torch.stack(losses).mean(0)
        return loss, {"halvings": loss}

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self._config.distance == "mse":
            return masked_mse(prediction, target)
        return 1 - F.cosine_similarity(prediction, target, dim=1).mean((1, 2))
