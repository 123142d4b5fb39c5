"""What a model of transformers gives, as a summary and a map: by family, and of any other model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError
from radio_distill.types import Features, spread_layers

from ..presets import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from .remote_code import size_options
from .summaries import summary_of


@dataclass(frozen=True)
class Family:
    """Names of a family of models: its class, its tokens before the patches, its summary."""

    model: str
    """Class of transformers that is the image tower alone."""
    prefix_tokens: Callable[[Any], int]
    """Count of the class tokens and registers; where there are any, the first is a class token."""
    pooled: str = "pooler_output"
    """What the model itself pools, as its output names it; DINO's is its class token."""
    token_norm: str = ""
    """Name of a norm of the class token that the map does not go through."""
    norm: str = ""
    """Name of the norm between its last block and its map; empty where there is none."""
    fixed_size: bool = False
    mean: tuple[float, ...] = HALF
    """Normalisation that most published models of the family have, for a message."""
    std: tuple[float, ...] = HALF


def _registers(config: Any) -> int:
    return 1 + getattr(config, "num_register_tokens", 0)


_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

FAMILIES = {
    "clip_vision_model": Family(
        "CLIPVisionModelWithProjection", lambda _: 1, "image_embeds", "post_layernorm",
        mean=CLIP_MEAN, std=CLIP_STD,
    ),
    "siglip_vision_model": Family("SiglipVisionModel", lambda _: 0, norm="post_layernorm"),
    "dinov2": Family("Dinov2Model", _registers, norm="layernorm", **_IMAGENET),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", _registers, norm="layernorm", **_IMAGENET
    ),
    "dinov3_vit": Family("DINOv3ViTModel", _registers, norm="norm", **_IMAGENET),
    "sam_vision_model": Family("SamVisionModel", lambda _: 0, fixed_size=True, **_IMAGENET),
    "sam3_vit_model": Family("Sam3ViTModel", lambda _: 0, fixed_size=True),
    "radio": Family(
        "RadioModel", lambda config: config.num_summary_tokens, "summary",
        mean=CLIP_MEAN, std=CLIP_STD,
    ),
}  # fmt: skip


class TransformersTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary or None, map ``[B, C, h, w]``)."""

    def __init__(self, model: Any, family: Family, summary: str = ""):
        super().__init__()
        if family.model == "RadioModel":
            model.make_preprocessor_external()  # pixels arrive normalised
        self.model: Any = model
        self.family = family
        self.summary = summary
        self.stated_stride = side_of(model.config.patch_size)
        self._options = size_options(model)

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        output = self.model(pixels, **self._options)
        return self._summary(output), self._map(output.last_hidden_state, pixels)

    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return class tokens, RADIO's side by side, and maps of ``count`` blocks."""
        output = self.model(pixels, output_hidden_states=True, **self._options)
        states = _inner_states(self.model, output, count, (self.family.norm,))
        return [Features(self._class_tokens(state), self._map(state, pixels)) for state in states]

    def _summary(self, output: Any) -> Tensor | None:
        pooled, tokens = output.get(self.family.pooled), output.last_hidden_state
        prefix = self.family.prefix_tokens(self.model.config)
        return summary_of(
            self.summary or ("none" if pooled is None else "pool"),
            type(self.model).__name__,
            token=self._normed(tokens[:, 0]) if prefix else None,
            pooled=pooled,
            patches=tokens[:, prefix:],
        )

    def _class_tokens(self, tokens: Tensor) -> Tensor | None:
        """Return those that the model's own summary is made of, ``[B, S]``."""
        if not self.family.prefix_tokens(self.model.config):
            return None
        return self._normed(tokens[:, getattr(self.model, "summary_idxs", [0])]).flatten(1)

    def _normed(self, class_tokens: Tensor) -> Tensor:
        normed: Tensor = _norm_of(self.model, self.family.token_norm)(class_tokens)
        return normed

    def _map(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        if tokens.ndim == 4:  # SAM's neck speaks in maps already
            return tokens
        patches = tokens[:, self.family.prefix_tokens(self.model.config) :]  # [B, N, C]
        height = pixels.shape[-2] // self.stated_stride
        return rearrange(patches, "b (h w) c -> b c h w", h=height)


def _inner_states(model: Any, output: Any, count: int, norms: Sequence[str]) -> list[Tensor]:
    """Return the tokens of ``count`` blocks, each through the first of ``norms`` that is there.

    Raises:
        ConfigError: where the model gives no such states, or of another shape than its last.
    """
    states, last = output.hidden_states, output.last_hidden_state
    if not states or any(state.shape != last.shape for state in states):
        raise ConfigError(f"the states of {type(model).__name__} are not of the shape of its map")
    norm = _norm_of(model, *norms)
    depth = len(states) - 1  # the first are the embeddings
    return [
        last if index == depth - 1 else norm(states[index + 1])
        for index in spread_layers(depth, count)
    ]


def _norm_of(model: Any, *names: str) -> nn.Module:
    """Return the first of these that a model has; the identity where it has none."""
    inside = getattr(model, "vision_model", model)
    return next((found for name in names if (found := getattr(inside, name, None))), nn.Identity())


@dataclass(frozen=True)
class GenericFamily:
    """A family that nothing is known of but that its one input is pixels."""

    model: Any
    """Class of transformers."""
    fixed_size: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class GenericTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary, map ``[B, C, h, w]``) of any image model.

    Its map is ``last_hidden_state``. Tokens are a grid of the patch that the configuration names,
    or of the patch doubled in every stage behind the first; class and registers are in front.
    """

    stated_stride = None
    """Unknown: what ``patch_size`` means differs from model to model, so it is measured."""

    def __init__(self, model: Any, summary: str = ""):
        super().__init__()
        self.model: Any = model
        self.summary = summary
        self._options = size_options(model)
        config = model.config
        stages = len(getattr(config, "depths", None) or [0])
        patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None) or 4
        patch = side_of(patch) if isinstance(patch, int) or len(patch) == 2 else 4
        self._patches = dict.fromkeys((patch, patch * 2 ** (stages - 1)))
        # None, a class token, one more of a distilled model, or registers.
        self._prefixes = {0, 1, 2, 1 + (getattr(config, "num_register_tokens", 0) or 0)}

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        output = self.model(pixels, **self._options)
        spatial = last = output.last_hidden_state
        pooled, token = output.get("pooler_output"), None
        if last.ndim == 3:  # tokens, else [B, C, h, w]
            token, spatial = self._split(last, pixels)
        patches = rearrange(spatial, "b c h w -> b (h w) c")
        if pooled is None and token is None:
            pooled = patches.mean(1)
        summary = summary_of(
            self.summary or ("pool" if token is None else "token"),
            type(self.model).__name__,
            token=token,
            pooled=None if pooled is None else pooled.flatten(1),
            patches=patches,
        )
        return summary, spatial

    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return first tokens, if no patches, and maps of ``count`` blocks.

        They have gone through what is called as final norms mostly are.
        """
        output = self.model(pixels, output_hidden_states=True, **self._options)
        states = _inner_states(self.model, output, count, ("layernorm", "norm", "post_layernorm"))
        if output.last_hidden_state.ndim == 4:
            return [Features(None, state) for state in states]
        return [Features(*self._split(state, pixels)) for state in states]

    def _split(self, tokens: Tensor, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the first token, unless it is a patch, and the map of tokens ``[B, N, C]``."""
        height, width, prefix = self._grid(tokens.shape[1], pixels)
        spatial = rearrange(tokens[:, prefix:], "b (h w) c -> b c h w", h=height, w=width)
        return tokens[:, 0] if prefix else None, spatial

    def _grid(self, num_tokens: int, pixels: Tensor) -> tuple[int, int, int]:
        for patch in self._patches:
            height, width = (side // patch for side in pixels.shape[-2:])
            if num_tokens - height * width in self._prefixes and height * width:
                return height, width, num_tokens - height * width
        raise ConfigError(
            f"{type(self.model).__name__} gives {num_tokens} tokens for {pixels.shape[-2]}x"
            f"{pixels.shape[-1]} px, which are no grid of cells of "
            f"{' or '.join(map(str, self._patches))} px; take another model"
        )


def side_of(size: Any) -> int:
    """Return the side of a square that a configuration names as a number or as a pair."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"config.json: {list(size)} is no square, as a patch must be")
    return int(sides.pop())
