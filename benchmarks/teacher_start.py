"""Memory and time of a teacher's start, at full size with random weights.

A file of random weights is written (safetensors, under its library's names), and the
teacher is built of it in processes of their own: twice, so that the second finds the fingerprint
that the first left beside the file. Peaks are those of the process behind what its imports take:

    own       memory that the process alone has (RssAnon, sampled every 5 ms)
    resident  with pages of the file, which all processes of a machine share and the kernel may
              drop (VmHWM)

    python -m benchmarks.teacher_start dfn_clip_h14_378 siglip_so400m_384 dinov2_g_reg sam_h

With ``--tree FOLDER`` the children import another checkout, to compare with.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from radio_distill.config import TeacherConfig
from teachers import build_module, resolve

SETTLED = 12
"""Seconds after which a file counts as no longer being written to."""
_MIB = 1 << 20


def write_weights(preset: str, folder: Path, dtype: str = "float32") -> Path:
    """Write random weights for the encoder of a preset; returns the file, or RADIO's folder."""
    import torch
    from safetensors.torch import save_file

    tower = build_module(TeacherConfig(preset=preset))
    module = getattr(tower, "visual", None) or tower.model
    asked = resolve(TeacherConfig(preset=preset))
    state = {}
    for key, value in module.state_dict().items():
        name = asked.arguments.get("prefix", "") + key
        if value.is_floating_point():
            state[name] = torch.empty(value.shape).normal_(0, 0.02).to(getattr(torch, dtype))
        else:
            state[name] = torch.arange(value.numel()).view(value.shape)
    if asked.source == "radio":  # its tower gets normalised images, so it has left these out
        for name in ("norm_mean", "norm_std"):
            state[f"input_conditioner.{name}"] = torch.full((3, 1, 1), 0.5)
        tower.model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    return folder if asked.source == "radio" else folder / "model.safetensors"


def memory(field: str) -> int:
    """Return a figure of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def start(preset: str, path: str, dtype: str) -> None:
    """Build the teacher in this process and print what it took as JSON."""
    import torch

    from teachers import build_teacher
    from teachers.base import FrozenTeacher  # noqa: F401
    from teachers.sources import find_source
    from teachers.weights import fingerprint  # noqa: F401

    config = TeacherConfig(preset=preset, weights=path, dtype=dtype)
    build_module(TeacherConfig(preset=preset))  # imports its library
    find_source("transformers")
    before, seen, done = memory("RssAnon"), [memory("RssAnon")], threading.Event()
    resident = memory("VmRSS")

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    teacher = build_teacher("t", config)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    tower = teacher.tower
    assert isinstance(tower, torch.nn.Module)
    held = sum(value.nbytes for value in (*tower.parameters(), *tower.buffers()))
    took = {"teacher": held, "own": max(seen) - before, "resident": memory("VmHWM") - resident}
    print(json.dumps({**took, "wall": wall, "cpu": cpu, "hash": teacher.spec.weights_hash}))


def measured(preset: str, path: Path, dtype: str, tree: str) -> dict[str, float]:
    """Run :func:`start` in a process that imports ``tree``."""
    code = f"import runpy, sys; sys.argv = {['x', '--child', preset, str(path), dtype]!r}; "
    code += f"runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": tree}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table row for each start."""
    parser = argparse.ArgumentParser(prog="benchmarks.teacher_start", description=__doc__)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--dtype", default="bfloat16", help="that the teacher is kept in")
    parser.add_argument("--file-dtype", default="float32")
    parser.add_argument("--tree", action="append", help="checkout that the children import")
    parser.add_argument("--folder", help="where the files are written, with room for one")
    options = parser.parse_args(arguments)
    print("| teacher | checkout | start | holds MiB | own peak | of it | resident | s | CPU s |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for preset in options.presets:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = write_weights(preset, Path(folder), options.file_dtype)
            time.sleep(SETTLED)
            hashes = set()
            for tree in options.tree or [str(Path(__file__).resolve().parents[1])]:
                for label in ("first", "second"):
                    took = measured(preset, path, options.dtype, tree)
                    hashes.add(took["hash"])
                    row = [f"{took[key] / _MIB:,.0f}" for key in ("teacher", "own")]
                    row += [f"{took['own'] / took['teacher']:.2f}"]
                    row += [f"{took['resident'] / _MIB:,.0f}"]
                    row += [f"{took[key]:.1f}" for key in ("wall", "cpu")]
                    print("|", " | ".join([preset, Path(tree).name, label, *row]), "|", flush=True)
            assert len(hashes) == 1, "every start has one fingerprint"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        start(*sys.argv[2:])
    else:
        main()
