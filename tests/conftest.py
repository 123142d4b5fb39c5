"""A run folder with random weights, for what reads runs."""

import signal
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# A machine with other work fails no test. Properties meet the same examples at every run;
# --hypothesis-profile=explore looks for others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True, database=None)
settings.load_profile("same")

# Where the tests run in the background of a shell, Ctrl-C is ignored, and so in what they start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

LICENCES = {"clip": "mit", "sam": "apache-2.0", "dino": "dinov3-license"}
CHANNELS = {"clip": (12, 5), "sam": (8, None), "dino": (4, 4)}
"""Teacher: (channels, summary channels)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest of the last files, lest a worker waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_triton_kernels.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Skip what needs the extra `hf` where it is not installed."""
    return (yield from _skipping_without_transformers())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip what needs the extra `hf` where it is not installed."""
    return (yield from _skipping_without_transformers())


def _skipping_without_transformers() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except Exception as error:
        if _has_transformers() or "transformers" not in f"{error} {error.__cause__}":
            raise
        pytest.skip(f"needs transformers: {error}")


def _has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


class Trap:
    """What makes the file ``ran`` where its pickle is loaded."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.ran), "w")


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    """An object whose pickle runs code: ``trap.ran.exists()`` where it did."""
    return Trap(tmp_path / "ran")


@pytest.fixture(autouse=True)
def own_seed(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers alone, in another order, and beside other tests."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def float32_for_auto() -> Iterator[Callable[..., str]]:
    """`auto` is float32 in tests, so that their numbers are the same on every processor.

    Gives what it is otherwise; tests of `auto` itself ask for :func:`own_dtype`.
    """
    from radio_distill.system import precision

    original = precision.native_dtype
    precision.native_dtype = lambda device: "float32"
    yield original
    precision.native_dtype = original


@pytest.fixture
def own_dtype(
    float32_for_auto: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """`auto` is what the device computes natively, as everywhere but in tests."""
    monkeypatch.setattr("radio_distill.system.precision.native_dtype", float32_for_auto)
    return float32_for_auto


@pytest.fixture
def random_statistics() -> Callable[..., dict[str, torch.Tensor]]:
    """Statistics of random features: of a recipe and its teachers' channels, by name."""

    def make(recipe: Any, channels: dict[str, int]) -> dict[str, torch.Tensor]:
        from radio_distill.normalize import NORMALIZERS
        from radio_distill.normalize.statistics import Moments

        tensors = {}
        for name, kind in recipe.normalizers.items():
            if name not in channels:
                continue
            normalizer, moments = NORMALIZERS.get(kind)(), Moments(channels[name])
            mixed = torch.randn(200, channels[name]) @ torch.randn(channels[name], channels[name])
            moments.update((mixed + 3).T[None, :, :, None])
            normalizer.fit(moments)
            tensors |= {f"{name}/{key}": value for key, value in normalizer.state().items()}
        return tensors

    return make


@pytest.fixture
def write_run(
    tmp_path: Path, random_statistics: Callable[..., dict[str, torch.Tensor]]
) -> Callable[..., Path]:
    """Write the checkpoint of a student that no step has trained; returns its run folder.

    Every number is random, norms and LayerScale included, so that a slip shows.
    """

    def write(
        name: str = "run", stage: str = "stage1", summaries: str = "none", **student: Any
    ) -> Path:
        from radio_distill.config import Recipe, build
        from radio_distill.models.heads import build_student
        from radio_distill.train.checkpoint import Checkpoint
        from radio_distill.train.checkpointer import save
        from radio_distill.types import TeacherSpec
        from radio_distill.weights.pretrained import initialise

        torch.manual_seed(len(name))
        partition = {"name": "a", "size": [64, 96], "teachers": list(CHANNELS), "batch_size": 2}
        recipe = build(
            Recipe,
            {
                "name": name,
                "output": str(tmp_path),
                "data": {"shards": ["x"]},
                "student": {
                    "architecture": "test_vit",
                    "max_size": 256,
                    "registers": 2,
                    "head_hidden": 16,
                    **student,
                },
                "teachers": {teacher: {"preset": f"preset_{teacher}"} for teacher in CHANNELS},
                "normalizer": {"summary": summaries},
                "stages": {stage: {"steps": 7, "partitions": [partition]}},
            },
        )
        half = (0.5, 0.5, 0.5)
        specs = {
            teacher: TeacherSpec(
                teacher, *sizes, 16, (64, 64), None, half, half, licence=LICENCES[teacher]
            )
            for teacher, sizes in CHANNELS.items()
        }
        model = build_student(recipe.student, specs, initialise=initialise)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(1, 0.3)
        if recipe.student.body == "vit":
            model.student.prefix_tokens.data.normal_()
        widths = {key: sizes[0] for key, sizes in CHANNELS.items()}
        widths |= {f"{key}.summary": sizes[1] for key, sizes in CHANNELS.items() if sizes[1]}
        statistics = random_statistics(recipe, widths)
        parts = {"student": model.state_dict(), "statistics": statistics}
        folder = tmp_path / name / stage / "checkpoints" / "step-00000007"
        save(Checkpoint(folder, 7, stage, recipe, specs), parts, 3)
        return tmp_path / name

    return write
