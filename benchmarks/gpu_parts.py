"""Parts of ``benchmarks.gpu`` that are no benchmark of their own; each is run in its own process.

python -m benchmarks.gpu_parts machine
python -m benchmarks.gpu_parts zero          # ZeRO 0 to 3, one process: states saved and loaded
python -m benchmarks.gpu_parts resume        # a tiny stage, killed and resumed
python -m benchmarks.gpu_parts pipeline      # photographs from shards to the device
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml

from benchmarks.gpu import TINY
from benchmarks.synthetic import build_task, one_partition
from benchmarks.train_step import Clock, Stepping, device_name, measured_peak
from radio_distill.config import DataConfig, Recipe, load
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.data.shards import write_shards
from radio_distill.system.distributed import World, choose_device

PACKAGES = (
    "torch", "torchvision", "triton", "timm", "open_clip_torch", "transformers", "deepspeed",
    "accelerate", "webdataset", "braceexpand", "einops", "safetensors", "submitit", "rich",
    "jinja2", "pyyaml", "numpy", "pillow", "pytest", "pytest-xdist",
)  # fmt: skip


DETERMINISTIC = ("--engine.deterministic", "true")


def tiny(folder: Path, device: str, shards: str = "none") -> Path:
    """Write the tiny recipe into a folder; returns its file."""
    recipe = yaml.safe_load(TINY)
    recipe["output"] = str(folder / "runs")
    recipe["data"]["shards"] = [shards]
    recipe["engine"]["device"] = device
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def machine(device: torch.device) -> None:
    """Print what there is: device, versions, bandwidth of copies, peaks of matrix products."""
    print(f"{device_name(device)}; Python {platform.python_version()}; {os.cpu_count()} cores")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}", end="; ")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} MISSING", end="; ")
    print()
    clock, on_gpu = Clock(device), device.type == "cuda"
    source = torch.zeros(2**31 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(clock.time(lambda: target.copy_(source)) for _ in range(6))
    print(f"copies on the device: {2 * source.numel() / seconds / 1e9:.0f} GB/s read and written")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products, {dtype}: {measured_peak(device, dtype) / 1e12:.3g} TFLOP/s")
    if on_gpu:
        for pinned in (False, True):
            host = torch.zeros(2**28, dtype=torch.uint8, pin_memory=pinned)
            seconds = min(clock.time(partial(host.to, device)) for _ in range(4))
            kind = "pinned" if pinned else "pageable"
            print(f"host to device, {kind}: {host.numel() / seconds / 1e9:.1f} GB/s")


def zero(device: torch.device) -> None:
    """Train two steps in each ZeRO stage, move the state into a new engine, and compare a third.

    Raises:
        AssertionError: weights of the third step that differ between the two engines.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = load(tiny(Path(folder), device.type))
    for stage in (0, 1, 2, 3):
        begin = time.perf_counter()
        first = _stepping(recipe, stage, device)
        first()
        first()
        weights, states = first.task.engine.model_tensors(), first.task.engine.optimizer_tensors()
        first()
        expected = first.task.engine.model_tensors()
        second = _stepping(recipe, stage, device)
        second.task.engine.load(weights, states)
        second.number = 2
        second()
        found = second.task.engine.model_tensors()
        assert expected.keys() == found.keys()
        worst = max(float((expected[k].float() - found[k].float()).abs().max()) for k in expected)
        print(
            f"ZeRO {stage}: {len(weights)} weights and {len(states)} states moved; the step after "
            f"differs by {worst:.1e} at most; {time.perf_counter() - begin:.1f} s"
        )
        assert worst < 1e-5, f"ZeRO {stage}: the state was not restored"
        del first, second
        gc.collect()


def _stepping(recipe: Recipe, zero_stage: int, device: torch.device) -> Stepping:
    engine = replace(recipe.engine, name="deepspeed", zero_stage=zero_stage)  # type: ignore[arg-type]
    task = build_task(one_partition(recipe, "stage1", "low", 3, 2, engine), "stage1", device)
    return Stepping(task, next(task.batches(0)))


def resume(device: torch.device) -> None:
    """Train a tiny stage whole, and once more killed and resumed; compare weights and losses.

    ``engine.deterministic`` is on.

    Raises:
        AssertionError: other bits.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = noise_shards(folder, 30, (80, 100))
        endings = {}
        for kind in ("whole", "killed"):
            (folder / kind).mkdir()
            recipe = tiny(folder / kind, device.type, str(shards))
            command = [sys.executable, "stages/stage1.py", str(recipe), *DETERMINISTIC]
            checkpoints = folder / kind / "runs" / "tiny" / "stage1" / "checkpoints"
            if kind == "killed":
                _kill_after(command, checkpoints / "step-00000008" / "meta.json")
                command.append("--resume")
            subprocess.run(command, check=True, capture_output=True)
            newest = sorted(checkpoints.glob("step-*"))[-1]
            rows = (checkpoints.parent / "metrics.jsonl").read_text().splitlines()
            losses = {row["step"]: row["loss/total"] for row in map(json.loads, rows)}
            endings[kind] = json.loads((newest / "meta.json").read_text())["sha256"], losses
        (whole, expected), (killed, found) = endings.values()
        for part in whole:
            print(f"{part}: sha256 {'equal' if whole[part] == killed[part] else 'DIFFERS'}")
        worst = max(abs(found[step] / loss - 1) for step, loss in expected.items())
        print(f"losses of {len(expected)} steps differ by {worst:.1e} at most")
        assert whole == killed, "the resumed run ended with other bits"


def _kill_after(command: list[str], file: Path) -> None:
    """Start a command, and kill it as soon as a file is there."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not file.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    print(f"killed after {file.parent.name} was written: {process.returncode == -signal.SIGKILL}")


def pipeline(device: torch.device) -> None:
    """Print the images a second that shards give, decoded, cropped and copied to the device."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    images = 600 if device.type == "cuda" else 60
    with tempfile.TemporaryDirectory() as name:
        shards = noise_shards(Path(name), images, (427, 640))
        for side in (224, 432, 1024):
            config = DataConfig(shards=(str(shards),), workers=workers)
            batch = min(64, images // 4)
            slices = in_every_step([StepSlice(0, batch, (side, side))])
            source = ShardBatches(config, seed=0, images_per_step=batch, slices=slices)
            stream = source.batches(0)
            for _ in range(2):
                next(stream)
            begin, done = time.perf_counter(), 0
            while time.perf_counter() - begin < 5 and done < 40:
                for item in next(stream):
                    for pixels in item.views.values():
                        pixels.to(device, non_blocking=True)
                done += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = done * batch / (time.perf_counter() - begin)
            del stream  # ends its workers
            print(f"{side} px, {workers} workers: {rate:.0f} images/s on the device")


def noise_shards(folder: Path, images: int, size: tuple[int, int], under: str = "images") -> Path:
    """Write JPEGs of smooth noise into a folder's ``under``, and shards; returns the shards'."""
    from PIL import Image

    (folder / under).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(images):
        coarse = torch.rand(1, 3, 40, 60, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
        array = (fine[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / under / f"{number:04}.jpg", quality=92)
    write_shards(folder / under, folder / "shards", images_per_shard=100)
    return folder / "shards"


def main() -> None:
    """Run one part."""
    parts = {part.__name__: part for part in (machine, zero, resume, pipeline)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    parts[arguments.part](choose_device(arguments.device, World()))


if __name__ == "__main__":
    main()
