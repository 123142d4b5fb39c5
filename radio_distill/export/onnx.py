"""An ONNX file for any batch and any image size that the student takes.

::

    FOLDER/
        model.onnx         inputs and outputs below; opset 18
        model.onnx.data    weights, where they are too large for one file
        README.md          model card

===================== ============================== ==========================================
``pixels``            ``[batch, 3, height, width]``  RGB in [0, 1], or the bands that it was trained
                                                     with; normalised inside; sides are
                                                     multiples of the metadata's ``size_step``
``summary``           ``[batch, S]``                 summary tokens, one behind the other, if any
``features``          ``[batch, D, rows, columns]``  feature map
``TEACHER_summary``   ``[batch, S']``                head's output, if asked for and if it has one
``TEACHER_features``  ``[batch, C, rows, columns]``  head's output, if asked for
===================== ============================== ==========================================

Every student of more than one size fits, windowed ones too. Weights and computation are float32:
other precisions are left to the tools of the runtime that the file is for.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, UnknownNameError
from ..models.heads import at_slot
from ..registry import nearest
from ..types import Size
from .folded import FoldedStudent
from .write import Format, probe_images

OPSET = 18

_EXAMPLE: tuple[int, Size] = (2, (4, 6))
"""Batch and sides of the image that is traced; all different, lest the tracer take two for one."""
_PROBES: tuple[tuple[int, Size], ...] = ((1, (2, 3)), (3, (5, 2)), (1, (4, 4)), (2, (1, 7)))
_USAGE = """\
```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
step = int(session.get_modelmeta().custom_metadata_map["size_step"])
pixels = np.random.rand(1, {bands}, {height}, {width}).astype(np.float32)  # in [0, 1]
assert all(side % step == 0 for side in pixels.shape[2:]), f"sides are multiples of {{step}} px"
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
            if self.model.heads[name].has_summary:
                names.append(f"{name}_summary")
            names.append(f"{name}_features")
        return names

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """``[B, 3, H, W]`` to the tensors that :attr:`names` lists."""
        every_block = any(self.model.heads[name].reads_blocks for name, _ in self.heads)
        encoded = self.model.student(pixels, every_block=every_block)
        tokens, spatial = encoded[:2]  # [B, T, D], [B, D, h, w]
        outputs = [tokens[:, self.slots].flatten(1)] if self.slots else []
        outputs.append(spatial)
        for name, slot in self.heads:
            predicted = self.model.heads[name](*at_slot(encoded, slot))
            outputs += [output for output in predicted if output is not None]
        return tuple(outputs)


class Onnx(Format):
    """A graph of the student, and of the heads of some teachers."""

    name, tolerance = "onnx", 1e-4

    def __init__(self, heads: Sequence[str] = ()):
        self.heads = tuple(heads)

    def check(self, student: FoldedStudent) -> None:
        """Refuse unknown heads, missing packages, and a student of one size alone."""
        size = student.model.student.fixed_size
        if size:
            raise ExportError(
                f"onnx: its graph is for images of any size, and this student takes {size[0]}x"
                f"{size[1]} px alone; take timm"
            )
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
        if missing:
            raise ExportError(
                f"onnx needs {', '.join(missing)}; install them: "
                "pip install 'radio-distill[export]'"
            )
        for name in self.heads:
            if name not in student.model.heads:
                known = list(student.model.heads)
                raise UnknownNameError(f"onnx: no head {name!r} ({nearest(name, known)})")

    def write(self, student: FoldedStudent, folder: Path) -> str:
        """Translate to ONNX, with free batch and sides."""
        graph, body = _Graph(student, self.heads).eval(), student.model.student
        step, bands = body.size_step, body.bands
        batch, rows, columns = (torch.export.Dim(n, min=1) for n in ("batch", "rows", "columns"))
        program: Any = torch.onnx.export(
            graph,
            tuple(probe_images(step, [_EXAMPLE], bands)),
            dynamo=True,
            dynamic_shapes=({0: batch, 2: step * rows, 3: step * columns},),
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=graph.names,
            verbose=False,
        )
        for value in program.model.graph.inputs:  # names for people
            value.shape = type(value.shape)(["batch", bands, "height", "width"])
        finer = {
            f"{name}_features": graph.model.heads[name].spatial.upsample for name in self.heads
        }
        for value in program.model.graph.outputs:
            sides = ["rows", "columns"] if len(value.shape) == 4 else []
            if (times := finer.get(value.name, 1)) > 1:
                sides = [f"{times}*{side}" for side in sides]
            value.shape = type(value.shape)(["batch", value.shape[1], *sides])
        program.model.metadata_props.update(_metadata(student))
        program.save(folder / "model.onnx")  # with external data where protobuf's 2 GB are too few
        return "model.onnx"

    def usage(self, student: FoldedStudent) -> str:
        """Return an example for :func:`.model_card.model_card`."""
        height, width = student.preferred_size
        names = json.dumps(_Graph(student, self.heads).names)
        body = student.model.student
        shape = {"height": height, "width": width, "bands": body.bands}
        return _USAGE.format(**shape, names=names, step=body.size_step)

    def read_back(
        self, student: FoldedStudent, folder: Path
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the outputs of the student and of onnxruntime."""
        import onnxruntime

        file, providers = str(folder / "model.onnx"), ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(file, providers=providers)
        graph = _Graph(student, self.heads).eval()
        body = student.model.student
        for pixels in probe_images(body.size_step, _PROBES, body.bands):
            try:
                outputs = session.run(None, {"pixels": pixels.numpy()})
            except Exception as error:  # onnxruntime has a class of its own for every status
                shape, reason = "x".join(map(str, pixels.shape)), " ".join(str(error).split())
                raise ExportError(
                    f"onnx: onnxruntime refuses a batch of {shape}: {reason}"
                ) from error
            expected = dict(zip(graph.names, graph(pixels), strict=True))
            yield expected, dict(zip(graph.names, map(torch.from_numpy, outputs), strict=True))


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
