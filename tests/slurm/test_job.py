"""A job finds its place among the processes, notes their end, and comes back with ``--resume``."""

import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import submitit

from radio_distill.errors import RadioDistillError
from slurm.job import Call, launch_command, main, meeting_point, process_environment
from slurm.requeue import (
    Start,
    Stop,
    append_stop,
    note_lost_start,
    read_outcomes,
    read_stops,
)


@pytest.fixture
def _signals():
    """A task on Slurm ignores signals from then on; a test must not."""
    numbers = (signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_call__runs_in_every_process_with_its_rank(tmp_path, recorded):
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=1, tasks_per_node=2)
    job = executor.submit(Call(target="recording_stage:main", arguments=(str(tmp_path), "x")))
    job.results()
    calls = sorted(recorded(), key=lambda call: call["RANK"])
    assert [call["RANK"] for call in calls] == ["0", "1"]
    assert [call["LOCAL_RANK"] for call in calls] == ["0", "1"]
    assert {call["WORLD_SIZE"] for call in calls} == {"2"}
    assert {call["MASTER_ADDR"] for call in calls} == {"127.0.0.1"}
    assert len({call["MASTER_PORT"] for call in calls}) == 1
    assert all(call["arguments"] == ["x"] for call in calls)


def test_call__comes_back_with_resume_after_the_time_limit(tmp_path, recorded):
    executor = submitit.LocalExecutor(tmp_path / "jobs", max_num_timeout=1)
    executor.update_parameters(timeout_min=10 / 60, signal_delay_s=2)
    arguments = (str(tmp_path), "x")
    executor.submit(Call(target="recording_stage:slow_start", arguments=arguments)).result()
    assert [call["arguments"] for call in recorded()] == [["x"], ["x", "--resume"]]


def test_call__status_other_than_zero_fails_the_job(tmp_path, recorded, monkeypatch):
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    with pytest.raises(RadioDistillError, match=r"recording_stage:failing.* 3"):
        Call(target="recording_stage:failing", arguments=(str(tmp_path),))()


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("restarts", "expected"), [("0", []), ("1", ["--resume"])])
def test_call__resumes_when_slurm_restarted_it(tmp_path, recorded, slurm_task, restarts, expected):
    slurm_task(SLURM_RESTART_COUNT=restarts)
    Call(target="recording_stage:main", arguments=(str(tmp_path),), folder=str(tmp_path))()
    assert recorded()[0]["arguments"] == expected
    (outcome,) = read_outcomes(tmp_path, Start(job="41", restart=int(restarts)))
    assert outcome.status == 0


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    ("restarts", "arguments", "fresh"),
    [("0", [], None), ("1", [], "1"), ("1", ["--resume"], None)],
)
def test_call__a_restarted_one_knows_whether_it_was_to_start_anew(
    tmp_path, recorded, slurm_task, restarts, arguments, fresh
):
    slurm_task(SLURM_RESTART_COUNT=restarts)
    arguments = (str(tmp_path), *arguments)
    Call(target="recording_stage:main", arguments=arguments, folder=str(tmp_path))()
    assert recorded()[0]["RADIO_DISTILL_FRESH"] == fresh


@pytest.mark.usefixtures("_signals")
def test_call__processes_on_slurm_know_their_place(tmp_path, recorded, slurm_task):
    slurm_task(SLURM_NTASKS="4", SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_JOB_ID="4711")
    Call(
        target="recording_stage:main",
        arguments=(str(tmp_path),),
        folder=str(tmp_path),
        master_address="here",
    )()
    (call,) = recorded()
    assert (call["RANK"], call["WORLD_SIZE"], call["LOCAL_RANK"]) == ("3", "4", "1")
    assert (call["MASTER_ADDR"], call["MASTER_PORT"]) == ("here", "14711")


@pytest.mark.usefixtures("_signals")
def test_call__outlives_a_killed_process_and_notes_it(tmp_path, recorded, slurm_task):
    slurm_task()
    with pytest.raises(SystemExit) as caught:
        Call(target="recording_stage:killed", folder=str(tmp_path))()
    assert caught.value.code == 128 + signal.SIGKILL
    (outcome,) = read_outcomes(tmp_path, Start(job="41"))
    assert outcome.status == -signal.SIGKILL


@pytest.mark.usefixtures("_signals")
def test_call__keeps_what_a_process_said_itself(tmp_path, recorded, slurm_task):
    slurm_task()
    with pytest.raises(SystemExit):
        Call(target="recording_stage:raising", folder=str(tmp_path))()
    (outcome,) = read_outcomes(tmp_path, Start(job="41"))
    assert (outcome.status, outcome.reason) == (1, "ValueError: not so")


def test_note_lost_start__once_and_only_where_nothing_is_known(tmp_path):
    place = Start(job="41", restart=2, host="n1")
    known = Stop(name="stage1", job="41", restart=0, kind="retry", reason="known")
    append_stop(tmp_path, known)
    for _ in range(2):
        note_lost_start(tmp_path, "stage1", place)
    first, second = read_stops(tmp_path)
    assert first == known
    assert (second.restart, second.kind) == (1, "left")
    assert "its node was lost" in second.reason


def test_checkpoint__adds_resume_once():
    first = Call(target="a:main", arguments=("r.yaml",)).checkpoint()
    second = first.function.checkpoint()
    assert first.function.arguments == ("r.yaml", "--resume")
    assert second.function == first.function
    assert not first.args
    assert not first.kwargs


def test_resumed__leaves_a_target_alone_that_does_not_take_it():
    job = Call(target="stages.cli:main", arguments=("export", "runs/a"), resumes=False)
    assert job.resumed() == job


def test_call__pickle_holds_names_only():
    job = Call(target="stages.stage1:main", arguments=("r.yaml",))
    assert pickle.loads(pickle.dumps(job)) == job
    code = (
        "import slurm.job, slurm.submit, slurm.status, slurm.requeue, sys; "
        "print(sorted({'torch', 'stages'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.fixture
def _rank(monkeypatch, slurm_task, recorded):
    slurm_task()
    monkeypatch.setenv("RANK", "3")


def outcome(folder):
    (found,) = read_outcomes(folder, Start(job="41"))
    return found


@pytest.mark.usefixtures("_rank")
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


@pytest.mark.usefixtures("_rank")
def test_main__a_signal_is_noted_and_ends_it_quietly(tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    assert main([str(tmp_path), "recording_stage:interrupted", str(tmp_path)]) == 0
    assert outcome(tmp_path).status == 75
    assert outcome(tmp_path).signal == signal.SIGUSR2
    assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.usefixtures("_rank")
def test_main__a_target_that_does_not_exist_is_an_end_with_a_reason(tmp_path):
    assert main([str(tmp_path), "no_such_module:main"]) == 1
    assert "No module named 'no_such_module'" in outcome(tmp_path).reason


@pytest.mark.usefixtures("_rank")
def test_main__a_killed_process_leaves_its_start(tmp_path):
    command = [sys.executable, "-m", "slurm.job", str(tmp_path), "recording_stage:killed"]
    assert subprocess.call(command, env=dict(os.environ)) == -signal.SIGKILL
    assert outcome(tmp_path).status is None


@pytest.fixture
def environment():
    return SimpleNamespace(
        num_nodes=2,
        node=1,
        num_tasks=16,
        global_rank=9,
        local_rank=1,
        job_id="4711",
        hostnames=["localhost", "n2"],
    )


def test_process_environment__several_nodes_meet_at_the_first(environment):
    assert process_environment(environment) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "14711",
    }


def test_meeting_point__the_user_may_choose_it(environment):
    assert meeting_point(environment, "10.0.0.1", 29500) == ("10.0.0.1", 29500)


def test_meeting_point__a_name_that_does_not_resolve(environment, monkeypatch):
    environment.hostnames = ["no-such-node.invalid", "n2"]
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.9")
    assert meeting_point(environment, "", 0)[0] == "127.0.0.9"


def test_meeting_point__one_node_needs_no_network(environment):
    environment.num_nodes = 1
    assert meeting_point(environment, "", 0)[0] == "127.0.0.1"


def test_meeting_point__differs_between_jobs_and_restarts(environment, monkeypatch):
    ports = {meeting_point(environment, "", 0)[1]}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ports.add(meeting_point(environment, "", 0)[1])
    environment.job_id = "4712_3"
    ports.add(meeting_point(environment, "", 0)[1])
    assert len(ports) == 3
    assert all(10_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("srun", "-m slurm.job F a:main x"),
        (
            "torchrun",
            "-m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 8 "
            "--master-addr h --master-port 7 -m slurm.job F a:main x",
        ),
        (
            "accelerate",
            "-m accelerate.commands.launch --num_machines 2 --machine_rank 1 --num_processes 16 "
            "--main_process_ip h --main_process_port 7 --mixed_precision no --dynamo_backend no "
            "--multi_gpu --module slurm.job F a:main x",
        ),
    ],
)
def test_launch_command(environment, launcher, expected):
    command = launch_command(launcher, environment, 8, ("h", 7), ["F", "a:main", "x"])
    assert command[:2] == [sys.executable, "-u"]
    assert " ".join(command[2:]) == expected


def test_launch_command__torchrun_knows_these_flags(environment):
    from torch.distributed.run import parse_args

    command = launch_command("torchrun", environment, 8, ("h", 7), ["F", "a:main"])
    parsed = parse_args(command[4:])
    assert (parsed.node_rank, parsed.master_port, parsed.training_script) == (1, 7, "slurm.job")
    assert parsed.training_script_args == ["F", "a:main"]


def test_launch_command__accelerate_knows_these_flags(environment):
    from accelerate.commands.launch import launch_command_parser

    command = launch_command("accelerate", environment, 8, ("h", 7), ["F", "a:main"])
    parsed = launch_command_parser().parse_args(command[4:])
    assert (parsed.machine_rank, parsed.main_process_port) == (1, 7)
    assert (parsed.training_script, parsed.training_script_args) == (
        "slurm.job",
        ["F", "a:main"],
    )
