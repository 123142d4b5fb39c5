"""What a suite is said to cost; that a run encodes as much is tests/contracts' to show."""

import torch
from torch import nn

from radio_distill.config import EvaluationConfig
from radio_distill.evals.cost import counted, priced
from radio_distill.evals.encoder import Encoder
from radio_distill.plan.meter import fake_tensors
from radio_distill.plan.time import DEVICES
from radio_distill.types import Features

CHANNELS, PATCH = 8, 16


def test_counted__is_the_published_sets_where_no_data_is_named():
    found, left_out = counted(EvaluationConfig(), "published")
    assert left_out.keys() == {"sam_coco"}
    assert not any(one.is_named for one in found.values())
    assert found["imagenet_knn"].demand.num_passes == 1_281_167 + 50_000
    assert found["imagenet_knn"].demand.products == 1_281_167 * 50_000
    assert found["nyu_depth"].demand.num_passes == 38_400 * 16 + 2 * 654
    assert found["navi_depth"].demand.images == 2_055 + 575
    assert found["voc"].demand.images == 10_582 + 1_449


def test_counted__quick_is_a_part_of_every_set():
    found, _ = counted(EvaluationConfig(), "quick")
    assert found["ade20k"].demand.images == 120
    assert found["ade20k"].demand.steps == 400
    assert {"knn", "segmentation", "agreement", "feature_preservation"}.isdisjoint(found)


def test_priced__operations_are_those_of_the_encoder():
    found, _ = counted(EvaluationConfig(), "published")
    with fake_tensors():
        layer = nn.Conv2d(3, CHANNELS, PATCH, PATCH)

        def encode(pixels: torch.Tensor) -> Features:
            spatial = layer(pixels)
            return Features(spatial.mean(dim=(2, 3)), spatial)

        encoder = Encoder("one layer", encode, PATCH)
        prices = {name: priced(found, encoder, DEVICES[name]) for name in ("h100", "cpu")}
    for name, price in prices["h100"].items():
        areas = sum(h * w * count for (h, w), count in price.demand.passes.items())
        assert price.flops == 2 * 3 * CHANNELS * areas
        assert price.flops == prices["cpu"][name].flops
        assert 0 < price.seconds < prices["cpu"][name].seconds
    assert prices["h100"]["navi_depth"].demand.passes.keys() == {(512, 512)}
