"""Only the process that was started last may write into a stage's folder.

Slurm starts a job anew when a node no longer answers, and on a node that only lost its network the
old processes are alive. Both would write checkpoints into one folder. So each start leaves a token
there, and whoever finds another's token in its place must stop.
"""

import json
import os
import socket
import time
import uuid
from pathlib import Path

from ..errors import TakenOverError
from ..files import replacing

OWNER = "owner.json"


class Ownership:
    """This process's claim on a folder; made by rank 0 when a stage starts.

    Args:
        folder: of the stage; whoever owned it before finds out at its next :meth:`check`.
    """

    def __init__(self, folder: Path):
        self._path = folder / OWNER
        self._token = uuid.uuid4().hex
        claim = {
            "token": self._token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
            "time": time.time(),
        }
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(claim, indent=1) + "\n", encoding="utf-8")

    def check(self) -> None:
        """Raise TakenOverError where another process has claimed the folder since."""
        try:
            claim = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # a file system that does not answer is no other owner
        if claim.get("token") != self._token:
            raise TakenOverError(
                f"{self._path.parent} was taken over by process {claim.get('process')} on "
                f"{claim.get('host')}, which was started later; this one stops and writes no more"
            )
