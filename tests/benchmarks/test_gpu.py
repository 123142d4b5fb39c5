"""The script for GPUs: what fails or hangs is told on the page, and the rest goes on."""

import os
import time
import zipfile

from benchmarks import gpu


def command(code):
    return gpu.Section(code[:20], ("-c", code), 60)


def test_run_section__failures_are_told():
    environment = dict(os.environ)
    good = gpu.run_section(command("print('fine')"), environment, 60)
    bad = gpu.run_section(command("print('before'); raise SystemExit(3)"), environment, 60)
    late = gpu.run_section(command("print('begun', flush=True); input()"), environment, 60)
    none = gpu.run_section(command("print('never')"), environment, 3)
    assert (good.state, bad.state) == ("ok", "FAILED: exit status 3")
    assert late.state.startswith("FAILED")  # no terminal to read from
    assert none.state == "NOT RUN: no time was left"
    page = gpu.page([good, bad, late, none], 4)
    assert "1 of 4 sections went well" in page
    assert all(word in page for word in ("fine", "before", "begun", "exit status 3"))


def test_run_section__ends_what_hangs_with_its_children():
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    outcome = gpu.run_section(gpu.Section("hangs", ("-c", code), 5), dict(os.environ), 60)
    assert outcome.state == "OUT OF TIME: ended after 5 s"
    for _ in range(100):  # until it is reaped
        if not _is_running(int(outcome.output)):
            return
        time.sleep(0.05)
    raise AssertionError("its child lives on")


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_environment_with__wheels_go_before_what_is_installed(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "einops-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("einops/__init__.py", "__version__ = 'carried'")
    environment = gpu.environment_with(tmp_path / "wheels", tmp_path)
    section = command("import einops; print(einops.__version__)")
    assert gpu.run_section(section, environment, 60).output.strip() == "carried"


def test_main__quick_on_the_cpu(tmp_path):
    page = tmp_path / "gpu.md"
    options = ["--device", "cpu", "--quick", "--only", "machine", "kernels"]
    assert gpu.main([*options, "--output", str(page)]) == 0
    text = page.read_text()
    assert "2 of 2 sections went well" in text
    assert "TFLOP/s" in text
    assert "B1 C1280 27→81, fp32" in text
