"""Everything that only a GPU can tell, in at most ten minutes, on one Markdown page.

    python3 -m benchmarks.gpu --output gpu.md                       # in the project's environment
    python3 -m benchmarks.gpu --wheels wheels --output gpu.md       # on a bare image
    python3 -m benchmarks.gpu --device cpu --quick                  # the same script without a GPU

Each section is a process of its own, under a time limit of its own. One that fails, or is ended at
its limit, is told so on the page, and the rest goes on. The page is written anew after each, so
that one that is cut short has what was measured. The exit status is 1 where a section failed.

A bare image needs Python 3.10 or newer with torch and Triton. What else is missing comes from
wheels of pure Python in the folder ``--wheels``, which are unpacked for this run alone; nothing is
installed, and no network is asked. On a machine with a network and this project's environment they
are collected by::

    DS_BUILD_OPS=0 python -m pip wheel --no-deps -w wheels deepspeed hjson open_clip_torch ftfy \
        timm submitit webdataset braceexpand accelerate einops rich markdown-it-py mdurl py-cpuinfo
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
LONGEST = 12_000
"""Characters of a section's output on the page; its end is kept."""


@dataclass(frozen=True)
class Section:
    """One process."""

    title: str
    command: tuple[str, ...]
    """Behind ``python``."""
    limit: float
    """Seconds."""


@dataclass(frozen=True)
class Outcome:
    """How a section went."""

    section: Section
    state: str
    """``ok``, ``FAILED: ...``, ``OUT OF TIME: ...`` or ``NOT RUN: ...``."""
    seconds: float
    output: str

    @property
    def is_ok(self) -> bool:
        return self.state == "ok"

    def text(self) -> str:
        """Return it as Markdown."""
        output = self.output.strip()
        if len(output) > LONGEST:
            output = f"... {len(output) - LONGEST} characters ...\n{output[-LONGEST:]}"
        command = " ".join(["python", *self.section.command])
        return (
            f"## {self.section.title}\n\n`{command}`: {self.state}, {self.seconds:.0f} s\n\n"
            f"```text\n{output}\n```\n"
        )


def sections(device: str, recipe: Path, quick: bool) -> list[Section]:
    """Return what is run, the most important first; ``quick`` takes small models.

    Args:
        device: ``cuda`` or ``cpu``.
        recipe: a tiny one, for ``quick``.
        quick: for a machine without a GPU.
    """
    where = ("--device", device)
    part, step = ("-m", "benchmarks.gpu_parts"), ("-m", "benchmarks.train_step")
    kernels = ("-m", "benchmarks.joint_bilateral_gpu", *(("--count",) if device == "cpu" else ()))
    sweep = ("-m", "benchmarks.joint_bilateral_gpu", "--sweep")
    small = (*step, str(recipe), *where, "--images", "2", "--steps", "1")
    first: tuple[Section, ...]
    if quick:
        first = (
            Section("A step, of a tiny recipe", small, 120),
            Section("The same under ZeRO 1", (*small, "--engine", "deepspeed", "--zero", "1"), 120),
        )
        rest: tuple[Section, ...] = ()
    else:
        phi = (*step, "phi_s_b", *where, "--partition")
        hires = (*step, "featsharp_radio_l", *where, "--stage", "stage3", "--partition")
        radio = (*step, "radio_v2_5_l", *where, "--stage", "stage2", "--partition")
        first = (
            Section("A step of phi_s_b", (*phi, "dfn_clip", "--images", "16", "128"), 70),
            Section("A step of featsharp_radio_l", (*hires, "dfn_clip_hires", "--images", "8"), 70),
            Section("A step of radio_v2_5_l", (*radio, "siglip", "--images", "8", "64"), 60),
        )
        ds = ("--images", "128", "--engine", "deepspeed", "--zero")
        rest = (
            Section("phi_s_b under ZeRO 0", (*phi, "dfn_clip", *ds, "0"), 50),
            Section("phi_s_b compiled", (*phi, "dfn_clip", "--images", "128", "--compile"), 90),
            Section("phi_s_b with SAM", (*phi, "sam", "--images", "64"), 50),
        )
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "tests/gpu", *_workers())
    return [
        Section("The machine", (*part, "machine", *where), 60),
        Section("Tests of the GPU", tests, 150),
        *first,
        Section("ZeRO 0 to 3, one process", (*part, "zero", *where), 90),
        Section("Killed and resumed", (*part, "resume", *where), 120),
        Section("Photographs to the device", (*part, "pipeline", *where), 60),
        Section("The joint-bilateral layer's kernels", kernels, 120),
        *rest,
        *(() if device == "cpu" else (Section("Launch settings of the kernels", sweep, 150),)),
    ]


def _workers() -> tuple[str, ...]:
    """Return the argument that spreads tests, which compile kernels, over the cores."""
    from importlib.util import find_spec

    cores = os.cpu_count() or 1
    return ("-n", str(min(12, cores))) if find_spec("xdist") and cores > 4 else ()


def run_section(section: Section, environment: dict[str, str], left: float) -> Outcome:
    """Run a section for its time, or for what is left of all."""
    limit, begin = min(section.limit, left), time.monotonic()
    if limit < 5:
        return Outcome(section, "NOT RUN: no time was left", 0, "")
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            [sys.executable, *section.command], cwd=CHECKOUT, env=environment,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            state = "ok" if status == 0 else f"FAILED: exit status {status}"
        except subprocess.TimeoutExpired:
            state = f"OUT OF TIME: ended after {limit:.0f} s"
        finally:
            _end_group(process)
        file.seek(0)
        return Outcome(section, state, time.monotonic() - begin, file.read())


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a section and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all ended by themselves
    finally:
        process.wait()


def page(outcomes: Sequence[Outcome], planned: int) -> str:
    """Return the page of what is measured so far."""
    good = sum(item.is_ok for item in outcomes)
    lines = [
        "# What was measured on a GPU\n",
        f"{time.strftime('%d %B %Y')}, `python -m benchmarks.gpu`: {good} of {planned} sections "
        f"went well, {sum(item.seconds for item in outcomes):.0f} s.\n",
        "| section | | s |\n| --- | --- | ---: |",
    ]
    rows = [f"| {item.section.title} | {item.state} | {item.seconds:.0f} |" for item in outcomes]
    return "\n".join([*lines, *rows, "", *(item.text() for item in outcomes)])


def environment_with(wheels: Path | None, folder: Path) -> dict[str, str]:
    """Return the environment of the sections: the checkout, and unpacked wheels before all else."""
    paths = [str(CHECKOUT)]
    if wheels is not None:
        site = folder / "site"
        for wheel in sorted(wheels.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(site)
        paths.insert(0, str(site))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "DS_BUILD_OPS": "0",
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.md"), metavar="PAGE")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="of pure Python, unpacked")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny models; tests the script")
    parser.add_argument("--seconds", type=float, default=600, help="for all (default: 600)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of titles")
    arguments = parser.parse_args(argv)
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels: no *.whl in {arguments.wheels}; the script's first lines tell how")
    begin, outcomes = time.monotonic(), list[Outcome]()
    with tempfile.TemporaryDirectory() as name:
        environment = environment_with(arguments.wheels, Path(name))
        recipe = Path(name) / "tiny.yaml"
        recipe.write_text(TINY, encoding="utf-8")
        planned = [
            item
            for item in sections(arguments.device, recipe, arguments.quick)
            if not arguments.only or any(word in item.title for word in arguments.only)
        ]
        for section in planned:
            left = arguments.seconds - (time.monotonic() - begin)
            outcomes.append(run_section(section, environment, left))
            print(
                f"{section.title}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True
            )
            arguments.output.write_text(page(outcomes, len(planned)), encoding="utf-8")
    return int(not all(item.is_ok for item in outcomes))


TINY = """
name: tiny
seed: 3
data: {workers: 0, shards: [none], crop_scale: [0.3, 1.0]}
student: {architecture: test_vit, max_size: 256, registers: 2, head_hidden: 32}
teachers:
  vit: {preset: tiny_vit, input_size: match, dtype: float32}
  cnn: {preset: tiny_cnn, dtype: float32}
normalizer: {images: 24}
stages:
  stage1:
    steps: 40
    optimizer: adamw
    partitions: [{name: low, size: 64, teachers: [vit, cnn], batch_size: 6}]
engine: {precision: float32}
log: {every: 1, save_every: 4, keep_last: 20, trackers: []}
"""
"""Random teachers, and seconds on any device."""


if __name__ == "__main__":
    sys.exit(main())
