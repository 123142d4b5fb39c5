"""Compiled blocks: one graph for all that are alike, the same numbers, the same names."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from radio_distill.config import TeacherConfig
from radio_distill.models.position import NUM_DRAWS
from radio_distill.models.spectral import begin_step, closing_loss, share_matrices
from radio_distill.models.student import Student
from radio_distill.system.compiled import can_compile, compile_blocks
from teachers import build_teacher


@pytest.fixture
def graphs():
    """Counts graphs that are compiled as far as operators; a break in one is an error."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def gradients(student: Student, step: int) -> list[torch.Tensor]:
    """Of a step of four passes: full and part batches, two sizes, windows and none."""
    student.zero_grad()
    begin_step(student, step)
    share_matrices(student)
    for images, side, window in ((3, 64, 0), (2, 64, 2), (3, 96, 2), (1, 64, 0)):
        generator = torch.Generator().manual_seed(side)
        pixels = torch.rand(images, 3, side, side, generator=generator)
        draws = torch.rand(images, NUM_DRAWS, generator=generator)
        summary, spatial = student(pixels, draws, window)
        (summary.square().mean() + spatial.square().mean()).backward()
    closing_loss(student).backward()
    return [parameter.grad for parameter in student.parameters()]


def test_student__gradients_are_equal_without_a_break(student_config, graphs):
    torch.manual_seed(0)
    config = student_config(
        architecture="test_vit",
        registers=2,
        global_blocks=2,
        spectral_reparametrization=True,
        gradient_checkpointing=True,
    )
    eager = Student(config, 2, weight_noise=0.1).train()
    student = copy.deepcopy(eager)
    assert compile_blocks(student, backend=graphs, fullgraph=True) == list(student.blocks)
    assert list(student.state_dict()) == list(eager.state_dict())
    counts = []
    for step in range(2):
        for one, other in zip(gradients(student, step), gradients(eager, step), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1] <= 5, "nothing is compiled anew in the second step"


def test_deepcopy__is_not_compiled(student_config, graphs):
    """So the average of the weights, which a checkpoint holds, stays a plain module."""
    student = Student(student_config(), 1)
    compile_blocks(student, backend=graphs)
    assert copy.deepcopy(student).blocks[0]._compiled_call_impl is None


@pytest.mark.parametrize("preset", ["tiny_vit", "tiny_dinov2", "tiny_open_clip", "tiny_radio"])
def test_teacher__says_the_same_without_a_break(graphs, preset):
    config = TeacherConfig(preset=preset, dtype="float32")
    eager, teacher = build_teacher("t", config), build_teacher("t", config)
    assert len(compile_blocks(teacher.tower, backend=graphs, fullgraph=True)) == 2
    patch = eager.spec.patch_size
    for images, rows in ((3, 4), (2, 6)):
        pixels = torch.rand(images, 3, rows * patch, 4 * patch)
        found, expected = teacher.encode(pixels), eager.encode(pixels)
        torch.testing.assert_close(found.spatial, expected.spatial, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.summary, expected.summary, rtol=1e-5, atol=1e-5)
    assert 1 <= graphs.frame_count <= 3, "one for both blocks, until a second size comes"


def test_compile_blocks__leaves_layers_and_unlike_parts_alone():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    unlike = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)]))
    assert compile_blocks(nn.ModuleDict({"layers": layers, "unlike": unlike})) == []


def test_can_compile__not_on_a_processor():
    assert not can_compile(torch.device("cpu"))
