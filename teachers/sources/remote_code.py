"""A model whose Python files come with it: run only where ``options.trust_remote_code`` is true.

Nothing is known of such a model but the customs of transformers: its configuration has
``patch_size``, and it gives ``last_hidden_state``, tokens in front and patches behind, and perhaps
``pooler_output``. A checksum of the weights says nothing of the files with the code.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import ConfigError
from radio_distill.system.files import reason_of

from .. import weights
from ..presets import Preset
from .summaries import summary_of

logger = logging.getLogger(__name__)

OPTION = "trust_remote_code"


class RemoteTower(nn.Module):
    """Normalised pixels ``[B, 3, H, W]`` to (summary or None, map ``[B, C, h, w]``)."""

    def __init__(self, model: Any, summary: str = ""):
        super().__init__()
        self.model: Any = model
        self.summary = summary
        self._options = size_options(model)

    def forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        try:
            return self._forward(pixels)
        except (torch.OutOfMemoryError, ConfigError):
            raise
        except Exception as error:  # code of others fails in its own ways
            name = type(self.model).__name__
            raise ConfigError(f"the code of {name} failed: {reason_of(error)}") from error

    def _forward(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        output = self.model(pixels, **self._options)
        tokens = output.last_hidden_state  # [B, P + N, C]
        height, width = (side // self.model.config.patch_size for side in pixels.shape[-2:])
        num_prefix_tokens = tokens.shape[1] - height * width
        token = tokens[:, 0] if num_prefix_tokens else None
        pooled = getattr(output, "pooler_output", None)
        patches = tokens[:, num_prefix_tokens:]
        usual = "pool" if pooled is not None else "none" if token is None else "token"
        summary = summary_of(
            self.summary or usual,
            type(self.model).__name__,
            token=token,
            pooled=pooled,
            patches=patches,
        )
        return summary, rearrange(patches, "b (h w) c -> b c h w", h=height)


def size_options(model: Any) -> dict[str, bool]:
    """Return the argument of a model's ``forward`` that lets it take any size, if it has one."""
    name = "interpolate_pos_encoding"
    return {name: True} if name in inspect.signature(model.forward).parameters else {}


def check_trusted(settings: Mapping[str, Any], model: str, trusted: Any) -> None:
    """Raise ConfigError unless the recipe allows the code that ``settings`` name to run."""
    if trusted is not True and trusted is not False:
        raise ConfigError(f"options.{OPTION} is {trusted!r}; it is true or false")
    if not trusted:
        raise ConfigError(
            f"{model} is built by Python files of its own ({_reference(settings, model)}); read "
            f"them, then set options.{OPTION}: true to run them"
        )


def complete(preset: Preset) -> Preset:
    """Take the size from the configuration, which knows it as ``image_size``."""
    size = preset.native_size or preset.arguments["config"].get("image_size")
    if not isinstance(size, int):
        raise ConfigError("options.native_size is missing: config.json names no image_size")
    return replace(preset, native_size=size)


def build(preset: Preset) -> RemoteTower:
    """Build the model with random weights, by the code in its folder.

    Raises:
        ConfigError: the code does not run.
    """
    folder, settings = preset.arguments["code"], preset.arguments["config"]
    model = preset.model or folder
    reference = _reference(settings, model)
    try:
        config, kind = _code_of(folder, reference, model)
        return RemoteTower(kind(config), preset.arguments.get("summary", ""))
    except Exception as error:  # code of others fails in its own ways
        raise ConfigError(f"the code of {model} failed: {reason_of(error)}") from error


def load_state(preset: Preset, state: Mapping[str, Tensor], where: str) -> RemoteTower:
    """Build the model with these tensors; raises WeightsError unless they are all of its own."""
    # Its code must bear this: transformers itself builds it on the meta device.
    with weights.WithoutValues():
        tower = build(preset)
    weights.load_strict(tower.model, state, where, take=True)
    return tower


def _reference(settings: Mapping[str, Any], model: str) -> str:
    places = settings.get("auto_map")
    reference = places.get("AutoModel") if isinstance(places, dict) else None
    if not isinstance(reference, str):
        raise ConfigError(f"{model}: config.json names no code for AutoModel in auto_map")
    return reference


@lru_cache(maxsize=16)
def _code_of(folder: str, reference: str, model: str) -> tuple[Any, Any]:
    """Import a model's configuration and class, once."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    logger.warning("running the code of %s (%s), as options.%s allows", model, reference, OPTION)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return config, get_class_from_dynamic_module(reference, folder)
