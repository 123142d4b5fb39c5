"""The teacher's share of a fit's time is noted by the GPU, which is waited for at its reading."""

import time

import pytest
import torch

from upsamplers.fit.batches import TeacherTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_teacher_timer__does_not_wait_for_the_gpu():
    timer, device = TeacherTimer(), torch.device("cuda")
    left = torch.randn(8192, 8192, device=device)
    left @ left  # which makes the library's handle
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(20):
        timer.time(lambda: left @ left, device)
    asked = time.monotonic() - begin
    share = timer.share
    assert asked < 0.5 * (time.monotonic() - begin)
    assert 0.5 < share <= 1.0
