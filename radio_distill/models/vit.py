"""The body of the student: the blocks of a timm vision transformer, and windowed attention.

Windows are those of ViTDet (arXiv 2203.16527), without its relative positions. Tokens that are no
patches (summary, registers) attend in every window through a copy of their own, and the copies are
averaged afterwards.
"""

from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from ..errors import ConfigError, WeightsError
from ..registry import nearest
from ..types import Size


def create_body(architecture: str, pretrained: bool, drop_path: float) -> Any:
    """Create a timm ``VisionTransformer``; its blocks are wanted, not its head.

    Raises:
        ConfigError: where the name is not that of a plain vision transformer.
        WeightsError: where pretrained weights cannot be had.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    known = timm.list_models(module=["vision_transformer", "deit"], exclude_filters="*distilled*")
    if architecture.partition(".")[0] not in known:
        raise ConfigError(
            f"student.architecture: {architecture!r} is not a plain vision transformer of timm "
            f"({nearest(architecture, known)})"
        )
    try:
        body = timm.create_model(
            architecture, pretrained=pretrained, num_classes=0, drop_path_rate=drop_path
        )
    except Exception as error:  # a hub fails in as many ways as there are networks
        if not pretrained:
            raise
        raise WeightsError(
            f"student.pretrained: cannot get timm's weights of {architecture} "
            f"({' '.join(str(error).split())}); name a local file instead"
        ) from error
    assert type(body) is VisionTransformer, f"{architecture} is a {type(body).__name__}"
    return body


def spread_global_blocks(depth: int, num_global: int) -> frozenset[int]:
    """Return which of ``depth`` blocks attend globally: evenly spaced, the last one always.

    Raises:
        ConfigError: where there are not that many blocks, or none would be global.
    """
    if not 1 <= num_global <= depth:
        raise ConfigError(
            f"student.global_blocks: {num_global} is not between 1 and {depth}, the blocks that "
            "the architecture has"
        )
    return frozenset((i + 1) * depth // num_global - 1 for i in range(num_global))


def to_windows(patches: Tensor, window: int) -> Tensor:
    """Order patches by window: ``[B, h, w, D]`` to ``[B, windows * window**2, D]``."""
    return rearrange(patches, "b (r y) (c x) d -> b (r c y x) d", y=window, x=window)


def from_windows(patches: Tensor, grid: Size, window: int) -> Tensor:
    """Undo :func:`to_windows`."""
    rows = grid[0] // window
    return rearrange(patches, "b (r c y x) d -> b (r y) (c x) d", r=rows, y=window, x=window)


def attend_in_windows(block: nn.Module, tokens: Tensor, num_prefix: int, window: int) -> Tensor:
    """Run a block on each window by itself.

    Args:
        block: a transformer block, ``[B, N, D]`` to the same.
        tokens: ``[B, num_prefix + windows * window**2, D]``, patches ordered by window.
        num_prefix: tokens before the patches, which attend in every window.
        window: patches a side of a window.
    """
    prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
    windows = rearrange(patches, "b (k n) d -> (b k) n d", n=window**2)
    num_windows = windows.shape[0] // tokens.shape[0]
    copies = repeat(prefix, "b p d -> (b k) p d", k=num_windows)
    windows = block(torch.cat((copies, windows), dim=1))
    prefix = reduce(windows[:, :num_prefix], "(b k) p d -> b p d", "mean", k=num_windows)
    patches = rearrange(windows[:, num_prefix:], "(b k) n d -> b (k n) d", k=num_windows)
    return torch.cat((prefix, patches), dim=1)
