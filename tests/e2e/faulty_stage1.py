"""Stage 1 with a teacher that gives NaN: ``faulty_stage1.py RANK STEPS ARGUMENTS``.

STEPS are the steps, from 1 and with commas between them, in which the process of that rank gets it.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from radio_distill.distill.targets import TargetMaker  # noqa: E402
from stages import stage1  # noqa: E402

rank, steps = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}
make, calls = TargetMaker.__call__, 0


def make_faulty(self, *arguments):
    """Count the steps, which have one pass each, and spoil the last image's target."""
    global calls
    calls += 1
    targets = make(self, *arguments)
    if calls in steps and os.environ.get("RANK", "0") == rank:
        targets["vit"].spatial[-1, 0, 0, 0] = float("nan")
    return targets


TargetMaker.__call__ = make_faulty  # type: ignore[method-assign]
sys.exit(stage1.main(sys.argv[3:]))
