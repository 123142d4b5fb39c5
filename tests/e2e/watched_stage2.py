"""Stage 2, whose processes write down after each step which teachers they hold weights of."""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from radio_distill.distill.task import Distillation  # noqa: E402
from stages import stage2  # noqa: E402

forward_backward = Distillation.forward_backward


def watched(task: Distillation, step: int, *rest):
    agreement = forward_backward(task, step, *rest)
    teachers = task.targets.teachers.items()
    held = [name for name, teacher in teachers if getattr(teacher, "is_loaded", True)]
    path = Path(os.environ["HELD"]) / f"{task.world.rank}-{step}.json"
    path.write_text(json.dumps(held))
    return agreement


Distillation.forward_backward = watched  # type: ignore[method-assign]
sys.exit(stage2.main())
