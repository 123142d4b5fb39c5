"""What the tests of students share."""

from collections.abc import Callable

import pytest

from radio_distill.config import StudentConfig


@pytest.fixture
def student_config() -> Callable[..., StudentConfig]:
    """Make the config of a student of width 192 whose table spans 256 px."""

    def make(**fields: object) -> StudentConfig:
        defaults = {"architecture": "vit_tiny_patch16_224", "max_size": 256, "head_hidden": 16}
        return StudentConfig(**{**defaults, **fields})

    return make
