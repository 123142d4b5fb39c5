"""Several tasks at once: chance for noise, the top for labels."""

import pytest
import torch

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.evals.run import make

from .probe_sets import perfect_encoder, random_encoder

OPTIONS = {
    "quick": True,
    "steps": 60,
    "images_per_step": 3,
    "crop": [40, 48],
    "learning_rate": 0.02,
}


def values(name, folder, encoder, **options) -> dict[str, float]:
    config = EvaluationConfig(data={name: str(folder)}, options={name: {**OPTIONS, **options}})
    return {score.metric: score.value for score in make(name, config).run(encoder)}


def test_nyud__perfect_features_at_the_top_and_noise_at_chance(tmp_path):
    layouts.nyud(tmp_path, train=6)
    perfect = values("nyud", tmp_path, perfect_encoder())
    noise = values("nyud", tmp_path, random_encoder())
    assert perfect["semseg_miou"] > 3 * noise["semseg_miou"]
    assert perfect["semseg_miou"] > 8, "four of forty classes are shown, the others count as 0"
    assert perfect["depth_rmse"] < 0.5 * noise["depth_rmse"]
    assert perfect["normals_mean"] < 0.5 * noise["normals_mean"]


def test_pascal_context__perfect_features_at_the_top_and_noise_at_chance(tmp_path):
    pytest.importorskip("scipy")
    layouts.pascal_context(tmp_path, train=6)
    perfect = values("pascal_context", tmp_path, perfect_encoder())
    noise = values("pascal_context", tmp_path, random_encoder())
    assert perfect["semseg_miou"] > 12, "three of 21 classes are shown"
    assert perfect["semseg_miou"] > 2 * noise["semseg_miou"]
    assert perfect["parts_miou"] > 35, "three of seven are shown"
    assert perfect["saliency_maxf"] > 90 > noise["saliency_maxf"]
    assert perfect["normals_mean"] < 0.6 * noise["normals_mean"]
    published = values("pascal_context", tmp_path, perfect_encoder(), as_published=True)
    assert published.pop("saliency_maxf") != perfect.pop("saliency_maxf")
    assert published == perfect


def test_losses__a_task_that_no_picture_shows_loses_nothing(tmp_path):
    pytest.importorskip("scipy")
    layouts.pascal_context(tmp_path)
    probe = make("pascal_context", EvaluationConfig(data={"pascal_context": str(tmp_path)}))
    outputs = {name: torch.randn(1, n, 5, 6, requires_grad=True) for name, n in probe.tasks.items()}
    labels = {name: it[None] for name, it in probe.images()[0][1].labels().items()}
    losses = probe.losses(outputs, labels)
    assert losses["parts"] == 0, "the second image has no people"
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert not outputs["parts"].grad.any()
    assert outputs["segmentation"].grad.any()
