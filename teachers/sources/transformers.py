"""Vision towers of transformers: CLIP, SigLIP (1 and 2), DINOv2, DINOv3, SAM, SAM3, RADIO.

Other models whose one input is pixels (ViT, DeiT, BEiT, Swin, ConvNeXt, ResNet, I-JEPA ...) are
taken by what their ``last_hidden_state`` is: a map, or tokens of which the last ones are patches.
The stride is measured then, and the summary is the first token, else what the model pools, else the
mean of the patches. ``options.summary`` chooses another.

A tower is built from its configuration and loaded from the tensors alone, so no code that rides
with a checkpoint runs; :mod:`.remote_code` has the exception. Reads a folder with
``config.json`` and safetensors, or a hub's copy of one. SigLIP2's NaFlex checkpoints, which take
patches in place of pixels, and models that need text or prompts too are left out.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.system.files import reason_of
from radio_distill.system.progress import quiet_transformers
from radio_distill.weights import files

from .. import weights
from ..presets import HALF, Preset
from . import remote_code
from .summaries import SUMMARY_OPTION
from .transformers_towers import FAMILIES, Family, GenericFamily, GenericTower, TransformersTower

ARGUMENTS = {
    "config": "the model's configuration, with its model_type; empty reads config.json",
    "summary": SUMMARY_OPTION,
    "prefix": "prefix of the tower's tensors inside the checkpoint of a larger model",
    remote_code.OPTION: "true to run the Python files of a model that has its own; read them first",
}


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
        folder = files.hub_folder(preset.model, "*.json", *(["*.py"] if trusted is True else []))
    settings = files.read_json(folder / "config.json")
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
    return _tower(_new(config, family), family, preset.arguments.get("summary", ""))


def locate(preset: Preset) -> Path:
    """Fetch the model's folder from the hub: configuration and safetensors, no code."""
    return files.hub_folder(preset.model, "*.json", "*.safetensors")


def load(preset: Preset, path: Path) -> nn.Module:
    """Build the tower with the weights in ``path``, a model folder or one file of tensors."""
    prefix, is_remote = preset.arguments.get("prefix", ""), "code" in preset.arguments
    state = {
        key.removeprefix(prefix): value
        for key, value in files.read_state(path).items()
        if key.startswith(prefix) and (is_remote or not key.startswith(_OTHER_TOWERS))
    }
    if is_remote:
        return remote_code.load_state(preset, state, str(path))
    summary = preset.arguments.get("summary", "")
    return load_state(preset.arguments["config"], state, str(path), summary)


def load_state(
    settings: Mapping[str, Any], state: dict[str, Tensor], where: str, summary: str = ""
) -> nn.Module:
    """Build a tower from configuration and tensors; raises WeightsError unless they agree."""
    config, family = _config(settings)
    with torch.device("meta"):
        kind = _new(config, family)
    if family is not FAMILIES["radio"]:  # whose published layouts are renamed with their prefix
        base = f"{type(kind).base_model_prefix}."
        has_base = isinstance(family, GenericFamily) and any(key.startswith(base) for key in state)
        state = files.named_as(state, kind.state_dict(), where, base if has_base else "")
    if isinstance(family, GenericFamily):  # pools anew what it gives, and has no head
        state = {key: value for key, value in state.items() if not key.startswith("pooler.")}
    with quiet_transformers():
        model, report = type(kind).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=_dtype(state),
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
    weights.widen(model)
    return _tower(model, family, summary)


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the type in which transformers may hold these tensors as they are, else float32.

    Tensors of that type stay where they are, maybe in their file; others are converted.
    """
    dtypes = {
        value.dtype
        for key, value in state.items()
        # RADIO's mean and std, which its tower does without
        if value.is_floating_point() and "input_conditioner." not in key
    }
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _config(settings: Mapping[str, Any]) -> tuple[Any, Family | GenericFamily]:
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
    if not isinstance(kind, str):
        raise ConfigError(f"model_type {kind!r} is not a name ({nearest('', list(FAMILIES))})")
    if kind in FAMILIES or not isinstance(inner, Mapping):
        return _WHOLE_MODELS.get(kind, kind), settings
    tower = _WHOLE_MODELS.get(kind) or inner.get("model_type") or f"{kind}_vision_model"
    # CLIPModel builds its projection by the whole model's figure, which may stand there alone.
    width = {"projection_dim": settings["projection_dim"]} if "projection_dim" in settings else {}
    return tower, {**inner, **(width if tower == "clip_vision_model" else {})}


def _generic(kind: str, config: Any) -> GenericFamily:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model = MODEL_MAPPING.get(type(config), None)
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            f"no image tower is known for model_type {kind!r} ({nearest(kind, list(FAMILIES))})"
        )
    return GenericFamily(model)


def _new(config: Any, family: Family | GenericFamily) -> Any:
    """Build a model with random weights; ConfigError where its configuration is not possible."""
    kind = _class(family)
    try:
        return kind(config, **_without_pooler(kind, family))
    except Exception as error:  # it checks values in ways of its own
        raise ConfigError(
            f"{kind.__name__} cannot be built of its configuration: {reason_of(error)[:150]}"
        ) from error


def _tower(model: Any, family: Family | GenericFamily, summary: str) -> nn.Module:
    if isinstance(family, GenericFamily):
        return GenericTower(model, summary)
    return TransformersTower(model, family, summary)


def _without_pooler(kind: Any, family: Family | GenericFamily) -> dict[str, bool]:
    """Return the argument that leaves out a layer behind the last norm, where there is one."""
    takes_it = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if takes_it and isinstance(family, GenericFamily) else {}


def _class(family: Family | GenericFamily) -> Any:
    if isinstance(family, GenericFamily):
        return family.model
    transformers = _library()
    if not hasattr(transformers, family.model):
        raise ConfigError(
            f"transformers {transformers.__version__} has no {family.model}; install a newer one"
        )
    return getattr(transformers, family.model)


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
        return files.read_json(folder / "preprocessor_config.json")
    path = folder / "processor_config.json"
    return files.read_json(path).get("image_processor", {}) if path.exists() else {}
