"""Export folders that are whole or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import ExportError
from ..system.files import flush, reason_of


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder`` to fill; renamed to it when the block succeeds.

    Nothing is left behind when the block raises.

    Raises:
        ExportError: where ``folder`` holds files already, or the disk does not take it.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; choose another folder, or move it away")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors lets only their owner read what it writes
            flush(path)
        flush(temporary)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {folder}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people: indented, in the given order."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
