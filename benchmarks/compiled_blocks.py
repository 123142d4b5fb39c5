"""What compilation leaves of a model's transformer blocks: kernels, and bytes of memory traffic.

    python -m benchmarks.compiled_blocks phi_s_b featsharp_radio_l

Blocks are compiled by torch's own compiler up to the kernels that its scheduler has fused, for the
Triton backend, on tensors without data; nothing is generated or run, so no GPU is needed. Counted
are encoders as teachers run them, and a training pass of the student, both as recipes have them on
a GPU. Traffic is what fused kernels read and write by the compiler's own count; products and
attention count as a kernel each, as in eager mode (:mod:`radio_distill.plan.meter`).

What may differ on a GPU: attention is the operator of a CPU, for which some towers copy queries,
keys and values; biases may be added behind a product instead of in it.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

from radio_distill.plan.meter import Work, measure_work
from radio_distill.system.compiled import compile_blocks
from stages.planning import build_models, measured
from stages.recipes import load_recipe
from tools.published import markdown

COLUMNS = (
    "recipe", "model", "input, px", "kernels of blocks, eager", "compiled", "left",
    "traffic of blocks, eager, MB", "compiled, MB", "left",
)  # fmt: skip
_PRODUCTS = "mm", "convolution", "attention"


class _CountedError(Exception):
    """Ends a compilation that has come as far as is wanted."""


class Compiler:
    """A backend of ``torch.compile`` whose graphs run as they were, and count what they would be.

    Attributes:
        work: of the graphs that have run, compiled.
    """

    def __init__(self) -> None:
        self.work = self._last = Work()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=self._inner)

    def settings(self) -> Any:
        """Return the context in which to run what is compiled."""
        options = {
            "_post_fusion_custom_pass": self._count,
            "cpu_backend": "triton",
            "fx_graph_cache": False,
        }
        return config.patch(options)

    def _inner(self, graph: Any, inputs: Any, **options: Any) -> Any:
        try:
            compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        except Exception as error:
            if not isinstance(getattr(error, "inner_exception", error), _CountedError):
                raise
        work = self._last

        def run(*args: Any) -> Any:
            self.work += work
            return graph.forward(*args)

        return make_boxed_func(run)

    def _count(self, nodes: Sequence[Any]) -> Any:
        """See the scheduler's kernels, after fusion."""
        self._last = Work()
        for node in nodes:
            extern = isinstance(node, ExternKernelSchedulerNode)
            name = str(getattr(node.node, "python_kernel_name", "")) if extern else ""
            if isinstance(node, NopKernelSchedulerNode) or (extern and name in ("", "None")):
                continue  # one of several results of a kernel
            is_product = any(word in name for word in _PRODUCTS)
            traffic = 0 if is_product else node.get_read_write_buffers_sizes()
            self._last += Work(traffic=traffic, kernels=1)
        raise _CountedError


def compiled(model: nn.Module, run: Callable[[], object]) -> Work:
    """Return the work of a model's blocks in ``run`` if they were compiled; without products."""
    for module in model.modules():
        vars(module).pop("forward", None)  # those that stand for others while work is measured
    torch._dynamo.reset()
    compiler = Compiler()
    compile_blocks(model, backend=compiler)
    with compiler.settings():
        run()
    return compiler.work


def rows(recipe: str, seen: list[Work]) -> Iterator[tuple[str, str, str, Work, Work]]:
    """Yield recipe, model, size, and the work of its blocks, eager and compiled.

    Models whose eager work was ``seen`` are left out.
    """
    models = build_models(load_recipe(recipe))
    with measured(models) as costs:
        stage = list(costs.stages.values())[-1]
        for name, teacher in costs.teachers.items():
            size = next(view.encoded for _, view in stage.views(name))
            pixels = torch.empty(2, 3, *size)
            encode = lambda: teacher.encode(pixels)  # noqa: B023, E731 - called at once
            eager = measure_work(encode)
            if eager.block_kernels and eager not in seen:
                seen.append(eager)
                yield recipe, name, _text(size), eager, compiled(models.tower(name), encode)
        size = stage.partitions[0].sizes[0]
        run = costs.student_pass(size, 8)
        with costs.sharing_matrices():
            eager = costs.by_depth(run)
            if eager.block_kernels and eager not in seen:
                seen.append(eager)
                yield recipe, "student", _text(size), eager, compiled(costs.student.student, run)


def _text(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _cells(recipe: str, model: str, size: str, eager: Work, left: Work) -> list[str]:
    kernels, traffic = left.kernels / eager.block_kernels, left.traffic / eager.block_traffic
    return [
        recipe, model, size, f"{eager.block_kernels:,.0f}", f"{left.kernels:,.0f}",
        f"{kernels:.2f}", f"{eager.block_traffic / 1e6:,.0f}", f"{left.traffic / 1e6:,.0f}",
        f"{traffic:.2f}",
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+")
    seen: list[Work] = []
    found = [row for recipe in parser.parse_args(argv).recipes for row in rows(recipe, seen)]
    print("\n".join(markdown(COLUMNS, [_cells(*row) for row in found])))
    for kind, is_student in (("encoders", False), ("students", True)):
        shares = [
            (left.traffic / eager.block_traffic, left.kernels / eager.block_kernels)
            for _, model, _, eager, left in found
            if (model == "student") == is_student
        ]
        if shares:
            traffic, kernels = map(statistics.median, zip(*shares, strict=True))
            print(
                f"\n{kind}: {traffic:.2f} of the traffic and {kernels:.2f} of the kernels, median"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
