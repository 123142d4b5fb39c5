"""The doctor passes this machine, and names the cure for machines that are ill in known ways."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import packages
from stages.commands import doctor

HERE = Path(doctor.__file__).resolve().parents[2]
GUARD = "from stages.packages import check_packages as c\ntry: c()\nexcept Exception as e: print(e)"


def guard(cwd: Path, *paths: Path) -> str:
    """What ``check_packages`` says in a new process that looks in ``paths`` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", GUARD]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path) -> Path:
    """An installation of the five packages in another folder."""
    for name in packages.PACKAGES:
        shutil.copytree(HERE / name, tmp_path / "site" / name)
    return tmp_path / "site"


def test_check_packages__passes_here():
    packages.check_packages()


def test_check_packages__passes_an_installed_copy(tmp_path, copy):
    assert guard(tmp_path, copy) == ""


def test_check_packages__foreign_package_earlier_on_the_path(tmp_path, copy):
    foreign = tmp_path / "foreign" / "slurm"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise SystemExit('this must not run')")
    said = guard(tmp_path, tmp_path / "foreign", copy)
    assert said.startswith(f"`slurm` comes from {foreign}, which is another project's package")
    assert "pip uninstall slurm" in said
    assert "\n" not in said


def test_check_packages__our_package_was_overwritten_in_place(tmp_path, copy):
    (copy / "slurm" / "__init__.py").write_text("")
    assert "another project's package" in guard(tmp_path, copy)


def test_check_packages__second_copy_of_ours(tmp_path, copy):
    second = tmp_path / "second"
    shutil.copytree(HERE / "teachers", second / "teachers")
    said = guard(tmp_path, second, copy)
    assert said.startswith(f"`teachers` comes from {second / 'teachers'}")
    assert "\n" not in said


def run(folder: Path) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(["--output", str(folder)]))


def test_run__is_ready_here_and_leaves_no_trace(tmp_path, capsys):
    status = run(tmp_path / "runs")
    output = capsys.readouterr().out
    assert status == 0, output
    assert "✓ ready" in output
    for name in ("python", "our packages", "torchvision", "gloo", "triton", "free disk"):
        assert name in output
    assert list(tmp_path.iterdir()) == []


def test_run__broken_torchvision_is_named_with_its_cure(tmp_path, capsys, monkeypatch):
    """A torchvision of another build raises at import; this one does the same."""
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert run(tmp_path) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "✗ to repair: torchvision" in output
    assert "operator torchvision::nms does not exist → torch and torchvision come from" in output


def test_run__folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "runs").write_text("")
    assert run(tmp_path / "runs") == 1
    assert "✗ to repair: run folder" in capsys.readouterr().out


def test_run__missing_demo_package_is_no_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "DEMO", {"no-such-package": "pip install no-such-package"})
    assert run(tmp_path) == 0
    assert "pip install no-such-package" in " ".join(capsys.readouterr().out.split())


def test_run__missing_library_is_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-package",))
    assert run(tmp_path) == 1
    assert "✗ to repair: no-such-package" in capsys.readouterr().out


def test_run__full_disk(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_LEAST_FREE_GB", 10**9)
    assert run(tmp_path) == 1
    assert "✗ to repair: free disk" in capsys.readouterr().out


def test_run__driver_without_a_gpu_for_torch(tmp_path, capsys, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(tmp_path) == 1
    assert "✗ to repair: torch\n" in capsys.readouterr().out
