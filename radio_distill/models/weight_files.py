"""Files of weights, read without running what is in them.

Safetensors, torch files through ``weights_only=True``, and model folders of the hub, in one file or
in several.
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError

_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_WRAPPERS = ("state_dict_ema", "state_dict", "model")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one weights file as it is, or all tensors of a model folder.

    Raises:
        WeightsError: where there is nothing to read, or something else.
    """
    if path.is_dir():
        return _read_folder(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # the arguments in RADIO's checkpoints
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own words advise to run it
        raise WeightsError(
            f"cannot read weights {path}: it is no torch file, or one that would run code when read"
        ) from error
    except Exception as error:  # a damaged file fails in a dozen ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"cannot read weights {path}: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, not a table of tensors")
    return checkpoint


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file or folder, out of the usual wrappers, EMA weights first."""
    return tensors_of(read_checkpoint(path), path)


def tensors_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Take a checkpoint's tensors out of the usual wrappers, EMA weights first.

    Raises:
        WeightsError: where it holds none.
    """
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    state = {
        key.removeprefix("module."): value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder; raises WeightsError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            f"cannot read {path}: {error.strerror}; `weights` must be a model folder"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds a {type(data).__name__}, not a table of settings")
    return data


def _read_folder(folder: Path) -> dict[str, Any]:
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(read_json(index)["weight_map"].values()))
        return {
            key: value for shard in shards for key, value in read_checkpoint(folder / shard).items()
        }
    for name in _FILES:
        if (folder / name).is_file():
            return read_checkpoint(folder / name)
    raise WeightsError(f"{folder} holds no weights (looked for {', '.join(_FILES)})")
