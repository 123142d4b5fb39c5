"""One process and two give the same gradient; `accelerate launch` starts a stage; every ZeRO stage
trains, saves and resumes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e2e import CHECKOUT, assert_equal, rows, run_folder, tensors
from radio_distill.config import load
from stages import fit_upsampler, stage1, stage2

ADAMW = ["--stage.optimizer", "adamw", "--stage.freeze_body_steps", "0", "--stage.ema_decay", "0"]

pytestmark = pytest.mark.distributed


@pytest.fixture
def processes() -> int:
    return 2


@pytest.fixture(autouse=True)
def one_thread():
    """As those processes have that this one is compared with: threads round a sum otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def accelerate(script: Path, *arguments: str, cwd: Path) -> None:
    """Start a script in two processes as a user would; with `--cpu`, it would be one process."""
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", *command, str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def assert_gradients_equal(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], zero_stage: int = 0
) -> None:
    """Compare AdamW's first moments after one step: a tenth of the (clipped) gradient."""
    names = [name for name in one if name.startswith("exp_avg/")]
    assert names
    for name in names:
        scale = float(one[name].abs().max())
        difference = float((one[name] - other[name]).abs().max())
        assert difference <= 1e-5 * max(scale, 1e-3), f"ZeRO {zero_stage}: {name}"


def test_gradient__two_partitions_on_one_process_and_on_two(recipe_file, crew):
    """One process runs both partitions as micro-batches; two have a partition each.

    Other ZeRO stages are asked for more below.
    """
    runs = run_folder(recipe_file)
    recipe = [str(recipe_file), "--stage.steps", "1"]
    assert stage1.main(recipe) == 0
    assert stage2.main([*recipe, *ADAMW]) == 0
    expected = tensors(runs / "stage2", 1, "optimizer")
    statistics = tensors(runs / "stage2", 1, "statistics")
    crew("stage2", *recipe, *ADAMW, "--engine.zero_stage", "1")
    assert_gradients_equal(expected, tensors(runs / "stage2", 1, "optimizer"))
    for name, value in tensors(runs / "stage2", 1, "statistics").items():
        torch.testing.assert_close(value, statistics[name])


def test_gradient__two_processes_that_load_different_teachers(recipe_file, tmp_path, crew):
    """Each runs its partition with its own teachers; of the others it knows the statistics."""
    runs = run_folder(recipe_file)
    recipe = [str(recipe_file), "--stage.steps", "1"]
    assert stage1.main(recipe) == 0
    ranks = ["--stage.partitions.a.ranks", "1", "--stage.partitions.b.ranks", "1"]
    arguments = [*recipe, *ADAMW, *ranks, "--engine.zero_stage", "0"]
    assert stage2.main(arguments) == 0
    expected = {part: tensors(runs / "stage2", 1, part) for part in ("optimizer", "statistics")}
    crew("watched_stage2", tmp_path, *arguments)
    held = [json.loads((tmp_path / f"{rank}-0.json").read_text()) for rank in range(2)]
    assert sorted(held) == [["sam"], ["vit", "cnn"]]
    assert_gradients_equal(expected["optimizer"], tensors(runs / "stage2", 1, "optimizer"))
    for name, value in tensors(runs / "stage2", 1, "statistics").items():
        torch.testing.assert_close(value, expected["statistics"][name])


@pytest.mark.parametrize("zero_stages", [(0, 2), (3,)])
def test_gradient__of_everything_that_a_step_can_have(recipe_file, crew, zero_stages):
    """Drawn sizes, mosaic, shared images, shifts, colours, windows, noise, relations, weights."""
    folder = run_folder(recipe_file) / "stage1-bilinear"
    everything = ["--override", str(Path(__file__).with_name("everything.yaml"))]
    steps = ["--stage.steps", "2", "--stage.freeze_body_steps", "0"]
    if 3 in zero_stages:  # it cuts up the weights that would be averaged, and runs no student ahead
        steps += ["--stage.ema_decay", "0", "--loss.mesa", "0", "--loss.relation", "{}"]
    arguments = [str(recipe_file), *everything, *steps, "--log.save_every", "1"]
    assert stage1.main(arguments) == 0
    first = folder / "checkpoints" / "step-00000001"
    shutil.copytree(first, recipe_file.parent / "first")
    expected = {step: tensors(folder, step, "optimizer") for step in (1, 2)}
    expected_loss = tensors(folder, 2, "loss")
    for zero_stage in zero_stages:
        zero = ("--engine.zero_stage", zero_stage)
        crew("stage1", *arguments, *zero)
        assert_gradients_equal(expected[1], tensors(folder, 1, "optimizer"), zero_stage)
        # AdamW's first update takes little but the sign of a gradient, also of one that is almost
        # zero: so the second gradient is compared from the weights that one process had.
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(recipe_file.parent / "first", first)
        crew("stage1", *arguments, *zero, "--resume")
        assert_gradients_equal(expected[2], tensors(folder, 2, "optimizer"), zero_stage)
        for name, value in tensors(folder, 2, "loss").items():
            torch.testing.assert_close(value, expected_loss[name], rtol=1e-5, atol=0)


def test_gradient__one_partition_shared_by_two_processes(recipe_file, crew):
    """Five images on two processes, in micro-batches of two: 2+0 and 2+1, one rank keeping pace."""
    runs = run_folder(recipe_file)
    arguments = [str(recipe_file), "--stage.steps", "1", *ADAMW]
    arguments += ["--stage.partitions.low.batch_size", "5"]
    assert stage1.main(arguments) == 0
    expected = tensors(runs / "stage1", 1, "optimizer")
    crew("stage1", *arguments, "--engine.micro_batch", "2", "--engine.zero_stage", "2")
    assert_gradients_equal(expected, tensors(runs / "stage1", 1, "optimizer"))


def test_gradient__of_a_fit_on_one_process_and_on_two(recipe_file, crew):
    """Three images on two processes; no cells are dropped at random."""
    folder = run_folder(recipe_file) / "fit" / "vit-featsharp-2x"
    arguments = [str(recipe_file), "--teacher", "vit", "--upsampler", "featsharp"]
    arguments += ["--fit.steps", "1", "--fit.batch_size", "3", "--fit.downsampler", "simple"]
    arguments += ["--fit.downsampler_kernel", "4", "--fit.crf", "0.1", "--fit.uncertainty", "true"]
    assert fit_upsampler.main(arguments) == 0
    expected = tensors(folder, 1, "optimizer")
    crew("fit_upsampler", *arguments)
    assert_gradients_equal(expected, tensors(folder, 1, "optimizer"))
    assert (folder / "upsampler.safetensors").is_file()


def test_resume__a_fit_on_two_processes_bit_for_bit(recipe_file, crew):
    """Two passes on one process and one on the other, which pads; NAdam cut up by ZeRO."""
    folder = run_folder(recipe_file) / "fit" / "vit-featsharp-2x"
    arguments = [str(recipe_file), "--teacher", "vit", "--fit.steps", "4", "--fit.batch_size", "3"]
    arguments += ["--fit.downsampler_kernel", "4", "--engine.micro_batch", "1"]
    crew("fit_upsampler", *arguments)
    whole = tensors(folder, 4, "upsampler")
    for zero_stage in (1, 2):
        zero = ("--engine.zero_stage", zero_stage)
        crew("fit_upsampler", *arguments, *zero)
        expected = {part: tensors(folder, 4, part) for part in ("upsampler", "optimizer")}
        assert {name: value.shape for name, value in whole.items()} == {
            name: value.shape for name, value in expected["upsampler"].items()
        }
        for name, value in whole.items():  # sums are rounded otherwise
            assert torch.allclose(value, expected["upsampler"][name], atol=1e-3), name
        shutil.rmtree(folder / "checkpoints" / "step-00000004")
        crew("fit_upsampler", *arguments, *zero, "--resume")
        for part, values in expected.items():
            assert_equal(values, tensors(folder, 4, part), f"ZeRO {zero_stage} {part}")


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_resume__two_processes_bit_for_bit(recipe_file, tmp_path, crew, zero_stage):
    """Under ZeRO 3 others go on than those that were interrupted, started from a foreign folder."""
    folder = run_folder(recipe_file) / "stage1"
    arguments = [str(recipe_file), *ADAMW, "--engine.zero_stage", str(zero_stage)]
    crew("stage1", *arguments)
    expected = {part: tensors(folder, 6, part) for part in ("student", "optimizer")}
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    if zero_stage == 3:
        script = CHECKOUT / "stages" / "stage1.py"
        accelerate(script, *arguments, "--resume", cwd=tmp_path)
    else:
        crew("stage1", *arguments, "--resume")
    for part, values in expected.items():
        assert_equal(values, tensors(folder, 6, part), part)
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_train__two_stages_in_the_same_two_processes(recipe_file, crew):
    """DeepSpeed keeps the groups of the first stage, so the second must be given the same ones.

    The first is AdamW under ZeRO 1, the second LAMB without ZeRO: the defaults of each.
    """
    steps = ["--stages.stage1.steps", "2", "--stages.stage2.steps", "2"]
    crew("cli", "train", recipe_file, "--stages", "stage1", "stage2", *steps)
    runs = run_folder(recipe_file)
    steps_done = [
        int(tensors(runs / stage, 2, "optimizer")["step"]) for stage in ("stage1", "stage2")
    ]
    assert steps_done == [2, 2]
    written = [load(runs / stage / "recipe.yaml") for stage in ("stage1", "stage2")]
    assert [recipe.engine.zero_stage for recipe in written] == [1, 0]


@pytest.mark.faults
def test_srun__a_stage_with_the_variables_of_slurm_alone(recipe_file):
    """Plain srun sets neither LOCAL_RANK, which DeepSpeed insists on, nor MASTER_ADDR."""
    script = str(CHECKOUT / "stages" / "stage1.py")
    arguments = [str(recipe_file), "--stage.steps", "1", *ADAMW]
    plain = {name: value for name, value in os.environ.items() if not name.endswith("RANK")}
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=plain
            | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            | {"SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert tensors(run_folder(recipe_file) / "stage1", 1, "student")


def test_featsharp_radio_l__three_stages_on_two_processes_under_zero_2(images, tmp_path, crew):
    pytest.importorskip("transformers")  # two of the teachers
    arguments = [
        "featsharp_radio_l",
        "--override",
        str(Path(__file__).with_name("tiny_featsharp_radio_l.yaml")),
    ]
    fields = [f"data.shards=[{images / 'shards'}]", f"output={tmp_path}"]
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        fields.append("engine.device=cpu")
    arguments += [item for field in fields for item in ("--override", field)]
    for stage in ("stage1", "stage2"):
        crew(stage, *arguments)
    for teacher in ("dfn_clip", "siglip"):
        fit = ["--teacher", teacher, "--upsampler", "featsharp", "--factor", "3"]
        assert fit_upsampler.main([*arguments, *fit]) == 0
    crew("stage3", *arguments)

    run = tmp_path / "tiny"
    folder = run / "stage3-featsharp"
    log = rows(folder)
    assert [row["step"] for row in log] == [1, 2, 3]
    losses = {name: value for name, value in log[-1].items() if name.startswith("loss/")}
    expected = {
        f"loss/{partition}/{teacher}/{kind}"
        for teacher in ("dfn_clip", "siglip", "dinov2", "sam")
        for partition in (teacher, f"{teacher}_hires")
        for kind in ("summary", "features")
        if (teacher, kind) != ("sam", "summary")
    }
    assert losses.keys() == expected | {"loss/total"}
    assert all(math.isfinite(value) for value in losses.values())

    folders = [run / stage for stage in ("stage1", "stage2", "stage3-featsharp")]
    weights = [tensors(folder, 3, "student") for folder in folders]
    name = "student.blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[1][name], weights[2][name])
    assert "student.blocks.0.attn.qkv.spectral_scale" in weights[2]
