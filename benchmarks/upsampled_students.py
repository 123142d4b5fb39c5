"""Train students of upsampled teachers of which one thing differs at a time, and compare them.

    python -m benchmarks.upsampled_students benchmarks/upsampled_teachers.yaml \\
        --fits runs --conditions base 50-steps --seeds 0 1 2 --suite quick

Each condition (steps of stage 3, the student's grid) is asked of each way of bringing the teachers
to the student's grid, and each seed of stage 3; all start from the recipe's stage 2. A student is
compared with the one of bilinear interpolation of its condition and seed, which saw the same
images in the same order. ``--fits`` is the folder in which :mod:`.upsampler_fits` wrote those of
the first teacher; the other teachers take the fits that are shipped. Students that are trained, and
scores that are there, are passed over, so that several calls may share the work.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from radio_distill.config import EvaluationConfig, Recipe, stages_needed
from radio_distill.evals.gain import estimate, multi_task_gain
from radio_distill.evals.headlines import in_order
from radio_distill.evals.scores import read_scores
from radio_distill.evals.subjects import SCORES
from radio_distill.system.files import make_private
from radio_distill.train.checkpoint import find
from stages.arguments import Parser, add_run_folder_argument, run_command
from stages.build import train_stage
from stages.commands.evaluate import add_suite_argument, in_suite
from stages.commands.scoring import score_checkpoints
from stages.fits import fit_name
from stages.launch import Options
from stages.recipes import Asked, load_recipe

HIGH = "stages.stage3.partitions.high"
CONDITIONS = {
    "base": [],
    "50-steps": ["stages.stage3.steps=50"],
    "800-steps": ["stages.stage3.steps=800"],
    "grid-24": [
        f"{HIGH}.size=384",
        f"{HIGH}.teacher_sizes={{dino: 168, efficientnet: 192}}",
    ],
}
"""What differs from the recipe, alike for all that are compared."""
BASELINE = "bilinear"
INTERPOLATED = [BASELINE, "tile", "s2"]
FITTED = {
    f"{upsampler}{suffix}": {"upsampler": upsampler, **changed}
    for upsampler in ("featup", "featsharp")
    for suffix, changed in {
        "": {}, "-100-step-fit": {"steps": 100}, "-without-de-bias": {"de_bias": False}
    }.items()
}  # fmt: skip
"""Fields of ``fit`` that differ from the fits of 600 steps."""
NATIVE = "native"
"""Teachers see an image large enough for the student's grid, and nothing is upsampled."""
WAYS = [*INTERPOLATED, *FITTED, NATIVE]


def way_fields(recipe: Recipe, way: str, seed: int, fits: Path) -> list[str]:
    """Return the fields of one way to the student's grid, at the sizes of the recipe.

    Args:
        recipe: of the condition.
        way: one of ``WAYS``.
        seed: of stage 3, and of the fit of the first teacher.
        fits: folder of run folders.
    """
    if way in INTERPOLATED:
        return [f"stages.stage3.upsampler.name={way}"]
    if way == NATIVE:
        (sizes,) = (
            partition.teacher_sizes
            for partition in recipe.stages["stage3"].partitions
            if partition.upsample
        )
        doubled = ", ".join(f"{name}: {2 * int(size)}" for name, size in sizes.items())
        return [f"{HIGH}.upsample=[]", f"{HIGH}.teacher_sizes={{{doubled}}}"]
    teacher = next(iter(recipe.teachers))
    fit = replace(recipe.fit, **{"teacher": teacher, "steps": 600, **FITTED[way]})
    run = f"upsampled_teachers-{fit.steps}-steps-seed{seed}"
    file = (fits / run / "fit" / fit_name(fit) / "upsampler.safetensors").absolute()
    return [
        f"stages.stage3.upsampler.name={fit.upsampler}",
        f"stages.stage3.upsampler.weights.{teacher}={file}",
    ]


def run_of(asked: Asked, condition: str, way: str, seed: int, fits: Path) -> tuple[Recipe, Asked]:
    """Return the recipe of one student, in a folder of its own inside the recipe's run folder."""
    fields = [*asked.fields, *CONDITIONS[condition]]
    shared = load_recipe(asked.recipe, fields)
    own = Asked(
        asked.recipe,
        (
            *fields,
            *way_fields(shared, way, seed, fits),
            f"name={condition}-{way}-seed{seed}",
            f"output={shared.folder}",
            f"seed={seed}",
        ),
    )
    return load_recipe(own.recipe, own.fields), own


def train_and_score(recipe: Recipe, asked: Asked, evaluation: EvaluationConfig) -> None:
    """Train one student, if it is not, and score it, as far as it is not."""
    make_private(recipe.folder)
    for name in stages_needed(recipe, "stage3")[:-1]:
        start = recipe.stage_folder(name)
        if not start.is_symlink():
            start.symlink_to(Path("..") / start.name)
    student = find(train_stage("stage3", recipe, Options(resume=True, asked=asked)))
    score_checkpoints([student], [evaluation])


def table(
    folder: Path, condition: str, ways: Sequence[str], seeds: Sequence[int]
) -> list[list[str]]:
    """Return what was scored of a condition: the baseline's values, of others the differences.

    Means and standard deviations over those seeds of which both are scored.
    """
    runs: dict[str, dict[int, Mapping[str, float]]] = {}
    definitions = {}
    for way in ways:
        for seed in seeds:
            path = folder / f"{condition}-{way}-seed{seed}" / SCORES
            if path.is_file():
                scores = read_scores([path])
                ((run,),) = scores.results.values()
                counting = {name: one for name, one in scores.definitions.items() if one.counts}
                definitions |= counting
                runs.setdefault(way, {})[seed] = {name: run[name] for name in counting}
    if BASELINE not in runs:
        return []
    names = list(in_order(definitions))
    rows = [["", "seeds", "Δm", *names]]
    for way, results in runs.items():
        whole = {seed for seed, run in results.items() if len(run) == len(names)}
        if not (both := sorted(whole & runs[BASELINE].keys())):  # others are being scored
            continue
        gains = [
            multi_task_gain(
                {way: results[seed], BASELINE: runs[BASELINE][seed]}, BASELINE, definitions
            )
            for seed in both
        ]
        differences = {
            name: [results[seed][name] - runs[BASELINE][seed][name] for seed in both]
            for name in names
        }
        if way == BASELINE:
            differences = {name: [results[seed][name] for seed in both] for name in names}
        cells = [_text(differences[name], way != BASELINE) for name in names]
        total = _text([gain.totals[way].mean for gain in gains]) if way != BASELINE else ""
        rows.append([way, str(len(both)), total, *cells])
    return rows


def _text(values: Sequence[float], signed: bool = True) -> str:
    deviation = estimate(values).deviation
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{fmean(values):{'+' if signed else ''}.2f}{spread}"


def main() -> None:
    """Train, score and compare what is named."""
    parser = Parser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--fits", type=Path, default=Path("runs"), help="(default: runs)")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=["base"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--only-print", action="store_true", help="what is scored already")
    add_suite_argument(parser)
    add_run_folder_argument(parser)
    arguments, fields = parser.parse(None, takes_fields=True)
    asked = Asked(arguments.recipe, tuple(fields))
    if not arguments.only_print:
        for condition in arguments.conditions:
            for seed in arguments.seeds:
                for way in arguments.ways:
                    recipe, own = run_of(asked, condition, way, seed, arguments.fits)
                    evaluation = in_suite(arguments.suite, recipe.evaluation, fields)
                    train_and_score(recipe, own, evaluation)
    folder = load_recipe(asked.recipe, asked.fields).folder
    for condition in arguments.conditions:
        print(f"\n{condition}")
        rows = table(folder, condition, arguments.ways, arguments.seeds)
        for number, row in enumerate(rows):
            print("| " + " | ".join(row) + " |")
            if number == 0:
                print("| --- " + "| ---: " * (len(row) - 1) + "|")


if __name__ == "__main__":
    sys.exit(run_command(main))
