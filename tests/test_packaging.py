"""The five packages install under their names, import fast, and import in one direction only."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("radio_distill", "slurm", "stages", "teachers", "upsamplers")
BIN = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject__lists_the_five_folders(project):
    listed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(listed) == found - {"tools"} == set(PACKAGES)  # tools stay in the checkout
    assert set(project["tool"]["importlinter"]["root_packages"]) == found


@pytest.mark.parametrize("name", PACKAGES)
def test_package__holds_the_mark_of_this_project(name):
    """By which `radio-distill doctor` tells it from another project's package of that name."""
    text = (ROOT / name / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^PROJECT = "radio-distill"$', text, re.MULTILINE)


@pytest.mark.parametrize("name", PACKAGES)
def test_package__tells_type_checkers_that_it_is_annotated(name):
    assert (ROOT / name / "py.typed").is_file()


def test_version__is_one(project):
    version = project["project"]["version"]
    assert re.search(
        rf'^__version__ = "{version}"$', (ROOT / "radio_distill" / "__init__.py").read_text(), re.M
    )
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_workflow__runs_what_the_makefile_has():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert {"lint", "test", "minimal"} <= set(jobs)
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.12"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    steps = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert set(re.findall(r"^make (\w+)", steps, re.M)) <= targets


@pytest.mark.parametrize("name", PACKAGES)
def test_package__imports_from_anywhere_without_torch(name, tmp_path):
    """In isolated mode: neither the current folder nor PYTHONPATH helps."""
    code = (
        f"import sys, {name}; print({name}.__file__); "
        "print(sorted({'torch', 'timm', 'transformers', 'open_clip'} & set(sys.modules)))"
    )
    done = run(sys.executable, "-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, heavy = done.stdout.splitlines()
    assert Path(where) == ROOT / name / "__init__.py"
    assert heavy == "[]"


def test_console_script__answers_from_a_foreign_folder(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "__init__.py").write_text("raise SystemExit('a foreign slurm was run')")
    done = run(BIN / "radio-distill", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "radio-distill" in done.stdout


def test_console_script__help_needs_no_torch(tmp_path):
    code = "import sys; from stages.cli import main; sys.argv[0] = 'radio-distill'\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    done = run(sys.executable, "-I", "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_imports__keep_their_direction():
    linter = BIN / "lint-imports"
    if not linter.is_file():
        pytest.skip("import-linter is not installed")
    done = run(linter, "--no-cache", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
