"""A recipe of several students is a plain recipe of one for each of its stages."""

from dataclasses import replace

import pytest
import yaml

from radio_distill.config import (
    Recipe,
    build,
    by_student,
    check,
    dump,
    for_stage,
    override,
    stages_needed,
)
from radio_distill.config.recipes import recipe_names
from radio_distill.errors import ConfigError
from stages.recipes import load_recipe

CHAIN = yaml.safe_load("""
name: chain
output: somewhere
data: {shards: [a.tar]}
student: {architecture: small, max_size: 64, heads: {proxy: {features: {name: mlp}}}}
teachers:
  clip: {preset: a}
  unused: {preset: b}
  proxy: {preset: student, stage: stage2}
  dino: {preset: a}
fit: {teacher: dino}
stages:
  stage1:
    student: {architecture: large, max_size: 128, heads: {dino: {features: {name: conv}}}}
    partitions: [{name: a, size: 128, teachers: [dino], batch_size: 4}]
  stage2:
    start_from: stage1
    upsampler: {name: tile}
    partitions: [{name: a, size: 96, teachers: [clip], upsample: [clip], batch_size: 4}]
  stage3:
    partitions: [{name: a, size: 64, teachers: [proxy], batch_size: 4}]
  stage4:
    start_from: stage3
    partitions: [{name: a, size: 64, teachers: [dino, proxy], batch_size: 4}]
""")


def chain(*assignments: str) -> Recipe:
    made: Recipe = build(Recipe, override(CHAIN, assignments))
    check(made)
    return made


def test_for_stage__is_a_plain_recipe_of_the_stages_that_train_its_student():
    recipe = chain()
    assert by_student(recipe) == [["stage1", "stage2"], ["stage3", "stage4"]]
    first, last = for_stage(recipe, "stage2"), for_stage(recipe, "stage3")
    assert for_stage(recipe, "stage1") == first
    assert for_stage(recipe, "stage4") == for_stage(recipe) == last
    assert (first.student.architecture, last.student.architecture) == ("large", "small")
    assert (list(first.stages), list(last.stages)) == (["stage1", "stage2"], ["stage3", "stage4"])
    assert list(first.teachers) == ["clip", "dino"]
    assert list(last.teachers) == ["proxy", "dino"]
    proxy = last.teachers["proxy"]
    assert (proxy.stage, proxy.weights) == ("", "somewhere/chain/stage2-tile")
    assert not any(stage.student for part in (first, last) for stage in part.stages.values())
    assert (first.fit.teacher, last.fit.teacher) == ("dino", "dino")
    for part in (first, last):
        check(part)
        assert for_stage(part) == part
        assert build(Recipe, yaml.safe_load(dump(part))) == part
    assert build(Recipe, yaml.safe_load(dump(recipe))) == recipe


def test_for_stage__another_place_of_the_proxy_is_kept():
    moved = chain("teachers.proxy.weights=/other/stage2", "name=again")
    assert for_stage(moved).teachers["proxy"].weights == "/other/stage2"


@pytest.mark.parametrize("name", recipe_names())
def test_for_stage__a_recipe_of_one_student_stays_as_it_is_and_no_other(name):
    recipe = load_recipe(name)
    if any(stage.student for stage in recipe.stages.values()):
        assert len(by_student(recipe)) > 1
        assert all(for_stage(recipe, stage) != recipe for stage in recipe.stages)
        return
    assert by_student(recipe) == [list(recipe.stages)]
    assert all(for_stage(recipe, stage) is recipe for stage in (*recipe.stages, "", "fit"))


def test_stages_needed__those_that_teach_and_those_that_it_starts_from():
    recipe = chain()
    assert stages_needed(recipe, "stage2") == ["stage1", "stage2"]
    assert stages_needed(recipe, "stage4") == ["stage1", "stage2", "stage3", "stage4"]
    plain = replace(recipe, teachers={**recipe.teachers, "proxy": recipe.teachers["clip"]})
    assert stages_needed(plain, "stage4") == ["stage3", "stage4"]


def test_a_student_may_learn_from_an_earlier_one_of_its_own_kind():
    """Stages that do not start from one another train two students of one section."""
    again = chain("stages.stage1.student=null", "student.max_size=128", "student.heads={}")
    first, last = for_stage(again, "stage1"), for_stage(again)
    assert first.student == last.student
    assert list(last.teachers) == ["proxy", "dino"]


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("teachers.proxy.stage=stage9", "teachers.proxy.stage: no stage 'stage9'"),
        ("teachers.proxy.stage=stage3", "stage3 is not trained before stage3"),
        ("teachers.proxy.stage=stage4", "stage4 is not trained before stage3"),
        ("teachers.proxy.preset=timm", "teachers.proxy.stage: the student of a stage is of"),
        ("stages.stage2.student={}", "stages.stage2.student: it starts from the student of stage1"),
        ("stages.stage1.student.registers=-1", "stages.stage1.student.registers: -1 is not"),
        ("stages.stage1.student.regs=1", "unknown field 'stages.stage1.student.regs'"),
        ("stages.stage1.student.map=dilated", "stages.stage1.student.map: only a student of"),
        ("stages.stage1.student.max_size=64", "stages.stage2.partitions.a.size: 96 is above"),
        ("stages.stage1.student.heads.proxy={}", "stages.stage1.student.heads: no teacher 'proxy'"),
        ("student.heads.clip={}", "student.heads: no teacher 'clip'"),
        ("stages.stage3.start_from=stage4", "stages.stage3.start_from: a stage cannot start from"),
        ("stages.stage2=null", "teachers.proxy.stage: no stage 'stage2'"),
    ],
)
def test_check__what_a_chain_cannot_be(assignment, line):
    with pytest.raises(ConfigError) as caught:
        chain(assignment)
    assert line in str(caught.value)


def test_check__the_same_problem_is_said_once():
    with pytest.raises(ConfigError) as caught:
        chain("stages.stage1.student=null", "student.map=dilated", "student.heads={}")
    assert sum("student.map" in line for line in caught.value.args) == 1
