"""All processes of a job meet at one place, and each launcher is told the same."""

import sys
from types import SimpleNamespace

import pytest

from slurm.launchers import launch_command, meeting_point, process_environment


@pytest.fixture
def environment() -> SimpleNamespace:
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
        ("srun", "-m slurm.worker F a:main x"),
        (
            "torchrun",
            "-m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 8 "
            "--master-addr h --master-port 7 -m slurm.worker F a:main x",
        ),
        (
            "accelerate",
            "-m accelerate.commands.launch --num_machines 2 --machine_rank 1 --num_processes 16 "
            "--main_process_ip h --main_process_port 7 --mixed_precision no --dynamo_backend no "
            "--multi_gpu --module slurm.worker F a:main x",
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
    assert (parsed.node_rank, parsed.master_port, parsed.training_script) == (1, 7, "slurm.worker")
    assert parsed.training_script_args == ["F", "a:main"]


def test_launch_command__accelerate_knows_these_flags(environment):
    from accelerate.commands.launch import launch_command_parser

    command = launch_command("accelerate", environment, 8, ("h", 7), ["F", "a:main"])
    parsed = launch_command_parser().parse_args(command[4:])
    assert (parsed.machine_rank, parsed.main_process_port) == (1, 7)
    assert (parsed.training_script, parsed.training_script_args) == (
        "slurm.worker",
        ["F", "a:main"],
    )
