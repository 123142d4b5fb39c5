"""Processes that hang are ended, with their stacks; those that do not are left alone.

Every case is a process of its own, since a hang can only be ended with its process.
"""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from radio_distill.errors import HUNG_STATUS
from radio_distill.train.watchdog import Watchdog, stacks

ROOT = Path(__file__).resolve().parents[3]
BY_FAULTHANDLER = 1
"""Exit status that faulthandler ends a process with; it cannot be chosen."""

HEAD = """
import ctypes, multiprocessing, sys, threading, time
from pathlib import Path
from radio_distill.train.watchdog import Watchdog

def hang_here():
    time.sleep(300)

def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(300)
"""


def run(program: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program that would take 300 s if it were not ended."""
    return subprocess.run(
        [sys.executable, *(command or ("-c", HEAD + textwrap.dedent(program)))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_watchdog__ends_a_process_whose_main_thread_sleeps(tmp_path):
    done = run(f"""
        threading.Thread(target=hang_here, name="reader", daemon=True).start()
        with Watchdog(1.0, 3, Path({str(tmp_path)!r})) as watchdog:
            watchdog.beat(7)
            hang_here()
    """)
    assert done.returncode == HUNG_STATUS
    header, *lines = done.stderr.splitlines()
    assert header.startswith("rank 3 on ")
    assert "no step finished for 1 s, the last was 7" in header
    main = lines.index("Thread MainThread (most recent call last):")
    assert lines[main + 1].endswith("in <module>")
    assert lines[main + 2].endswith("in hang_here")
    assert [line for line in lines if line.startswith("Thread ")] == [
        "Thread reader (most recent call last):",
        "Thread MainThread (most recent call last):",
    ]
    assert (tmp_path / "stacks-rank3.txt").read_text() == done.stderr


def test_watchdog__ends_a_process_that_holds_the_interpreter():
    done = run("""
        with Watchdog(1.0, 3) as watchdog:
            watchdog.beat(7)
            hold_the_interpreter()
    """)
    assert done.returncode == BY_FAULTHANDLER
    assert "Timeout (0:00:01" in done.stderr
    assert "in hold_the_interpreter" in done.stderr


def test_watchdog__beats_keep_a_process_alive():
    done = run("""
        with Watchdog(1.0, 0) as watchdog:
            for step in range(30):
                time.sleep(0.05)
                watchdog.beat(step)
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_watchdog__arms_the_timer_of_faulthandler_anew():
    # Held for longer than what was left of the first timer, never longer than the limit.
    done = run("""
        with Watchdog(1.2, 0) as watchdog:
            for step in range(3):
                ctypes.PyDLL(None).usleep(700_000)
                watchdog.beat(step)
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("leave", ["pass", "raise ValueError"])
def test_watchdog__is_over_behind_its_block(leave):
    done = run(f"""
        try:
            with Watchdog(0.3, 0):
                {leave}
        except ValueError:
            pass
        time.sleep(0.6)
        assert threading.active_count() == 1
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_watchdog__no_limit_starts_nothing():
    done = run("""
        with Watchdog(0, 0) as watchdog:
            watchdog.beat(1)
            assert threading.active_count() == 1
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("call", ["beat(8)", "__exit__(None, None, None)"])
def test_watchdog__late_beat_and_end_do_not_return(call):
    # Else rank 0 could write "running" over "hung", or the next stage begin and be cut off.
    done = run(f"""
        watchdog = Watchdog(0.8, 0).__enter__()
        time.sleep(0.85)
        watchdog.{call}
        print("went on")
    """)
    assert done.returncode == HUNG_STATUS
    assert "went on" not in done.stdout


def test_watchdog__hook_gets_step_and_reason():
    done = run("""
        def hook(step, reason):
            print(step, reason, flush=True)

        with Watchdog(0.4, 0, on_hang=hook, step=5):
            hang_here()
    """)
    assert done.returncode == HUNG_STATUS
    assert done.stdout.startswith("5 rank 0 on ")
    assert done.stdout.endswith("the last was 5\n")


@pytest.mark.parametrize("hook", ["hang_here()", "sys.exit(0)", "1 / 0"])
def test_watchdog__ends_though_the_hook_fails_or_hangs(hook):
    done = run(f"""
        with Watchdog(0.4, 0, on_hang=lambda *_: {hook}):
            hang_here()
    """)
    assert done.returncode == HUNG_STATUS
    assert ("rank 0: None: division by zero" in done.stderr) == (hook == "1 / 0")


def test_watchdog__ends_though_the_folder_is_gone(tmp_path):
    done = run(f"""
        with Watchdog(0.4, 0, Path({str(tmp_path / "gone")!r})):
            hang_here()
    """)
    assert done.returncode == HUNG_STATUS
    assert "in hang_here" in done.stderr
    assert done.stderr.endswith("gone: No such file or directory\n")


def test_watchdog__ends_though_nobody_reads_the_log():
    # A pipe that is full blocks whoever writes to it.
    program = HEAD + textwrap.dedent("""
        import os
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, bytes(4096))
        except BlockingIOError:
            os.set_blocking(2, True)
        with Watchdog(0.4, 0):
            hang_here()
    """)
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=ROOT) as it:
        assert it.wait(timeout=60) == HUNG_STATUS


def test_watchdog__forked_children_end_and_are_not_watched():
    # Workers of a DataLoader are forked inside the block, and outlive its limit.
    done = run("""
        with Watchdog(1.0, 0) as watchdog:
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2,))
            worker.start()
            for step in range(50):
                watchdog.beat(step)
                worker.join(0.1)
            assert worker.exitcode == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.faults
@pytest.mark.distributed
def test_watchdog__every_rank_writes_its_stacks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        HEAD
        + textwrap.dedent(f"""
        import torch, torch.distributed as dist

        def step():
            dist.all_reduce(torch.ones(1))

        dist.init_process_group("gloo")
        with Watchdog(2.0, dist.get_rank(), Path({str(tmp_path)!r})) as watchdog:
            for number in range(1, 10):
                if dist.get_rank() == 1 and number == 5:
                    hang_here()
                step()
                watchdog.beat(number)
        """)
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run("", *launcher, str(script))
    assert done.returncode != 0
    assert f"exitcode  : {HUNG_STATUS}" in done.stderr
    for rank, place in enumerate(["in step", "in hang_here"]):
        kept = (tmp_path / f"stacks-rank{rank}.txt").read_text()
        assert kept.startswith(f"rank {rank} on ")
        assert "the last was 4" in kept
        assert place in kept
        assert kept in done.stderr  # in one piece


def test_stacks__of_all_threads_but_some():
    here = "in test_stacks__of_all_threads_but_some\n"
    assert here in stacks()
    assert here not in stacks(without=[threading.get_ident()])


def test_watchdog__patience_is_a_share_of_short_limits():
    assert (Watchdog(1800, 0).patience, Watchdog(2, 0).patience) == (5.0, 0.5)
