"""Weights: find the file, check it, read it without executing it, and load it without a gap.

Files are safetensors or pickles read with ``weights_only=True``. Nothing is loaded "as far as it
fits": a key that is missing, left over or of another shape is an error that names it.
"""

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from radio_distill.errors import WeightsError

logger = logging.getLogger(__name__)

_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_WRAPPERS = ("state_dict_ema", "state_dict", "model")


def local_path(weights: str) -> Path:
    """Return the file or folder that a recipe names; raises WeightsError where there is none."""
    path = Path(weights).expanduser()
    if not path.exists():
        raise WeightsError(f"no weights at {weights}; correct `weights` or leave it empty")
    return path


def from_hub(model: str, download: Callable[[], str]) -> Path:
    """Run ``download`` and return its path; any failure becomes one line with the mend."""
    logger.info("fetching the weights of %s", model)
    try:
        return Path(download())
    except Exception as error:  # every hub client has exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"cannot fetch the weights of {model} ({reason}); put a local file or folder with "
            f"them into `weights`"
        ) from error


def check_sha256(path: Path, expected: str) -> None:
    """Raise WeightsError unless the file has this sha256; an empty ``expected`` checks nothing."""
    if not expected:
        return
    if path.is_dir():
        raise WeightsError(f"sha256 is that of one file, but {path} is a folder; drop `sha256`")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected.lower():
        raise WeightsError(f"{path} has sha256 {found}, the recipe asks for {expected}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one weights file as it is, or all tensors of a model folder."""
    if path.is_dir():
        return _read_folder(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # the arguments in RADIO's checkpoints
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in a dozen ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"cannot read weights {path}: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, not a table of tensors")
    return checkpoint


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file or folder, out of the usual wrappers, EMA weights first."""
    checkpoint = read_checkpoint(path)
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


def load_strict(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load ``state`` into ``module``; raises WeightsError unless keys and shapes agree."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    mismatched = [
        f"{key}: {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    refuse_gaps(where, missing, unexpected, mismatched)
    module.load_state_dict(state)


def refuse_gaps(
    where: str, missing: list[str], unexpected: list[str], mismatched: list[str]
) -> None:
    """Raise WeightsError naming the first key and the count of each kind of disagreement."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = [f"{len(keys)} {kind} (first {keys[0]})" for kind, keys in kinds.items() if keys]
    if found:
        raise WeightsError(f"{where} holds weights of another model: {', '.join(found)}")


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a module's tensors: equal weights have it equal in any file format."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_folder(folder: Path) -> dict[str, Any]:
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {
            key: value for shard in shards for key, value in read_checkpoint(folder / shard).items()
        }
    for name in _FILES:
        if (folder / name).is_file():
            return read_checkpoint(folder / name)
    raise WeightsError(f"{folder} holds no weights (looked for {', '.join(_FILES)})")
