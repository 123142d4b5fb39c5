"""What students learn under each normalizer, measured in the teachers' own spaces.

A student is trained for each normalizer and seed: stage 1 of the recipe, all else equal. Its heads'
predictions are brought back to the teachers' own spaces, where errors are comparable from one
normalizer to another, as in the PHI-S paper's Table 3 (arXiv 2410.01680); the rank is that of the
MSE, averaged over teachers. Beside it stand the MSE over the variance of the teacher's features,
which is comparable from one teacher to another (1 is knowing no more than the mean), and the
cosine of summaries. layer_norm is left out: it has no inverse.

    python -m benchmarks.normalizers [--steps 400] [--seeds 0 1 2]

Every field of the recipe can be set, as in ``radio-distill train``. Students that are complete are
not trained again. Written to runs/normalizers: normalizers.md and normalizers.json.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from radio_distill.config import Recipe
from radio_distill.evals.encoder import student_encoder, targets_of
from radio_distill.evals.fidelity import Fidelity
from radio_distill.loading import load
from radio_distill.protocols import Teacher
from radio_distill.report.tables import Cell, Column, Estimate, Table, print_tables, render
from radio_distill.system.distributed import World, choose_device
from radio_distill.system.files import replacing
from stages.arguments import run_script
from stages.build import build_teachers, train_stage
from stages.launch import Options
from stages.recipes import load_recipe
from tools.demo_images import write_demo_images

TAKES_FIELDS = True
STAGE = "stage1"
NORMALIZERS = ("none", "global_standardise", "per_channel_standardise", "phi_s")

Values = dict[str, float]
"""By metric and teacher, for instance ``mse/dino``, ``relative/dino``, ``summary_cosine/dino``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="demo", help="name or file (default: demo)")
    parser.add_argument("--normalizers", nargs="+", default=NORMALIZERS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--steps", type=int, help="steps of stage 1 (default: the recipe's)")
    parser.add_argument("--output", type=Path, default=Path("runs/normalizers"), metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    steps = [f"stages.{STAGE}.steps={arguments.steps}"] if arguments.steps else []
    fields = [*arguments.fields, *steps, f"output={arguments.output}"]
    recipe = load_recipe(arguments.recipe, fields)
    if recipe.data.shards == load_recipe("demo").data.shards:
        write_demo_images()
    sources = {"held out": recipe.evaluation.images, "learned from": recipe.data.shards[0]}
    teachers = build_teachers(recipe, choose_device(recipe.engine.device, World()))
    results: dict[str, dict[str, list[Values]]] = {name: {} for name in sources}
    for seed in arguments.seeds:
        for name in arguments.normalizers:
            variant = _variant(recipe, name, seed)
            folder = train_stage(STAGE, variant, Options(resume=True))
            for label, source in sources.items():
                found = measure(folder, variant, teachers, source)
                results[label].setdefault(name, []).append(found)
    tables = [_table(f"Images {label}", recipe, _ranked(found)) for label, found in results.items()]
    print_tables(tables)
    facts = {"recipe": recipe.name, "steps": recipe.stages[STAGE].steps, "seeds": arguments.seeds}
    _write(arguments.output / "normalizers.md", render(tables, "markdown"))
    _write(arguments.output / "normalizers.json", json.dumps(facts | {"values": results}, indent=2))
    return 0


def _variant(recipe: Recipe, normalizer: str, seed: int) -> Recipe:
    """Return the recipe with a normalizer and a seed; all share the teachers' statistics."""
    cache = str(Path(recipe.output) / "statistics")
    return replace(
        recipe,
        name=f"{recipe.name}-{normalizer}-{seed}",
        seed=seed,
        normalizer=replace(recipe.normalizer, name=normalizer, cache=cache),
    )


def measure(folder: Path, recipe: Recipe, teachers: Mapping[str, Teacher], source: str) -> Values:
    """Compare a student's folded heads with the teachers, at the size that it was trained at."""
    device = choose_device(recipe.engine.device, World())
    model, size = load(folder, device=device), recipe.stages[STAGE].partitions[0].size
    targets = targets_of(teachers, recipe.teachers, size, recipe.student.patch_size)
    encoder = student_encoder(model, device, targets)
    scores = Fidelity(source, size).run(encoder, recipe.evaluation.limit)
    values = {score.metric: score.value for score in scores}
    return values | {f"relative/{name}": 1 / values[f"fidelity/{name}"] for name in teachers}


def _ranked(results: dict[str, list[Values]]) -> dict[str, list[Values]]:
    """Add to each normalizer's values of a seed its rank by MSE, averaged over teachers."""
    for same_seed in zip(*results.values(), strict=True):
        metrics = [metric for metric in same_seed[0] if metric.startswith("mse/")]
        for values in same_seed:
            values["rank"] = fmean(
                1 + sum(other[metric] < values[metric] for other in same_seed) for metric in metrics
            )
    return results


def _table(title: str, recipe: Recipe, results: dict[str, list[Values]]) -> Table:
    first = next(iter(results.values()))[0]
    metrics = {f"mse/{name}": Column(f"MSE {name}", ".4g", "lower") for name in recipe.teachers}
    metrics["rank"] = Column("average rank", ".2f", "lower")
    for name in recipe.teachers:
        metrics[f"relative/{name}"] = Column(f"MSE / variance, {name}", ".4f", "lower")
    for name in recipe.teachers:
        metrics[f"summary_cosine/{name}"] = Column(f"summary cosine, {name}", ".4f", "higher")
    metrics = {metric: column for metric, column in metrics.items() if metric in first}
    rows: list[tuple[Cell, ...]] = [
        (normalizer, *(_estimate(values[metric] for values in repeats) for metric in metrics))
        for normalizer, repeats in results.items()
    ]
    stage, seeds = recipe.stages[STAGE], len(next(iter(results.values())))
    note = f"{recipe.name}, {stage.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    return Table(title, (Column("normalizer"), *metrics.values()), tuple(rows), (note,))


def _estimate(values: Iterable[float]) -> Estimate:
    values = list(values)
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None)


def _write(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
