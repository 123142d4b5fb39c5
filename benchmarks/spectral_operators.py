"""Operators of a student with and without spectral reparametrisation: as many kernels on a GPU.

    python -m benchmarks.spectral_operators [--architecture vit_base_patch16_224]

Counts what autograd runs, forward and backward, in bfloat16 on a processor, without operators that
only give another view of a tensor: for a step of one pass, and for each pass more.
"""

import argparse

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from radio_distill.config import StudentConfig
from radio_distill.models.position import NUM_DRAWS
from radio_distill.models.spectral import begin_step, closing_loss, share_matrices
from radio_distill.models.student import Student

VIEWS = {
    *("view", "_unsafe_view", "view_as", "_reshape_alias", "t", "transpose", "permute", "expand"),
    *("slice", "select", "unbind", "split", "split_with_sizes", "detach", "alias", "as_strided"),
    *("unsqueeze", "squeeze", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided"),
    "new_empty_strided",
}


class Operators(TorchDispatchMode):
    """Counts operators that run in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def count_step(architecture: str, spectral: bool, passes: int) -> int:
    """Count the operators of the second step of a student."""
    config = StudentConfig(architecture=architecture, spectral_reparametrization=spectral)
    student = Student(config, num_summary_tokens=3).train()
    pixels, draws = torch.rand(1, 3, 64, 64), torch.rand(1, NUM_DRAWS)
    for step in range(2):
        with Operators() as operators:
            begin_step(student, step)
            is_shared = share_matrices(student)
            for _ in range(passes):
                with torch.autocast("cpu", torch.bfloat16):
                    summary, spatial = student(pixels, draws)
                (summary.float().sum() + spatial.float().sum()).backward()
            if is_shared:
                closing_loss(student).backward()
        student.zero_grad()
    return operators.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="vit_base_patch16_224")
    architecture = parser.parse_args().architecture
    for spectral in (False, True):
        one, two = (count_step(architecture, spectral, passes) for passes in (1, 2))
        print(f"spectral {spectral}: {one} in a step of one pass, {two - one} in each more")


if __name__ == "__main__":
    main()
