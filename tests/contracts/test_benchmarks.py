"""What every registered benchmark owes its users."""

import dataclasses
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.errors import ConfigError
from radio_distill.evals.cost import parts_of
from radio_distill.evals.datasets import DATASETS
from radio_distill.evals.encoder import Encoder, Heads, Target
from radio_distill.evals.run import BENCHMARKS, make
from radio_distill.evals.trained import TrainedBenchmark
from radio_distill.protocols import Benchmark
from radio_distill.types import Features

PROBE = {"steps": 3, "images_per_step": 2, "crop": [32, 32]}
OPTIONS = {
    "ade20k": {**PROBE, "fit": [48, 32]},
    "coco_detection": {**PROBE, "width": 64},
    "feature_preservation": {"steps": 5},
    "imagenet_knn": {"k": 2},
    "knn": {"k": 2},
    "navi_correspondence": {"size": 40, "stride": 4},
    "navi_depth": {**PROBE, "every": 1, "hidden": 8},
    "navi_normals": {**PROBE, "every": 1, "hidden": 8},
    "nyu_depth": PROBE,
    "nyud": PROBE,
    "pascal_context": PROBE,
    "rgbd_correspondence": {"size": 40, "stride": 4},
    "segmentation": {"steps": 5},
    "spair": {"size": 48},
    "stereo": {"stride": 32},
    "voc": {**PROBE, "fit": [48, 32]},
}


class FakeTeacher:
    """What fidelity compares heads with."""

    def encode(self, pixels):
        return Features(None, F.avg_pool2d(pixels, 16))


def _heads(pixels):
    return {"fake": Features(None, F.avg_pool2d(pixels, 8) + 0.1)}


HEADS = Heads(_heads, {"fake": Target(FakeTeacher(), (32, 32))})


class FakeText:
    """Texts in the space of mean colours."""

    def embed(self, texts):
        return torch.tensor([[len(text), text.count("a"), text.count("e")] for text in texts])


def _encode(pixels):
    assert torch.is_inference_mode_enabled(), "an encoder under test must not keep gradients"
    spatial = F.avg_pool2d(pixels, 8)
    return Features(spatial.mean(dim=(2, 3)), spatial)


def _layers(pixels, count):
    return [_encode(pixels)] * count


PARTS = {
    "heads": HEADS,
    "inner": _layers,
    "text": FakeText(),
    "before": Encoder("coarse", _encode, 8),
}
"""What some benchmarks ask of an encoder beside its map."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvaluationConfig:
    """Data of every kind, tiny."""
    root: Path = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(4):
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            mask = random.integers(0, 3, (40, 48), dtype=np.uint8)
            for folder, array in (
                (f"images_{split}", pixels),
                (f"labels/{split}/class_{index % 2}", pixels),
                (f"segmentation/images/{split}", pixels),
                (f"segmentation/masks/{split}", mask),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / f"{index}.png")
    return EvaluationConfig(
        images=str(root / "images_val"),
        labels=str(root / "labels"),
        segmentation=str(root / "segmentation"),
        data={name: str(getattr(layouts, name)(root / name)) for name in DATASETS.names()},
        size=16,
        dense_size=32,
        options=OPTIONS | _decoder(root),
    )


def _decoder(root: Path) -> dict[str, dict[str, str]]:
    return (
        {"sam_coco": {"decoder": str(layouts.sam(root / "sam"))}}
        if find_spec("transformers")
        else {}
    )


@pytest.fixture(params=BENCHMARKS.names())
def benchmark_name(request) -> str:
    if request.param == "stereo":
        pytest.importorskip("skimage")
    if request.param == "coco_detection":
        pytest.importorskip("faster_coco_eval")
    if request.param == "sam_coco":
        pytest.importorskip("transformers")
        pytest.importorskip("faster_coco_eval")
    return request.param


def test_benchmark__satisfies_the_protocol(benchmark_name, config):
    benchmark = make(benchmark_name, config)
    assert isinstance(benchmark, Benchmark)
    assert benchmark.name == benchmark_name


def test_benchmark__scores_are_complete_finite_and_repeatable(benchmark_name, config):
    encoder = Encoder("mean colour", _encode, 8, **PARTS)
    scores = make(benchmark_name, config).run(encoder, 3)
    assert scores
    assert len({score.name for score in scores}) == len(scores)
    for score in scores:
        assert score.benchmark == benchmark_name
        assert math.isfinite(score.value)
        assert 1 <= score.num_samples <= 3
        assert score.group
        assert score.unit != "%" or -100 <= score.value <= 100 or not score.higher_is_better
    assert make(benchmark_name, config).run(encoder, 3) == scores


def test_benchmark__takes_an_encoder_without_summary_and_with_a_patch_of_its_own(
    benchmark_name, config
):
    def encode(pixels):
        return Features(None, F.avg_pool2d(pixels, 14))

    def layers(pixels, count):  # class tokens, which are no summary
        return [Features(pixels.mean((2, 3)), encode(pixels).spatial)] * count

    encoder = Encoder("no summary", encode, 14, heads=HEADS, inner=layers, text=FakeText())
    scores = make(benchmark_name, config).run(encoder, 3)
    assert all(math.isfinite(score.value) for score in scores)


def test_benchmark__progress_ends_at_the_total(benchmark_name, config):
    calls = []
    encoder = Encoder("mean colour", _encode, 8, **PARTS)
    make(benchmark_name, config).run(encoder, 3, lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


def test_benchmark__its_demand_is_what_a_run_encodes(benchmark_name, config):
    seen = 0

    def counted(encode):
        def call(pixels, *further):
            nonlocal seen
            seen += len(pixels)
            return encode(pixels, *further)

        return call

    heads = dataclasses.replace(HEADS, predict=counted(_heads))
    parts = {"heads": heads, "inner": counted(_layers), "text": FakeText()}
    benchmark = make(benchmark_name, config)
    demand = benchmark.demand(parts_of(benchmark_name, config)[0], 3)
    benchmark.run(Encoder("counted", counted(_encode), 8, **parts), 3)
    if isinstance(benchmark, TrainedBenchmark):
        seen -= 1  # by which the heads learn how many channels there are
    elif benchmark_name in (
        "spair",
        "cam",
        "imagenet_cam",
    ):  # pairs share images; not all are right
        assert seen <= demand.num_passes
        return
    assert seen == demand.num_passes


def test_benchmark__every_source_is_a_field_and_an_empty_one_is_named(benchmark_name, config):
    sources = BENCHMARKS.get(benchmark_name).sources.values()
    for field in sources:
        if field.startswith("data."):
            with pytest.raises(ConfigError, match=rf"evaluation\.{field} is empty"):
                make(benchmark_name, dataclasses.replace(config, data={}))
        elif isinstance(getattr(config, field), str):
            with pytest.raises(ConfigError, match=rf"evaluation\.{field} is empty"):
                make(benchmark_name, dataclasses.replace(config, **{field: ""}))
