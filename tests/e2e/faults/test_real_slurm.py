"""Jobs on a real Slurm: whatever befalls them, they end with the numbers of an undisturbed chain.

Every job has one node and two ranks under ZeRO-2.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.slurm_run import STEPS, Run, write_recipe

PAUSE = 1.5
"""Seconds that a step takes while it is to be disturbed: stage 1 outlasts its time limit."""

pytestmark = [pytest.mark.faults, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("real_slurm"), images)


@pytest.fixture(scope="module")
def calm(slurm_cluster: Any, recipe: Path) -> Any:
    """The chain that nobody disturbs; it may still run."""
    run = Run(slurm_cluster, recipe, "calm")
    run.submit("--time", 60, "--no-export", "--no-eval")
    return run


@pytest.fixture
def say() -> Callable[[str], None]:
    """Print a line that pytest does not capture, with the seconds since the test began."""
    start = time.monotonic()

    def printer(text: str) -> None:
        print(f"  {time.monotonic() - start:4.0f} s  {text}")

    return printer


def assert_equal(run: Any, calm: Any, stage: str) -> None:
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


def set_time_limit(run: Any, stage: str, minutes: int = 60) -> None:
    run.slurm.command("scontrol", "update", f"JobId={run.job(stage)}", f"TimeLimit={minutes}")


def _time_limit(run: Any, say: Callable[[str], None]) -> None:
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


def _requeue(run: Any, say: Callable[[str], None]) -> None:
    run.pause(PAUSE)
    run.wait_for_step("stage2", 3)
    seen = len(run.rows("stage2"))
    run.slurm.command("scontrol", "requeue", run.job("stage2"))
    run.wait(lambda: run.show("stage2")["JobState"] != "RUNNING", "stage2 to stop")
    run.pause(0)
    run.wait_for_stops("stage2", 1)
    stop = run.stops("stage2")[0]
    say(f"stage2: scontrol requeue at step {seen}; {stop['reason']}, saved at step {stop['step']}")
    assert stop["kind"] == "left"
    assert seen <= stop["step"] < STEPS["stage2"]
    run.wait_for_end("stage2")


def _dead_node(run: Any, say: Callable[[str], None]) -> None:
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
        running.append(jobs.count("R"))
        return not jobs

    seconds = run.wait(over, "the end of the sweep")
    assert max(running) == 2
    assert [stop["kind"] for stop in run.stops("stage1")] == ["done"] * len(rates)
    found = {path.name for path in recipe.parent.glob("runs/sweep-learning_rate-*")}
    assert found == {f"sweep-learning_rate-{rate}" for rate in rates}
    say(f"{len(rates)} tasks in {seconds:.0f} s, {max(running)} at once at most")
