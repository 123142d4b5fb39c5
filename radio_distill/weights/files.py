"""Files of weights, read without running what is in them.

Safetensors, torch files (:mod:`..system.trust`), and model folders of the hub, in one file or
in several. Checkpoints of other trainers have their tensors in nested tables, under longer names;
:func:`named_as` finds the ones that a model has and says which it took.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, UnreadableError, WeightsError
from ..system.files import reason_of
from ..system.redaction import redact
from ..system.trust import read_torch_file
from ..train import checkpoint as checkpoints
from ..train.checkpoint import Checkpoint
from ..train.stage_folders import stage_folders

logger = logging.getLogger(__name__)

HUB, FOLDER = "hf-hub:", "local-dir:"
"""timm's words before the name of a hub repository, or before the path of a model folder."""

_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_NO_WEIGHTS = ("optim", "scheduler", "scaler", "args", "config")
"""Beginnings of the names of tables in which a trainer keeps other things than weights."""
# What torch.compile, FSDP and activation checkpointing put into the names of a module's tensors.
_WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2's FSDP chunks: blocks.CHUNK.BLOCK.
_AVERAGED, _STUDENT = ("ema", "teacher"), "student"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one weights file as it is, or all tensors of a model folder.

    Raises:
        WeightsError: where there is nothing to read, or something else.
    """
    if path.is_dir():
        parts = [read_checkpoint(file) for file in files_of(path)]
        return {key: value for part in parts for key, value in part.items()}
    is_safe = path.suffix == ".safetensors"
    checkpoint = _read_safetensors(path) if is_safe else read_torch_file(path, mapped=True)
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, not a table of tensors")
    return checkpoint


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file or folder; see :func:`tensors_of`."""
    return tensors_of(read_checkpoint(path), path)


def tensors_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Take a checkpoint's tensors out of the usual wrappers, EMA weights first.

    Names of further tables that nest are joined: DINO's ``{"student": ..., "teacher": ...}`` gives
    ``teacher.backbone.cls_token``. A trainer's optimizer and arguments are no weights.

    Raises:
        WeightsError: where it holds none.
    """
    found: Any = checkpoint
    kinds = (Mapping, nn.Module)
    while inner := next((found[k] for k in _WRAPPERS if isinstance(found.get(k), kinds)), None):
        found = inner.state_dict() if isinstance(inner, nn.Module) else inner
    state = {_WRAPPED.sub("", key).removeprefix("module."): value for key, value in _nested(found)}
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    return state


def _nested(table: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, nn.Module):
            value = value.state_dict()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and not str(key).lower().startswith(_NO_WEIGHTS):
            yield from _nested(value, f"{name}.")


def named_as(
    state: Mapping[str, Tensor], wanted: Collection[str], where: str, prefix: str = ""
) -> dict[str, Tensor]:
    """Take off the prefix behind which most of a model's tensors stand; the log says which.

    Tensors that do not have the prefix are left out, and counted in the log. Several models in one
    file are told apart by their prefixes: EMA weights and a teacher go before a student.

    ``wanted`` are the names of the model's tensors, ``where`` is the file. A ``prefix`` that the
    user gives is taken as it is.

    Raises:
        WeightsError: a given prefix that no tensor has, or several models of one rank.
    """
    prefix = prefix or _prefix_of(state, frozenset(wanted), where)
    named = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if not named:
        first = sorted({key.partition(".")[0] for key in state})
        raise WeightsError(
            f"{where}: no tensor begins with {prefix!r} (they begin with: {_some(first)})"
        )
    if prefix:
        others = sorted({k.partition(".")[0] for k in state if not k.startswith(prefix)})
        left = f"; left out {len(state) - len(named)} others ({_some(others)})" if others else ""
        logger.info("%s: took %d tensors under %r%s", where, len(named), prefix, left)
    # DINOv2's FSDP writes blocks.CHUNK.BLOCK., which no model's names have.
    chunked = {key: _CHUNKED.sub(r"blocks.\1.", key) for key in named}
    if all(key in wanted or name not in wanted for key, name in chunked.items()):
        return named
    return {chunked[key]: value for key, value in named.items()}


def _prefix_of(state: Mapping[str, Tensor], wanted: frozenset[str], where: str) -> str:
    """Return the prefix with most of the wanted names behind it, the best rank among equals."""
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for depth in range(len(parts)):
            name = ".".join(parts[depth:])
            if name in wanted or _CHUNKED.sub(r"blocks.\1.", name) in wanted:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    # Layers of another model may be called alike. Older names of the same one may hardly agree, but
    # there are as many.
    models = {
        prefix: count
        for prefix, count in counts.items()
        if 2 * count >= len(wanted) or sum(key.startswith(prefix) for key in state) >= len(wanted)
    }
    most = max(models.values(), default=0)
    equal = sorted(prefix for prefix, count in models.items() if count == most)
    if not equal or "" in equal:
        return ""
    best = [prefix for prefix in equal if _rank(prefix) == min(map(_rank, equal))]
    if len(best) > 1:
        raise WeightsError(
            f"{where} holds {len(best)} models alike ({_some(best)}); save the tensors of one in a "
            "file of its own, or name its prefix where the source has such an option"
        )
    return best[0]


def _rank(prefix: str) -> int:
    words = re.split(r"[._]", prefix)
    return 0 if {*_AVERAGED} & {*words} else 1 + (_STUDENT in words)


def refuse_differences(
    found: Mapping[str, Sequence[Any]], wanted: Mapping[str, Sequence[Any]], where: str, name: str
) -> None:
    """Raise WeightsError, naming the first difference, where shapes are not an architecture's.

    Args:
        found: shapes of the tensors of the file ``where``.
        wanted: those of the architecture ``name``.
        where: file, for the message.
        name: architecture, for the message.
    """
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is unexpected" for key in found if key not in wanted]
    problems += [
        f"{key} has shape [{_joined(found[key])}], expected [{_joined(shape)}]"
        for key, shape in wanted.items()
        if [*found.get(key, shape)] != [*shape]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise WeightsError(f"{where} does not hold weights of {name}: {problems[0]}{more}")


def _joined(shape: Sequence[Any]) -> str:
    return ", ".join(map(str, shape))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


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
        if not names or not all(
            isinstance(name, str) and name == Path(name).name and (path / name).is_file()
            for name in names
        ):
            raise WeightsError(f"{index} has no table weight_map of files that lie beside it")
        return [path / name for name in sorted(set(names))]
    for name in _FILES:
        if (path / name).is_file():
            return [path / name]
    raise WeightsError(f"{path} holds no weights (looked for {', '.join(_FILES)})")


def hub_model(name: str, field: str = "`weights`") -> Path:
    """Return the folder of a model of the hub: JSON files and weights, safetensors if it has them.

    ``name`` is ``owner/name`` or ``owner/name@revision``, also behind ``hf-hub:``; ``field`` of the
    recipe takes a local copy instead.

    Raises:
        WeightsError: neither on the hub, nor in its local cache where the hub cannot be reached.
    """
    folder = hub_folder(name, "*.json", "*.safetensors", field=field)
    if any(folder.glob("*.safetensors")):
        return folder
    return hub_folder(name, "*.json", "pytorch_model.bin", field=field)


def hub_folder(name: str, *patterns: str, field: str = "`weights`") -> Path:
    """Fetch the files of a hub repository that match; see :func:`hub_model`."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise WeightsError(f"{name} is no repository of the hub; write {HUB}OWNER/NAME")
    return from_hub(
        repository,
        lambda: snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns)
        ),
        field,
    )


def from_hub(model: str, download: Callable[[], str], field: str = "`weights`") -> Path:
    """Run ``download`` and return its path; any failure becomes one line with the hint."""
    logger.info("fetching the weights of %s", model)
    try:
        return Path(download())
    except Exception as error:  # every hub client has exceptions of its own
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"cannot fetch the weights of {model} ({reason}); put a local file or folder with "
            f"them into {field}"
        ) from error


def checksummed_files(path: Path) -> list[Path]:
    """Return the files whose checksum stands for weights: a file, a model folder's, or a run's.

    A checkpoint's is ``meta.json`` alone, which holds the checksums of all others.

    Raises:
        CheckpointError: a folder that holds neither.
        WeightsError: a model folder without weights.
    """
    try:
        files = files_of(path)
    except WeightsError:
        if (path / "config.json").is_file():
            raise
        return [find_checkpoint(path).folder / "meta.json"]
    heads = path / "adaptors.safetensors"
    return [*files, heads] if heads.is_file() else files


def find_checkpoint(path: Path, verified: bool = True) -> Checkpoint:
    """Open a checkpoint, the newest of a stage folder, or that of a run's last stage.

    Its files are read and ``verified``; else they must be there.

    Raises:
        CheckpointError: where there is none, or a run has several last stages.
    """
    if stages := stage_folders(path):
        path, *rivals = [*stages.values()][-1]
        if rivals:
            names = ", ".join(folder.name for folder in (path, *rivals))
            raise CheckpointError(f"{path.parent} holds several last stages; name one: {names}")
    try:
        return checkpoints.find(path, verified)
    except UnreadableError:
        raise
    except CheckpointError as error:
        if others := [folder.parent.name for folder in sorted(path.glob("*/checkpoints"))]:
            raise CheckpointError(
                f"{path}: it does not say which stage is the last; name one: {', '.join(others)}"
            ) from error
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} is a model folder; name the run, stage or checkpoint that it came from"
            ) from error
        raise CheckpointError(
            f"{path} is no run, stage or checkpoint folder, nor a model folder: {error}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise WeightsError(f"cannot read weights {path}: {reason_of(error)}") from error
