"""How long ImageNet's kNN takes to find neighbours.

Random summaries in half precision are the bank, as ``imagenet_knn`` keeps them, and its search is
timed: against products of all pairs in float32 without any search, and against the same search with
the bank in one piece. The least of three times counts.

    python -m benchmarks.nearest_neighbours [--bank 100000] [--queries 1024] [--channels 1024]
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from radio_distill.evals.knn import nearest_in_bank
from stages.arguments import run_script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bank", type=int, default=100_000, help="images in the bank")
    parser.add_argument("--queries", type=int, default=1024, help="images that are asked")
    parser.add_argument("--channels", type=int, default=1024, help="of a summary")
    parser.add_argument("--device", default="cpu")


def run(arguments: argparse.Namespace) -> int:
    """Print the times."""
    generator, device = torch.Generator().manual_seed(0), arguments.device
    bank, queries = (
        torch.randn(count, arguments.channels, generator=generator).half()
        for count in (arguments.bank, arguments.queries)
    )

    def product() -> None:
        some = queries.to(device).float()
        for part in bank.split(8192):
            (some @ part.to(device).float().T).sum().item()

    def search(**chunks: int) -> None:
        nearest_in_bank(bank, queries, 20, device, **chunks)[0].sum().item()

    whole = {"bank_chunk": len(bank), "query_chunk": len(queries)}
    operations = 2 * arguments.bank * arguments.queries * arguments.channels
    print(f"bank in half precision: {bank.nbytes / 1e9:.2f} GB")
    for name, work in (
        ("products alone", product),
        ("search in chunks", search),
        ("search in one piece", lambda: search(**whole)),
    ):
        seconds = _least_seconds(work)
        print(f"{name}: {seconds:.2f} s, {operations / seconds / 1e9:.0f} GFLOP/s")
    return 0


def _least_seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
