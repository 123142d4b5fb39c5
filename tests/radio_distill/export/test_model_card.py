"""The model card says what is known, and nothing else."""

import json
from dataclasses import replace

import pytest
import yaml

from radio_distill.config import Recipe, build
from radio_distill.export.folded import folded
from radio_distill.export.model_card import licence_note, model_card

SCORE = {"benchmark": "knn", "metric": "top1", "value": 56.04, "unit": "%", "group": "knn",
         "higher_is_better": True, "num_samples": 9}  # fmt: skip


def write_scores(checkpoint, subject):
    path = checkpoint.folder.parents[2] / "scores.jsonl"
    path.write_text(json.dumps({"subject": subject, **SCORE}) + "\n")


def test_model_card__is_filled(make_checkpoint):
    checkpoint = make_checkpoint(step=5)
    card = model_card(folded(checkpoint), "USAGE", library="transformers")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert yaml.safe_load(front)["license"] == "other"
    assert "# tiny" in text
    assert "| clip | preset_clip | 12 | 5 | apple-ascl (research only) |" in text
    assert "| sam | preset_sam | 8 | none | apache-2.0 |" in text
    assert "| stage1 | 5 of 7 | 2 | 32x48 |" in text
    assert "multiples of 16 px" in text
    assert "USAGE" in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert build(Recipe, yaml.safe_load(recipe)) == checkpoint.recipe


def test_model_card__scores_of_this_student_alone(make_checkpoint):
    checkpoint = make_checkpoint()
    student = folded(checkpoint)
    assert "## Scores" not in model_card(student, "", library="timm")
    write_scores(checkpoint, "teacher clip")
    assert "## Scores" not in model_card(student, "", library="timm")
    write_scores(checkpoint, "stage1")
    assert "| knn/top1 | 56.04 | % | higher |" in model_card(student, "", library="timm")
    make_checkpoint(step=9)  # evaluations take the newest, so the scores are not the older one's
    assert "## Scores" not in model_card(student, "", library="timm")


def test_licence_note__weights_that_it_started_from(make_checkpoint):
    checkpoint = make_checkpoint(teachers=("sam",), pretrained="")
    assert "started from" not in licence_note(checkpoint)
    student = replace(checkpoint.recipe.student, pretrained="timm")
    recipe = replace(checkpoint.recipe, student=student)
    note = licence_note(replace(checkpoint, recipe=recipe))
    assert note == "It started from other weights (timm), whose licence counts too."


@pytest.mark.parametrize(
    ("licences", "sentences"),
    [
        (("mit (package), apache-2.0 (DINOv2)", "apache-2.0"), ["allow any use"]),
        (("none", "mit"), ["allow any use"]),
        (("CC-BY-NC-4.0", "mit"), ["licence of clip allows research only, so this student is"]),
        (("unknown", "mit"), ["licence of clip is not known: find it out"]),
        (
            ("apple-ascl (research only)", "gemma"),
            ["licence of clip allows research only", "conditions come with sam (gemma): read"],
        ),
        (("dinov3-license", "sam-license"), ["clip (dinov3-license) and sam (sam-license)"]),
    ],
)
def test_licence_note__what_follows_from_the_teachers(make_checkpoint, licences, sentences):
    checkpoint = make_checkpoint(teachers=("clip", "sam"))
    for (name, spec), licence in zip(checkpoint.teachers.items(), licences, strict=True):
        checkpoint.teachers[name] = replace(spec, licence=licence)
    note = licence_note(checkpoint)
    assert all(sentence in note for sentence in sentences)
    assert ("any use" in note) == (sentences == ["allow any use"])
