"""A published checkpoint becomes a file that stage 3 finds, and gives the checkpoint's own maps."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from stages import cli
from stages.fits import FITTED, upsampler_of
from stages.recipes import describe_stage, load_recipe
from teachers import build_teacher
from upsamplers import build_upsampler
from upsamplers.networks import Observation, build_network


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    partition = {"name": "p", "size": 64, "teachers": ["vit"], "upsample": ["vit"], "batch_size": 1}
    recipe = {
        "name": "tiny",
        "output": str(tmp_path / "runs"),
        "data": {"shards": ["nowhere"]},
        "teachers": {"vit": {"preset": "tiny_vit"}},
        "fit": {"size": 32},
        "stages": {
            "stage3": {"upsampler": {"name": "featup", "factor": 16}, "partitions": [partition]}
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def checkpoint(path: Path, channels: int) -> torch.nn.Module:
    """Write a network under FeatUp's names; returns the network."""
    torch.manual_seed(0)
    network = build_network("featup", channels, 16, {}).eval()
    state = {
        "upsampler."
        + re.sub(r"levels\.(\d)", lambda m: f"up{int(m[1]) + 1}", key.removeprefix("stack.")): value
        for key, value in network.state_dict().items()
    }
    torch.save({"state_dict": state, "epoch": 0}, path)
    return network


def test_convert__gives_a_file_that_stage_3_finds_with_the_same_maps(recipe_file, tmp_path, capsys):
    teacher = build_teacher("vit", load_recipe(str(recipe_file)).teachers["vit"], "cpu")
    network = checkpoint(tmp_path / "vit.ckpt", teacher.spec.channels)
    words = ["convert-upsampler", "featup", str(tmp_path / "vit.ckpt")]
    assert cli.main([*words, str(recipe_file), "--teacher", "vit"]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "runs" / "tiny" / "fit" / "vit-featup-16x" / FITTED
    config = upsampler_of(describe_stage(load_recipe(str(recipe_file)), "stage3"))
    assert config.weights == {"vit": str(written)}
    upsampler = build_upsampler(config, {"vit": teacher})
    pixels = torch.rand(1, 3, 512, 512)
    height, width = teacher.spec.grid((32, 32))
    found = upsampler(teacher, pixels, (height * 16, width * 16)).spatial
    low = teacher.encode(
        torch.nn.functional.interpolate(
            pixels, (32, 32), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
    ).spatial
    expected = network(Observation(pixels, low))
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, atol=0.02 * scale, rtol=0)  # bfloat16 weights


def test_convert__another_teacher_is_one_line(recipe_file, tmp_path, capsys):
    checkpoint(tmp_path / "vit.ckpt", 16)
    words = ["convert-upsampler", "featup", str(tmp_path / "vit.ckpt")]
    assert cli.main([*words, str(recipe_file)]) == 2
    error = capsys.readouterr().err
    assert "16 channels, teacher 'vit'" in error
    assert error.count("\n") == 1
