"""Encoders of timm: vision transformers, SAM's encoder, and convolutional networks.

A transformer is built with ``dynamic_img_size``, so its position table is resampled for any size
that the patch divides (bicubic with antialiasing; DINOv2's own code has none, so off the native
size its features differ a little). The summary is the class token where there is one, else what the
model itself pools, by attention or mean; SAM's encoder has none.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from math import isqrt
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError, WeightsError
from radio_distill.registry import nearest

from . import weights
from .presets import Preset

ARGUMENTS = {
    "blocks": "number of transformer blocks to run, from the first; 0 for all",
    "stage": "index of the stage whose map is taken; -1 is the last, before SAM's neck",
    "create": "further arguments of timm.create_model",
}


class TimmTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary or None, map ``[B, C, h, w]``)."""

    def __init__(self, model: Any, blocks: int = 0, stage: int | None = None):
        super().__init__()
        if blocks:
            _keep_blocks(model, blocks)
        self.model: Any = model
        self.stage = stage

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.stage is None:
            final = self.model.forward_features(pixels)
            return self._summary(final), self._map(final, pixels)
        final, maps = self.model.forward_intermediates(pixels, indices=[self.stage])
        return self._summary(final), maps[0]

    def _summary(self, final: Tensor) -> Tensor | None:
        if _is_sam(self.model):
            return None
        if getattr(self.model, "cls_token", None) is not None:
            return final[:, 0]  # [B, C]
        return self.model.forward_head(final, pre_logits=True)  # [B, S]

    def _map(self, final: Tensor, pixels: Tensor) -> Tensor:
        if final.ndim == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return rearrange(final, "b h w c -> b c h w") if channels_last else final
        patches = final[:, self.model.num_prefix_tokens :]  # [B, N, C]
        embedding = getattr(self.model, "patch_embed", None) or self.model.embeds
        height = pixels.shape[-2] // embedding.patch_size[0]
        return rearrange(patches, "b (h w) c -> b c h w", h=height)


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in size and normalisation from timm's configuration of the model, or its folder."""
    settings = Path(weights_path, "config.json").expanduser()
    if weights_path and not preset.model and settings.is_file():
        preset = _described(preset, settings)
    if preset.native_size and preset.mean and preset.std:
        return preset
    config = _published(preset.model)
    return replace(
        preset,
        native_size=preset.native_size or config.input_size[-1],
        mean=preset.mean or config.mean,
        std=preset.std or config.std,
        licence=config.license or preset.licence,
        weights=preset.weights or (f"hub: {config.hf_hub_id}" if config.hf_hub_id else ""),
    )


def build(preset: Preset) -> TimmTower:
    """Build the encoder with random weights."""
    return _tower(_create(preset), preset.arguments)


def locate(preset: Preset) -> Path:
    """Fetch the weights from the hub; returns the file."""
    from huggingface_hub import hf_hub_download

    repository = _published(preset.model).hf_hub_id
    if not repository:
        raise WeightsError(
            f"timm names no hub weights for {preset.model}; put a local file into `weights`"
        )
    return weights.from_hub(preset.model, lambda: hf_hub_download(repository, "model.safetensors"))


def load(preset: Preset, path: Path) -> TimmTower:
    """Build the encoder with the weights at ``path``, under timm's names or some it converts."""
    state = weights.read_state(path)
    model = _create(preset, state)
    wanted = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and not wanted.keys() <= state.keys():
        state = _converted(convert, state, model)
    heads = _classifier_names(model)
    state = {
        key: value for key, value in state.items() if key in wanted or not key.startswith(heads)
    }
    weights.load_strict(model, state, str(path))
    return _tower(model, preset.arguments)


def _tower(model: nn.Module, arguments: Mapping[str, Any]) -> TimmTower:
    return TimmTower(model, arguments.get("blocks", 0), arguments.get("stage"))


def _create(preset: Preset, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    import timm

    architecture = _architecture(preset.model)
    options = {"num_classes": 0, **_checked(preset.arguments.get("create", {}))}
    if architecture.startswith("vit_") and "_radio_" in architecture:
        options = {"use_naflex": True, "pos_embed_grid_size": _radio_grid(state), **options}
    try:
        return timm.create_model(architecture, dynamic_img_size=True, **options)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise ConfigError(
                f"timm.create_model({architecture!r}, **{options}): {error}"
            ) from error
    return timm.create_model(architecture, **options)  # a network that takes any size as it is


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what makes timm fetch or unpickle weights, which a folder's config.json could ask."""
    import timm

    for name, parameter in signature(timm.create_model).parameters.items():
        if name in options and parameter.kind is not parameter.VAR_KEYWORD:
            raise ConfigError(
                f"options.create, or model_args of config.json: {name} is not the architecture's; "
                "remove it, and name weights in `weights`"
            )
    return options


def _radio_grid(state: Mapping[str, Tensor] | None) -> tuple[int, int]:
    """Return the cells of a checkpoint's position table: timm's files have less than published."""
    tables = [item for key, item in (state or {}).items() if key.endswith("pos_embed")]
    side = isqrt(tables[0].flatten(0, -2).shape[0]) if tables else 128
    return side, side


def _architecture(model: str) -> str:
    """Return the part of timm's ``architecture.tag`` that names code; the tag names weights."""
    import timm

    name = model.partition(".")[0]
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r} ({nearest(name, timm.list_models())})")
    return name


def _described(preset: Preset, path: Path) -> Preset:
    """Take over what ``config.json`` of a timm folder says of its model."""
    settings = weights.read_json(path)
    published = settings.get("pretrained_cfg", {})
    try:
        return replace(
            preset,
            model=settings["architecture"],
            native_size=preset.native_size or published["input_size"][-1],
            mean=preset.mean or tuple(published["mean"]),
            std=preset.std or tuple(published["std"]),
            arguments={"create": settings.get("model_args", {}), **preset.arguments},
        )
    except KeyError as error:
        raise WeightsError(f"{path} has no {error}; name the model in options.model") from error


def _published(model: str) -> Any:
    """Return what timm knows of the published weights of ``architecture.tag``."""
    import timm

    name, _, tag = model.partition(".")
    tags = [item.partition(".")[2] for item in timm.list_pretrained(f"{_architecture(model)}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"timm has no weights {tag!r} of {name} ({nearest(tag, tags)})")
    return timm.get_pretrained_cfg(model)


def _is_sam(model: nn.Module) -> bool:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return isinstance(model, VisionTransformerSAM)


def _keep_blocks(model: Any, blocks: int) -> None:
    if not hasattr(model, "num_prefix_tokens"):
        raise ConfigError("option `blocks` is for vision transformers; a network has `stage`")
    if not 1 <= blocks <= len(model.blocks):
        raise ConfigError(f"blocks: {blocks} is not between 1 and {len(model.blocks)}")
    model.prune_intermediate_layers([blocks - 1], prune_norm=False, prune_head=False)


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _converted(convert: Any, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    try:
        return convert(state, model)
    except (KeyError, RuntimeError, ValueError, AttributeError):
        return state  # not a format that timm knows: the strict load says what is wrong
