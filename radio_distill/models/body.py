"""What every student body has, whatever its architecture, and how timm makes one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..config import StudentConfig
from ..errors import ConfigError, WeightsError
from ..registry import nearest
from ..system.files import reason_of
from ..types import Size


class Body(nn.Module, ABC):
    """Images to summary tokens and a feature map; what heads, evaluation and exports work with.

    Attributes:
        embed_dim: channels D of the map.
        summary_dim: channels of one summary token.
        patch_size: pixels a side of one cell of the map.
        blocks: the transformer blocks, where there is nothing else behind the embedding; else none.
        num_summary_tokens: T, one a teacher.
        depth: blocks of one width and grid, whose outputs heads may read; 0 for stages.
        num_prefix_tokens: tokens beside the patches, in a body of tokens.
        shares_summary: whether one summary serves all teachers, so that the T tokens are equal.
        window_size: side of its attention windows, in tokens; 0 for none.
        mean: of the pixels that the body was made for, ``[bands, 1, 1]``.
        std: likewise.
    """

    embed_dim: int
    summary_dim: int
    patch_size: int
    num_summary_tokens: int
    depth: int
    blocks: nn.ModuleList
    num_prefix_tokens: int
    shares_summary: bool
    window_size: int = 0
    mean: Tensor
    std: Tensor

    @property
    @abstractmethod
    def size_step(self) -> int:
        """Pixels that each side of an input must be a multiple of."""

    @property
    def bands(self) -> int:
        """Bands of the images that it takes: 3 of RGB."""
        return len(self.mean)

    @property
    def fixed_size(self) -> Size | None:
        """The only size of an input that it takes, in pixels, if there is but one."""
        return None

    @property
    def max_size(self) -> int | None:
        """Longest side that a table of positions spans, in pixels; None without such a table."""
        return None

    @property
    def undecayed(self) -> set[nn.Parameter]:
        """Parameters of several dimensions that weight decay is not for, such as tokens."""
        return set()

    def grid(self, size: Size) -> Size:
        """Return the feature grid for an input of ``size`` pixels.

        Raises:
            ConfigError: where the size does not fit, naming sizes that do.
        """
        step = self.size_step
        near = (
            [self.fixed_size]
            if self.fixed_size
            else [
                tuple(max(side // step, 1) * step for side in size),
                tuple(-(-side // step) * step for side in size),
            ]
        )
        if size not in near or 0 in size:
            names = dict.fromkeys(f"{height}x{width}" for height, width in near)
            raise ConfigError(
                f"student: an input of {size[0]}x{size[1]} px is not {self._what_fits()} "
                f"(nearest {' and '.join(names)})"
            )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _take_statistics(self, model: Any, config: StudentConfig) -> None:
        """Register the mean and deviation of pixels: the recipe's, else a timm model's own."""
        from timm.data import resolve_model_data_config

        found = resolve_model_data_config(model)
        for name, own in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(own or found[name]).view(-1, 1, 1))

    def _what_fits(self) -> str:
        if self.fixed_size:
            return "the one that its body is made for"
        return f"a multiple of {self.size_step} px"

    @abstractmethod
    def forward(
        self,
        pixels: Tensor,
        draws: Tensor | None = None,
        window_size: int | None = None,
        every_block: bool = False,
    ) -> tuple[Tensor, ...]:
        """Encode images into summary tokens ``[B, T, S]`` and a feature map ``[B, D, h, w]``.

        Args:
            pixels: ``[B, 3, H, W]`` RGB in [0, 1], or of the body's ``bands``.
            draws: ``[B, NUM_DRAWS]`` uniform numbers for the position augmentation, of a body that
                has one; None for none.
            window_size: side of the attention windows, in tokens; None for the recipe's.
            every_block: return, behind these two, the same two behind each of ``depth`` blocks,
                without the final norm.

        Raises:
            ConfigError: where the size does not fit, naming sizes that do.
        """

    @abstractmethod
    def layers(self, pixels: Tensor, count: int) -> list[tuple[Tensor | None, Tensor]]:
        """Return what :meth:`forward` does of ``count`` layers, spread evenly over the depth.

        All maps ``[B, C, h, w]`` have the grid of the last, which is :meth:`forward`'s. Summary
        tokens ``[B, T, C]`` are None of a body whose summary is no token.
        """

    def check_start(self, pretrained: str) -> None:
        """Raise ConfigError where the body cannot be trained from such a start."""


def create_timm(architecture: str, pretrained: bool = False, **options: Any) -> Any:
    """Create a timm model without classifier.

    Args:
        architecture: timm's name, which must be known.
        pretrained: whether with timm's weights.
        options: of the model, see :func:`check_options`.

    Raises:
        WeightsError: where pretrained weights cannot be had.
        ConfigError: where the model does not take the options.
    """
    import timm

    check_options(options, "student.options")
    try:
        return timm.create_model(architecture, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # hubs and models fail in as many ways as there are
        if pretrained and not isinstance(error, TypeError):
            raise WeightsError(
                f"student.pretrained: cannot get timm's weights of {architecture} "
                f"({reason_of(error)}); name a local file instead"
            ) from error
        raise ConfigError(
            f"student.options: timm's {architecture} cannot be made with {options} "
            f"({reason_of(error)[:150]})"
        ) from error


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for what would make timm fetch or unpickle weights, as a file could ask."""
    import timm

    for name, parameter in signature(timm.create_model).parameters.items():
        if name in options and parameter.kind is not parameter.VAR_KEYWORD:
            raise ConfigError(
                f"{where}: {name} is no argument of the architecture; remove it, and name weights "
                "where the recipe asks for them"
            )


def check_known(architecture: str, known: list[str], what: str) -> None:
    """Raise ConfigError where timm's name of an architecture is not among ``known``."""
    if architecture.partition(".")[0] not in known:
        raise ConfigError(
            f"student.architecture: {architecture!r} is not {what} ({nearest(architecture, known)})"
        )
