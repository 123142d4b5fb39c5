"""The weight of each term of the loss."""

import pytest
import torch

from radio_distill.config import (
    DataConfig,
    LossConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    TeacherConfig,
)
from radio_distill.distill.loss_weights import TermWeights
from radio_distill.stage import resolve_stage
from radio_distill.types import TeacherSpec

CPU = torch.device("cpu")


def weights_of(dispersions=None, **loss) -> TermWeights:
    """`clip` is in the first partition alone, a quarter of the step; `sam` in both."""
    stage = StageConfig(
        partitions=(
            PartitionConfig(name="a", size=64, teachers=("clip", "sam"), batch_size=4),
            PartitionConfig(name="b", size=64, teachers=("sam",), batch_size=8, weight=3.0),
        )
    )
    recipe = Recipe(
        name="any",
        data=DataConfig(shards=("none",)),
        teachers={
            "clip": TeacherConfig(preset="x", summary_weight=0.5, feature_weight=2.0),
            "sam": TeacherConfig(preset="x", summary_weight=0.0),
        },
        loss=LossConfig(**loss),
        stages={"stage1": stage},
    )
    specs = {
        name: TeacherSpec(name, 8, 8, 16, (64, 64), None, (0.5,) * 3, (0.5,) * 3)
        for name in recipe.teachers
    }
    return TermWeights(resolve_stage(recipe, "stage1", specs), dispersions or {}, CPU)


def test_now__those_of_the_teachers():
    expected = {"clip/summary": 0.5, "clip/features": 2, "sam/summary": 0, "sam/features": 1}
    assert weights_of().now() == expected


def test_now__rebalanced_by_the_part_of_the_step():
    weights = weights_of(rebalance=True).now()
    assert weights["clip/features"] == pytest.approx(2 / 0.25)
    assert weights["sam/features"] == pytest.approx(1)


def test_now__angles_over_their_dispersion():
    weights = weights_of({"clip": 0.25}, summary="angle").now()
    assert weights["clip/summary"] == pytest.approx(2)
    assert weights["clip/features"] == 2


def test_end_step__adaloss_of_means_over_images():
    weights = weights_of({"clip": 0.25}, summary="angle", weighting="adaloss")
    assert weights.now()["clip/summary"] == 0.5, "AdaLoss divides by the size itself"
    weights.add({"clip/summary": torch.tensor(4.0), "sam/features": torch.tensor(10.0)}, 1)
    weights.add({"sam/features": torch.tensor(40.0)}, 2)
    weights.end_step()
    now = weights.now()
    assert now["clip/summary"] == pytest.approx(0.5 / 4)
    assert now["sam/features"] == pytest.approx(1 / 30)
    assert now["clip/features"] == 2, "not met yet"


def test_state__goes_on_with_equal_weights():
    first = weights_of({"clip": 0.25}, summary="angle", weighting="adaloss")
    first.add({"clip/features": torch.tensor(3.0)}, 2)
    first.end_step()
    second = weights_of(summary="angle", weighting="adaloss")
    second.load_state(first.state())
    assert second.now() == first.now()
    assert second.state() == first.state()

    fixed = weights_of(summary="angle")
    fixed.load_state(weights_of({"clip": 0.25}, summary="angle").state())
    assert fixed.now()["clip/summary"] == pytest.approx(2)
    assert not weights_of().state(), "nothing to keep"
