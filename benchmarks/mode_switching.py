"""Mode switching of two students of equal budget: one resolution, or two partitions.

Stages 1 and 2 of the demo are trained once. From there stage 3 goes on in two ways, with equally
many steps and images: all at 160 px (``low``), or half at 160 and half at 320 px (``both``). The
teachers see every picture at the size that matches 160 px, upsampled for the larger student: what
there is to say of a picture does not depend on its resolution. `radio-distill mode-switching` then
compares the two with the student that both start from and with the teachers. Equal budget means
equally many pictures: an image of 320 px costs the student about four times one of 160.

    python -m benchmarks.mode_switching [--steps 400]

Each command is printed before it runs; what is complete is not trained again. Further arguments go
to the trainings (--engine.device cuda).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from stages.cli import main as radio_distill
from stages.common import load_recipe
from stages.demo import prepare_pictures

LOW = "{name: low, size: 160, teachers: [dino, efficientnet], batch_size: %d}"
HIGH = (
    "{name: high, size: 320, teachers: [dino, efficientnet], batch_size: %d, "
    "upsample: [dino, efficientnet], teacher_sizes: {dino: 140, efficientnet: 160}}"
)
IMAGES = 12
"""Of one step of stage 3."""
RATE = ["--stages.stage3.learning_rate", "1e-3", "--stages.stage3.warmup_steps", "20"]
"""At the demo's own rate, which is for 50 steps that only add to stage 2, little changes."""


def commands(output: str, steps: int, fields: Sequence[str]) -> list[list[str]]:
    """Return the command lines, without the program's name."""
    half = IMAGES // 2
    partitions = {"low": f"[{LOW % IMAGES}]", "both": f"[{LOW % half}, {HIGH % half}]"}
    train = ["train", "demo", "--resume", "--output", output, "--normalizer.cache"]
    train += [f"{output}/statistics"]
    lines = [[*train, "--name", "start", "--stages", "stage1", "stage2", *fields]]
    for name, text in partitions.items():
        line = [*train, "--name", name, "--stages", "stage3", *RATE]
        line += ["--stages.stage3.start_from", f"{output}/start/stage2"]
        line += ["--stages.stage3.steps", str(steps), "--stages.stage3.partitions", text]
        lines.append([*line, *fields])
    students = [f"{output}/{run}" for run in ("start/stage2", "low/stage3", "both/stage3-bilinear")]
    labels = ["start", "only low", "both"]
    compare = ["mode-switching", *students, "--labels", *labels, "--teachers", "--output", output]
    return [*lines, compare]


def main() -> int:
    """Run the comparison; returns the exit status of the command that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400, help="of stage 3 (default: 400)")
    parser.add_argument("--output", default="runs/mode_switching", metavar="DIR")
    arguments, fields = parser.parse_known_args()
    prepare_pictures(load_recipe("demo"), None)
    for line in commands(arguments.output, arguments.steps, fields):
        print("radio-distill", shlex.join(line), flush=True)
        status = radio_distill(line)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
