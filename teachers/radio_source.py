"""RADIO checkpoints in the torch.hub layout, read into transformers' own RadioModel.

The layout is ``{"state_dict" | "state_dict_ema": tensors, "args": Namespace}``, or a Hugging Face
folder whose ``config.json`` holds ``args``. Everything but the class-token slots follows from the
tensors' shapes. Published code is never run; hierarchical variants (E-RADIO) are not transformers
and are refused by the strict load. A folder in transformers' own layout is read as it is.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radio_distill.errors import WeightsError

from . import transformers_source, weights
from .presets import CLIP_MEAN, CLIP_STD, Preset
from .transformers_source import TransformersTower

ARGUMENTS: dict[str, str] = {}

_BODY = ("blocks.", "patch_generator.")
_LAYER_SCALE = (
    (".ls1.", ".layer_scale1."),
    (".ls2.", ".layer_scale2."),
    (".grandma", ".lambda1"),
    (".gamma", ".lambda1"),
)
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}
"""Attention heads of each width that RADIO is published in; no tensor's shape tells them."""


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in the configuration from the checkpoint."""
    if "config" not in preset.arguments:
        path = Path(weights_path).expanduser() if weights_path else locate(preset)
        preset = replace(preset, arguments={"config": read(path)[0]})
    preset = replace(preset, mean=preset.mean or CLIP_MEAN, std=preset.std or CLIP_STD)
    return transformers_source.complete(preset, weights_path)


def build(preset: Preset) -> TransformersTower:
    """Build RadioModel with random weights."""
    return transformers_source.build(preset)


def locate(preset: Preset) -> Path:
    """Fetch the model's folder from the hub: configuration and safetensors, no code."""
    return transformers_source.locate(preset)


def load(preset: Preset, path: Path) -> TransformersTower:
    """Build RadioModel with the weights of a checkpoint; its adaptor heads are left out."""
    config, state = read(path)
    if preset.channels and config["hidden_size"] != preset.channels:
        raise WeightsError(
            f"{path} holds a RADIO of width {config['hidden_size']}, not {preset.channels}; "
            f"take preset: radio"
        )
    return transformers_source.load_state(config, state, str(path))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return RadioModel's configuration and tensors from a torch.hub file or a model folder."""
    if path.is_dir():
        config = transformers_source.read_json(path / "config.json")
        if config.get("model_type") == "radio":
            return config, weights.read_state(path)
        arguments = config.get("args", {})
    else:
        arguments = weights.read_checkpoint(path).get("args", {})
    arguments = vars(arguments) if isinstance(arguments, Namespace) else dict(arguments)
    state = {_unwrapped(key): value for key, value in weights.read_state(path).items()}
    body = {key: value for key, value in state.items() if key.startswith(_BODY)}
    if "patch_generator.embedder.weight" not in body or arguments.get("model_norm"):
        raise WeightsError(
            f"{path} is not a RADIO vision transformer without final norm, the only kind read here"
        )
    config = _configuration(body, state, arguments)
    tensors = {f"radio_model.model.{_renamed(key)}": value for key, value in body.items()}
    return config, {
        **tensors,
        "summary_idxs": torch.tensor(config["summary_idxs"]),
        "input_conditioner.norm_mean": torch.tensor(CLIP_MEAN).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(CLIP_STD).view(3, 1, 1),
    }


def _unwrapped(key: str) -> str:
    for prefix in ("base_model.", "radio_model.model.", "radio_model."):
        key = key.removeprefix(prefix)
    return key


def _renamed(key: str) -> str:
    # transformers converts every name of this layout but LayerScale's, which it drops silently.
    for old, new in _LAYER_SCALE:
        key = key.replace(old, new)
    return key


def _configuration(
    body: Mapping[str, Tensor], state: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    width, patch_pixels = body["patch_generator.embedder.weight"].shape
    if width not in _HEADS:
        raise WeightsError(
            f"a RADIO body of width {width} is not known (known: {', '.join(map(str, _HEADS))})"
        )
    patch_size = isqrt(patch_pixels // 3)
    blocks = {key.split(".")[1] for key in body if key.startswith("blocks.")}
    class_tokens, summaries = _slots(arguments)
    return {
        "model_type": "radio",
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": _HEADS[width],
        "mlp_ratio": body["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "patch_size": patch_size,
        "image_size": 224 // patch_size * patch_size,
        "max_img_size": isqrt(body["patch_generator.pos_embed"].shape[1]) * patch_size,
        "num_cls_tokens": class_tokens,
        "num_registers": body["patch_generator.cls_token.token"].shape[0] - class_tokens,
        "summary_idxs": state["summary_idxs"].tolist() if "summary_idxs" in state else summaries,
    }


def _slots(arguments: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Return the number of class tokens, and which of them are summaries."""
    if not arguments.get("cls_token_per_teacher", True):
        return 1, [0]
    teachers = {item["name"]: item for item in arguments.get("teachers", [])}
    slots = {
        name: item.get("token_slot", position)
        for position, (name, item) in enumerate(teachers.items())
        if item.get("use_summary", True)
    }
    return max(len(teachers), 1), sorted(slots.values()) or [0]
