"""What a run of two ranks left behind, and whether two runs came to the same end."""

import json
import os
import subprocess
import sys
from pathlib import Path

from e2e import CHECKOUT, assert_equal, tensors


def arguments(recipe_file: Path, output: str | Path, **fields: object) -> list[str]:
    """Return the command line of the tiny recipe's first stage, with ZeRO-2.

    Args:
        recipe_file: the recipe.
        output: folder for the run folder, from where the recipe lies.
        fields: of the recipe, with a double underscore for the dot.
    """
    values = {
        "stage__freeze_body_steps": 0,
        "engine__zero_stage": 2,
        "output": recipe_file.parent / output,
        **fields,
    }
    flags = [("--" + name.replace("__", "."), str(value)) for name, value in values.items()]
    return [str(recipe_file), *(item for flag in flags for item in flag)]


def stage_folder(recipe_file: Path, output: str | Path) -> Path:
    """Return the folder of that stage."""
    return recipe_file.parent / output / "tiny" / "stage1"


def torchrun(*command: str) -> None:
    """Run the first stage on two ranks as a user would."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = ["--standalone", "--nproc-per-node", "2", str(CHECKOUT / "stages" / "stage1.py")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *processes, *command],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def log(folder: Path) -> list[dict[str, float]]:
    """Whole lines of a stage's log; a kill may have cut the last one."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def last_row(folder: Path) -> dict[str, float]:
    """The log's last whole line; a step of 0 where there is none yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[-2:-1] if path.exists() else []
    row: dict[str, float] = json.loads(lines[0]) if lines else {"step": 0, "time": 0}
    return row


def numbers(row: dict[str, float]) -> dict[str, float]:
    """Those of a log line that do not tell of time."""
    kinds = ("step", "loss/", "gradient_norm", "learning_rate/")
    return {name: value for name, value in row.items() if name.startswith(kinds)}


def status(folder: Path) -> dict[str, object]:
    """What the stage says of itself."""
    values: dict[str, object] = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    return values


def part_names(folder: Path, step: int) -> set[str]:
    """Names of the files with tensors in a checkpoint."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return {path.stem for path in checkpoint.glob("*.safetensors")}


def assert_same_end(expected: Path, folder: Path, steps: int) -> None:
    """Compare every loss on the way, and every tensor at the end, bit for bit."""
    assert [numbers(row) for row in log(folder)] == [numbers(row) for row in log(expected)]
    parts = part_names(expected, steps)
    assert parts == part_names(folder, steps) >= {"student", "optimizer", "statistics"}
    for part in parts:
        assert_equal(tensors(expected, steps, part), tensors(folder, steps, part), part)
