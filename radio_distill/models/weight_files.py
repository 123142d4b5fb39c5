"""Files of weights, read without running what is in them.

Safetensors, torch files (:mod:`radio_distill.trust`), and model folders of the hub, in one file or
in several.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..files import reason_of
from ..registry import Registry
from ..trust import read_torch_file

_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# The reader of runs belongs to training, above this layer, so it is known by its name alone.
_CHECKPOINTS = Registry("checkpoint", {"run": "radio_distill.loading:find_checkpoint"})
_WRAPPERS = ("state_dict_ema", "state_dict", "model")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one weights file as it is, or all tensors of a model folder.

    Raises:
        WeightsError: where there is nothing to read, or something else.
    """
    if path.is_dir():
        parts = [read_checkpoint(file) for file in files_of(path)]
        return {key: value for part in parts for key, value in part.items()}
    is_safe = path.suffix == ".safetensors"
    checkpoint = _read_safetensors(path) if is_safe else read_torch_file(path)
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
        if isinstance(key, str) and isinstance(value, Tensor)
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


def files_of(path: Path) -> list[Path]:
    """Return the files that :func:`read_checkpoint` reads: a file itself, or those of a folder.

    Raises:
        WeightsError: a folder without weights, or whose index names files that are not in it.
    """
    if not path.is_dir():
        return [path]
    for index in sorted(path.glob("*.index.json")):
        shards = read_json(index).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(_is_beside(index, name) for name in names):
            raise WeightsError(f"{index} has no table weight_map of files that lie beside it")
        return [path / name for name in sorted(set(names))]
    for name in _FILES:
        if (path / name).is_file():
            return [path / name]
    raise WeightsError(f"{path} holds no weights (looked for {', '.join(_FILES)})")


def summed_files(path: Path) -> list[Path]:
    """Return the files whose sum stands for weights: a file, a model folder's, or a run's.

    A checkpoint's is ``meta.json`` alone, which holds the sums of all others.

    Raises:
        CheckpointError: a folder that holds neither.
        WeightsError: a model folder without weights.
    """
    try:
        files = files_of(path)
    except WeightsError:
        if (path / "config.json").is_file():
            raise
        return [_CHECKPOINTS.get("run")(path).folder / "meta.json"]
    heads = path / "adaptors.safetensors"
    return [*files, heads] if heads.is_file() else files


def _is_beside(index: Path, name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and index.with_name(name).is_file()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise WeightsError(f"cannot read weights {path}: {reason_of(error)}") from error
