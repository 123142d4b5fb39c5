"""Compare the recipes with the papers: every field, the paper's figure, and where it is printed.

radio-distill recipes phi_s_b
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from radio_distill.config import Recipe, StageConfig, partition_sizes
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest
from radio_distill.stage import images_per_step

from ..common import load_recipe
from .published import Row, merge_equal, published, rows_of

OVERVIEW = ("recipe", "student", "teachers", "stages", "optimizer", "losses", "augmentation")
FIELDS = ("field", "recipe", "paper", "source")
OURS = "*ours*"

INTRODUCTION = """\
# Recipes

The published recipes of the RADIO family, and where ours differ from what the papers print. This
page is what `radio-distill recipes --markdown` prints; the papers' figures are in
[published.yaml](../stages/commands/published.yaml), what the recipes cost in [plans.md](plans.md).
"""
LEGEND = f"""\
Below, `*` stands for all stages, teachers or partitions, `{{a,b}}` for some. A field whose source
is {OURS} is printed nowhere: its value is our choice. Left out are fields that say how a run is
carried out and not what becomes of the student (logs, memory, processes, files), and lists that are
empty. What is alike in all recipes stands at the end.

AMR: AM-RADIO (arXiv 2312.06709) · PHIS: PHI-S (arXiv 2410.01680) · V2.5: RADIOv2.5 (arXiv
2412.07679) · FS: FeatSharp (arXiv 2502.16025) · V4: C-RADIOv4 (arXiv 2601.17237) · HF:
configuration of the published model · repo: code that runs the published models · TAO: NVIDIA's
trainer in TAO Toolkit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill recipes``."""
    parser.add_argument("recipe", nargs="?", help="show one recipe field by field")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Print one recipe's fields, or the overview; as Markdown, both of all recipes."""
    known = list(published())
    if arguments.recipe and arguments.recipe not in known:
        raise ConfigError(
            f"no paper is behind a recipe {arguments.recipe!r} ({nearest(arguments.recipe, known)})"
        )
    if arguments.markdown:
        print("\n".join(section(arguments.recipe) if arguments.recipe else page(known)))
    elif arguments.recipe:
        _show(FIELDS, map(field_cells, merged_rows(arguments.recipe)))
    else:
        _show(OVERVIEW, [overview_cells(load_recipe(name)) for name in known])
    return 0


def page(names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the page on all recipes."""
    yield INTRODUCTION
    cells = [overview_cells(load_recipe(name)) for name in names]
    yield from markdown(OVERVIEW, [[cell.replace("\n", "<br>") for cell in row] for row in cells])
    yield ""
    yield LEGEND.rstrip()
    rows = {name: merged_rows(name) for name in names}
    alike = [row for row in rows[names[0]] if all(row in others for others in rows.values())]
    rows["In every recipe"] = alike
    for title, shown in rows.items():
        yield f"\n## {title}\n"
        yield from markdown(
            FIELDS, [field_cells(row) for row in shown if shown is alike or row not in alike]
        )


def section(name: str) -> Iterator[str]:
    """Yield the lines on one recipe."""
    yield f"## {name}\n"
    yield from markdown(FIELDS, map(field_cells, merged_rows(name)))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, row_styles=["", "dim"])
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[").replace("*ours*", "ours") for cell in row))
    console = Console() if Console().is_terminal else Console(width=150)
    console.print(table)


def merged_rows(name: str) -> list[Row]:
    """Return the rows of a recipe's table."""
    return merge_equal(rows_of(load_recipe(name), published()[name]))


def field_cells(row: Row) -> list[str]:
    """Return a field's name, its value, the paper's, and the source."""
    field, value = ".".join(row.path), _text(row.value)
    if row.paper is None:
        return [field, value, "", OURS]
    source = f"{row.paper.source}. Ours: {row.paper.note}" if row.paper.note else row.paper.source
    return [field, value, _text(row.paper.value), source]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value or value == 0 else "none"


def overview_cells(recipe: Recipe) -> list[str]:
    """Return one recipe's row of the overview; cells have several lines."""
    loss = recipe.loss
    return [
        recipe.name,
        _student(recipe),
        "\n".join(_teachers(recipe)),
        "\n".join(_stage(name, stage) for name, stage in recipe.stages.items()),
        "\n".join(dict.fromkeys(map(_optimizer, recipe.stages.values()))),
        f"normalizer {recipe.normalizer.name}\nsummary {loss.summary}\nfeatures {loss.feature}\n"
        f"alignment {loss.alignment}",
        "\n".join(_augmentation(recipe)) or "none",
    ]


def _student(recipe: Recipe) -> str:
    config = recipe.student
    start = f"from {config.pretrained}" if config.pretrained else "random"
    return f"{config.architecture}, patch {config.patch_size}, {start}"


def _teachers(recipe: Recipe) -> Iterator[str]:
    from teachers import teacher_spec

    for name, config in recipe.teachers.items():
        size: object = config.input_size
        if size == "native":
            size = teacher_spec(name, config).native_size[0]
        yield f"{config.preset}: {f'{size} px' if size != 'match' else 'as the student'}"


def _stage(name: str, stage: StageConfig) -> str:
    sizes = [size for item in stage.partitions for size in partition_sizes(item)]
    shown = ", ".join(str(height) for height, _ in dict.fromkeys(sizes))
    mosaic = dict.fromkeys(teacher for item in stage.partitions for teacher in item.mosaic)
    upsampled = dict.fromkeys(teacher for item in stage.partitions for teacher in item.upsample)
    parts = [
        f"{name}: {stage.steps:,} steps ({stage.frozen_steps:,} frozen)",
        f"{images_per_step(stage):,} images of {shown} px",
        f"{len(stage.partitions)} partition{'s' * (len(stage.partitions) > 1)}",
        *(f"{teacher} in mosaics" for teacher in mosaic),
        *(
            f"{teacher} by {stage.upsampler.name} {stage.upsampler.factor}x"
            for teacher in upsampled
        ),
    ]
    return ", ".join(parts)


def _optimizer(stage: StageConfig) -> str:
    return f"{stage.optimizer} {stage.learning_rate:g}, weight decay {stage.weight_decay:g}"


def _augmentation(recipe: Recipe) -> Iterator[str]:
    config = recipe.augmentation
    if config.shift:
        yield f"shifts up to {config.shift} patches"
    if config.window_share:
        low, high = config.window_sizes
        yield f"windows of {low} to {high} in {config.window_share:.0%} of steps"
    if config.weight_noise:
        yield f"weight noise {config.weight_noise:g}"
    if recipe.loss.mesa:
        yield f"MESA {recipe.loss.mesa:g}"
