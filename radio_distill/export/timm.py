"""A model folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads.

::

    FOLDER/
        config.json          architecture and arguments of timm, normalisation
        model.safetensors    body, under timm's names
        README.md            model card

timm carries RADIO twice. Its NaFlexViT resizes the table of positions to every input as RADIO
does; :func:`export` writes that one, which takes every size. Its plain VisionTransformer has
positions for one size only; :func:`export_plain` writes it for code that expects that class. Both
take the name of one of timm's ``*_radio_*`` models where the blocks are the same, else the name of
the student's own architecture; ``model_args`` in config.json say what differs.

timm has one class token and calls all other prefix tokens registers: summary token ``i`` is token
``i`` of ``forward_features``. It has no place for the heads, and none for windows.
"""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ExportError
from ..models.student import Student
from ..types import Size
from .files import new_folder, write_json
from .folded import FoldedStudent
from .model_card import model_card
from .parity import check_equal, probe_images

NAME = "timm"
TOLERANCE = 1e-5
"""Largest difference from the student, see :func:`.parity.check_equal`."""

logger = logging.getLogger(__name__)

_PROBES: list[tuple[int, Size]] = [(1, (4, 4)), (3, (2, 5)), (1, (7, 3))]
_USAGE = """\
```python
import timm
import torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

pixels = torch.rand(1, 3, {height}, {width})  # RGB in [0, 1]
tokens = model.forward_features((pixels - mean) / std)  # [1, {tokens}, {channels}]
features = tokens[:, {prefix}:].reshape(1, {rows}, {columns}, {channels})
{summaries}
```

timm normalises outside of the model, calls all prefix tokens but the first registers, and has no
place for the teachers' heads.{only}"""


@dataclass(frozen=True)
class _Layout:
    """One of timm's models, and the student under its names."""

    architecture: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    size: Size | None
    """The only size that it takes, None for any."""


def check(student: FoldedStudent) -> None:
    """Raise ExportError where timm's NaFlexViT cannot hold a student, with the reason."""
    _flexible(student)


def export(student: FoldedStudent, folder: Path) -> Path:
    """Write a NaFlexViT, which takes images of every size as the student does; returns the folder.

    Raises:
        ExportError: where timm cannot hold the student, or the folder cannot be written.
    """
    return _write(student, _flexible(student), folder)


def export_plain(student: FoldedStudent, folder: Path, size: Size) -> Path:
    """Write a plain VisionTransformer for images of one size; returns the folder.

    Args:
        student: what is exported.
        folder: new folder.
        size: (height, width) in pixels, any aspect ratio.

    Raises:
        ConfigError: where the patch does not divide the size.
        ExportError: where timm cannot hold the student, or the folder cannot be written.
    """
    return _write(student, _plain(student, size), folder)


def _flexible(student: FoldedStudent) -> _Layout:
    body = student.model.student
    arguments = {
        **_common_arguments(student),
        "pos_embed_grid_size": list(body.positions.table.shape[:2]),
        "pos_embed_interp_mode": "bilinear",
        "pos_embed_ar_preserving": True,  # resize to a square of the longer side, then crop
        "pos_embed_antialias": False,
        "pos_embed_align_corners": False,
    }
    side = body.patch_size
    tensors = {
        **_prefix_tensors(body, "embeds."),
        "embeds.pos_embed": rearrange(body.positions.table, "y x d -> 1 y x d"),
        "embeds.proj.weight": rearrange(
            body.patch_embedding.weight, "d (c y x) -> d (y x c)", y=side, x=side
        ),
        **_bias(body, "embeds.proj.bias"),
        **_block_tensors(body),
    }
    name = _radio_model(student, "naflexvit_*_radio_*")
    if not name:
        name, arguments["use_naflex"] = _own_architecture(student), True
        _check_buildable(student, arguments)
    return _Layout(name, arguments, tensors, None)


def _plain(student: FoldedStudent, size: Size) -> _Layout:
    body = student.model.student
    positions = body.positions(body.grid(size))
    arguments = {
        **_common_arguments(student),
        "img_size": list(size),
        "dynamic_img_size": False,
        "no_embed_class": True,
    }
    side = body.patch_size
    tensors = {
        **_prefix_tensors(body, ""),
        "pos_embed": rearrange(positions, "1 h w d -> 1 (h w) d"),
        "patch_embed.proj.weight": rearrange(
            body.patch_embedding.weight, "d (c y x) -> d c y x", y=side, x=side
        ),
        **_bias(body, "patch_embed.proj.bias"),
        **_block_tensors(body),
    }
    name = _radio_model(student, "vit_*_radio_*") or _own_architecture(student)
    return _Layout(name, arguments, tensors, size)


def _common_arguments(student: FoldedStudent) -> dict[str, Any]:
    """Return what every layout tells timm.

    Raises:
        ExportError: where the student attends in windows.
    """
    body, window = student.model.student, student.config.window_size
    if window:
        raise ExportError(
            f"{NAME} cannot hold student.window_size {window}: its vision transformers attend "
            "globally in every block; export it as onnx"
        )
    return {
        "patch_size": body.patch_size,
        "class_token": True,
        "reg_tokens": body.num_prefix_tokens - 1,
        "global_pool": "token",
        "fc_norm": False,
        "final_norm": not isinstance(body.norm, nn.Identity),
    }


def _own_architecture(student: FoldedStudent) -> str:
    return student.config.architecture.partition(".")[0]


def _radio_model(student: FoldedStudent, pattern: str) -> str:
    """Return the newest of timm's RADIO models that has the student's blocks, or nothing."""
    import timm

    if not isinstance(student.model.student.norm_pre, nn.Identity):
        return ""
    names = sorted(timm.list_models(pattern), key=lambda name: name.rpartition("_v")[2])
    blocks = _blocks_of(_own_architecture(student))
    return next((name for name in reversed(names) if _blocks_of(name) == blocks), "")


@cache
def _blocks_of(name: str) -> str:
    """Describe the blocks of one of timm's models, so that equal ones have equal descriptions."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    return f"{model.blocks[0].attn.num_heads} heads, {model.blocks}"


def _check_buildable(student: FoldedStudent, arguments: dict[str, Any]) -> None:
    """Raise ExportError where timm makes no NaFlexViT of the student's own architecture."""
    import timm

    name = _own_architecture(student)
    try:
        timm.create_model(name, num_classes=0, device="meta", **arguments)
    except TypeError as error:  # not one of timm's module vision_transformer
        raise ExportError(
            f"{NAME} makes no NaFlexViT, which takes every size, of student.architecture {name!r}; "
            "export it for one size, or as onnx"
        ) from error


def _prefix_tensors(body: Student, parent: str) -> dict[str, Tensor]:
    tokens = rearrange(body.prefix_tokens, "p d -> 1 p d")
    tensors = {f"{parent}cls_token": tokens[:, :1], f"{parent}reg_token": tokens[:, 1:]}
    return {key: value for key, value in tensors.items() if value.shape[1]}


def _bias(body: Student, key: str) -> dict[str, Tensor]:
    """Return a bias of zeros for the patch embedding, which timm has unless a norm follows."""
    if isinstance(body.norm_pre, nn.Identity):
        return {key: torch.zeros(body.embed_dim)}
    return {}


def _block_tensors(body: Student) -> dict[str, Tensor]:
    parts = {"norm_pre": body.norm_pre, "blocks": body.blocks, "norm": body.norm}
    return {
        f"{part}.{key}": value
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }


def _write(student: FoldedStudent, layout: _Layout, folder: Path) -> Path:
    with new_folder(folder) as draft:
        write_json(draft / "config.json", _config(student, layout))
        tensors = {key: value.contiguous() for key, value in layout.tensors.items()}
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        card = model_card(student, _usage(student, layout.size), library="timm")
        (draft / "README.md").write_text(card, encoding="utf-8")
        difference = _verify(student, draft, layout.size)
    logger.info("%s: %s, largest difference %.1e", folder, layout.architecture, difference)
    return folder


def _config(student: FoldedStudent, layout: _Layout) -> dict[str, Any]:
    body = student.model.student
    return {
        "architecture": layout.architecture,
        "num_classes": 0,
        "num_features": body.embed_dim,
        "global_pool": "token",
        "model_args": layout.arguments,
        "pretrained_cfg": {
            "tag": student.checkpoint.recipe.name,
            "custom_load": False,
            "input_size": [3, *(layout.size or student.preferred_size)],
            "fixed_input_size": layout.size is not None,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": body.mean.flatten().tolist(),
            "std": body.std.flatten().tolist(),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj" if layout.size else "embeds.proj",
            "classifier": "head",
        },
    }


def _usage(student: FoldedStudent, size: Size | None) -> str:
    body = student.model.student
    height, width = size or student.preferred_size
    rows, columns = body.grid((height, width))
    slots = dict(zip(student.summary_teachers, student.summary_slots, strict=True))
    only = f" This file takes images of {height}x{width} px only." if size else ""
    return _USAGE.format(
        height=height,
        width=width,
        tokens=body.num_prefix_tokens + rows * columns,
        channels=body.embed_dim,
        prefix=body.num_prefix_tokens,
        rows=rows,
        columns=columns,
        summaries="\n".join(f"tokens[:, {i}]  # summary for {name}" for name, i in slots.items()),
        only=only,
    )


@torch.no_grad()
def _verify(student: FoldedStudent, folder: Path, size: Size | None) -> float:
    """Return the largest difference of what timm reads from the student.

    Raises:
        ExportError: where it reads another model than was written.
    """
    import timm

    body = student.model.student
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    differences = []
    step, shapes = (1, [(1, size)]) if size else (body.patch_size, _PROBES)
    for pixels in probe_images(step, shapes):
        tokens = model.forward_features((pixels - body.mean) / body.std)
        summary, spatial = body(pixels)
        expected = {"summary": summary, "features": rearrange(spatial, "b d h w -> b (h w) d")}
        found = {
            "summary": tokens[:, : body.num_summary_tokens],
            "features": tokens[:, body.num_prefix_tokens :],
        }
        differences.append(check_equal(NAME, expected, found, TOLERANCE))
    return max(differences)
