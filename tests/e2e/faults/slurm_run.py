"""A tiny recipe that can be slowed down, and a run of it on Slurm, seen from outside.

One teacher is a plug-in that sleeps for as long as a file says: there is time to disturb a run, and
none is lost when it need not wait.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from e2e import CHECKOUT
from e2e import RECIPE as BASE

STEPS = {"stage1": 40, "stage2": 12, "stage3": 60}
FOLDERS = {"stage1": "stage1", "stage2": "stage2", "stage3": "stage3-bilinear"}
PATIENCE = 240.0
"""Seconds until something must have happened; far more than it takes."""

SLOW_TEACHER = """
import os, time
from dataclasses import replace
from pathlib import Path
from teachers.presets import TINY
from teachers.sources import timm as timm_source
from teachers.sources.timm import ARGUMENTS, complete, load, locate

def rest(*_):
    time.sleep(float(Path(os.environ["PAUSE"]).read_text()))

def build(preset):
    tower = timm_source.build(preset)
    tower.register_forward_pre_hook(rest)
    return tower

PRESET = replace(TINY["tiny_vit"], source="slow_teacher")
"""


def write_recipe(folder: Path, images: Path) -> Path:
    """Write the tiny recipe of three stages, with its shards and the slow teacher beside it."""
    (folder / "slow_teacher.py").write_text(SLOW_TEACHER)
    plugin = folder / "slow_teacher-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-teacher\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[radio_distill.teachers]\nslow_vit = slow_teacher:PRESET\n"
    )
    shutil.copytree(images / "shards", folder / "shards")
    changed = {
        "output": str(folder / "runs"),
        "data": {**BASE["data"], "shards": [str(folder / "shards")]},
        "teachers": {**BASE["teachers"], "vit": {"preset": "slow_vit", "input_size": "match"}},
        "engine": {**BASE["engine"], "zero_stage": 2, "device": "cpu"},
        "log": {**BASE["log"], "save_every": 5, "keep_last": 3},
        "evaluation": {**BASE["evaluation"], "images": str(images / "held_out")},
        "stages": {
            name: {**BASE["stages"][name], "steps": steps, "optimizer": "adamw"}
            for name, steps in STEPS.items()
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changed}, sort_keys=False))
    return path


class Run:
    """A run folder, the jobs that were submitted for it, and the pause of its steps."""

    def __init__(self, slurm: Any, recipe: Path, name: str):
        self.slurm, self.recipe, self.name = slurm, recipe, name
        self.folder = recipe.parent / "runs" / name
        self.pause_file = recipe.parent / f"{name}.pause"
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Let each step from now on take so much longer."""
        temporary = self.pause_file.with_suffix(".new")
        temporary.write_text(str(seconds))
        temporary.replace(self.pause_file)

    def command(self, *arguments: object) -> str:
        """Run ``radio-distill slurm`` as a user would; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "stages.cli", "slurm", *map(str, arguments)],
            cwd=self.recipe.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *arguments: object, gpus: int = 2) -> None:
        """Submit the recipe under this run's name."""
        environment = {"PAUSE": self.pause_file, "OMP_NUM_THREADS": 1}
        environment["PYTHONPATH"] = f"{self.recipe.parent}:{CHECKOUT}"
        settings = [f"--environment={name}={value}" for name, value in environment.items()]
        settings += [f"--gpus-per-node={gpus}", "--cpus-per-task=2", "--signal-delay-s=15"]
        self.command(self.recipe, "--name", self.name, *settings, *arguments)

    def shows(self, stage: str, text: str) -> bool:
        """Tell whether ``radio-distill slurm status`` says something of a stage."""
        rows: list[str] = []
        for line in self.command("status", self.folder).splitlines():
            if line.startswith(" "):  # the rest of a cell that was too long
                rows[-1] += line
            else:
                rows.append(line)
        row = next(row for row in rows if row.split()[0] == stage)
        return "".join(text.split()) in "".join(row.split())

    def job(self, stage: str) -> str:
        """Return the id of a stage's job."""
        jobs = json.loads((self.folder / "slurm" / "chain.json").read_text())["jobs"]
        return next(job["tasks"][0]["job_id"] for job in jobs if job["name"] == stage)

    def show(self, stage: str) -> dict[str, str]:
        """Return what Slurm says of a stage's job."""
        text = self.slurm.command("scontrol", "--oneliner", "show", "job", self.job(stage))
        return dict(item.partition("=")[::2] for item in text.split())

    def rows(self, stage: str) -> list[dict[str, float]]:
        """Return the log lines of a stage: one for each step."""
        path = self.folder / FOLDERS[stage] / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self, stage: str) -> list[tuple[float, ...]]:
        """Return step, gradient norm and every loss of each log line."""
        names = [name for name in self.rows(stage)[0] if name.startswith("loss/")]
        return [
            tuple(row[n] for n in ("step", "gradient_norm", *names)) for row in self.rows(stage)
        ]

    def stops(self, stage: str) -> list[dict[str, Any]]:
        """Return what became of each start of a stage's job, the oldest first."""
        path = self.folder / "slurm" / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [stop for stop in map(json.loads, lines) if stop["name"] == stage]

    def sha256(self, stage: str) -> str:
        """Return the checksum of the weights that a stage ended with."""
        step = f"step-{STEPS[stage]:08d}"
        path = self.folder / FOLDERS[stage] / "checkpoints" / step / "student.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def processes(self, stage: str, start: int) -> dict[int, int]:
        """Return the process of each rank in a start of a stage's job, counted from 0."""
        paths = (self.folder / "slurm" / "outcomes").glob(f"{self.job(stage)}-{start}-*.json")
        outcomes = [json.loads(path.read_text()) for path in paths]
        return {outcome["rank"]: outcome["process"] for outcome in outcomes}

    def wait(self, condition: Callable[[], object], what: str) -> float:
        """Wait, but not for ever; returns the seconds."""
        try:
            return self.slurm.wait_for(condition, PATIENCE, f"{self.name}: {what}")
        except TimeoutError as error:
            logs = sorted((self.folder / "slurm").glob("*_log.err"))
            texts = [f"{path.name}:\n{path.read_text()[-1500:]}" for path in logs]
            raise TimeoutError("\n".join([str(error), *texts])) from None

    def wait_for_step(self, stage: str, step: int) -> float:
        return self.wait(lambda: len(self.rows(stage)) >= step, f"step {step} of {stage}")

    def wait_for_stops(self, stage: str, count: int) -> float:
        return self.wait(lambda: len(self.stops(stage)) >= count, f"stop {count} of {stage}")

    def wait_for_end(self, stage: str) -> float:
        def over() -> bool:
            return self.stops(stage)[-1:] != [] and self.stops(stage)[-1]["kind"] == "done"

        return self.wait(over, f"the end of {stage}")
