"""What Slurm prints is understood, and what fails is one line."""

import pytest

from slurm import scontrol
from slurm.scontrol import SlurmError

JOB = (
    "JobId=43 ArrayJobId=41 ArrayTaskId=2 JobName=my job UserId=me(1) JobState=PENDING "
    "Reason=Resources Dependency=(null) Requeue=1 Restarts=2 Partition=low "
    "ReqB:S:C:T=0:0:*:* Socks/Node=* NumNodes=1-1 ExcNodeList=n[1-2] Command=(null) \n"
)


def test_show_job__fields_of_every_task(login_node):
    (login_node / "job-41").write_text(JOB + JOB.replace("ArrayTaskId=2", "ArrayTaskId=3-4%1"))
    first, second = scontrol.show_job("41")
    assert first["JobId"] == "43"
    assert first["JobName"] == "my job"
    assert (first["Reason"], first["Restarts"], first["ExcNodeList"]) == (
        "Resources",
        "2",
        "n[1-2]",
    )
    assert second["ArrayTaskId"] == "3-4%1"


def test_show_job__nothing_of_a_job_that_slurm_has_forgotten(login_node):
    assert scontrol.show_job("7") == []


def test_run__fails_in_one_line(login_node):
    (login_node / "scontrol").write_text("#!/bin/sh\necho 'a\n  b' >&2\nexit 1\n")
    with pytest.raises(SlurmError, match=r"`scontrol requeue 41`.*a b"):
        scontrol.requeue("41")


def test_run__a_command_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="scontrol"):
        scontrol.show_job("41")
    assert scontrol.accounted_state("41") == ""


def test_run__a_controller_that_does_not_answer(login_node, monkeypatch):
    (login_node / "scontrol").write_text("#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(scontrol, "_SECONDS", 0.2)
    with pytest.raises(SlurmError, match="answer"):
        scontrol.show_job("41")


def test_accounted_state__first_word(login_node):
    (login_node / "sacct").write_text("#!/bin/sh\necho 'CANCELLED by 1000'\n")
    (login_node / "sacct").chmod(0o700)
    assert scontrol.accounted_state("41") == "CANCELLED"


def test_nodes_of__those_that_run_jobs_and_those_that_cannot(login_node):
    lines = (
        "a idle\nb mixed\nc allocated\nd idle~\ne down\nf drained\ng idle*\nh draining\ni planned\n"
    )
    (login_node / "nodes").write_text(lines)
    usable, dead = scontrol.nodes_of("low")
    assert usable == set("abcdi")
    assert dead == set("efgh")


def test_hostnames__nothing_excluded(login_node):
    assert scontrol.hostnames("(null)") == []
    assert scontrol.hostnames("n1,n2") == ["n1", "n2"]
