"""Vision towers of transformers: CLIP, SigLIP (1 and 2), DINOv2, DINOv3, SAM, SAM3, RADIO.

A tower is built from its configuration and loaded from the tensors alone, so no code that rides
with a checkpoint runs; :mod:`teachers.remote_code` has the exception. Reads a folder with
``config.json`` and safetensors, or a hub's copy of one. SigLIP2's NaFlex checkpoints, which take
patches in place of pixels, are left out.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError
from radio_distill.progress import quiet_transformers
from radio_distill.registry import nearest

from . import remote_code, weights
from .presets import Preset

ARGUMENTS = {
    "config": "the model's configuration, with its model_type; empty reads config.json",
    "prefix": "prefix of the tower's tensors inside the checkpoint of a larger model",
    remote_code.OPTION: "true to run the Python files of a model that has its own; read them first",
}


@dataclass(frozen=True)
class Family:
    """How one family of models is built and read."""

    model: str
    """Class of transformers that is the image tower alone."""
    summary: Callable[[Any], Tensor | None]
    prefix_tokens: Callable[[Any], int]
    fixed_size: bool = False


def _first_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _registers(config: Any) -> int:
    return 1 + getattr(config, "num_register_tokens", 0)


FAMILIES = {
    "clip_vision_model": Family(
        "CLIPVisionModelWithProjection", lambda out: out.image_embeds, lambda _: 1
    ),
    "siglip_vision_model": Family("SiglipVisionModel", lambda out: out.pooler_output, lambda _: 0),
    "dinov2": Family("Dinov2Model", _first_token, _registers),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", _first_token, _registers),
    "dinov3_vit": Family("DINOv3ViTModel", _first_token, _registers),
    "sam_vision_model": Family("SamVisionModel", lambda _: None, lambda _: 0, fixed_size=True),
    "sam3_vit_model": Family("Sam3ViTModel", lambda _: None, lambda _: 0, fixed_size=True),
    "radio": Family(
        "RadioModel", lambda out: out.summary, lambda config: config.num_summary_tokens
    ),
}
_WHOLE_MODELS = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "sam": "sam_vision_model",
}
# What says how to compute, not what: it may name code to fetch, and changes no tensor's shape.
_LEFT_OUT = ("model_type", "auto_map", "attn_implementation", "experts_implementation",
             "quantization_config")  # fmt: skip
_OTHER_TOWERS = (
    "text_model.",
    "text_projection.",
    "logit_",
    "prompt_encoder.",
    "mask_decoder.",
    "shared_image_embedding.",
)


class TransformersTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary or None, map ``[B, C, h, w]``)."""

    def __init__(self, model: Any, family: Family):
        super().__init__()
        if family.model == "RadioModel":
            model.make_preprocessor_external()  # pixels arrive normalised
        self.model: Any = model
        self.family = family
        parameters = inspect.signature(model.forward).parameters
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        output = self.model(pixels, **self._options)
        tokens, config = output.last_hidden_state, self.model.config
        if tokens.ndim == 4:  # SAM's neck speaks in maps already
            return self.family.summary(output), tokens
        patches = tokens[:, self.family.prefix_tokens(config) :]  # [B, N, C]
        height = pixels.shape[-2] // config.patch_size
        return self.family.summary(output), rearrange(patches, "b (h w) c -> b c h w", h=height)


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in configuration, size and normalisation from the model's folder."""
    if "config" not in preset.arguments:
        preset = _described(preset, weights_path)
    if not (preset.mean and preset.std):
        raise ConfigError(
            "options.mean and options.std are missing: no preprocessor_config.json names them"
        )
    if "code" in preset.arguments:
        return remote_code.complete(preset)
    config, family = _config(preset.arguments["config"])
    return replace(
        preset,
        native_size=preset.native_size or config.image_size,
        fixed_size=preset.fixed_size or family.fixed_size,
        max_size=preset.max_size or getattr(config, "max_img_size", None),
    )


def _described(preset: Preset, weights_path: str) -> Preset:
    """Take over what a model's folder says; its code, where it has some, must be allowed."""
    trusted = preset.arguments.get(remote_code.OPTION, False)
    patterns = ("*.json", "*.py") if trusted is True else ("*.json",)
    folder = Path(weights_path).expanduser() if weights_path else _fetch(preset, *patterns)
    settings = weights.read_json(folder / "config.json")
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
    return TransformersTower(_class(family)(config), family)


def locate(preset: Preset) -> Path:
    """Fetch the model's folder from the hub: configuration and safetensors, no code."""
    return _fetch(preset, "*.json", "*.safetensors")


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


def load_state(
    settings: Mapping[str, Any], state: dict[str, Tensor], where: str
) -> TransformersTower:
    """Build a tower from configuration and tensors; raises WeightsError unless they agree."""
    config, family = _config(settings)
    with quiet_transformers():
        model, report = _class(family).from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    mismatched = [
        f"{key}: {tuple(found)} for {tuple(wanted)}"
        for key, found, wanted in report["mismatched_keys"]
    ]
    weights.refuse_gaps(
        where, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), sorted(mismatched)
    )
    return TransformersTower(model.float(), family)


def _config(settings: Mapping[str, Any]) -> tuple[Any, Family]:
    transformers = _library()
    kind = settings.get("model_type", "")
    if kind in _WHOLE_MODELS:
        kind, settings = _WHOLE_MODELS[kind], {**settings.get("vision_config", {})}
    if kind not in FAMILIES:
        raise ConfigError(
            f"no image tower is known for model_type {kind!r} ({nearest(kind, list(FAMILIES))})"
        )
    values = {
        key: value
        for key, value in settings.items()
        if key not in _LEFT_OUT and not key.startswith("_")
    }
    return transformers.AutoConfig.for_model(kind, **values), FAMILIES[kind]


def _library() -> Any:
    """Import transformers; raises ConfigError where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed; pip install 'radio-distill[hf]'"
        ) from error
    return transformers


def _class(family: Family) -> Any:
    transformers = _library()
    if not hasattr(transformers, family.model):
        raise ConfigError(
            f"transformers {transformers.__version__} has no {family.model}; install a newer one"
        )
    return getattr(transformers, family.model)


def _fetch(preset: Preset, *patterns: str) -> Path:
    return weights.hub_folder(preset.model, *patterns)


def _normalisation(folder: Path, preset: Preset) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    found = weights.read_json(path) if path.exists() else {}
    mean, std = found.get("image_mean"), found.get("image_std")
    return {
        "mean": preset.mean or (tuple(mean) if mean else None),
        "std": preset.std or (tuple(std) if std else None),
    }
