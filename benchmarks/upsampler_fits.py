"""Fit upsamplers of which one thing differs at a time, for several seeds, and measure every fit.

    python -m benchmarks.upsampler_fits benchmarks/upsampled_teachers.yaml --teacher dino

The recipe's section ``fit`` is that of all but what is named. Fits of one seed share the images,
their views and the order of both. The files lie in RUN-STEPS-steps-seedN/fit, as
``radio-distill fit-upsampler`` writes them; one that is there is not fitted again. Prints what was
measured on ``evaluation.images``.
"""

import sys
from dataclasses import replace
from typing import Any

from radio_distill.config import Recipe
from stages.arguments import Parser, run_command
from stages.fit_upsampler import fit_recipe, fit_upsampler
from stages.fits import fit_name
from stages.recipes import load_recipe
from upsamplers.fitted_files import read_header

MEASURES = ("fidelity", "total_variation", "crf", "mmd")


def variants(short: int, full: int, long: int) -> list[dict[str, Any]]:
    """Return what differs, by fields of ``fit``; the first one meets most images and most tiles."""
    ways = [("featsharp", True), ("featsharp", False), ("featup", True), ("featup", False)]
    steps = {short: ways[::2], full: [*ways, ("bilinear", True), ("bilinear", False)]}
    if long:
        steps[long] = ways[::2]
    return [
        {"upsampler": upsampler, "de_bias": de_bias, "steps": number}
        for number in sorted(steps, key=lambda it: it != full)
        for upsampler, de_bias in steps[number]
    ]


def run_of(recipe: Recipe, seed: int, fields: dict[str, Any]) -> Recipe:
    """Return the recipe of one fit, whose folder says its steps and its seed."""
    fit = replace(recipe.fit, **fields)
    return replace(recipe, name=f"{recipe.name}-{fit.steps}-steps-seed{seed}", seed=seed, fit=fit)


def main() -> None:
    """Fit all of a seed, then all of the next."""
    parser = Parser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--short", type=int, default=100, help="steps (default: %(default)s)")
    parser.add_argument("--long", type=int, default=0, help="steps; 0 for none, the default")
    arguments, fields = parser.parse(None, takes_fields=True)
    recipe = fit_recipe(
        load_recipe(arguments.recipe, [f"fit.teacher={arguments.teacher}", *fields])
    )
    for seed in arguments.seeds:
        pool: list = []
        for changed in variants(arguments.short, recipe.fit.steps, arguments.long):
            run = run_of(recipe, seed, changed)
            measures = read_header(fit_upsampler(run, resume=True, pool=pool)).measures
            found = ", ".join(f"{name} {measures[name]:.4f}" for name in MEASURES)
            print(f"{fit_name(run.fit)}, {run.fit.steps} steps, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
