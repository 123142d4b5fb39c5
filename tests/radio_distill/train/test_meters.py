"""Means between log lines, and what the time of a run is spent on."""

import time

import pytest
import torch

from radio_distill.train.meters import Meter, Throughput


def test_means__are_weighted_and_start_anew():
    meter = Meter(["a", "b", "never"], torch.device("cpu"))
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, weight=1)
    meter.add({"a": torch.tensor(4.0)}, weight=2)
    assert meter.means() == {"a": 3.0, "b": 5.0}
    assert meter.means() == {}


def test_meter__an_unknown_name_is_a_bug():
    with pytest.raises(ValueError, match="not in list"):
        Meter(["a"], torch.device("cpu")).add({"b": torch.tensor(1.0)}, 1)


def test_throughput__counts_waits_as_shares_and_pauses_not_at_all():
    throughput = Throughput(images=10)
    with throughput.paused():
        time.sleep(0.3)
    with throughput.saving():
        time.sleep(0.1)
    values = throughput.end_window(images=20, world_size=1)
    assert values["checkpoint_wait_share"] > 0.8
    assert values["data_wait_share"] == 0
    assert 50 < values["images_per_second"] <= 100
    assert throughput.end_window(images=20, world_size=1)["checkpoint_wait_share"] == 0
