"""Every metric and loss equals what the published programs gave on fixed inputs, to 1e-5."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from radio_distill.evals import losses
from radio_distill.evals.metrics import IGNORED
from radio_distill.evals.metrics.classification import recalls_both_ways
from radio_distill.evals.metrics.depth import (
    PooledDepth,
    align_scale_and_shift,
    depth_errors,
    eigen_crop,
)
from radio_distill.evals.metrics.matching import pck_per_point, ratio_matches, transfer_errors
from radio_distill.evals.metrics.normals import PooledNormals, normal_errors, normals_from_depth
from radio_distill.evals.metrics.segmentation import MaxF, confusion_matrix, mean_iou

FOLDER = Path(__file__).parents[4].parent / "shared" / "golden" / "evaluation"


@pytest.fixture(scope="module")
def golden(request):
    """The tensors of one file, by name."""
    path = FOLDER / f"{request.param}.safetensors"
    if not path.exists():
        pytest.skip(f"no {path}")
    return load_file(path)


def of(name):
    return pytest.mark.parametrize("golden", [name], indirect=True)


def equal(value, expected, **how):
    how = {"rtol": 1e-5, "atol": 1e-5} | how
    value = torch.as_tensor(value, dtype=torch.float64)
    torch.testing.assert_close(value, expected.double().view(value.shape), **how)


def labels(tensor):
    """Class numbers with 255 as the ignored one."""
    return tensor.long().where(tensor != 255, torch.tensor(IGNORED))


@of("probe3d")
@pytest.mark.parametrize("kind", ["scale_aware", "scale_invariant"])
def test_depth_errors__probe3d(golden, kind):
    prediction, target = golden["depth/pred"][:, 0], golden["depth/target"][:, 0]
    if kind == "scale_invariant":
        prediction = align_scale_and_shift(prediction, target)
        equal(prediction, golden["depth/aligned"])
    errors = depth_errors(prediction, target)
    for name in ("d1", "d2", "d3", "rmse"):
        equal(getattr(errors, name), golden[f"depth/{kind}/{name}"])


@of("nyu_depth_eigen")
def test_depth_errors__nyu_in_the_eigen_crop(golden):
    prediction, target = golden["pred"][:, 0].float(), golden["target"][:, 0].float()
    valid = eigen_crop(480, 640) & (target > 1e-3) & (target < 10)
    errors = depth_errors(prediction.clamp(1e-3, 10), target, valid)
    names = ["d1", "d2", "d3", "abs_rel", "rmse"]
    found = torch.stack([getattr(errors, name) for name in names], dim=1)
    equal(found, golden["metrics_per_picture"][:, : len(names)])


@of("multi_task")
def test_pooled_depth__nyud(golden):
    pooled, parts = PooledDepth(), PooledDepth()
    for prediction, target in zip(golden["depth/pred"], golden["depth/target"], strict=True):
        part = PooledDepth()
        part.update(prediction, target)
        parts.merge(part)
    pooled.update(golden["depth/pred"], golden["depth/target"])
    equal(pooled.compute(), golden["depth/rmse"])
    assert pooled.compute() == pytest.approx(parts.compute(), rel=1e-12)


@of("probe3d")
def test_normal_errors__probe3d(golden):
    valid = golden["normals/valid"][:, 0].bool()
    errors = normal_errors(golden["normals/pred"], golden["normals/target"], valid)
    for name in ("d1", "d2", "d3", "rmse"):
        equal(getattr(errors, name), golden[f"normals/{name}"])


@of("probe3d")
def test_normals_from_depth__as_published(golden):
    depth, focal = golden["from_depth/depth"][0], golden["from_depth/focal"].item()
    normals = normals_from_depth(depth, focal, as_published=True)
    equal(normals, golden["from_depth/normals"])


@of("multi_task")
def test_pooled_normals__nyud(golden):
    target = golden["normals/target"]
    pooled = PooledNormals()
    pooled.update(golden["normals/pred"], target, (target != 255).all(dim=1))
    equal(pooled.compute(), golden["normals/mean_degrees"])


@of("multi_task")
@pytest.mark.parametrize(
    ("task", "classes"), [("nyud/semseg", 40), ("pascal/semseg", 21), ("pascal/parts", 7)]
)
def test_mean_iou__absent_classes_count_as_zero(golden, task, classes):
    prediction, target = golden[f"{task}/pred"].long(), labels(golden[f"{task}/target"])
    confusion = confusion_matrix(prediction, target, classes)
    equal(100 * mean_iou(confusion, "all"), golden[f"{task}/miou"])
    if (left_out := golden.get(f"{task}/miou_absent_left_out")) is not None:
        equal(100 * mean_iou(confusion, "met"), left_out)


@of("multi_task")
@pytest.mark.parametrize("as_published", [True, False])
def test_max_f__pascal(golden, as_published):
    measure = MaxF(as_published)
    probability = golden["pascal/saliency/logits"].softmax(dim=1)[:, 1]
    for one, target in zip(probability, golden["pascal/saliency/target"][:, 0], strict=True):
        measure.update(one, labels(target))
    name = "maxF_as_published" if as_published else "maxF_plain"
    equal(100 * measure.compute(), golden[f"pascal/saliency/{name}"])


@of("retrieval")
def test_recalls_both_ways__clip_benchmark(golden):
    recalls = recalls_both_ways(golden["images"], golden["texts"], golden["image_of_text"], chunk=7)
    assert len(recalls) == 6
    for name, value in recalls.items():
        equal(100 * value, golden[name])


@of("probe3d")
def test_ratio_matches__probe3d(golden):
    source, target = golden["ratio_test/source"], golden["ratio_test/target"]
    matches = ratio_matches(source, target, most=100, chunk=37)
    assert torch.equal(matches.source, golden["ratio_test/index_source"])
    assert torch.equal(matches.target, golden["ratio_test/index_target"])
    equal(matches.weight, golden["ratio_test/weight"])


@of("probe3d")
def test_transfer_errors__spair_as_published(golden):
    (source, target), size = golden["spair/features"], golden["spair/image_size"]
    one, other = golden["spair/keypoints_source"], golden["spair/keypoints_target"]
    both = (one[:, 2] * other[:, 2]) > 0
    points = one[both, :2] / size, other[both, :2] / size
    errors = transfer_errors(source, target, *points, as_published=True)
    errors /= golden["spair/scale"]
    equal(errors, golden["spair/errors"])
    equal(100 * pck_per_point([errors], 0.1), golden["spair/recall@0.10"])


@of("probe3d")
def test_losses__depth(golden):
    prediction, target = golden["depth/pred"], golden["depth/target"]
    equal(losses.sig_loss(prediction, target), golden["loss/sig"])
    equal(losses.gradient_loss(prediction, target), golden["loss/gradient"])
    equal(losses.depth_loss(prediction, target), golden["loss/depth"])
    legacy = losses.gradient_loss(prediction, target, as_published=True)
    equal(legacy, golden["loss/gradient_legacy"])
    equal(losses.depth_loss(prediction, target, as_published=True), golden["loss/depth_legacy"])
    equal(losses.depth_from_bins(golden["bins/logits"]), golden["bins/depth"])


@of("probe3d")
def test_losses__normals(golden):
    prediction, target = golden["normals/pred"], golden["normals/target"]
    valid = golden["normals/valid"][:, 0].bool()
    uncertain = losses.uncertain_angular_loss(prediction, target, valid)
    equal(uncertain, golden["loss/angular_uncertain"])


@of("multi_task")
def test_losses__multi_task(golden):
    logits, target = golden["loss/ce/logits"], labels(golden["loss/ce/target"][:, 0])
    value = F.cross_entropy(logits, target, ignore_index=IGNORED)
    equal(value, golden["loss/ce/value"])
    logits = golden["pascal/saliency/logits"]
    value = losses.balanced_cross_entropy(
        logits[:, 1] - logits[:, 0], labels(golden["pascal/saliency/target"][:, 0])
    )
    equal(value, golden["loss/balanced_ce/value"])
    logits, target = golden["loss/edge/logits"], golden["loss/edge/target"].float()
    equal(losses.weighted_cross_entropy(logits, target), golden["loss/edge/value"])
    target = golden["normals/target"]
    value = losses.normal_l1_loss(golden["normals/pred"], target, (target != 255).all(dim=1))
    equal(value, golden["loss/normals/value"])
    value = losses.depth_l1_loss(golden["depth/pred"], golden["depth/target"])
    equal(value, golden["loss/depth/value"])
