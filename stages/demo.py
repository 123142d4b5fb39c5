"""Run the whole path on real photographs with real pretrained teachers, on a laptop.

    radio-distill demo
    radio-distill demo --data ~/Pictures

Photographs -> shards -> stage 1 -> stage 2 -> stage 3 with each upsampler -> scores -> gain table
-> report. Without --data, the photographs are those inside the scikit-image and scikit-learn
packages. What is complete is not done again, so a demo that was stopped goes on where it was; what
was made of another recipe or upsampler is moved aside and trained anew.
"""

import argparse
import hashlib
import time
from pathlib import Path

from radio_distill.config import Recipe
from radio_distill.progress import clock
from stages.arguments import add_trust_argument
from stages.common import Asked, load_recipe, train_stage
from stages.evaluate import show
from stages.report import report
from stages.sweep import show_gain, sweep

TAKES_FIELDS = True
UPSAMPLERS = ["bilinear", "tile", "s2", "featup", "featsharp"]
"""The first is what the others are compared with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill demo``."""
    add_trust_argument(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of your own pictures")
    parser.add_argument("--upsamplers", nargs="+", default=UPSAMPLERS, metavar="NAME")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    begin = time.monotonic()
    asked = Asked("demo", (*_place_of(arguments.data), *arguments.fields))
    recipe = load_recipe(asked.recipe, asked.fields)
    prepare_pictures(recipe, arguments.data)
    for stage in ("stage1", "stage2"):
        train_stage(stage, recipe, resume=True, asked=asked, retrain=True)
    upsamplers = arguments.upsamplers
    gain, scores = sweep(
        recipe, upsamplers, upsamplers[0], references=True, asked=asked, retrain=True
    )
    show(scores)
    show_gain(gain, recipe.folder)
    page = report(recipe.folder, f"stage3-{arguments.upsamplers[0]}")
    print(f"whole demo: {clock(time.monotonic() - begin)}")
    print(f"report: {page.resolve()}")
    return 0


def _place_of(data: Path | None) -> list[str]:
    """Return the recipe fields that give the user's own pictures a place of their own."""
    if data is None:
        return []
    source = data.expanduser().resolve()
    name = f"demo-{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:6]}"
    return [
        f"name={name}",
        f"data.shards=[data/{name}/shards]",
        f"evaluation.pictures=data/{name}/held_out",
    ]


def prepare_pictures(recipe: Recipe, data: Path | None) -> None:
    """Make the demo's shards and held-out pictures, unless they are there."""
    from radio_distill.data.shards import write_shards
    from stages.pictures import gather_demo_pictures

    shards = Path(recipe.data.shards[0])
    if any(shards.glob("*.tar")):
        return
    found = gather_demo_pictures(shards.parent, data)
    # Several shards, so that what a real data set needs is used here too.
    made = write_shards(found.train, shards, images_per_shard=100)
    for line in made.describe()[1:]:
        print(line)
    print(f"{found.num_train} pictures to train on, {found.num_held_out} held out: {shards.parent}")
