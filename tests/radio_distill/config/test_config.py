"""Recipes: loading, overriding, checking, dumping; every message is one line with the hint."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from radio_distill import config
from radio_distill.config import (
    Recipe,
    StudentConfig,
    assignments_of,
    build,
    check,
    describe_fields,
    differences,
    dump,
    override,
    place_indexes,
    share_of,
    with_new_names,
)
from radio_distill.errors import ConfigError
from radio_distill.system.nested import plain_data

BASE = {
    "name": "small",
    "data": {"shards": ["data/*.tar"]},
    "student": {"patch_size": 16, "max_size": 512},
    "teachers": {"dino": {"preset": "a"}, "clip": {"preset": "b"}},
    "stages": {
        "stage1": {
            "steps": 10,
            "partitions": [
                {"name": "low", "size": 128, "teachers": ["dino", "clip"], "batch_size": 8},
                {"name": "high", "size": [256, 384], "teachers": ["dino"], "batch_size": 2},
            ],
        }
    },
}


def recipe(*assignments: str) -> Recipe:
    built = build(Recipe, override(BASE, assignments, "stage1"))
    check(built)
    return built


def test_build__types_and_defaults():
    made = recipe()
    assert made.stages["stage1"].partitions[1].size == (256, 384)
    assert made.stages["stage1"].optimizer == "lamb"
    assert made.teachers["dino"].input_size == "native"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1


def test_dump__loads_back_to_an_equal_recipe(tmp_path):
    made = recipe("stage.learning_rate=3e-4", "data.weights=[2]")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(made))
    assert config.load(path) == made
    assert differences(made, config.load(path)) == []


@given(
    st.fixed_dictionaries(
        {
            "registers": st.integers(0, 16),
            "position_dropout": st.floats(0, 1, allow_nan=False),
            "gradient_checkpointing": st.booleans(),
            "architecture": st.text("abc_1é:#- ", min_size=1),
        }
    )
)
def test_dump__round_trip_of_any_value(values):
    student = build(StudentConfig, values)
    assert build(StudentConfig, yaml.safe_load(dump(student))) == student


@pytest.mark.parametrize(
    ("assignment", "field", "expected"),
    [
        ("student.registers=8", lambda r: r.student.registers, 8),
        ("stage.learning-rate=1e-3", lambda r: r.stages["stage1"].learning_rate, 1e-3),
        ("stages.stage1.partitions.low.batch_size=4", lambda r: _low(r).batch_size, 4),
        ("stages.stage1.partitions.0.upsample=[dino]", lambda r: _low(r).upsample, ("dino",)),
        ("stages.stage1.partitions.low.upsample=dino,clip", lambda r: _low(r).upsample, ("dino", "clip")),  # noqa: E501
        ("stages.stage1.partitions.low.size=64x96", lambda r: _low(r).size, (64, 96)),
        ("stages.stage1.partitions.low={name: low, sizes: [64X96, 32], teachers: [dino, clip], batch_size: 8}", lambda r: _low(r).sizes, ((64, 96), 32)),  # noqa: E501
        ("stages.stage1.partitions.low={name: low, sizes: '64x96, 32', teachers: dino, batch_size: 8}", lambda r: _low(r).sizes, ((64, 96), 32)),  # noqa: E501
        ("stage.partitions.low.teacher_sizes.dino=28,56", lambda r: _low(r).teacher_sizes, {"dino": (28, 56)}),  # noqa: E501
        ("stage.steps=1e2", lambda r: r.stages["stage1"].steps, 100),  # which YAML reads as a text
        ("stage.steps=1.2e+2", lambda r: r.stages["stage1"].steps, 120),
        ("normalizer.images=1e5", lambda r: r.normalizer.images, 100_000),
        ("stage.freeze_body_steps=0.5", lambda r: r.stages["stage1"].frozen_steps, 5),
        ("teachers.dino.input_size=match", lambda r: r.teachers["dino"].input_size, "match"),
        ("teachers.dino.options.blocks=11", lambda r: r.teachers["dino"].options, {"blocks": 11}),
        ("student.pretrained=", lambda r: r.student.pretrained, ""),
        ("output=runs #1/a", lambda r: r.output, "runs #1/a"),
        ("output=#1", lambda r: r.output, "#1"),
        ("seed=7", lambda r: r.seed, 7),
    ],
)  # fmt: skip
def test_override__reaches_every_kind_of_field(assignment, field, expected):
    assert field(recipe(assignment)) == expected


def _low(made):
    return made.stages["stage1"].partitions[0]


def test_override__leaves_its_input_alone():
    before = yaml.safe_dump(BASE)
    override(BASE, ["student.registers=9", "stages.stage1.partitions.low.size=64"])
    assert yaml.safe_dump(BASE) == before


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("student.regsters=8", "unknown field 'student.regsters' (did you mean 'registers'?)"),
        ("student.registers=many", "student.registers: 'many' is not a whole number"),
        ("student.registers=true", "student.registers: True is not a whole number"),
        ("stage.optimizer=sgd", "stages.stage1.optimizer: 'sgd' is not one of adamw, lamb"),
        ("engine.zero_stage=4", "engine.zero_stage: 4 is not one of auto, 0, 1, 2, 3"),
        ("stages.stage1.partitions.lo.size=64", "no item 'lo' in the list (known: low, high)"),
        ("name.deeper=1", "name is a plain value and has no field 'deeper'"),
        ("name=1.10", "name: 1.1 is not a text; put it in quotes"),
        ("stage.steps=1.5", "stages.stage1.steps: 1.5 is not a whole number"),
        ("stage.steps=1e-3", "stages.stage1.steps: '1e-3' is not a whole number"),
        ("stage.steps=1e999", "stages.stage1.steps: '1e999' is not a whole number"),
        ("stage.partitions.low.size=64x", "'64x' is not a whole number or a list"),
        ("augmentation.window_sizes=6x32", "expected a list, got '6x32'"),
        ("stage.partitions.low.size=500", "500 is not a multiple of patch 16 (nearest 496)"),
        ("stage.partitions.low.size=1024", "1024 is above student.max_size 512"),
        ("student.window_size=5", "128 is not a multiple of patch 16 times window 5 (nearest 160)"),
        ("stage.partitions.low.batch_size=0", "partitions.low.batch_size: 0 is below 1"),
        ("stage.partitions.low.teachers=[]", "a partition needs at least one teacher"),
        ("stage.partitions.low.teachers=[dina]", "no teacher 'dina' (did you mean 'dino'?)"),
        ("stage.partitions.high.upsample=[clip]", "'clip' is not a teacher of this partition"),
        ("stage.partitions.high.name=low", "two partitions are called 'low'"),
        ("data.weights=[1, 2]", "2 weights for 1 shards entries"),
        ("data.crop_scale=[0.9, 0.5]", "crop_scale: 0.9, 0.5 is not 0 < low"),
        ("data.workers=-1", "data.workers: -1 is not 0 to 1,024"),
        ("data.max_bad_share=2", "data.max_bad_share: 2.0 is not 0 to 1"),
        ("stage.partitions=[]", "a stage needs at least one partition"),
        ("teachers={}", "a recipe needs at least one teacher"),
        ("stage.upsampler.factor=0", "upsampler.factor: 0 is below 1"),
        ("evaluation={every: 1, best: fidelity}", "'fidelity' is no BENCHMARK/METRIC"),
        ("noequals", "is not of the form field.name=value"),
    ],
)
def test_recipe__bad_values_are_named(assignment, message):
    with pytest.raises(ConfigError) as caught:
        recipe(assignment)
    assert message in str(caught.value)


def test_check__reports_every_problem_on_a_line_of_its_own():
    wrong = ["data.flip=2", "student.regsters=1", "stage.steps=0", "stage.partitions.low.size=x"]
    with pytest.raises(ConfigError) as caught:
        recipe(*wrong, "teachers.dino.input_size=-1")
    assert [line.split(":")[0].split(" (")[0] for line in str(caught.value).splitlines()] == [
        "data.flip",
        "unknown field 'student.regsters'",
        "teachers.dino.input_size",
        "stages.stage1.steps",
        "stages.stage1.partitions.low.size",
    ]
    with pytest.raises(ConfigError) as caught:  # between fields, once each of them can be
        recipe("stage.partitions.low.size=500", "data.weights=[1, 2]", "stage.start_from=stage1")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "field",
    [
        *("output", "data.cache", "normalizer.cache", "evaluation.images", "evaluation.labels"),
        "evaluation.data.voc",
    ],
)
def test_check__folders_are_no_addresses(field):
    with pytest.raises(ConfigError, match=f"^{field}: .*a disk"):
        recipe(f"{field}=s3://bucket/folder")


def test_check__a_folder_of_indexes_is_no_address():
    with pytest.raises(ConfigError, match=r"^data\.index\.1: .*a disk"):
        recipe("data.index=[beside, s3://bucket/folder]")


def test_folder__below_ones_own_home(monkeypatch, tmp_path):
    """YAML does not unfold ``~``, as a shell does for what is given on its line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    made = recipe("output=~/runs")
    assert made.folder == tmp_path / "runs" / "small"
    assert place_indexes(made).data.index == ("beside", str(tmp_path / "runs" / "indexes"))


def test_check__compiled_blocks_promise_no_bits():
    with pytest.raises(ConfigError, match=r"engine\.compile: which graph"):
        recipe("engine.compile=true", "engine.deterministic=true")


def test_with_new_names__a_field_that_is_gone_is_left_out_where_it_was_not_set():
    earlier = plain_data(recipe())
    earlier["stages"]["stage1"]["weight_anchor"] = 0.0
    assert build(Recipe, with_new_names(earlier)) == recipe()
    earlier["stages"]["stage1"]["weight_anchor"] = 0.5
    with pytest.raises(ConfigError, match=r"stage1\.weight_anchor is gone"):
        build(Recipe, with_new_names(earlier))


def test_build__missing_field_says_what_it_is():
    with pytest.raises(ConfigError, match=r"data\.shards"):
        build(Recipe, {**BASE, "data": {}})


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "", "a: \x00", "data: {a: 1}\ndata: {b: 1}", "data: {a: 1, a: 1}"]
)
def test_load__not_a_recipe(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "absent.yaml")


def test_differences__names_fields_and_values():
    changed = differences(recipe(), recipe("stage.partitions.low.batch_size=4", "seed=1"))
    assert changed == ["seed: 0 -> 1", "stages.stage1.partitions.0.batch_size: 8 -> 4"]


def test_describe__explains_every_field():
    rows = describe_fields(Recipe)
    assert all(text for _, _, _, text in rows)
    names = [name for name, *_ in rows]
    assert len(names) == len(set(names))
    assert "stages.NAME.partitions.N.upsample" in names
    assert "teachers.NAME.weights" in names


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a.tar, b.tar", ("a.tar", "b.tar")),
        ("s/{000,001}.tar,b.tar", ("s/{000,001}.tar", "b.tar")),
        ("s/{000..127}.tar", ("s/{000..127}.tar",)),
    ],
)
def test_override__lists_of_text_are_cut_at_commas_but_not_in_braces(text, entries):
    assert recipe(f"data.shards={text}").data.shards == entries


def test_assignments_of__a_file_of_changes(tmp_path):
    changes = tmp_path / "smaller.yaml"
    changes.write_text(
        """
student: {registers: 2}
teachers:
  dino: {options: {}, dtype: bfloat16}
stages:
  stage1:
    steps: 7
    partitions: {high: {size: [64, 96], batch_size: 3}}
data: {shards: ["a: b.tar", "c.tar"]}
"""
    )
    changed = recipe(*assignments_of(changes))
    assert changed.student.registers == 2
    assert changed.teachers["dino"].dtype == "bfloat16"
    assert changed.teachers["dino"].preset == "a"
    assert changed.stages["stage1"].steps == 7
    high = changed.stages["stage1"].partitions[1]
    assert (high.size, high.batch_size, high.name) == ((64, 96), 3, "high")
    assert changed.data.shards == ("a: b.tar", "c.tar")

    changes.write_text(
        "stages: {stage1: {partitions: [{name: a, size: 64, teachers: [dino], batch_size: 2}]}}"
    )
    assert [item.name for item in recipe(*assignments_of(changes)).stages["stage1"].partitions] == [
        "a"
    ]


SHARED = (
    "stage.partitions=[{name: a, size: 64, teachers: [dino], batch_size: 4},"
    "{name: b, size: 128, teachers: [dino], batch_size: 4, images_of: a}]"
)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["stage.partitions.b.images_of=c"], "'c' is not an earlier partition with images of its own (known: a)"),  # noqa: E501
        (["stage.partitions.b.batch_size=3"], "3 is not the 4 of a, whose images these are"),
        (["stage.partitions.b.size=[64, 128]"], "at its aspect ratio"),
        (["stage.partitions.a.images_of=b"], "'b' is not an earlier partition"),
        (["augmentation.shift=4"], "64 is no larger than augmentation.shift, 4 patches of 16"),
        (["augmentation.window_share=0.5", "student.window_size=2"], "always attends in windows"),
        (["augmentation.window_sizes=[5, 3]"], "5, 3 is not smallest <="),
        (["augmentation.weight_noise=-1"], "weight_noise: -1.0 is below 0"),
        (["loss.mesa=1"], "loss.mesa compares with the student's EMA"),
        (["stage.anchor=1"], "anchor: keeps the student near its start, and the stage has none"),
        (["stage.weight_anchor=1"], "stages.stage1.weight_anchor is gone: the stage's `anchor`"),
        (["teachers.dino.relation={arkd: 1}", "engine.zero_stage=3"], "engine.zero_stage: a relation runs"),  # noqa: E501
        (["stage.partitions.a.sizes=[64, 80]"], "give either size or sizes"),
        (["stage.partitions.a.size=0"], "give either size or sizes"),
        (["stage.partitions.a.size=0", "stage.partitions.a.sizes=[64, 70]"], "sizes: 70 is not a multiple"),  # noqa: E501
        (["stage.partitions.a.mosaic=[clip]"], "mosaic: 'clip' is not a teacher of this partition"),
        (["stage.partitions.a.mosaic=[dino]", "stage.partitions.a.upsample=[dino]"], "it cannot be both"),  # noqa: E501
        (["stage.freeze_body_steps=-1"], "freeze_body_steps: -1 is negative"),
        (["stage.freeze_body_steps=1.5"], "1.5 is neither a whole number nor a share below 1"),
        (["stage.freeze_body_steps=10"], "with 10 of 10 steps frozen the body would not learn"),
        (["stage.freeze_body_steps=0.99"], "with 0.99 of 10 steps frozen the body would not"),
        (["stage.freeze_body_steps=5000"], "with 5000 of 10 steps frozen the body would not"),
        (["normalizer.images=.nan"], "normalizer.images: nan is not a finite number"),
        (["normalizer.images=.inf"], "normalizer.images: inf is not a finite number"),
    ],
)  # fmt: skip
def test_recipe__parts_of_a_step_that_contradict_each_other(assignments, message):
    recipe(SHARED)
    with pytest.raises(ConfigError) as caught:
        recipe(SHARED, *assignments)
    assert message in str(caught.value)


def test_share_of__numbers_and_shares():
    assert [share_of(amount, 300) for amount in (0, 5000, 0.1, 1, 0.5)] == [0, 5000, 30, 1, 150]
    assert recipe("stage.freeze_body_steps=0.2").stages["stage1"].frozen_steps == 2


def test_override__null_drops_a_teacher_everywhere(tmp_path):
    path = tmp_path / "drop.yaml"
    path.write_text("teachers: {clip: null}\n")
    uses = ["stage.partitions.low.teacher_sizes={clip: 64, dino: 96}",
            "stage.partitions.low.upsample=[clip, dino]"]  # fmt: skip
    made = recipe(*uses, *assignments_of(path))
    low, high = made.stages["stage1"].partitions
    assert list(made.teachers) == ["dino"]
    assert (low.teachers, high.teachers) == (("dino",), ("dino",))
    assert (low.upsample, low.teacher_sizes) == (("dino",), {"dino": 96})
    with pytest.raises(ConfigError, match="teacher"):
        recipe("teachers.dino=null")


def test_override__null_drops_a_partition_and_a_stage():
    assert [p.name for p in recipe("stage.partitions.high=null").stages["stage1"].partitions] == [
        "low"
    ]
    more = ["stages.stage2={start_from: stage1, partitions: []}", "stages.stage2=null"]
    assert recipe(*more) == recipe()
    for nothing in ("stage.partitions.hgih=null", "teachers.hgih=null", "stages.hgih=null"):
        with pytest.raises(ConfigError, match="hgih"):
            recipe(nothing)


@pytest.mark.parametrize("name", ["2026-12-01", "007", "12", "1e5", "'1.10'"])
def test_load__names_that_yaml_reads_as_days_and_numbers(tmp_path, name):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**BASE, "name": "x"}))
    made = config.load(tmp_path / "mine.yaml", [f"name={name}"])
    assert made.name == name.strip("'")
    (tmp_path / "again.yaml").write_text(dump(made))
    assert config.load(tmp_path / "again.yaml") == made


def test_override__times_are_no_numbers_of_base_60():
    with pytest.raises(ConfigError, match="'4:00:00' is not a whole number"):
        recipe("stage.steps=4:00:00")


def test_override__names_with_dots_in_them():
    data = yaml.safe_load(yaml.safe_dump(BASE))
    data["stages"]["stage1.5"] = data["stages"].pop("stage1")
    data["stages"]["stage1.5"]["partitions"][0]["name"] = "lo.w"
    changed = override(
        data, ["stage.steps=7", "stages.stage1.5.partitions.lo.w.size=64"], "stage1.5"
    )
    assert changed["stages"].keys() == {"stage1.5"}
    assert changed["stages"]["stage1.5"]["steps"] == 7
    assert changed["stages"]["stage1.5"]["partitions"][0]["size"] == 64
    dropped = override(data, ["stages.stage1.5.partitions.lo.w=null"])
    assert [item["name"] for item in dropped["stages"]["stage1.5"]["partitions"]] == ["high"]
    assert override(data, ["stages.stage1.5=null"])["stages"] == {}


def test_load__names_that_yaml_reads_as_other_than_texts(tmp_path):
    """A stage called 1, a partition called after its size, a teacher called no."""
    path = tmp_path / "numbers.yaml"
    path.write_text("""
data: {shards: shards}
teachers: {no: {preset: tiny_vit}, yes: {preset: tiny_vit}}
stages:
  1: &first {steps: 2, partitions: [{name: 64, size: 64, teachers: ["no"], batch_size: 2}]}
  2: {<<: *first, start_from: 1}
""")
    changes = ["stages.2.steps=9", "stages.1.partitions.64.batch_size=7", "teachers.yes=null"]
    made = config.load(path, changes)
    assert list(made.teachers) == ["no"]
    assert {name: stage.steps for name, stage in made.stages.items()} == {"1": 2, "2": 9}
    assert made.stages["1"].partitions[0].batch_size == 7
    assert list(config.load(path, ["stages.2=null"]).stages) == ["1"]


def test_losses__relations_of_one_teacher_before_those_of_all():
    made = recipe("loss.relation={arkd: 2}", "teachers.clip.relation={arkd: 0, rkd_distance: 1}")
    assert {name: losses.relation for name, losses in made.losses.items()} == {
        "dino": {"arkd": 2.0},
        "clip": {"rkd_distance": 1.0},
    }


def test_losses__one_by_name_or_several_with_weights(tmp_path):
    """In YAML, as an assignment, and a teacher's own."""
    made = recipe(
        "loss.feature={cosine: 0.9, smooth_l1: 0.1}",
        "teachers.dino.feature_loss=gram",
        "teachers.clip.summary_loss={cosine: 0.5, smooth_l1: 0.5}",
    )
    assert made.loss.feature == {"cosine": 0.9, "smooth_l1": 0.1}
    assert made.teachers["dino"].feature_loss == "gram"
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(made))
    assert config.load(path) == made


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("loss.feature={cosin: 1}", r"loss\.feature: 'cosin' .* cosine"),
        ("loss.feature={cosine: -1}", r"loss\.feature\.cosine: -1"),
        ("loss.feature={}", r"loss\.feature: names no loss"),
        ("loss.summary=gram", r"loss\.summary: 'gram'"),
        ("teachers.dino.summary_loss={angle: 1, mse: 1}", r"dino\.summary_loss: angle"),
    ],
)
def test_losses__errors_name_the_field(assignment, message):
    with pytest.raises(ConfigError, match=message):
        recipe(assignment)


NAMED = ["data.shards=[a.tar, b.tar]", "data.weights=[1, 0]", "data.names=[lvd, imagenet]"]


def test_sources__named_for_homogeneous_steps_and_for_a_partition():
    more = ["data.homogeneous={imagenet: 0.1}", "stage.partitions.high.source=lvd"]
    made = recipe(*NAMED, *more)
    assert made.data.homogeneous == {"imagenet": 0.1}
    assert made.stages["stage1"].partitions[1].source == "lvd"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([*NAMED, "data.homogeneous={imagnet: 0.1}"], r"data\.homogeneous: .*'imagnet'.*imagenet"),
        (["stage.partitions.low.source=lvd"], r"low\.source: .*'lvd' \(there are no data\.names"),
        ([*NAMED, "data.weights=[0, 0]"], r"data\.weights: all are 0"),
        ([*NAMED, "data.names=[lvd]"], r"data\.names: 1 names and 2 weights for 2"),
        ([*NAMED, "data.names=[lvd, lvd]"], r"two entries have one name"),
        ([*NAMED, "data.homogeneous={lvd: 0.6, imagenet: 0.6}"], r"more than 1 together"),
    ],
)
def test_sources__errors_name_the_field(assignments, message):
    with pytest.raises(ConfigError, match=message):
        recipe(*assignments)


def test_load__a_section_whose_lines_are_all_comments(tmp_path):
    (tmp_path / "mine.yaml").write_text("loss:\n#  feature: mse\n")
    with pytest.raises(ConfigError, match=r"(?m)^loss: .*nothing; take it out"):
        config.load(tmp_path / "mine.yaml")


def test_load__a_file_in_another_encoding(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("name: mine".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"mine\.yaml is no text in UTF-8"):
        config.load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("only words", "a str")])
def test_load__a_file_that_holds_no_fields(tmp_path, text, found):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=rf"mine\.yaml: expected a mapping of fields, found {found}$"
    ):
        config.load(tmp_path / "mine.yaml")
