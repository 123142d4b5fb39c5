"""What the tests of this folder share: a real Slurm."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _sibling(name: str) -> ModuleType:
    """Load a module that lies beside this one, in whichever way the tests were started."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def processes() -> int:
    """The most that a test of this folder starts of one run."""
    return 2


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running Slurm with the nodes n1 and n2, as a ``SlurmCluster``; SLURM_CONF points to it."""
    module = _sibling("slurm_cluster")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    missing = module.missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    cluster = module.SlurmCluster(tmp_path_factory.mktemp("slurm"))
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
