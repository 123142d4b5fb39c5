"""Cluster settings come from a file and from flags, and are wrong in one line."""

import argparse
from pathlib import Path

import pytest

from radio_distill.errors import ConfigError
from slurm.cluster import Cluster, add_cluster_flags, cluster_from, load_cluster

EXAMPLES = Path(__file__).resolve().parents[2] / "slurm" / "clusters"


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_cluster_flags(parser)
    return parser.parse_args(flags)


def write(folder, text):
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_cluster__reads_every_kind_of_field(tmp_path):
    path = write(
        tmp_path,
        "partition: gpu\nnodes: 4\ngpus_per_node: 8\nsetup: [module load a, export B=1]\n"
        "sbatch: {reservation: x, exclusive: true}\n",
    )
    cluster = load_cluster(path)
    assert cluster.partition == "gpu"
    assert (cluster.nodes, cluster.tasks_per_node) == (4, 8)
    assert cluster.setup == ("module load a", "export B=1")
    assert cluster.sbatch == {"reservation": "x", "exclusive": True}


def test_load_cluster__defaults_without_a_file():
    assert load_cluster() == Cluster()


def test_tasks_per_node__is_one_without_gpus():
    assert load_cluster(flags={"gpus_per_node": 0}).tasks_per_node == 1


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_tasks_per_node__a_launcher_is_one_task(launcher):
    cluster = load_cluster(flags={"gpus_per_node": 8, "launcher": launcher})
    assert (cluster.tasks_per_node, cluster.processes_per_node) == (1, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu", "unknown field 'cluster.partion' (did you mean 'partition'?)"),
        ("nodes: many", "cluster.nodes: 'many' is not a whole number"),
        ("nodes: 0", "cluster.nodes: 0 is below 1"),
        ("gpus_per_node: -1", "cluster.gpus_per_node: -1 is below 0"),
        ("launcher: mpirun", "cluster.launcher: 'mpirun' is not one of srun, torchrun, accelerate"),
        ("master_port: 70000", "cluster.master_port: 70000 is not 0 to 65,535"),
        ("max_retries: -1", "cluster.max_retries: -1 is below 0"),
        ("max_running: 0", "cluster.max_running: 0 is below 1"),
        ("exclude_crashed: 3", "cluster.exclude_crashed: 3 is not true or false"),
        ("container_mounts: [a]", "container_mounts is set without cluster.container_image"),
        ("environment: {A-B: c}", "cluster.environment: 'A-B' is no name of a variable"),
        ("environment: {HF_TOKEN: hf_aaaaaaaaaaaaaaaaaaaaaaaa}", "HF_TOKEN looks like a secret"),
        ("environment: [A]", "cluster.environment: expected a mapping"),
        ("time_minutes: 5", "cluster.signal_delay_s: 300 s is not below the time limit"),
        ("nodes: [", "is not valid YAML"),
        ("- a\n- b", "mapping"),
    ],
)
def test_load_cluster__bad_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_cluster__missing_file_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_cluster(tmp_path / "none.yaml")


def test_cluster_from__flags_win_over_the_file(tmp_path):
    path = write(tmp_path, "partition: slow\nnodes: 2\naccount: mine\n")
    flags = parse(
        *("--partition", "fast", "--gpus-per-node", "8", "--time", "60"),
        *("--setup", "module load a,b", "--setup", "export C=1"),
        *("--sbatch", "reservation=x=y", "--sbatch", "exclusive"),
    )
    cluster = cluster_from(flags, path)
    assert (cluster.partition, cluster.account, cluster.nodes) == ("fast", "mine", 2)
    assert (cluster.gpus_per_node, cluster.time_minutes) == (8, 60)
    assert cluster.setup == ("module load a,b", "export C=1")
    assert cluster.sbatch == {"reservation": "x=y", "exclusive": True}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("240", 240),
        ("4:30", 5),
        ("4:00:00", 240),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("2-00:00:01", 48 * 60 + 1),
    ],
)
def test_minutes_of__every_form_of_sbatch(text, minutes):
    assert (
        cluster_from(parse("--time", text, "--signal-delay-s", "60"), None).time_minutes == minutes
    )


def test_minutes_of__something_else(capsys):
    with pytest.raises(SystemExit):
        parse("--time", "4h")
    assert "'4h' is no time" in capsys.readouterr().err


def test_cluster_from__every_kind_of_flag():
    flags = parse("--environment", "A=b=c", "--no-exclude-crashed", "--launcher", "torchrun")
    cluster = cluster_from(flags, None)
    assert cluster.environment == {"A": "b=c"}
    assert cluster.exclude_crashed is False
    assert cluster.launcher == "torchrun"


def test_cluster_from__flags_win_over_the_file_and_that_over_the_settings_of_before(tmp_path):
    path = write(tmp_path, "nodes: 2\nqos: file\n")
    before = {"nodes": 1, "qos": "before", "account": "before"}
    cluster = cluster_from(parse("--nodes", "3"), path, before)
    assert (cluster.nodes, cluster.qos, cluster.account) == (3, "file", "before")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_load_cluster__examples_are_valid_and_say_what_they_are_for(path):
    cluster = load_cluster(path)
    assert cluster.partition
    assert cluster.signal_delay_s >= 60
    assert path.read_text().startswith("# ")


def test_cluster_from__no_flag_leaves_the_file_alone(tmp_path):
    path = write(tmp_path, "nodes: 3\n")
    assert cluster_from(parse(), path) == load_cluster(path)


def test_add_cluster_flags__every_field_has_a_flag_with_its_help():
    parser = argparse.ArgumentParser()
    add_cluster_flags(parser)
    text = parser.format_help()
    for name in Cluster.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "[cores]" in text
