"""A model folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads.

::

    FOLDER/
        config.json          architecture and arguments of timm, normalisation
        model.safetensors    body, under timm's names
        README.md            model card

timm carries RADIO twice. Its NaFlexViT resizes the table of positions to every input as RADIO
does, and takes every size; its plain VisionTransformer has positions for one size only, and is for
code that expects that class. Both take the name of one of timm's ``*_radio_*`` models where the
blocks are the same, else the name of the student's own architecture; ``model_args`` in config.json
say what differs.

timm has one class token and calls all other prefix tokens registers: summary token ``i`` is token
``i`` of ``forward_features``. It has no place for the heads, and none for windows.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import ExportError
from ..types import Size
from .folded import FoldedStudent
from .timm_body import EXAMPLE, TimmBody, write_model
from .write import Format, probe_images

_PROBES: list[tuple[int, Size]] = [(1, (4, 4)), (3, (2, 5)), (1, (7, 3))]
_USAGE = f"""\
{EXAMPLE}
timm normalises outside of the model, calls all prefix tokens but the first registers, and has no
place for the teachers' heads.{{only}}"""
_CODE = """\
tokens = model.forward_features(pixels)  # [1, {tokens}, {channels}]
features = tokens[:, {prefix}:].reshape(1, {rows}, {columns}, {channels})
"""


class Timm(Format):
    """A NaFlexViT for images of every size, or a plain VisionTransformer for one ``size``."""

    name, tolerance = "timm", 1e-5

    def __init__(self, size: Size | None = None):
        self.size = size

    def for_student(self, student: FoldedStudent) -> Format:
        """Return what writes a timm model as it is, for a student that is one."""
        return TimmBody(self.size) if student.config.body == "timm" else self

    def check(self, student: FoldedStudent) -> None:
        """Refuse windows, a size that the patch does not divide, and what is no NaFlexViT."""
        import timm

        if window := student.config.window_size:
            raise ExportError(
                f"timm cannot hold student.window_size {window}: its vision transformers attend "
                "globally in every block; export it as onnx"
            )
        if self.size is not None:
            student.vit.grid(self.size)
            return
        name, arguments = self._model(student)
        try:
            timm.create_model(name, num_classes=0, device="meta", **arguments)
        except TypeError as error:  # not one of timm's module vision_transformer
            raise ExportError(
                f"timm makes no NaFlexViT, which takes every size, of student.architecture "
                f"{name!r}; export it for one size, or as onnx"
            ) from error

    def write(self, student: FoldedStudent, folder: Path) -> str:
        """Write weights and configuration."""
        first = "patch_embed.proj" if self.size else "embeds.proj"
        usual = {"pool_size": None, "first_conv": first, "classifier": "head"}
        name, arguments = self._model(student)
        described = {"architecture": name, "global_pool": "token", "model_args": arguments}
        write_model(student, folder, described, self._tensors(student), self.size, **usual)
        return ""

    def usage(self, student: FoldedStudent) -> str:
        """Return an example for :func:`.model_card.model_card`."""
        body, (height, width) = student.vit, self.size or student.preferred_size
        rows, columns = body.grid((height, width))
        slots = zip(student.summary_teachers, student.summary_slots, strict=True)
        only = f" This file takes images of {height}x{width} px only." if self.size else ""
        code = _CODE.format(
            tokens=body.num_prefix_tokens + rows * columns,
            channels=body.embed_dim,
            prefix=body.num_prefix_tokens,
            rows=rows,
            columns=columns,
        )
        code += "\n".join(f"tokens[:, {slot}]  # summary for {name}" for name, slot in slots)
        return _USAGE.format(bands=body.bands, height=height, width=width, code=code, only=only)

    def read_back(
        self, student: FoldedStudent, folder: Path
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the outputs of the student and of timm's model."""
        import timm

        body = student.vit
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        step, shapes = (1, [(1, self.size)]) if self.size else (body.patch_size, _PROBES)
        for pixels in probe_images(step, shapes, body.bands):
            tokens = model.forward_features((pixels - body.mean) / body.std)
            summary, spatial = body(pixels)
            expected = {"summary": summary, "features": rearrange(spatial, "b d h w -> b (h w) d")}
            found = {
                "summary": tokens[:, : body.num_summary_tokens],
                "features": tokens[:, body.num_prefix_tokens :],
            }
            yield expected, found

    def _model(self, student: FoldedStudent) -> tuple[str, dict[str, Any]]:
        """Return the name of timm's model, and its arguments."""
        body = student.vit
        arguments: dict[str, Any] = {
            "patch_size": body.patch_size,
            "class_token": True,
            "reg_tokens": body.num_prefix_tokens - 1,
            "global_pool": "token",
            "fc_norm": False,
            "final_norm": not isinstance(body.norm, nn.Identity),
        }
        if body.bands != 3:
            arguments["in_chans"] = body.bands
        own = student.config.architecture.partition(".")[0]
        if self.size is not None:
            size = {"img_size": list(self.size), "dynamic_img_size": False, "no_embed_class": True}
            return _radio_model(student, "vit_*_radio_*") or own, arguments | size
        arguments |= {
            "pos_embed_grid_size": list(body.positions.table.shape[:2]),
            "pos_embed_interp_mode": "bilinear",
            "pos_embed_ar_preserving": True,  # resize to a square of the longer side, then crop
            "pos_embed_antialias": False,
            "pos_embed_align_corners": False,
        }
        if name := _radio_model(student, "naflexvit_*_radio_*"):
            return name, arguments
        return own, arguments | {"use_naflex": True}

    def _tensors(self, student: FoldedStudent) -> dict[str, Tensor]:
        """Return the body under timm's names."""
        body, side = student.vit, student.vit.patch_size
        patches, tokens = body.patch_embedding.weight, body.prefix_tokens[None]
        if self.size is None:
            parent, proj = "embeds.", "embeds.proj"
            positions = rearrange(body.positions.table, "y x d -> 1 y x d")
            patches = rearrange(patches, "d (c y x) -> d (y x c)", y=side, x=side)
        else:
            parent, proj = "", "patch_embed.proj"
            positions = rearrange(body.positions(body.grid(self.size)), "1 h w d -> 1 (h w) d")
            patches = rearrange(patches, "d (c y x) -> d c y x", y=side, x=side)
        tensors = {
            f"{parent}cls_token": tokens[:, :1],
            f"{parent}reg_token": tokens[:, 1:],
            f"{parent}pos_embed": positions,
            f"{proj}.weight": patches,
        }
        if isinstance(body.norm_pre, nn.Identity):  # timm's has a bias unless a norm follows
            tensors[f"{proj}.bias"] = torch.zeros(body.embed_dim)
        for part in ("norm_pre", "blocks", "norm"):
            state = body.get_submodule(part).state_dict()
            tensors |= {f"{part}.{key}": value for key, value in state.items()}
        return {key: value for key, value in tensors.items() if value.numel()}


def _radio_model(student: FoldedStudent, pattern: str) -> str:
    """Return the newest of timm's RADIO models that has the student's blocks, or nothing."""
    import timm

    if not isinstance(student.vit.norm_pre, nn.Identity):
        return ""
    names = sorted(timm.list_models(pattern), key=lambda name: name.rpartition("_v")[2])
    blocks = _blocks_of(student.config.architecture.partition(".")[0])
    return next((name for name in reversed(names) if _blocks_of(name) == blocks), "")


@cache
def _blocks_of(name: str) -> str:
    """Describe the blocks of one of timm's models, so that equal ones have equal descriptions."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    return f"{model.blocks[0].attn.num_heads} heads, {model.blocks}"
