"""Hundreds of broken and hostile inputs: each ends well or with one line, and touches nothing else.

The inputs come from a seed. Each goes through the command line, in a child process that is watched:
for exceptions, stack traces, more than one line, forged lines, time, memory, processes that are
started, pickles that are loaded, and files that change outside the folder which is the command's.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

import pytest
import yaml

from faults import hostile_checkpoints as checkpoints
from faults import hostile_images as images
from faults import hostile_recipes as recipes
from faults import hostile_shards as shards
from faults import sandbox

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
SEED = 20240229


Case = sandbox.Case


RECIPE = """
name: tiny
seed: 3
output: RUN_FOLDER
data: {workers: 0, shards: [PICTURES/shards]}
student: {architecture: test_vit, max_size: 256, registers: 2, head_hidden: 32}
teachers:
  vit: {preset: tiny_vit, input_size: match}
  cnn: {preset: tiny_cnn}
normalizer: {images: 8}
stages:
  stage1:
    steps: 1
    freeze_body_steps: 0
    ema_decay: 0.5
    upsampler: {name: bilinear, factor: 2}
    partitions:
      - {name: low, size: 64, teachers: [vit, cnn], batch_size: 3}
fit: {teacher: vit, upsampler: bilinear, steps: 1, batch_size: 2, views: 1}
engine: {precision: float32, device: auto}
log: {every: 1, save_every: 1, keep_last: 10, trackers: []}
evaluation:
  {images: PICTURES/held_out, size: 64, dense_size: 64, benchmarks: [fidelity], limit: 1}
"""


@pytest.fixture(scope="session")
def base(images: Path) -> dict:
    """A recipe of one step; ``RUN_FOLDER`` is that of the case which is run."""
    return yaml.safe_load(RECIPE.replace("PICTURES", str(images)))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The place of the sandbox; the shards beside it are indexed, so that nothing is written."""
    from radio_distill.data.tar_index import open_shards

    open_shards(sorted((images / "shards").glob("*.tar")))
    return tmp_path_factory.mktemp("hostile") / "root"


def _write_recipe(folder: Path, recipe: dict | bytes) -> str:
    """Write a recipe whose places are those of a case; returns the file's name."""
    text = yaml.safe_dump(recipe).encode() if isinstance(recipe, dict) else recipe
    for word, place in ((b"RUN_FOLDER", folder / "runs"), (b"OUTSIDE", folder.parent / "home")):
        text = text.replace(word, bytes(place))
    (folder / "recipe.yaml").write_bytes(text)
    return str(folder / "recipe.yaml")


def shard_cases(base: dict) -> Iterator[Case]:
    """Check each shard; train on every fourth, beside good ones."""
    for number, (name, write) in enumerate(shards.shards(Random(SEED))):
        yield Case(f"check {name}", partial(_check_shard, write), ("in",))
        if number % 4 == 0:
            yield Case(f"train {name}", partial(_train_on_shard, write, base), ("in", "runs"))


def _put_shard(write: Callable[[Path], None], folder: Path) -> str:
    (folder / "in").mkdir()
    write(folder / "in")
    return str(folder / "in")


def _check_shard(write: Callable[[Path], None], folder: Path) -> Sequence[str]:
    return ["shards", "--check", _put_shard(write, folder)]


def _train_on_shard(write: Callable[[Path], None], base: dict, folder: Path) -> Sequence[str]:
    place = _put_shard(write, folder)
    data = {**base["data"], "shards": [*base["data"]["shards"], place], "max_bad_shards": 0.5}
    return ["train", _write_recipe(folder, {**base, "data": data})]


def image_cases(base: dict) -> Iterator[Case]:
    """Pack each image, or check a shard with it; train on every tenth."""
    for number, (name, file_name, data) in enumerate(images.images(Random(SEED))):
        pack = partial(_pack_image, file_name, data)
        yield Case(f"pack {name}", pack, ("out",)) if number % 2 else _checked(name, data)
        if number % 10 == 0:
            write = partial(_write_tar, data)
            yield Case(f"train {name}", partial(_train_on_shard, write, base), ("in", "runs"))


def _checked(name: str, data: bytes) -> Case:
    return Case(f"check {name}", partial(_check_shard, partial(_write_tar, data)), ("in",))


def _write_tar(data: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(shards.member(b"a.png", data) + shards.END)


def _pack_image(file_name: str, data: bytes, folder: Path) -> Sequence[str]:
    (folder / "in").mkdir()
    (folder / "in" / file_name).write_bytes(data)
    (folder / "in" / "good.png").write_bytes(shards.PNG)
    return ["shards", str(folder / "in"), str(folder / "out")]


def recipe_cases(base: dict) -> Iterator[Case]:
    """Train with each recipe, if it lets one."""
    for name, text in recipes.recipes(Random(SEED), base):
        yield Case(name, partial(_train, text), ("runs",))


def _train(text: bytes, folder: Path) -> Sequence[str]:
    return ["train", _write_recipe(folder, text)]


def command_cases(base: dict) -> Iterator[Case]:
    """Give broken command lines."""
    for number, line in enumerate(recipes.command_lines(Random(SEED), "RECIPE", 120)):
        yield Case(f"command {number} {line}"[:80], partial(_command, line, base), ("runs",))


def _command(line: Sequence[str], base: dict, folder: Path) -> Sequence[str]:
    path = _write_recipe(folder, base)
    return [path if word == "RECIPE" else word for word in line]


@pytest.fixture(scope="session")
def trained(root: Path, base: dict) -> Path:
    """A run of two steps that was trained in the sandbox's folder and then moved."""
    case = Case("two steps", partial(_two_steps, base), ("runs",))
    (outcome,) = sandbox.run_cases(root, [case])
    assert outcome.kind == "done", outcome.detail
    return Path(shutil.move(root / "case" / "runs", root.with_name("trained")))


def _two_steps(base: dict, folder: Path) -> Sequence[str]:
    return ["train", _write_recipe(folder, base), "--stages.stage1.steps", "2"]


def checkpoint_cases(base: dict, trained: Path) -> Iterator[Case]:
    """Resume, score, export, or start from each checkpoint."""
    uses = [_resume, _score, _export, _start_from, _resume, _score_stage]
    for number, (name, damage) in enumerate(checkpoints.damages(Random(SEED))):
        beside = name.split()[0].endswith((".jsonl", ".json", ".yaml"))
        use = _resume if beside else uses[number % len(uses)]
        prepare = partial(_damaged, damage, use, base, trained)
        yield Case(f"{use.__name__[1:]} {name}", prepare, ("runs",))


def _damaged(
    damage: Callable, use: Callable, base: dict, trained: Path, folder: Path
) -> Sequence[str]:
    shutil.copytree(trained, folder / "runs")
    newest = folder / "runs" / "tiny" / "stage1" / "checkpoints" / "step-00000002"
    damage(newest)
    return use(base, newest)


def _resume(base: dict, newest: Path) -> Sequence[str]:
    recipe = _write_recipe(newest.parents[4], base)
    return ["train", recipe, "--stages.stage1.steps", "3", "--resume", "--allow-changed-recipe"]


def _score(base: dict, newest: Path) -> Sequence[str]:
    return ["eval", str(newest)]


def _score_stage(base: dict, newest: Path) -> Sequence[str]:
    return ["eval", str(newest.parents[1])]


def _export(base: dict, newest: Path) -> Sequence[str]:
    return ["export", str(newest), "--format", "radio"]


def _start_from(base: dict, newest: Path) -> Sequence[str]:
    stages = {"stage2": {**base["stages"]["stage1"], "start_from": str(newest)}}
    return ["train", _write_recipe(newest.parents[4], {**base, "stages": stages})]


NUM_INPUTS = 500
_counts: dict[str, Counter[str]] = {}


@pytest.mark.parametrize(
    "family", [shard_cases, image_cases, recipe_cases, command_cases], ids=lambda f: f.__name__
)
def test_hostile__inputs(family, root, base):
    run(family.__name__, list(family(base)), root)


def test_hostile__checkpoints(root, base, trained):
    run("checkpoint_cases", list(checkpoint_cases(base, trained)), root)


def test_hostile__enough(base, tmp_path):
    """The last of this file: how many inputs there are, and how those that were tried ended."""
    families = [shard_cases(base), image_cases(base), recipe_cases(base), command_cases(base)]
    num_inputs = sum(len(list(family)) for family in [*families, checkpoint_cases(base, tmp_path)])
    kinds = sorted({kind for counts in _counts.values() for kind in counts})
    print(f"{'hostile inputs':16}" + "".join(f"{kind:>15}" for kind in [*kinds, "all"]))
    for family, counts in {**_counts, "all": sum(_counts.values(), Counter())}.items():
        row = [*(counts[kind] for kind in kinds), counts.total()]
        print(f"{family:16}" + "".join(f"{number:15}" for number in row))
    assert num_inputs >= NUM_INPUTS


def run(family: str, cases: Sequence[Case], root: Path) -> None:
    """Run a family's cases, count their outcomes, and name every failure."""
    root.mkdir(exist_ok=True)
    outcomes = sandbox.run_cases(root, cases)
    _counts[family.removesuffix("_cases")] = Counter(outcome.kind for outcome in outcomes)
    failures = [item for item in outcomes if item.kind not in sandbox.GOOD]
    lines = [f"{item.kind}: {item.name}: {item.detail}" for item in failures]
    assert not failures, "\n".join([f"{len(failures)} of {len(cases)} inputs:", *lines])
