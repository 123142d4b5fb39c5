"""Runs commands on hostile input in a child process, and says how each of them ended.

::

    ROOT/           everything in it is compared before and after each command
        case/       the input of one command; it may write where the case says, and nowhere else
        home/ tmp/  what a process finds in HOME and TMPDIR; empty
        canary      a file that nothing may touch
"""

import errno
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20
"""That a command may take; the slowest takes 2 on an idle core."""
_KILLED_AFTER = 1.5 * SECONDS  # where no signal reaches the interpreter
_MEMORY = 3 << 30  # that a command may take beside what the libraries have mapped
_LONGEST = 2000  # characters of a line that a person reads
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {  # of what an audit event writes: place of the path, and of the folder that it is in
    "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),), "os.link": ((1, 3),), "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "open": ((0, None),),
}  # fmt: skip
_RUNNING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
            "socket.getaddrinfo", "pickle.find_class")  # fmt: skip
_PROBLEM = re.compile(r"[\w.-]+: ")
GOOD = ("done", "refused", "reported")


class Case(NamedTuple):
    """One command on one hostile input."""

    name: str
    write: Callable[[Path], Sequence[str]]
    """Puts the input into a folder; returns the arguments of ``radio-distill``."""
    may_write: tuple[str, ...]
    """Folders within the case's, in which the command may write."""


class Outcome(NamedTuple):
    """How a command ended."""

    name: str
    kind: str
    """One of ``GOOD``: status 0; status 2 and one line; a list of bad images. Else a failure."""
    detail: str = ""
    seconds: float = 0.0


class _OutOfTime(BaseException):
    """Raised in the command by the alarm."""


def run_cases(root: Path, cases: Sequence[Case]) -> list[Outcome]:
    """Run all cases one after the other, in a new process after one that died."""
    import stages.build  # noqa: F401  here, so that no child has to

    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        outcomes += _run_in_child(root, cases[len(outcomes) :])
    return outcomes


def _run_in_child(root: Path, cases: Sequence[Case]) -> list[Outcome]:
    """Run cases in a child, until the first that it does not survive."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(root, cases, sender))
    child.start()
    sender.close()
    outcomes: list[Outcome] = []
    try:
        while len(outcomes) < len(cases):
            if not receiver.poll(_KILLED_AFTER):
                outcomes.append(Outcome(cases[len(outcomes)].name, "hang", "had to be killed"))
                break
            outcomes.append(receiver.recv())
    except EOFError:
        child.join()
        detail = f"the process died: {child.exitcode}"
        outcomes.append(Outcome(cases[len(outcomes)].name, "crash", detail))
    finally:
        child.kill()
        child.join()
    return outcomes


def _child(root: Path, cases: Sequence[Case], sender: Any) -> None:
    _confine(root)
    for case in cases:
        sender.send(_run(case, root))


def _confine(root: Path) -> None:
    """Limit this process's memory, and move it to a place where nothing lies."""
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    for name in ("home", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "canary").write_text("alive")
    os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = None
    os.chdir(root / "home")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _out_of_time)
    sys.addaudithook(_audit)


def _out_of_time(number: int, frame: object) -> None:
    raise _OutOfTime


_may_write: tuple[str, ...] | None = None
"""Folders that the command which runs now may write in; None between commands."""
_trespasses: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _may_write is None:
        return
    if event in _RUNNING:
        _refuse(f"{event} {arguments!r:.200}")
    elif event in _PATHS and (event != "open" or _writes(arguments[2])):
        for place, folder in _PATHS[event]:
            path = _real(arguments[place], arguments[folder] if folder is not None else -1)
            # A folder that is opened to write is asked for a file without a name, which leaves
            # nothing: so programs try whether they could write there.
            asked = event == "open" and os.path.isdir(path)
            if path and not asked and not path.startswith(_may_write):
                _refuse(f"{event} {path:.200}")


def _refuse(act: str) -> None:
    """Note what a command was about to do, and keep it from it."""
    _trespasses.append(act)
    raise PermissionError(errno.EPERM, "not in the sandbox")


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & _WRITING)


def _real(path: Any, folder: int) -> str:
    """Return where a path leads, whatever links are in it; empty for an open file."""
    if isinstance(path, int):
        return ""
    start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
    parent, name = os.path.split(os.path.join(start, os.fsdecode(path)))
    return os.path.join(os.path.realpath(parent), name) + "/"


def _run(case: Case, root: Path) -> Outcome:
    """Run one case in this process."""
    global _may_write
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    argv = case.write(folder)
    before = _listing(root, case)
    _trespasses.clear()
    begin = time.monotonic()
    with _captured(root) as output:
        _may_write = (
            *(f"{folder / name}/" for name in case.may_write),
            f"{root}/tmp/",
            "/dev/null/",
        )
        try:
            status = _status_of(argv)
        finally:
            _may_write = None
    seconds = time.monotonic() - begin
    out, err = (path.read_text(errors="surrogateescape") for path in output)
    kind, detail = _judge(status, argv, out, err)
    if kind in GOOD:
        after = _listing(root, case)
        changed = sorted(
            name for name in before.keys() | after if before.get(name) != after.get(name)
        )
        wrong = _trespasses + changed
        kind, detail = ("trespass", "; ".join(wrong[:3])) if wrong else (kind, detail)
    return Outcome(case.name, kind, f"{' '.join(argv)[:100]!r}: {detail}", seconds)


def _status_of(argv: Sequence[str]) -> int | str:
    """Run a command; returns its status, or what went wrong."""
    from stages.cli import main

    signal.alarm(SECONDS)
    try:
        return main(list(argv))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else f"SystemExit {error.code!r}"
    except _OutOfTime:
        return "out of time at " + _last_frames(sys.exc_info()[2], 4)
    except BaseException as error:
        frames = _last_frames(error.__traceback__, 3)
        return f"{type(error).__name__}: {str(error)[:150]!r} at {frames}"
    finally:
        signal.alarm(0)


def _last_frames(trace: Any, count: int) -> str:
    frames = traceback.extract_tb(trace, limit=-60)
    ours = [frame for frame in frames if "site-packages" not in frame.filename][-count:]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours)


@contextmanager
def _captured(root: Path) -> Iterator[tuple[Path, Path]]:
    """Send both streams of this process to files, those of C libraries too."""
    paths = root.with_name(root.name + ".out"), root.with_name(root.name + ".err")
    kept = os.dup(1), os.dup(2), sys.stdout, sys.stderr
    logging.getLogger().handlers.clear()
    with paths[0].open("w") as out, paths[1].open("w", errors="backslashreplace") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        try:
            yield paths
        finally:
            logging.getLogger().handlers.clear()
            sys.stdout, sys.stderr = kept[2:]
            for number, descriptor in enumerate(kept[:2], 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _judge(status: int | str, argv: Sequence[str], out: str, err: str) -> tuple[str, str]:
    """Return the kind of a command's end, and what tells it."""
    if isinstance(status, str):
        return ("time-out" if status.startswith("out of time") else "exception"), status
    if "Traceback" in out + err:
        return "stack trace", err[-300:]
    if any(
        line.startswith(("INJECTED", "\x1b[31mINJ"))
        for line in re.split(r"[\n\r]", out + "\n" + err)
    ):
        return "forged output", (out + err)[:300]
    if any(len(line) > _LONGEST for line in (out + err).split("\n")):
        return "endless line", max((out + err).split("\n"), key=len)[:150]
    last = err.rpartition("radio-distill: ")[2].rstrip("\n") if "radio-distill: " in err else ""
    if status == 0 or (status == 1 and "--check" in argv):
        return ("reported" if status else "done"), ""
    if status != 2 or not last:
        return "status", f"{status}: {err[-200:]}"
    if not all(_PROBLEM.match(line) for line in last.split("\n")[1:]):
        return "several lines", last[:300]
    return "refused", last


def _listing(root: Path, case: Case) -> dict[str, tuple[int, int]]:
    """Return size and time of everything that the command may not change."""
    found = {}
    allowed = {str(root / "case" / name) for name in case.may_write}
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(parent, name) not in allowed]
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(parent, name))
            if parent != str(root) or name not in ("case", "tmp"):
                found[os.path.join(parent, name)] = (status.st_size, status.st_mtime_ns)
    return found
