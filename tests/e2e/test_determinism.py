"""Stages under ``engine.deterministic``: the same bits, and nothing that torch refuses on a GPU."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from e2e import rows, run, run_folder, tensors
from stages import stage1, stage2, stage3

EVERYTHING = str(Path(__file__).with_name("everything.yaml"))
ON = ("--engine.deterministic", "true")

REFUSED = (
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "max_unpool2d"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "grid_sampler_2d_backward"),
    *("nll_loss_forward", "nll_loss2d_forward", "_ctc_loss_backward", "put_", "histc", "bincount"),
    *("median", "nanmedian", "kthvalue"),
)
"""What ``torch.use_deterministic_algorithms`` refuses on a GPU, by the names of its operators."""


class Operators(TorchDispatchMode):
    """Notes the name of every operator that runs in this thread, backward passes too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_operators__sees_what_is_refused():
    features = torch.rand(1, 1, 4, 4, requires_grad=True)
    with Operators() as operators:
        F.interpolate(features, 2, mode="bilinear").sum().backward()
    assert operators.names & set(REFUSED) == {"upsample_bilinear2d_backward"}


def test_stages__run_no_operator_that_a_gpu_refuses(recipe_file):
    everything = ("--override", EVERYTHING)
    runs = [(stage1, ()), (stage1, everything), (stage2, everything), (stage3, everything)]
    for stage, fields in runs:
        with Operators() as operators:
            assert run(stage, recipe_file, *fields, *ON) == 0
        assert operators.names & set(REFUSED) == set()
        assert "_embedding_bag" in operators.names, "the student was not seen"
    assert not torch.are_deterministic_algorithms_enabled(), "it holds for the stage alone"


def test_stage1__ends_with_the_same_bits_twice(recipe_file):
    ends = []
    for _ in range(2):
        assert run(stage1, recipe_file, "--override", EVERYTHING, *ON) == 0
        folder = run_folder(recipe_file) / "stage1-bilinear"
        losses = [
            {key: value for key, value in row.items() if key.startswith(("loss", "gradient"))}
            for row in rows(folder)
        ]
        ends.append((tensors(folder, 6), tensors(folder, 6, "optimizer"), losses))
    for one, other in zip(*(end[:2] for end in ends), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert ends[0][2] == ends[1][2]
