"""Mode switching of three students of equal budget: one resolution, one teacher a resolution, both.

Stages 1 and 2 of the demo are trained once. From there stage 3 goes on in three ways, with equally
many steps and images:

    only low    all at 160 px
    apart       half at 160 px, shown to dino alone, half at 320 px, shown to efficientnet alone:
                AM-RADIO's arrangement, in which RADIOv2.5 found the defect
    both        half at 160 px and half at 320 px, each shown to both teachers: its cure

The teachers see every image at the size that matches 160 px, upsampled for the larger student:
what there is to say of an image does not depend on its resolution. `radio-distill mode-switching`
then compares the three with the student that they start from and with the teachers. Equal budget
means equally many images: an image of 320 px costs the student about four times one of 160.

    python -m benchmarks.mode_switching [--steps 400]

Each command is printed before it runs; what is complete is not trained again. Further arguments go
to the trainings (--engine.device cuda).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from stages.cli import main as radio_distill
from tools.demo_images import write_demo_images

BOTH = ("dino", "efficientnet")
SIZES = {"dino": 140, "efficientnet": 160}
"""Of the teachers' inputs in high resolution: those that match 160 px of the student."""
IMAGES = 12
"""Of one step of stage 3."""
RATE = ["--stages.stage3.learning_rate", "1e-3", "--stages.stage3.warmup_steps", "20"]
"""At the demo's own rate, which is for 50 steps that only add to stage 2, little changes."""


def low(teachers: Sequence[str], images: int) -> dict[str, Any]:
    """Return the partition at 160 px."""
    return {"name": "low", "size": 160, "teachers": list(teachers), "batch_size": images}


def high(teachers: Sequence[str], images: int) -> dict[str, Any]:
    """Return the partition at 320 px."""
    return {
        "name": "high",
        "size": 320,
        "teachers": list(teachers),
        "batch_size": images,
        "upsample": list(teachers),
        "teacher_sizes": {name: SIZES[name] for name in teachers},
    }


def commands(output: str, steps: int, fields: Sequence[str]) -> list[list[str]]:
    """Return the command lines, without the program's name."""
    half = IMAGES // 2
    partitions = {
        "low": [low(BOTH, IMAGES)],
        "apart": [low(BOTH[:1], half), high(BOTH[1:], half)],
        "both": [low(BOTH, half), high(BOTH, half)],
    }
    train = ["train", "demo", "--resume", "--output", output, "--normalizer.cache"]
    train += [f"{output}/statistics"]
    lines = [[*train, "--name", "start", "--stages", "stage1", "stage2", *fields]]
    for name, items in partitions.items():
        line = [*train, "--name", name, "--stages", "stage3", *RATE]
        line += ["--stages.stage3.start_from", f"{output}/start/stage2"]
        line += ["--stages.stage3.steps", str(steps)]
        line += ["--stages.stage3.partitions", json.dumps(items)]
        lines.append([*line, *fields])
    runs = ("start/stage2", "low/stage3", "apart/stage3-bilinear", "both/stage3-bilinear")
    students = [f"{output}/{run}" for run in runs]
    labels = ["start", "only low", "apart", "both"]
    compare = ["mode-switching", *students, "--labels", *labels, "--teachers", "--output", output]
    return [*lines, compare]


def main() -> int:
    """Run the comparison; returns the exit status of the command that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400, help="of stage 3 (default: 400)")
    parser.add_argument("--output", default="runs/mode_switching", metavar="DIR")
    arguments, fields = parser.parse_known_args()
    write_demo_images()
    for line in commands(arguments.output, arguments.steps, fields):
        print("radio-distill", shlex.join(line), flush=True)
        status = radio_distill(line)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
