"""What the tests of the library share."""

from collections.abc import Iterator

import pytest

from radio_distill.config import StudentConfig

from ..pair import Pair, join


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Pair]:
    """Two processes of one group: ``two_processes(function, *arguments)`` gives both answers."""
    pair = Pair(join)
    yield pair
    pair.leave()


@pytest.fixture
def student_config():
    """Make the config of a student of width 192 whose table spans 256 px."""

    def make(**fields):
        defaults = {"architecture": "vit_tiny_patch16_224", "max_size": 256, "head_hidden": 16}
        return StudentConfig(**{**defaults, **fields})

    return make
