"""An ONNX file for any batch and any image size that the student takes.

::

    FOLDER/
        model.onnx         inputs and outputs below; opset 18
        model.onnx.data    weights, where they are too large for one file
        README.md          model card

===================== ============================== ==========================================
``pixels``            ``[batch, 3, height, width]``  RGB in [0, 1]; normalised inside; sides are
                                                     multiples of the metadata's ``size_step``
``summary``           ``[batch, S]``                 summary tokens, one behind the other, if any
``features``          ``[batch, D, rows, columns]``  feature map
``TEACHER_summary``   ``[batch, S']``                head's output, if asked for and if it has one
``TEACHER_features``  ``[batch, C, rows, columns]``  head's output, if asked for
===================== ============================== ==========================================

Every student fits, windowed ones too. Weights and computation are float32: other precisions are
left to the tools of the runtime that the file is for.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, UnknownNameError
from ..registry import nearest
from ..types import Size
from .files import new_folder
from .folded import FoldedStudent
from .model_card import model_card
from .parity import check_equal, probe_images

NAME = "onnx"
OPSET = 18
TOLERANCE = 1e-4
"""Largest difference from the student, see :func:`.parity.check_equal`."""

logger = logging.getLogger(__name__)

_EXAMPLE: tuple[int, Size] = (2, (4, 6))
"""Batch and sides of the image that is traced; all different, lest the tracer take two for one."""
_PROBES: tuple[tuple[int, Size], ...] = ((1, (2, 3)), (3, (5, 2)), (1, (4, 4)), (2, (1, 7)))
_USAGE = """\
```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
pixels = np.random.rand(1, 3, {height}, {width}).astype(np.float32)  # RGB in [0, 1]
outputs = dict(zip({names}, session.run(None, {{"pixels": pixels}})))
```

The batch is free, and so are height and width as multiples of {step} pixels; onnxruntime stops at
another size with an error of its reshape, so resize or pad the image first. The file's metadata
name the recipe, the teachers and their licences."""


class _Graph(nn.Module):
    """What the file computes: a tuple of outputs instead of named features."""

    def __init__(self, student: FoldedStudent, heads: Sequence[str]):
        super().__init__()
        self.model = student.model
        self.slots = student.summary_slots
        teachers = list(student.checkpoint.teachers)
        self.heads = [(name, teachers.index(name)) for name in heads]

    @property
    def names(self) -> list[str]:
        """Names of the outputs, in order."""
        names = ["summary", "features"] if self.slots else ["features"]
        for name, _ in self.heads:
            if self.model.heads[name].summary is not None:
                names.append(f"{name}_summary")
            names.append(f"{name}_features")
        return names

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """``[B, 3, H, W]`` to the tensors that :attr:`names` lists."""
        tokens, spatial = self.model.student(pixels)  # [B, T, D], [B, D, h, w]
        outputs = [tokens[:, self.slots].flatten(1)] if self.slots else []
        outputs.append(spatial)
        for name, slot in self.heads:
            predicted = self.model.heads[name](tokens[:, slot], spatial)
            outputs += [output for output in predicted if output is not None]
        return tuple(outputs)


def check(student: FoldedStudent) -> None:
    """Raise ExportError where a package that writes or runs ONNX is missing; every student fits."""
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{NAME} needs {', '.join(missing)}; install them: pip install 'radio-distill[export]'"
        )


def export(student: FoldedStudent, folder: Path, heads: Sequence[str] = ()) -> Path:
    """Write the ONNX file and run it against the student; returns the file.

    Args:
        student: what is exported.
        folder: new folder.
        heads: names of the teachers whose heads are written too.

    Raises:
        ExportError: where a package is missing, the file computes something else than the student,
            or the folder cannot be written.
        UnknownNameError: where there is no head of a name.
    """
    check(student)
    for name in heads:
        if name not in student.model.heads:
            known = list(student.model.heads)
            raise UnknownNameError(f"{NAME}: no head {name!r} ({nearest(name, known)})")
    graph = _Graph(student, heads).eval()
    with new_folder(folder) as draft:
        program = _traced(student, graph)
        program.model.metadata_props.update(_metadata(student))
        program.save(draft / "model.onnx")  # with external data where protobuf's 2 GB are too few
        card = model_card(student, _usage(student, graph.names), library="onnx")
        (draft / "README.md").write_text(card, encoding="utf-8")
        difference = _verify(graph, draft / "model.onnx", student.model.student.size_step)
    logger.info("%s: largest difference in onnxruntime %.1e", folder, difference)
    return folder / "model.onnx"


def _traced(student: FoldedStudent, graph: _Graph) -> Any:
    """Translate to ONNX, with free batch and sides."""
    step = student.model.student.size_step
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    free = {0: batch, 2: step * rows, 3: step * columns}
    program = torch.onnx.export(
        graph,
        tuple(probe_images(step, [_EXAMPLE])),
        dynamo=True,
        dynamic_shapes=(free,),
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=graph.names,
        verbose=False,
    )
    assert program is not None, "torch's exporter returns a program"
    _name_dimensions(program.model.graph)
    return program


def _name_dimensions(graph: Any) -> None:
    """Give the free dimensions of inputs and outputs names for people."""
    for value in graph.inputs:
        value.shape = type(value.shape)(["batch", 3, "height", "width"])
    for value in graph.outputs:
        sides = ["rows", "columns"] if len(value.shape) == 4 else []
        value.shape = type(value.shape)(["batch", value.shape[1], *sides])


def _metadata(student: FoldedStudent) -> dict[str, str]:
    checkpoint, body = student.checkpoint, student.model.student
    return {
        "recipe": checkpoint.recipe.name,
        "step": str(checkpoint.step),
        "teachers": json.dumps(list(checkpoint.teachers)),
        "summary_teachers": json.dumps(student.summary_teachers),
        "licences": json.dumps({k: spec.licence for k, spec in checkpoint.teachers.items()}),
        "patch_size": str(body.patch_size),
        "size_step": str(body.size_step),
    }


def _usage(student: FoldedStudent, names: list[str]) -> str:
    height, width = student.preferred_size
    step = student.model.student.size_step
    return _USAGE.format(height=height, width=width, names=json.dumps(names), step=step)


@torch.no_grad()
def _verify(graph: _Graph, path: Path, step: int) -> float:
    """Return the largest difference between onnxruntime and the student over several sizes.

    Raises:
        ExportError: where they differ, or onnxruntime refuses a size.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for pixels in probe_images(step, _PROBES):
        expected = dict(zip(graph.names, graph(pixels), strict=True))
        outputs = map(torch.from_numpy, _run(session, pixels))
        found = dict(zip(graph.names, outputs, strict=True))
        differences.append(check_equal(NAME, expected, found, TOLERANCE))
    return max(differences)


def _run(session: Any, pixels: Tensor) -> list[Any]:
    try:
        outputs: list[Any] = session.run(None, {"pixels": pixels.numpy()})
    except Exception as error:  # onnxruntime has a class of its own for every status
        shape = "x".join(map(str, pixels.shape))
        reason = " ".join(str(error).split())
        raise ExportError(f"{NAME}: onnxruntime refuses a batch of {shape}: {reason}") from error
    return outputs
