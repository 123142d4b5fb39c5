"""Tiny frozen teachers, one that counts what it is shown, a scale to fit upsamplers in, and golden
tensors of the published programs, kept beside the checkout."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radio_distill.config import TeacherConfig
from radio_distill.normalize.hadamard import hadamard
from radio_distill.normalize.phi_s import PhiS
from teachers import build_teacher
from teachers.base import FrozenTeacher
from upsamplers.networks import Observation

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Read a golden file by name; the test is skipped where it is not there."""

    def load(name: str) -> dict[str, torch.Tensor]:
        path = GOLDEN / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no golden file {name}")
        return load_file(path)

    return load


@pytest.fixture(scope="session")
def observation() -> Callable[..., Observation]:
    """Make what a network is shown: a random image and a random map of ``size`` cells."""

    def make(
        channels: int, factor: int, size: tuple[int, int] = (5, 7), batch: int = 2
    ) -> Observation:
        height, width = (side * factor * 4 for side in size)
        return Observation(torch.rand(batch, 3, height, width), torch.randn(batch, channels, *size))

    return make


class Spy:
    """A teacher that notes how many images each call shows it."""

    def __init__(self, teacher: FrozenTeacher):
        self.teacher, self.spec = teacher, teacher.spec
        self.calls: list[int] = []

    def encode(self, pixels: torch.Tensor):
        self.calls.append(len(pixels))
        return self.teacher.encode(pixels)

    def to(self, device):
        return self


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], FrozenTeacher]:
    """Return a teacher of a preset, made once."""
    return cache(lambda preset: build_teacher(preset, TeacherConfig(preset=preset)))


@pytest.fixture
def spy(tiny) -> Callable[[str], Spy]:
    """Return a teacher of a preset that counts."""
    return lambda preset: Spy(tiny(preset))


@pytest.fixture(scope="session")
def phi_s() -> Callable[[int], PhiS]:
    """Return a PHI-S with a mean, a scale and a rotation that all change something."""

    def make(channels: int) -> PhiS:
        generator = torch.Generator().manual_seed(channels)
        mean = torch.randn(channels, generator=generator)
        rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
        state = {
            "mean": mean,
            "scale": torch.tensor(2.5),
            "rotation": (hadamard(channels) * channels**-0.5).float() @ rotation,
        }
        return PhiS().load_state(state)

    return make
