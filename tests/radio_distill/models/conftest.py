"""Small students with random weights, and a hand-made set of teachers."""

import pytest
import torch

from radio_distill.models.student import Student
from radio_distill.types import TeacherSpec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_student(student_config):
    """Make a student with two summary tokens, of which only the first three blocks are kept."""

    def make(**fields):
        config = student_config(**fields)
        student = Student(config, num_summary_tokens=2)
        del student.blocks[3:]
        return student

    return make


@pytest.fixture
def teachers():
    """Return one teacher with a summary and one without."""
    shared = {
        "patch_size": 14,
        "native_size": (224, 224),
        "max_size": None,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return {
        "clip": TeacherSpec(name="clip", channels=6, summary_channels=5, **shared),
        "sam": TeacherSpec(name="sam", channels=4, summary_channels=None, **shared),
    }
