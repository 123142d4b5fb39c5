"""Compiled blocks on a GPU, by torch's own compiler: teachers and a step of the student."""

import copy

import pytest
import torch

from radio_distill.config import StudentConfig, TeacherConfig
from radio_distill.models.spectral import begin_step, closing_loss, share_matrices
from radio_distill.models.student import Student
from radio_distill.system.compiled import can_compile, compile_blocks
from teachers import build_teacher

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and can_compile(torch.device("cuda"))),
    reason="needs a GPU, Triton and a C compiler",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["tiny_vit", "tiny_dinov2", "tiny_open_clip"])
def test_teacher__says_nearly_the_same(preset, dtype):
    config = TeacherConfig(preset=preset, dtype=dtype)
    eager, compiled = (build_teacher("t", config, "cuda", on) for on in (False, True))
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for images in (3, 2):
        pixels = torch.rand(images, 3, *eager.spec.native_size, device="cuda")
        found, expected = compiled.encode(pixels).spatial, eager.encode(pixels).spatial
        assert float((found - expected).norm() / expected.norm()) < tolerance


def test_student__gradients_are_nearly_the_same():
    torch.manual_seed(0)
    config = StudentConfig(
        architecture="test_vit",
        max_size=256,
        spectral_reparametrization=True,
        gradient_checkpointing=True,
    )
    eager = Student(config, 2, weight_noise=0.1).cuda().train()
    student = copy.deepcopy(eager)
    compile_blocks(student)
    for model in (eager, student):
        begin_step(model, 0)
        share_matrices(model)
        for side in (64, 96):
            pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
            summary, spatial = model(pixels.cuda())
            (summary.square().mean() + spatial.square().mean()).backward()
        closing_loss(model).backward()
    for one, other in zip(student.parameters(), eager.parameters(), strict=True):
        assert float((one.grad - other.grad).norm()) <= 1e-4 * float(other.grad.norm()) + 1e-7
