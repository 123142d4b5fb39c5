"""A model folder of a student that is a timm model; ``radio_distill.load`` reads it, heads and all.

::

    FOLDER/
        config.json             architecture and arguments of timm, normalisation
        model.safetensors       the model, under timm's names
        adaptors.safetensors    heads, folded
        radio_distill.json      student, teachers, what was trained
        README.md               model card

timm makes the whole model, so parts that a student leaves out (a last stage behind the map,
pooling) are in the file as a new model has them, untrained.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..models.timm_student import TimmStudent, create_model
from ..types import Size
from .folded import FoldedStudent
from .write import Format, probe_images, write_heads, write_json, write_tensors

EXAMPLE = """\
```python
import timm
import torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))

pixels = (torch.rand(1, {bands}, {height}, {width}) - mean) / std  # of pixels in [0, 1]
{code}
```
"""
"""The way to read a folder with timm, up to normalised pixels, and what follows."""
_USAGE = f"""\
{EXAMPLE}
`features` are [1, {{channels}}, {{rows}}, {{columns}}], the summary has {{summary}} channels.
With the heads: `radio_distill.load("FOLDER")`."""


def write_model(
    student: FoldedStudent,
    folder: Path,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    size: Size | None = None,
    **pretrained: Any,
) -> None:
    """Write a folder that timm reads: ``config.json`` and ``model.safetensors``.

    Args:
        student: what is exported.
        folder: where to.
        described: timm's name of the model as ``architecture``, its arguments as ``model_args``.
        tensors: under timm's names.
        size: (height, width) of the one size that the file takes; None for any.
        pretrained: further lines of timm's ``pretrained_cfg``.
    """
    body = student.model.student
    config = {
        **described,
        "num_classes": 0,
        "num_features": body.embed_dim,
        "pretrained_cfg": {
            "tag": student.checkpoint.recipe.name,
            "custom_load": False,
            "input_size": [body.bands, *(size or student.preferred_size)],
            "fixed_input_size": size is not None,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": body.mean.flatten().tolist(),
            "std": body.std.flatten().tolist(),
            "num_classes": 0,
            **pretrained,
        },
    }
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)


class TimmBody(Format):
    """The timm model that a student is."""

    name, tolerance = "timm", 1e-5

    def __init__(self, size: Size | None = None):
        self.size = size

    def check(self, student: FoldedStudent) -> None:
        """Refuse a size, since the model is what it is, and a norm that timm's model lacks."""
        if self.size is not None:
            raise ExportError(
                f"timm: {student.config.architecture} has no table of positions to be cut for one "
                "size; leave out the size"
            )
        if student.config.final_norm and not _body_of(student).norm_name:
            raise ExportError(
                f"timm cannot hold student.final_norm of {student.config.architecture}, whose "
                "model has no norm there; export it as onnx"
            )

    def write(self, student: FoldedStudent, folder: Path) -> str:
        """Write weights, heads and configurations."""
        body = _body_of(student)
        arguments = dict(body.arguments)
        side = getattr(getattr(body.body, "patch_embed", None), "img_size", None)
        if side and getattr(body.body, "pos_embed", None) is not None:  # the table's own grid
            arguments["img_size"] = list(side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            whole = create_model(student.plain_config)[0].state_dict()
        name = student.config.architecture.partition(".")[0]
        described = {"architecture": name, "model_args": arguments}
        write_model(student, folder, described, whole | body.to_timm(), body.fixed_size)
        write_heads(student, folder)
        return ""

    def usage(self, student: FoldedStudent) -> str:
        """Return an example for :func:`.model_card.model_card`."""
        body, (height, width) = _body_of(student), student.preferred_size
        rows, columns = body.grid((height, width))
        return _USAGE.format(
            bands=body.bands,
            height=height,
            width=width,
            code="\n".join(_code(body)),
            channels=body.embed_dim,
            rows=rows,
            columns=columns,
            summary=body.summary_dim,
        )

    def read_back(
        self, student: FoldedStudent, folder: Path
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the outputs of the student and of the card's lines with timm's model."""
        import timm

        body = _body_of(student)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        shapes: list[tuple[int, Size]] = [(1, (1, 2)), (2, (3, 2))]
        step = body.size_step
        if body.fixed_size:
            step, shapes = 1, [(2, body.fixed_size)]
        for pixels in probe_images(step, shapes, body.bands):
            normalised = (pixels - body.mean) / body.std
            found: dict[str, Any] = {"torch": torch, "model": model, "pixels": normalised}
            exec("\n".join(_code(body)), found)  # our own lines, above
            tokens, spatial = body(pixels)
            expected = {"summary": tokens[:, 0], "features": spatial}
            yield expected, {name: found[name] for name in expected}


def _body_of(student: FoldedStudent) -> TimmStudent:
    body = student.model.student
    assert isinstance(body, TimmStudent), "another format's student"
    return body


def _code(body: TimmStudent) -> Iterator[str]:
    """Yield the lines that compute ``features`` and ``summary`` of ``pixels`` with timm alone."""
    call = f"model.forward_intermediates(pixels, indices=[{body.level}], "
    call += "intermediates_only=True, stop_early=True"
    if body.num_prefix_tokens:
        yield f"features, tokens = {call}, return_prefix_tokens=True)[0]"
    else:
        yield f"features = {call})[0]"
    if body.summary == "token":
        yield "summary = tokens[:, 0]"
    elif body.summary == "mean":
        yield "summary = features.mean((2, 3))"
    else:
        yield "summary = model.forward_head(model.forward_features(pixels), pre_logits=True)"
    if body.config.map == "resized":
        yield f"grid = [side // {body.patch_size} for side in pixels.shape[2:]]"
        yield "resize = torch.nn.functional.interpolate"
        yield 'features = resize(features, grid, mode="bilinear", antialias=True)'
    if body.norm_name == "norm":
        yield "summary = model.norm(summary)"
        yield "features = model.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    elif body.norm_name:
        yield f"summary = model.{body.norm_name}(summary[:, :, None, None]).flatten(1)"
        yield f"features = model.{body.norm_name}(features)"
