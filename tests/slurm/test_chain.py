"""A recipe's jobs in their order, remembered whole in a folder that is its user's alone."""

import stat
from pathlib import Path

import pytest

from radio_distill.config import for_stage, load
from radio_distill.errors import ConfigError
from slurm.chain import (
    Chain,
    Job,
    Request,
    Task,
    find_chain,
    jobs_of,
    private_folder,
    read_chain,
    to_resume,
    write_chain,
)
from slurm.cluster import Cluster
from stages.recipes import load_recipe


@pytest.fixture
def chain():
    tasks = tuple(Task(label=name, arguments=("--x", name), job_id="") for name in "ab")
    return Chain(
        jobs=(
            Job(name="stage1", target="s:main", tasks=(Task(job_id="41", stage_folder="/r/s"),)),
            Job(name="stage3", target="s:main", tasks=tasks),
            Job(name="eval", target="e:main", tasks=(Task(),), is_stage=False),
        ),
        cluster=Cluster(nodes=2, gpus_per_node=8, launcher="torchrun", setup=("a", "b")),
    )


def test_read_chain__gives_back_what_was_written(tmp_path, chain):
    write_chain(tmp_path, chain)
    assert read_chain(tmp_path) == chain
    assert read_chain(tmp_path / "none") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"links": [{}], "cluster": {}}'])
def test_read_chain__a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / "chain.json").write_text(text)
    with pytest.raises(ConfigError, match=r"chain\.json"):
        read_chain(tmp_path)


def test_find_chain__of_a_run_or_of_its_slurm_folder(tmp_path, chain):
    folder = private_folder(tmp_path / "run" / "slurm")
    write_chain(folder, chain)
    assert find_chain(tmp_path / "run") == find_chain(folder) == (folder, chain)
    with pytest.raises(ConfigError, match="radio-distill slurm RECIPE"):
        find_chain(tmp_path)


def test_private_folder__refuses_one_that_others_can_open(tmp_path):
    folder = private_folder(tmp_path / "a")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        private_folder(folder)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--folder"):
        private_folder(tmp_path / "file" / "a")


def test_task__also_before_its_id_is_noted(chain):
    assert chain.task("stage1", "41").stage_folder == "/r/s"
    assert chain.task("stage3", "42_1").label == "b"
    assert chain.task("eval", "43") == Task()


def test_task__one_of_a_smaller_array_after_a_resume(chain):
    tasks = (Task(label="a", job_id="42_0"), Task(label="b"), Task(label="c"))
    changed = chain.with_job(Job(name="stage3", target="s:main", tasks=tasks))
    assert changed.task("stage3", "50_1").label == "c"
    assert changed.task("stage3", "42_0").label == "a"
    assert changed.jobs[1].job_ids == ["42", ""]


def test_cluster__what_is_no_stage_is_one_process(chain):
    stage, _, evaluation = (job.cluster(chain.cluster) for job in chain.jobs)
    assert stage == chain.cluster
    assert (evaluation.nodes, evaluation.processes_per_node, evaluation.launcher) == (1, 1, "srun")
    assert evaluation.setup == chain.cluster.setup
    assert chain.jobs[2].cluster(Cluster(gpus_per_node=0)).gpus_per_node == 0


@pytest.fixture
def upsampled(recipe):
    """The recipe with a teacher of stage 3 that goes through the upsampler."""
    text = recipe.read_text().replace(
        "start_from: stage2}",
        "start_from: stage2, partitions: [{name: high, size: 64, teachers: [a], batch_size: 2, "
        "upsample: [a]}]}",
    )
    recipe.write_text(text)
    return recipe


def names(jobs):
    return [job.name for job in jobs]


def test_jobs_of__stages_then_export_and_scores(tmp_path, recipe):
    found, jobs = jobs_of(Request(recipe=recipe, overrides=("seed=3",)))
    run = tmp_path / "runs" / "tiny"
    assert found.seed == 3
    assert names(jobs) == ["stage1", "stage2", "stage3", "export", "eval"]
    stage2, export, evaluation = jobs[1], jobs[3], jobs[4]
    assert stage2.tasks[0].arguments == ("train", str(recipe), "--stages", "stage2", "--seed=3")
    assert stage2.tasks[0].stage_folder == str(run / "stage2")
    assert {job.target for job in jobs} == {"stages.cli:main"}
    assert export.tasks[0].arguments == ("export", str(run), "--format", "transformers")
    assert evaluation.tasks[0].arguments == ("eval", str(run / "stage3"))
    assert [job.is_stage for job in jobs] == [True, True, True, False, False]


def test_jobs_of__what_comes_after_may_be_left_out(recipe):
    assert names(jobs_of(Request(recipe=recipe, export=False))[1])[3:] == ["eval"]
    assert names(jobs_of(Request(recipe=recipe, evaluate=False))[1])[3:] == ["export"]
    assert names(jobs_of(Request(recipe=recipe, stages=("stage1", "stage2")))[1]) == [
        "stage1",
        "stage2",
    ]
    assert names(jobs_of(Request(recipe=recipe, stages=("stage3",)))[1])[1:] == ["export", "eval"]


def test_jobs_of__upsamplers_are_an_array_and_then_their_gains(tmp_path, upsampled):
    request = Request(
        recipe=upsampled,
        stages=("stage3",),
        upsamplers=("tile", "bilinear"),
        overrides=("stage.steps=7", "output=o"),
    )
    _, (stage3, gain) = jobs_of(request)
    assert [task.label for task in stage3.tasks] == ["tile", "bilinear"]
    assert [Path(task.stage_folder).name for task in stage3.tasks] == [
        "stage3-tile",
        "stage3-bilinear",
    ]
    assert "--stages.stage3.upsampler.name=tile" in stage3.tasks[0].arguments
    assert gain.tasks[0].arguments == (
        *("sweep", str(upsampled), "--upsamplers", "tile", "bilinear", "--baseline", "bilinear"),
        *("--override", "stages.stage3.steps=7", "--override", "output=o"),
    )
    assert not gain.is_stage


def test_jobs_of__the_gains_parse_as_the_command_that_they_are(upsampled, monkeypatch):
    from stages import cli
    from stages.commands import sweep

    _, jobs = jobs_of(
        Request(recipe=upsampled, upsamplers=("tile", "s2"), overrides=("output=o", "seed=4"))
    )
    seen = []
    monkeypatch.setattr(sweep, "run", seen.append)
    assert cli.main(jobs[-1].tasks[0].arguments) == 0
    assert (seen[0].upsamplers, seen[0].baseline) == (["tile", "s2"], "tile")
    recipe = load_recipe(seen[0].recipe, seen[0].fields)
    assert (recipe.output, recipe.seed) == ("o", 4)


def test_jobs_of__a_field_is_swept_in_run_folders_of_their_own(tmp_path, recipe):
    request = Request(recipe=recipe, stages=("stage3",), sweep="stage.steps=5,7")
    _, (stage3,) = jobs_of(request)
    assert [task.label for task in stage3.tasks] == ["steps-5", "steps-7"]
    runs = tmp_path / "runs"
    assert [Path(task.stage_folder) for task in stage3.tasks] == [
        runs / "tiny-steps-5" / "stage3",
        runs / "tiny-steps-7" / "stage3",
    ]
    overrides = [item[2:] for item in stage3.tasks[1].arguments[4:]]
    changed = load(recipe, overrides, "stage3").stages["stage3"]
    assert (changed.steps, changed.start_from) == (7, str(runs / "tiny" / "stage2"))


@pytest.mark.parametrize("last", ["stage2", "stage4"])
def test_jobs_of__a_sweep_finds_the_students_of_earlier_stages(tmp_path, last):
    """Each value trains the same student, from the same start, with the same proxy."""
    stage = "partitions: [{name: all, size: 32, batch_size: 2, teachers: [%s]}]"
    path = tmp_path / "chain.yaml"
    path.write_text(f"""
output: {tmp_path}
data: {{shards: [a.tar]}}
teachers: {{t: {{preset: tiny_vit}}, proxy: {{preset: student, stage: stage2}}}}
stages:
  stage1: {{student: {{registers: 7}}, {stage % "t"}}}
  stage2: {{start_from: stage1, {stage % "t"}}}
  stage3: {{{stage % "proxy"}}}
  stage4: {{start_from: stage3, {stage % "proxy"}}}
""")
    _, (job,) = jobs_of(Request(recipe=path, stages=(last,), sweep="stage.learning_rate=1e-3,1e-4"))
    swept = load(path, [item[2:] for item in job.tasks[1].arguments[4:]], last)
    before, after = for_stage(load(path), last), for_stage(swept, last)
    assert after.stages[last].start_from == str(before.stage_folder(before.stages[last].start_from))
    assert (after.student, after.teachers) == (before.student, before.teachers)


def test_jobs_of__resumes(recipe):
    _, jobs = jobs_of(Request(recipe=recipe, resume=True))
    assert [job.tasks[0].arguments[-1] == "--resume" for job in jobs] == [True] * 3 + [False] * 2


def test_take_over__is_for_stages_and_named_once(recipe):
    _, jobs = jobs_of(Request(recipe=recipe, take_over=True))
    again = to_resume(jobs, set(), take_over=True)
    assert [job.tasks[0].arguments[-2:] for job in again[:3]] == [("--take-over", "--resume")] * 3
    assert not any("--take-over" in job.tasks[0].arguments for job in again[3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("stage4",)}, "has no stage4"),
        ({"overrides": ("sead=3",)}, "unknown field 'sead' (did you mean 'seed'?)"),
        ({"overrides": ("stage.stepz=3",)}, "did you mean 'steps'?"),
        ({"sweep": "stage.steps"}, "write it as FIELD=VALUE,VALUE"),
        ({"sweep": "stage.steps=,"}, "write it as FIELD=VALUE,VALUE"),
        ({"sweep": "stage.steps=5,5"}, "--sweep: 5 is named twice"),
        ({"sweep": "stage.stepz=5"}, "did you mean 'steps'?"),
        ({"sweep": "seed=1,2", "upsamplers": ("tile",)}, "are two sweeps"),
        ({"upsamplers": ("tile", "tile")}, "--upsamplers: tile is named twice"),
        ({"upsamplers": ("tile", "s2")}, "no partition of stage3 upsamples a teacher"),
        ({"upsamplers": ("tile",), "stages": ("stage1",)}, "a sweep of stage3, but stage1"),
        ({"recipe": "demoo"}, "unknown recipe 'demoo' (did you mean 'demo'?)"),
    ],
)
def test_jobs_of__bad_input_is_one_line(recipe, changes, message):
    with pytest.raises(ConfigError) as caught:
        jobs_of(Request(**{"recipe": recipe, **changes}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jobs_of__trust_reaches_every_job(recipe):
    _, jobs = jobs_of(Request(recipe=recipe, trust=True))
    assert len(jobs) == 5
    for job in jobs:
        assert all(task.arguments[-1] == "--trust-checkpoint" for task in job.tasks)
    _, jobs = jobs_of(Request(recipe=recipe))
    assert not any("--trust-checkpoint" in job.tasks[0].arguments for job in jobs)


def test_to_resume__only_what_is_not_complete(recipe):
    _, jobs = jobs_of(Request(recipe=recipe))
    numbered = []
    for number, job in enumerate(jobs, 41):
        task = job.tasks[0].__class__(**{**vars(job.tasks[0]), "job_id": str(number)})
        numbered.append(job.__class__(**{**vars(job), "tasks": (task,)}))
    again = to_resume(to_resume(numbered, {"41"}), {"41"})
    assert [job.tasks[0].job_id for job in again] == ["41", "", "", "", ""]
    assert again[0] == numbered[0]
    assert again[1].tasks[0].arguments == (*numbered[1].tasks[0].arguments, "--resume")
    assert again[3].tasks[0].arguments == numbered[3].tasks[0].arguments
