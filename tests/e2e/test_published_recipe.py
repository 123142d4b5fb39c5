"""A published recipe, shrunk to tiny models, through all its stages on two real processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages import fit_upsampler

CHECKOUT = Path(__file__).resolve().parents[2]
SHRUNK = Path(__file__).with_name("tiny_featsharp_radio_l.yaml")

pytestmark = pytest.mark.distributed


def train(stage: str, *arguments: str) -> str:
    """Run a stage on two processes, as a user would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "2", str(CHECKOUT / "stages" / f"{stage}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_featsharp_radio_l__three_stages_on_two_processes_under_zero_2(pictures, tmp_path):
    arguments = ["--recipe", "featsharp_radio_l", "--override", str(SHRUNK)]
    fields = [f"data.shards=[{pictures / 'shards'}]", f"output={tmp_path}"]
    arguments += [item for field in fields for item in ("--override", field)]
    for stage in ("stage1", "stage2"):
        train(stage, *arguments)
    for teacher in ("dfn_clip", "siglip"):
        fit = ["--teacher", teacher, "--upsampler", "featsharp", "--factor", "3"]
        assert fit_upsampler.main([*arguments, *fit]) == 0
    train("stage3", *arguments)

    run = tmp_path / "tiny"
    folder = run / "stage3-featsharp"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    losses = {name: value for name, value in rows[-1].items() if name.startswith("loss/")}
    expected = {
        f"loss/{partition}/{teacher}/{kind}"
        for teacher in ("dfn_clip", "siglip", "dinov2", "sam")
        for partition in (teacher, f"{teacher}_hires")
        for kind in ("summary", "features")
        if (teacher, kind) != ("sam", "summary")
    }
    assert losses.keys() == expected
    assert all(math.isfinite(value) for value in losses.values())

    weights = [student(run / stage) for stage in ("stage1", "stage2", "stage3-featsharp")]
    name = "student.blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[1][name], weights[2][name])
    assert "student.blocks.0.attn.qkv.spectral_scale" in weights[2]


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step-00000003" / "student.safetensors")
