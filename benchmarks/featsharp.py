"""What FeatSharp costs beside the teacher's own forwards, side by side in one run.

The whole upsampler runs as in a stage: the image is cut, the teacher encodes it and its tiles,
PHI-S, de-bias, network and the way back follow. Time inside ``teacher.encode`` is the teacher's,
time inside the network is the network's (JBU and block), what is left is the rest. Medians over
interleaved repeats, in bf16 autocast and without gradient. On one thread time is CPU time of the
process, which neighbours on the machine disturb least; on several, and on a GPU, it is wall time.

    python -m benchmarks.featsharp [--factors 2 3 4] [--batches 1 2] [--threads 2] [--device cuda]
    python -m benchmarks.featsharp --attention     forms of the local attention, forward+backward
    python -m benchmarks.featsharp --fake vit_h14  multiply-adds with a teacher of that size

The time per token against that of the teacher at the full resolution is FeatSharp's Figure 14.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from radio_distill.config import TeacherConfig
from radio_distill.types import Features, TeacherSpec
from teachers import build_teacher
from upsamplers.fitted import FittedUpsampler
from upsamplers.networks import Observation
from upsamplers.networks.featsharp import FeatSharpNetwork
from upsamplers.networks.local_attention import LocalSelfAttention

FAKE = {"vit_h14": ("vit_huge_patch14_224", 378), "vit_s14": ("vit_small_patch14_dinov2", 224)}


class Clock:
    """Add up the time that is spent in functions, by name."""

    def __init__(self, device: torch.device):
        self._device = device
        self.spent: dict[str, float] = {}

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def time(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = self.now()
        result = function(*arguments)
        self.spent[name] = self.spent.get(name, 0.0) + self.now() - start
        return result


class TimedTeacher:
    """A teacher whose forwards are counted by a clock."""

    def __init__(self, teacher: Any, clock: Clock):
        self._teacher, self._clock = teacher, clock

    @property
    def spec(self) -> TeacherSpec:
        spec: TeacherSpec = self._teacher.spec
        return spec

    def encode(self, pixels: Tensor) -> Features:
        features: Features = self._clock.time("teacher", self._teacher.encode, pixels)
        return features


class TimedNetwork(nn.Module):
    """A network whose forwards are counted by a clock."""

    def __init__(self, network: Any, clock: Clock):
        super().__init__()
        self.tile_levels = network.tile_levels
        self._network, self._clock = network, clock

    def forward(self, observation: Observation) -> Tensor:
        fine: Tensor = self._clock.time("network", self._network, observation)
        return fine


def compare(factors: list[int], batches: list[int], repeats: int, device: torch.device) -> None:
    """Print, for each factor and batch, where the time goes."""
    config = TeacherConfig(preset="vits14_packaged", dtype="bfloat16")
    teacher = build_teacher("dino", config, device)
    cells, patch = 16, teacher.spec.patch_size
    print("factor batch | teacher ms  network ms  rest ms | share % | us/token  native us/token")
    for factor in factors:
        upsampler = FittedUpsampler.untrained("featsharp", factor, {"dino": teacher.spec})
        model = upsampler._models["dino"].to(device)
        network, fine = model.network, cells * factor
        for batch in batches:
            pixels = torch.rand(batch, 3, fine * patch, fine * patch, device=device)
            rows = []
            for repeat in range(repeats + 1):
                clock = Clock(device)
                model.network = TimedNetwork(network, clock)
                timed = TimedTeacher(teacher, clock)
                clock.time("all", upsampler, timed, pixels, (fine, fine))
                clock.time("native", teacher.encode, pixels)
                if repeat:  # the first one warms up
                    rows.append(clock.spent)
            spent = {key: 1e3 * median(row[key] for row in rows) for key in rows[0]}
            ours = 1e3 * median(row["all"] - row["teacher"] for row in rows)
            tokens = batch * fine**2
            print(
                f"{factor:6} {batch:5} | {spent['teacher']:10.1f}  {spent['network']:10.1f}  "
                f"{ours - spent['network']:7.1f} | {100 * ours / spent['teacher']:7.1f} | "
                f"{1e3 * spent['all'] / tokens:8.1f}  {1e3 * spent['native'] / tokens:15.1f}"
            )


def compare_attention(repeats: int, device: torch.device, cells: int = 81) -> None:
    """Print forward and forward+backward of the attention layer (C 1280), by window."""
    tokens = torch.randn(1, cells, cells, 2560, device=device, requires_grad=True)
    for window in (3, 5, 7, 11):
        layer = LocalSelfAttention(2560, 2560, window).to(device)

        def forward(layer: nn.Module = layer) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                out: Tensor = layer(tokens)
            return out

        rows = []
        for repeat in range(repeats + 1):
            clock = Clock(device)
            with torch.no_grad():
                clock.time("forward", forward)
            clock.time("both", lambda forward=forward: forward().sum().backward())
            if repeat:
                rows.append(clock.spent)
        spent = [1e3 * median(row[key] for row in rows) for key in ("forward", "both")]
        print(f"window {window:2} {spent[0]:8.2f} ms, with backward {spent[1]:8.2f} ms")


def count(fake: str, factor: int) -> None:
    """Print multiply-adds in matrix products: the teacher's forwards and the network."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    name, size = FAKE[fake]
    with torch.device("meta"):
        teacher = timm.create_model(name, img_size=size, num_classes=0).eval()
        image = torch.empty(1 + factor**2, 3, size, size)
    channels, cells = teacher.num_features, size // 14
    low = torch.zeros(1, channels, cells, cells)
    fine = torch.zeros(1, channels, cells * factor, cells * factor)
    guidance = torch.zeros(1, 3, size * factor, size * factor)
    network = FeatSharpNetwork(channels, factor)
    totals = []
    for run in (
        lambda: teacher(image),
        lambda: network(Observation(guidance, low, {factor: fine})),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        totals.append(counter.get_total_flops() / 2e9)
    print(
        f"{name} at {size} px, {factor}x: teacher {totals[0]:.0f} G multiply-adds in "
        f"{1 + factor**2} forwards, network {totals[1]:.0f} G ({100 * totals[1] / totals[0]:.1f} %)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--fake", choices=FAKE)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.fake:
        for factor in arguments.factors:
            count(arguments.fake, factor)
    elif arguments.attention:
        compare_attention(arguments.repeats, arguments.device)
    else:
        compare(arguments.factors, arguments.batches, arguments.repeats, arguments.device)


if __name__ == "__main__":
    main()
