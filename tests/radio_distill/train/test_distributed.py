"""Rank, world size and device from each launcher's environment; processes that wait for others."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch

from radio_distill.errors import ConfigError
from radio_distill.system import rendezvous
from radio_distill.system.distributed import World, choose_device, gpu_index, join, world_from
from radio_distill.system.rendezvous import meet


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1"},
            World(3, 8, 1),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"},
            World(5, 6, 2),
        ),
        # Batch scripts often export what torch wants, and leave the rank to srun.
        (
            {
                "WORLD_SIZE": "6",
                "MASTER_ADDR": "node1",
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "2",
            },
            World(5, 6, 2),
        ),
        # In a batch script, outside srun, Slurm sets the job's variables but starts one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World()),
    ],
)
def test_world_from__launchers(environment, expected):
    assert world_from(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "4", "WORLD_SIZE": "2"}, "RANK=4 .*WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 .*WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .*RANK"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE=2 .*RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 .*MASTER_ADDR"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two"),
    ],
)
def test_world_from__contradictions_and_what_is_left_over(environment, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        world_from(environment)
    assert "unset " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (3, 1, 0)])
def test_gpu_index__own_number_or_the_only_one(local_rank, visible, index):
    assert gpu_index(World(9, 16, local_rank), visible) == index


def test_gpu_index__more_processes_than_gpus():
    with pytest.raises(ConfigError, match=r"process 9.*GPU 2 of 2"):
        gpu_index(World(9, 16, 2), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_choose_device__without_gpu():
    assert choose_device("auto", World()).type == "cpu"
    with pytest.raises(ConfigError, match="GPU"):
        choose_device("cuda", World())


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def place(monkeypatch, unused_port):
    """A place where no process waits for another."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(unused_port))
    for name in ("SLURM_STEP_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return f"127.0.0.1:{unused_port}"


@pytest.mark.parametrize("port", ["one", "0", "70000"])
def test_join__a_port_that_is_none_is_one_line(place, monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match=rf"^MASTER_PORT={port} is no"):
        join(World(1, 2), torch.device("cpu"))


def test_meet__processes_share_a_store(place):
    stores = {}

    def come(rank: int) -> None:
        stores[rank] = meet(rank, 3, timedelta(seconds=20))

    threads = [Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in reversed(threads):  # rank 0, which keeps the store, comes last
        thread.start()
    for thread in threads:
        thread.join()
    stores[2].set("word", "found")
    assert stores[1].get("word") == b"found"


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_meet__nobody_comes(place, monkeypatch, caplog, rank, missing):
    monkeypatch.setattr(rendezvous, "ANNOUNCED", 0.0)
    monkeypatch.setattr(rendezvous, "HERE", 0.3)
    with pytest.raises(ConfigError) as caught:
        meet(rank, 2, timedelta(seconds=20))
    message = str(caught.value)
    assert message.startswith(f"process {missing} of 2 did not come to {place}")
    assert f"RANK={rank} WORLD_SIZE=2" in message
    (announced,) = caplog.messages
    assert announced.startswith(f"waiting at {place} for process {missing} of 2")


def test_meet__port_of_another_program(place, unused_port):
    with socket.create_server(("127.0.0.1", unused_port)), pytest.raises(ConfigError) as caught:
        meet(0, 2, timedelta(seconds=20))
    assert f"cannot meet at {place}" in str(caught.value)
    assert "\n" not in str(caught.value)


SRUN = """
import os, time, torch
from radio_distill.system import distributed
distributed._LEAST_TIMEOUT = 1.0
world = distributed.world_from(os.environ)
distributed.join(world, torch.device("cpu"))
value = distributed.run_on_main(world, lambda: time.sleep(3) or 7)
print("local", os.environ["LOCAL_RANK"], "value", value)
"""


@pytest.mark.distributed
def test_srun__variables_of_slurm_alone_and_rank_0_may_take_longer_than_a_collective(unused_port):
    """Collectives time out after a second here, and rank 0 is busy for three."""
    own = {"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "MASTER_PORT": str(unused_port)}
    plain = {name: value for name, value in os.environ.items() if "RANK" not in name} | own
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SRUN],
            env=plain | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said == ["local 0 value 7", "local 1 value 7"]


@pytest.mark.distributed
def test_join__what_torchrun_starts(tmp_path):
    (tmp_path / "joined.py").write_text(
        "import os, torch\n"
        "from radio_distill.system import distributed\n"
        "world = distributed.world_from(os.environ)\n"
        "distributed.join(world, torch.device('cpu'))\n"
        "print(distributed.run_on_main(world, lambda: f'{world.world_size} of {world.rank}'))\n"
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "joined.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "RANK" not in name}
        | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "2 of 0", "2 of 0"]
