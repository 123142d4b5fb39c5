"""Print docs/reference/recipes.md: every field of the recipes beside the paper's figure.

python -m tools.recipes_page > docs/reference/recipes.md
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from radio_distill.config import Recipe, StageConfig, by_student, for_stage, partition_sizes
from stages.recipes import load_recipe

from .published import Row, markdown, merge_equal, published, rows_of

OVERVIEW = ("recipe", "student", "teachers", "stages", "optimizer", "losses", "augmentation")
FIELDS = ("field", "recipe", "paper", "source")
OURS = "*ours*"

INTRODUCTION = """\
# Recipes

The published recipes of RADIO-like models, and where ours differ from what the papers print. This
page is what `python -m tools.recipes_page` prints in a checkout; the papers' figures are in
[published.yaml](../../tools/published.yaml), what the recipes cost in [plans.md](plans.md).
"""
LEGEND = f"""\
Below, `*` stands for all stages, teachers or partitions, `{{a,b}}` for some. A field whose source
is {OURS} is printed nowhere: its value is our choice. Left out are fields that say how a run is
carried out and not what becomes of the student (logs, memory, processes, files), and lists that are
empty. What is alike in all recipes stands at the end.

AMR: AM-RADIO (arXiv 2312.06709) · PHIS: PHI-S (arXiv 2410.01680) · V2.5: RADIOv2.5 (arXiv
2412.07679) · FS: FeatSharp (arXiv 2502.16025) · V4: C-RADIOv4 (arXiv 2601.17237) · HF:
configuration of the published model · repo: code that runs the published models · TAO: NVIDIA's
trainer in TAO Toolkit · UN: UNIC (ECCV 2024) · TH: Theia (arXiv 2407.20179) · SL: SigLino (arXiv
2512.20157) · EU: EUPE (arXiv 2603.22387) · DU: DUNE (arXiv 2503.14405)
"""


def main() -> int:
    """Print the page."""
    print("\n".join(page(list(published()))))
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
    return [
        recipe.name,
        "\n".join(_students(recipe)),
        "\n".join(_teachers(recipe)),
        "\n".join(_stage(name, stage) for name, stage in recipe.stages.items()),
        "\n".join(dict.fromkeys(map(_optimizer, recipe.stages.values()))),
        "\n".join(_losses(recipe)),
        "\n".join(_augmentation(recipe)) or "none",
    ]


def _losses(recipe: Recipe) -> Iterator[str]:
    loss = recipe.loss
    yield f"normalizer {recipe.normalizer.name}"
    yield f"summary {_sum(loss.summary)}"
    yield f"features {_sum(loss.feature)}"
    for name, teacher in recipe.teachers.items():
        for kind, own in (("summary", teacher.summary_loss), ("features", teacher.feature_loss)):
            if own:
                yield f"{kind} of {name} {_sum(own)}"
        if teacher.relation:
            yield f"relation of {name} {_sum(teacher.relation)}"
    if loss.relation:
        yield f"relation {_sum(loss.relation)}"
    if loss.drop_teachers:
        yield f"teachers dropped {loss.drop_teachers:.0%}"
    bicubic = " bicubic" if loss.interpolation == "bicubic" else ""
    yield f"alignment {loss.alignment}{bicubic}"


def _sum(loss: str | Mapping[Any, float]) -> str:
    """Write a loss, or several with their weights."""
    if isinstance(loss, str):
        return loss
    return " + ".join(f"{weight:g} {name}" for name, weight in loss.items())


def _students(recipe: Recipe) -> Iterator[str]:
    groups = by_student(recipe)
    for names in groups:
        config = for_stage(recipe, names[0]).student
        start = f"from {config.pretrained}" if config.pretrained else "random"
        of = f"{', '.join(names)}: " if len(groups) > 1 else ""
        yield f"{of}{config.architecture}, patch {config.patch_size}, {start}"


def _teachers(recipe: Recipe) -> Iterator[str]:
    from teachers import teacher_spec

    for name, config in recipe.teachers.items():
        size: object = config.input_size
        if size == "native":
            size = teacher_spec(name, config, recipe).native_size[0]
        what = f"student of {config.stage}" if config.stage else config.preset
        yield f"{what}: {f'{size} px' if size != 'match' else 'as the student'}"


def _stage(name: str, stage: StageConfig) -> str:
    sizes = [size for item in stage.partitions for size in partition_sizes(item)]
    shown = ", ".join(str(height) for height, _ in dict.fromkeys(sizes))
    mosaic = dict.fromkeys(teacher for item in stage.partitions for teacher in item.mosaic)
    upsampled = dict.fromkeys(teacher for item in stage.partitions for teacher in item.upsample)
    parts = [
        f"{name}: {stage.steps:,} steps ({stage.frozen_steps:,} frozen)",
        f"{stage.images_per_step:,} images of {shown} px",
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
    if any(config.jitter):
        yield f"jitter {', '.join(f'{most:g}' for most in config.jitter)}"
    for name in ("grey", "blur", "solarise"):
        if share := getattr(config, f"{name}_share"):
            yield f"{name} {share:.0%}"
    if recipe.loss.mesa:
        yield f"MESA {recipe.loss.mesa:g}"


if __name__ == "__main__":
    sys.exit(main())
