"""What the tests of the launcher share."""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

RECIPE = """
name: tiny
output: {output}
data: {{shards: [shards]}}
teachers: {{a: {{preset: timm}}}}
stages:
  stage1: &stage {{steps: 1, partitions: [{{name: low, size: 32, teachers: [a], batch_size: 2}}]}}
  stage2: {{<<: *stage, start_from: stage1}}
  stage3: {{<<: *stage, start_from: stage2}}
"""


@pytest.fixture
def recipe(tmp_path):
    """A valid recipe of three stages."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "runs"), encoding="utf-8")
    return path


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Make ``recording_stage`` importable in jobs; returns the calls written so far."""
    here, root = str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])
    monkeypatch.syspath_prepend(here)
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, root, known))))

    def calls():
        return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]

    with patch.dict(os.environ):  # a job that runs in this process sets its rank
        yield calls
    sys.modules.pop("recording_stage", None)


_SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
  *"show job"*) for last; do :; done
    [ -e {folder}/job-$last ] && cat {folder}/job-$last && exit 0
    echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
  *"show hostnames"*) for last; do :; done; echo "$last" | tr ',' '\\n';;
esac
"""
_SBATCH = """#!/bin/sh
[ -e {folder}/full ] && [ -e {folder}/41.sh ] && echo "error: queue is full" >&2 && exit 1
number=$((41 + $(ls {folder} | grep -c sh$)))
cp "$1" {folder}/$number.sh
echo Submitted batch job $number
"""


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """A folder first on the path, with stand-ins for Slurm's commands.

    ``sbatch`` counts from 41 and keeps the scripts. ``scontrol show job N`` prints the file
    ``job-N``; all its calls, and those of ``scancel``, go to the file ``calls``. ``sinfo`` prints
    the file ``nodes``. There is no ``sacct``.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": _SBATCH,
        "scontrol": _SCONTROL,
        "scancel": '#!/bin/sh\necho scancel "$@" >> {folder}/calls\n',
        "sinfo": "#!/bin/sh\ncat {folder}/nodes\n",
        "srun": "",
    }
    for name, text in scripts.items():
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o700)
    (folder / "nodes").write_text("n1 idle\nn2 mixed\nn3 down*\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def slurm_task(monkeypatch):
    """Set the variables that Slurm sets in a task; keywords replace or add some."""

    def set_variables(**changed):
        values = {
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_ID": "41",
            "SLURM_NTASKS": "1",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": "n1",
            **changed,
        }
        for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables
