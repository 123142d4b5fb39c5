"""What a fit asks for: fine maps whose views are what the teacher says of those views.

A fine map is right where each view of it, made as coarse as the teacher, is what the teacher says
of that view of the image (FeatUp, arXiv 2403.10516, section 3; FeatSharp, arXiv 2502.16025,
section 3.1).
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config import FitConfig
from radio_distill.geometry import valid_mask, warp

from ..fitted import TeacherOutput, UpsamplerModel
from .downsamplers import build_downsampler
from .losses import UncertaintyNet, conditional_random_field, masked_mse, project, total_variation

_CRF_CHANNELS = 128


class Consistency(nn.Module):
    """The loss of a fit, with everything that it trains.

    Args:
        model: what is fitted.
        config: the recipe's section ``fit``.
        channels: C of the teacher.
    """

    def __init__(self, model: UpsamplerModel, config: FitConfig, channels: int):
        super().__init__()
        self.model = model
        self.downsampler = build_downsampler(
            config.downsampler, channels, config.factor, config.downsampler_kernel
        )
        self.uncertainty = UncertaintyNet(channels) if config.uncertainty else None
        self._config = config

    def forward(
        self, seen: TeacherOutput, homographies: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each image ``[B]`` and the terms it consists of, each ``[B]``.

        Args:
            seen: the images, with the views as its further images, in the order of
                ``homographies``.
            homographies: ``[B, V, 3, 3]``, see :mod:`upsamplers.fit.views`.
            generator: of the pixels that the conditional random field looks at.
        """
        config, observation = self._config, seen.observation
        fine = self.model(observation).float()  # [B, C, H, W]
        prediction = self.reconstruct(fine, homographies)  # [(B V), C, h, w]
        target = self.model.de_biased(seen.further)
        grid = (target.shape[-2], target.shape[-1])
        valid = valid_mask(homographies.flatten(0, 1), grid)  # [(B V), h, w]
        log_scale = None if self.uncertainty is None else self.uncertainty(seen.further)
        views = masked_mse(prediction, target, valid, log_scale)
        terms = {"consistency": rearrange(views, "(b v) -> b v", b=len(fine)).mean(1)}
        loss = terms["consistency"]
        if config.total_variation:
            terms["total_variation"] = total_variation(fine)
            loss = loss + config.total_variation * terms["total_variation"]
        if config.crf:
            few = project(fine, _CRF_CHANNELS, generator)
            terms["crf"] = conditional_random_field(
                few, observation.guidance, "featup", generator=generator
            )
            loss = loss + config.crf * terms["crf"]
        return loss, terms

    def reconstruct(self, fine: Tensor, homographies: Tensor) -> Tensor:
        """Predict the teacher's maps of views ``[(B V), C, h, w]`` from fine maps."""
        size = (fine.shape[-2], fine.shape[-1])
        coarse: Tensor = self.downsampler(warp(fine, homographies.flatten(0, 1), size))
        return coarse
