"""The teacher's share of a fit's time, for which a GPU is waited for where it is read alone."""

import itertools
import time

import torch

from upsamplers.fit.batches import TeacherTimer

CPU = torch.device("cpu")


def test_teacher_timer__shares_the_time_since_the_first_call(monkeypatch):
    clock = itertools.count(100)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))  # a second between two looks
    timer = TeacherTimer()
    assert timer.share == 0.0
    assert timer.time(lambda: "features", CPU) == "features"
    assert timer.share == 1 / 2
    assert timer.share == 1 / 3
    timer.time(lambda: None, CPU)
    assert timer.share == 2 / 6
