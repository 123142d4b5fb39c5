"""RADIO checkpoints, read from each of their published layouts.

A torch.hub file holds ``{"state_dict" or "state_dict_ema": tensors, "args": Namespace}``; a folder
of the hub holds the same under ``radio_model.``, with the arguments in ``config.json``; a folder in
transformers' own layout holds RadioModel's tensors and configuration. Everything but the slots of
the class tokens follows from the tensors' shapes. Published code is never run. Adaptor heads are
left out, since their layout changed from version to version, and so are hierarchical bodies
(E-RADIO), which are no vision transformers.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..config import StudentConfig
from ..errors import WeightsError
from ..types import Size, format_size
from .files import read_checkpoint, read_json, tensors_of

_PATCHES = ("patch_generator.embedder.weight", "embeddings.patch_projection.weight")
_POSITIONS = ("patch_generator.pos_embed", "embeddings.position_embedding")
_PREFIXES = ("base_model.", "radio_model.model.", "radio_model.")
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}
"""Attention heads of each width that RADIO is published in; no tensor's shape tells them."""

_ARCHITECTURES = {
    (192, 12, 3, 768): "vit_tiny_patch16_224",
    (384, 12, 6, 1536): "vit_small_patch16_224",
    (768, 12, 12, 3072): "vit_base_patch16_224",
    (1024, 24, 16, 4096): "vit_large_patch16_224",
    (1152, 27, 16, 4304): "vit_so400m_patch16_radio_v4",
    (1280, 32, 16, 5120): "vit_huge_patch16_radio_v4",
    (1536, 40, 24, 6144): "vit_giant_patch16_radio_v3",
}
"""timm's bodies by width, depth, attention heads and channels of the MLP."""

# transformers converts every published name but LayerScale's, which it would drop silently.
_TO_TRANSFORMERS = (
    (".ls1.", ".layer_scale1."),
    (".ls2.", ".layer_scale2."),
    (".grandma", ".lambda1"),
    (".gamma", ".lambda1"),
)
_TO_TIMM = (
    ("patch_generator.embedder.", "patch_embed.proj."),
    ("embeddings.patch_projection.", "patch_embed.proj."),
    ("patch_generator.pos_embed", "pos_embed"),
    ("embeddings.position_embedding", "pos_embed"),
    ("patch_generator.cls_token.token", "tokens"),
    ("embeddings.cls_register_token", "tokens"),
    ("encoder.layer.", "blocks."),
    ("attention.o_proj.", "attn.proj."),
    ("mlp.down_proj.", "mlp.fc2."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".grandma", ".gamma"),
)
_JOINED = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),
}
_SETTINGS = (
    "hidden_size",
    "max_img_size",
    "num_attention_heads",
    "num_cls_tokens",
    "num_hidden_layers",
    "num_registers",
    "patch_size",
)
"""Of ``config.json``, without which no body can be made."""
_BODY = ("blocks.", "norm.", "patch_embed.", "pos_embed", "tokens")


@dataclass(frozen=True)
class RadioCheckpoint:
    """The body of a RADIO model."""

    config: dict[str, Any]
    """RadioModel's configuration, with ``norm_mean`` and ``norm_std``."""
    tensors: dict[str, Tensor]
    """Tensors as ``RadioModel.from_pretrained`` takes them."""
    grid: Size | None
    """Rows and columns of its position table; None where it is no square and nothing says them."""

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block; RadioModel has no place for one."""
        return any(_unwrapped(key) == "norm.weight" for key in self.tensors)

    def timm_tensors(self) -> dict[str, Tensor]:
        """Return the body under the names of timm's vision transformers.

        ``cls_token`` is ``[1, T, D]``, the class tokens of all teachers.
        """
        named = {_renamed(_unwrapped(key), _TO_TIMM): item for key, item in self.tensors.items()}
        found = _joined({key: item for key, item in named.items() if key.startswith(_BODY)})
        patches, tokens = found.pop("patch_embed.proj.weight"), found.pop("tokens")
        num_class, side = self.config["num_cls_tokens"], self.config["patch_size"]
        return {
            **found,
            "patch_embed.proj.weight": rearrange(patches, "d (c y x) -> d c y x", y=side, x=side),
            "cls_token": tokens[None, :num_class],
            "reg_token": tokens[None, num_class:],
        }


def holds_radio(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the patch embedding of a RADIO body."""
    return any(_unwrapped(key) in _PATCHES for key in state)


def read_radio(path: Path) -> RadioCheckpoint:
    """Read a torch.hub file or a model folder.

    Raises:
        WeightsError: where it is damaged or no RADIO vision transformer.
    """
    checkpoint = read_checkpoint(path)
    settings = read_json(path / "config.json") if path.is_dir() else checkpoint
    radio = radio_checkpoint(settings, tensors_of(checkpoint, path), str(path))
    if radio.grid is None or radio.grid[0] != radio.grid[1]:
        count = radio.timm_tensors()["pos_embed"].shape[1]
        of = format_size(radio.grid) if radio.grid else f"{count} positions"
        raise WeightsError(
            f"{path} has a position table of {of}, which is no square and a RADIO model is not "
            "read with (but it can be a student's start)"
        )
    return radio


def radio_checkpoint(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> RadioCheckpoint:
    """Sort tensors and settings that were read from ``where``.

    ``settings`` are the ``config.json`` of a folder, or a torch.hub file's table.
    """
    if not holds_radio(state):
        other = settings.get("architecture") or settings.get("model_type")
        what = f", but {other}: a model for timm or transformers to load" if other else ""
        raise WeightsError(
            f"{where} is no RADIO vision transformer{what} (a run or a checkpoint is named by its "
            "folder; `radio-distill export RUN --format transformers` writes a student as a RADIO)"
        )
    if settings.get("model_type") == "radio":
        if missing := [name for name in _SETTINGS if name not in settings]:
            raise WeightsError(
                f"{where}: config.json has no {', '.join(missing)}; take the one that was saved "
                "with the weights"
            )
        config = {**settings, **_normalisation(state, settings)}
        grid = _grid(state, config.get("max_img_size", 0), config["patch_size"], where)
        return RadioCheckpoint(config, dict(state), grid)
    arguments = settings.get("args", {})
    arguments = vars(arguments) if isinstance(arguments, Namespace) else dict(arguments)
    found = {_unwrapped(key): value for key, value in state.items()}
    body = {
        f"radio_model.model.{_renamed(key, _TO_TRANSFORMERS)}": value
        for key, value in found.items()
        if key.startswith(("blocks.", "patch_generator.", "norm."))
    }
    config = _configuration(found, arguments, where)
    grid = _grid(found, arguments.get("cpe_max_size", 0), config["patch_size"], where)
    if grid is not None:
        config["max_img_size"] = max(grid) * config["patch_size"]
    tensors = {
        **body,
        "summary_idxs": torch.tensor(config["summary_idxs"]),
        "input_conditioner.norm_mean": torch.tensor(config["norm_mean"]).view(-1, 1, 1),
        "input_conditioner.norm_std": torch.tensor(config["norm_std"]).view(-1, 1, 1),
    }
    return RadioCheckpoint(config, tensors, grid)


def _grid(state: Mapping[str, Tensor], size: Any, patch: int, where: str) -> Size | None:
    """Return the rows and columns of the position table; None where nothing says them.

    ``size`` is the side, or height and width, of the largest image in pixels, as the settings say.
    """
    tables = [value for key, value in state.items() if _unwrapped(key) in _POSITIONS]
    if not tables:
        raise WeightsError(f"{where} has no position table")
    count = tables[0].flatten(0, -2).shape[0]
    pair = (size, size) if isinstance(size, int) else tuple(size)
    for rows, columns in ((pair[0] // patch, pair[-1] // patch), (isqrt(count), isqrt(count))):
        if rows * columns == count:
            return rows, columns
    return None


def student_config(checkpoint: RadioCheckpoint, where: str) -> StudentConfig:
    """Return the config of a student that can hold a RADIO body; its heads are left to chance.

    Raises:
        WeightsError: where timm has no body of these sizes.
    """
    config = checkpoint.config
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    hidden = int(width * config.get("mlp_ratio", 4))
    sizes = (width, depth, config["num_attention_heads"], hidden)
    if sizes not in _ARCHITECTURES or config.get("use_swiglu_ffn"):
        raise WeightsError(
            f"{where}: no body of timm's has width {width}, depth {depth}, {sizes[2]} attention "
            f"heads and an MLP of {hidden} channels (known: {', '.join(_ARCHITECTURES.values())})"
        )
    return StudentConfig(
        architecture=_ARCHITECTURES[sizes],
        patch_size=config["patch_size"],
        max_size=config["max_img_size"],
        registers=config["num_registers"],
        final_norm=checkpoint.has_final_norm,
    )


def _unwrapped(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for old, new in names:
        key = key.replace(old, new)
    return key


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the matrices that RadioModel has apart and timm in one."""
    tensors = dict(tensors)
    for whole, parts in _JOINED.items():
        for first in [key for key in tensors if parts[0] in key]:
            keys = [first.replace(parts[0], part) for part in parts]
            if all(key in tensors for key in keys):
                joined = torch.cat([tensors.pop(key) for key in keys])
                tensors[first.replace(parts[0], whole)] = joined
    return tensors


def _configuration(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    width, patch_pixels = state["patch_generator.embedder.weight"].shape
    if width not in _HEADS:
        raise WeightsError(
            f"{where}: a RADIO body of width {width} is not known "
            f"(known: {', '.join(map(str, _HEADS))})"
        )
    patch_size = isqrt(patch_pixels // 3)
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    class_tokens, summaries = _slots(arguments)
    return {
        "model_type": "radio",
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": _HEADS[width],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "patch_size": patch_size,
        "image_size": 224 // patch_size * patch_size,
        "num_cls_tokens": class_tokens,
        "num_registers": state["patch_generator.cls_token.token"].shape[0] - class_tokens,
        "summary_idxs": state["summary_idxs"].tolist() if "summary_idxs" in state else summaries,
        **_normalisation(state, {}),
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


def _normalisation(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean and std: the checkpoint's own, its settings', or those of every published one."""
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    found = {_unwrapped(key).removeprefix("input_conditioner."): key for key in state}
    if found.keys() >= {"norm_mean", "norm_std"}:
        return {
            name: state[found[name]].float().flatten().tolist()
            for name in ("norm_mean", "norm_std")
        }
    return {
        "norm_mean": list(settings.get("norm_mean", OPENAI_CLIP_MEAN)),
        "norm_std": list(settings.get("norm_std", OPENAI_CLIP_STD)),
    }
