"""A whole run in seconds: shards of generated images, tiny teachers, a tiny student."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from e2e import RECIPE, Crew, begin_run

from ..pair import Pair


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write smooth colour gradients with a bright square, each different."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        height, width = generator.integers(70, 140, 2)
        coarse = generator.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        top, left = generator.integers(0, 40, 2)
        image[top : top + 20, left : left + 20] = generator.integers(0, 255, 3)
        Image.fromarray(image).save(folder / f"{index:03}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards`` and ``held_out``."""
    from radio_distill.data.shards import write_shards

    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 30, seed=0)
    write_images(root / "held_out", 4, seed=1)
    write_shards(root / "train", root / "shards", images_per_shard=8)
    return root


@pytest.fixture
def processes() -> int:
    """How many processes of one run a test starts at once; modules with more say so."""
    return 1


def write_recipe(folder: Path, images: Path, processes: int = 1) -> Path:
    """Write the tiny recipe, with its run folder in ``folder``; on GPUs where there are enough."""
    recipe = {
        **RECIPE,
        "output": str(folder / "runs"),
        "data": {**RECIPE["data"], "shards": [str(images / "shards")]},
        "evaluation": {**RECIPE["evaluation"], "images": str(images / "held_out")},
    }
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        recipe["engine"] = {**RECIPE["engine"], "device": "cpu"}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, images: Path, processes: int) -> Path:
    """The tiny recipe, with its run folder in this test's folder."""
    return write_recipe(tmp_path, images, processes)


@pytest.fixture(scope="session")
def _two_steps(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    from stages import stage1

    recipe = write_recipe(tmp_path_factory.mktemp("two_steps"), images)
    fields = ["--stage.steps", "2", "--stage.freeze_body_steps", "0"]
    assert stage1.main([str(recipe), *fields]) == 0
    return recipe.parent / "runs"


@pytest.fixture
def two_steps(recipe_file: Path, _two_steps: Path) -> Path:
    """The run folder of the recipe with a finished stage 1 of two steps."""
    shutil.copytree(_two_steps, recipe_file.parent / "runs")
    return recipe_file.parent / "runs" / "tiny"


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Two processes of one run, which run what they are asked: ``crew("stage1", *arguments)``."""
    log = tmp_path_factory.mktemp("crew") / "crew.log"
    pair = Pair(partial(begin_run, log))
    yield Crew(pair, log)
    pair.leave()
