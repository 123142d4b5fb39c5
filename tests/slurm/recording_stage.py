"""A stage that only writes down how it was called: ``main(["FOLDER", name, ...])``."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from radio_distill.system.signals import requested


def main(argv):
    """Append one line for this process to ``calls.jsonl``."""
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "RADIO_DISTILL_FRESH",
    )
    call = {"arguments": argv[1:], "time": time.time(), "torch": "torch" in sys.modules}
    call |= {name: os.environ.get(name) for name in names}
    with (Path(argv[0]) / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")
    return 0


def slow_start(argv):
    """Go on until a signal asks to stop, unless asked to resume."""
    main(argv)
    while "--resume" not in argv:
        time.sleep(0.05)
        if requested():
            return 75
    return 0


def failing(argv):
    """Write down the call, then end with status 3."""
    main(argv)
    return 3


def interrupted(argv):
    """Behave as a run that is told to stop."""
    os.kill(os.getpid(), signal.SIGUSR2)
    return 75 if requested() == signal.SIGUSR2 else 1


def raising(argv):
    """Meet a bug of ours."""
    raise ValueError("not\n  so")


def leaving(argv):
    """End by an exception that is no error."""
    sys.exit(4)


def killed(argv):
    """Die without a word."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
