"""Means between log lines, and where they are written."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.train.trackers import JsonLines, Meter, open_sinks, read_json_lines


def test_means__are_weighted_and_start_anew():
    meter = Meter(["a", "b", "never"], torch.device("cpu"))
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, weight=1)
    meter.add({"a": torch.tensor(4.0)}, weight=2)
    assert meter.means() == {"a": 3.0, "b": 5.0}
    assert meter.means() == {}


def test_json_lines__a_resumed_run_drops_what_it_will_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in (10, 20, 30):
        sink.write(step, {"loss": step / 10})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    resumed = JsonLines(path, resume_step=20)
    resumed.write(30, {"loss": 99.0})
    resumed.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.0), (20, 2.0), (30, 99.0)]


def test_open_sinks__tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(tmp_path, tensorboard=True, is_main=True) as sinks:
        sinks.write(1, {"loss": 0.25})
        sinks.write(2, {"loss": 0.125})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.25), (2, 0.125)]
    assert [row["loss"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [0.25, 0.125]


def test_open_sinks__tensorboard_holds_images_and_the_log_of_numbers_none(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    with open_sinks(tmp_path, tensorboard=True, is_main=True) as sinks:
        sinks.write_image(3, "features", image)
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("features")
    assert event.step == 3
    assert np.array_equal(Image.open(io.BytesIO(event.encoded_image_string)), image)
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


def test_open_sinks__only_the_main_process_writes(tmp_path):
    with open_sinks(tmp_path / "none", tensorboard=True, is_main=False) as sinks:
        sinks.write(1, {"loss": 1.0})
    assert not (tmp_path / "none").exists()


def test_meter__an_unknown_name_is_a_bug():
    with pytest.raises(ValueError, match="not in list"):
        Meter(["a"], torch.device("cpu")).add({"b": torch.tensor(1.0)}, 1)
