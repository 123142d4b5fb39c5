"""Numbers that are not finite stop a run, and the message says whose they are."""

from pathlib import Path

import pytest
import torch

from radio_distill.errors import DivergedError
from radio_distill.train.guard import check_gradient, check_loss, check_targets
from radio_distill.types import Features


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_targets__names_teacher_and_images(bad):
    spatial, summary = torch.zeros(3, 4, 2, 2), torch.zeros(3, 5)
    check_targets({"dino": Features(summary, spatial)}, ("a", "b", "c"))
    spatial[1, 2, 0, 1] = bad
    with pytest.raises(DivergedError, match=r"teacher 'dino' .* for b;"):
        check_targets({"dino": Features(None, spatial)}, ("a", "b", "c"))
    summary[2, 0] = bad
    with pytest.raises(DivergedError, match="for c;"):
        check_targets({"dino": Features(summary, torch.zeros(3, 4, 2, 2))}, ("a", "b", "c"))


def test_check_loss__names_the_term_and_the_last_good_checkpoint():
    terms = {"low/dino/features": torch.tensor(float("nan")), "low/clip/summary": torch.tensor(1.0)}
    check_loss(torch.tensor(1.0), {}, 3, None)
    with pytest.raises(DivergedError) as caught:
        check_loss(torch.tensor(float("nan")), terms, 7, Path("runs/x/step-00000005"))
    message = str(caught.value)
    assert "step 7" in message
    assert "low/dino/features" in message
    assert "clip" not in message
    assert "runs/x/step-00000005" in message


def test_check_gradient__is_its_own_message():
    check_gradient(3.5, 1, None)
    for norm in (float("nan"), float("inf")):
        with pytest.raises(
            DivergedError, match="step 2: the gradient is not finite, though the loss"
        ):
            check_gradient(norm, 2, None)
