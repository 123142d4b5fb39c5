"""A process loads the teachers that it runs, and others for as long as they are needed."""

import torch

from radio_distill.config import TeacherConfig
from teachers import build_teacher
from teachers.base import LateTeacher


def test_late_teacher__is_loaded_when_asked_and_says_what_the_teacher_does():
    config, loads = TeacherConfig(preset="tiny_vit"), []

    def load():
        loads.append(build_teacher("t", config))
        return loads[-1]

    teacher = build_teacher("t", config)
    late = LateTeacher(teacher.spec, load)
    assert not late.is_loaded
    pixels = torch.rand(2, 3, 48, 48)
    for _ in range(2):
        summary, spatial = late.encode(pixels)
        assert torch.equal(spatial, teacher.encode(pixels).spatial)
        assert torch.equal(summary, teacher.encode(pixels).summary)
    assert late.is_loaded
    assert len(loads) == 1
    late.release()
    assert not late.is_loaded
