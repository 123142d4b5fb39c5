"""What an evaluation does with a benchmark that fails: nothing but the failure itself is caught."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from radio_distill.config import EvaluationConfig
from radio_distill.errors import DataError, InterruptedRunError
from radio_distill.evals.run import BENCHMARKS, evaluate


@dataclass(frozen=True)
class Failing:
    """Raises the error that a test sets."""

    name: ClassVar[str] = "failing"
    sources: ClassVar[dict[str, str]] = {}
    error: ClassVar[BaseException]

    def run(self, encoder, limit=None, progress=None):
        raise self.error


@pytest.mark.parametrize(
    ("error", "is_caught"),
    [
        (IndexError("a bug"), True),
        (FileNotFoundError("a file of its own"), True),
        (KeyboardInterrupt(), False),
        (InterruptedRunError("by a signal"), False),
        (DataError("a bad image"), False),
        (MemoryError(), False),
        (torch.OutOfMemoryError("on the device"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_evaluate__a_failure_is_the_callers_to_tell_and_nothing_else_is(
    monkeypatch, colours, error, is_caught
):
    monkeypatch.setattr(BENCHMARKS, "get", {"failing": Failing}.get)
    monkeypatch.setattr(Failing, "error", error, raising=False)
    config, told = EvaluationConfig(benchmarks=("failing",)), []
    with pytest.raises(type(error)):
        evaluate(colours(16), config)

    if is_caught:
        assert evaluate(colours(16), config, failed=lambda *it: told.append(it)) == []
        assert told == [("failing", error)]
        return
    with pytest.raises(type(error)):
        evaluate(colours(16), config, failed=lambda *it: told.append(it))
    assert not told
