"""The recipes' fields beside the figures that the papers print (``published.yaml``)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from radio_distill.config import Recipe, build, dump, option
from radio_distill.stage import images_per_step

FILE = Path(__file__).with_name("published.yaml")
WITHOUT_EFFECT = (
    "name", "output", "seed", "log", "evaluation", "fit", "normalizer.cache",
    "engine.name", "engine.zero_stage", "engine.micro_batch", "engine.device", "engine.compile",
    "data.index", "data.workers", "data.max_bad_share", "student.gradient_checkpointing",
    "teachers.*.weights", "teachers.*.sha256", "teachers.*.micro_batch",
    "stages.*.upsampler.micro_batch", "stages.*.upsampler.weights", "stages.*.partitions.*.name",
    "stages.*.partitions.*.ranks",
)  # fmt: skip
"""Fields, or sections, that say how a student is trained and not what it becomes."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper prints for a field."""

    value: Any = option(help="the paper's value, in the recipe's words where it is equal")
    source: str = option(help="paper and section")
    note: str = option("", "why the recipe differs")


@dataclass(frozen=True)
class Row:
    """A field of a recipe; after :func:`merge_equal`, of several stages, partitions or teachers."""

    path: tuple[str, ...]
    value: Any
    paper: Published | None
    """None where no paper gives it: the value is ours."""


def published() -> dict[str, dict[str, Published]]:
    """Read the papers' figures: by recipe, by field, in which ``*`` stands for any one name."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {
        name: {field: build(Published, entry, f"{name}.{field}") for field, entry in fields.items()}
        for name, fields in data.items()
        if not name.startswith("_")
    }


def rows_of(recipe: Recipe, figures: Mapping[str, Published]) -> list[Row]:
    """Return every field of a recipe that has an effect on the student, with the paper's figure.

    Lists and mappings that are empty, and that no paper gives, are left out.
    """
    ignored = [tuple(field.split(".")) for field in WITHOUT_EFFECT]
    rows = [
        Row(path, value, _figure(path, figures))
        for path, value in fields_of(recipe).items()
        if not any(matches(field, path[: len(field)]) for field in ignored)
    ]
    return [row for row in rows if row.paper or row.value not in ([], {})]


def fields_of(recipe: Recipe) -> dict[tuple[str, ...], Any]:
    """Return every field by its path; partitions go by their names.

    ``stages.NAME.images_per_step`` is added, the sum of the batches.
    """
    fields = yaml.safe_load(dump(recipe))
    for name, stage in recipe.stages.items():
        fields["stages"][name]["images_per_step"] = images_per_step(stage)
    return dict(_leaves(fields))


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {item["name"]: item for item in value}
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(item, (*path, str(key)))


def matches(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Return whether a path is meant by a pattern, in which ``*`` stands for any one name."""
    pairs = zip(pattern, path, strict=False)
    return len(pattern) == len(path) and all(key in ("*", name) for key, name in pairs)


def _figure(path: tuple[str, ...], figures: Mapping[str, Published]) -> Published | None:
    """Return the entry that names a field most exactly."""
    found = [field for field in figures if matches(field.split("."), path)]
    return figures[min(found, key=lambda field: field.count("*"))] if found else None


def merge_equal(rows: Sequence[Row]) -> list[Row]:
    """Merge rows that differ only in the name of a stage, a teacher or a partition.

    The names become ``*`` where all of them agree, else ``{a,b}``.
    """
    return _merge_at(_merge_at(rows, 3), 1)


def _merge_at(rows: Sequence[Row], position: int) -> list[Row]:
    groups: dict[str, list[Row]] = {}
    siblings: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if not _is_named(row.path, position):
            groups[repr(row.path)] = [row]
            continue
        head, name, rest = row.path[:position], row.path[position], row.path[position + 1 :]
        groups.setdefault(repr((head, rest, row.value, row.paper)), []).append(row)
        siblings.setdefault(head, set()).add(name)
    return [_merged(group, position, siblings) for group in groups.values()]


def _is_named(path: tuple[str, ...], position: int) -> bool:
    parents = ("stages", "teachers") if position == 1 else ("partitions",)
    return len(path) > position + 1 and path[position - 1] in parents


def _merged(
    rows: Sequence[Row], position: int, siblings: Mapping[tuple[str, ...], set[str]]
) -> Row:
    path = rows[0].path
    if not _is_named(path, position):
        return rows[0]
    names = [row.path[position] for row in rows]
    name = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    if set(names) == siblings[path[:position]]:
        name = "*"
    return replace(rows[0], path=(*path[:position], name, *path[position + 1 :]))
