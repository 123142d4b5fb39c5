"""A student with the body of any timm model that gives feature maps.

A body of stages (ConvNeXt, EfficientViT, RepViT, …) gives the map of its last stage, of the one
before, or of a last stage that is dilated; a body of tokens (the transformers with rotary positions
of DINOv3, EUPE and PE, …) that of its last block. One summary serves all teachers: the class token,
the mean of the map, or what the model itself pools.

The ``final_norm`` is one for map and summary, as in the ConvNeXts of DINOv3 (arXiv 2508.10104) and
EUPE (arXiv 2603.22387): that of timm's model, or of its head, where there is one.

Batch norms keep the statistics of the start and learn their scales and shifts alone. Statistics of
a batch would be those of a micro-batch on one process, padding included, and the gradient another
one on any other number of processes. So a body with batch norms needs a start.
"""

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import StudentConfig
from ..errors import ConfigError
from ..types import Size, spread_layers
from .body import Body, check_known, create_timm
from .student import Initialise

_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""What lets timm's models take inputs of any size, by family; others take them as they are."""
_TOKENS = ("pos_embed", "cls_token", "reg_token")


class _Level(NamedTuple):
    """One block or stage."""

    spatial: Tensor
    """Its map ``[B, C, h, w]``."""
    prefix: Tensor | None
    """Its tokens beside the patches ``[B, P, C]``, the class token first."""


class TimmStudent(Body):
    """A timm model that gives a map, and one summary for all teachers.

    Args:
        config: the recipe's student section.
        num_summary_tokens: T, one a teacher, which are all the same summary.
        initialise: reads ``config.pretrained``, as for :class:`.student.Student`.

    Raises:
        ConfigError: where the architecture is unknown or does not fit the other fields.
        WeightsError: where ``config.pretrained`` is missing, damaged or another model's.
    """

    shares_summary = True

    def __init__(
        self,
        config: StudentConfig,
        num_summary_tokens: int,
        initialise: Initialise | None = None,
    ):
        super().__init__()
        self.config, self.num_summary_tokens = config, num_summary_tokens
        self.patch_size = config.patch_size
        body, self.arguments = create_model(config, config.pretrained == "timm")
        self._take_statistics(body, config)
        self._has_tokens = _takes(body.forward_intermediates, "return_prefix_tokens")
        self.num_prefix_tokens = body.num_prefix_tokens if self._has_tokens else 0
        self.summary = self._summary_of(body)
        strides = [level["reduction"] for level in body.feature_info]
        self.level = len(strides) - 1 - (config.map == "second_last")
        run = strides if self.summary == "pool" else strides[: self.level + 1]
        self._size_step = math.lcm(max(run), self.patch_size)
        self.norm, self.norm_name = self._norm_of(body)
        self.depth = len(strides) if self._has_tokens else 0
        if self.summary != "pool":  # what is behind the map has no part in the student
            body.prune_intermediate_layers([self.level], prune_norm=True, prune_head=True)
            body.head = nn.Identity()
        self._set_checkpointing(body)
        self.body, self.blocks = body, nn.ModuleList()
        self._measure()
        if config.pretrained not in ("", "timm"):
            assert initialise is not None, "nothing reads config.pretrained"
            initialise(self, body, config)

    @property
    def size_step(self) -> int:
        """Pixels that each side of an input must be a multiple of: the largest stride."""
        return self._size_step

    @property
    def fixed_size(self) -> Size | None:
        """The only size that it takes, where the recipe gives the model an ``img_size``."""
        size = self.config.options.get("img_size")
        return (size, size) if isinstance(size, int) else size and (size[0], size[1])

    @property
    def undecayed(self) -> set[nn.Parameter]:
        """Tokens, position tables, and what timm says of the model."""
        named = set(getattr(self.body, "no_weight_decay", set)())
        return {
            parameter
            for name, parameter in self.body.named_parameters()
            if name in named or name.endswith(_TOKENS)
        }

    def train(self, mode: bool = True) -> "TimmStudent":
        """Set the mode of all but the batch norms, whose statistics stay as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def check_start(self, pretrained: str) -> None:
        """Refuse batch norms without the statistics of a start."""
        if not pretrained and any(isinstance(module, _BatchNorm) for module in self.modules()):
            raise ConfigError(
                f"student.pretrained: {self.config.architecture} has batch norms, whose statistics "
                "stay those of its start; name one, such as `timm`, or take a body without them"
            )

    def forward(
        self,
        pixels: Tensor,
        draws: Tensor | None = None,
        window_size: int | None = None,
        every_block: bool = False,
    ) -> tuple[Tensor, ...]:
        """Encode images into summaries ``[B, T, S]``, all the same, and a map ``[B, D, h, w]``.

        Positions are not drawn and there are no windows, so ``draws`` are not looked at. With
        ``every_block``, of a body of tokens, the same two follow of each block.
        """
        assert not window_size, "a timm model has no windows of ours"
        assert self.depth or not every_block, "stages have widths of their own"
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        indices = list(range(self.level + 1)) if every_block else [self.level]
        final, maps = self._run(pixels, indices)
        if self.summary == "pool":
            summary = self.body.forward_head(final, pre_logits=True)
        else:
            summary = self.norm(self._summarised(maps[-1]))
        outputs = [self._a_teacher(summary), self._normalised(_resized(maps[-1].spatial, grid))]
        for level in maps if every_block else ():
            outputs += [self._a_teacher(self._summarised(level)), level.spatial]
        return tuple(outputs)

    def layers(self, pixels: Tensor, count: int) -> list[tuple[Tensor | None, Tensor]]:
        """Return class tokens and maps of ``count`` blocks or stages, spread over the depth.

        Maps of stages are resized to the grid of the last, and have channels of their own; the
        last alone is normalised then. Where the summary is a mean or pooled, no token comes.
        """
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        wanted = spread_layers(self.level + 1, count)
        indices = sorted(set(wanted))
        found: dict[int, tuple[Tensor | None, Tensor]] = {}
        for index, level in zip(indices, self._run(pixels, indices)[1], strict=True):
            tokens, spatial = None, _resized(level.spatial, grid)
            if self.summary == "token":
                tokens = self._a_teacher(self.norm(self._summarised(level)))
            if self.depth or index == self.level:
                spatial = self._normalised(spatial)
            found[index] = tokens, spatial
        return [found[index] for index in wanted]

    def to_timm(self) -> dict[str, Tensor]:
        """Return the weights under the names that they have in the whole timm model.

        Without those of the parts that the student leaves out.
        """
        tensors: dict[str, Tensor] = self.body.state_dict()
        if self.norm_name:
            tensors |= {f"{self.norm_name}.{key}": it for key, it in self.norm.state_dict().items()}
        return tensors

    def from_timm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a timm model's tensors are in :meth:`state_dict`; the rest is left behind.

        A norm that timm's model lacks stays as it is here.
        """
        own = self.body.state_dict()
        found = {f"body.{name}": item for name, item in tensors.items() if name in own}
        norm = self.norm.state_dict()
        if self.norm_name:
            names = {key: f"{self.norm_name}.{key}" for key in norm}
            norm = {key: tensors[name] for key, name in names.items() if name in tensors}
        return found | {f"norm.{key}": item for key, item in norm.items()}

    def _run(self, pixels: Tensor, indices: list[int]) -> tuple[Tensor, list["_Level"]]:
        """Return what the model ends with, empty where nothing is pooled, and some levels."""
        settings: dict[str, Any] = {"indices": indices}
        if self.num_prefix_tokens:
            settings["return_prefix_tokens"] = True
        pixels = (pixels - self.mean) / self.std
        if self.summary == "pool":
            final, maps = self.body.forward_intermediates(pixels, **settings)
        else:
            settings |= {"intermediates_only": True, "stop_early": True}
            final, maps = pixels, self.body.forward_intermediates(pixels, **settings)
        if self.num_prefix_tokens:
            return final, [_Level(spatial, prefix) for spatial, prefix in maps]
        return final, [_Level(spatial, None) for spatial in maps]

    def _summarised(self, level: "_Level") -> Tensor:
        """Return the class token or the mean, ``[B, D]``, before the norm."""
        if self.summary == "token":
            assert level.prefix is not None, "a body without class token"
            return level.prefix[:, 0]
        return level.spatial.mean((2, 3))

    def _a_teacher(self, summary: Tensor) -> Tensor:
        return summary[:, None].expand(-1, self.num_summary_tokens, -1)

    def _normalised(self, spatial: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity):
            return spatial
        normalised: Tensor = self.norm(rearrange(spatial, "b d h w -> b h w d"))
        return rearrange(normalised, "b h w d -> b d h w")

    def _summary_of(self, body: Any) -> str:
        config = self.config
        if self._has_tokens and config.map != "last":
            raise ConfigError(
                f"student.map: all blocks of {config.architecture} have one grid; take map: last"
            )
        if config.summary == "pool" and config.final_norm:
            raise ConfigError(
                "student.final_norm: a pooled summary has a norm of its own; take summary: mean"
            )
        has_token = self._has_tokens and getattr(body, "cls_token", None) is not None
        return "mean" if config.summary == "token" and not has_token else config.summary

    def _norm_of(self, body: Any) -> tuple[nn.Module, str]:
        """Make the final norm; the model's own where it has one of that width, with its name."""
        if not self.config.final_norm:
            return nn.Identity(), ""
        channels = body.feature_info[self.level]["num_chs"]
        if self._has_tokens:
            return body.norm, "norm"
        own = getattr(getattr(body, "head", None), "norm", None)
        if not isinstance(own, nn.LayerNorm) or own.normalized_shape != (channels,):
            return nn.LayerNorm(channels, eps=1e-6), ""
        norm = nn.LayerNorm(channels, eps=own.eps)  # the model's is one of maps
        norm.weight, norm.bias = own.weight, own.bias
        return norm, "head.norm"

    def _set_checkpointing(self, body: Any) -> None:
        if not self.config.gradient_checkpointing:
            return
        try:
            body.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(
                f"student.gradient_checkpointing: timm's {self.config.architecture} has none"
            ) from error

    @torch.no_grad()
    def _measure(self) -> None:
        """Find widths by a small image, and whether the map has the grid that the recipe says."""
        config, step = self.config, self._size_step
        size = self.fixed_size or (2 * step, 3 * step)
        was, wanted = self.training, (size[0] // self.patch_size, size[1] // self.patch_size)
        self.eval()
        try:
            final, (level,) = self._run(torch.full((1, self.bands, *size), 0.5), [self.level])
        except Exception as error:  # models check their inputs in ways of their own
            raise ConfigError(
                f"student.architecture: {config.architecture} does not take images of any size; "
                "give it one, for instance options: {img_size: 224}"
            ) from error
        found = (level.spatial.shape[2], level.spatial.shape[3])
        self.stride = size[0] // found[0]
        if found != wanted and config.map != "resized":
            stride = self.stride
            raise ConfigError(
                f"student.patch_size: the {config.map.replace('_', ' ')} map of "
                f"{config.architecture} has a cell every {stride} px, not {self.patch_size}; set "
                f"it to {stride}, or student.map to resized"
            )
        self.embed_dim = self.summary_dim = level.spatial.shape[1]
        if self.summary == "pool":
            self.summary_dim = self.body.forward_head(final, pre_logits=True).shape[1]
        self.train(was)


def create_model(config: StudentConfig, pretrained: bool = False) -> tuple[Any, dict[str, Any]]:
    """Create the timm model of a recipe, whole, for inputs of any size where it can be.

    Returns it with the arguments that make it, those of training alone left out.

    Raises:
        ConfigError: where the name or an option is unknown to timm.
        WeightsError: where pretrained weights cannot be had.
    """
    import timm

    check_known(config.architecture, timm.list_models(), "a model of timm")
    options = dict(config.options)
    if config.map == "dilated":
        options["output_stride"] = config.patch_size
    if config.bands != 3:
        options["in_chans"] = config.bands
    depth = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    for any_size in _ANY_SIZE:
        arguments = {**any_size, **options}
        try:
            return create_timm(config.architecture, pretrained, **arguments, **depth), arguments
        except ConfigError as error:
            if not any_size or next(iter(any_size)) not in str(error.__cause__):
                raise
    raise AssertionError("the last has no argument that could be unknown")


def _takes(function: Any, argument: str) -> bool:
    return argument in signature(function).parameters


def _resized(spatial: Tensor, grid: Size) -> Tensor:
    if spatial.shape[2:] == grid:
        return spatial
    return F.interpolate(spatial, grid, mode="bilinear", antialias=spatial.shape[2] > grid[0])
