"""Train stage 2: the student of stage 1 at its working resolution.

accelerate launch stages/stage2.py demo
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stages.script import stage_main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit status."""
    return stage_main("stage2", argv)


if __name__ == "__main__":
    sys.exit(main())
