"""What the tests of students share."""

import pytest

from radio_distill.config import StudentConfig


@pytest.fixture
def student_config():
    """Make the config of a student of width 192 whose table spans 256 px."""

    def make(**fields):
        defaults = {"architecture": "vit_tiny_patch16_224", "max_size": 256, "head_hidden": 16}
        return StudentConfig(**{**defaults, **fields})

    return make
