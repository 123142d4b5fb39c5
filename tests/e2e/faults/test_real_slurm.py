"""Jobs on a real Slurm: whatever befalls them, they end with the numbers of an undisturbed chain.

Every job has one node and two ranks under ZeRO-2. One teacher is a plug-in that sleeps for as long
as a file says, so that there is time to disturb a run, and none is lost when it need not wait.
"""

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[3]
BASE = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["RECIPE"]
STEPS = {"stage1": 40, "stage2": 12, "stage3": 60}
FOLDERS = {"stage1": "stage1", "stage2": "stage2", "stage3": "stage3-bilinear"}
PAUSE = 1.5
"""Seconds that a step takes while it is to be disturbed: stage 1 outlasts its time limit."""
PATIENCE = 240.0
"""Seconds until something must have happened; far more than it takes."""

pytestmark = [pytest.mark.faults, pytest.mark.distributed, pytest.mark.timeout(900)]

SLOW_TEACHER = """
import os, time
from dataclasses import replace
from pathlib import Path
from teachers import timm_source
from teachers.presets import TINY
from teachers.timm_source import ARGUMENTS, complete

def rest(*_):
    time.sleep(float(Path(os.environ["PAUSE"]).read_text()))

def build(preset):
    tower = timm_source.build(preset)
    tower.register_forward_pre_hook(rest)
    return tower

PRESET = replace(TINY["tiny_vit"], source="slow_teacher")
"""


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
        links = json.loads((self.folder / "slurm" / "chain.json").read_text())["links"]
        return next(link["tasks"][0]["job_id"] for link in links if link["name"] == stage)

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


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The tiny recipe with a slow teacher; a plug-in of that name lies beside the file."""
    folder = tmp_path_factory.mktemp("real_slurm")
    (folder / "slow_teacher.py").write_text(SLOW_TEACHER)
    plugin = folder / "slow_teacher-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-teacher\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[radio_distill.teachers]\nslow_vit = slow_teacher:PRESET\n"
    )
    shutil.copytree(pictures / "shards", folder / "shards")
    changed = {
        "output": str(folder / "runs"),
        "data": {**BASE["data"], "shards": [str(folder / "shards")]},
        "teachers": {**BASE["teachers"], "vit": {"preset": "slow_vit", "input_size": "match"}},
        "engine": {**BASE["engine"], "zero_stage": 2},
        "log": {**BASE["log"], "save_every": 5, "keep_last": 3},
        "evaluation": {**BASE["evaluation"], "pictures": str(pictures / "held_out")},
    }
    stages = {
        name: {**BASE["stages"][name], "steps": steps, "optimizer": "adamw"}
        for name, steps in STEPS.items()
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changed, "stages": stages}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def calm(slurm_cluster: Any, recipe: Path) -> Run:
    """The chain that nobody disturbs; it may still run."""
    run = Run(slurm_cluster, recipe, "calm")
    run.submit("--time", 60, "--no-export", "--no-eval")
    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line that pytest does not capture, with the seconds since the test began."""
    start = time.monotonic()

    def printer(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {time.monotonic() - start:4.0f} s  {text}", end="", flush=True)

    return printer


def assert_equal(run: Run, calm: Run, stage: str) -> None:
    """Compare weights, losses and gradient norms of a stage, bit for bit."""
    calm.wait_for_end(stage)
    assert [row["step"] for row in run.rows(stage)] == list(range(1, STEPS[stage] + 1))
    assert run.losses(stage) == calm.losses(stage)
    assert run.sha256(stage) == calm.sha256(stage)


def test_chain__time_limit_requeue_and_dead_node(slurm_cluster, recipe, calm, say):
    run = Run(slurm_cluster, recipe, "disturbed")
    run.pause(PAUSE)
    run.submit("--time", 1)
    for name in ("stage2", "stage3", "export", "eval"):
        set_time_limit(run, name)
    _time_limit(run, say)
    _requeue(run, say)
    _dead_node(run, say)
    for name in ("export", "eval"):
        run.wait_for_end(name)
    say("exported and evaluated")
    assert (run.folder / "export" / "transformers" / "config.json").is_file()
    for stage in STEPS:
        assert_equal(run, calm, stage)
    starts = {stage: len(run.stops(stage)) for stage in STEPS}
    say(f"starts: {starts}; final student's sha256: {run.sha256('stage3')[:16]}, as undisturbed")


def set_time_limit(run: Run, stage: str, minutes: int = 60) -> None:
    run.slurm.command("scontrol", "update", f"JobId={run.job(stage)}", f"TimeLimit={minutes}")


def _time_limit(run: Run, say: Callable[[str], None]) -> None:
    run.wait_for_step("stage1", 1)
    run.wait_for_stops("stage1", 1)
    stop = run.stops("stage1")[0]
    assert stop["kind"] == "requeue"
    assert "SIGUSR2" in stop["reason"]
    assert 0 < stop["step"] < STEPS["stage1"]
    assert run.shows("stage1", f"{stop['step']} of {STEPS['stage1']}")
    assert run.shows("stage1", stop["reason"])
    say(f"stage1: {stop['reason']} at step {stop['step']}, before its limit of 60 s; queued again")
    run.pause(0)
    set_time_limit(run, "stage1")
    run.wait_for_end("stage1")
    assert run.show("stage1")["Restarts"] == "1"


def _requeue(run: Run, say: Callable[[str], None]) -> None:
    run.pause(PAUSE)
    run.wait_for_step("stage2", 3)
    seen = len(run.rows("stage2"))
    run.slurm.command("scontrol", "requeue", run.job("stage2"))
    run.wait(lambda: run.show("stage2")["JobState"] != "RUNNING", "stage2 to stop")
    run.pause(0)
    run.wait(lambda: run.show("stage2")["JobState"] == "RUNNING", "stage2 to start again")
    stop = run.stops("stage2")[0]
    say(f"stage2: scontrol requeue at step {seen}; {stop['reason']}, saved at step {stop['step']}")
    assert stop["kind"] == "left"
    assert seen <= stop["step"] < STEPS["stage2"]
    run.wait_for_end("stage2")


def _dead_node(run: Run, say: Callable[[str], None]) -> None:
    run.pause(PAUSE)
    run.wait_for_step("stage3", 3)
    node, orphans = run.show("stage3")["NodeList"], run.processes("stage3", 0)
    run.slurm.kill_node(node)
    seconds = run.wait(lambda: run.show("stage3")["Restarts"] == "1", "the node to be found dead")
    assert all(Path(f"/proc/{process}").exists() for process in orphans.values())
    run.wait(lambda: len(run.processes("stage3", 1)) == 2, "stage3 on the other node")
    other = run.show("stage3")["NodeList"]
    assert {node, other} == {"n1", "n2"}
    say(f"stage3: slurmd of {node} killed, queued again after {seconds:.0f} s, goes on on {other}")
    say(f"radio-distill slurm status:\n{run.command('status', run.folder)}")
    run.pause(0)
    run.wait_for_end("stage3")
    gone = run.wait(lambda: not run.slurm.processes(node), "the processes of the dead node to end")
    say(f"stage3: complete; what still ran on {node} ended by itself {gone:.0f} s later")
    assert run.show("stage3")["Restarts"] == "1"
    run.slurm.start_node(node)
    run.wait(lambda: "down" not in "".join(run.slurm.node_states()), "the node's return")


def test_job__rank_killed_and_preempted(slurm_cluster, recipe, calm, say):
    run = Run(slurm_cluster, recipe, "crashed")
    run.pause(PAUSE)
    run.submit("--time", 60, "--stages", "stage1")
    run.wait_for_step("stage1", 6)
    node = run.show("stage1")["NodeList"]
    os.kill(run.processes("stage1", 0)[1], signal.SIGKILL)
    run.wait_for_stops("stage1", 1)
    stop = run.stops("stage1")[0]
    assert stop["kind"] == "retry"
    assert stop["reason"].startswith(f"rank 1 on {node}: killed by SIGKILL")
    assert stop["excluded"] == [node]
    assert run.shows("stage1", f"keeps off {node}")
    run.wait(lambda: run.show("stage1")["JobState"] == "RUNNING", "the second start")
    other = run.show("stage1")["NodeList"]
    assert other != node
    say(f"{stop['reason']} at step {stop['step']}; tried again on {other}")

    run.wait_for_step("stage1", stop["step"] + 2)
    urgent = ("sbatch", "-p", "high", "-w", other, "--gpus-per-node=2", "--wrap", "sleep 1")
    slurm_cluster.command(*urgent, "-o", "/dev/null")
    run.wait_for_stops("stage1", 2)
    run.pause(0)
    stop = run.stops("stage1")[1]
    assert stop["kind"] == "left"
    say(f"preempted, {stop['reason']}, at step {stop['step']}")
    run.wait_for_end("stage1")
    assert_equal(run, calm, "stage1")
    say("complete, as undisturbed")


def test_job__users_error_then_resume_cancel_resume(slurm_cluster, recipe, calm, say):
    run = Run(slurm_cluster, recipe, "mended")
    shards = recipe.parent / "mended_shards"
    shutil.copytree(recipe.parent / "shards", shards)
    shard = min(shards.glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    run.submit("--time", 60, "--stages", "stage1", "stage2", f"--data.shards=[{shards}]")
    run.wait_for_stops("stage1", 1)
    stop = run.stops("stage1")[0]
    assert stop["kind"] == "failed"
    assert shard.name in stop["reason"]
    run.wait(lambda: run.show("stage2")["JobState"] == "CANCELLED", "stage2 to be given up")
    assert run.show("stage1")["Restarts"] == "0"
    assert run.shows("stage1", stop["reason"])
    say(f"damaged shard, not tried again: {stop['reason']}")

    shard.write_bytes(whole)
    run.pause(PAUSE)
    run.command("resume", run.folder)
    run.wait_for_step("stage1", 3)
    assert "cancelled: stage1" in run.command("cancel", run.folder)
    run.wait(lambda: run.show("stage1")["JobState"] == "CANCELLED", "stage1 to be cancelled")
    assert run.show("stage2")["JobState"] == "CANCELLED"
    say(f"mended, resumed, cancelled at step {len(run.rows('stage1'))}")

    run.pause(0)
    run.command("resume", run.folder)
    run.wait_for_end("stage1")
    run.wait(lambda: run.show("stage2")["JobState"] == "RUNNING", "the start of stage2")
    run.command("cancel", run.folder)
    assert_equal(run, calm, "stage1")
    say("resumed, and complete, as undisturbed")


def test_sweep__never_more_than_its_cap_at_once(slurm_cluster, recipe, say):
    run = Run(slurm_cluster, recipe, "sweep")
    rates = ["1e-4", "2e-4", "4e-4"]
    sweep = f"stages.stage1.learning_rate={','.join(rates)}"
    settings = ["--sweep", sweep, "--max-running", 2, "--stages.stage1.steps=2"]
    run.submit("--stages", "stage1", *settings, gpus=0)
    running = []

    def over() -> bool:
        jobs = slurm_cluster.command("squeue", "-h", "-r", "-n", "stage1", "-o", "%t").split()
        running.append(len([state for state in jobs if state != "PD"]))
        return not jobs

    seconds = run.wait(over, "the end of the sweep")
    assert max(running) == 2
    assert [stop["kind"] for stop in run.stops("stage1")] == ["done"] * len(rates)
    found = {path.name for path in recipe.parent.glob("runs/sweep-learning_rate-*")}
    assert found == {f"sweep-learning_rate-{rate}" for rate in rates}
    say(f"{len(rates)} tasks in {seconds:.0f} s, {max(running)} at once at most")
