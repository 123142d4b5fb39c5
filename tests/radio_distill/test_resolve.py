"""What `auto` means, and that a run which goes on keeps what it meant."""

import dataclasses

import pytest

from radio_distill.config import Facts, Recipe, build, check, describe, dump, parse_yaml, resolve
from radio_distill.config.resolve import KEPT, keep_resolved

SHORTEST = {
    "name": "short",
    "data": {"shards": ["x"]},
    "teachers": {"t": {"preset": "p"}},
    "stages": {
        "one": {"partitions": [{"name": "a", "size": 32, "teachers": ["t"], "batch_size": 4}]}
    },
}
"""What a recipe cannot do without."""


def recipe_of(student: dict | None = None, engine: dict | None = None, **stage) -> Recipe:
    data = {**SHORTEST, "student": student or {}, "engine": engine or {}}
    data["stages"] = {"one": {**SHORTEST["stages"]["one"], **stage}}
    return build(Recipe, data)


def resolved(recipe: Recipe, shown: int = 1_000_000, in_shards: int | None = None, earlier=None):
    return resolve(recipe, "one", Facts(images_shown=shown, images_in_shards=in_shards), earlier)


@pytest.mark.parametrize(
    ("student", "stage", "expected"),
    [
        ({}, {"steps": 6}, 0),
        ({}, {"steps": 300_000}, 0),
        ({}, {"steps": 300_000, "start_from": "zero"}, 5000),
        ({"pretrained": "timm"}, {"steps": 300_000}, 5000),
        ({"pretrained": "timm"}, {"steps": 600_000}, 5000),
        ({"pretrained": "timm"}, {"steps": 3000}, 50),
        ({"pretrained": "timm"}, {"steps": 20}, 0),
        ({}, {"steps": 20, "freeze_body_steps": 7}, 7),
        ({}, {"steps": 20, "freeze_body_steps": 0.5}, 10),
    ],
)
def test_freeze_body_steps__only_a_trained_body_is_kept_and_for_a_share(student, stage, expected):
    assert resolved(recipe_of(student, **stage)).stages["one"].frozen_steps == expected


@pytest.mark.parametrize(
    ("shown", "in_shards", "expected"),
    [
        (300_000 * 1024, None, 3_072_000),
        (300_000 * 1024, 10**9, 3_072_000),
        (300_000 * 1024, 1_281_167, 1_281_167),
        (1_000_000, None, 100_000),
        (5000, None, 1024),
        (36, None, 36),
        (36, 20, 20),
        (1_000_000, 130, 130),
    ],
)
def test_normalizer_images__a_share_within_bounds_and_never_more_than_there_are(
    shown, in_shards, expected
):
    assert resolved(recipe_of(), shown, in_shards).normalizer.images == expected


@pytest.mark.parametrize(
    ("shown", "in_shards", "expected"),
    [(3000 * 32 * 6, None, 100_000), (3000 * 32 * 6, 90, 90), (30 * 4 * 6, 10**6, 720)],
)
def test_normalizer_images__of_a_fit(shown, in_shards, expected):
    recipe = dataclasses.replace(recipe_of(), stages={})
    facts = Facts(images_shown=shown, images_in_shards=in_shards)
    assert resolve(recipe, "fit", facts).normalizer.images == expected


@pytest.mark.parametrize(
    ("engine", "stage", "expected"),
    [
        ({}, {"optimizer": "lamb"}, 0),
        ({}, {"optimizer": "adamw"}, 1),
        ({"zero_stage": 2}, {"optimizer": "adamw"}, 2),
    ],
)
def test_zero_stage__goes_with_the_optimizer(engine, stage, expected):
    assert resolved(recipe_of(engine=engine, **stage)).engine.zero_stage == expected


def test_resolve__what_is_written_reads_back_equal_and_stays():
    recipe = resolved(recipe_of())
    assert build(Recipe, parse_yaml(dump(recipe))) == recipe
    assert resolved(recipe, shown=5) == recipe
    check(recipe)


def test_resolve__a_run_that_goes_on_keeps_what_its_checkpoint_says():
    earlier = resolved(recipe_of({"pretrained": "timm"}, steps=6000), shown=500_000)
    asked = recipe_of({"pretrained": "timm"}, steps=12_000)
    again = resolved(asked, shown=10, in_shards=1, earlier=earlier)
    assert again.normalizer.images == 50_000
    assert again.stages["one"].frozen_steps == 100, "though the stage is longer now"
    assert again.stages["one"].steps == 12_000


def test_keep_resolved__looks_at_auto_alone():
    earlier, asked = resolved(recipe_of()), recipe_of(freeze_body_steps=3)
    kept = keep_resolved(asked, earlier)
    assert kept.stages["one"].freeze_body_steps == 3
    assert kept.normalizer == earlier.normalizer
    other = dataclasses.replace(earlier, stages={})
    assert keep_resolved(recipe_of(), other).stages["one"].freeze_body_steps == "auto"


def test_kept__names_every_field_that_is_auto_but_those_that_each_start_chooses():
    chosen = {"engine.name", "engine.device", "engine.zero_stage"}
    automatic = {name for name, default, *_ in describe() if default == "auto"}
    assert automatic - chosen == {name.replace("*", "NAME") for name in KEPT}
