"""Benchmarks that train nothing: two processes share the images and get the scores of one."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.errors import DataError
from radio_distill.evals.encoder import Encoder, Heads, Target
from radio_distill.evals.run import evaluate
from radio_distill.system.distributed import share_out
from radio_distill.types import Features

BENCHMARKS = (
    "agreement", "correspondence", "fidelity", "imagenet_cam", "imagenet_knn",
    "navi_correspondence", "rgbd_correspondence", "segmentation", "spair",
)  # fmt: skip
OPTIONS = {
    "agreement": {"scales": [1.0, 2.0], "batch_size": 2},
    "correspondence": {"query_stride": 8},
    "fidelity": {"batch_size": 2},
    "imagenet_cam": {"batch_size": 2},
    "imagenet_knn": {"k": 2, "batch_size": 3},
    "navi_correspondence": {"size": 40, "every": 2},
    "rgbd_correspondence": {"size": 40},
    "segmentation": {"steps": 5, "batch_size": 3},
    "spair": {"size": 48},
}


def teacher(pixels: torch.Tensor) -> Features:
    return Features(pixels.mean(dim=(2, 3)), F.avg_pool2d(pixels, 8))


class Teacher:
    encode = staticmethod(teacher)


def answers(config: EvaluationConfig) -> tuple[dict[str, float], int]:
    """Return all scores, and how many images were encoded for them."""
    weight = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = 0

    def encode(pixels: torch.Tensor) -> Features:
        nonlocal seen
        seen += len(pixels)
        spatial = F.conv2d(pixels, weight, stride=8)
        return Features(spatial.mean(dim=(2, 3)), spatial)

    def predict(pixels: torch.Tensor) -> dict[str, Features]:
        summary, spatial = encode(pixels)
        return {"one": Features(summary[:, :3], spatial[:, :3])}

    heads = Heads(predict, {"one": Target(Teacher(), (32, 32))})
    scores = evaluate(Encoder("random", encode, 8, heads=heads), config)
    return {f"{score.name} {score.protocol}": score.value for score in scores}, seen


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvaluationConfig:
    root = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (root / "segmentation" / folder / split).mkdir(parents=True)
        for number in range(5):
            colours = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            for folder, array in (("images", colours), ("masks", colours[..., 0] % 3)):
                path = root / "segmentation" / folder / split / f"{number}.png"
                Image.fromarray(array).save(path)
    sets = ("imagenet", "navi", "redwood", "spair")
    return EvaluationConfig(
        benchmarks=BENCHMARKS,
        images=str(root / "segmentation/images/val"),
        segmentation=str(root / "segmentation"),
        segmentation_ignore=(),
        data={name: str(getattr(layouts, name)(root / name)) for name in sets},
        size=32,
        dense_size=32,
        options=OPTIONS,
    )


def failing(own):
    for item in own:
        if item == 3:
            raise DataError("image 3 is damaged")
        yield item


def answer_on_rank(rank: int, config: EvaluationConfig):
    with pytest.raises(DataError, match="image 3"):
        share_out(range(6), failing)
    assert share_out(range(3), failing) == [0, 1, 2]
    assert share_out(range(0), failing) == []
    return answers(config)


@pytest.mark.distributed
def test_evaluate__two_processes_share_the_images_and_get_the_scores_of_one(config, two_processes):
    expected, whole = answers(config)
    found, shares = zip(*two_processes(answer_on_rank, config), strict=True)
    assert found == (expected, expected)
    assert {name.partition("/")[0] for name in expected} == set(BENCHMARKS)
    assert sum(shares) == whole
    assert max(shares) < 0.7 * whole
