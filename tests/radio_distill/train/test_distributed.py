"""Rank and world size from each launcher's environment."""

import pytest
import torch

from radio_distill.errors import ConfigError
from radio_distill.train.distributed import World, choose_device, world_from


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(3, 8, 1)),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"},
            World(5, 6, 2),
        ),
        # In a batch script, outside srun, Slurm sets the job's variables but starts one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World()),
    ],
)
def test_world_from__launchers(environment, expected):
    assert world_from(environment) == expected


def test_world_from__contradiction():
    with pytest.raises(ConfigError, match="RANK=4 does not lie below WORLD_SIZE=2"):
        world_from({"RANK": "4", "WORLD_SIZE": "2"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_choose_device__without_gpu():
    assert choose_device("auto", World()).type == "cpu"
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        choose_device("cuda", World())
