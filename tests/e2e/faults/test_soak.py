"""Thousands of steps while a hundredth of the reads fails: nothing grows, and nothing is lost.

The faults are made where the program meets the system, see ``benchmarks/soak.py``.
"""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml

from benchmarks.soak import READ_TIMEOUT, FaultyReads, watching
from stages.cli import main as cli

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
STEPS = 2000
BATCH = 4
MAX_GROWTH = 20.0
"""Megabytes between step 500 and step 2,000; measured: 1."""


def test_soak__memory_is_flat_and_every_fault_is_counted(recipe_file):
    shrink(recipe_file)
    reads = FaultyReads(share=0.01, seed=1)
    with reads.installed(), watching(STEPS // 4) as found:
        assert cli(["train", str(recipe_file)]) == 0
    statistics, training = found
    uses = training.uses
    print(f"soak: {sum(map(bool, reads.faults))} of {len(reads.faults)} reads failed")
    for use in uses:
        print(f"  step {use.step}: {use.megabytes:.0f} MB, {use.seconds / use.step:.4f} s a step")
    assert [use.step for use in uses] == [500, 1000, 1500, 2000]
    assert uses[-1].megabytes - uses[0].megabytes < MAX_GROWTH
    assert uses[-1].descriptors <= uses[0].descriptors + 1  # a checkpoint may be under way
    assert uses[-1].threads <= uses[0].threads + 2  # and a stalled read

    made = Counter(fault for fault in reads.faults if fault and fault != "once")
    assert set(made) == {"unreadable", "checksum", "stalled"}
    assert Counter(training.source.bad) + Counter(statistics.source.bad) == made
    folder = recipe_file.parent / "runs" / "tiny" / "stage1"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bad_images"] == sum(training.source.bad.values())
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-00002000", "step-00002001"]

    undisturbed = islice(training.source.batches(0), STEPS + 1)
    expected = [key for step in undisturbed for batch in step for key in batch.keys]
    replaced = replaced_positions(reads.faults, len(statistics.keys))
    assert len(training.keys) == len(expected) == BATCH * (STEPS + 1)
    for position, (key, undisturbed_key) in enumerate(zip(training.keys, expected, strict=True)):
        assert key == undisturbed_key or position in replaced, position
    changed = sum(a != b for a, b in zip(training.keys, expected, strict=True))
    assert changed > len(replaced) / 2, "a substitute is another image, but for chance"


def shrink(recipe_file: Path) -> None:
    """Leave one stage with one teacher in a recipe, so that a step takes milliseconds."""
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["teachers"] = {"vit": recipe["teachers"]["vit"]}
    low = {"name": "low", "size": 32, "teachers": ["vit"], "batch_size": BATCH}
    # One more step: the last quarter is noted when the next step begins.
    stage = {**recipe["stages"]["stage1"], "steps": STEPS + 1, "partitions": [low]}
    recipe["stages"] = {"stage1": stage}
    recipe["data"] |= {"max_bad_share": 0.02, "read_timeout": READ_TIMEOUT}
    recipe["log"] |= {"every": 100, "save_every": 200, "keep_last": 2}
    recipe_file.write_text(yaml.safe_dump(recipe, sort_keys=False))


def replaced_positions(faults: list[str | None], images_before: int) -> set[int]:
    """Return the positions in the order whose own image could not be read.

    A read that fails makes the loader read another image for the same position.
    """
    position, replaced = -images_before, set()
    for fault in faults:
        if fault in (None, "once"):
            position += 1
        else:
            replaced.add(position)
    return {position for position in replaced if position >= 0}
