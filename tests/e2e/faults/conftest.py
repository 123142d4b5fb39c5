"""What the tests of this folder share: a real Slurm."""

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from faults import slurm_cluster as slurm


@pytest.fixture
def processes() -> int:
    """The most that a test of this folder starts of one run."""
    return 2


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running Slurm with the nodes n1 and n2, as a ``SlurmCluster``; SLURM_CONF points to it."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    missing = slurm.missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    cluster = slurm.SlurmCluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.configuration))
        try:
            try:
                cluster.start()
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"Slurm's daemons do not run on this machine: {error}")
            yield cluster
        finally:
            cluster.stop()
