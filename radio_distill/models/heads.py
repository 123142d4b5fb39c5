"""Heads that translate the student's tokens into one teacher's normalised space.

The "MLP v2" of the published RADIO models, with their parameter names (``fc1``, ``blocks``,
``final``), so that an export needs no table of names. Attention heads are left out.
"""

from einops import rearrange
from torch import Tensor, nn

from ..config import StudentConfig
from ..types import Features


class MLPHead(nn.Module):
    """Linear, residual [LayerNorm, GELU, Linear] layers, then LayerNorm, GELU, Linear.

    Args:
        in_features: width of the student.
        hidden_features: width inside.
        out_features: width of the teacher.
        num_layers: residual layers.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int, num_layers: int = 0
    ):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.blocks = nn.ModuleList(
            _layer(hidden_features, hidden_features) for _ in range(num_layers)
        )
        self.final = _layer(hidden_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, in_features]`` to ``[N, out_features]``."""
        hidden = self.fc1(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.final(hidden)
        return result


def _layer(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_features), nn.GELU(), nn.Linear(in_features, out_features))


class Adaptor(nn.Module):
    """One teacher's two heads.

    Args:
        embed_dim: width D of the student.
        channels: C of the teacher's spatial features.
        summary_channels: S of its summary, or None where it has none.
        config: the recipe's student section, for the shape of the heads.
    """

    def __init__(
        self, embed_dim: int, channels: int, summary_channels: int | None, config: StudentConfig
    ):
        super().__init__()
        hidden, layers = config.head_hidden, config.head_layers
        self.summary = (
            None
            if summary_channels is None
            else MLPHead(embed_dim, hidden, summary_channels, layers)
        )
        self.spatial = MLPHead(embed_dim, hidden, channels, layers)

    def forward(self, summary_token: Tensor, spatial: Tensor) -> Features:
        """Predict summary ``[B, S]`` (or None) and spatial ``[B, C, h, w]``.

        Args:
            summary_token: ``[B, D]``.
            spatial: ``[B, D, h, w]``.
        """
        summary = None if self.summary is None else self.summary(summary_token)
        _, _, height, width = spatial.shape
        tokens = self.spatial(rearrange(spatial, "b d h w -> (b h w) d"))
        tokens = rearrange(tokens, "(b h w) c -> b c h w", h=height, w=width)
        return Features(summary, tokens)
