"""What `auto` means, and that a run which goes on keeps what it meant."""

import dataclasses

import pytest

from radio_distill.config import (
    Facts,
    NormalizerConfig,
    Recipe,
    build,
    check,
    describe_fields,
    dtypes_of,
    dump,
    keep_resolved,
    load,
    parse_yaml,
    resolve,
)
from radio_distill.config.resolve import CHOSEN_ANEW, KEPT
from radio_distill.hints import hints
from radio_distill.stage import resolve_stage
from radio_distill.train.deepspeed_engine import engine_name
from radio_distill.train.optim import learning_rates
from radio_distill.types import TeacherSpec

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


def resolved(recipe: Recipe, in_shards: int | None = None, earlier=None):
    return resolve(recipe, "one", Facts(images_in_shards=in_shards), earlier)


def hints_of(recipe: Recipe, in_shards: int | None = None) -> list[str]:
    spec = TeacherSpec("t", 8, 8, 16, (32, 32), None, (0.5,) * 3, (0.5,) * 3)
    facts = Facts(images_in_shards=in_shards)
    return hints(resolve_stage(recipe, "one", {"t": spec}, facts), in_shards)


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
    recipe = recipe_of(steps=shown // 4)
    assert resolved(recipe, in_shards).normalizer.images == expected


@pytest.mark.parametrize(
    ("fit", "in_shards", "expected"),
    [
        ({}, None, 100_000),  # 3,000 steps of 32 images with 5 views each
        ({}, 90, 90),
        ({"steps": 30, "batch_size": 4}, 10**6, 720),
        ({"steps": 30, "batch_size": 4, "pool": 8}, 10**6, 48),
    ],
)
def test_normalizer_images__of_a_fit(fit, in_shards, expected):
    recipe = build(Recipe, {**SHORTEST, "stages": {}, "fit": fit})
    facts = Facts(images_in_shards=in_shards)
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


def test_data_index__beside_the_shards_else_where_all_runs_are():
    assert resolved(recipe_of()).data.index == ("beside", "runs/indexes")
    recipe = recipe_of()
    mine = dataclasses.replace(recipe.data, index=("/scratch",))
    assert resolved(dataclasses.replace(recipe, data=mine)).data.index == ("/scratch",)


@pytest.mark.parametrize("native", ["float32", "bfloat16"])
def test_dtypes__auto_is_the_native_one_and_others_stay(native):
    recipe = build(
        Recipe,
        {**SHORTEST, "teachers": {"t": {"preset": "p"}, "u": {"preset": "p", "dtype": "float16"}}},
    )
    made = resolve(recipe, "one", Facts(native_dtype=native))
    assert dtypes_of(made) == {
        "engine.precision": native,
        "teachers.t.dtype": native,
        "teachers.u.dtype": "float16",
    }


def test_dtypes__a_run_that_goes_on_elsewhere_keeps_its_own():
    begun = resolve(recipe_of(), "one", Facts(native_dtype="bfloat16"))
    again = resolve(recipe_of(), "one", Facts(native_dtype="float32"), begun)
    assert set(dtypes_of(again).values()) == {"bfloat16"}


def test_resolve__what_is_written_reads_back_equal_and_stays():
    recipe = resolved(recipe_of())
    assert build(Recipe, parse_yaml(dump(recipe))) == recipe
    assert resolved(recipe, in_shards=5) == recipe
    check(recipe)


def test_resolve__a_run_that_goes_on_keeps_what_its_checkpoint_says():
    earlier = resolved(recipe_of({"pretrained": "timm"}, steps=6000))
    asked = recipe_of({"pretrained": "timm"}, steps=12_000)
    again = resolved(asked, in_shards=1, earlier=earlier)
    assert again.normalizer.images == 2400
    assert again.stages["one"].frozen_steps == 100, "though the stage is longer now"
    assert again.stages["one"].steps == 12_000


def test_keep_resolved__looks_at_auto_alone():
    earlier, asked = resolved(recipe_of()), recipe_of(freeze_body_steps=3)
    kept = keep_resolved(asked, earlier)
    assert kept.stages["one"].freeze_body_steps == 3
    assert kept.normalizer == earlier.normalizer
    other = dataclasses.replace(earlier, stages={})
    assert keep_resolved(recipe_of(), other).stages["one"].freeze_body_steps == "auto"


def test_every_field_that_is_auto_is_kept_or_chosen_anew_and_gets_a_value():
    automatic = {name for name, default, *_ in describe_fields(Recipe) if default == "auto"}
    automatic -= {"engine.name", "engine.device"}
    assert automatic == {name.replace("*", "NAME") for name in (*KEPT, *CHOSEN_ANEW)}
    left = {"fit.warmup_steps"}  # a stage does not look at it
    lines = dump(resolved(recipe_of())).splitlines()
    assert sum(line.endswith(": auto") for line in lines) == 2 + len(left)
    assert resolve(recipe_of(), "fit", Facts()).fit.warmup_steps == 100


@pytest.mark.parametrize(
    ("steps", "every", "save_every"),
    [(1, 1, 20), (20, 1, 20), (200, 10, 40), (5000, 50, 1000), (300_000, 50, 1000)],
)
def test_log__short_runs_have_a_curve_and_checkpoints_too(steps, every, save_every):
    log = resolved(recipe_of(steps=steps)).log
    assert (log.every, log.save_every) == (every, save_every)


@pytest.mark.parametrize(("steps", "expected"), [(3000, 100), (9000, 100), (300, 10), (30, 1)])
def test_fit_warmup__a_thirtieth(steps, expected):
    recipe = build(Recipe, {**SHORTEST, "stages": {}, "fit": {"steps": steps}})
    assert resolve(recipe, "fit", Facts()).fit.warmup_steps == expected


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (5, 4), (64, 12)])
def test_workers__one_core_is_left_to_training(cores, expected):
    facts = Facts(cores=cores)
    assert resolve(recipe_of(), "one", facts).data.workers == expected


@pytest.mark.parametrize("pretrained", ["", "timm"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 20, 300_000])
def test_defaults__train_the_body_of_any_student_for_any_number_of_steps(
    steps, world_size, optimizer, pretrained
):
    written = recipe_of({"pretrained": pretrained}, steps=steps, optimizer=optimizer)
    check(written)
    recipe = resolved(written, in_shards=100)
    check(recipe)
    assert hints_of(written, in_shards=100) == []
    stage = recipe.stages["one"]
    assert learning_rates(stage)["body"].max() > 0.9 * stage.learning_rate
    assert 0 < recipe.normalizer.images <= min(4 * steps, 100)
    name = engine_name(recipe.engine, world_size, stage.optimizer)
    assert name == ("single", "deepspeed")[world_size - 1]


@pytest.mark.parametrize(
    ("stage", "images", "hint"),
    [
        ({"steps": 20, "warmup_steps": 20}, 9, "the rate is still rising in the last of 20 steps"),
        ({"steps": 20, "ema_decay": 0.999}, 9, "98% of the EMA is still the start"),
        ({"steps": 20, "freeze_body_steps": 19}, 9, "the body does not learn"),
        ({"steps": 20}, 3, "a step takes 4 images, and data.shards holds 3"),
    ],
)
def test_hints__say_what_is_hardly_meant(stage, images, hint):
    (line,) = hints_of(recipe_of(**stage), images)
    assert hint in line


def test_hints__more_statistics_than_training():
    recipe = dataclasses.replace(recipe_of(steps=9), normalizer=NormalizerConfig(images=3_072_000))
    (line,) = hints_of(recipe)
    assert "statistics of 3,072,000 images for training that shows 36" in line


def test_load__a_recipe_without_a_name_is_called_after_its_file(tmp_path):
    path = tmp_path / "afternoon.yaml"
    path.write_text(dump({key: value for key, value in SHORTEST.items() if key != "name"}))
    assert load(path).name == "afternoon"
    assert load(path, ["name=other"]).name == "other"


@pytest.mark.parametrize(
    ("engine", "steps", "can_compile", "expected"),
    [
        ({}, 1000, True, True),
        ({}, 999, True, False),
        ({}, 1000, False, False),
        ({"deterministic": True}, 1000, True, False),
        ({"zero_stage": 3}, 1000, True, False),
        ({"compile": True}, 10, False, True),
    ],
)
def test_compile__auto_is_on_where_it_pays(engine, steps, can_compile, expected):
    recipe = recipe_of(engine=engine, steps=steps)
    assert resolve(recipe, "one", Facts(can_compile=can_compile)).engine.compile is expected
