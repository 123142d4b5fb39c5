import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from radio_distill.data import tar_reader as reader_module
from radio_distill.data.images import BadImageError
from radio_distill.data.read_timeout import (
    MAX_STALLED,
    DiskStalledError,
    NoAnswerError,
    ReadTimeout,
)
from radio_distill.data.tar_index import index_path, open_shards
from radio_distill.data.tar_reader import ShardReader


@pytest.fixture
def shards(shard_folder):
    return open_shards(sorted(shard_folder.glob("*.tar")))


@pytest.fixture
def wedge(monkeypatch):
    """Makes reads block inside the kernel, until released; returns the blocked descriptors."""
    ends, blocked, real = os.pipe(), [], os.pread

    def pread(descriptor, size, offset):
        if pread.wedged:
            blocked.append(descriptor)
            os.read(ends[0], 1)
        return real(descriptor, size, offset)

    pread.wedged = False
    monkeypatch.setattr(reader_module.os, "pread", pread)

    def set_wedged(wedged: bool) -> list[int]:
        pread.wedged = wedged
        return blocked

    yield set_wedged
    os.write(ends[1], bytes(100))


@pytest.fixture
def open_files(shard_folder):
    """Count the open files in the folder of the shards."""

    def count() -> int:
        names = []
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # that of the listing itself
                names.append(os.readlink(link))
        return sum(name.startswith(f"{shard_folder}/") for name in names)

    return count


def wait_until(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_image_bytes__are_the_original_ones(shards, encode, open_files):
    reader = ShardReader(shards, max_open=2)
    for shard in (0, 4, 2, 0, 3, 4):
        sample = reader.sample(shard, 1)
        assert reader.key(shard, sample) == f"part-{shard}.tar:s{shard}_1.png"
        assert reader.key(shard, 1) == f"part-{shard}.tar:#1"
        assert reader.image_bytes(shard, sample) == encode(10 * shard + 1)
        assert open_files() <= 2
    del reader
    assert open_files() == 0


def test_image_bytes__survive_pickling(shards, encode):
    reader = ShardReader(shards)
    reader.sample(0, 0)
    copy = pickle.loads(pickle.dumps(reader))
    del reader
    assert copy.image_bytes(0, copy.sample(0, 2)) == encode(2)


def test_image_bytes__flipped_bit_is_a_bad_image(shards):
    sample = ShardReader(shards).sample(1, 0)
    raw = bytearray(shards[1].path.read_bytes())
    raw[sample.members["png"].offset + 50] ^= 4
    shards[1].path.write_bytes(raw)
    reader = ShardReader(shards)
    with pytest.raises(BadImageError, match="content differs") as error:
        reader.image_bytes(1, sample)
    assert error.value.kind == "checksum"
    assert reader.image_bytes(1, reader.sample(1, 1))


def assert_unreadable(action, reason):
    with pytest.raises(BadImageError, match=reason) as error:
        action()
    assert error.value.kind == "unreadable"
    assert "\n" not in str(error.value)


def test_sample__shard_that_vanished_or_changed(shards):
    reader = ShardReader(shards)
    shards[0].path.unlink()
    assert_unreadable(lambda: reader.sample(0, 0), r"part-0\.tar: No such file")
    shards[1].path.write_bytes(shards[1].path.read_bytes()[:1000])
    assert_unreadable(lambda: reader.sample(1, 0), r"part-1\.tar: changed during the run")
    index_path(shards[2].path).unlink()
    assert_unreadable(lambda: reader.sample(2, 0), r"part-2\.tar: No such file")
    index_path(shards[3].path).write_bytes(b"junk\n" * 7)
    assert_unreadable(lambda: reader.sample(3, 0), r"part-3.*damaged; delete it")
    assert reader.sample(4, 0)


def test_image_bytes__shard_that_is_cut_while_it_is_open(shards):
    reader = ShardReader(shards)
    sample = reader.sample(2, 4)
    os.truncate(shards[2].path, 3000)
    assert_unreadable(lambda: reader.image_bytes(2, sample), "changed during the run")
    assert_unreadable(lambda: reader.sample(2, 0), "changed during the run")


def test_sample__failures_leave_no_file_open(shards, open_files):
    reader = ShardReader(shards)
    os.truncate(shards[2].path, 3000)
    gc.disable()  # nothing waits for the collector of cycles
    try:
        for _ in range(5):
            with suppress(BadImageError):
                reader.sample(2, 0)
        assert open_files() == 0
    finally:
        gc.enable()


def test_image_bytes__shard_that_is_replaced_while_it_is_open(shards, encode, tmp_path):
    reader = ShardReader(shards)
    sample = reader.sample(0, 1)
    copy = shutil.copy(shards[0].path, tmp_path / "copy")
    os.replace(copy, shards[0].path)
    assert reader.image_bytes(0, sample) == encode(1)


def test_image_bytes__error_that_passes_is_no_error(shards, encode, monkeypatch):
    """As after a failover: the old handle is stale, and a new one works."""
    reader = ShardReader(shards)
    sample = reader.sample(0, 1)
    stale = reader._open[0].file.fileno()
    real = os.pread

    def pread(descriptor, size, offset):
        if descriptor == stale and not pread.failed:
            pread.failed = True
            raise OSError(116, os.strerror(116))
        return real(descriptor, size, offset)

    pread.failed = False
    monkeypatch.setattr(reader_module.os, "pread", pread)
    assert reader.image_bytes(0, sample) == encode(1)
    assert pread.failed


def test_image_bytes__disk_error_is_a_bad_image(shards, monkeypatch):
    def pread(descriptor, size, offset):
        raise OSError(5, os.strerror(5))

    reader = ShardReader(shards)
    sample = reader.sample(0, 1)
    monkeypatch.setattr(reader_module.os, "pread", pread)
    assert_unreadable(lambda: reader.image_bytes(0, sample), "Input/output error")


def test_image_bytes__read_that_stalls_is_a_bad_image(shards, encode, wedge):
    reader = ShardReader(shards, timeout=0.4)
    sample = reader.sample(0, 1)
    blocked = wedge(True)
    with pytest.raises(BadImageError, match=r"part-0\.tar: .*0\.4 s") as error:
        reader.image_bytes(0, sample)
    assert error.value.kind == "stalled"
    wedge(False)
    assert reader.image_bytes(0, sample) == encode(1)
    assert reader._open[0].file.fileno() not in blocked, "the file is opened anew"
    os.fstat(blocked[0])  # and the descriptor stays as it is, under the read


def test_image_bytes__descriptor_of_a_stalled_read_is_closed_when_it_comes_back(
    shards, monkeypatch, open_files
):
    ends, real = os.pipe(), os.pread

    def pread(descriptor, size, offset):
        os.read(ends[0], 1)
        return real(descriptor, size, offset)

    reader = ShardReader(shards, timeout=0.4)
    sample = reader.sample(0, 1)
    monkeypatch.setattr(reader_module.os, "pread", pread)
    with pytest.raises(BadImageError):
        reader.image_bytes(0, sample)
    assert open_files() == 1
    os.write(ends[1], b"x")
    assert wait_until(lambda: open_files() == 0)
    for end in ends:
        os.close(end)


@pytest.fixture
def pipe():
    """Both ends of a pipe without content: a read from it blocks inside the kernel."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def num_threads():
    """Count the threads that the test has started and that have not ended."""
    before = set(threading.enumerate())
    return lambda: len(set(threading.enumerate()) - before)


def stall(timeout: ReadTimeout, pipe) -> None:
    with pytest.raises(NoAnswerError):
        timeout.run(os.read, pipe[0], 1)


def test_read_timeout__gives_what_the_call_gives(num_threads):
    timeout = ReadTimeout(10)
    assert timeout.run(divmod, 17, 5) == (3, 2)
    with pytest.raises(ZeroDivisionError):
        timeout.run(divmod, 17, 0)
    assert len({timeout.run(threading.get_ident) for _ in range(20)}) == num_threads() == 1
    del timeout
    assert wait_until(lambda: num_threads() == 0), "it ends with its owner"


def test_read_timeout__leaves_a_call_without_answer_behind(pipe, num_threads):
    timeout = ReadTimeout(0.4)
    stall(timeout, pipe)
    assert timeout.run(len, "abc") == 3, "the answer is that of its own call"
    os.write(pipe[1], b"too late")
    assert wait_until(lambda: num_threads() == 1), "who comes back late, ends"
    assert timeout.run(len, "ab") == 2


def test_read_timeout__ends_when_too_many_are_out(pipe):
    timeout = ReadTimeout(0.02)
    for _ in range(MAX_STALLED - 1):
        stall(timeout, pipe)
    with pytest.raises(DiskStalledError) as error:
        timeout.run(os.read, pipe[0], 1)
    assert error.value.exit_status not in (0, 2), "starting again is worth it"
    os.write(pipe[1], bytes(MAX_STALLED))


def test_read_timeout__disk_that_answers_again_is_forgiven(pipe, num_threads):
    timeout = ReadTimeout(0.02)
    for _ in range(2 * MAX_STALLED):
        stall(timeout, pipe)
        os.write(pipe[1], b"x")
        assert wait_until(lambda: num_threads() == 0)


def test_read_timeout__works_after_a_fork_and_after_pickling(pipe):
    timeout = ReadTimeout(0.4)
    stall(timeout, pipe)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: os._exit(timeout.run(len, "abcde")))
    child.start()
    child.join(30)
    assert child.exitcode == 5
    assert pickle.loads(pickle.dumps(timeout)).run(len, "abc") == 3
    os.write(pipe[1], b"x")


def test_read_timeout__interrupted_call_gives_its_answer_to_nobody():
    timeout = ReadTimeout(10)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            timeout.run(time.sleep, 0.2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert timeout.run(len, "abc") == 3


def test_read_timeout__program_ends_with_a_call_still_out():
    program = """
import os
from radio_distill.data.read_timeout import NoAnswerError, ReadTimeout
try:
    ReadTimeout(0.4).run(os.read, os.pipe()[0], 1)
except NoAnswerError:
    raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7
