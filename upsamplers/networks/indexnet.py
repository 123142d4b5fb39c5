"""IndexNet: each fine cell takes its low-resolution cell, times an index in its place.

IndexNet (arXiv 1908.00672), the holistic index network: one index map for all channels. Its encoder
half, which pools under the same indices, has no place here, and what it reads is the image
(:mod:`.guidance`). The paper's indices are sigmoids, gates below 1 that darken every map; ours are
divided by their mean over the cell, so the mean of the fine cells of a cell is that cell, exactly.
Normalised in groups of channels rather than over the batch, see :class:`.guidance.FineGuide`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from . import Observation
from .guidance import FineGuide, Grouped


class IndexNetNetwork(nn.Module):
    """Predict ``factor * factor`` indices of each cell from the image; start at nearest neighbour.

    What they can change is how large a cell's features are here and there, not their direction.

    Args:
        channels: C of the features.
        factor: f, how much finer the result is.
        guide_channels: c, what is read off the image.
        context: see two cells a side rather than one.
    """

    tile_levels: tuple[int, ...] = ()

    def __init__(
        self, channels: int, factor: int, guide_channels: Grouped = 32, context: bool = True
    ):
        super().__init__()
        self.factor = factor
        self.guide = FineGuide(factor, guide_channels)
        before, after = (factor // 2, factor - factor // 2) if context else (0, 0)
        last = nn.Conv2d(2 * guide_channels, factor**2, 1)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.index = nn.Sequential(
            nn.ReplicationPad2d((before, after, before, after)),
            nn.Conv2d(guide_channels, 2 * guide_channels, factor + before + after, stride=factor),
            nn.GroupNorm(8, 2 * guide_channels),
            nn.ReLU6(),
            last,
        )

    def forward(self, observation: Observation) -> Tensor:
        """Return ``[B, C, h * factor, w * factor]``."""
        logits = self.index(self.guide(observation))  # [B, f * f, h, w]
        # sigmoid / mean(sigmoid), which cannot divide by zero in this form.
        indices = self.factor**2 * F.logsigmoid(logits).softmax(1)
        nearest = F.interpolate(observation.low, scale_factor=float(self.factor), mode="nearest")
        return nearest * F.pixel_shuffle(indices, self.factor)
