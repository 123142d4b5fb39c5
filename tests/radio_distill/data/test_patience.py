import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from radio_distill.data.patience import (
    MAX_ABANDONED,
    DiskStalledError,
    NoAnswerError,
    ReadTimeout,
    open_regular,
)


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


def wait_until(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_run__gives_what_the_call_gives():
    patience = ReadTimeout(10)
    assert patience.run(divmod, 17, 5) == (3, 2)
    with pytest.raises(ZeroDivisionError):
        patience.run(divmod, 17, 0)
    assert patience.run(divmod, 17, 4) == (4, 1)


def test_run__calls_share_one_thread_which_ends_with_its_owner(num_threads):
    patience = ReadTimeout(10)
    assert len({patience.run(threading.get_ident) for _ in range(20)}) == 1
    assert num_threads() == 1
    del patience
    assert wait_until(lambda: num_threads() == 0)


def test_run__leaves_a_call_without_answer_behind(pipe, num_threads):
    patience = ReadTimeout(0.4)
    with pytest.raises(NoAnswerError, match=r"no answer within 0\.4 s"):
        patience.run(os.read, pipe[0], 9)
    assert patience.run(len, "abc") == 3, "the answer is that of its own call"
    os.write(pipe[1], b"too late")
    assert wait_until(lambda: num_threads() == 1), "who comes back late, ends"
    assert patience.run(len, "ab") == 2


def test_run__ends_when_too_many_are_out(pipe):
    patience = ReadTimeout(0.02)
    for _ in range(MAX_ABANDONED - 1):
        with pytest.raises(NoAnswerError):
            patience.run(os.read, pipe[0], 1)
    with pytest.raises(DiskStalledError, match=r"the disk does not answer: 8 reads") as error:
        patience.run(os.read, pipe[0], 1)
    assert error.value.exit_status not in (0, 2), "starting again is worth it"
    os.write(pipe[1], bytes(MAX_ABANDONED))


def test_run__disk_that_answers_again_is_forgiven(pipe, num_threads):
    patience = ReadTimeout(0.02)
    for _ in range(2 * MAX_ABANDONED):
        with pytest.raises(NoAnswerError):
            patience.run(os.read, pipe[0], 1)
        os.write(pipe[1], b"x")
        assert wait_until(lambda: num_threads() == 0)


def test_run__works_after_a_fork_and_after_pickling(pipe):
    patience = ReadTimeout(0.4)
    with pytest.raises(NoAnswerError):
        patience.run(os.read, pipe[0], 1)
    patience.run(len, "")
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: os._exit(patience.run(len, "abcde")))
    child.start()
    child.join(30)
    assert child.exitcode == 5
    assert pickle.loads(pickle.dumps(patience)).run(len, "abc") == 3
    os.write(pipe[1], b"x")


def test_run__interrupted_call_gives_its_answer_to_nobody():
    patience = ReadTimeout(10)
    patience.run(len, "")

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            patience.run(time.sleep, 0.2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert patience.run(len, "abc") == 3


def test_run__program_ends_with_a_call_still_out():
    program = """
import os
from radio_distill.data.patience import NoAnswerError, ReadTimeout
ends = os.pipe()
try:
    ReadTimeout(0.4).run(os.pread, os.open("/dev/null", os.O_RDONLY), 1, 0)
    ReadTimeout(0.4).run(os.read, ends[0], 1)
except NoAnswerError:
    raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


def test_open_regular__refuses_what_could_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(OSError, match=r"not a regular file|No such file"):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "file").write_bytes(b"abc")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"
