"""What a run does with numbers that are not finite, with signals, and with a second owner."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from e2e import CHECKOUT, assert_equal, rows, run_folder, tensors
from radio_distill.distill.targets import TargetMaker
from radio_distill.distill.task import Distillation
from radio_distill.train.run_dir import RunLock, read_status
from stages import stage1, stage2

FAULTY = Path(__file__).with_name("faulty_stage1.py")


def folder_of(recipe_file: Path) -> Path:
    return run_folder(recipe_file) / "stage1"


@pytest.fixture
def faults(monkeypatch):
    """Run ``action`` when stage 1 asks for the targets of a step, counted from 1."""

    def install(action):
        make, calls = TargetMaker.__call__, []

        def faulty(self, *arguments):
            calls.append(1)
            targets = make(self, *arguments)
            action(len(calls), targets)
            return targets

        monkeypatch.setattr(TargetMaker, "__call__", faulty)

    return install


def spoil(steps):
    def action(step, targets):
        if step in steps:
            targets["vit"].spatial[1, 0, 0, 0] = float("nan")

    return action


def test_skip__a_step_leaves_weights_moments_and_average_alone(recipe_file, faults):
    faults(spoil({3}))
    every = ["--log.save_every", "1", "--stage.steps", "3", "--stage.freeze_body_steps", "0"]
    assert stage1.main([str(recipe_file), *every]) == 0
    folder = folder_of(recipe_file)
    for part in ("student", "optimizer", "ema"):
        assert_equal(tensors(folder, 2, part), tensors(folder, 3, part))
    assert [row["skipped_steps"] for row in rows(folder)] == [0, 0, 1]
    assert not any(name.startswith("loss/") for name in rows(folder)[2])
    (line,) = (folder / "skipped.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["step"] == 3
    assert found["found"][0]["cause"] == "teacher vit"
    assert len(found["found"][0]["keys"]) == 1
    status = read_status(folder)
    assert (status.state, status.step, status.steps) == ("complete", 3, 3)


def test_skip__too_many_in_a_row_end_the_run(recipe_file, faults, capsys):
    faults(spoil({3, 4, 5, 6}))
    fields = ["--log.save_every", "1", "--watch.max_skipped", "2"]
    assert stage1.main([str(recipe_file), *fields]) == 2
    error = capsys.readouterr().err
    assert "teacher vit for " in error
    assert "step-00000002" in error, "the last good checkpoint"
    assert "Traceback" not in error
    folder = folder_of(recipe_file)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    status = read_status(folder)
    assert status.state == "failed"
    assert "3rd in a row" in status.reason


@pytest.fixture
def ask(faults):
    """Send this process a signal, once, in the third step."""

    def install(number):
        asked = []

        def kill(step, targets):
            if step == 3 and not asked:
                asked.append(True)
                os.kill(os.getpid(), number)

        faults(kill)

    return install


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_signal__saves_at_the_end_of_the_step(recipe_file, ask, capsys, number):
    folder = folder_of(recipe_file)
    ask(number)
    before = signal.getsignal(number)
    assert stage1.main([str(recipe_file)]) == 75
    assert signal.getsignal(number) is before
    error = capsys.readouterr().err
    assert f"asked to stop by {number.name} after step 3 of 6; saved" in error
    assert "--resume goes on" in error
    assert read_status(folder).state == "interrupted"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_signal__its_checkpoint_resumes_bit_for_bit(recipe_file, ask):
    folder = folder_of(recipe_file)
    assert stage1.main([str(recipe_file)]) == 0
    expected = {part: tensors(folder, 6, part) for part in ("student", "optimizer", "ema")}
    losses = rows(folder)
    ask(signal.SIGUSR2)
    assert stage1.main([str(recipe_file)]) == 75
    assert stage1.main([str(recipe_file), "--resume"]) == 0
    for part, values in expected.items():
        assert_equal(values, tensors(folder, 6, part))
    without_time = [
        {name: value for name, value in row.items() if name.startswith(("loss/", "gradient"))}
        for row in losses
    ]
    assert without_time == [
        {name: row[name] for name in row if name.startswith(("loss/", "gradient"))}
        for row in rows(folder)
    ]
    assert read_status(folder).state == "complete"


def test_taken_over__the_earlier_process_stops_and_writes_no_more(recipe_file, faults, capsys):
    folder = folder_of(recipe_file)

    def take_over(step, targets):
        if step == 3:
            RunLock(folder)

    faults(take_over)
    assert stage1.main([str(recipe_file)]) == 76
    error = capsys.readouterr().err
    assert "process" in error
    assert "Traceback" not in error
    # Whether the checkpoint of step 2 was whole by then is a matter of the thread that writes it.
    assert {path.name for path in (folder / "checkpoints").iterdir()} <= {"step-00000002"}
    assert read_status(folder).state == "running", "the status is the new owner's to write"


def test_draws__do_not_depend_on_what_was_drawn_before(recipe_file, faults):
    """No generator's state is in a checkpoint, for each step begins them anew."""
    import random

    import numpy as np

    folder = folder_of(recipe_file)
    drawn: list[list[float]] = []

    def draw(step, targets):
        drawn[-1] += [random.random(), float(np.random.rand()), float(torch.rand(()))]

    faults(draw)
    for spoiled in (False, True):
        drawn.append([])
        if spoiled:
            random.random(), np.random.rand(3), torch.rand(5)
        assert stage1.main([str(recipe_file), "--student.drop_path", "0.5"]) == 0
        if not spoiled:
            expected = tensors(folder, 6, "student")
    assert_equal(expected, tensors(folder, 6, "student"))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == len(drawn[0])


def test_run_folder__is_private(two_steps):
    for path in (two_steps, two_steps / "stage1"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_resume__what_changes_only_rounding_is_told_and_allowed(recipe_file, capsys, caplog):
    caplog.set_level("INFO")
    arguments = [str(recipe_file)]
    assert stage1.main(arguments) == 0
    folder = folder_of(recipe_file)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    changed = ["--engine.micro_batch", "4", "--engine.zero_stage", "2", "--watch.max_skipped", "3"]
    assert stage1.main([*arguments, "--resume", *changed]) == 0
    assert "engine.micro_batch" in caplog.text
    assert "engine.zero_stage" in caplog.text
    assert "watch." not in caplog.text
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    for field in ("--stage.partitions.low.batch_size", "--stage.steps"):
        assert stage1.main([*arguments, "--resume", field, "7"]) == 2
        error = capsys.readouterr().err
        assert f"stages.stage1.{field.removeprefix('--stage.')}" in error.replace(".0.", ".low.")


def test_saving__is_not_waited_for(recipe_file, monkeypatch):
    """A disk that takes its time: the steps go on, the checkpoints are whole, in order."""
    from radio_distill.train import trainer

    save, running, overlapped = trainer.save, threading.Event(), []

    def slow(*arguments, **settings):
        running.set()
        try:
            threading.Event().wait(0.5)
            return save(*arguments, **settings)
        finally:
            running.clear()

    monkeypatch.setattr(trainer, "save", slow)
    forward_backward = Distillation.forward_backward

    def watched(*arguments):
        overlapped.append(running.is_set())
        return forward_backward(*arguments)

    monkeypatch.setattr(Distillation, "forward_backward", watched)
    assert stage1.main([str(recipe_file)]) == 0
    assert any(overlapped), "a step ran while a checkpoint was written"
    folder = folder_of(recipe_file)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]


def test_unseen_teacher__of_a_first_stage_is_learned_by_the_next(recipe_file, capsys):
    """As AM-RADIO's recipe: the first stage shows no SAM."""
    recipe = [str(recipe_file), "--stage.freeze_body_steps", "0"]
    only = ["--stages.stage1.partitions.low.teachers", "[vit, cnn]"]
    assert stage1.main([*recipe, *only, "--stage.steps", "2"]) == 0
    assert stage2.main([*recipe, *only, "--stage.steps", "2", "--stage.optimizer", "adamw"]) == 0
    folder = folder_of(recipe_file)
    before, after = (
        tensors(folder.with_name(name), 2, "statistics") for name in ("stage1", "stage2")
    )
    assert torch.count_nonzero(before["sam/mean"]) == 0
    assert torch.count_nonzero(after["sam/mean"]) > 0
    # A stage that leaves a teacher out keeps its head, in the space that it had.
    seen = ["--stages.stage2.partitions", "[{name: a, size: 64, teachers: [vit], batch_size: 2}]"]
    more = ["--stage.steps", "1", "--stage.optimizer", "adamw", "--stage.weight_decay", "0"]
    assert stage2.main([*recipe, *only, *seen, *more]) == 0
    kept = tensors(folder.with_name("stage2"), 1, "statistics")
    for name in ("sam/mean", "cnn/mean"):
        assert torch.equal(kept[name], before[name])
    started = tensors(folder, 2, "ema")
    ended = tensors(folder.with_name("stage2"), 1, "student")
    name = "adaptors.cnn.spatial.final.2.weight"
    torch.testing.assert_close(ended[name], started[name])


@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_skip__on_one_of_two_processes_is_a_skip_on_both(recipe_file, zero_stage):
    """After it, one process and two have the same gradient of the next step."""
    fields = [str(recipe_file), "--stage.steps", "2", "--log.save_every", "1"]
    fields += ["--stage.freeze_body_steps", "0", "--stage.ema_decay", "0"]
    folder = folder_of(recipe_file)
    results = []
    for launcher, rank, more in (
        ([], "0", []),
        (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
            "1",
            ["--engine.zero_stage", str(zero_stage)],
        ),
    ):
        done = subprocess.run(
            [sys.executable, *launcher, str(FAULTY), rank, "1", *fields, *more],
            cwd=CHECKOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "step 1 is skipped: teacher vit for" in done.stderr
        assert not (folder / "checkpoints" / "step-00000001").exists()
        results.append(tensors(folder, 2, "optimizer"))
    one, two = results
    assert int(one["step"]) == int(two["step"]) == 1
    for name in (name for name in one if name.startswith("exp_avg/")):
        scale = max(float(one[name].abs().max()), 1e-3)
        assert float((one[name] - two[name]).abs().max()) <= 1e-5 * scale, name
