"""RADIO checkpoints, read into transformers' own RadioModel.

A torch.hub file, a folder of the hub, or a folder in transformers' layout, as
:mod:`radio_distill.weights.radio` reads them. Published code is never run.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from radio_distill.errors import WeightsError
from radio_distill.weights.radio import RadioCheckpoint, read_radio

from ..presets import Preset
from . import transformers as transformers_source

ARGUMENTS: dict[str, str] = {}


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in configuration and normalisation from the checkpoint."""
    if "config" not in preset.arguments:
        path = Path(weights_path).expanduser() if weights_path else locate(preset)
        config = _read(path).config
        preset = replace(
            preset,
            arguments={"config": config},
            mean=preset.mean or tuple(config["norm_mean"]),
            std=preset.std or tuple(config["norm_std"]),
        )
    return transformers_source.complete(preset, weights_path)


def build(preset: Preset) -> nn.Module:
    """Build RadioModel with random weights."""
    return transformers_source.build(preset)


def locate(preset: Preset) -> Path:
    """Fetch the model's folder from the hub: configuration and safetensors, no code."""
    return transformers_source.locate(preset)


def load(preset: Preset, path: Path) -> nn.Module:
    """Build RadioModel with the weights of a checkpoint; its adaptor heads are left out."""
    checkpoint = _read(path)
    width = checkpoint.config["hidden_size"]
    if preset.channels and width != preset.channels:
        raise WeightsError(
            f"{path} holds a RADIO of width {width}, not {preset.channels}; take preset: radio"
        )
    return transformers_source.load_state(checkpoint.config, checkpoint.tensors, str(path))


def _read(path: Path) -> RadioCheckpoint:
    checkpoint = read_radio(path)
    if checkpoint.has_final_norm:
        raise WeightsError(
            f"{path} ends with a norm, which RadioModel has no place for; take another checkpoint"
        )
    return checkpoint
