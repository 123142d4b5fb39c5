"""Depth and normals: chance for noise, the top for labels; what is done to images of NAVI."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import layouts
from radio_distill.errors import NoLayersError
from radio_distill.evals.depth_probes import NaviDepth, NaviNormals, NyuDepth, square_around
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.probe_training import encode
from radio_distill.types import Features

from .probe_sets import perfect_encoder, random_encoder

QUICK = {
    "quick": True,
    "steps": 60,
    "warmup_steps": 5,
    "images_per_step": 4,
    "crop": (32, 32),
}


def ramps(root: Path) -> str:
    """NAVI whose images lean in random directions, as grey as they are far: 0.4 m to 0.8 m."""
    layouts.navi(root, pictures=8)
    generator = np.random.default_rng(0)
    width, height = layouts.SIZE
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    for path in sorted(root.glob("*/*/images/*.jpg")):
        angle = generator.uniform(0, 2 * np.pi)
        ramp = x * np.cos(angle) + y * np.sin(angle)
        ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
        grey = np.repeat((255 * ramp[..., None]).round().astype(np.uint8), 3, axis=2)
        layouts.save(path, grey)
        inverse = (655.35 / (0.4 + 0.4 * ramp)).round().astype(np.uint16)
        layouts.save(path.parents[1] / "depth" / f"{path.stem}.png", inverse)
    return str(root)


def slopes(root: Path) -> str:
    """NAVI whose images are planes that lean, each in the colour of its normal."""
    layouts.navi(root, pictures=8)
    generator = np.random.default_rng(0)
    width, height = layouts.SIZE
    x, y = np.meshgrid(
        (np.arange(width) + 0.5 - width / 2) / 40, (np.arange(height) + 0.5 - height / 2) / 40
    )
    for path in sorted(root.glob("*/*/images/*.jpg")):
        normal = np.array([*generator.uniform(-0.7, 0.7, 2), 1.0])
        normal /= np.linalg.norm(normal)
        depth = 0.1 / (x * normal[0] + y * normal[1] + normal[2])  # a plane at 0.1 m
        colour = np.broadcast_to(128 + 120 * normal, (height, width, 3))
        layouts.save(path, colour.round().astype(np.uint8))
        inverse = (655.35 / depth).round().astype(np.uint16)
        layouts.save(path.parents[1] / "depth" / f"{path.stem}.png", inverse)
    return str(root)


def colours(cell: int) -> Encoder:
    def encode(pixels):
        return Features(None, F.avg_pool2d(2 * pixels - 1, cell))

    return Encoder("colours", encode, cell, inner=lambda p, n: [encode(p)] * n)


def values(benchmark, encoder) -> dict[str, float]:
    return {score.metric: score.value for score in benchmark.run(encoder)}


def test_navi_depth__perfect_features_at_the_top_and_noise_at_chance(tmp_path):
    fields = {"every": 1, "hidden": 16, "learning_rate": 0.01}
    probe = NaviDepth(data=ramps(tmp_path), **fields, **{**QUICK, "steps": 30})
    perfect, noise = values(probe, colours(16)), values(probe, random_encoder(16))
    assert perfect["d1_invariant"] > noise["d1_invariant"] + 20
    assert perfect["mean_share"] > noise["mean_share"] + 10
    assert perfect["mean_share"] == pytest.approx(
        sum(perfect[f"d{k}_invariant"] for k in (1, 2, 3)) / 3
    )


def test_navi_normals__perfect_features_at_the_top_and_noise_at_chance(tmp_path):
    fields = {"every": 1, "hidden": 16, "learning_rate": 0.01}
    probe = NaviNormals(data=slopes(tmp_path), **fields, **QUICK)
    perfect, noise = values(probe, colours(8)), values(probe, random_encoder(8))
    assert perfect["mean_share"] > noise["mean_share"] + 25


def test_nyu_depth__perfect_features_at_the_top_and_noise_at_chance(tmp_path):
    layouts.nyu_depth(tmp_path, train=6)
    fields = {**QUICK, "crop": (40, 48)}  # whole blocks
    probe = NyuDepth(data=str(tmp_path), learning_rate=0.05, **fields)
    perfect, noise = values(probe, perfect_encoder(8)), values(probe, random_encoder(8))
    assert perfect["d1"] > noise["d1"] + 20
    assert perfect["rmse"] < 0.7 * noise["rmse"]


def test_nyu_depth__each_layer_is_read_with_its_summary_in_each_cell(tmp_path):
    layouts.nyu_depth(tmp_path, train=6)
    silent = torch.zeros(1, 2, 5, 6)

    def knowing(pixels):
        summary = F.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return Features(summary, silent.expand(len(pixels), -1, -1, -1))

    def layers(pixels, count):
        class_tokens = pixels.mean((2, 3))
        return [
            Features(number * class_tokens, knowing(pixels).spatial + number)
            for number in range(count)
        ]

    encoder = Encoder("summary", knowing, 8, inner=layers)
    four = NyuDepth(data=str(tmp_path), learning_rate=0.05, **{**QUICK, "crop": (40, 48)})
    one = replace(four, num_layers=1)
    pixels = torch.randint(256, (2, 3, 40, 48), dtype=torch.uint8)
    (maps,) = encode(one, encoder, pixels)
    assert maps.shape == (2, 2 + 12, 5, 6)
    expected = knowing(pixels / 255).summary[:, :, None, None].expand(-1, -1, 5, 6)
    torch.testing.assert_close(maps[:, 2:], expected)
    for number, maps in enumerate(encode(four, encoder, pixels)):
        assert torch.equal(maps[:, :2], torch.full((2, 2, 5, 6), float(number)))
        tokens = number * (pixels / 255).mean((2, 3))
        torch.testing.assert_close(maps[:, 2:], tokens[:, :, None, None].expand(-1, -1, 5, 6))
    without = Encoder("map alone", lambda p: knowing(p)._replace(summary=None), 8)
    without = replace(without, inner=lambda p, n: [without(p)] * n)
    assert encode(one, without, pixels)[0].shape[1] == 2
    with pytest.raises(NoLayersError, match="'map alone' has layers without class token"):
        four.run(without)
    assert values(one, encoder)["rmse"] != values(four, encoder)["rmse"]
    (score, *_) = one.run(encoder)
    assert score.protocol.startswith("nyu_depth-lin1-60-quick@")


@pytest.mark.parametrize("kind", [NaviDepth, NaviNormals])
@pytest.mark.parametrize("as_published", [False, True])
def test_navi__trains_and_tests_squares_around_objects(tmp_path, kind, as_published):
    layouts.navi(tmp_path)
    probe = kind(data=str(tmp_path), crop=(32, 32), as_published=as_published)
    training, test = probe.images()
    assert (len(training), len(test)) == (3, 3), "every fourth of ten"
    example = probe.training_example(training[1], np.random.default_rng(0))
    assert example.pixels.shape == (3, 32, 32)
    (target,) = example.labels.values()
    on = target.any(dim=0) if target.ndim == 3 else target > 0
    assert on.any(dim=0).sum() > 26, "the object reaches from side to side"
    assert example.pixels[:, ~on].float().mean() < 0.5 * example.pixels[:, on].float().mean()
    again = probe.training_example(training[1], np.random.default_rng(0))
    assert torch.equal(again.pixels, example.pixels)


def test_navi_depth__is_relative(tmp_path):
    probe = NaviDepth(data=ramps(tmp_path), crop=(40, 40), every=1)
    example = probe.test_example(probe.images()[1][0])
    grey, depth = example.pixels[0] / 255.0, example.labels["depth"]
    expected = 0.01 + 0.99 * (grey - grey.min()) / (grey.max() - grey.min())
    torch.testing.assert_close(depth, expected, atol=0.03, rtol=0)
    on = depth[depth > 0]
    assert float(on.min()) == pytest.approx(0.01)
    assert float(on.max()) == pytest.approx(1.0)


def test_navi_normals__point_where_the_plane_does(tmp_path):
    probe = NaviNormals(data=slopes(tmp_path), crop=(40, 40), every=1)
    for image in probe.images()[1][:4]:
        example = probe.test_example(image)
        normals = example.labels["normals"]
        known = normals.any(dim=0)
        colour = example.pixels[:, known].float().median(dim=1).values / 120 - 128 / 120
        angle = F.cosine_similarity(normals[:, known].T, colour[None]).acos().rad2deg()
        assert float(angle.median()) < 2, "colours have 8 bits, depth has 16"


def test_navi__as_published_keeps_one_order(tmp_path):
    probe = NaviDepth(data=str(layouts.navi(tmp_path)))
    assert probe.shuffles
    assert not replace(probe, as_published=True).shuffles


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 20, 12, 16), ((10, 20), (9, 19))),
        ((4, 6, 4, 30), ((4, 30), (4, 30))),
        ((0, 0, 0, 0), ((4, 36), (4, 36))),
    ],
)
def test_square_around__holds_the_object_and_stays_inside(box, expected):
    top, bottom, left, right = box
    mask = torch.zeros(40, 40)
    mask[top:bottom, left:right] = 1
    rows, columns = square_around(mask > 0, 32)
    assert ((rows.start, rows.stop), (columns.start, columns.stop)) == expected


def test_run__an_encoder_without_inner_layers_gets_no_score(tmp_path, caplog):
    nyu = NyuDepth(data=str(layouts.nyu_depth(tmp_path)), steps=1, quick=True)
    assert nyu.run(Encoder("flat", lambda pixels: None, 16)) == []
    assert "flat" in caplog.text
