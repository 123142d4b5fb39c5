"""IndexNet: each fine cell takes its low-resolution cell, times an index in its place.

IndexNet (arXiv 1908.00672): the holistic index network has one index map for all channels, the
depthwise ones have one each. Its encoder half, which pools under the same indices, has no place
here, and what it reads is the image (:mod:`.guidance`). The paper's indices are sigmoids, gates
below 1 that darken every map; ours are divided by their mean over the cell, so the mean of the fine
cells of a cell is that cell, exactly. Normalised in groups of channels rather than over the batch,
see :class:`.guidance.FineGuide`.
"""

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import Observation
from .guidance import FineGuide, Grouped


class IndexNetNetwork(nn.Module):
    """IndexNet (arXiv 1908.00672): each cell times indices that the image predicts.

    There are ``factor * factor`` of each cell; they start at nearest neighbour.

    One map for all channels can only change how large a cell's features are here and there, not
    their direction.

    Args:
        channels: C of the features.
        factor: f, how much finer the result is.
        guide_channels: c, what is read off the image.
        context: see two cells a side rather than one.
        kind: ``holistic``, or depthwise with a branch for each of the f * f indices: ``m2o``, of
            all c channels; ``o2o``, where the image is first brought to C channels, each of which
            has the say in one of the features' alone.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self,
        channels: int,
        factor: int,
        guide_channels: Grouped = 32,
        context: bool = True,
        kind: Literal["holistic", "o2o", "m2o"] = "holistic",
    ):
        super().__init__()
        self.factor, self.kind = factor, kind
        cells, all_cells = factor**2, channels * factor**2
        self.guide = FineGuide(factor, guide_channels)
        before, after = (factor // 2, factor - factor // 2) if context else (0, 0)
        # Channels in, of a channel's branches together, out; groups of convolution, norm and last.
        width, hidden, outputs, groups = {
            "holistic": (guide_channels, 2 * guide_channels, cells, (1, 8, 1)),
            "m2o": (guide_channels, 2 * guide_channels * cells, all_cells, (1, 8 * cells, cells)),
            "o2o": (channels, 2 * all_cells, all_cells, (channels, channels, all_cells)),
        }[kind]
        last = nn.Conv2d(hidden, outputs, 1, groups=groups[2])
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        side = factor + before + after
        self.index = nn.Sequential(
            nn.ReplicationPad2d((before, after, before, after)),
            nn.Conv2d(width, hidden, side, stride=factor, groups=groups[0]),
            nn.GroupNorm(groups[1], hidden),
            nn.ReLU6(),
            last,
        )
        self.bring = nn.Conv2d(guide_channels, channels, 1) if kind == "o2o" else nn.Identity()

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        logits = self.index(self.bring(self.guide(observation)))
        order = "b (k c) h w -> b c k h w" if self.kind == "m2o" else "b (c k) h w -> b c k h w"
        logits = rearrange(logits, order, k=self.factor**2)  # one map, or C
        # sigmoid / mean(sigmoid), which cannot divide by zero in this form.
        indices = self.factor**2 * F.logsigmoid(logits).softmax(2)
        nearest = F.interpolate(observation.low, scale_factor=float(self.factor), mode="nearest")
        return nearest * F.pixel_shuffle(indices.flatten(1, 2), self.factor)
