"""The students of a recipe: one, or of a chain several, of which later ones learn from earlier.

EUPE (arXiv 2603.22387) has many teachers teach a large proxy, and the proxy alone its student: one
recipe, whose first stages have a student of their own. Everything that runs sees a plain recipe of
one student, which :func:`for_stage` makes.
"""

from collections.abc import Iterator
from dataclasses import replace

from ..registry import nearest
from .models import TeacherConfig
from .schema import Recipe


def by_student(recipe: Recipe) -> list[list[str]]:
    """Return the names of a recipe's stages, those that train the same student together.

    Of a chain these are stages that start from one another; of any other recipe, all.
    """
    if not _is_chain(recipe):
        return [list(recipe.stages)]
    groups: dict[str, list[str]] = {}
    for name in recipe.stages:
        groups.setdefault(recipe.stages_before(name)[0], []).append(name)
    return [*groups.values()]


def for_stage(recipe: Recipe, name: str = "") -> Recipe:
    """Return the plain recipe of one student that a stage is of; without a name, the last one.

    Its stages are those that train the same student, its teachers those that they show, with the
    folder of an earlier stage as the weights of one that is its student. A recipe of one student
    and other teachers alone is returned as it is, and so is any where ``name`` is no stage.
    """
    name = name or next(reversed(recipe.stages), "")
    if name not in recipe.stages or not _is_chain(recipe):
        return recipe
    group = next(names for names in by_student(recipe) if name in names)
    shown = _shown(recipe, group)
    teachers = {key: plain_teacher(recipe, key) for key in recipe.teachers if key in shown}
    return replace(
        recipe,
        student=recipe.stages[group[0]].student or recipe.student,
        teachers=teachers,
        stages={key: replace(recipe.stages[key], student=None) for key in group},
        fit=recipe.fit if recipe.fit.teacher in teachers else replace(recipe.fit, teacher=""),
    )


def plain_teacher(recipe: Recipe, name: str) -> TeacherConfig:
    """Return a teacher's section; the weights of an earlier stage's student lie in its folder."""
    config = recipe.teachers[name]
    if not config.stage:
        return config
    folder = config.weights or str(recipe.stage_folder(config.stage))
    return replace(config, stage="", weights=folder)


def section_of(recipe: Recipe, name: str) -> str:
    """Return the name of the section that describes the student of a stage."""
    if name not in recipe.stages:
        return "student"
    first = recipe.stages_before(name)[0]
    return f"stages.{first}.student" if recipe.stages[first].student else "student"


def stages_needed(recipe: Recipe, name: str) -> list[str]:
    """Return the stages that must be trained for one, in an order that serves, itself the last.

    They are those that it starts from, and those whose students teach it.
    """
    found: list[str] = []

    def add(stage: str) -> None:
        teachers = for_stage(recipe, stage).teachers
        starts = recipe.stages[stage].start_from
        for earlier in (*(recipe.teachers[teacher].stage for teacher in teachers), starts):
            if earlier in recipe.stages and earlier not in found:
                add(earlier)
        found.append(stage)

    add(name)
    return found


def check_students(recipe: Recipe) -> Iterator[str]:
    """Say where stages have a student, or a teacher, that they cannot have; a line a problem."""
    for name, stage in recipe.stages.items():
        if stage.student and stage.start_from in recipe.stages:
            yield (
                f"stages.{name}.student: it starts from the student of {stage.start_from}, which "
                "is another; drop one of both"
            )
    order = list(recipe.stages)
    for name, teacher in recipe.teachers.items():
        path, earlier = f"teachers.{name}.stage", teacher.stage
        if not earlier:
            continue
        if teacher.preset != "student":
            yield f"{path}: the student of a stage is of `preset: student`, not {teacher.preset}"
        if earlier not in recipe.stages:
            yield f"{path}: no stage {earlier!r} ({nearest(earlier, order)})"
            continue
        for group in by_student(recipe):
            if name in _shown(recipe, group) and order.index(earlier) >= order.index(group[0]):
                yield (
                    f"{path}: {earlier} is not trained before {group[0]}, whose student learns "
                    "from it; name an earlier stage"
                )


def _is_chain(recipe: Recipe) -> bool:
    has_teacher = any(teacher.stage for teacher in recipe.teachers.values())
    return has_teacher or any(stage.student for stage in recipe.stages.values())


def _shown(recipe: Recipe, stages: list[str]) -> set[str]:
    """Return the teachers that some stages show."""
    partitions = [item for stage in stages for item in recipe.stages[stage].partitions]
    return {teacher for item in partitions for teacher in item.teachers}
