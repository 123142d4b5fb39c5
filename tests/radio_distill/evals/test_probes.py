"""The probe of a teacher's space is the best one there is, and honest about finer maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.errors import DataError
from radio_distill.evals import masks as sets
from radio_distill.evals.encoder import to_pixels
from radio_distill.evals.metrics.segmentation import mean_iou
from radio_distill.evals.probes import Lbfgs, LinearProbe, training_set
from upsamplers.comparison import preserved

GRID, SIZE, CLASSES = 8, 32, 3


def images(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return fine maps ``[B, 6, SIZE, SIZE]``, linear in the class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num, CLASSES, 5, 5, generator=generator)
    labels = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear").argmax(1)
    mixing = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(7))
    fine = mixing[labels] + 0.1 * torch.randn(num, SIZE, SIZE, 6, generator=generator)
    return fine.movedim(-1, 1), labels


def score(probe: LinearProbe, features: Tensor, labels: Tensor) -> dict[str, float]:
    confusion = preserved(probe, features, labels)
    accuracy = confusion.trace().item() / confusion.sum().item()
    return {"accuracy": accuracy, "miou": mean_iou(confusion)}


def lowered(fine: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(fine, GRID)


@pytest.fixture(scope="module")
def probe() -> LinearProbe:
    fine, labels = images(12)
    return LinearProbe(CLASSES).fit(lowered(fine), labels)


def test_preservation__finer_maps_of_the_same_space_score_higher(probe: LinearProbe) -> None:
    fine, labels = images(6, seed=1)
    low = score(probe, lowered(fine), labels)
    assert 0.7 < low["accuracy"] < 0.97
    truth = score(probe, fine, labels)
    assert truth["accuracy"] > 0.97
    assert truth["miou"] > low["miou"] + 0.05
    smooth = F.interpolate(lowered(fine), (SIZE, SIZE), mode="bilinear")
    assert low["miou"] < score(probe, smooth, labels)["miou"] < truth["miou"]


def test_preservation__sharp_maps_of_another_space_score_low(probe: LinearProbe) -> None:
    fine, labels = images(6, seed=1)
    assert score(probe, -fine, labels)["miou"] < 0.5 * score(probe, lowered(fine), labels)["miou"]


def test_preservation__cells_and_pixels_are_counted_by_hand() -> None:
    probe = LinearProbe(2)
    probe.weight, probe.bias = torch.eye(2), torch.zeros(2)
    features = torch.zeros(1, 2, 1, 2)
    features[0, 0, 0, 0] = features[0, 1, 0, 1] = 1  # class 0 left, class 1 right
    labels = torch.tensor([[[0, 0, 0, 1], [-1, 1, 1, 1]]])
    found = score(probe, features, labels)
    # Right of 7 labelled pixels: 0, 0, 1, 1, 1.
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["miou"] == pytest.approx((2 / 4 + 3 / 5) / 2)


def test_linear_probe__is_the_minimum_and_the_same_every_time(probe: LinearProbe) -> None:
    fine, labels = images(12)
    again = LinearProbe(CLASSES).fit(lowered(fine), labels)
    assert torch.equal(again.weight, probe.weight)
    tokens, shares = training_set(list(lowered(fine)), list(labels), CLASSES)
    std = tokens.std(0)
    weight, bias = (probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_())
    logits = F.linear(tokens, weight, bias)
    loss = -(shares * logits.log_softmax(1)).sum() / len(tokens)
    loss = loss + 0.5 * Lbfgs().weight_decay * (weight * std).square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 2e-3
    assert bias.grad.abs().max() < 2e-3


def test_linear_probe__in_inference_mode(probe: LinearProbe) -> None:
    with torch.inference_mode():
        fine, labels = images(12)
        inside = LinearProbe(CLASSES).fit(lowered(fine), labels)
    torch.testing.assert_close(inside.weight, probe.weight)


def test_linear_probe__ignores_unlabelled_cells() -> None:
    fine, labels = images(4)
    features = lowered(fine)
    hidden = labels.clone()
    hidden[2:] = -1
    changed = features.clone()
    changed[2:] = 1e3
    probes = [LinearProbe(CLASSES).fit(some, hidden) for some in (features, changed)]
    assert torch.equal(probes[0].weight, probes[1].weight)


def test_linear_probe__bad_input(probe: LinearProbe) -> None:
    fine, labels = images(2)
    low = lowered(fine)
    with pytest.raises(DataError, match=r"0 to 7.*0 to 2"):
        LinearProbe(CLASSES).fit(low, labels.where(labels != 2, 7))
    with pytest.raises(DataError, match="all ignored"):
        LinearProbe(CLASSES).fit(low, torch.full_like(labels, -1))
    with pytest.raises(DataError, match=r"1 maps.*2 label"):
        LinearProbe(CLASSES).fit(low[:1], labels)
    low[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="1 of 384 values of the map"):
        LinearProbe(CLASSES).fit(low, labels)
    with pytest.raises(DataError, match="1 of 384 values of the map"):
        preserved(probe, low, labels)


def test_preservation__real_masks(real) -> None:
    """Colours are poor features, but their probe beats chance, and pixels beat cells."""
    both, folder = {}, str(real("segmentation/coco"))
    classes = sets.labelled_classes([mask for _, mask in sets.find_pairs(folder, "train")])
    for split in ("train", "val"):
        pairs = sets.find_pairs(folder, split)[:8]
        images = [to_pixels(image, (64, 64)) for image, _ in pairs]
        masks = [sets.read_mask(mask, 64, classes) for _, mask in pairs]
        both[split] = torch.stack(images), torch.stack(masks)
    features, labels = both["train"]
    probe = LinearProbe(len(classes)).fit(F.adaptive_avg_pool2d(features, 16), labels)
    found = score(probe, *both["val"])
    assert found["accuracy"] > 1 / len(classes)
    assert 0 < found["miou"] < found["accuracy"]
