"""Vision towers of transformers: CLIP, SigLIP (1 and 2), DINOv2, DINOv3, SAM, SAM3, RADIO.

Other models whose one input is pixels (ViT, DeiT, BEiT, Swin, ConvNeXt, ResNet, I-JEPA ...) are
taken by what their ``last_hidden_state`` is: a map, or tokens of which the last ones are patches.
The stride is measured then, and the summary is the first token, else what the model pools, else the
mean of the patches.

A tower is built from its configuration and loaded from the tensors alone, so no code that rides
with a checkpoint runs; :mod:`.remote_code` has the exception. Reads a folder with
``config.json`` and safetensors, or a hub's copy of one. SigLIP2's NaFlex checkpoints, which take
patches in place of pixels, and models that need text or prompts too are left out.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.system.files import reason_of
from radio_distill.system.progress import quiet_transformers
from radio_distill.types import spread_layers

from .. import weights
from ..presets import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Preset, Triple
from . import remote_code

ARGUMENTS = {
    "config": "the model's configuration, with its model_type; empty reads config.json",
    "prefix": "prefix of the tower's tensors inside the checkpoint of a larger model",
    remote_code.OPTION: "true to run the Python files of a model that has its own; read them first",
}


@dataclass(frozen=True)
class Family:
    """Names of a family of models: its class, its summary, its tokens before the patches."""

    model: str
    """Class of transformers that is the image tower alone."""
    summary: Callable[[Any], Tensor | None]
    prefix_tokens: Callable[[Any], int]
    norm: str = ""
    """Name of the norm between its last block and its map; empty where there is none."""
    fixed_size: bool = False
    mean: Triple = HALF
    """Normalisation that most published models of the family have, for a message."""
    std: Triple = HALF


def _first_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _registers(config: Any) -> int:
    return 1 + getattr(config, "num_register_tokens", 0)


_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

FAMILIES = {
    "clip_vision_model": Family(
        "CLIPVisionModelWithProjection", lambda out: out.image_embeds, lambda _: 1,
        mean=CLIP_MEAN, std=CLIP_STD,
    ),
    "siglip_vision_model": Family(
        "SiglipVisionModel", lambda out: out.pooler_output, lambda _: 0, "post_layernorm"
    ),
    "dinov2": Family("Dinov2Model", _first_token, _registers, "layernorm", **_IMAGENET),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", _first_token, _registers, "layernorm", **_IMAGENET
    ),
    "dinov3_vit": Family("DINOv3ViTModel", _first_token, _registers, "norm", **_IMAGENET),
    "sam_vision_model": Family(
        "SamVisionModel", lambda _: None, lambda _: 0, fixed_size=True, **_IMAGENET
    ),
    "sam3_vit_model": Family("Sam3ViTModel", lambda _: None, lambda _: 0, fixed_size=True),
    "radio": Family(
        "RadioModel", lambda out: out.summary, lambda config: config.num_summary_tokens,
        mean=CLIP_MEAN, std=CLIP_STD,
    ),
}  # fmt: skip
_WHOLE_MODELS = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "sam": "sam_vision_model",
}
# What says how to compute, not what: it may name code to fetch, and changes no tensor's shape.
_LEFT_OUT = ("model_type", "auto_map", "attn_implementation", "experts_implementation",
             "quantization_config")  # fmt: skip
_OTHER_TOWERS = ("text_model.", "text_projection.", "logit_", "prompt_encoder.", "mask_decoder.",
                 "shared_image_embedding.")  # fmt: skip


class TransformersTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary or None, map ``[B, C, h, w]``)."""

    def __init__(self, model: Any, family: Family):
        super().__init__()
        if family.model == "RadioModel":
            model.make_preprocessor_external()  # pixels arrive normalised
        self.model: Any = model
        self.family = family
        self.stated_stride = _side(model.config.patch_size)
        self._options = remote_code.size_options(model)

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        output = self.model(pixels, **self._options)
        return self.family.summary(output), self._map(output.last_hidden_state, pixels)

    def layers(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Return the maps of ``count`` blocks."""
        output = self.model(pixels, output_hidden_states=True, **self._options)
        states = _inner_states(self.model, output, count, (self.family.norm,))
        return [self._map(state, pixels) for state in states]

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
    inside = getattr(model, "vision_model", model)
    norm = next((found for name in norms if (found := getattr(inside, name, None))), nn.Identity())
    depth = len(states) - 1  # the first are the embeddings
    return [
        last if index == depth - 1 else norm(states[index + 1])
        for index in spread_layers(depth, count)
    ]


@dataclass(frozen=True)
class GenericFamily:
    """A family that nothing is known of but that its one input is pixels."""

    model: Any
    """Class of transformers."""
    fixed_size: bool = False
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


class GenericTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary, map ``[B, C, h, w]``) of any image model.

    Its map is ``last_hidden_state``. Tokens are a grid of the patch that the configuration names,
    or of the patch doubled in every stage behind the first; class and registers are in front.
    """

    stated_stride = None
    """Unknown: what ``patch_size`` means differs from model to model, so it is measured."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model
        self._options = remote_code.size_options(model)
        config = model.config
        stages = len(getattr(config, "depths", None) or [0])
        patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None) or 4
        patch = _side(patch) if isinstance(patch, int) or len(patch) == 2 else 4
        self._patches = dict.fromkeys((patch, patch * 2 ** (stages - 1)))
        # None, a class token, one more of a distilled model, or registers.
        self._prefixes = {0, 1, 2, 1 + (getattr(config, "num_register_tokens", 0) or 0)}

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixels, **self._options)
        spatial = last = output.last_hidden_state
        pooled = getattr(output, "pooler_output", None)
        if last.ndim == 3:  # tokens, else [B, C, h, w]
            height, width, prefix = self._grid(last.shape[1], pixels)
            spatial = rearrange(last[:, prefix:], "b (h w) c -> b c h w", h=height, w=width)
            if prefix:
                return last[:, 0], spatial
        return spatial.mean((2, 3)) if pooled is None else pooled.flatten(1), spatial

    def layers(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Return the maps of ``count`` blocks, through what is called as final norms mostly are."""
        output = self.model(pixels, output_hidden_states=True, **self._options)
        states = _inner_states(self.model, output, count, ("layernorm", "norm", "post_layernorm"))
        if output.last_hidden_state.ndim == 4:
            return states
        height, width, prefix = self._grid(states[0].shape[1], pixels)
        return [
            rearrange(state[:, prefix:], "b (h w) c -> b c h w", h=height, w=width)
            for state in states
        ]

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


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in configuration, size and normalisation from the model's folder."""
    if "config" not in preset.arguments:
        preset = _described(preset, weights_path)
    is_remote = "code" in preset.arguments
    config, family = (None, None) if is_remote else _config(preset.arguments["config"])
    if not (preset.mean and preset.std):
        known = (family.mean, family.std) if family else (HALF, HALF)
        mean, std = ([float(f"{value:.4g}") for value in values] for values in known)
        raise ConfigError(
            "options.mean and options.std are missing: no preprocessor_config.json names them; "
            f"such models mostly have options: {{mean: {mean}, std: {std}}}"
        )
    if is_remote:
        return remote_code.complete(preset)
    assert family is not None, "only remote code has none"
    return replace(
        preset,
        native_size=preset.native_size or _native_size(config),
        fixed_size=preset.fixed_size or family.fixed_size,
        max_size=preset.max_size or getattr(config, "max_img_size", None),
    )


def _described(preset: Preset, weights_path: str) -> Preset:
    """Take over what a model's folder says; its code, where it has some, must be allowed."""
    trusted = preset.arguments.get(remote_code.OPTION, False)
    folder = Path(weights_path).expanduser()
    if not weights_path:
        folder = weights.hub_folder(preset.model, "*.json", *(["*.py"] if trusted is True else []))
    settings = weights.read_json(folder / "config.json")
    if "model_type" not in settings and "architecture" in settings:
        raise ConfigError(f"{weights_path or preset.model} is a model of timm; take preset: timm")
    arguments = {**preset.arguments, "config": settings}
    if "auto_map" in settings and settings.get("model_type") not in {*FAMILIES, *_WHOLE_MODELS}:
        remote_code.check_trusted(settings, weights_path or preset.model, trusted)
        arguments["code"] = str(folder)
    return replace(preset, arguments=arguments, **_normalisation(folder, preset))


def build(preset: Preset) -> nn.Module:
    """Build the tower with random weights."""
    if "code" in preset.arguments:
        return remote_code.build(preset)
    config, family = _config(preset.arguments["config"])
    return _tower(_new(config, family), family)


def locate(preset: Preset) -> Path:
    """Fetch the model's folder from the hub: configuration and safetensors, no code."""
    return weights.hub_folder(preset.model, "*.json", "*.safetensors")


def load(preset: Preset, path: Path) -> nn.Module:
    """Build the tower with the weights in ``path``, a model folder or one file of tensors."""
    prefix, is_remote = preset.arguments.get("prefix", ""), "code" in preset.arguments
    state = {
        key.removeprefix(prefix): value
        for key, value in weights.read_state(path).items()
        if key.startswith(prefix) and (is_remote or not key.startswith(_OTHER_TOWERS))
    }
    if is_remote:
        return remote_code.load_state(preset, state, str(path))
    return load_state(preset.arguments["config"], state, str(path))


def load_state(settings: Mapping[str, Any], state: dict[str, Tensor], where: str) -> nn.Module:
    """Build a tower from configuration and tensors; raises WeightsError unless they agree."""
    config, family = _config(settings)
    with torch.device("meta"):
        kind = _new(config, family)
    if family is not FAMILIES["radio"]:  # whose published layouts are renamed with their prefix
        base = f"{type(kind).base_model_prefix}."
        has_base = isinstance(family, GenericFamily) and any(key.startswith(base) for key in state)
        state = weights.named_as(state, kind.state_dict(), where, base if has_base else "")
    if isinstance(family, GenericFamily):  # pools anew what it gives, and has no head
        state = {key: value for key, value in state.items() if not key.startswith("pooler.")}
    with quiet_transformers():
        model, report = type(kind).from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_without_pooler(type(kind), family),
        )
    mismatched = [
        f"{key}: {tuple(found)} for {tuple(wanted)}"
        for key, found, wanted in report["mismatched_keys"]
    ]
    weights.refuse_gaps(
        where, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), sorted(mismatched)
    )
    return _tower(model.float(), family)


def _config(settings: Mapping[str, Any]) -> "tuple[Any, Family | GenericFamily]":
    """Return the configuration of an image tower, out of that of a larger model, and its family."""
    transformers = _library()
    kind, settings = _image_tower(settings)
    if kind in ("siglip2", "siglip2_vision_model"):
        raise ConfigError(
            "SigLIP2's NaFlex checkpoints take patches in place of pixels, which no teacher does; "
            "take one of a fixed size, such as google/siglip2-base-patch16-256"
        )
    values = {
        key: value
        for key, value in settings.items()
        if key not in _LEFT_OUT and not key.startswith("_")
    }
    try:
        config = transformers.AutoConfig.for_model(kind, **values)
    except Exception as error:  # it checks values in ways of its own
        raise ConfigError(
            f"no configuration of model_type {kind!r}: {reason_of(error)[:150]} "
            f"({nearest(kind, list(FAMILIES))})"
        ) from error
    return config, FAMILIES.get(kind) or _generic(kind, config)


def _library() -> Any:
    """Import transformers; raises ConfigError where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed; pip install 'radio-distill[hf]'"
        ) from error
    return transformers


def _image_tower(settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return model_type and settings of the image tower inside a model's settings."""
    kind, inner = settings.get("model_type", ""), settings.get("vision_config")
    if kind in FAMILIES or not isinstance(inner, Mapping):
        return _WHOLE_MODELS.get(kind, kind), settings
    tower = _WHOLE_MODELS.get(kind) or inner.get("model_type") or f"{kind}_vision_model"
    # CLIPModel builds its projection by the whole model's figure, which may stand there alone.
    width = {"projection_dim": settings["projection_dim"]} if "projection_dim" in settings else {}
    return tower, {**inner, **(width if tower == "clip_vision_model" else {})}


def _generic(kind: str, config: Any) -> "GenericFamily":
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model = MODEL_MAPPING.get(type(config), None)
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            f"no image tower is known for model_type {kind!r} ({nearest(kind, list(FAMILIES))})"
        )
    return GenericFamily(model)


def _new(config: Any, family: "Family | GenericFamily") -> Any:
    """Build a model with random weights; ConfigError where its configuration is not possible."""
    kind = _class(family)
    try:
        return kind(config, **_without_pooler(kind, family))
    except Exception as error:  # it checks values in ways of its own
        raise ConfigError(
            f"{kind.__name__} cannot be built of its configuration: {reason_of(error)[:150]}"
        ) from error


def _tower(model: Any, family: "Family | GenericFamily") -> nn.Module:
    if isinstance(family, GenericFamily):
        return GenericTower(model)
    return TransformersTower(model, family)


def _without_pooler(kind: Any, family: "Family | GenericFamily") -> dict[str, bool]:
    """Return the argument that leaves out a layer behind the last norm, where there is one."""
    takes_it = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if takes_it and isinstance(family, GenericFamily) else {}


def _class(family: "Family | GenericFamily") -> Any:
    if isinstance(family, GenericFamily):
        return family.model
    transformers = _library()
    if not hasattr(transformers, family.model):
        raise ConfigError(
            f"transformers {transformers.__version__} has no {family.model}; install a newer one"
        )
    return getattr(transformers, family.model)


def _side(size: Any) -> int:
    """Return the side of a square that a configuration names as a number or as a pair."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"config.json: {list(size)} is no square, as a patch must be")
    return int(sides.pop())


def _native_size(config: Any) -> int:
    size = getattr(config, "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        named = f"names {size}" if sides else "names no image_size"
        raise ConfigError(f"options.native_size is missing, for config.json {named}")
    return int(sides.pop())


def _normalisation(folder: Path, preset: Preset) -> dict[str, Any]:
    """Return mean and std of the image processor's file, where there is one."""
    settings = _processor(folder)
    if settings.get("do_normalize", True) is False:
        settings = {**settings, "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    factor = settings.get("rescale_factor", 1 / 255)
    if not (preset.mean and preset.std) and abs(factor * 255 - 1) > 1e-3:
        raise ConfigError(
            f"{folder}: its images are rescaled by {factor:g}, not by 1/255; set options.mean and "
            "options.std for pixels in [0, 1]"
        )
    mean, std = (tuple(settings.get(key) or ()) or None for key in ("image_mean", "image_std"))
    return {"mean": preset.mean or mean, "std": preset.std or std}


def _processor(folder: Path) -> Mapping[str, Any]:
    """Return the image processor's settings: in a file of its own, or in that of all processors."""
    if (folder / "preprocessor_config.json").exists():
        return weights.read_json(folder / "preprocessor_config.json")
    path = folder / "processor_config.json"
    return weights.read_json(path).get("image_processor", {}) if path.exists() else {}
