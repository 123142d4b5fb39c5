"""Whether a recipe that says next to nothing trains, on one process and on several.

    radio-distill shards photos data/photographs
    python -m benchmarks.shortest_recipe data/photographs [--steps 200] [--processes 1 2]

The recipe has three lines: the shards, two teachers whose weights come inside Python packages, and
one partition of one stage. All else is left to the defaults, but for what makes it small: the side
of the student's view and the number of images in a step; the teachers see the size whose grid is
the student's. Other fields go behind (``--student.architecture``). For each number of processes
(``torchrun`` over gloo) it prints the loss, summed over the terms and averaged over tenths of the
run, and by how much body and heads have changed between the first checkpoint and the last: the RMS
of the difference over the RMS of the weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from radio_distill.train import checkpoint as checkpoints

RECIPE = """\
data: {{shards: [{shards}]}}
teachers: {{dino: {dino}, efficientnet: {efficientnet}}}
stages: {{only: {{steps: {steps}, partitions: [{partition}]}}}}
"""
DINO = "{preset: vits14_packaged, input_size: match}"
EFFICIENTNET = "{preset: efficientnet_lite0_packaged, input_size: match}"
PARTITION = "{{name: low, size: {size}, teachers: [dino, efficientnet], batch_size: {batch_size}}}"
POINTS = 10
"""Of the curve that is printed."""


def train(recipe: Path, folder: Path, processes: int, fields: list[str]) -> Path:
    """Train in processes of its own; returns the folder of the stage."""
    command = ["-m", "stages.cli", "train", str(recipe), "--output", str(folder), *fields]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [*launcher, str(processes), *command]
    subprocess.run([sys.executable, *command], check=True)
    return folder / recipe.stem / "only"


def curve(stage: Path) -> list[float]:
    """Return the mean loss of each of :data:`POINTS` parts of a run."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    losses = torch.tensor(
        [sum(value for name, value in row.items() if name.startswith("loss/")) for row in rows]
    )
    return [float(part.mean()) for part in losses.tensor_split(POINTS)]


def change(stage: Path) -> dict[str, float]:
    """Return by how much body and heads have changed since the first checkpoint that is kept."""
    kept = sorted((stage / "checkpoints").glob("step-*"))
    first, last = (
        checkpoints.find(path).tensors(checkpoints.STUDENT) for path in kept[:: len(kept) - 1]
    )
    parts = {"body": "student.", "heads": "adaptors."}
    return {part: _change(first, last, prefix) for part, prefix in parts.items()}


def _change(first: dict[str, Tensor], last: dict[str, Tensor], prefix: str) -> float:
    names = [name for name in first if name.startswith(prefix) and first[name].is_floating_point()]
    moved = sum(float((last[name] - first[name]).square().sum()) for name in names)
    return (moved / sum(float(first[name].square().sum()) for name in names)) ** 0.5


def main() -> None:
    """Train and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=64, help="side of the student's view, px")
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step")
    arguments, fields = parser.parse_known_args()
    print(
        f"| processes | {' | '.join(f'tenth {n}' for n in range(1, POINTS + 1))} | body | heads |"
    )
    print("| ---: |" + " ---: |" * (POINTS + 2))
    with tempfile.TemporaryDirectory() as name:
        recipe = Path(name) / "shortest.yaml"
        text = RECIPE.format(
            shards=Path(arguments.shards).resolve(),
            dino=DINO,
            efficientnet=EFFICIENTNET,
            steps=arguments.steps,
            partition=PARTITION.format(size=arguments.size, batch_size=arguments.batch_size),
        )
        recipe.write_text(text)
        for processes in arguments.processes:
            output = Path(name) / str(processes)
            stage = train(recipe, output, processes, ["--log.keep_last", "9", *fields])
            numbers = [*(f"{loss:.3f}" for loss in curve(stage))]
            numbers += [f"{share:.1%}" for share in change(stage).values()]
            print(f"| {processes} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
