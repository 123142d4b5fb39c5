"""CLIP models of open_clip: the image tower as a teacher, the text tower for zero-shot labels.

Only open_clip's own vision transformer is read here. Where open_clip wraps a timm encoder (SigLIP),
the timm source gives the same tower at any size; the text tower still comes from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.registry import nearest
from radio_distill.system.files import reason_of
from radio_distill.system.redaction import redact
from radio_distill.types import Features, spread_layers
from radio_distill.weights import files

from .. import weights
from ..options import naming_teacher, resolve
from ..presets import CLIP_MEAN, CLIP_STD, Preset

ARGUMENTS = {
    "config": "arguments of open_clip.model.CLIP, for a model that open_clip does not name"
}


_TEXTS = 256
"""Texts that are encoded at once."""


class OpenClipTower(nn.Module):
    """Normalised pixels to (projected summary ``[B, S]``, patch tokens ``[B, C, h, w]``)."""

    def __init__(self, visual: Any):
        super().__init__()
        visual.output_tokens = True
        _run_sequence_first(visual.transformer)
        self.visual: Any = visual

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        grid = self._grid(pixels)
        # The tower knows one size only; its forward is run with the table of this size instead.
        table = {"positional_embedding": self._positions(grid)}
        summary, tokens = torch.func.functional_call(self.visual, table, (pixels,))
        return summary, rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])

    def layers(self, pixels: Tensor, count: int) -> list[Features]:
        """Return class tokens, not projected, and maps of ``count`` blocks, normed as the last."""
        grid = self._grid(pixels)
        indices = spread_layers(len(self.visual.transformer.resblocks), count)
        table = {"visual.positional_embedding": self._positions(grid)}
        found = torch.func.functional_call(_Intermediates(self.visual), table, (pixels, indices))
        by_index = dict(zip(sorted(set(indices)), found, strict=True))
        return [by_index[index] for index in indices]

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        height, width = self.visual.patch_size
        return pixels.shape[-2] // height, pixels.shape[-1] // width

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        table, native = self.visual.positional_embedding, self.visual.grid_size
        if grid == tuple(native):
            return table
        return resample_abs_pos_embed(table[None], list(grid), list(native))[0]  # [1 + N, C]


class _Intermediates(nn.Module):
    """A tower whose call gives class tokens and maps of some of its blocks."""

    def __init__(self, visual: Any):
        super().__init__()
        self.visual: Any = visual

    def forward(self, pixels: Tensor, indices: list[int]) -> list[Features]:
        output = self.visual.forward_intermediates(
            pixels,
            indices=indices,
            normalize_intermediates=not self.visual.final_ln_after_pool,
            intermediates_only=True,
            output_extra_tokens=True,
        )
        levels = zip(
            output["image_intermediates_prefix"], output["image_intermediates"], strict=True
        )
        return [Features(prefix[:, 0], spatial) for prefix, spatial in levels]


class TextEncoder:
    """Texts to vectors in the space of a CLIP's summaries."""

    def __init__(self, model: Any, tokenize: Any, device: Any = "cpu"):
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenize, self.device = tokenize, device

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Encode ``N`` texts to vectors ``[N, S]``, of any length."""
        parts = [
            self.model.encode_text(self.tokenize(list(some)).to(self.device))
            for some in (texts[at : at + _TEXTS] for at in range(0, len(texts), _TEXTS))
        ]
        return torch.cat(parts)


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in size and normalisation from open_clip's own configuration of the model."""
    import open_clip

    if preset.native_size and preset.mean and preset.std:
        return preset
    name, tag = _name_and_tag(preset.model)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    published = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    return replace(
        preset,
        native_size=preset.native_size or size,
        mean=preset.mean or tuple(published.get("mean") or CLIP_MEAN),
        std=preset.std or tuple(published.get("std") or CLIP_STD),
        text=preset.text or preset.model,
        weights=preset.weights or f"hub: {preset.model}",
        summary=preset.summary or "class token, projected into the space shared with text",
    )


def build(preset: Preset) -> OpenClipTower:
    """Build the image tower with random weights."""
    return OpenClipTower(_visual(preset))


def locate(preset: Preset) -> Path:
    """Fetch the weights of ``name/tag`` from the hub; returns the file."""
    import open_clip

    name, tag = _name_and_tag(preset.model)
    published = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise WeightsError(
            f"open_clip has no weights {tag!r} for {name} (known: {', '.join(tags)}); name them as "
            f"model/tag, or put a local file into `weights`"
        )
    return files.from_hub(preset.model, lambda: open_clip.download_pretrained(published))


def load(preset: Preset, path: Path) -> OpenClipTower:
    """Build the image tower with the weights at ``path``, of a whole CLIP or that tower."""
    with weights.WithoutValues():
        visual = _visual(preset)
    state = files.named_as(files.read_state(path), visual.state_dict(), str(path))
    weights.load_strict(visual, state, str(path), take=True)
    return OpenClipTower(visual)


def build_text_encoder(
    name: str, config: TeacherConfig, device: Any = "cpu", weights_path: str = ""
) -> TextEncoder:
    """Build the text tower that shares a space with a teacher's summary.

    Args:
        name: the teacher's name in the recipe.
        config: the teacher's section of the recipe.
        device: where to run.
        weights_path: open_clip file of the whole model; empty takes the teacher's own where that
            is one, else the hub's.
    """
    with naming_teacher(name):
        preset = resolve(config)
        given = weights_path or (config.weights if preset.source == "open_clip" else "")
        return _text_encoder(preset, weights.local_path(given) if given else None, device)


def _text_encoder(preset: Preset, path: Path | None, device: Any) -> TextEncoder:
    import open_clip

    if preset.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the draws of the image tower, which is of the same model
            return TextEncoder(_model(preset), open_clip.SimpleTokenizer(), device)
    if not preset.text:
        raise ConfigError(
            f"{preset.model} has no text tower; zero-shot labels need a CLIP or SigLIP"
        )
    text_preset = replace(preset, source="open_clip", model=preset.text)
    model, name = _model(text_preset), _name_and_tag(preset.text)[0]
    weights.load_strict(
        model, files.read_state(path or locate(text_preset)), str(path or preset.text)
    )
    model.visual = None  # the image tower is the teacher's
    # SigLIP's tokenizer is a file on the hub; without the word transformers would ask the terminal.
    from_hub = "hf_tokenizer_name" in (open_clip.get_model_config(name) or {})["text_cfg"]
    try:
        tokenize = open_clip.get_tokenizer(
            name, **({"trust_remote_code": False} if from_hub else {})
        )
    except Exception as error:
        raise WeightsError(
            f"cannot fetch the tokenizer of {name}: {redact(reason_of(error))}"
        ) from error
    return TextEncoder(model, tokenize, device)


def _visual(preset: Preset) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    visual = _model(preset).visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise ConfigError(
            f"{preset.model}: its image tower is {type(visual).__name__}; take preset: timm"
        )
    return visual


def _run_sequence_first(transformer: Any) -> None:
    """Have tokens laid ``[L, B, C]`` once: batch first, each attention would turn them in place.

    The products of Q, K and V are then one of all tokens, in place of one for each image.
    """
    transformer.batch_first = False
    for module in transformer.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.batch_first = False


def _model(preset: Preset) -> Any:
    import open_clip

    if "config" in preset.arguments:
        config = _checked(preset.arguments["config"])
        try:
            return open_clip.CLIP(**config)
        except Exception as error:  # it checks values in ways of its own
            raise ConfigError(f"options.config: {reason_of(error)[:150]}") from error
    name = _name_and_tag(preset.model)[0]
    # open_clip moves what it made to a device, and tensors on `meta` can only stay there.
    return open_clip.create_model(name, pretrained=None, device=torch.get_default_device())


def _checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse towers of other libraries, which open_clip fetches by name when it builds them."""
    for tower, key in (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name")):
        if not isinstance(config.get(tower), Mapping):
            raise ConfigError(f"options.config.{tower} is missing, or no mapping of arguments")
        if key in config[tower]:
            raise ConfigError(
                f"options.config.{tower}.{key} names a model of another library; take it by its "
                "own preset, timm or transformers"
            )
    return config


def _name_and_tag(model: str) -> tuple[str, str]:
    import open_clip

    name, _, tag = model.partition("/")
    if open_clip.get_model_config(name) is None:
        raise ConfigError(
            f"open_clip has no model {name!r} ({nearest(name, open_clip.list_models())})"
        )
    return name, tag
