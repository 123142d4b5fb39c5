"""A job finds its place among the processes, fails aloud, and comes back with ``--resume``."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import submitit

from radio_distill.errors import RadioDistillError
from slurm.job import Job, process_environment


def test_job__runs_in_every_process_with_its_rank(tmp_path, recorded):
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=1, tasks_per_node=2)
    job = executor.submit(Job("recording_stage:main", (str(tmp_path), "x")))
    job.results()
    calls = sorted(recorded(), key=lambda call: call["RANK"])
    assert [call["RANK"] for call in calls] == ["0", "1"]
    assert [call["LOCAL_RANK"] for call in calls] == ["0", "1"]
    assert {call["WORLD_SIZE"] for call in calls} == {"2"}
    assert {call["MASTER_ADDR"] for call in calls} == {"127.0.0.1"}
    assert len({call["MASTER_PORT"] for call in calls}) == 1
    assert all(call["arguments"] == ["x"] for call in calls)


def test_job__comes_back_with_resume_after_the_time_limit(tmp_path, recorded):
    executor = submitit.LocalExecutor(tmp_path / "jobs", max_num_timeout=1)
    executor.update_parameters(timeout_min=4 / 60, signal_delay_s=2)
    executor.submit(Job("recording_stage:slow_start", (str(tmp_path), "x"))).result()
    assert [call["arguments"] for call in recorded()] == [["x"], ["x", "--resume"]]


def test_job__status_other_than_zero_fails_the_job(tmp_path, recorded, monkeypatch):
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    with pytest.raises(RadioDistillError, match="recording_stage:failing ended with status 3"):
        Job("recording_stage:failing", (str(tmp_path),))()


@pytest.mark.parametrize(("restarts", "expected"), [("0", []), ("1", ["--resume"])])
def test_job__resumes_when_slurm_restarted_it(tmp_path, recorded, monkeypatch, restarts, expected):
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    Job("recording_stage:main", (str(tmp_path),))()
    assert recorded()[0]["arguments"] == expected


def test_checkpoint__adds_resume_once():
    first = Job("a:main", ("--recipe", "r.yaml")).checkpoint()
    second = first.function.checkpoint()
    assert first.function.arguments == ("--recipe", "r.yaml", "--resume")
    assert second.function == first.function
    assert not first.args
    assert not first.kwargs


def test_job__pickle_holds_names_only():
    job = Job("stages.stage1:main", ("--recipe", "r.yaml"))
    assert pickle.loads(pickle.dumps(job)) == job
    code = (
        "import slurm.job, slurm.launch, sys; print(sorted({'torch', 'stages'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_process_environment__several_nodes_meet_at_the_first():
    environment = SimpleNamespace(
        num_nodes=2,
        num_tasks=16,
        global_rank=9,
        local_rank=1,
        job_id="4711",
        hostnames=["n1", "n2"],
    )
    assert process_environment(environment) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "14711",
    }
