"""``radio-distill plan --compare``: recipes on several numbers and kinds of devices."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from radio_distill.config import Recipe
from radio_distill.errors import ConfigError
from stages.common import load_recipe
from stages.plan import build_models, measured
from stages.published import published
from stages.recipes_table import markdown

if TYPE_CHECKING:
    from radio_distill.train.plan import StagePlan

COUNTS = (8, 64, 128)
KINDS = ("a100-80", "h100", "h200")
COLUMNS = ("recipe", "devices", "GiB / device", "fits", *(
    f"{kind}: {what}" for kind in KINDS for what in ("s / step", "device hours")
))  # fmt: skip

PHI_S = "phi_s_b"
PHI_S_RUN = {"stage1": (32, 40), "stage2": (64, 64), "stage3": (128, 68)}
"""Number of A100 and hours of each stage of PHI-S's ViT-B (arXiv 2410.01680, A.7)."""
PHI_S_COLUMNS = ("stage", "A100", "published", "mosaics", "one a canvas", "implied utilisation")

INTRODUCTION = """\
# What the recipes cost

Estimates, made before anything runs: this page is what `radio-distill plan --compare --markdown`
prints, and `radio-distill plan RECIPE` has the parts of each figure. Models are measured on tensors
without data. Time is operations / (peak · {utilisation:.0%}): the utilisation is assumed, and every
hour below stands and falls with it. Left out are decoding, communication, evaluation, and the
windows that students attend in at times. Figures of several stages are parted by a slash; a
device's memory must leave a tenth free to fit.
"""
PHI_S_TEXT = """\

## Against a published run

PHI-S gives the devices and hours of its ViT-B: 14,080 A100 hours. The recipe `{recipe}` on the same
devices, in device hours at {utilisation:.0%}: with SAM's pictures in mosaics, and as the paper
describes its first stages, one picture on a canvas.
"""
PHI_S_REASONS = """\

The last column is the utilisation at which the estimate with mosaics would be the published figure.
What the estimate leaves out grows from stage to stage, and would explain a part of the distance:
larger pictures to decode (432 and 1024 px, for which a DataComp picture is read whole), gradients
summed over 64 and 128 devices instead of 32, and devices that wait. The estimate deals devices to
partitions by work; how the paper did is not printed, and one slow partition holds up all others. One
picture a canvas needs more operations in stage 1 than the published hours allow for at the
utilisation of the other stages, so that stage was probably not run so.
"""


@dataclass(frozen=True)
class Comparison:
    """A recipe on one number of devices."""

    recipe: str
    devices: int
    plans: "Mapping[str, Sequence[StagePlan]]"
    """Of its stages, by kind of device."""


def print_comparison(arguments: argparse.Namespace) -> int:
    """Print what ``plan --compare`` is asked for."""
    if arguments.devices or arguments.device or arguments.price:
        raise ConfigError(
            "--compare: names its own devices, as in --compare 8 64; leave out --devices, --device "
            "and --price"
        )
    counts = arguments.compare or COUNTS
    if min(counts) < 1:
        raise ConfigError(f"--compare: {min(counts)} is not a number of devices")
    names = [arguments.recipe] if arguments.recipe else list(published())
    recipes = [load_recipe(name, arguments.fields) for name in names]
    if arguments.markdown:
        for line in page(recipes, counts, arguments.utilisation):
            print(line, flush=True)
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=None, pad_edge=False)
    console = Console() if Console().is_terminal else Console(width=160)
    with console.status("measuring the models on tensors without data"):
        for item in compare(recipes, counts, arguments.utilisation):
            table.add_row(*cells(item))
    console.print(table)
    console.print(f"At an assumed {arguments.utilisation:.0%} of the peak.")
    return 0


def compare(
    recipes: Iterable[Recipe], counts: Sequence[int], utilisation: float
) -> Iterator[Comparison]:
    """Plan recipes on every number and every kind of devices."""
    from radio_distill.train.plan import DEVICES, plan_stage

    for recipe in recipes:
        models = build_models(recipe)
        with measured(models) as costs:
            for count in counts:
                plans = {
                    kind: [
                        plan_stage(
                            costs,
                            stage,
                            count,
                            DEVICES[kind],
                            models.all_teacher_bytes,
                            utilisation,
                        )
                        for stage in recipe.stages
                    ]
                    for kind in KINDS
                }
                yield Comparison(recipe.name, count, plans)


def cells(item: Comparison) -> list[str]:
    """Return the row of a recipe on one number of devices."""
    from radio_distill.train.plan import DEVICES

    fits = [
        kind
        for kind, plans in item.plans.items()
        if all(plan.memory.fits(DEVICES[kind]) for plan in plans)
    ]
    memory = (f"{plan.memory.total / 2**30:.0f}" for plan in item.plans[KINDS[0]])
    row = [item.recipe, str(item.devices), " / ".join(memory)]
    row.append("all" if len(fits) == len(item.plans) else ", ".join(fits) or "none")
    for plans in item.plans.values():
        row.append(" / ".join(f"{plan.step_seconds:.2g}" for plan in plans))
        row.append(f"{sum(plan.device_hours for plan in plans):,.0f}")
    return row


def page(recipes: Sequence[Recipe], counts: Sequence[int], utilisation: float) -> Iterator[str]:
    """Yield the lines of the page on what recipes cost."""
    yield INTRODUCTION.format(utilisation=utilisation)
    yield from markdown(COLUMNS, map(cells, compare(recipes, counts, utilisation)))
    if any(recipe.name == PHI_S for recipe in recipes):
        yield PHI_S_TEXT.format(recipe=PHI_S, utilisation=utilisation)
        yield from markdown(PHI_S_COLUMNS, phi_s_rows(utilisation))
        yield PHI_S_REASONS.rstrip()


def phi_s_rows(utilisation: float) -> list[list[str]]:
    """Compare the estimate for PHI-S's ViT-B with its published hours, stage by stage."""
    recipe = load_recipe(PHI_S)
    mosaics, single = (
        _phi_s_hours(item, utilisation) for item in (recipe, without_mosaics(recipe))
    )
    rows, totals = [], [0.0, 0.0, 0.0]
    for stage, (devices, hours) in PHI_S_RUN.items():
        figures = [devices * hours, mosaics[stage], single[stage]]
        totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
        rows.append([stage, str(devices), *_hours(figures, utilisation)])
    return [*rows, ["all", "", *_hours(totals, utilisation)]]


def _hours(figures: Sequence[float], utilisation: float) -> list[str]:
    published_hours, mosaics, _ = figures
    return [
        *(f"{figure:,.0f}" for figure in figures),
        f"{utilisation * mosaics / published_hours:.0%}",
    ]


def _phi_s_hours(recipe: Recipe, utilisation: float) -> dict[str, float]:
    from radio_distill.train.plan import DEVICES, plan_stage

    models = build_models(recipe)
    with measured(models) as costs:
        return {
            stage: plan_stage(
                costs, stage, devices, DEVICES["a100-80"], models.all_teacher_bytes, utilisation
            ).device_hours
            for stage, (devices, _) in PHI_S_RUN.items()
        }


def without_mosaics(recipe: Recipe) -> Recipe:
    """Return a recipe whose fixed-size teachers see one picture at a time."""
    stages = {
        name: replace(
            stage, partitions=tuple(replace(item, mosaic=(), ranks=0) for item in stage.partitions)
        )
        for name, stage in recipe.stages.items()
    }
    return replace(recipe, stages=stages)
