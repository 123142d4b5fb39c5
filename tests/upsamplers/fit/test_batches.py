"""The teacher's share of a fit's time, for which a GPU is waited for where it is read alone."""

import time

import torch

from upsamplers.fit.batches import TeacherTimer

CPU = torch.device("cpu")


def test_teacher_timer__shares_the_time_since_the_first_call():
    timer = TeacherTimer()
    assert timer.share == 0.0
    assert timer.time(lambda: time.sleep(0.05) or "features", CPU) == "features"
    at_first = timer.share
    assert at_first > 0.5
    time.sleep(0.1)
    assert 0 < timer.share < at_first
