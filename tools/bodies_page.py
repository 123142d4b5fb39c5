"""Print docs/reference/bodies.md: families of student bodies, and what holds for each.

    python -m tools.bodies_page > docs/reference/bodies.md

Each row is measured on a small random model of the family, exports included, in minutes.
"""

import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from radio_distill.config import Recipe, StudentConfig, build
from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.export import format_named
from radio_distill.export.folded import FoldedStudent
from radio_distill.export.write import export
from radio_distill.models.heads import build_body, build_student
from radio_distill.models.timm_student import TimmStudent
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.types import TeacherSpec

from .published import markdown

_ONE = (1, 1, 1, 1)
_MINUTES = 4
"""Time of a processor that an export is given."""


@dataclass(frozen=True)
class Family:
    """A family of bodies, with a small model of it."""

    name: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    """What makes the model small, or fixes its size."""
    patch_size: int = 32
    """Pixels a cell of the last map."""

    def config(self, **fields: Any) -> StudentConfig:
        """Return the student section of a recipe."""
        own = {"patch_size": self.patch_size, "head_hidden": 8, "options": self.options}
        return StudentConfig(body="timm", architecture=self.architecture, **{**own, **fields})


FAMILIES = (
    Family("ViT with RoPE: DINOv3, EUPE", "vit_tiny_patch16_dinov3_qkvb", {"depth": 2}, 16),
    Family("ViT with RoPE: PE core", "vit_pe_core_tiny_patch16_384", {"depth": 2}, 16),
    Family("EVA-02", "eva02_tiny_patch14_224", {"depth": 2}, 14),
    Family("ViT as timm has it", "test_vit3", {}, 16),
    Family("XCiT", "xcit_nano_12_p16_224", {"depth": 2}, 16),
    Family("ConvNeXt", "test_convnext"),
    Family("InceptionNeXt", "inception_next_atto", {"depths": _ONE}),
    Family("EdgeNeXt", "edgenext_xx_small", {"depths": _ONE}),
    Family("MambaOut", "test_mambaout"),
    Family("NFNet", "test_nfnet"),
    Family("ResNet", "test_resnet"),
    Family("RegNet", "regnetx_002"),
    Family("EfficientNet", "test_efficientnet"),
    Family("MobileNetV4", "mobilenetv4_conv_small_035"),
    Family("GhostNet", "ghostnet_050"),
    Family("StarNet", "starnet_s050"),
    Family("HGNetV2", "hgnetv2_b0"),
    Family("RepViT", "repvit_m0_9", {"depth": _ONE}),
    Family("FastViT", "fastvit_t8", {"layers": _ONE}),
    Family("EfficientViT (MIT)", "efficientvit_b0"),
    Family("TinyViT", "tiny_vit_5m_224", {"depths": _ONE}),
    Family("PVT v2", "pvt_v2_b0", {"depths": _ONE}),
    Family(
        "DaViT",
        "davit_tiny",
        {"depths": _ONE, "embed_dims": (16, 16, 32, 32), "num_heads": _ONE},
    ),
    Family(
        "Swin",
        "swin_tiny_patch4_window7_224",
        {"depths": _ONE, "embed_dim": 24, "num_heads": (1, 1, 2, 2)},
    ),
    Family(
        "Hiera, at one size", "hiera_tiny_224", {"stages": _ONE, "embed_dim": 24, "img_size": 224}
    ),
)


@dataclass(frozen=True)
class Row:
    """What holds for a family; fields in the order of the columns."""

    family: str
    example: str
    stride: str
    second_last: str
    dilated: str
    summary: str
    pooled: str
    start: str

    @classmethod
    def measured(cls, family: Family) -> "Row":
        """Build a family's small model in each way, and say what came of it."""
        body = build_body(family.config(), 1)
        assert isinstance(body, TimmStudent)
        norms = any(isinstance(module, _BatchNorm) for module in body.modules())
        return cls(
            family=family.name,
            example=f"`{family.architecture}`",
            stride=f"{body.patch_size} px"
            + (f", {body.fixed_size[0]} px alone" if body.fixed_size else ""),
            second_last=_tried(family, map="second_last", patch_size=family.patch_size // 2),
            dilated=_tried(family, map="dilated", patch_size=family.patch_size // 2),
            summary=body.summary,
            pooled=_pooled(family),
            start="needed" if norms else "free",
        )


def _tried(family: Family, **fields: Any) -> str:
    """Return the pixels a cell of a map that can be had, else no."""
    try:
        return f"{build_body(family.config(**fields), 1).patch_size} px"
    except ConfigError:
        return "no"


def _pooled(family: Family) -> str:
    try:
        body = build_body(family.config(summary="pool"), 1)
    except ConfigError:
        return "no"
    return "D" if body.summary_dim == body.embed_dim else "its own"


class _OutOfTime(BaseException):
    """No Exception, since tracers catch those and go on."""


@contextmanager
def _processor_time(minutes: float) -> Iterator[None]:
    """Raise _OutOfTime in the block once this process has computed for so long."""

    def stop(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def exported(family: Family, name: str, folder: Path) -> str:
    """Export a family's small model; yes where its library computes the same of what it reads."""
    try:
        with _processor_time(_MINUTES):
            export(folded_student(family, folder), folder / name, format_named(name))
    except _OutOfTime:
        return f"not in {_MINUTES} min of CPU"
    except Exception as error:  # tracers fail in as many ways as there are models
        return f"no ({type(error).__name__})" if not isinstance(error, RadioDistillError) else "no"
    return "yes"


def folded_student(family: Family, folder: Path, **fields: Any) -> FoldedStudent:
    """Return a student of a family with a head, as exports take it, in evaluation mode."""
    config = family.config(**fields)
    side = config.options.get("img_size", 2 * family.patch_size)
    half = (0.5, 0.5, 0.5)
    specs = {"t": TeacherSpec("t", 6, 4, 16, (64, 64), None, half, half, licence="mit")}
    model = build_student(config, specs)
    partition = {"name": "a", "size": side, "teachers": ["t"], "batch_size": 1}
    values = {
        "name": "body",
        "output": str(folder),
        "data": {"shards": ["x"]},
        "teachers": {"t": {"preset": "t"}},
        "stages": {"stage1": {"partitions": [partition]}},
    }
    recipe = replace(build(Recipe, values), student=config)
    checkpoint = Checkpoint(folder / "step", 1, "stage1", recipe, specs)
    return FoldedStudent(model.eval().requires_grad_(False), checkpoint)


_HEAD = f"""\
# Bodies of students

What holds for a student of each family, see [Students](../students.md#other-bodies). This page is
what `python -m tools.bodies_page` prints in a checkout: each row is measured on a small random
model of the family. A plain vision transformer (`body: vit`) has all of it, as
[Students](../students.md) says.

* **map**: pixels a cell of the last map, of the one before, and of the last with its strides
  dilated away. `map: resized` takes any cell of which the last map's is a multiple.
* **summary**: with `summary: token`; **pool**: channels of `summary: pool`.
* **start**: whether `student.pretrained` is needed, since there are batch norms.
* **timm**, **onnx**: whether the export's reader computes the same as the student, or what the
  export ended with; it is given {_MINUTES} minutes of a processor.
* No family has cropped positions (CPE), windows of ours, summary tokens by teacher, registers by
  number, spectral reparametrisation or weight noise; a recipe that asks for one is refused. None
  can be exported as `radio` or `transformers`. All train, load and are evaluated, inner layers
  included.
"""
_COLUMNS = (
    "family",
    "measured on",
    "map",
    "second last",
    "dilated",
    "summary",
    "pool",
    "start",
    "timm",
    "onnx",
)


def rows() -> Iterator[tuple[str, ...]]:
    """Measure every family, a row each."""
    for family in FAMILIES:
        torch.manual_seed(0)
        row = Row.measured(family)
        with tempfile.TemporaryDirectory() as folder:
            found = [exported(family, name, Path(folder)) for name in ("timm", "onnx")]
        print(family.name, *found, file=sys.stderr)
        yield (*vars(row).values(), *found)


def main() -> int:
    """Print the page."""
    warnings.simplefilter("ignore")
    print(_HEAD)
    print("\n".join(markdown(_COLUMNS, list(rows()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
