"""The recipes' fields beside the figures that the papers print (``published.yaml``)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from radio_distill.config import Recipe, build, by_student, for_stage, option, section_of
from radio_distill.config.flat import WITHOUT_EFFECT, flat_fields, matches

FILE = Path(__file__).with_name("published.yaml")


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

    Lists and mappings that are empty, and that no paper gives, are left out, and so are a student's
    fields that its kind of body does not have.
    """
    sections = {section_of(recipe, names[0]): names[0] for names in by_student(recipe)}
    foreign = [
        f"{section}.{field}"
        for section, stage in sections.items()
        for field in for_stage(recipe, stage).student.foreign_fields
    ]
    ignored = [tuple(field.split(".")) for field in (*WITHOUT_EFFECT, *foreign)]
    rows = [
        Row(path, value, _figure(path, figures))
        for path, value in flat_fields(recipe).items()
        if not any(matches(field, path[: len(field)]) for field in ignored)
    ]
    return [row for row in rows if row.paper or row.value not in ([], {}, None)]


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


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
