"""What the networks of fitted upsamplers cost: parameters, and multiply-adds of a fine cell.

Multiply-adds are those of matrix products and convolutions, counted without data, on a grid of
16 x 16 cells of 14 pixels. Prints a Markdown table, in millions.

    python -m benchmarks.upsampler_networks [--channels 768 1152] [--factors 2 4]
"""

import argparse

import torch

from radio_distill.plan.meter import fake_tensors, measure_work
from upsamplers.networks import NETWORKS, Observation, build_network

CELLS, PATCH = 16, 14


def cost(name: str, channels: int, factor: int) -> tuple[int, float]:
    """Return the parameters of a network, and its multiply-adds for each fine cell."""
    fine = CELLS * factor
    with fake_tensors(), torch.no_grad():
        network = build_network(name, channels, factor, {}).eval()
        levels: tuple[int, ...] = network.tile_levels  # type: ignore[assignment]
        seen = Observation(
            torch.empty(1, 3, fine * PATCH, fine * PATCH),
            torch.empty(1, channels, CELLS, CELLS),
            {level: torch.empty(1, channels, fine, fine) for level in levels},
        )
        work = measure_work(lambda: network(seen))
    return sum(item.numel() for item in network.parameters()), work.flops / 2 / fine**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--channels", type=int, nargs="+", default=[768, 1152])
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    cases = [(width, factor) for width in arguments.channels for factor in arguments.factors]
    titles = [f"C {width}, {factor}x" for width, factor in cases]
    print("| network | " + " | ".join(titles) + " |")
    print("| --- |" + " ---: |" * len(cases))
    for name in NETWORKS.names():
        costs = [cost(name, width, factor) for width, factor in cases]
        cells = [f"{count / 1e6:.2f}, {work / 1e6:.3f}" for count, work in costs]
        print(f"| `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
