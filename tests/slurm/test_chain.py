"""A chain is remembered whole, in a folder that is its user's alone."""

import stat

import pytest

from radio_distill.errors import ConfigError
from slurm.chain import Chain, Link, Task, find_chain, private_folder, read_chain, write_chain
from slurm.cluster import Cluster


@pytest.fixture
def chain() -> Chain:
    tasks = tuple(Task(label=name, arguments=("--x", name), job_id="") for name in "ab")
    return Chain(
        links=(
            Link(name="stage1", target="s:main", tasks=(Task(job_id="41", stage_folder="/r/s"),)),
            Link(name="stage3", target="s:main", tasks=tasks),
            Link(name="eval", target="e:main", tasks=(Task(),), is_stage=False),
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
    with pytest.raises(ConfigError, match="choose another --folder"):
        private_folder(tmp_path / "file" / "a")


def test_task__also_before_its_id_is_noted(chain):
    assert chain.task("stage1", "41").stage_folder == "/r/s"
    assert chain.task("stage3", "42_1").label == "b"
    assert chain.task("eval", "43") == Task()


def test_task__one_of_a_smaller_array_after_a_resume(chain):
    tasks = (Task(label="a", job_id="42_0"), Task(label="b"), Task(label="c"))
    changed = chain.with_link(Link(name="stage3", target="s:main", tasks=tasks))
    assert changed.task("stage3", "50_1").label == "c"
    assert changed.task("stage3", "42_0").label == "a"
    assert changed.links[1].job_ids == ["42", ""]


def test_cluster__what_is_no_stage_is_one_process(chain):
    stage, _, evaluation = (link.cluster(chain.cluster) for link in chain.links)
    assert stage == chain.cluster
    assert (evaluation.nodes, evaluation.processes_per_node, evaluation.launcher) == (1, 1, "srun")
    assert evaluation.setup == chain.cluster.setup
    assert chain.links[2].cluster(Cluster(gpus_per_node=0)).gpus_per_node == 0
