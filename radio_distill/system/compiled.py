"""Transformer blocks that ``torch.compile`` fuses, each by itself and in place.

A block in eager mode is some forty kernels, most of which only read and write; compiled it is a
third of them. Block by block because a graph of one block is small, holds for all blocks that are
alike, and whatever cannot be traced (draws, hooks, checkpointing, windows) stays outside of it.
Names of tensors do not change. Sizes are fixed in a graph until a second one comes, and free then.
"""

import os
import shutil
from typing import Any

import torch
from torch import nn

_MOST_GRAPHS = 256
"""Teachers, the student and all depths of drop path share one count of graphs; torch's limit of 8
is for one function, and beyond it torch would go on in eager mode."""


def compile_blocks(model: nn.Module, **options: Any) -> list[nn.Module]:
    """Have each block of a model compiled when it is first run; returns the blocks.

    A model without blocks, see :func:`blocks_of`, stays as it is.

    Args:
        model: changed in place.
        options: of :func:`torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(**options)
    return blocks


def can_compile(device: torch.device) -> bool:
    """Return whether ``torch.compile`` pays and works: on a GPU, with Triton and a C compiler."""
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton

    compilers = os.environ.get("CC", ""), "cc", "gcc", "clang"
    return bool(has_triton()) and any(name and shutil.which(name) for name in compilers)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the members of every list of two or more modules of one class, the outermost lists
    first, unless they are single layers."""
    members = list(model.children())
    if isinstance(model, (nn.ModuleList, nn.Sequential)) and len(members) > 1:
        is_layer = next(members[0].children(), None) is None
        if len(set(map(type, members))) == 1 and not is_layer:
            return members
    return [block for member in members for block in blocks_of(member)]
