"""A process notes how it ended, whatever its target does, and lets the others finish."""

import os
import signal
import subprocess
import sys

import pytest

from slurm import outcomes
from slurm.outcomes import Place
from slurm.worker import main


@pytest.fixture(autouse=True)
def _rank(monkeypatch, slurm_task, recorded):
    slurm_task()
    monkeypatch.setenv("RANK", "3")


def outcome(folder) -> outcomes.Outcome:
    (found,) = outcomes.read(folder, Place(job="41"))
    return found


@pytest.mark.parametrize(
    ("target", "status", "exit_status", "reason"),
    [
        ("main", 0, 0, ""),
        ("failing", 3, 3, ""),
        ("raising", 1, 1, "ValueError: not so"),
        ("leaving", 4, 4, ""),
    ],
)
def test_main__notes_how_the_target_ended(tmp_path, target, status, exit_status, reason):
    assert main([str(tmp_path), f"recording_stage:{target}", str(tmp_path)]) == exit_status
    found = outcome(tmp_path)
    assert (found.rank, found.status, found.host) == (3, status, "n1")
    assert found.reason == reason
    assert found.log == f"{tmp_path}/41_0_log.err"


def test_main__a_signal_is_noted_and_ends_it_quietly(tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    assert main([str(tmp_path), "recording_stage:interrupted", str(tmp_path)]) == 0
    assert outcome(tmp_path).status == 75
    assert outcome(tmp_path).signal == signal.SIGUSR2
    assert signal.getsignal(signal.SIGUSR2) == before


def test_main__a_target_that_does_not_exist_is_an_end_with_a_reason(tmp_path):
    assert main([str(tmp_path), "no_such_module:main"]) == 1
    assert "No module named 'no_such_module'" in outcome(tmp_path).reason


def test_main__a_killed_process_leaves_its_start(tmp_path):
    command = [sys.executable, "-m", "slurm.worker", str(tmp_path), "recording_stage:killed"]
    assert subprocess.call(command, env=dict(os.environ)) == -signal.SIGKILL
    assert outcome(tmp_path).status is None
