"""A model folder that ``transformers.AutoModel`` reads as its own RadioModel, without remote code.

::

    FOLDER/
        config.json                RadioConfig
        model.safetensors          body, under the names of the published RADIO models
        preprocessor_config.json   images to [0, 1]; normalisation is inside the model
        adaptors.safetensors       heads, "<teacher>.summary.fc1.weight" …, in the teachers' space
        radio_distill.json         what the heads are, for radio_distill.load
        README.md                  model card

transformers translates the published names when it loads, but for LayerScale, which it would drop
with no more than a line in its log. So LayerScale is written under transformers' own name, and the
folder is read back and compared with the student before it gets its final name.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import ExportError
from ..system.progress import quiet_transformers
from .blocks import BlockShape, block_shape, body_tensors
from .folded import FoldedStudent
from .write import Format, probe_images, write_heads, write_json, write_tensors

_GAPS = ("missing_keys", "unexpected_keys", "mismatched_keys")

_USAGE = """\
```python
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER").eval()
pixels = torch.rand(1, {bands}, {height}, {width})  # in [0, 1]; sides are multiples of {patch}
output = model(pixels)
output.summary  # [1, {summary}]
output.features  # [1, {cells}, {width_of_model}]
```

The heads of the teachers are in `adaptors.safetensors`, which transformers does not read:

```python
import radio_distill

model = radio_distill.load("FOLDER")
```"""


class Transformers(Format):
    """A RadioModel."""

    name, tolerance = "transformers", 1e-4

    def check(self, student: FoldedStudent) -> None:
        """Refuse what RadioModel cannot hold."""
        _ = student.vit  # another body is refused
        if window := student.config.window_size:
            raise _refusal(f"student.window_size {window}: RadioModel attends globally everywhere")
        if student.config.final_norm:
            raise _refusal("student.final_norm: RadioModel ends with its last block")
        shape = block_shape(student, self.name)
        if shape.gated and shape.mlp_hidden % 8:
            raise _refusal(
                f"a SwiGLU of {shape.mlp_hidden} channels: RadioModel rounds to multiples of 8"
            )

    def write(self, student: FoldedStudent, folder: Path) -> str:
        """Write weights, heads and configurations."""
        _config(student).save_pretrained(folder)
        write_tensors(folder / "model.safetensors", _tensors(student))
        write_json(folder / "preprocessor_config.json", _preprocessor(student))
        write_heads(student, folder)
        return ""

    def usage(self, student: FoldedStudent) -> str:
        """Return an example for :func:`.model_card.model_card`."""
        body, (height, width) = student.vit, student.preferred_size
        return _USAGE.format(
            bands=body.bands,
            height=height,
            width=width,
            patch=body.patch_size,
            summary=len(student.summary_slots) * body.embed_dim,
            cells=height * width // body.patch_size**2,
            width_of_model=body.embed_dim,
        )

    def read_back(
        self, student: FoldedStudent, folder: Path
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the outputs of the student and of what transformers reads.

        Raises:
            ExportError: something that was written is not read.
        """
        with quiet_transformers():
            model, report = _library().AutoModel.from_pretrained(folder, output_loading_info=True)
        gaps = [
            f"{kind.replace('_', ' ')}: {key}" for kind in _GAPS for key in sorted(report[kind])
        ]
        if gaps:
            raise ExportError(
                f"transformers does not take all that was written ({gaps[0]}); report it"
            )
        body = student.vit
        for pixels in probe_images(body.patch_size, [(1, (2, 3))], body.bands):
            tokens, spatial = body(pixels)
            expected = {"features": rearrange(spatial, "b d h w -> b (h w) d")}
            if student.summary_slots:
                expected["summary"] = tokens[:, student.summary_slots].flatten(1)
            yield expected, model.eval()(pixels)


def _refusal(what: str) -> ExportError:
    return ExportError(f"transformers cannot hold {what}; export it as onnx")


def _library() -> Any:
    """Import transformers; raises ExportError where it is missing, or older than RadioModel."""
    try:
        import transformers
    except ImportError as error:
        raise ExportError(
            "transformers is not installed; pip install 'radio-distill[hf]'"
        ) from error
    if not hasattr(transformers, "RadioModel"):
        version = transformers.__version__
        raise ExportError(f"transformers {version} has no RadioModel; install a newer one")
    return transformers


def _config(student: FoldedStudent) -> Any:
    """Return the RadioConfig."""
    body, shape = student.vit, block_shape(student, Transformers.name)
    return _library().RadioConfig(
        architectures=["RadioModel"],
        dtype="float32",
        hidden_size=body.embed_dim,
        num_hidden_layers=len(body.blocks),
        num_attention_heads=shape.heads,
        mlp_ratio=_mlp_ratio(shape, body.embed_dim),
        hidden_act=shape.activation,
        layer_norm_eps=shape.eps,
        use_swiglu_ffn=shape.gated,
        qkv_bias=shape.qkv_bias,
        num_channels=body.bands,
        patch_size=body.patch_size,
        image_size=max(student.preferred_size),
        max_img_size=len(body.positions.table) * body.patch_size,
        num_cls_tokens=body.num_summary_tokens,
        num_registers=body.num_prefix_tokens - body.num_summary_tokens,
        summary_idxs=student.summary_slots,
        norm_mean=body.mean.flatten().tolist(),
        norm_std=body.std.flatten().tolist(),
    )


def _mlp_ratio(shape: BlockShape, width: int) -> float:
    """Return the ratio of which RadioModel, which cuts its product down, makes this MLP."""
    hidden = shape.mlp_hidden * 3 // 2 if shape.gated else shape.mlp_hidden
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _tensors(student: FoldedStudent) -> dict[str, Tensor]:
    """Return the tensors under the names that the published models have on the hub."""
    body, shape = student.vit, block_shape(student, Transformers.name)
    tensors = {}
    for key, value in body_tensors(body).items():
        for name, part in _translated(key, value, shape.gated).items():
            tensors[f"radio_model.model.{name}"] = part
    return {
        **tensors,
        "radio_model.summary_idxs": torch.tensor(student.summary_slots, dtype=torch.long),
        "radio_model.input_conditioner.norm_mean": body.mean,
        "radio_model.input_conditioner.norm_std": body.std,
    }


def _translated(key: str, value: Tensor, gated: bool) -> dict[str, Tensor]:
    """Give a tensor transformers' own name where it translates the published one wrongly."""
    if key.endswith(".gamma"):
        block, scale = key.removesuffix(".gamma").rsplit(".ls", 1)
        return {f"{block}.layer_scale{scale}.lambda1": value}
    if gated and ".mlp.fc1." in key:
        gate, up = value.chunk(2)
        return {key.replace("fc1", "gate_proj"): gate, key.replace("fc1", "up_proj"): up}
    return {key.replace(".mlp.fc2.", ".mlp.down_proj.") if gated else key: value}


def _preprocessor(student: FoldedStudent) -> dict[str, Any]:
    """Describe transformers' image processor: resize, and nothing but [0, 1]."""
    height, width = student.preferred_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }
