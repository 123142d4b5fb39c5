"""A folder is refused while its owner lives, of many starts one wins; a status reads back."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from radio_distill.errors import ConfigError, TakenOverError
from radio_distill.train import run_dir
from radio_distill.train.run_dir import (
    OWNER,
    STATUS,
    RunLock,
    Status,
    read_status,
    refuse_living,
    was_requeued,
    write_status,
)

CHECKOUT = Path(__file__).resolve().parents[3]
CLAIM = """
import sys, time
from pathlib import Path
from radio_distill.train.run_dir import RunLock
RunLock.take(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder: Path, **values: object) -> None:
    """Change what a claim says of its process."""
    for path in (folder / OWNER, *folder.glob(".owner-*")):
        claim = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps(claim), encoding="utf-8")


def test_take__is_refused_while_the_owner_lives_and_changes_nothing(tmp_path, other):
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {other.pid} .*--take-over") as it:
        RunLock.take(tmp_path)
    assert "\n" not in str(it.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("reaped", [True, False])
def test_take__a_killed_process_owns_nothing(tmp_path, other, reaped):
    other.kill()
    if reaped:
        other.wait()
    else:  # a zombie, whose parent has not asked for it yet
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    mine = RunLock.take(tmp_path)
    mine.check()
    mine.release()


def test_take__another_process_of_the_same_number_is_not_the_owner(tmp_path, other):
    rewrite(tmp_path, started="1")
    RunLock.take(tmp_path).release()


def test_take_over__of_a_living_one_which_finds_out(tmp_path):
    first = RunLock.take(tmp_path)
    second = RunLock.take(tmp_path, take_over=True)
    second.check()
    with pytest.raises(TakenOverError, match=f"process {os.getpid()}"):
        first.check()
    first.release()
    second.check()
    with pytest.raises(ConfigError, match="going on"):
        RunLock.take(tmp_path)
    second.release()


def test_release__the_folder_is_free_at_once(tmp_path):
    RunLock.take(tmp_path).release()
    again = RunLock.take(tmp_path)
    again.check()
    again.release()
    again.release()
    assert {path.name for path in tmp_path.iterdir()} == {OWNER}


def test_take__of_many_at_one_moment_exactly_one_wins(tmp_path):
    barrier, won, refused = threading.Barrier(8), [], []

    def start() -> None:
        barrier.wait()
        try:
            won.append(RunLock.take(tmp_path))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].check()
    won[0].release()


def test_ownership__a_claim_that_was_made_by_another_cannot_be_made_again(tmp_path):
    first = RunLock(tmp_path, 4)
    with pytest.raises(FileExistsError):
        RunLock(tmp_path, 4)
    first.release()
    with pytest.raises(FileExistsError, match="process"):
        RunLock(tmp_path, 3)  # of one that looked long ago
    first.check()
    assert {path.name for path in tmp_path.iterdir()} == {OWNER}


def test_take__a_copy_of_a_living_runs_folder_is_free(tmp_path):
    original, copy = tmp_path / "run", tmp_path / "copy"
    original.mkdir()
    mine = RunLock.take(original)
    shutil.copytree(original, copy)
    RunLock.take(copy).release()
    mine.check()
    mine.release()


@pytest.mark.parametrize("damage", ["owner gone", "owner cut", "claim empty"])
def test_take__after_a_start_that_was_killed_in_its_claim(tmp_path, other, damage):
    other.kill()
    other.wait()
    (claim,) = tmp_path.glob(".owner-*")
    if damage == "owner gone":
        (tmp_path / OWNER).unlink()
    elif damage == "owner cut":
        (tmp_path / OWNER).write_text("{")
    else:
        claim.write_text("")
        os.utime(claim, (0, 0))
    mine = RunLock.take(tmp_path)
    assert mine.claim.number == 2
    mine.check()
    mine.release()


class TestAnotherMachine:
    """Its process numbers mean nothing here: the file that its owner touches is watched."""

    @pytest.fixture(autouse=True)
    def _away(self, tmp_path, other, monkeypatch):
        monkeypatch.setattr(run_dir, "SILENCE", 1.5)
        monkeypatch.setattr(run_dir, "BEAT", 0.5)
        other.kill()  # what touches the file is each test
        other.wait()
        rewrite(tmp_path, machine="another", host="node7")

    def touching(self, folder: Path) -> Callable[[], None]:
        (claim,) = folder.glob(".owner-*")
        ended = threading.Event()

        def touch() -> None:
            while not ended.wait(0.2):
                os.utime(claim)

        thread = threading.Thread(target=touch)
        thread.start()
        return lambda: (ended.set(), thread.join())[0]

    def test_take__is_refused_while_the_file_is_touched(self, tmp_path):
        end = self.touching(tmp_path)
        try:
            with pytest.raises(ConfigError, match=r"process \d+ on node7"):
                RunLock.take(tmp_path)
        finally:
            end()

    def test_take__one_that_was_silent_for_long_is_dead(self, tmp_path):
        (claim,) = tmp_path.glob(".owner-*")
        os.utime(claim, (time.time() - 100, time.time() - 100))
        RunLock.take(tmp_path).release()

    def test_take__one_that_died_a_moment_ago_is_waited_for(self, tmp_path, caplog):
        caplog.set_level("INFO")
        (claim,) = tmp_path.glob(".owner-*")
        os.utime(claim)
        RunLock.take(tmp_path).release()
        assert "process" in caplog.text

    def test_take__one_that_ended_by_itself_is_not_waited_for(self, tmp_path, caplog):
        (claim,) = tmp_path.glob(".owner-*")
        claim.unlink()
        caplog.set_level("INFO")
        RunLock.take(tmp_path).release()
        assert not caplog.text


@pytest.mark.parametrize(
    ("job", "restart", "is_requeued"),
    [("41", "1", True), ("41", "0", False), ("42", "1", False), ("", "0", False)],
)
def test_requeued__slurm_has_given_the_start_before_up(
    tmp_path, monkeypatch, job, restart, is_requeued
):
    """On a node that lost its network the old process lives; a second one in one allocation is not
    meant."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    first = RunLock.take(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    assert was_requeued(tmp_path) == is_requeued
    if is_requeued:
        refuse_living(tmp_path)
        second = RunLock.take(tmp_path)
        with pytest.raises(TakenOverError):
            first.check()
        second.release()
    else:
        with pytest.raises(ConfigError, match="Slurm job 41"):
            refuse_living(tmp_path)
    first.release()


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
    first = RunLock(tmp_path)
    first.check()
    second = RunLock(tmp_path)
    second.check()
    with pytest.raises(TakenOverError, match="process") as caught:
        first.check()
    assert caught.value.exit_status == 76


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_ownership__a_file_that_cannot_be_read_is_no_other_owner(tmp_path, damage):
    owner = RunLock(tmp_path)
    if damage == "gone":
        (tmp_path / OWNER).unlink()
    else:
        (tmp_path / OWNER).write_text("{")
    owner.check()


def test_take__a_folder_that_cannot_be_written_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "owner.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write to .*--output"):
        RunLock.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]
