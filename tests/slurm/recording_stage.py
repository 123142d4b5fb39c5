"""A stage that only writes down how it was called: ``main(["FOLDER", name, ...])``."""

import json
import os
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    """Append one line for this process to ``calls.jsonl``."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    call = {"arguments": argv[1:], "time": time.time(), "torch": "torch" in sys.modules}
    call |= {name: os.environ.get(name) for name in names}
    with (Path(argv[0]) / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")
    return 0


def slow_start(argv: list[str]) -> int:
    """Sleep for ever, unless asked to resume."""
    main(argv)
    if "--resume" not in argv:
        time.sleep(60)
    return 0


def failing(argv: list[str]) -> int:
    """Write down the call, then end with status 3."""
    main(argv)
    return 3
