"""Relational losses equal their formulas, pair by pair and triple by triple."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from radio_distill.distill.relations import RELATIONS, arkd, relate, rkd_angle, rkd_distance

DOUBLE = torch.float64


def pair(images=6, channels=5, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, images, channels, dtype=DOUBLE, generator=generator) * 3
    return draw[0], draw[1]


def huber(error: float) -> float:
    return error * error / 2 if abs(error) < 1 else abs(error) - 0.5


def relative_distances(x: torch.Tensor) -> dict[tuple[int, int], float]:
    distances = {
        (i, j): float((x[i] - x[j]).norm()) for i, j in itertools.permutations(range(len(x)), 2)
    }
    mean = sum(distances.values()) / len(distances)
    return {key: value / mean for key, value in distances.items()}


def test_rkd_distance__equals_the_sum_over_pairs():
    x, y = pair()
    ours, theirs = relative_distances(x), relative_distances(y)
    expected = sum(huber(ours[key] - theirs[key]) for key in ours) / len(ours)
    assert rkd_distance(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_arkd__near_pairs_are_only_pulled_and_far_ones_only_pushed():
    x, y = pair()
    ours, theirs = relative_distances(x), relative_distances(y)
    median = sorted(theirs.values())[(len(theirs) - 1) // 2]
    expected = 0.0
    for key, wanted in theirs.items():
        shrink, expand = max(ours[key] - wanted, 0), max(wanted - ours[key], 0)
        expected += huber(shrink) if wanted < median else huber(expand)
    assert arkd(x, y).item() == pytest.approx(expected / len(ours), rel=1e-9)


def test_rkd_angle__equals_the_sum_over_triples():
    x, y = pair(5)

    def corner(of, i, j, k):
        return F.cosine_similarity(of[i] - of[j], of[k] - of[j], dim=0).item()

    triples = list(itertools.permutations(range(5), 3))
    expected = sum(huber(corner(x, *three) - corner(y, *three)) for three in triples)
    assert rkd_angle(x, y).item() == pytest.approx(expected / len(triples), rel=1e-9)


@pytest.mark.parametrize("name", RELATIONS)
def test_relation__is_the_same_in_any_order_of_images(name):
    """In float32 too, where a product of matrices may round a pair and its mirror image apart."""
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, 5, 16, generator=generator)
        order = torch.randperm(5, generator=generator)
        loss = RELATIONS[name](x, y).item()
        assert RELATIONS[name](x[order], y[order]).item() == pytest.approx(loss, rel=1e-5), seed


@pytest.mark.parametrize("name", RELATIONS)
def test_relations__are_blind_to_place_turn_and_size(name):
    """And so to a student's width: the teacher's summaries may have another."""
    x, y = pair()
    rotation = torch.linalg.qr(pair(5)[0]).Q
    loss = RELATIONS[name]
    torch.testing.assert_close(loss(x, y), loss(7 * x @ rotation + 3, y))
    assert loss(x, torch.cat([2 * x, torch.ones(6, 3)], 1)) < 1e-12
    assert loss(x, y) > 1e-3


@pytest.mark.parametrize("name", RELATIONS)
def test_relations__gradients(name):
    x, y = pair(4, 3)
    assert torch.autograd.gradcheck(lambda x: RELATIONS[name](x, y), x.requires_grad_())


@pytest.mark.parametrize("name", RELATIONS)
def test_relations__of_one_image_and_of_equal_ones_have_a_finite_gradient(name):
    x, y = pair(3)
    x[1] = x[0]
    y[2] = y[0]
    for ours, theirs in ((x, y), (x[:1], y[:1]), (torch.ones(3, 5), y.float())):
        relation = relate({name: 1.0}, ours, theirs)
        assert relation.value.isfinite()
        assert relation.slopes.isfinite().all()
    assert relate({name: 1.0}, x[:1], y[:1]).value == 0


def test_relation__parts_of_a_batch_have_the_gradient_of_the_whole():
    x, y = pair(7)
    weights = {"arkd": 0.3, "rkd_angle": 2.0}
    x.requires_grad_()
    whole = sum(weight * RELATIONS[name](x, y) for name, weight in weights.items())
    (expected,) = torch.autograd.grad(whole, x)
    relation = relate(weights, x, y)
    parts = [relation.of(x[start:stop], start) for start, stop in ((0, 3), (3, 4), (4, 7))]
    mean = torch.cat(parts).mean()
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, x)[0], expected)


def test_relation__float32_keeps_distances_far_from_the_origin():
    """Summaries with a common part that is a thousand times as long as what tells them apart."""
    x, y = pair(8, 64)
    exact = rkd_distance(x, y).item()
    moved = rkd_distance((x + 3000).float(), y.float()).item()
    assert math.isclose(moved, exact, rel_tol=1e-3)
