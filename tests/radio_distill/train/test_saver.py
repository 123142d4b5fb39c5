"""Writing in the background, and the small files beside a stage's checkpoints."""

import threading
from pathlib import Path

import pytest

from radio_distill.errors import CheckpointError, TakenOverError
from radio_distill.train.ownership import OWNER, Ownership
from radio_distill.train.saver import Saver
from radio_distill.train.status import STATUS, Status, read_status, write_status


def test_saver__writes_while_the_caller_goes_on():
    gate, saver = threading.Event(), Saver(Path("before"))

    def write():
        assert gate.wait(10)
        return Path("after")

    saver.start(write)
    assert saver.newest == Path("before")
    gate.set()
    saver.wait()
    assert saver.newest == Path("after")
    assert saver.error is None


@pytest.mark.parametrize("error", [CheckpointError("the disk is full"), ZeroDivisionError()])
def test_saver__keeps_what_went_wrong(error):
    def write():
        raise error

    saver = Saver(Path("before"))
    saver.start(write)
    saver.wait()
    assert saver.error is error
    assert saver.newest == Path("before")


def test_status__reads_back(tmp_path):
    status = Status(state="running", step=3, steps=9, images_per_second=2.5, reason="é")
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"}', '{"evil": 1}'])
def test_status__none_where_there_is_none(tmp_path, text):
    assert read_status(tmp_path) is None
    (tmp_path / STATUS).write_text(text)
    assert read_status(tmp_path) is None


def test_ownership__the_last_claim_counts(tmp_path):
    first = Ownership(tmp_path)
    first.check()
    second = Ownership(tmp_path)
    second.check()
    with pytest.raises(TakenOverError, match="was taken over by process") as caught:
        first.check()
    assert caught.value.exit_status == 76


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_ownership__a_file_that_cannot_be_read_is_no_other_owner(tmp_path, damage):
    owner = Ownership(tmp_path)
    if damage == "gone":
        (tmp_path / OWNER).unlink()
    else:
        (tmp_path / OWNER).write_text("{")
    owner.check()
