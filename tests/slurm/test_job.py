"""A job finds its place among the processes, fails aloud, and comes back with ``--resume``."""

import pickle
import signal
import subprocess
import sys

import pytest
import submitit

from radio_distill.errors import RadioDistillError
from slurm import history, outcomes
from slurm.job import Job, note_lost_start
from slurm.outcomes import Place


@pytest.fixture
def _signals():
    """A task on Slurm ignores signals from then on; a test must not."""
    numbers = (signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_job__runs_in_every_process_with_its_rank(tmp_path, recorded):
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=1, tasks_per_node=2)
    job = executor.submit(Job(target="recording_stage:main", arguments=(str(tmp_path), "x")))
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
    arguments = (str(tmp_path), "x")
    executor.submit(Job(target="recording_stage:slow_start", arguments=arguments)).result()
    assert [call["arguments"] for call in recorded()] == [["x"], ["x", "--resume"]]


def test_job__status_other_than_zero_fails_the_job(tmp_path, recorded, monkeypatch):
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    with pytest.raises(RadioDistillError, match="recording_stage:failing ended with status 3"):
        Job(target="recording_stage:failing", arguments=(str(tmp_path),))()


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("restarts", "expected"), [("0", []), ("1", ["--resume"])])
def test_job__resumes_when_slurm_restarted_it(tmp_path, recorded, slurm_task, restarts, expected):
    slurm_task(SLURM_RESTART_COUNT=restarts)
    Job(target="recording_stage:main", arguments=(str(tmp_path),), folder=str(tmp_path))()
    assert recorded()[0]["arguments"] == expected
    (outcome,) = outcomes.read(tmp_path, Place(job="41", restart=int(restarts)))
    assert outcome.status == 0


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    ("restarts", "arguments", "fresh"),
    [("0", [], None), ("1", [], "1"), ("1", ["--resume"], None)],
)
def test_job__a_restarted_one_knows_whether_it_was_to_start_anew(
    tmp_path, recorded, slurm_task, restarts, arguments, fresh
):
    slurm_task(SLURM_RESTART_COUNT=restarts)
    arguments = (str(tmp_path), *arguments)
    Job(target="recording_stage:main", arguments=arguments, folder=str(tmp_path))()
    assert recorded()[0]["RADIO_DISTILL_FRESH"] == fresh


@pytest.mark.usefixtures("_signals")
def test_job__processes_on_slurm_know_their_place(tmp_path, recorded, slurm_task):
    slurm_task(SLURM_NTASKS="4", SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_JOB_ID="4711")
    Job(
        target="recording_stage:main",
        arguments=(str(tmp_path),),
        folder=str(tmp_path),
        master_address="here",
    )()
    (call,) = recorded()
    assert (call["RANK"], call["WORLD_SIZE"], call["LOCAL_RANK"]) == ("3", "4", "1")
    assert (call["MASTER_ADDR"], call["MASTER_PORT"]) == ("here", "14711")


@pytest.mark.usefixtures("_signals")
def test_job__outlives_a_killed_process_and_notes_it(tmp_path, recorded, slurm_task):
    slurm_task()
    with pytest.raises(SystemExit) as caught:
        Job(target="recording_stage:killed", folder=str(tmp_path))()
    assert caught.value.code == 128 + signal.SIGKILL
    (outcome,) = outcomes.read(tmp_path, Place(job="41"))
    assert outcome.status == -signal.SIGKILL


@pytest.mark.usefixtures("_signals")
def test_job__keeps_what_a_process_said_itself(tmp_path, recorded, slurm_task):
    slurm_task()
    with pytest.raises(SystemExit):
        Job(target="recording_stage:raising", folder=str(tmp_path))()
    (outcome,) = outcomes.read(tmp_path, Place(job="41"))
    assert (outcome.status, outcome.reason) == (1, "ValueError: not so")


def test_note_lost_start__once_and_only_where_nothing_is_known(tmp_path):
    place = Place(job="41", restart=2, host="n1")
    known = history.Stop(name="stage1", job="41", restart=0, kind="retry", reason="known")
    history.append(tmp_path, known)
    for _ in range(2):
        note_lost_start(tmp_path, "stage1", place)
    first, second = history.read(tmp_path)
    assert first == known
    assert (second.restart, second.kind) == (1, "left")
    assert "its node was lost" in second.reason


def test_checkpoint__adds_resume_once():
    first = Job(target="a:main", arguments=("r.yaml",)).checkpoint()
    second = first.function.checkpoint()
    assert first.function.arguments == ("r.yaml", "--resume")
    assert second.function == first.function
    assert not first.args
    assert not first.kwargs


def test_resumed__leaves_a_target_alone_that_does_not_take_it():
    job = Job(target="stages.cli:main", arguments=("export", "runs/a"), resumes=False)
    assert job.resumed() == job


def test_job__pickle_holds_names_only():
    job = Job(target="stages.stage1:main", arguments=("r.yaml",))
    assert pickle.loads(pickle.dumps(job)) == job
    code = (
        "import slurm.job, slurm.launch, slurm.aftermath, slurm.worker, sys; "
        "print(sorted({'torch', 'stages'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
