"""Stage 2, whose processes write into a folder after each step which teachers they hold."""

import json
from pathlib import Path
from unittest.mock import patch

from radio_distill.distill.task import Distillation
from stages import stage2

forward_backward = Distillation.forward_backward


def main(argv: list[str]) -> int:
    """Run the stage with the arguments behind the folder; returns the exit status."""
    folder, *arguments = argv

    def watched(task: Distillation, step: int, *rest):
        agreement = forward_backward(task, step, *rest)
        teachers = task.targets.teachers.items()
        held = [name for name, teacher in teachers if getattr(teacher, "is_loaded", True)]
        (Path(folder) / f"{task.world.rank}-{step}.json").write_text(json.dumps(held))
        return agreement

    with patch.object(Distillation, "forward_backward", watched):
        return stage2.main(arguments)
