import math

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import LossConfig
from radio_distill.distill.distances import feature_loss, summary_loss
from radio_distill.distill.losses import KINDS, Survivors, distillation_loss
from radio_distill.distill.views import warp_to_student
from radio_distill.errors import ConfigError
from radio_distill.types import Features

SUMMARY, FEATURE = ["cosine", "mse"], ["mse", "cosine", "am_radio"]


def encoder(batch: int, width: int, channels: int, grid: tuple[int, int], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    spatial = torch.randn(batch, channels, *grid, generator=generator)
    return Features(torch.randn(batch, width, generator=generator), spatial)


@pytest.fixture
def pair() -> tuple[dict[str, Features], dict[str, Features]]:
    """Student and teachers: a CLIP with another grid, a SAM without summary."""
    predictions = {"clip": encoder(3, 6, 8, (4, 6), 1), "sam": encoder(3, 6, 5, (4, 6), 2)}
    targets = {"clip": encoder(3, 6, 8, (3, 4), 3), "sam": encoder(3, 6, 5, (4, 6), 4)}
    targets["sam"] = targets["sam"]._replace(summary=None)
    return predictions, targets


def teacher(summary: float = 1.0, feature: float = 1.0) -> tuple[float, float]:
    return summary, feature


def loss_of(predictions, targets, config, weights, **options):
    """The loss, with weights given as ``{teacher: (summary, features)}``."""
    flat = {
        f"{name}/{kind}": value
        for name, pair in weights.items()
        for kind, value in zip(KINDS, pair, strict=True)
    }
    return distillation_loss(predictions, targets, dict.fromkeys(targets, config), flat, **options)


def test_distillation_loss__is_the_weighted_sum_by_hand(pair):
    predictions, targets = pair
    weights = {"clip": teacher(0.5, 2.0), "sam": teacher(1.0, 3.0)}
    report = loss_of(predictions, targets, LossConfig(), weights)

    clip, student = targets["clip"], predictions["clip"]
    summary = 1 - F.cosine_similarity(student.summary, clip.summary)
    shrunk = F.interpolate(student.spatial, (3, 4), mode="bilinear", antialias=True)
    clip_map = (shrunk - clip.spatial).square().mean((1, 2, 3))
    sam_map = (predictions["sam"].spatial - targets["sam"].spatial).square().mean((1, 2, 3))
    torch.testing.assert_close(report.total, 0.5 * summary + 2 * clip_map + 3 * sam_map)
    expected = {
        "clip/summary": summary.mean(),
        "clip/features": clip_map.mean(),
        "sam/features": sam_map.mean(),
    }
    assert report.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(report.terms[name], value)


@pytest.mark.parametrize("summary", SUMMARY)
@pytest.mark.parametrize("feature", FEATURE)
def test_distillation_loss__takes_the_losses_of_the_recipe(pair, summary, feature):
    predictions, targets = pair
    config = LossConfig(summary=summary, feature=feature)
    weights = {name: teacher() for name in targets}
    terms = loss_of(predictions, targets, config, weights).terms
    x, y = predictions["clip"].summary, targets["clip"].summary
    torch.testing.assert_close(terms["clip/summary"], summary_loss(config)(x, y).mean())
    x, y = predictions["sam"].spatial, targets["sam"].spatial
    torch.testing.assert_close(terms["sam/features"], feature_loss(config)(x, y).mean())


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rule", ["smaller", "larger", "student_down"])
def test_distillation_loss__takes_the_alignment_of_the_recipe(pair, rule, mode):
    predictions, targets = pair
    weights = {name: teacher() for name in targets}
    report = loss_of(predictions, targets, LossConfig(alignment=rule, interpolation=mode), weights)
    grid = (4, 6) if rule == "larger" else (3, 4)
    x, y = (
        F.interpolate(item["clip"].spatial, grid, mode=mode, antialias=True)
        for item in (predictions, targets)
    )
    torch.testing.assert_close(report.terms["clip/features"], F.mse_loss(x, y))


def test_distillation_loss__inner_blocks_are_asked_for_the_same_map(pair):
    predictions, targets = ({"sam": item["sam"]} for item in pair)
    level = torch.randn_like(predictions["sam"].spatial).requires_grad_()
    report = loss_of(
        predictions, targets, LossConfig(), {"sam": teacher(1, 3)}, inner={"sam": [(0.5, level)]}
    )
    last, inner = (
        (spatial - targets["sam"].spatial).square().mean((1, 2, 3))
        for spatial in (predictions["sam"].spatial, level)
    )
    torch.testing.assert_close(report.total, 3 * (last + 0.5 * inner))
    torch.testing.assert_close(report.terms["sam/features"], last.mean())
    torch.testing.assert_close(report.terms["sam/inner"], (0.5 * inner).mean().detach())


def test_distillation_loss__every_cell_counts_alike_where_tokens_do(pair):
    """Crops that lie apart share 24, 15 and 16 of the 24 cells, as a loop over all counts them."""
    predictions, targets = ({"sam": item["sam"]} for item in pair)
    shift = torch.tensor([[0.0, 0.0], [0.25, -1 / 6], [0.0, 1 / 3]])
    wanted, seen = warp_to_student(targets["sam"].spatial, shift)
    errors = (predictions["sam"].spatial - wanted).square().mean(1)
    cells = zip(errors.flatten(), seen.flatten(), strict=True)
    expected = sum(float(error) for error, is_seen in cells if is_seen)
    assert seen.sum((1, 2)).tolist() == [24, 15, 16]
    report = loss_of(
        predictions,
        targets,
        LossConfig(),
        {"sam": teacher()},
        shifts={"sam": shift},
        mean_cells={"sam": (24 + 15 + 16) / 3},
    )
    assert report.total.mean().item() == pytest.approx(expected / (24 + 15 + 16), rel=1e-5)


def test_distillation_loss__error_where_alignment_does_not_suit(pair):
    weights = {name: teacher() for name in pair[1]}
    with pytest.raises(ConfigError, match=r"teacher_down.*4x6"):
        loss_of(*pair, LossConfig(alignment="teacher_down"), weights)


def test_distillation_loss__micro_batches_add_up(pair):
    predictions, targets = pair
    weights = {name: teacher() for name in targets}

    def part(items, rows):
        return {
            name: Features(None if f.summary is None else f.summary[rows], f.spatial[rows])
            for name, f in items.items()
        }

    totals = [
        loss_of(part(predictions, rows), part(targets, rows), LossConfig(), weights).total
        for rows in (slice(0, 1), slice(1, 3))
    ]
    whole = loss_of(predictions, targets, LossConfig(), weights).total
    torch.testing.assert_close(torch.cat(totals), whole)


def test_distillation_loss__term_of_weight_0_is_left_out(pair):
    predictions, targets = pair
    predictions["clip"] = predictions["clip"]._replace(summary=None)
    weights = {"clip": teacher(summary=0), "sam": teacher(feature=0)}
    report = loss_of(predictions, targets, LossConfig(), weights)
    assert list(report.terms) == ["clip/features"]


def test_distillation_loss__error_where_nothing_is_asked_for(pair):
    weights = {"clip": teacher(0, 0), "sam": teacher(1, 0)}
    with pytest.raises(ConfigError, match="clip, sam"):
        loss_of(*pair, LossConfig(), weights)


def test_distillation_loss__gradient_reaches_every_prediction_and_no_target(pair):
    predictions, targets = pair
    leaves = [value.requires_grad_() for f in predictions.values() for value in f]
    weights = {name: teacher() for name in targets}
    report = loss_of(predictions, targets, LossConfig(), weights)
    assert not any(term.requires_grad for term in report.terms.values())
    *reached, sam_summary, sam_spatial = torch.autograd.grad(
        report.total.sum(), leaves, allow_unused=True
    )
    assert all(gradient.abs().sum() > 0 for gradient in (*reached, sam_spatial))
    assert sam_summary is None


def test_distillation_loss__shifted_crops_are_compared_where_both_show_the_image(pair):
    """The student's crop lies one cell below and two to the left of the teacher's."""
    predictions, targets = ({"sam": item["sam"]} for item in pair)
    shifts = {"sam": torch.tensor([[1 / 4, -2 / 6]]).expand(3, 2)}
    report = loss_of(predictions, targets, LossConfig(), {"sam": teacher()}, shifts=shifts)
    x, y = predictions["sam"].spatial[..., :3, 2:], targets["sam"].spatial[..., 1:, :4]
    expected = (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(report.total, expected, rtol=1e-5, atol=1e-5)


def test_distillation_loss__learned_weights(pair):
    predictions, targets = pair
    variances = {
        name: torch.tensor(0.5, requires_grad=True)
        for name in ("clip/summary", "clip/features", "sam/features")
    }
    weights = {name: teacher() for name in targets}
    report = loss_of(predictions, targets, LossConfig(), weights, log_variances=variances)
    plain = loss_of(predictions, targets, LossConfig(), weights)
    expected = plain.total * math.exp(-0.5) + 3 * math.log1p(math.exp(0.5))
    torch.testing.assert_close(report.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(report.terms, plain.terms)
    report.total.sum().backward()
    assert all(value.grad for value in variances.values())


def test_distillation_loss__float32_under_autocast(pair):
    predictions, targets = (
        {n: Features(*(v if v is None else v.bfloat16() for v in f)) for n, f in item.items()}
        for item in pair
    )
    weights = {name: teacher() for name in targets}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = loss_of(predictions, targets, LossConfig(), weights)
    assert report.total.dtype == torch.float32
    exact = loss_of(*pair, LossConfig(), weights)
    torch.testing.assert_close(report.total, exact.total, rtol=0.02, atol=0.02)


def test_distillation_loss__number_that_is_not_finite_shows_in_its_term(pair):
    targets = pair[1]
    targets["sam"].spatial[0, 0, 0, 0] = math.inf
    terms = loss_of(*pair, LossConfig(), {n: teacher() for n in targets}).terms
    finite = {name: bool(value.isfinite()) for name, value in terms.items()}
    assert finite == {"clip/summary": True, "clip/features": True, "sam/features": False}


def test_distillation_loss__each_teacher_has_its_own(pair):
    predictions, targets = pair
    clip = LossConfig(feature={"cosine": 0.9, "smooth_l1": 0.1})
    flat = {f"{name}/{kind}": 1.0 for name in targets for kind in KINDS}
    losses = {"clip": clip, "sam": LossConfig(feature="gram")}
    terms = distillation_loss(predictions, targets, losses, flat).terms
    for name, config in losses.items():
        alone = loss_of(
            {name: predictions[name]}, {name: targets[name]}, config, {name: teacher()}
        ).terms
        torch.testing.assert_close(terms[f"{name}/features"], alone[f"{name}/features"])


def test_distillation_loss__dropped_teachers_leave_the_mean_of_those_that_stay(pair):
    """UNIC's coefficients, image by image; images in two parts have the sum of the whole."""
    predictions, targets = pair
    predictions["dino"], targets["dino"] = encoder(3, 6, 4, (4, 6), 8), encoder(3, 6, 4, (4, 6), 9)
    weights = {"clip": teacher(0.5, 0.5), "sam": teacher(1, 1), "dino": teacher(0.5, 0.5)}
    others = torch.tensor([[True, False, False], [False, True, False]])  # [T - 1, B]
    alone = torch.stack(
        [
            loss_of({n: predictions[n]}, {n: targets[n]}, LossConfig(), {n: weights[n]}).total
            for n in targets
        ]
    )
    coefficients = torch.zeros(3, 3)
    for image in range(3):
        largest = int(alone[:, image].argmax())
        coefficients[largest, image] = 1
        rest = [row for row in range(3) if row != largest]
        for row, stays in zip(rest, others[:, image], strict=True):
            coefficients[row, image] = float(stays)
    assert coefficients.sum() == 5
    expected = (coefficients / 5 * alone).sum()
    survivors = Survivors(others, 3 / 5)
    total = loss_of(predictions, targets, LossConfig(), weights, survivors=survivors).total
    torch.testing.assert_close(total.sum() / 3, expected)
