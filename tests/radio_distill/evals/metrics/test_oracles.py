"""Metrics against independent programs, and against cases whose answer is known."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from radio_distill.evals import losses
from radio_distill.evals.metrics import IGNORED
from radio_distill.evals.metrics.classification import (
    average_drop,
    average_increase,
    recalls_both_ways,
    top_k_accuracy,
)
from radio_distill.evals.metrics.depth import align_scale_and_shift, depth_errors
from radio_distill.evals.metrics.detection import area_classes, mask_iou, mean_iou_by_area
from radio_distill.evals.metrics.matching import (
    pck_per_image,
    pck_per_point,
    ratio_matches,
    transfer_errors,
)
from radio_distill.evals.metrics.normals import angles_between, normals_from_depth
from radio_distill.evals.metrics.segmentation import MaxF, confusion_matrix, mean_iou

CLASSES = 7


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def labels_with_gaps(generator):
    """Predictions and targets: class 3 nowhere, class 5 in no target, some pixels ignored."""
    drawn = torch.randint(0, CLASSES, (2, 4, 20, 20), generator=generator)
    drawn = drawn.where(drawn != 3, 0)
    prediction, target = drawn
    target = target.where(target != 5, 1)
    return prediction, target.where(torch.rand(target.shape, generator=generator) > 0.1, IGNORED)


def test_mean_iou__torchmetrics_and_scikit_learn(generator):
    from torchmetrics.classification import MulticlassJaccardIndex  # it takes seconds to import

    prediction, target = labels_with_gaps(generator)
    confusion = confusion_matrix(prediction, target, CLASSES)
    jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)(prediction, target).item()
    assert mean_iou(confusion, "met") == pytest.approx(jaccard, abs=1e-6)
    known = target != IGNORED
    truth, found = target[known].numpy(), prediction[known].numpy()
    shown = np.unique(truth)
    expected = sklearn_metrics.jaccard_score(truth, found, labels=shown, average="macro")
    assert mean_iou(confusion, "shown") == pytest.approx(expected, abs=1e-9)
    assert mean_iou(confusion, "all") == pytest.approx(jaccard * 6 / 7, abs=1e-6)


def test_top_k_accuracy__scikit_learn(generator):
    scores = torch.rand(50, CLASSES, generator=generator)
    truth = torch.randint(0, CLASSES, (50,), generator=generator)
    for k in (1, 3):
        expected = sklearn_metrics.top_k_accuracy_score(
            truth.numpy(), scores.numpy(), k=k, labels=range(CLASSES)
        )
        assert top_k_accuracy(scores, truth, k) == pytest.approx(expected)


def test_depth_errors__scikit_learn_picture_by_picture(generator):
    prediction, target = torch.rand(2, 3, 12, 15, generator=generator) * 5 + 0.1
    target = target * (torch.rand(target.shape, generator=generator) > 0.2)
    errors = depth_errors(prediction, target)
    for one, (p, t) in enumerate(zip(prediction, target, strict=True)):
        p, t = p[t > 0].double().numpy(), t[t > 0].double().numpy()
        expected = {
            "rmse": sklearn_metrics.root_mean_squared_error(t, p),
            "abs_rel": sklearn_metrics.mean_absolute_percentage_error(t, p),
        }
        for name, value in expected.items():
            assert getattr(errors, name)[one].item() == pytest.approx(value, rel=1e-5)


def test_depth_errors__no_target_is_nan_and_a_negative_depth_is_wrong():
    errors = depth_errors(torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]]]),
                                  torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]]))  # fmt: skip
    assert errors.d3[0] == 0.5
    assert errors.rmse[1].isnan()


def test_align_scale_and_shift__least_squares_and_exact(generator):
    truth = torch.rand(2, 9, 8, generator=generator) + 0.5
    affine = (truth - 3) / 1.7
    torch.testing.assert_close(align_scale_and_shift(affine, truth), truth)
    prediction = torch.rand(2, 9, 8, generator=generator)
    known = torch.rand(truth.shape, generator=generator) > 0.3
    aligned = align_scale_and_shift(prediction, truth * known)
    for p, t, keep, result in zip(prediction, truth, known, aligned, strict=True):
        columns = np.stack([p[keep].numpy(), np.ones(int(keep.sum()))], axis=1)
        (scale, shift), *_ = np.linalg.lstsq(columns, t[keep].numpy(), rcond=None)
        np.testing.assert_allclose(result.numpy(), scale * p.numpy() + shift, atol=1e-5)


def test_normals_from_depth__those_of_a_plane():
    """z = d / (n · ray) for a plane n · x = d; its normal away from the camera is n."""
    normal = torch.tensor([0.3, -0.2, 0.9])
    normal /= normal.norm()
    height, width, focal = 12, 16, 20.0
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.stack([(x - width / 2) / focal, (y - height / 2) / focal, torch.ones_like(x)])
    depth = 2.0 / (normal[:, None, None] * rays).sum(dim=0)
    depth[5, 7] = 0
    found = normals_from_depth(depth, focal)
    known = found.norm(dim=0) > 0
    expected = normal[:, None].expand(3, int(known.sum()))
    torch.testing.assert_close(found[:, known], expected, atol=1e-4, rtol=0)
    assert known.sum() == (height - 2) * (width - 2) - 5  # the hole and its four neighbours
    sheared = normals_from_depth(depth, focal, as_published=True)
    shear = torch.tensor([width / 2 / focal, height / 2 / focal])
    wrong = torch.cat([normal[:2], normal[2:] - shear @ normal[:2]])
    torch.testing.assert_close(sheared[:, 2, 2], wrong / wrong.norm(), atol=1e-4, rtol=0)


def test_angles_between__known_ones_of_any_length():
    one = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    others = torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 5, 0], [-3, 0, 0]]).view(4, 3, 1, 1)
    angles = angles_between(others, one.expand(4, 3, 1, 1)).flatten()
    torch.testing.assert_close(angles, torch.tensor([0.0, 45, 90, 180]), atol=1e-3, rtol=0)


def test_max_f__scikit_learn_and_the_published_slip(generator):
    probability = torch.rand(2000, generator=generator)
    target = (torch.rand(2000, generator=generator) < probability).long()
    right, published = MaxF(), MaxF(as_published=True)
    for measure in (right, published):
        measure.update(probability, target)
    expected = max(
        sklearn_metrics.fbeta_score(
            target.numpy(), (probability > step / 20).numpy(), beta=0.3**0.5
        )
        for step in range(1, 20)
    )
    assert right.compute() == pytest.approx(expected)
    # sigmoid(p) > .55 is p > .20, .41, .62, .85, and p > 0: five thresholds are left of nineteen.
    acting = [max(0.0, math.log(step / (20 - step))) for step in range(10, 15)]
    expected = max(
        sklearn_metrics.fbeta_score(target.numpy(), (probability > act).numpy(), beta=0.3**0.5)
        for act in acting
    )
    assert published.compute() == pytest.approx(expected)
    perfect = MaxF()
    perfect.update(target.float(), target)
    assert perfect.compute() == 1


def test_recalls_both_ways__torchmetrics(generator):
    from torchmetrics.retrieval import RetrievalHitRate

    images = torch.randn(12, 6, generator=generator)
    image_of_text = torch.arange(12).repeat(3)[torch.randperm(36, generator=generator)]
    texts = images[image_of_text] + 1.5 * torch.randn(36, 6, generator=generator)
    found = recalls_both_ways(images, texts, image_of_text, ranks=(1, 5))
    cosine = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=2)
    right = image_of_text[:, None] == torch.arange(12)
    for k in (1, 5):
        for way, scores, hit in (("text_to_image", cosine, right),
                                 ("image_to_text", cosine.T, right.T)):  # fmt: skip
            query = torch.arange(len(scores))[:, None].expand_as(scores)
            rate = RetrievalHitRate(top_k=k)(scores.flatten(), hit.flatten(), query.flatten())
            assert found[f"{way}@{k}"] == pytest.approx(rate.item())
    aligned = recalls_both_ways(images, images[image_of_text], image_of_text, ranks=(1,))
    assert set(aligned.values()) == {1.0}


def test_transfer_errors__a_map_to_itself_is_exact_and_the_published_way_is_biased(generator):
    features = torch.randn(32, 8, 8, generator=generator)
    row, column = torch.randint(1, 7, (2, 20), generator=generator)
    points = (torch.stack([column, row], dim=1) + 0.5) / 8
    assert transfer_errors(features, features, points, points).max() < 1e-6
    published = transfer_errors(features, features, points, points, as_published=True)
    assert published.min() > 0.4 / 8


def test_pck__points_and_pairs_weigh_otherwise():
    errors = [torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0.5])]
    assert pck_per_point(errors, 0.1) == 0.75
    assert pck_per_image(errors, 0.1) == 0.5


def test_ratio_matches__the_surest_first(generator):
    target = torch.randn(50, 8, generator=generator)
    chosen = torch.randperm(50, generator=generator)[:20]
    source = target[chosen] + 0.05 * torch.randn(20, 8, generator=generator)
    matches = ratio_matches(source, target, most=10)
    assert torch.equal(matches.target, chosen[matches.source])
    assert torch.equal(matches.weight, matches.weight.sort(descending=True).values)


def test_mask_iou__scikit_learn_and_classes_of_area(generator):
    prediction, target = torch.rand(2, 5, 9, 9, generator=generator) > 0.5
    expected = [
        sklearn_metrics.jaccard_score(one.flatten().numpy(), other.flatten().numpy())
        for one, other in zip(target, prediction, strict=True)
    ]
    assert mask_iou(prediction, target).tolist() == pytest.approx(expected)
    assert mask_iou(prediction[:1] & False, target[:1] & False).item() == 0
    assert area_classes(32**2) == ["small", "medium"]
    assert area_classes(96**2) == ["medium", "large"]
    means = mean_iou_by_area([0.2, 0.4, 0.9], [10, 1024, 2000])
    assert means == pytest.approx({"iou": 0.5, "iou/small": 0.3, "iou/medium": 0.65})


def test_average_drop_and_increase__known_ones():
    whole, kept = torch.tensor([0.5, 0.8, 0.4]), torch.tensor([0.25, 0.9, 0.4])
    assert average_drop(whole, kept) == pytest.approx(100 * 0.5 / 3)
    assert average_increase(whole, kept) == pytest.approx(100 / 3)


def test_losses__zero_where_all_is_right_and_finite_gradients(generator):
    depth = torch.rand(3, 1, 16, 18, generator=generator) + 0.5
    normals = torch.randn(2, 3, 6, 6, generator=generator)
    unit = torch.nn.functional.normalize(normals, dim=1)
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    cases = {
        "depth": (lambda x: losses.depth_loss(x, depth), depth),
        "normal": (lambda x: losses.normal_l1_loss(x, unit, valid), normals),
        "l1": (lambda x: losses.depth_l1_loss(x, depth), depth),
    }
    for name, (loss, truth) in cases.items():
        values = truth.clone().requires_grad_()
        value = loss(values)
        assert value.item() == pytest.approx(0, abs=1e-3), name
        value.backward()
        assert values.grad.isfinite().all(), name
    sure = torch.cat([normals, torch.ones(2, 1, 6, 6)], dim=1).requires_grad_()
    losses.uncertain_angular_loss(sure, unit, valid).backward()
    assert sure.grad.isfinite().all()


def test_gradient_loss__the_published_slip_compares_pictures(generator):
    prediction, target = torch.rand(2, 2, 1, 16, 18, generator=generator) + 0.5
    assert losses.gradient_loss(prediction, target) > 0.1
    assert losses.gradient_loss(prediction, target, as_published=True) == 0  # two pictures only


def test_depth_from_bins__equal_votes_are_the_middle():
    depth = losses.depth_from_bins(torch.zeros(1, 256, 2, 2), near=0.001, far=1.0)
    torch.testing.assert_close(depth, torch.full((1, 1, 2, 2), 0.5005))
