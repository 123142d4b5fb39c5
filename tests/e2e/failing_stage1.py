"""Stage 1, with a benchmark of the user's that has a bug, or that finds no memory."""

from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

from radio_distill.evals.run import BENCHMARKS
from radio_distill.types import Score
from stages import stage1


@dataclass(frozen=True)
class Failing:
    """Fails at each call of a run but the second."""

    for_memory: bool = False

    name: ClassVar[str] = "failing"
    sources: ClassVar[dict[str, str]] = {}
    calls: ClassVar[list[str]] = []

    def run(self, encoder, limit=None, progress=None):
        progress(0, 1)
        self.calls.append(encoder.name)
        if len(self.calls) != 2:
            raise MemoryError if self.for_memory else IndexError("of\ntwo lines")
        return [Score("failing", "share", 0.5, "%", True, "Own", 1)]


def main(arguments: list[str]) -> int:
    """Run stage 1 with the benchmark among those that a recipe can name."""
    Failing.calls.clear()
    with patch.dict(BENCHMARKS._entries, {"failing": f"{__name__}:Failing"}):
        return stage1.main(arguments)
