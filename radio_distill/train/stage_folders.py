"""The stages of a run folder, in the order in which its recipe trains them.

::

    RUN/stages.json      names of all stages of the recipe, in their order

It is written when a stage begins. A stage lies in the folder of its name, or NAME-UPSAMPLER.
Earlier versions wrote no such file: in their runs stages are the folders whose names begin with
``stage``, in the order of the alphabet.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, UnreadableError
from ..system.files import reason_of, refuse_unreadable, replacing

STAGES = "stages.json"


def write_stages(run: Path, names: Sequence[str]) -> None:
    """Write the names of a recipe's stages into its run folder."""
    with replacing(run / STAGES) as draft:
        draft.write_text(json.dumps(list(names)) + "\n", encoding="utf-8")


def stage_folders(run: Path, holding: str = "checkpoints") -> dict[str, list[Path]]:
    """Return the folders of a run's stages by the stages' names, in the order of the stages.

    A stage has several where it was trained with several upsamplers. Those of earlier runs, which
    were moved aside, are left out, and so are those without a file or folder ``holding``.

    Raises:
        UnreadableError: the run, or a stage of it, may not be looked into.
        CheckpointError: the order of the stages is damaged.
    """
    refuse_unreadable(run, UnreadableError)
    names, found = _read_stages(run), dict[str, list[Path]]()
    for folder in sorted(run.iterdir()) if run.is_dir() else ():
        stage = _stage_of(folder, names)
        if stage is not None:
            refuse_unreadable(folder, UnreadableError)
            if (folder / holding).exists():
                found.setdefault(stage, []).append(folder)
    return {name: found[name] for name in (found if names is None else names) if name in found}


def is_aside(folder: Path) -> bool:
    """Return whether a folder's name is that of an earlier run, which was moved aside."""
    return folder.suffix[1:].isdecimal()


def _read_stages(run: Path) -> list[str] | None:
    path = run / STAGES
    refuse_unreadable(path, UnreadableError)
    try:
        return [*map(str, json.loads(path.read_text(encoding="utf-8")))]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({reason_of(error)}); name a stage of the run instead of the run"
        ) from error


def _stage_of(folder: Path, names: Sequence[str] | None) -> str | None:
    """Return the stage that a folder is of, the one with the longest name; None for none."""
    if names is None:
        is_stage = folder.name.startswith("stage") and "." not in folder.name
        return folder.name.partition("-")[0] if is_stage else None
    if folder.name in names:
        return folder.name
    of = [name for name in names if folder.name.startswith(f"{name}-") and not is_aside(folder)]
    return max(of, key=len, default=None)
