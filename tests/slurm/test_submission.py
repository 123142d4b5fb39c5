"""What is looked at before jobs are submitted, and the fits that become jobs."""

import json

import pytest
import torch

from slurm.chain import Job, read_chain
from slurm.cluster import Cluster
from slurm.requeue import Stop, append_stop
from stages.cli import main as cli
from upsamplers import fitted_files
from upsamplers.fitted_files import FittedHeader

RECIPE = """
name: whole
output: {folder}/runs
data: {{shards: [{folder}/shards]}}
student: {{architecture: test_vit, max_size: 64, registers: 0, head_hidden: 8}}
teachers: {{vit: {{preset: tiny_vit}}}}
stages:
  stage1:
    steps: 4
    partitions: [{{name: low, size: 32, teachers: [vit], batch_size: 2}}]
  stage3:
    steps: 4
    start_from: stage1
    upsampler: {{name: featup, factor: 2}}
    partitions:
      - name: high
        size: 64
        teachers: [vit]
        upsample: [vit]
        teacher_sizes: {{vit: 32}}
        batch_size: 2
fit: {{batch_size: 4}}
evaluation: {{benchmarks: [fidelity], images: {folder}/shards}}
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe that could run, but that the upsampler of its stage 3 is not fitted yet."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    path = tmp_path / "whole.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "whole"


@pytest.fixture
def free(monkeypatch):
    """Leave out what takes longest: measuring models for the cost."""
    monkeypatch.setattr("stages.commands.submission.cost_of", lambda *_: "cost: nothing")


def slurm(*arguments):
    return cli(["slurm", *map(str, arguments)])


def jobs(run):
    chain = read_chain(run / "slurm")
    assert chain is not None
    return {job.name: job for job in chain.jobs}


def write_fitted(path, **changes):
    values = {"upsampler": "featup", "teacher": "vit", "weights_hash": "", "channels": 32}
    header = FittedHeader(**{**values, "factor": 2, "size": (32, 32), **changes})
    fitted_files.write(path, {"bias": torch.zeros(1)}, header)


def test_submit__a_fit_is_a_job_before_the_stage_that_needs_it(recipe, run, login_node, capsys):
    assert slurm(recipe, "--gpus-per-node", "8", "--seed", "3", "--output", run.parent) == 0
    captured = capsys.readouterr()
    assert "jobs: stage1 41 -> fit-stage3 42 -> stage3 43 -> export 44 -> eval 45" in captured.out
    assert "fitted before stage3: vit-featup-2x" in captured.err
    assert "cost: stage1 " in captured.err
    assert "on 8 devices, which makes" in captured.err
    job = jobs(run)["fit-stage3"]
    (task,) = job.tasks
    assert task.stage_folder == str(run / "fit" / "vit-featup-2x")
    assert task.arguments == (
        *("fit-upsampler", str(recipe), "--teacher", "vit", "--upsampler", "featup"),
        *("--factor", "2", "--fit.size", "32", "--output", str(run.parent), "--seed", "3"),
    )
    script = (login_node / "42.sh").read_text()
    assert "#SBATCH --ntasks-per-node=4\n" in script, "no more processes than images in a step"
    assert "#SBATCH --dependency=afterok:41\n" in script
    assert "#SBATCH --dependency=afterok:42\n" in (login_node / "43.sh").read_text()


@pytest.mark.usefixtures("free")
def test_submit__a_fit_is_resumed_like_a_stage(recipe, run, login_node, capsys):
    assert slurm(recipe, "--no-export", "--no-eval") == 0
    for name, job in (("stage1", "41"),):
        stop = Stop(name=name, job=job, restart=0, kind="done", reason="complete")
        append_stop(run / "slurm", stop)
    capsys.readouterr()
    assert slurm("status", run) == 0
    assert "fit-stage3" in capsys.readouterr().out
    assert slurm("resume", run) == 0
    assert "jobs: stage1 41 -> fit-stage3 44 -> stage3 45" in capsys.readouterr().out
    assert jobs(run)["fit-stage3"].tasks[0].arguments[-1] == "--resume"


@pytest.mark.usefixtures("free")
def test_submit__what_is_fitted_is_not_fitted_again(recipe, run, login_node, capsys):
    write_fitted(run / "fit" / "vit-featup-2x" / "upsampler.safetensors")
    assert slurm(recipe, "--no-export", "--no-eval") == 0
    assert "jobs: stage1 41 -> stage3 42\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.shards", "[nowhere]"], "no shards found for 'nowhere'"),
        (["--teachers.vit.weights", "nowhere.pth"], "teachers.vit: no weights at nowhere.pth"),
        (["--evaluation.images", ""], "evaluation.images is empty and benchmark 'fidelity'"),
        (["--stages", "stage3"], "stages.stage3 starts from stage1, and there is no checkpoint"),
        (["--stages.stage3.partitions.high.teacher_sizes.vit", "33"], "33 is not a multiple"),
        (["--stages.stage3.upsampler.options", "{radius: 1}"], "no option 'radius'"),
    ],
)
def test_submit__what_cannot_run_is_not_queued(recipe, login_node, capsys, arguments, message):
    assert slurm(recipe, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith("nothing is submitted")
    assert captured.out == ""
    assert not list(login_node.glob("*.sh"))


@pytest.mark.usefixtures("free")
def test_submit__a_fit_of_another_size_is_the_users_to_mend(recipe, run, login_node, capsys):
    write_fitted(run / "fit" / "vit-featup-2x" / "upsampler.safetensors", size=(48, 48))
    assert slurm(recipe) == 2
    assert "48x48 px" in capsys.readouterr().err


@pytest.mark.usefixtures("free")
def test_submit__what_only_the_nodes_have(recipe, login_node, capsys):
    assert slurm(recipe, "--data.shards", "[nowhere]", "--skip-check", "--no-eval") == 0
    captured = capsys.readouterr()
    assert "missing here: data.shards: no shards found for 'nowhere'" in captured.err
    assert "jobs: stage1 41" in captured.out


@pytest.mark.usefixtures("free")
def test_submit__scores_that_are_left_out_need_nothing(recipe, login_node):
    assert slurm(recipe, "--evaluation.images", "", "--no-eval") == 0


@pytest.mark.usefixtures("free")
def test_dry_run__a_teacher_that_many_stages_lack_is_one_line(recipe, capsys):
    assert slurm(recipe, "--teachers.vit.preset", "tiny_vti", "--dry-run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "missing here" in line]
    assert len(lines) == 1
    assert "teachers.vit: " in lines[0]


@pytest.mark.usefixtures("free")
def test_dry_run__says_what_is_missing_beside_the_scripts(recipe, capsys):
    assert slurm(recipe, "--data.shards", "[nowhere]", "--dry-run") == 0
    captured = capsys.readouterr()
    assert "missing here: data.shards: no shards found for 'nowhere'" in captured.err
    assert (
        f"# ---- fit-stage3 vit-featup-2x: stages.cli:main fit-upsampler {recipe} " in captured.out
    )
    assert captured.out.index("# ---- fit-stage3") < captured.out.index("# ---- stage3")


def test_dry_run__a_teacher_that_cannot_be_measured_costs_what_is_not_known(
    recipe, monkeypatch, capsys
):
    monkeypatch.setattr("teachers.sources.timm.build", lambda preset: 1 / 0)
    assert slurm(recipe, "--dry-run") == 0
    assert "cost: not known (ZeroDivisionError" in capsys.readouterr().err


def test_sweep__the_values_of_a_field_share_a_fit(recipe, run, login_node, capsys):
    arguments = ("--no-export", "--no-eval", "--sweep", "stage.learning_rate=1e-3,3e-4")
    assert slurm(recipe, *arguments) == 0
    found = jobs(run)
    assert [task.label for task in found["fit-stage3"].tasks] == ["vit-featup-2x"]
    file = run / "fit" / "vit-featup-2x" / "upsampler.safetensors"
    for task in found["stage3"].tasks:
        assert f"--stages.stage3.upsampler.weights.vit={file}" in task.arguments
    error = capsys.readouterr().err
    assert "stage3 learning_rate-1e-3 " in error
    assert "stage3 learning_rate-3e-4 " in error


@pytest.mark.usefixtures("free")
def test_sweep__a_field_that_changes_what_is_fitted_has_fits_of_its_own(recipe, run, login_node):
    assert slurm(recipe, "--sweep", "stage.upsampler.factor=2,3") == 0
    folders = [task.stage_folder for task in jobs(run)["fit-stage3"].tasks]
    assert folders == [
        str(run.with_name("whole-factor-2") / "fit" / "vit-featup-2x"),
        str(run.with_name("whole-factor-3") / "fit" / "vit-featup-3x"),
    ]


@pytest.mark.usefixtures("free")
def test_sweep__each_fitted_upsampler_is_fitted(recipe, run, login_node):
    assert slurm(recipe, "--upsamplers", "bilinear", "featup", "carafe") == 0
    assert list(jobs(run)) == ["stage1", "fit-stage3", "stage3", "gain"]
    labels = [task.label for task in jobs(run)["fit-stage3"].tasks]
    assert labels == ["vit-featup-2x", "vit-carafe-2x"]


@pytest.mark.parametrize(
    ("nodes", "gpus", "most", "expected"),
    [
        (4, 8, 0, (4, 8)),
        (4, 8, 32, (4, 8)),
        (4, 8, 20, (2, 8)),
        (4, 8, 3, (1, 3)),
        (2, 0, 1, (1, 0)),
    ],
)
def test_cluster__no_more_processes_than_have_work(nodes, gpus, most, expected):
    job = Job(name="fit", target="a:b", tasks=(), most_processes=most)
    cluster = job.cluster(Cluster(nodes=nodes, gpus_per_node=gpus))
    assert (cluster.nodes, cluster.gpus_per_node) == expected


@pytest.mark.usefixtures("free")
def test_chain__of_an_earlier_version_is_read(recipe, run, login_node):
    assert slurm(recipe, "--no-export", "--no-eval") == 0
    path = run / "slurm" / "chain.json"
    data = json.loads(path.read_text())
    data["links"] = data.pop("jobs")
    for job in data["links"]:
        del job["most_processes"]
    path.write_text(json.dumps(data))
    assert list(jobs(run)) == ["stage1", "fit-stage3", "stage3"]
