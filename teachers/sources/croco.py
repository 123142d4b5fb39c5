"""Encoders of the CroCo v2 family (CroCo, DUSt3R, MASt3R), as timm's vision transformer with RoPE.

They are pre-norm vision transformers of patch 16 without class token, whose positions are RoPE in
two dimensions (arXiv 2211.10408): of a head's D channels the first half turns with the row and the
second with the column, each by

    (a, b) → (a cos pθ_k - b sin pθ_k, b cos pθ_k + a sin pθ_k),   θ_k = 100^(-4k / D), k < D / 4,

for row or column p. CroCo's a and b lie D / 4 channels apart, timm's are neighbours. A dot product
of queries and keys does not see an order of channels that both share, so their rows are reordered
once, as the weights are read, and the encoder is timm's.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.errors import WeightsError
from radio_distill.weights import files

from .. import weights
from ..presets import HALF, Preset
from . import timm as timm_source

ARGUMENTS = {"create": timm_source.ARGUMENTS["create"], "prefix": timm_source.ARGUMENTS["prefix"]}
_CREATE: Mapping[str, Any] = {
    "class_token": False,
    "global_pool": "",
    "init_values": 1.0,  # LayerScale, which CroCo has none of: without effect
    "rope_grid_indexing": "ij",
    "rope_temperature": 100.0,
}
_NAMES = {"enc_blocks.": "blocks.", "enc_norm.": "norm.", "patch_embed.": "patch_embed."}


def complete(preset: Preset, weights_path: str) -> Preset:
    """Fill in what the published encoders are: ViT-L, seen at 512 px, pixels in [-1, 1]."""
    del weights_path
    return replace(
        preset,
        model=preset.model or "vit_large_patch16_rope_224",
        native_size=preset.native_size or 512,
        mean=preset.mean or HALF,
        std=preset.std or HALF,
        arguments={"summary": "none", **preset.arguments, "create": _created(preset)},
    )


def build(preset: Preset) -> nn.Module:
    """Build the encoder with random weights."""
    return timm_source.build(preset)


def locate(preset: Preset) -> Path:
    """Raise WeightsError: no library has them."""
    raise WeightsError("croco's weights are on no hub; name the file of CroCo, DUSt3R or MASt3R")


def load(preset: Preset, path: Path) -> nn.Module:
    """Build the encoder with the weights of a file of the whole model, whose decoders are left out.

    Raises:
        WeightsError: where the file has other tensors than the encoder.
    """
    with weights.WithoutValues():
        tower = timm_source.build(preset)
    heads = tower.model.blocks[0].attn.num_heads
    own = tower.model.state_dict()
    scales = {key: torch.ones_like(value) for key, value in own.items() if "gamma_" in key}
    wanted = {_published(key): key for key in own if key not in scales}
    state = files.named_as(
        files.read_state(path), wanted, str(path), preset.arguments.get("prefix", "")
    )
    encoder = {
        wanted.get(key, key): _neighbours(value, heads) if ".attn.qkv." in key else value
        for key, value in state.items()
        if key.startswith(tuple(_NAMES))
    }
    weights.load_strict(tower.model, encoder | scales, str(path), take=True)
    return tower


def _created(preset: Preset) -> dict[str, Any]:
    return {**_CREATE, **preset.arguments.get("create", {})}


def _published(key: str) -> str:
    """Return what CroCo calls a tensor of timm's."""
    theirs = {ours: theirs for theirs, ours in _NAMES.items()}
    prefix = next(name for name in theirs if key.startswith(name))
    return theirs[prefix] + key.removeprefix(prefix)


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Lay the two channels of queries and keys that turn together side by side.

    Of the rows of a layer of queries, keys and values, ``[3 · heads · D, ...]``.
    """
    turned, values = rows.split([2 * len(rows) // 3, len(rows) // 3])
    apart = "(qk head side pair k) ... -> (qk head side k pair) ..."
    turned = rearrange(turned, apart, qk=2, head=heads, side=2, pair=2)
    return torch.cat((turned, values))
