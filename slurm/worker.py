"""One process of a job: notes its start and end for :mod:`slurm.aftermath`, and runs a target.

    python -m slurm.worker FOLDER module:function [ARGUMENT ...]

Signals are listened for before anything heavy is imported. A process that saved because of one, or
whose folder was taken over, ends with 0: otherwise its launcher would end the others while they are
still writing. How it ended is in its outcome.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from radio_distill.system.redaction import redact
from radio_distill.system.signals import listening, requested

from . import outcomes
from .decision import INTERRUPTED, TAKEN_OVER

QUIET = (0, INTERRUPTED, TAKEN_OVER)
"""Statuses with which a process ends as if all were well."""


def call(target: str, arguments: Sequence[str]) -> int:
    """Run ``module:function`` with a list of arguments; returns its exit status."""
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)(list(arguments)) or 0


def main(argv: Sequence[str]) -> int:
    """Run a target and note how it ended; returns the exit status of the process."""
    folder, target, *arguments = argv
    place = outcomes.Place.of(os.environ)
    with listening():
        outcome = outcomes.begin(Path(folder), place, int(os.environ.get("RANK", "0")))
        status, reason = 1, ""
        try:
            status = call(target, arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            reason = redact(traceback.format_exception_only(error)[-1])
            print(redact(traceback.format_exc()), file=sys.stderr)
        finally:
            outcomes.end(Path(folder), place, outcome, status, reason, requested())
    return 0 if status in QUIET else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
