"""One checkpoint file in the layout that the torch.hub code of NVlabs/RADIO reads, heads included.

The file holds ``state_dict``, ``args`` (an ``argparse.Namespace``), ``arch`` and ``epoch``. That
code builds the body by the name of its architecture, so only the sizes of body that it knows are
written, under its names. It builds LayerScale, as ``ls1.grandma``, in its "v2" bodies only.
"""

from argparse import Namespace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..models.projectors import MLPHead, Projector
from ..system.files import reason_of
from .blocks import block_shape, body_tensors
from .folded import FoldedStudent
from .write import Format

_ARCHITECTURES = {
    # width, depth, attention heads, channels in the MLP, LayerScale
    (192, 12, 3, 768, False): "vit_tiny_patch16_224",
    (384, 12, 6, 1536, False): "vit_small_patch16_224",
    (768, 12, 12, 3072, False): "vit_base_patch16_224",
    (768, 12, 12, 3072, True): "vit_base_patch16_v2_224",
    (1024, 24, 16, 4096, False): "vit_large_patch16_224",
    (1024, 24, 16, 4096, True): "vit_large_patch16_v2_224",
    (1152, 27, 16, 4304, False): "vit_so400m_patch16_224",
    (1152, 27, 16, 4320, False): "vit_so400m_patch16_v2_224",
    (1280, 32, 16, 5120, False): "vit_huge_patch16_224",
    (1536, 40, 24, 6144, False): "vit_giant_patch16_224",
}
_UNUSED: dict[str, Any] = {
    "pretrained": False,
    "initial_checkpoint": "",
    "torchscript": False,
    "drop": 0.0,
    "spectral_reparam": False,
    "spectral_heads": False,
    "register_multiple": None,
    **dict.fromkeys(
        ("in_chans", "input_size", "num_classes", "drop_path", "drop_block", "gp", "bn_momentum",
         "bn_eps", "damp")
    ),
}  # fmt: skip
"""Arguments that the hub's code reads and that say nothing of a folded student."""
_USAGE = """\
```python
import torch

model = torch.hub.load(
    "NVlabs/RADIO", "radio_model", version="{file}", adaptor_names={names}
)
```

The hub's code is under a licence of its own, which does not allow commercial use, and it unpickles
the file: load only files that you trust."""


class Radio(Format):
    """``RECIPE.pth.tar``. It is not read back, since its reader is not ours to install."""

    name = "radio"

    def check(self, student: FoldedStudent) -> None:
        """Refuse what the hub's code would not build."""
        if student.vit.bands != 3:
            raise ExportError(
                f"radio cannot hold a student of {student.vit.bands} bands: its code reads RGB; "
                "export it as transformers, timm or onnx"
            )
        if student.config.window_size:
            raise ExportError(
                f"radio cannot hold student.window_size {student.config.window_size}: a checkpoint "
                "of this layout cannot say it; export it as onnx"
            )
        for name, head in student.model.heads.items():
            kinds = head.projectors.values()
            if any(not _is_plain(kind) for kind in kinds):
                raise ExportError(
                    f"radio cannot hold student.heads: that of {name} is no plain MLP with biases, "
                    "which alone its code reads; export it as transformers or onnx"
                )
        shape = block_shape(student, self.name)
        what = f"radio cannot hold student.architecture {student.config.architecture!r}"
        if shape.gated or (shape.activation, shape.eps, shape.qkv_bias) != ("gelu", 1e-6, True):
            raise ExportError(
                f"{what}: its bodies have GELU, a bias on queries, keys and values, and norms of "
                "eps 1e-6; export it as transformers or onnx"
            )
        if _numbers(student) not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES.values())
            raise ExportError(
                f"{what}: its code knows no body of these sizes (it knows {known}); export it as "
                "transformers or onnx"
            )

    def write(self, student: FoldedStudent, folder: Path) -> str:
        """Write the checkpoint."""
        arguments = _arguments(student)
        content = {
            "state_dict": _tensors(student),
            "args": arguments,
            "arch": arguments.model,
            "epoch": 0,
        }
        try:
            torch.save(content, folder / _file(student))
        except RuntimeError as error:  # torch's way of saying that the disk is full
            raise OSError(reason_of(error)) from error
        return _file(student)

    def usage(self, student: FoldedStudent) -> str:
        """Return an example for :func:`.model_card.model_card`."""
        return _USAGE.format(file=_file(student), names=list(student.checkpoint.teachers))


def _is_plain(kind: Projector) -> bool:
    return type(kind) is MLPHead and kind.fc1.bias is not None and kind.upsample == 1


def _file(student: FoldedStudent) -> str:
    return f"{student.checkpoint.recipe.name}.pth.tar"


def _numbers(student: FoldedStudent) -> tuple[int, int, int, int, bool]:
    body, shape = student.vit, block_shape(student, Radio.name)
    return body.embed_dim, len(body.blocks), shape.heads, shape.mlp_hidden, shape.layer_scale


def _tensors(student: FoldedStudent) -> dict[str, Tensor]:
    body = student.vit
    tensors = {
        f"base_model.{key.replace('.gamma', '.grandma')}": value
        for key, value in body_tensors(body).items()
    }
    if block_shape(student, Radio.name).layer_scale:  # v2 bodies have registers that nothing reads
        tensors["base_model.reg_token"] = torch.zeros(1, 4, body.embed_dim)
    if student.config.final_norm:
        tensors |= _below("base_model.norm", body.norm)
    tensors["input_conditioner.norm_mean"] = body.mean
    tensors["input_conditioner.norm_std"] = body.std
    for label, head in zip(_labels(student), student.model.heads.values(), strict=True):
        tensors |= _below(f"_feature_projections.{label}", head.spatial)
        if head.summary is not None:
            tensors |= _below(f"_heads.{label}", head.summary)
    return {key: value.contiguous() for key, value in tensors.items()}


def _below(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}


def _labels(student: FoldedStudent) -> list[str]:
    """Name each teacher's heads: by its name, or by its place where one name begins another's.

    The hub's code finds heads by the beginning of their keys, so ``dino`` would catch ``dinov3``.
    """
    names = list(student.checkpoint.teachers)
    if any(longer.startswith(name) for name, longer in permutations(names, 2)):
        return [str(place) for place in range(len(names))]
    return names


def _arguments(student: FoldedStudent) -> Namespace:
    """Return the training arguments that the hub's code asks for."""
    body, versions = student.vit, {"mlp_version": "v2", "spatial_mlp_version": "v2"}
    teachers = [
        {
            "name": name,
            "type": "generic",  # one that asks for no text encoder
            "model": student.checkpoint.recipe.teachers[name].preset,
            "use_summary": spec.summary_channels is not None,
            "token_slot": slot,
            **versions,
        }
        for slot, (name, spec) in enumerate(student.checkpoint.teachers.items())
    ]
    return Namespace(
        model=_ARCHITECTURES[_numbers(student)],
        model_kwargs={} if body.patch_size == 16 else {"patch_size": body.patch_size},
        model_norm=student.config.final_norm,
        cpe_max_size=len(body.positions.table) * body.patch_size,
        cpe_num_registers=body.num_prefix_tokens - body.num_summary_tokens,
        cls_token_per_teacher=True,
        teachers=teachers,
        dtype=torch.float32,
        **versions,
        **_UNUSED,
    )
