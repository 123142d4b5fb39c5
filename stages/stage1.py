"""Train stage 1: a new student at low resolution.

accelerate launch stages/stage1.py demo
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stages.script import stage_main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit status."""
    return stage_main("stage1", argv)


if __name__ == "__main__":
    sys.exit(main())
