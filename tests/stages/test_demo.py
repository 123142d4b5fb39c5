"""What the demo says of its own table, and where the seeds of its last stage lie."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from radio_distill.data.sources import open_sources
from radio_distill.evals.gain import Metric, MultiTaskGain, multi_task_gain
from stages.cli import main
from stages.commands import demo, sweep
from stages.recipes import Asked, load_recipe

METRICS = {
    "stereo/recall": Metric(group="Correspondence", higher_is_better=True),
    "agreement/cosine": Metric(group="Agreement", higher_is_better=True),
    "fidelity/cosine/dino": Metric(group="Fidelity", higher_is_better=True, trained_for=True),
}
NOISE = 0.3
"""In percent: by which the seeds of each model differ from their mean."""


def gain_of(ahead: float, seeds: int = 2) -> MultiTaskGain:
    """A baseline, and a model that is ahead by some percent on tasks and behind in fidelity."""

    def runs(percent: float, fidelity: float) -> list[dict[str, float]]:
        factors = [1 + (percent + sign * NOISE) / 100 for sign in (-1, 1)][:seeds]
        return [
            {"stereo/recall": 20 * x, "agreement/cosine": 80 * x, "fidelity/cosine/dino": fidelity}
            for x in factors
        ]

    return multi_task_gain(
        {"stage3-bilinear": runs(0, 0.951), "stage3-featsharp": runs(ahead, 0.926)},
        "stage3-bilinear",
        METRICS,
    )


@pytest.mark.parametrize(
    ("ahead", "says"),
    [
        (0.5, "lies within"),
        (-0.5, "lies within"),
        (2.0, "its students are better here"),
        (-2.0, "its students are worse here"),
    ],
)
def test_verdict__follows_from_the_numbers(ahead, says):
    """Two seeds 0.6 % apart have a deviation of 0.42 %; so has the difference of two means."""
    line = demo.verdict(gain_of(ahead), "stage3-featsharp")
    assert line.startswith(f"stage3-featsharp against stage3-bilinear: Δm {ahead:+.2f} ")
    assert says in line
    assert f"±{2 * NOISE * 2**0.5:.2f} that 2 seeds leave open" in line
    assert ("0.926 against 0.951" in line) == (ahead == -2.0)
    assert "\n" not in line


def test_verdict__one_seed_ranks_nothing():
    assert "ranks nothing" in demo.verdict(gain_of(5.0, seeds=1), "stage3-featsharp")


def test_announcement__grows_with_the_students(monkeypatch):
    monkeypatch.setattr(demo, "_work", lambda: demo._WORK)
    monkeypatch.setattr(demo.os, "sched_getaffinity", lambda _: {0, 1})
    minutes = [
        int(re.search(r"about (\d+) minutes on 2 cores", demo.announcement(names, seeds))[1])
        for names, seeds in ((["bilinear"], 1), (demo.UPSAMPLERS, demo.SEEDS))
    ]
    assert 0 < minutes[0] < minutes[1] <= 10


def test_with_seed__others_lie_in_the_run_and_start_from_its_stage_2(tmp_path):
    recipe = load_recipe("demo", [f"output={tmp_path}"])
    checkpoints = recipe.folder / "stage2" / "checkpoints"
    checkpoints.mkdir(parents=True)
    asked = Asked("demo")
    assert sweep.with_seed(recipe, asked, 0) == (recipe, asked)
    for _ in range(2):
        other, other_asked = sweep.with_seed(recipe, asked, 1)
    assert other.folder.parent == recipe.folder
    assert (other.stage_folder("stage2") / "checkpoints").resolve() == checkpoints.resolve()
    assert other == replace(recipe, name=other.name, output=other.output, seed=recipe.seed + 1)
    assert load_recipe(other_asked.recipe, other_asked.fields) == other


def save_images(folder, number):
    for index in range(number):
        path = folder / f"class {index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)


def test_demo__without_images_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "make demo" in error
    assert "radio-distill demo --data DIR" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"), [(None, "no folder"), (0, "no images"), (1, "none to")]
)
def test_demo__too_few_own_images(tmp_path, monkeypatch, number, message, capsys):
    monkeypatch.chdir(tmp_path)
    if number is not None:
        (tmp_path / "mine").mkdir()
        save_images(tmp_path / "mine", number)
    assert main(["demo", "--data", "mine"]) == 2
    assert message in capsys.readouterr().err


def test_make_shards__holds_every_tenth_of_own_images_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "mine", 30)
    recipe = load_recipe("demo", demo._place_of(tmp_path / "mine"))
    for _ in range(2):  # what is there stays
        demo.make_shards(recipe, tmp_path / "mine")
    assert capsys.readouterr().out.count("3 images held out") == 1
    held_out = replace(recipe.data, shards=(recipe.evaluation.images,))
    assert open_sources(held_out).num_images == 3
    assert open_sources(recipe.data).num_images == 27
