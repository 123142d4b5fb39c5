"""What right filter gradients change: FeatUp fitted with the right and the published backward.

    python -m benchmarks.filter_gradients demo --teacher dino --fit.factor 2

Both fits see the same images and views in the same order; :mod:`benchmarks.published_backward`
says what the published backward computes. Prints the measures of both on ``evaluation.images``.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace

from benchmarks.published_backward import published_filter_gradient
from stages.arguments import Parser, run_command
from stages.fit_upsampler import fit_recipe, fit_upsampler
from stages.recipes import load_recipe
from upsamplers.fitted_files import read_header


def main() -> None:
    """Fit twice, print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--teacher")
    arguments, fields = parser.parse(None, takes_fields=True)
    named = [f"fit.teacher={arguments.teacher}"] if arguments.teacher else []
    recipe = fit_recipe(load_recipe(arguments.recipe, [*named, "fit.upsampler=featup", *fields]))
    pool: list = []
    for name, context in (("right", nullcontext()), ("published", published_filter_gradient())):
        with context:
            run = replace(recipe, name=f"{recipe.name}-{name}-gradient")
            measures = read_header(fit_upsampler(run, resume=True, pool=pool)).measures
        fidelity, variation = measures["fidelity"], measures["total_variation"]
        print(f"{name} backward: fidelity {fidelity:.3f}, TV {variation:.3f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
