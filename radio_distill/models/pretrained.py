"""Starts a student from the weights of a timm vision transformer, at any patch size and grid.

What the student has no place for (classifier, final norm, pooling) is left behind. The class token
becomes the start of every summary token, register tokens that of as many registers. timm's patch
embedding has a bias and the student's has none, so the bias moves into the position table.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import WeightsError

if TYPE_CHECKING:
    from .student import Student

LEFT_BEHIND = ("norm.", "fc_norm.", "attn_pool.", "pre_logits.", "head.")
PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors``, or from a torch file without running its code.

    Raises:
        WeightsError: where there is no such file, or it holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"no weights file {path}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{path} is no safetensors or plain torch file ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} is not a state dict, names with tensors; save one from it")
    return state


def check_weights(weights: Mapping[str, Tensor], body: nn.Module, source: str, name: str) -> None:
    """Raise WeightsError, naming the first key that differs, where weights are another model's.

    Args:
        weights: state dict to check; patch size and grid are free.
        body: timm model of the architecture.
        source: where the weights are from, for the message.
        name: the architecture, for the message.
    """
    expected = {k: v for k, v in body.state_dict().items() if not k.startswith(LEFT_BEHIND)}
    found = {k: v for k, v in weights.items() if not k.startswith(LEFT_BEHIND)}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is unexpected" for key in found if key not in expected]
    problems += [
        f"{key} has shape {list(value.shape)}, expected {list(expected[key].shape)}"
        for key, value in found.items()
        if key in expected and _fixed_shape(key, value) != _fixed_shape(key, expected[key])
    ]
    if POSITIONS in found and not problems:
        problems += _grid_problems(found[POSITIONS], _num_positioned(body))
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise WeightsError(f"{source} does not hold weights of {name}: {problems[0]}{more}")


def _grid_problems(positions: Tensor, num_prefix: int) -> list[str]:
    num_patches = positions.shape[1] - num_prefix
    if math.isqrt(max(num_patches, 0)) ** 2 == num_patches:
        return []
    return [f"{POSITIONS} has {num_patches} patch positions, which is no square grid"]


def _num_positioned(body: Any) -> int:
    """Return how many rows of timm's position embedding belong to class and register tokens."""
    return 0 if body.no_embed_class else int(body.num_prefix_tokens)


def _fixed_shape(key: str, value: Tensor) -> list[int]:
    """Return the part of the shape that the architecture alone decides."""
    shape = list(value.shape)
    if key == PATCHES:
        return [len(shape), *shape[:2]]
    return [len(shape), shape[-1]] if key == POSITIONS else shape


@torch.no_grad()
def start_from(student: "Student", body: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a student the checked weights of a timm model.

    Args:
        student: changed in place; its blocks are those of ``body``.
        body: timm model of the architecture, which knows its own prefix tokens.
        weights: what :func:`check_weights` accepted.
    """
    from timm.layers import resample_patch_embed

    student.blocks.load_state_dict(_below("blocks.", weights))
    student.norm_pre.load_state_dict(_below("norm_pre.", weights))
    size = [student.patch_size, student.patch_size]
    patches = resample_patch_embed(weights[PATCHES].float(), size)
    student.patch_embedding.weight.copy_(rearrange(patches, "d c y x -> d (c y x)"))

    num_prefix = _num_positioned(body)
    prefix = _prefix_tokens(weights)
    if POSITIONS in weights:
        positions = weights[POSITIONS].float()
        student.positions.table.copy_(
            _resampled(positions[:, num_prefix:], student.positions.table)
        )
        if num_prefix:
            prefix = prefix + positions[0, :num_prefix]
    if "patch_embed.proj.bias" in weights:
        student.positions.table.add_(weights["patch_embed.proj.bias"])

    num_summary, num_class = student.num_summary_tokens, int("cls_token" in weights)
    if num_class:
        student.prefix_tokens[:num_summary] = prefix[0]
    registers = prefix[num_class : num_class + student.num_prefix_tokens - num_summary]
    student.prefix_tokens[num_summary : num_summary + len(registers)] = registers


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _prefix_tokens(weights: Mapping[str, Tensor]) -> Tensor:
    """Class and register tokens of a timm model, ``[P, D]``."""
    embed_dim = weights[PATCHES].shape[0]
    tokens = [weights[key][0].float() for key in ("cls_token", "reg_token") if key in weights]
    return torch.cat([torch.empty(0, embed_dim), *tokens])


def _resampled(positions: Tensor, table: Tensor) -> Tensor:
    """Bicubic resampling of ``[1, N, D]`` to the table's ``[side, side, D]``.

    Pixel centres are aligned (not corners), because the evaluation resizes the table that way.
    """
    from timm.layers import resample_abs_pos_embed

    side = table.shape[0]
    resampled = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=0)
    return rearrange(resampled, "1 (y x) d -> y x d", y=side)
