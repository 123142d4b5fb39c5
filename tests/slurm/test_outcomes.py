"""A process's outcome survives what may happen around it, and belongs to one start of one job."""

from slurm import outcomes
from slurm.outcomes import Place

PLACE = Place(job="41_2", restart=3, host="n1")


def test_place__of_a_task_of_an_array_that_was_restarted():
    environment = {
        "SLURM_JOB_ID": "43",
        "SLURM_ARRAY_JOB_ID": "41",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "n1",
    }
    assert Place.of(environment) == PLACE
    assert Place.of({"SLURM_JOB_ID": "41"}).job == "41"
    assert Place.of({"SLURM_JOB_ID": "41"}).restart == 0


def test_read__a_start_without_an_end(tmp_path):
    outcomes.begin(tmp_path, PLACE, rank=5)
    (found,) = outcomes.read(tmp_path, PLACE)
    assert (found.rank, found.host, found.status) == (5, "n1", None)
    assert not found.killed


def test_read__the_end_with_its_reason_in_one_line(tmp_path):
    outcome = outcomes.begin(tmp_path, PLACE, rank=0)
    outcomes.end(tmp_path, PLACE, outcome, 75, "saved\n  it", 12)
    (found,) = outcomes.read(tmp_path, PLACE)
    assert (found.status, found.signal, found.reason) == (75, 12, "saved it")
    assert found.ended >= found.started
    assert outcomes.Outcome(rank=0, host="", process=1, started=0, status=-9).killed


def test_read__only_this_start_of_this_job(tmp_path):
    for place in (PLACE, Place(job="41_2", restart=2), Place(job="41", restart=3)):
        outcomes.begin(tmp_path, place, rank=0)
    assert [found.host for found in outcomes.read(tmp_path, PLACE)] == ["n1"]


def test_read__by_rank_and_without_damaged_ones(tmp_path):
    for rank in (10, 2, 1):
        outcomes.begin(tmp_path, PLACE, rank)
    (tmp_path / "outcomes" / "41_2-3-1.json").write_text('{"rank": 1, "ho')
    (tmp_path / "outcomes" / "41_2-3-7.json").write_text("[]")
    assert [found.rank for found in outcomes.read(tmp_path, PLACE)] == [2, 10]
    assert outcomes.read(tmp_path / "none", PLACE) == []


def test_begin__a_folder_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "outcomes").touch()
    outcomes.begin(tmp_path, PLACE, rank=0)
    assert "cannot write" in caplog.text
