"""What the tests of the launcher share."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

RECIPE = """
name: tiny
output: {output}
data: {{shards: [shards]}}
teachers: {{a: {{preset: timm}}}}
stages:
  stage1: &stage {{steps: 1, partitions: [{{name: low, size: 32, teachers: [a], batch_size: 2}}]}}
  stage2: {{<<: *stage, start_from: stage1}}
  stage3: {{<<: *stage, start_from: stage2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe of three stages."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "runs"), encoding="utf-8")
    return path


@pytest.fixture
def recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Make ``recording_stage`` importable in jobs; returns the calls written so far."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, known))))

    def calls() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]

    with patch.dict(os.environ):  # a job that runs in this process sets its rank
        yield calls
    sys.modules.pop("recording_stage", None)
