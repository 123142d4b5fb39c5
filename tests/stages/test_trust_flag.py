"""Weights that hold code are read with ``--trust-checkpoint`` alone, and secrets stay unwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from radio_distill.data.shards import write_shards
from radio_distill.system import trust
from stages import cli
from stages.arguments import Parser

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE = """
name: hostile
output: {output}
data: {{shards: [{shards}]}}
teachers:
  a: {{preset: tiny_vit, weights: {weights}}}
stages:
  stage1: {{steps: 1, partitions: [{{name: low, size: 64, teachers: [a], batch_size: 2}}]}}
engine: {{device: cpu}}
"""


@pytest.fixture
def hostile(trap, tmp_path):
    """A recipe whose teacher's weights hold code, and the file that the code would make."""
    torch.save({"state_dict": {"w": torch.zeros(1)}, "more": trap}, tmp_path / "w.pth")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "black.png")
    write_shards(tmp_path / "images", tmp_path / "shards")
    recipe = tmp_path / "hostile.yaml"
    recipe.write_text(
        RECIPE.format(
            output=tmp_path / "runs", weights=tmp_path / "w.pth", shards=tmp_path / "shards"
        )
    )
    return recipe, trap.ran


@pytest.mark.parametrize("command", ["train", "fit-upsampler"])
def test_trust_checkpoint__is_needed(hostile, command, capsys):
    recipe, marker = hostile
    assert cli.main([command, str(recipe)]) == 2
    assert not marker.exists()
    assert "Traceback" not in capsys.readouterr().err


def test_trust_checkpoint__lets_the_code_run(hostile, capsys, caplog):
    recipe, marker = hostile
    assert cli.main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "would run code" in error
    assert "--trust-checkpoint" in error
    assert not marker.exists()
    assert cli.main(["train", str(recipe), "--trust-checkpoint"]) == 2, "no weights"
    assert marker.exists()
    assert "running the code in" in caplog.text
    assert not trust._TRUSTED.get(), "the trust ends with the command"


def test_trust_checkpoint__every_command_that_reads_weights_has_it():
    readers = {
        "demo", "plan", "train", "eval", "sweep", "fit-upsampler", "convert-upsampler", "export",
        "report", "upsampler-report", "mode-switching", "slurm", "upsample", "curate",
    }  # fmt: skip
    for name in cli.COMMANDS:
        parser = Parser(prog=name)
        cli.module_of(name).add_arguments(parser)
        has = any(trust.FLAG in action.option_strings for action in parser._actions)
        assert has == (name in readers), name


def test_recipe__with_a_secret_is_refused(hostile, capsys):
    recipe, _ = hostile
    token = "hf_" + "aB3" * 12
    assert cli.main(["train", str(recipe), "--teachers.a.options.token", token]) == 2
    error = capsys.readouterr().err
    assert "teachers.a.options.token" in error
    assert token not in error
    assert not (recipe.parent / "runs").exists()


def test_logs__have_no_token_of_the_environment(hostile):
    """A token in a path: in the one-line error it is hidden."""
    recipe, _ = hostile
    token = "not-known-by-its-looks-0123"
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", "train", f"{recipe}-{token}.yaml"],
        cwd=CHECKOUT,
        env=os.environ | {"HF_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert token not in done.stderr + done.stdout
    assert "***" in done.stderr
