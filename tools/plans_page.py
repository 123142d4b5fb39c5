"""Print docs/reference/plans.md: what recipes cost on several numbers and kinds of devices.

python -m tools.plans_page > docs/reference/plans.md
python -m tools.plans_page mine.yaml --devices 8 64
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from radio_distill.config import Recipe, by_student
from stages.planning import build_models, measured
from stages.plans import plan_stages
from stages.recipes import load_recipe

from .published import markdown, published

if TYPE_CHECKING:
    from radio_distill.plan.time import StagePlan

COUNTS = (8, 64, 128)
KINDS = ("a100-80", "h100", "h200")
COLUMNS = ("recipe", "devices", "GiB / device", "fits", *(
    f"{kind}: {what}" for kind in KINDS for what in ("s / step", "device hours")
))  # fmt: skip

PHI_S = "phi_s_b"
PHI_S_RUN = {"stage1": (32, 40), "stage2": (64, 64), "stage3": (128, 68)}
"""Number of A100 and hours of each stage of PHI-S's ViT-B (arXiv 2410.01680, A.7)."""
PHI_S_COLUMNS = (
    "stage", "A100", "published", "estimate", "of it waiting", "one image a canvas",
    "implied utilisation", "implied, one image a canvas",
)  # fmt: skip

INTRODUCTION = """\
# What the recipes cost

Estimates. `python -m tools.plans_page` prints this page in a checkout (five minutes of one
core; no GPU, no weights), `radio-distill plan RECIPE` the parts of each figure. Models are
measured on tensors without data. Time is operations / (peak · {utilisation:.0%}): the utilisation
is assumed, and every hour below stands and falls with it. Left out are decoding, communication,
evaluation, and the windows that students attend in at times. Figures of several stages are parted
by a slash; a device's memory must leave a tenth free to fit.

Device hours grow with the number of devices where work cannot be divided further: partitions of 32
images, and mosaics, whose canvases stay whole (`mosaic_images` makes them smaller). They grow, too,
where a device has so few images that its host cannot launch their operators as fast (`unic_b` on
64): a step is no shorter than its launches, at an assumed 16 µs for each.
"""
PHI_S_TEXT = """\

## Against a published run

PHI-S prints devices and hours of its ViT-B: {published:,} A100 hours (arXiv 2410.01680, A.7). Below
are those of `{recipe}` on as many A100-80, in device hours at {utilisation:.0%}. `waiting` is for
the busiest device. `one image a canvas` shows SAM its images as the paper describes stages 1
and 2, not in mosaics, and leaves waiting out. The last columns are the utilisation at which the
estimate, without waiting, would be the published figure.
"""
PHI_S_REASONS = """\

**The published total is {factor:.1f} times the estimate**, and the distance is unevenly spread.
What may stand behind it, none of it printed in the paper:

* Left out of the estimate, and growing from stage to stage: decoding larger images, communication
  among 64 and 128 devices, checkpoints and evaluation.
* The assumed utilisation. Small batches (in stage 3, nine images a device) reach less than large
  ones.
* Waiting. Here the images of all partitions are dealt to devices by work; four partitions with a
  quarter of the devices each would wait for DINOv2's.
* Precision. Frozen teachers compute in bfloat16 here; in TF32 the peak of an A100 is half of that.
* SAM. One image a canvas would need a utilisation in stage 1 far above that of the other stages,
  so that stage was probably not run so.
"""


@dataclass(frozen=True)
class Comparison:
    """A recipe on one number of devices."""

    recipe: str
    devices: int
    plans: "Mapping[str, Sequence[StagePlan]]"
    """Of its stages, by kind of device."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(published()), help="default: all")
    parser.add_argument("--devices", type=int, nargs="+", default=COUNTS, metavar="N")
    parser.add_argument("--utilisation", type=float, default=0.35, metavar="SHARE")
    arguments = parser.parse_args(argv)
    recipes = [load_recipe(name) for name in arguments.recipes]
    for line in page(recipes, arguments.devices, arguments.utilisation):
        print(line, flush=True)
    return 0


def compare(
    recipes: Iterable[Recipe], counts: Sequence[int], utilisation: float
) -> Iterator[Comparison]:
    """Plan recipes on every number and every kind of devices."""
    from radio_distill.plan.time import DEVICES, StagePlan, plan_stage

    for recipe in recipes:
        plans = {count: {kind: list[StagePlan]() for kind in KINDS} for count in counts}
        for stages in by_student(recipe):
            models = build_models(recipe, of_stage=stages[0])
            teachers = models.all_teacher_bytes
            with measured(models, can_compile=True) as costs:
                for count, kind, stage in itertools.product(counts, KINDS, stages):
                    plan = plan_stage(costs, stage, count, DEVICES[kind], teachers, utilisation)
                    plans[count][kind].append(plan)
        yield from (Comparison(recipe.name, count, of) for count, of in plans.items())


def cells(item: Comparison) -> list[str]:
    """Return the row of a recipe on one number of devices."""
    from radio_distill.plan.time import DEVICES

    fits = [
        kind
        for kind, plans in item.plans.items()
        if all(plan.memory.fits(DEVICES[kind].memory) for plan in plans)
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
        yield from _against_phi_s(utilisation)


def _against_phi_s(utilisation: float) -> Iterator[str]:
    """Compare the estimate for PHI-S's ViT-B with its published hours, stage by stage."""
    recipe = load_recipe(PHI_S)
    mosaics, single = (
        _phi_s_plans(recipe, utilisation),
        _phi_s_plans(without_mosaics(recipe), utilisation),
    )
    figures = [
        (
            devices * hours,
            plan.device_hours,
            (1 - plan.busy) * plan.device_hours,
            alone.busy * alone.device_hours,
        )
        for (devices, hours), plan, alone in zip(PHI_S_RUN.values(), mosaics, single, strict=True)
    ]
    total = tuple(map(sum, zip(*figures, strict=True)))
    labels = [(stage, str(devices)) for stage, (devices, _) in PHI_S_RUN.items()]
    yield PHI_S_TEXT.format(recipe=PHI_S, utilisation=utilisation, published=total[0])
    yield from markdown(
        PHI_S_COLUMNS,
        [
            [*label, *_phi_s_cells(hours, utilisation)]
            for label, hours in zip([*labels, ("all", "")], [*figures, total], strict=True)
        ],
    )
    yield PHI_S_REASONS.format(factor=total[0] / total[1]).rstrip()


def _phi_s_cells(hours: Sequence[float], utilisation: float) -> list[str]:
    printed, estimate, waiting, single = hours
    shares = (utilisation * work / printed for work in (estimate - waiting, single))
    return [*(f"{figure:,.0f}" for figure in hours), *(f"{share:.0%}" for share in shares)]


def _phi_s_plans(recipe: Recipe, utilisation: float) -> "list[StagePlan]":
    from radio_distill.plan.time import DEVICES

    counts = {stage: devices for stage, (devices, _) in PHI_S_RUN.items()}
    return plan_stages(build_models(recipe), counts, DEVICES["a100-80"], utilisation)


def without_mosaics(recipe: Recipe) -> Recipe:
    """Return a recipe whose fixed-size teachers see one image at a time."""
    stages = {
        name: replace(
            stage, partitions=tuple(replace(item, mosaic=()) for item in stage.partitions)
        )
        for name, stage in recipe.stages.items()
    }
    return replace(recipe, stages=stages)


if __name__ == "__main__":
    sys.exit(main())
