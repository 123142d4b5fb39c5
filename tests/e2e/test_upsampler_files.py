"""A student remembers the file of the upsampler that it learned through, and notices another."""

import json
import os
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from safetensors.torch import load_file, save_file

from e2e import one_line, run, run_folder
from radio_distill.system.files import sha256_of
from radio_distill.train.checkpoint import find, sealed
from stages import fit_upsampler, stage1, stage2, stage3
from stages.cli import main as cli
from stages.recipes import load_recipe
from teachers import build_teacher

HERE = ["--stages.stage3.start_from", "", "--stages.stage3.steps", "2"]
FEATUP = ["--teacher-upsampler", "featup", *HERE]
SWEEP = ["--upsamplers", "featup", "--baseline", "featup", *HERE]
FIT = [
    *("--teacher", "vit", "--upsampler", "featup", "--fit.size", "64", "--fit.steps", "1"),
    *("--fit.batch_size", "2", "--fit.downsampler_kernel", "4"),
]


@pytest.fixture
def trained(recipe_file: Path) -> Path:
    """The run folder of a stage 3 that was trained through a fitted upsampler."""
    assert run(fit_upsampler, recipe_file, *FIT) == 0
    assert run(stage3, recipe_file, *FEATUP) == 0
    return run_folder(recipe_file)


def fitted_file(folder: Path) -> Path:
    return folder / "fit" / "vit-featup-2x" / "upsampler.safetensors"


def forget_the_file(checkpoint: Path) -> None:
    """Make a checkpoint as earlier versions wrote it."""
    path = checkpoint / "meta.json"
    meta = json.loads(path.read_text())
    recipe = yaml.safe_load(meta["recipe"])
    for field in ("weights", "sha256", "sizes"):
        recipe["stages"]["stage3"]["upsampler"].pop(field)
    path.write_text(json.dumps(sealed({**meta, "recipe": yaml.safe_dump(recipe)})))


def test_stage3__what_it_was_made_of(trained, recipe_file, capfd, caplog):
    file, stage = fitted_file(trained), trained / "stage3-featup"
    checkpoint = find(stage)
    upsampler = checkpoint.recipe.stages["stage3"].upsampler
    assert (upsampler.weights, upsampler.factor) == ({"vit": str(file)}, 2)
    assert (upsampler.sha256, upsampler.sizes) == ({"vit": sha256_of(file)}, {"vit": 64})
    written = yaml.safe_load((stage / "recipe.yaml").read_text())
    assert written["stages"]["stage3"]["upsampler"]["sha256"] == {"vit": sha256_of(file)}

    again = ["--fit.size", "32", "--fit.views", "9"]  # of the fit: no matter to a stage
    assert run(stage3, recipe_file, *FEATUP, *again, "--resume") == 0

    known = sha256_of(file)
    assert run(fit_upsampler, recipe_file, *FIT, "--seed", "9") == 0
    assert sha256_of(file) != known
    before = load_file(checkpoint.folder / "student.safetensors")
    capfd.readouterr()
    assert run(stage3, recipe_file, *FEATUP, "--resume") == 2
    line = one_line(capfd)
    assert f"upsampler.sha256.vit: {known[:12]}... -> {sha256_of(file)[:12]}..." in line
    assert "add --allow-changed-recipe" in line

    assert cli(["sweep", str(recipe_file), *SWEEP]) == 2
    captured = capfd.readouterr()
    assert captured.out == "", "no table"
    assert "add --retrain to train it anew" in captured.err.strip().splitlines()[-1]
    assert cli(["eval", str(stage)]) == 0
    assert "another featup of teacher 'vit'" in caplog.text

    assert cli(["sweep", str(recipe_file), *SWEEP, "--retrain"]) == 0
    assert find(stage).recipe.stages["stage3"].upsampler.sha256 == {"vit": sha256_of(file)}
    aside = load_file(
        trained / "stage3-featup.1" / "checkpoints" / checkpoint.folder.name / "student.safetensors"
    )
    assert all((before[name] == value).all() for name, value in aside.items())


def test_stage3__the_file_is_not_needed_once_it_is_complete(trained, recipe_file, capfd):
    fitted_file(trained).unlink()
    assert run(stage3, recipe_file, *FEATUP, "--resume") == 0
    assert cli(["eval", str(trained / "stage3-featup")]) == 0
    capfd.readouterr()
    assert run(stage3, recipe_file, *FEATUP) == 2
    assert "teacher 'vit' at 64 px" in one_line(capfd)


def test_stage3__an_earlier_checkpoint_does_not_know_its_file(trained, recipe_file, caplog):
    forget_the_file(find(trained / "stage3-featup").folder)
    assert run(stage3, recipe_file, *FEATUP, "--resume") == 0
    assert "upsampler of teacher 'vit'" in caplog.text


def test_fit__the_command_in_the_message_makes_what_is_missing(recipe_file, capfd):
    assert cli(["train", str(recipe_file), *FEATUP, "--stages", "stage3", "--name", "other"]) == 2
    command = one_line(capfd).partition("; run ")[2].partition(", or set")[0]
    words = shlex.split(command)
    assert words[:2] == ["radio-distill", "fit-upsampler"]
    assert cli([*words[1:], "--fit.steps", "1", *FIT[-4:]]) == 0
    assert cli(["train", str(recipe_file), *FEATUP, "--stages", "stage3", "--name", "other"]) == 0


def test_slurm__fits_and_then_trains(recipe_file):
    """In this process: the jobs are the commands that they seem to be."""
    fields = ["--stages.stage3.upsampler.name", "featup", *HERE, *FIT[6:]]
    flags = ["--executor", "debug", "--gpus-per-node", "0", "--no-export", "--no-eval"]
    with patch.dict(os.environ):
        assert cli(["slurm", str(recipe_file), "--stages", "stage3", *flags, *fields]) == 0
    run = run_folder(recipe_file)
    upsampler = find(run / "stage3-featup").recipe.stages["stage3"].upsampler
    assert upsampler.sha256 == {"vit": sha256_of(fitted_file(run))}


def test_stage2__knows_the_student_that_it_started_from(recipe_file, capfd):
    """Another seed of stage 1 would make another student of stage 2."""
    shorter = ["--stages.stage1.steps", "1", "--stages.stage2.steps", "2"]
    assert run(stage1, recipe_file, *shorter) == 0
    assert run(stage2, recipe_file, *shorter) == 0
    runs = run_folder(recipe_file)
    first = find(runs / "stage1").weights_sha256
    assert find(runs / "stage2").origin.start == first
    assert run(stage2, recipe_file, *shorter, "--resume") == 0

    assert run(stage1, recipe_file, *shorter, "--stage.learning_rate", "0.01") == 0
    again = find(runs / "stage1").weights_sha256
    capfd.readouterr()
    assert run(stage2, recipe_file, *shorter, "--resume") == 2
    assert f"the student of {runs / 'stage1'}: {first[:12]}... -> {again[:12]}..." in one_line(
        capfd
    )

    assert run(stage2, recipe_file, *shorter) == 0
    assert find(runs / "stage2").origin.start == again


def test_stage1__says_what_was_changed_on_its_way(recipe_file, caplog):
    steps = ["--stage.steps", "4", "--stage.ema_decay", "0"]
    assert run(stage1, recipe_file, *steps) == 0
    folder = run_folder(recipe_file) / "stage1"
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    changed = ["--stage.weight_decay", "0.5", "--resume", "--allow-changed-recipe"]
    assert run(stage1, recipe_file, *steps, *changed) == 0
    line = "after step 2: stages.stage1.weight_decay: 0.02 -> 0.5"
    assert find(folder).origin.changed == (line,)
    assert cli(["eval", str(folder)]) == 0
    assert f"was changed {line}" in caplog.text


def test_stage1__a_teacher_with_other_weights_is_not_gone_on_with(recipe_file, tmp_path, capfd):
    """Its file is where it was, under the name that it had."""
    weights = tmp_path / "vit.safetensors"
    config = load_recipe(str(recipe_file)).teachers["vit"]
    state = build_teacher("vit", config).tower.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    arguments = ["--stage.steps", "4", "--stage.ema_decay", "0", "--teachers.vit.weights", weights]
    arguments = list(map(str, arguments))
    assert run(stage1, recipe_file, *arguments) == 0
    folder = run_folder(recipe_file) / "stage1" / "checkpoints"
    shutil.rmtree(folder / "step-00000004")
    save_file({name: value.contiguous() * 1.5 for name, value in state.items()}, weights)
    capfd.readouterr()
    assert run(stage1, recipe_file, *arguments, "--resume") == 2
    line = one_line(capfd)
    assert "teachers.vit: " in line
    assert "add --allow-changed-recipe" in line
