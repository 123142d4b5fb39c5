"""What is not finite is found, named, skipped, and in the end stops the run."""

from pathlib import Path

import pytest
import torch

from radio_distill.errors import DivergedError
from radio_distill.train.guard import Finding, Findings, Skips, check_targets, describe
from radio_distill.types import Features

CPU = torch.device("cpu")
NAN = float("nan")


def targets_of(*bad: int) -> dict[str, Features]:
    spatial = torch.zeros(3, 4, 2, 2)
    for image in bad:
        spatial[image, 2, 0, 1] = NAN
    return {"dino": Features(None, spatial), "clip": Features(torch.zeros(3, 5), spatial * 0)}


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_check_targets__names_teacher_and_images(bad):
    spatial, summary = torch.zeros(3, 4, 2, 2), torch.zeros(3, 5)
    check_targets({"dino": Features(summary, spatial)}, ("a", "b", "c"))
    spatial[1, 2, 0, 1] = bad
    with pytest.raises(DivergedError, match=r"teacher 'dino' .* for b;"):
        check_targets({"dino": Features(None, spatial)}, ("a", "b", "c"))
    summary[2, 0] = bad
    with pytest.raises(DivergedError, match="for c;"):
        check_targets({"dino": Features(summary, torch.zeros(3, 4, 2, 2))}, ("a", "b", "c"))


def test_findings__nothing_where_all_is_finite():
    findings = Findings()
    assert float(findings.trouble(CPU)) == 0
    findings.targets({"dino": Features(None, torch.zeros(3, 4, 2, 2))}, ("a", "b", "c"))
    findings.loss(torch.ones(3), {"dino/features": torch.tensor(1.0)}, ("a", "b", "c"))
    assert float(findings.trouble(CPU)) == 0
    assert findings.found() == []


def test_findings__a_teacher_is_blamed_and_not_the_loss_that_follows():
    findings = Findings()
    targets = targets_of(1)
    targets["clip"] = Features(torch.zeros(3, 5), torch.zeros(3, 4, 2, 2))
    findings.targets(targets, ("a", "b", "c"))
    terms = {"dino/features": torch.tensor(NAN), "clip/summary": torch.tensor(1.0)}
    findings.loss(torch.tensor([1.0, NAN, 1.0]), terms, ("a", "b", "c"))
    assert float(findings.trouble(CPU)) == 1
    assert findings.found() == [Finding("teacher dino", ("b",))]


def test_findings__a_loss_names_its_terms():
    findings = Findings()
    terms = {"dino/features": torch.tensor(NAN), "clip/summary": torch.tensor(1.0)}
    findings.loss(torch.tensor([NAN, 1.0]), terms, ("a", "b"))
    assert findings.found() == [Finding("loss dino/features", ("a",))]


def test_findings__a_gradient_may_come_from_any_image():
    findings = Findings()
    findings.targets(targets_of(), ("a", "b", "c"))
    findings.targets(targets_of(), ("a", "b", "c"))  # another partition, the same images
    assert findings.gradient() == [Finding("gradient", ("a", "b", "c"))]


def test_skips__one_too_many_in_a_row_ends_the_run():
    found = [Finding("teacher dino", ("a", "b", "c", "d"))]
    skips = Skips(2)
    skips.skipped(1, found, None)
    skips.skipped(2, found, None)
    skips.passed()
    skips.skipped(4, found, None)
    skips.skipped(5, found, None)
    assert (skips.in_all, skips.in_a_row) == (4, 2)
    with pytest.raises(DivergedError) as caught:
        skips.skipped(6, found, Path("runs/x/step-00000003"))
    message = str(caught.value)
    assert "step 6, the 3rd in a row, is not finite: teacher dino for a, b, c and 1 more" in message
    assert "the last good checkpoint is runs/x/step-00000003" in message
    assert "teachers.dino.dtype" in message
    assert "\n" not in message


def test_skips__none_may_be():
    with pytest.raises(DivergedError, match="step 7 is not finite: gradient for a; there is no"):
        Skips(0).skipped(7, [Finding("gradient", ("a",))], None)


def test_skips__go_on_counting_after_a_resume():
    with pytest.raises(DivergedError, match="the 3rd in a row"):
        Skips(2, in_all=5, in_a_row=2).skipped(9, [Finding("gradient", ("a",))], None)


def test_describe__joins_what_processes_found():
    found = [Finding("teacher a", ("x",)), Finding("loss", ("y",)), Finding("teacher a", ("z",))]
    assert describe(found) == "teacher a for x, z; loss for y"
