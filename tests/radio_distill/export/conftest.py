"""Checkpoints of small students whose every number is random, so that a slip shows."""

import pytest
import torch

from radio_distill.config import Recipe, build
from radio_distill.export.folded import folded
from radio_distill.models.heads import build_student
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.checkpointer import save
from radio_distill.types import TeacherSpec

CHANNELS = {"clip": (12, 5), "sam": (8, None), "dino": (4, 4)}
LICENCES = {"clip": "apple-ascl (research only)", "sam": "apache-2.0", "dino": "dinov3-license"}


def _recipe(folder, normalizer, teachers, student, size):
    partition = {"name": "a", "size": size, "teachers": list(teachers), "batch_size": 2}
    recipe: Recipe = build(
        Recipe,
        {
            "name": "tiny",
            "output": str(folder),
            "data": {"shards": ["x"]},
            "student": {"head_hidden": 16, "head_layers": 1, "max_size": 512, **student},
            "teachers": {name: {"preset": f"preset_{name}"} for name in teachers},
            "normalizer": {"name": normalizer},
            "stages": {"stage1": {"steps": 7, "partitions": [partition]}},
        },
    )
    return recipe


def _spec(name):
    channels, summary = CHANNELS[name]
    half = (0.5, 0.5, 0.5)
    return TeacherSpec(
        name, channels, summary, 16, (224, 224), None, half, half, licence=LICENCES[name]
    )


def _randomise(model):
    """Give vectors random values too: new norms, biases and LayerScale are all 0, 1 or 1e-5."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if name.endswith(("norm1.weight", "norm2.weight")) else 0.0
            parameter.data.normal_(centre, 0.3)
    if hasattr(model.student, "prefix_tokens"):
        model.student.prefix_tokens.data.normal_()


@pytest.fixture
def make_checkpoint(tmp_path, random_statistics):
    """Write and open the checkpoint of a new student; its run folder is ``tmp_path / "tiny"``."""

    def make(
        normalizer="phi_s",
        stage="stage1",
        step=7,
        teachers=tuple(CHANNELS),
        size=(32, 48),
        **student,
    ):
        torch.manual_seed(0)
        student = {"architecture": "test_vit", **student}
        recipe = _recipe(tmp_path, normalizer, teachers, student, list(size))
        specs = {name: _spec(name) for name in teachers}
        model = build_student(recipe.student, specs)
        _randomise(model)
        statistics = random_statistics(recipe, {name: CHANNELS[name][0] for name in teachers})
        folder = checkpoints.folder_of(tmp_path / "tiny" / stage / "checkpoints", step)
        parts = {"student": model.state_dict(), "statistics": statistics}
        return checkpoints.read(save(Checkpoint(folder, step, "stage1", recipe, specs), parts, 3))

    return make


@pytest.fixture
def make_student(make_checkpoint):
    """Make a folded student out of a checkpoint."""

    def make(**fields):
        return folded(make_checkpoint(**fields))

    return make
