"""A run that is killed again and again ends with the numbers of one that nobody disturbed."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import processes, runs
from radio_distill.train.checkpoint import newest

STEPS, SAVE_EVERY = 120, 4
PATIENCE = 60.0
"""Seconds for a resumed run to reach a step, or a write; far more than it takes."""

pytestmark = [pytest.mark.faults, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Any]:
    with processes.Launcher() as running:
        yield running


class Disturbed:
    """A run of two ranks that is started again and again, and looked at from outside."""

    def __init__(self, launcher: Any, recipe_file: Path, seed: int = 0, **fields: object):
        self.folder = runs.stage_folder(recipe_file, "disturbed")
        self.checkpoints = self.folder / "checkpoints"
        self.random = random.Random(seed)
        self.resumed_step = 0
        self._launcher = launcher
        self._outputs = recipe_file.parent / "outputs"
        self._arguments = runs.arguments(recipe_file, "disturbed", **fields)

    def start(self) -> None:
        self._started = time.time()
        arguments = [*self._arguments, "--resume"]
        self.ranks = self._launcher.start("stage1", arguments, outputs=self._outputs)

    def wait_for(self, what: Callable[[], bool], pause: float = 0.01) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, self.ranks.output()
            time.sleep(pause)

    def has_stepped(self) -> bool:
        """Whether a step was logged by this start, not left by an earlier one."""
        last = runs.last_row(self.folder)
        return last["time"] > self._started and last["step"] > self.resumed_step

    def writing(self) -> set[str]:
        """Folders of checkpoints that are not whole yet, or never became so."""
        if not self.checkpoints.is_dir():
            return set()
        return {name for name in os.listdir(self.checkpoints) if name.startswith(".step-")}


def kill_before_a_step(run: Disturbed, kills_left: int) -> None:
    del kills_left
    time.sleep(run.random.uniform(0, 2.5))
    run.ranks.send(signal.SIGKILL, [run.random.randrange(2)])


def kill_at_any_time(run: Disturbed, kills_left: int) -> None:
    """Kill one rank at some point of a step, so early that steps are left for the other kills."""
    steps_left = STEPS - run.resumed_step
    target = run.random.uniform(0, 1.5 * steps_left / (kills_left + 1))
    run.wait_for(run.has_stepped)
    run.wait_for(lambda: runs.last_row(run.folder)["step"] >= run.resumed_step + int(target))
    time.sleep(run.random.uniform(0, 0.1))
    run.ranks.send(signal.SIGKILL, [run.random.randrange(2)])


def kill_in_a_write(run: Disturbed, kills_left: int) -> None:
    """Kill rank 0, which writes, at the second or third checkpoint that it begins."""
    del kills_left
    left = run.writing()
    seen: set[str] = set()
    which = run.random.choice([2, 3])

    def has_begun() -> bool:
        seen.update(run.writing() - left)
        return len(seen) >= which

    run.wait_for(has_begun, pause=0.0005)
    time.sleep(run.random.choice([0, run.random.uniform(0, 0.02)]))
    run.ranks.send(signal.SIGKILL, [0])


MOMENTS = [kill_at_any_time] * 10 + [kill_in_a_write] * 6 + [kill_before_a_step] * 4


def test_kill__twenty_times_and_the_end_is_bit_for_bit_the_same(launcher, recipe_file):
    begun = time.monotonic()
    fields = {"stage__steps": STEPS, "log__keep_last": 3}
    runs.torchrun(*runs.arguments(recipe_file, "undisturbed", log__save_every=STEPS, **fields))
    undisturbed = runs.stage_folder(recipe_file, "undisturbed")
    expected = [runs.numbers(row) for row in runs.log(undisturbed)]
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))

    run = Disturbed(launcher, recipe_file, seed=11, log__save_every=SAVE_EVERY, **fields)
    moments = run.random.sample(MOMENTS, len(MOMENTS))
    in_writes, by_themselves, repeated = 0, 0, 0
    for number, kill in enumerate(moments):
        before = run.writing()
        run.start()
        kill(run, len(moments) - number)
        by_themselves += None not in run.ranks.wait(5)
        statuses = run.ranks.end(0)
        assert -signal.SIGKILL in statuses, run.ranks.output()
        assert not {0, 2} & set(statuses), f"{statuses}: it needs, and is worth, another start"
        in_writes += bool(run.writing() - before)
        assert len(run.writing()) <= 1, "what an earlier kill left was not cleared away"

        logged = [runs.numbers(row) for row in runs.log(run.folder)]
        assert logged == expected[: len(logged)]
        checkpoint = newest(run.checkpoints)
        step = checkpoint.step if checkpoint else 0
        assert run.resumed_step <= step <= len(logged), "a whole checkpoint was lost"
        repeated += len(logged) - step
        run.resumed_step = step

    run.start()
    assert run.ranks.wait() == [0, 0], run.ranks.output()
    runs.assert_same_end(undisturbed, run.folder, STEPS)
    assert not run.writing()
    assert in_writes, "no kill has hit the write of a checkpoint"
    print(
        f"\n{len(moments)} kills, {in_writes} of them in the write of a checkpoint; in "
        f"{by_themselves} the other rank ended by itself; {len(moments)} resumes, {repeated} "
        f"steps run again; every loss and every tensor of {STEPS} steps bit for bit; "
        f"{time.monotonic() - begun:.0f} s"
    )


def test_signal__the_run_saves_and_goes_on(launcher, recipe_file):
    """One rank hears of it, or all, as Slurm has it; four times in a row."""
    fields = {"stage__steps": 30, "log__save_every": 15}
    undisturbed = launcher.start(
        "stage1",
        runs.arguments(recipe_file, "undisturbed", **fields),
        outputs=recipe_file.parent / "undisturbed_outputs",
    )
    assert undisturbed.wait() == [0, 0], undisturbed.output()

    run = Disturbed(launcher, recipe_file, **fields)
    asked = [(signal.SIGTERM, [1]), (signal.SIGUSR2, [0, 1]), (signal.SIGTERM, [0])]
    asked.append((signal.SIGINT, [0, 1]))
    for number, ranks in asked:
        run.start()
        run.wait_for(run.has_stepped)
        run.ranks.send(number, ranks)
        assert run.ranks.wait(30) == [75, 75], run.ranks.output()
        for rank in range(2):
            assert "Traceback" not in run.ranks.output(rank)
            assert f"asked to stop by {number.name}" in run.ranks.output(rank)
        saved = newest(run.checkpoints)
        assert saved is not None
        assert saved.step == len(runs.log(run.folder)) < 30, "it saves the step that it ends with"
        status = runs.status(run.folder)
        assert (status["state"], status["step"]) == ("interrupted", saved.step)
        run.resumed_step = saved.step

    run.start()
    assert run.ranks.wait() == [0, 0], run.ranks.output()
    runs.assert_same_end(runs.stage_folder(recipe_file, "undisturbed"), run.folder, 30)
    status = runs.status(run.folder)
    assert (status["state"], status["step"]) == ("complete", 30)
