"""Predictions beside the truth: how they are drawn, where they lie, when they are shown."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.evals.examples import (
    MOST,
    ShownBoxes,
    ShownMaps,
    ShownMatches,
    shown_maps,
    shown_of,
)
from radio_distill.evals.metrics import IGNORED
from radio_distill.evals.score_set import ScoreSet
from radio_distill.evals.subjects import Subject
from radio_distill.report.examples import (
    MATCH_SIDE,
    SIDE,
    class_colours,
    draw,
    find_examples,
    folder_of,
    write_examples,
)
from radio_distill.report.feature_images import LABEL_HEIGHT, MARGIN

PICTURE = torch.zeros(3, 48, 64, dtype=torch.uint8)
BLUE, ORANGE = (63, 193, 255), (255, 122, 26)


def panels(sheet, rows):
    """Cut a sheet of 64 x 48 images into its prediction and truth, row by row."""
    height = SIDE * 48 // 64
    found = []
    for row in range(rows):
        top = LABEL_HEIGHT + row * (height + LABEL_HEIGHT + MARGIN) + LABEL_HEIGHT
        lefts = [MARGIN + column * (SIDE + MARGIN) for column in (1, 2)]
        boxes = [(left, top, left + SIDE, top + height) for left in lefts]
        found.append([np.asarray(sheet.crop(box)) for box in boxes])
    return found


def colours(pixels):
    return {tuple(int(it) for it in colour) for colour in np.reshape(pixels, (-1, 3))}


def test_class_colours__are_those_of_voc():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {number: tuple(class_colours()[number]) for number in known} == known
    assert len(colours(class_colours())) == 257, "no class looks like another, or like none"


def test_draw__classes_are_painted_sharp_and_alike_in_both_maps():
    truth = torch.zeros(48, 64, dtype=torch.long)
    truth[10:20, 30:], truth[30:] = 15, IGNORED
    wrong = truth.where(truth == 15, 1)
    example = ShownMaps(
        PICTURE, {"segmentation": truth, "parts": truth}, {"segmentation": wrong, "parts": truth}
    )
    (first, first_truth), (second, second_truth) = panels(draw(example), 2)
    assert np.array_equal(second, second_truth)
    assert np.array_equal(first_truth, second_truth)
    assert colours(first_truth) == {(0, 0, 0), (192, 128, 128), (255, 255, 255)}
    assert colours(first) == {(128, 0, 0), (192, 128, 128)}


def test_draw__depth_has_the_range_of_the_truth_and_unknown_is_grey():
    truth = torch.linspace(1, 3, 64).expand(48, 64).clone()
    truth[:, :8] = 0
    example = ShownMaps(PICTURE, {"depth": truth}, {"depth": torch.full((48, 64), 9.0)})
    [(prediction, painted)] = panels(draw(example), 1)
    assert (painted[:, :20] == 128).all()
    assert len(colours(prediction)) == 1, "beyond the range is the end of the colours"
    assert (prediction[0, 0] == painted[0, -1]).all()


def test_shown_maps__outputs_take_the_form_of_their_labels():
    labels = {
        "segmentation": torch.zeros(6, 8, dtype=torch.long),
        "saliency": torch.zeros(6, 8, dtype=torch.long),
        "depth": torch.zeros(6, 8),
        "normals": torch.zeros(3, 6, 8),
    }
    outputs = {
        "segmentation": torch.eye(5)[3].view(1, 5, 1, 1).expand(1, 5, 3, 4),
        "saliency": torch.full((1, 1, 3, 4), 100.0),
        "depth": torch.full((1, 1, 3, 4), 2.5),
        "normals": torch.tensor([0.0, 3.0, 4.0, 9.0]).view(1, 4, 1, 1).expand(1, 4, 3, 4),
    }
    shown = shown_maps(PICTURE, labels, outputs).prediction
    assert {name: it.shape for name, it in shown.items()} == {
        n: it.shape for n, it in labels.items()
    }
    assert (shown["segmentation"] == 3).all()
    assert (shown["saliency"] == 1).all()
    assert (shown["depth"] == 2.5).all()
    assert shown["normals"][:, 0, 0].tolist() == pytest.approx([0, 0.6, 0.8])


def test_draw__matches_are_blue_where_found_and_orange_where_not():
    points = torch.tensor([[10.0, 10.0], [40.0, 30.0]])
    right = ShownMatches(PICTURE, PICTURE, points, points, points + 1, 2)
    wrong = ShownMatches(PICTURE, PICTURE, points, points, points + 1, 1)
    assert BLUE in colours(draw(right))
    assert ORANGE not in colours(draw(right))
    assert ORANGE in colours(draw(wrong))
    assert BLUE not in colours(draw(wrong))


def test_draw__boxes_lie_where_they_are_and_kinds_have_one_colour():
    truth, found = (
        torch.tensor([[8.0, 24, 40, 46]]),
        torch.tensor([[16.0, 24, 60, 46], [8, 8, 24, 46]]),
    )
    sheet = draw(ShownBoxes(PICTURE, truth, found, ["cat"], ["cat", "dog"]))
    lefts = [MARGIN + column * (MATCH_SIDE + MARGIN) for column in (0, 1)]
    first, second = (
        np.asarray(sheet)[2 * LABEL_HEIGHT :, left : left + MATCH_SIDE] for left in lefts
    )
    cat, dog = (tuple(int(it) for it in class_colours()[number]) for number in (1, 2))
    scale = MATCH_SIDE / 64
    bottom = round(46 * scale)
    for panel, middle, expected in (
        (first, 50, cat), (second, 20, cat), (first, 12, dog), (second, 50, (0, 0, 0))
    ):  # fmt: skip
        rows = panel[bottom - 2 : bottom + 2, round(middle * scale)].tolist()
        assert any(np.abs(np.subtract(row, expected)).max() < 40 for row in rows), (middle, rows)
        assert (expected == (0, 0, 0)) == (not np.any(rows))


def test_shown_of__few_and_far_apart():
    assert shown_of(1000, None) == []
    shown = shown_of(1000, lambda _: None)
    assert len(shown) == MOST
    assert {right - left for left, right in pairwise(shown)} == {1000 // MOST}
    assert shown_of(2, lambda _: None) == [0, 1]


def test_write_examples__replaces_and_tells_models_apart(tmp_path):
    file = tmp_path / "scores.jsonl"
    here = str(tmp_path)
    subjects = {
        "a": Subject(folder=here, reference="model a/b:2", weights="1"),
        "step 4": Subject(folder=here, stage="stage1", step=4, weights="2"),
        "step 8": Subject(folder=here, stage="stage1", step=8, weights="3"),
        "elsewhere": Subject(folder="/runs/one", stage="stage1", step=8, weights="4"),
        "elsewhere too": Subject(folder="/runs/two", stage="stage1", step=8, weights="5"),
    }
    folders = [folder_of(file, subject) for subject in subjects.values()]
    assert len(set(folders)) == len(subjects)
    assert {folder.parent for folder in folders} == {tmp_path / "evaluation"}
    for count in (3, 1):
        for shade, subject in enumerate(subjects.values()):
            images = [Image.new("RGB", (8, 8), (10 * count, 40 * shade, 0))] * count
            write_examples(file, subject, "voc", images)
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert written == sorted(folder / "voc" / "0.webp" for folder in folders)
    scores = ScoreSet(
        results={label: [{"voc/miou": 1.0}] for label in subjects},
        subjects={label: [subject] for label, subject in subjects.items()},
        files={label: [file] for label in subjects},
    )
    scores.results["a"] = [{"spair/recall": 1.0}]  # its examples are of an earlier evaluation
    found = find_examples(scores, 4)
    assert len(found) == len(subjects) - 1
    shown = Path(tmp_path / "shown.webp")
    assert isinstance(found[0].image, bytes)
    shown.write_bytes(found[0].image)
    assert Image.open(shown).getpixel((4, 4)) == pytest.approx((10, 40, 0), abs=6)
