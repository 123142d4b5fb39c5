"""Encoders of timm: vision transformers, SAM's encoder, and convolutional networks.

A transformer is built with ``dynamic_img_size``, so its position table is resampled for any size
that the patch divides (bicubic with antialiasing; DINOv2's own code has none, so off the native
size its features differ a little). The summary is the class token where there is one, else what the
model itself pools, by attention or mean, unless ``options.summary`` says otherwise; SAM's encoder
has none.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from math import isqrt
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError, WeightsError
from radio_distill.models.body import check_options
from radio_distill.registry import nearest
from radio_distill.system.files import reason_of
from radio_distill.types import Features, spread_layers
from radio_distill.weights import files

from .. import weights
from ..presets import Preset
from .packaged import packaged_weights
from .summaries import SUMMARY_OPTION, summary_of

logger = logging.getLogger(__name__)

ARGUMENTS = {
    "blocks": "number of transformer blocks to run, from the first; 0 for all",
    "stage": "index of the stage whose map is taken; -1 is the last, before SAM's neck",
    "summary": SUMMARY_OPTION,
    "final_norm": "true puts the last map of a ConvNeXt through its head's norm, as DINOv3 does",
    "create": "further arguments of timm.create_model",
    "prefix": "prefix of the model's tensors in the file; empty finds it",
}
_PLACE = "place"
"""Argument that :func:`complete` sets: folder or hub repository that the model is of."""


class TimmTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary or None, map ``[B, C, h, w]``)."""

    stated_stride: int | None
    """Pixels a side of one cell as timm states it; None where it does not."""

    def __init__(
        self,
        model: Any,
        blocks: int = 0,
        stage: int | None = None,
        summary: str = "",
        final_norm: bool = False,
        bands: int = 3,
    ):
        super().__init__()
        self.bands = bands
        if blocks:
            _keep_blocks(model, blocks)
        self.model: Any = model
        self.summary = summary or _usual_summary(model)
        self.norm = _norm_of_head(model) if final_norm else nn.Identity()
        self.stage = stage
        self.stated_stride = _stated_stride(model, -1 if stage is None else stage)

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.stage is None:
            final = self.model.forward_features(pixels)
            return self._summary(final), self.norm(self._map(final, pixels))
        if self.summary == "none":  # nothing behind the stage is computed
            maps = self.model.forward_intermediates(
                pixels, indices=[self.stage], stop_early=True, intermediates_only=True
            )
            return None, maps[0]
        final, maps = self.model.forward_intermediates(pixels, indices=[self.stage])
        return self._summary(final), maps[0]

    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return the features of ``count`` blocks of a transformer, up to the one that is taken.

        Their summary is the class token; where that joins behind the blocks, there is none.
        """
        if not (hasattr(self.model, "num_prefix_tokens") or _is_sam(self.model)):
            raise ConfigError(f"timm's {type(self.model).__name__} has stages of different grids")
        taken = range(len(self.model.blocks))[-1 if self.stage is None else self.stage]
        indices = spread_layers(taken + 1, count)
        run = self.model.forward_intermediates
        settings = {"indices": indices, "norm": self.stage is None, "intermediates_only": True}
        if _has_token(self.model) and "return_prefix_tokens" in signature(run).parameters:
            levels = run(pixels, return_prefix_tokens=True, **settings)
            found = [Features(prefix[:, 0], spatial) for spatial, prefix in levels]
        else:
            found = [Features(None, spatial) for spatial in run(pixels, **settings)]
        by_index = dict(zip(sorted(set(indices)), found, strict=True))
        return [by_index[index] for index in indices]

    def _summary(self, final: Tensor) -> Tensor | None:
        token, pooled, patches = None, None, final
        if _has_token(self.model):
            token, patches = final[:, 0], final[:, getattr(self.model, "num_prefix_tokens", 1) :]
        if self.summary == "pool":
            # A model that is asked for outputs projects what it has pooled to them.
            pooled = self.model.forward_head(final, pre_logits=not self.model.num_classes)  # [B, S]
        kind = f"timm's {type(self.model).__name__}"
        return summary_of(self.summary, kind, token=token, pooled=pooled, patches=patches)

    def _map(self, final: Tensor, pixels: Tensor) -> Tensor:
        kind = type(self.model).__name__
        if not isinstance(final, Tensor):
            raise ConfigError(
                f"timm's {kind} gives {len(final)} maps at once; take one: options.stage: -1"
            )
        if final.ndim == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return rearrange(final, "b h w c -> b c h w") if channels_last else final
        if self.stated_stride is None:
            raise ConfigError(f"timm says no stride of {kind}, whose tokens need one")
        height, width = (side // self.stated_stride for side in pixels.shape[-2:])
        num_tokens = final.shape[1]
        prefix = getattr(self.model, "num_prefix_tokens", num_tokens - height * width)
        if not 0 <= prefix == num_tokens - height * width:
            raise ConfigError(
                f"timm's {kind} gives {num_tokens} tokens, which are not {height}x{width} cells of "
                f"{self.stated_stride} px; try an inner map: options.stage: -1"
            )
        return rearrange(final[:, prefix:], "b (h w) c -> b c h w", h=height)


def _usual_summary(model: Any) -> str:
    if _is_sam(model):
        return "none"
    return "token" if _has_token(model) else "pool"


def _has_token(model: Any) -> bool:
    return getattr(model, "cls_token", None) is not None


def _norm_of_head(model: Any) -> nn.Module:
    """Return the norm of maps that a head applies to their mean (DINOv3, EUPE: to both)."""
    from timm.layers import LayerNorm2d

    norm = getattr(getattr(model, "head", None), "norm", None)
    if not isinstance(norm, LayerNorm2d):
        kind = type(model).__name__
        raise ConfigError(f"options.final_norm: the head of timm's {kind} has no norm of maps")
    return norm


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in size and normalisation from timm's configuration of the model, or its folder's."""
    folder = Path(weights_path).expanduser() if weights_path else None
    if preset.model.startswith((files.HUB, files.FOLDER)):
        place = preset.model
        preset = _described(preset, _folder_of(place, "config.json") / "config.json")
        preset = replace(
            preset,
            arguments={**preset.arguments, _PLACE: place},
            weights=place.replace(files.HUB, "hub: ").replace(files.FOLDER, "folder: "),
        )
    elif folder and not preset.model and (folder / "config.json").is_file():
        preset = _described(preset, folder / "config.json")
    if not preset.model:
        raise ConfigError(
            "options.model is missing: timm's name of the model that `weights` are of, such as "
            "vit_base_patch16_224"
        )
    if preset.native_size and preset.mean and preset.std:
        return preset
    config = _published(preset.model)
    return replace(
        preset,
        native_size=preset.native_size or _square_side(preset.model, config.input_size),
        mean=preset.mean or config.mean,
        std=preset.std or config.std,
        licence=config.license or preset.licence,
        weights=preset.weights or (f"hub: {config.hf_hub_id}" if config.hf_hub_id else ""),
    )


def build(preset: Preset) -> TimmTower:
    """Build the encoder with random weights."""
    return _tower(_create(preset), preset)


def locate(preset: Preset) -> Path:
    """Return the model's folder or file: of a package or a folder, else fetched from the hub."""
    if preset.package:
        return packaged_weights(preset.package)
    if _PLACE in preset.arguments:
        return _folder_of(preset.arguments[_PLACE])
    repository = _published(preset.model).hf_hub_id
    if not repository:
        raise WeightsError(
            f"timm names no hub weights for {preset.model}; put a local file into `weights`"
        )
    return files.hub_model(repository)


def load(preset: Preset, path: Path) -> TimmTower:
    """Build the encoder with the weights at ``path``, under timm's names or some it converts.

    Names may have a prefix, as :func:`files.named_as` reads them.
    """
    state = files.read_state(path)
    with weights.WithoutValues():
        model = _create(preset, state)
    prefix = preset.arguments.get("prefix", "")
    state = files.named_as(state, model.state_dict(), str(path), prefix)
    side = _table_side(state, model)
    if side:
        with weights.WithoutValues():
            model = _create(_at_side(preset, side, str(path)), state)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and _without_classifier(state, model).keys() != model.state_dict().keys():
        state = _converted(convert, state, model)
    weights.load_strict(model, _without_classifier(state, model), str(path), take=True)
    return _tower(model, preset)


def _tower(model: nn.Module, preset: Preset) -> TimmTower:
    arguments = preset.arguments
    taken = {
        key: arguments[key]
        for key in ("blocks", "stage", "summary", "final_norm")
        if key in arguments
    }
    return TimmTower(model, **taken, bands=len(preset.mean or ()))


def _create(preset: Preset, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    import timm

    architecture = _architecture(preset.model)
    options = {"num_classes": 0, **_checked(preset.arguments.get("create", {}))}
    if (bands := options.get("in_chans", 3)) != len(preset.mean or ()):
        raise ConfigError(
            f"options.create.in_chans: a model of {bands} bands needs as many numbers in "
            f"options.mean and options.std, not {len(preset.mean or ())}"
        )
    if isinstance(options.get("mlp_layer"), str):  # the other layers timm takes by name itself
        options["mlp_layer"] = _layer(options["mlp_layer"])
    if architecture.startswith("vit_") and "_radio_" in architecture:
        options = {"use_naflex": True, "pos_embed_grid_size": _radio_grid(state), **options}
    try:
        try:
            return timm.create_model(architecture, dynamic_img_size=True, **options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return timm.create_model(architecture, **options)  # it takes any size as it is, or one
    except Exception as error:  # its models check their arguments in ways of their own
        reason = (reason_of(error) or type(error).__name__)[:150]
        raise ConfigError(f"timm.create_model({architecture!r}, **{options}): {reason}") from error


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what makes timm fetch or unpickle weights, which a folder's config.json could ask."""
    check_options(options, "options.create, or model_args of config.json")
    return options


def _layer(name: str) -> Any:
    """Return the MLP that timm calls so."""
    from timm.layers import mlp

    known = [name for name in vars(mlp) if name.endswith("Mlp") or name.startswith("SwiGLU")]
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(f"options.create.mlp_layer: timm has no {name!r} ({hint})")
    return getattr(mlp, name)


def _radio_grid(state: Mapping[str, Tensor] | None) -> tuple[int, int]:
    """Return the cells of a checkpoint's position table: timm's files have less than published."""
    tables = [item for key, item in (state or {}).items() if key.endswith("pos_embed")]
    side = isqrt(tables[0].flatten(0, -2).shape[0]) if tables else 128
    return side, side


def _table_side(state: Mapping[str, Tensor], model: Any) -> int | None:
    """Return the image side of a file's position table where it is not the model's own.

    timm would resample such a table to the model's grid, and once more to that of each image.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or not getattr(model, "dynamic_img_size", False):
        return None
    grid, rows = model.patch_embed.grid_size, table.shape[1]
    counts = [rows - tokens for tokens in (model.num_prefix_tokens, 1, 0)]
    squares = [count for count in counts if count > 0 and isqrt(count) ** 2 == count]
    if grid[0] * grid[1] in counts or not squares:
        return None
    return isqrt(squares[0]) * model.patch_embed.patch_size[0]


def _at_side(preset: Preset, side: int, where: str) -> Preset:
    """Have the model built for images of ``side`` pixels, where the recipe says so too."""
    if preset.native_size != side:
        raise WeightsError(
            f"{where} was trained at {side}x{side} px, as its position table says, and "
            f"{preset.model} is seen at {preset.native_size}; set options.native_size: {side}"
        )
    created = {**preset.arguments.get("create", {}), "img_size": side}
    return replace(preset, arguments={**preset.arguments, "create": created})


def _architecture(model: str) -> str:
    """Return the part of timm's ``architecture.tag`` that names code; the tag names weights."""
    import timm

    name = model.partition(".")[0]
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r} ({nearest(name, timm.list_models())})")
    return name


def _folder_of(place: str, *patterns: str) -> Path:
    """Return the folder behind ``local-dir:PATH`` or ``hf-hub:OWNER/NAME``.

    Args:
        place: either.
        patterns: the hub's files that are wanted; none for the whole model.
    """
    if place.startswith(files.HUB):
        return files.hub_folder(place, *patterns) if patterns else files.hub_model(place)
    folder = Path(place.removeprefix(files.FOLDER)).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"no folder {folder}; correct options.model")
    return folder


def _described(preset: Preset, path: Path) -> Preset:
    """Take over what ``config.json`` of a timm folder says of its model."""
    settings = files.read_json(path)
    published = settings.get("pretrained_cfg", settings)  # older files have one table for both
    try:
        model, size = settings["architecture"], published["input_size"]
        return replace(
            preset,
            model=model,
            native_size=preset.native_size or _square_side(model, size),
            mean=preset.mean or tuple(published["mean"]),
            std=preset.std or tuple(published["std"]),
            licence=preset.licence if preset.licence != "unknown" else _licence(published),
            arguments={
                **preset.arguments,
                "create": {
                    **(settings.get("model_args") or {}),
                    **preset.arguments.get("create", {}),
                },
            },
        )
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} is no timm model's: it has no {error}; name the model in options.model"
        ) from error


def _licence(published: Mapping[str, Any]) -> str:
    return published.get("license") or "unknown"


def _square_side(model: str, size: Sequence[int]) -> int:
    """Return the longer side of timm's ``(channels, height, width)``; the log has a rectangle."""
    if size[-2] != size[-1]:
        logger.info(
            "%s is made for images of %dx%d px; its native size is taken as %d px "
            "(options.native_size sets another)", model, size[-2], size[-1], max(size[-2:]),
        )  # fmt: skip
    return int(max(size[-2:]))


def _published(model: str) -> Any:
    """Return what timm knows of the published weights of ``architecture.tag``."""
    import timm

    name, _, tag = model.partition(".")
    tags = [item.partition(".")[2] for item in timm.list_pretrained(f"{_architecture(model)}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"timm has no weights {tag!r} of {name} ({nearest(tag, tags)})")
    return timm.get_pretrained_cfg(model)


def _stated_stride(model: Any, stage: int) -> int | None:
    """Return the reduction in timm's table of feature maps, else the patch of the embedding."""
    described = getattr(model, "feature_info", None)
    if described is not None:
        try:
            return int(list(described)[stage]["reduction"])
        except (IndexError, KeyError, TypeError):
            pass
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = getattr(embedding, "patch_size", None)
    return patch[0] if isinstance(patch, tuple) else patch


def _is_sam(model: nn.Module) -> bool:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return isinstance(model, VisionTransformerSAM)


def _keep_blocks(model: Any, blocks: int) -> None:
    if not hasattr(model, "num_prefix_tokens"):
        raise ConfigError("option `blocks` is for vision transformers; a network has `stage`")
    if not 1 <= blocks <= len(model.blocks):
        raise ConfigError(f"blocks: {blocks} is not between 1 and {len(model.blocks)}")
    model.prune_intermediate_layers([blocks - 1], prune_norm=False, prune_head=False)


def _without_classifier(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out the tensors of a classifier, which the model was built without."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    wanted = model.state_dict()
    return {
        key: value for key, value in state.items() if key in wanted or not key.startswith(heads)
    }


def _converted(convert: Any, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    try:
        return convert(state, model)
    except (KeyError, RuntimeError, ValueError, AttributeError):
        return state  # not a format that timm knows: the strict load says what is wrong
