"""A chain runs in order, stops at a failure, and is what ``--dry-run`` said."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from radio_distill.errors import ConfigError, RadioDistillError
from slurm.chain import Chain, Link, Task, read_chain
from slurm.cluster import Cluster
from slurm.job import Job
from slurm.links import Request, links_of
from slurm.submit import run_here, scripts, submit

STAGES = ["stage1", "stage2", "stage3"]


def recording(folder: Path, *functions: str, **settings) -> Chain:
    links = tuple(
        Link(
            name=stage,
            target=f"recording_stage:{function}",
            tasks=(Task(arguments=(str(folder), stage)),),
        )
        for stage, function in zip(STAGES, functions, strict=True)
    )
    return Chain(links=links, cluster=Cluster(**{"gpus_per_node": 0, **settings}))


@pytest.fixture
def chain(recipe) -> Chain:
    _, links = links_of(Request(recipe=recipe))
    cluster = Cluster(nodes=2, gpus_per_node=8, setup=("module load cuda",), sbatch={"wckey": "a"})
    return Chain(links=links, cluster=cluster)


def test_run_here__stages_run_one_after_another(tmp_path, recorded, capsys):
    ids = run_here(tmp_path / "jobs", recording(tmp_path, "main", "main", "main"), "debug")
    calls = recorded()
    assert [call["arguments"][0] for call in calls] == STAGES
    assert [call["RANK"] for call in calls] == ["0"] * 3
    assert len(set(ids)) == 3
    assert capsys.readouterr().out.count("debug executor: waiting for") == 3


def test_run_here__nothing_starts_after_a_failure(tmp_path, recorded):
    chain = recording(tmp_path, "main", "failing", "main")
    with pytest.raises(RadioDistillError, match=r"stage2 \(job .*_log\.err") as caught:
        run_here(tmp_path / "jobs", chain, "local")
    assert "\n" not in str(caught.value)
    assert [call["arguments"][0] for call in recorded()] == ["stage1", "stage2"]


def test_run_here__two_nodes_are_too_many_for_one_machine(tmp_path):
    chain = recording(tmp_path, *["main"] * 3, nodes=2)
    with pytest.raises(ConfigError, match=r"stage1 could not be submitted: .*nodes=1"):
        run_here(tmp_path / "jobs", chain, "local")


def test_submit__jobs_depend_on_each_other(tmp_path, chain, login_node):
    folder = tmp_path / "jobs"
    submitted = submit(folder, chain)
    assert [link.job_ids for link in submitted.links] == [["41"], ["42"], ["43"], ["44"], ["45"]]
    assert read_chain(folder) == submitted
    texts = [(login_node / f"{number}.sh").read_text() for number in range(41, 46)]
    assert "--dependency" not in texts[0]
    for number, text in enumerate(texts[1:], 41):
        assert f"#SBATCH --dependency=afterok:{number}\n" in text
    pickled = DelayedSubmission.load(folder / "42_submitted.pkl").function
    arguments = chain.links[1].tasks[0].arguments
    assert pickled == Job(
        target="stages.stage2:main",
        arguments=arguments,
        name="stage2",
        folder=str(folder),
        processes_per_node=8,
    )
    assert DelayedSubmission.load(folder / "44_submitted.pkl").function.resumes is False


def test_submit__its_scripts_are_those_of_the_dry_run(tmp_path, chain, login_node):
    planned = scripts(tmp_path / "jobs", chain)
    submit(tmp_path / "jobs", chain)
    for number, text in zip(range(41, 46), planned, strict=True):
        script = text.split("\n", 1)[1]
        for index, name in enumerate(["STAGE1", "STAGE2", "STAGE3", "EXPORT"], 41):
            script = script.replace(f"{name}_JOB_ID", str(index))
        assert (login_node / f"{number}.sh").read_text() == script


def test_submit__a_sweep_is_one_array(tmp_path, recipe, login_node):
    _, links = links_of(Request(recipe=recipe, stages=("stage3",), sweep="seed=1,2,3"))
    chain = Chain(links=links, cluster=Cluster(max_running=2))
    (link,) = submit(tmp_path / "jobs", chain).links
    assert [task.job_id for task in link.tasks] == ["41_0", "41_1", "41_2"]
    text = (login_node / "41.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in text
    (planned,) = scripts(tmp_path / "jobs", chain)
    assert planned.endswith(text)
    assert [line.split(":")[0] for line in planned.splitlines()[:3]] == [
        "# ---- stage3 seed-1",
        "# ---- stage3 seed-2",
        "# ---- stage3 seed-3",
    ]
    pickled = DelayedSubmission.load(tmp_path / "jobs" / "41_2_submitted.pkl").function
    assert "--seed=3" in pickled.arguments


def test_submit__only_what_has_no_id(tmp_path, chain, login_node):
    first, *others = chain.links
    known = replace(first, tasks=(replace(first.tasks[0], job_id="7"),))
    submitted = submit(tmp_path / "jobs", replace(chain, links=(known, *others)))
    assert [link.job_ids for link in submitted.links] == [["7"], ["41"], ["42"], ["43"], ["44"]]
    assert "--dependency" not in (login_node / "41.sh").read_text()


def test_submit__a_refusal_names_what_was_submitted(tmp_path, chain, login_node):
    (login_node / "full").touch()
    with pytest.raises(ConfigError) as caught:
        submit(tmp_path / "jobs", chain)
    assert "stage2 could not be submitted" in str(caught.value)
    assert "queue is full" in str(caught.value)
    assert str(caught.value).endswith("already submitted: 41")
    assert "\n" not in str(caught.value)
    assert read_chain(tmp_path / "jobs").links[0].job_ids == ["41"]


def test_submit__without_sbatch_is_one_line(tmp_path, chain, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the path"):
        submit(tmp_path / "jobs", chain)
    assert not (tmp_path / "jobs").exists()
