"""What the tests of this folder share: the tiny recipe, starting stages, and what runs leave."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import yaml
from safetensors.torch import load_file

CHECKOUT = Path(__file__).resolve().parents[2]

RECIPE = yaml.safe_load("""
name: tiny
seed: 3
data: {workers: 0, crop_scale: [0.3, 1.0]}
student: {architecture: test_vit, max_size: 256, registers: 2, head_hidden: 32}
teachers:
  vit: {preset: tiny_vit, input_size: match, dtype: float32}
  cnn: {preset: tiny_cnn, dtype: float32}
  sam: {preset: tiny_samvit, summary_weight: 0, dtype: float32}
normalizer: {images: 24}
stages:
  stage1:
    steps: 6
    optimizer: adamw
    freeze_body_steps: 0.3
    ema_decay: 0.5
    partitions: [{name: low, size: 64, teachers: [vit, cnn, sam], batch_size: 6}]
  stage2:
    steps: 4
    start_from: stage1
    freeze_body_steps: 0.25
    partitions:
      - {name: a, size: 64, teachers: [vit, cnn], batch_size: 5}
      - {name: b, size: [64, 96], teachers: [sam], batch_size: 3, weight: 2}
  stage3:
    steps: 4
    start_from: stage2
    optimizer: adamw
    freeze_body_steps: 0.25
    upsampler: {name: bilinear, factor: 2}
    partitions:
      - {name: low, size: 64, teachers: [vit, cnn], batch_size: 4}
      - name: high
        size: 128
        teachers: [vit, sam]
        upsample: [vit]
        teacher_sizes: {vit: 64}
        batch_size: 2
engine: {precision: float32, device: auto}
log: {every: 1, save_every: 2, keep_last: 10, trackers: []}
evaluation: {size: 64, dense_size: 128, benchmarks: [fidelity], limit: 4}
""")


def run(stage: ModuleType, recipe_file: Path, *arguments: str) -> int:
    """Run a stage, or a fit, in this process; returns its exit status."""
    status: int = stage.main([str(recipe_file), *arguments])
    return status


def one_line(capfd) -> str:
    """Return the last line of stderr, and check that there was no stack trace."""
    error = capfd.readouterr().err
    assert "Traceback" not in error, error
    return error.strip().splitlines()[-1]


def run_folder(recipe_file: Path) -> Path:
    return recipe_file.parent / "runs" / "tiny"


def tensors(folder: Path, step: int, part: str = "student") -> dict[str, torch.Tensor]:
    """Read one file of a checkpoint of a stage's folder."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors")


def rows(folder: Path) -> list[dict]:
    """Read the log of a stage's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part="") -> None:
    """Compare tensors bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{part} {name}"


class Crew:
    """Two processes of one run, which run stage after stage.

    Args:
        pair: processes that have begun with :func:`begin_run`.
        log: what they print.
    """

    def __init__(self, pair: Callable[..., list[int]], log: Path) -> None:
        self._pair, self._log = pair, log

    def __call__(self, stage: str, *arguments: object) -> None:
        """Run a module of `stages`, or of this folder, in both processes; it must go well."""
        statuses = self._pair(run_module, stage, list(map(str, arguments)))
        assert statuses == [0, 0], f"{statuses}: {self._log.read_text()[-4000:]}"


def begin_run(log: Path, rank: int, port: int) -> None:
    """Be a process of a run of two, as a launcher would have started it; print to ``log``."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def run_module(rank: int, module: str, arguments: list[str]) -> int:
    """Run a stage, or a module of this folder, in this process of a crew."""
    package = "" if Path(__file__).with_name(f"{module}.py").exists() else "stages."
    status: int = importlib.import_module(package + module).main(arguments)
    return status
