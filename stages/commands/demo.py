"""Run the whole path on real photographs with real pretrained teachers, on a laptop.

    make demo
    radio-distill demo --data ~/Images

Shards -> stage 1 -> stage 2 -> stage 3 with each upsampler and seed -> scores -> report -> gain
table. Without --data it takes the shards in data/demo, which `make demo` makes in a checkout. With
it, every tenth image is held out. The seeds share stages 1 and 2. What is complete is not done
again, so a demo that was stopped goes on where it was; what was made of another recipe or upsampler
is moved aside and trained anew.
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from radio_distill.config import Recipe
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.gain import MultiTaskGain
from radio_distill.report.gain_tables import beside_tables, gain_table
from radio_distill.report.tables import print_tables
from radio_distill.system.progress import clock

from ..arguments import add_trust_argument
from ..recipes import Asked, load_recipe
from .evaluate import show
from .report import report
from .sweep import sweep

TAKES_FIELDS = True
UPSAMPLERS = ["bilinear", "tile", "featsharp"]
"""The first is what the others are compared with."""
SEEDS = 2

_SECONDS, _SECONDS_A_STUDENT = 400.0, 60.0
"""CPU time of the demo: of all but stage 3, and of each of its students; measured where
:func:`_work` takes :data:`_WORK`."""
_WORK = 0.008
_BUSY = 0.75
"""Share of the cores, of at most four, that do such work. Assumed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill demo``."""
    add = parser.add_argument
    add_trust_argument(parser)
    add("--data", type=Path, metavar="DIR", help="folder of your own images")
    add(
        "--upsamplers",
        nargs="+",
        default=UPSAMPLERS,
        metavar="NAME",
        help="the first is what the others are compared with (default: %(default)s; s2 and featup "
        "are there too)",
    )
    add("--seeds", type=int, default=SEEDS, metavar="N", help="of stage 3 (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from .scoring import write_gain

    begin, upsamplers = time.monotonic(), arguments.upsamplers
    asked = Asked("demo", (*_place_of(arguments.data), *arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    make_shards(recipe, arguments.data)
    print(announcement(upsamplers, arguments.seeds))
    gain = sweep(
        recipe, upsamplers, upsamplers[0], arguments.seeds, asked, references=True, retrain=True,
        suite="quick",
    )  # fmt: skip
    page = report(recipe.folder, f"stage3-{upsamplers[0]}")
    show(recipe.folder)
    write_gain(gain, recipe.folder)
    print(f"report: {page.resolve()}\n")
    title = "Δm over tasks that no student was trained for"
    print_tables([*beside_tables(gain), gain_table(gain, title)])
    for name in upsamplers[1:]:
        print(verdict(gain, f"stage3-{name}"))
    spent = os.times()
    processor = spent.user + spent.system + spent.children_user + spent.children_system
    print(f"whole demo: {clock(time.monotonic() - begin)}, {clock(processor)} of processor time")
    return 0


def announcement(upsamplers: Sequence[str], seeds: int) -> str:
    """Say how long all of it will take here, from a short measurement."""
    import torch

    students = len(upsamplers) * seeds
    what = f"three stages, the third {students} times: {len(upsamplers)} upsamplers, {seeds} seeds"
    if torch.cuda.is_available():
        return f"the whole demo: {what}; a few minutes on a GPU"
    cores = min(len(os.sched_getaffinity(0)), 4)
    seconds = (_SECONDS + students * _SECONDS_A_STUDENT) * _work() / _WORK
    minutes = max(math.ceil(seconds / cores / _BUSY / 60), 1)
    return (
        f"the whole demo: {what}; about {minutes} minutes on {cores} cores like these, less for "
        "what is complete already"
    )


def _work() -> float:
    """Return the CPU time of a piece of work like the demo's on one core: an MLP of a ViT-S."""
    import torch
    from torch import nn

    from radio_distill.system.precision import AUTO, autocast

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layers = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))
    tokens = torch.randn(256, 384)

    def timed() -> float:
        start = time.process_time()
        with torch.inference_mode(), autocast(AUTO, torch.device("cpu")):
            layers(tokens)
        return time.process_time() - start

    timed()  # the first call chooses and compiles kernels
    seconds = min(timed() for _ in range(5))
    torch.set_num_threads(threads)
    return seconds


def verdict(gain: MultiTaskGain, model: str) -> str:
    """Say in one line what a model's row of the gain table does and does not mean.

    Two models differ where their Δm do by more than two standard errors of the difference; the
    standard deviation between seeds is taken as the same for all models.
    """
    difference, seeds = gain.totals[model].mean, gain.num_results[model]
    row = f"{model} against {gain.baseline}: Δm {difference:+.2f}"
    deviations = [total.deviation for total in gain.totals.values() if total.deviation is not None]
    if not deviations:
        return f"{row} of one seed, whose noise is not known, ranks nothing; take --seeds 2"
    margin = 2 * math.sqrt(fmean(value**2 for value in deviations) * 2 / seeds)
    unknown = f"±{margin:.2f} that {seeds} seeds leave open"
    if abs(difference) <= margin:
        return (
            f"{row} lies within the {unknown}: it says that this upsampler made no difference that "
            "so short a run can show, not which one is better"
        )
    if difference > 0:
        return (
            f"{row} is more than the {unknown}: its students are better here, on a few photographs "
            "after a short stage 3; it does not say that they would be after a long one"
        )
    own, other = _fidelity(gain, model), _fidelity(gain, gain.baseline)
    return (
        f"{row} is more than the {unknown}: its students are worse here, after a short stage 3; it "
        "does not say that its maps are, for they are targets that stages 1 and 2 did not teach "
        f"(fidelity to the teachers as they are: {own:.3f} against {other:.3f})"
    )


def _fidelity(gain: MultiTaskGain, model: str) -> float:
    """Return the mean of what is shown beside Δm of a model."""
    return fmean(value for run in gain.beside[model] for value in run.values())


def _place_of(data: Path | None) -> list[str]:
    """Return the recipe fields that give the user's own images a place of their own."""
    if data is None:
        return []
    source = data.expanduser().resolve()
    name = f"demo-{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:6]}"
    return [
        f"name={name}",
        f"data.shards=[data/{name}/shards]",
        f"evaluation.images=data/{name}/shards_held_out",
        "evaluation.labels=",
    ]


def make_shards(recipe: Recipe, data: Path | None) -> None:
    """Make the shards of the user's own images, unless they are there.

    Raises:
        ConfigError: there are none, and no images to make them of.
    """
    from radio_distill.data.shards import write_shards

    shards = Path(recipe.data.shards[0])
    if any(shards.glob("*.tar")):
        return
    if data is None:
        raise ConfigError(
            f"no shards in {shards}: `make demo` makes them of photographs, in a checkout of the "
            "project; for images of your own: radio-distill demo --data DIR"
        )
    if not data.is_dir():
        raise DataError(f"no folder {data}; --data is a folder of images")
    # Several shards, so that what a real data set needs is used here too.
    summary = write_shards(data, shards, images_per_shard=100, hold_out=0.1)
    for line in summary.describe():
        print(line)
