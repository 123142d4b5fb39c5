"""An encoder that no library has: the source, and the preset that recipes name."""

from dataclasses import replace

from torch import nn

from radio_distill.errors import WeightsError
from radio_distill.weights.files import read_state
from teachers.presets import Preset
from teachers.weights import load_strict

ARGUMENTS = {"width": "channels of the map"}  # options of a recipe: what each is


class Encoder(nn.Module):
    """Normalised pixels [B, 3, H, W] to (summary [B, S] or None, map [B, C, h, w])."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=16, stride=16)

    def forward(self, pixels):
        spatial = self.patches(pixels)  # of patches only: no class token, no registers
        return spatial.mean((2, 3)), spatial


def complete(preset, weights):
    """Fill in what is open; `weights` is the recipe's path, or empty."""
    return replace(preset, arguments={"width": 32, **preset.arguments})


def build(preset):
    """Build the encoder with random weights."""
    return Encoder(preset.arguments["width"])


def locate(preset):
    """Return the path of the weights where the recipe names none."""
    raise WeightsError(f"{preset.model} is on no hub; name its file in `weights`")


def load(preset, path):
    """Build the encoder with the weights at `path`."""
    encoder = build(preset)
    load_strict(encoder, read_state(path), str(path))
    return encoder


MY_ENCODER = Preset(
    source="my_package.encoder",
    model="my_encoder",
    native_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    licence="mit",
)
