"""Stride, channels and sizes of a model, measured on the meta device.

Nothing is computed there, only shapes. What a library says of a model's stride is checked, never
believed: where the map has other cells than it promises, the model is refused. A model whose
library says nothing has its stride measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.system.files import reason_of
from radio_distill.types import Size

from .presets import Preset

_FAR = 64
"""Cells a side at which strides that differ by less than a pixel in 64 are told apart."""


_MEASURED: dict[str, Preset] = {}
"""By what was asked, in this process."""


def measured_once(preset: Preset, build: Callable[[Preset], nn.Module]) -> Preset:
    """Return what :func:`measured` does; a model that its name alone describes is run once.

    A command asks many times for the same teacher, and what lies in a file may change meanwhile.
    """
    is_named = preset.source in ("timm", "open_clip") and ":" not in preset.model
    if not is_named or "place" in preset.arguments:
        return measured(preset, build)
    asked = repr(preset)
    if asked not in _MEASURED:
        _MEASURED[asked] = measured(preset, build)
    return _MEASURED[asked]


def measured(preset: Preset, build: Callable[[Preset], nn.Module]) -> Preset:
    """Fill in stride, size and channels from the maps that a model gives.

    A size that is no multiple of the stride is rounded down. A model that takes its native size
    alone gets ``fixed_size``: it is shown the native size, one patch more on one side, and a small
    rectangle.

    Args:
        preset: completed by its source. A ``patch_size`` of its own is checked as the library's is.
        build: makes the tower with random weights; its ``stated_stride``, if it has one and it is
            not None, is what the library says, and its ``bands`` what it takes, else 3.

    Raises:
        ConfigError: a model that cannot run at its native size, whose cells are not square, or
            whose map is not its input divided by a stride.
    """
    name = preset.model or preset.source
    if preset.native_size < 1:
        raise ConfigError(f"{name}: its native size is unknown; set options.native_size")
    with torch.device("meta"):
        tower = build(preset).eval()
    # It runs outside of that context: what a model's code keeps for later calls would be empty.
    with torch.no_grad():
        declared = preset.patch_size or getattr(tower, "stated_stride", None)
        stride = declared or _measured_stride(tower, name, preset.native_size)
        side = preset.native_size // stride * stride
        if not side:
            raise ConfigError(
                f"{name}: its native size of {preset.native_size} px is less than one cell of "
                f"{stride} px; set options.native_size"
            )
        summary, spatial = _run(tower, name, (side, side))
        _check_map(tower, name, (side, side), stride, spatial)
        is_fixed = preset.fixed_size or not _takes_other_sizes(tower, name, side, stride)
    return replace(
        preset,
        patch_size=stride,
        native_size=side,
        channels=spatial.shape[1],
        summary_channels=None if summary is None else summary.shape[1],
        fixed_size=is_fixed,
    )


def _run(tower: nn.Module, name: str, size: Size) -> tuple[Tensor | None, Tensor]:
    """Return (summary, map) of one image; ConfigError where the model fails or gives no map."""
    shown = f"{size[0]}x{size[1]} px"
    try:
        output = tower(torch.zeros(1, getattr(tower, "bands", 3), *size, device="meta"))
    except RadioDistillError:
        raise
    except Exception as error:  # models refuse a size in ways of their own
        reason = (reason_of(error) or type(error).__name__)[:150]
        raise ConfigError(f"{name} cannot take {shown}: {reason}") from error
    if not isinstance(output, tuple) or len(output) != 2 or not isinstance(output[1], Tensor):
        raise ConfigError(
            f"{name} gives a {type(output).__name__}, not a tuple of a summary (or None) and a map"
        )
    summary, spatial = output
    if spatial.ndim != 4 or 0 in spatial.shape:
        raise ConfigError(
            f"{name} gives a map of shape {list(spatial.shape)} for {shown}, not [B, C, h, w]"
        )
    return summary, spatial


def _check_map(tower: nn.Module, name: str, size: Size, stride: int, spatial: Tensor) -> None:
    """Raise ConfigError, with what the probe found, unless a map is ``size / stride``."""
    grid = (size[0] // stride, size[1] // stride)
    given = tuple(spatial.shape[-2:])
    if given == grid:
        return
    line = (
        f"{name}: its map of {size[0]}x{size[1]} px is {given[0]}x{given[1]} cells, not "
        f"{grid[0]}x{grid[1]} as its stride of {stride} px says"
    )
    other = next(_strides(tower, name, size[0], given[0]), None)
    if other is not None:
        raise ConfigError(f"{line}; the probe finds {other} px")
    raise ConfigError(
        f"{line}; its cells do not tile the image (convolutions without padding, or a map that is "
        "resized); take another model"
    )


def _takes_other_sizes(tower: nn.Module, name: str, side: int, stride: int) -> bool:
    for size in ((side + stride, side), (2 * stride, 3 * stride)):
        try:
            _, spatial = _run(tower, name, size)
        except ConfigError:
            return False
        _check_map(tower, name, size, stride, spatial)
    return True


def _measured_stride(tower: nn.Module, name: str, side: int) -> int:
    _, spatial = _run(tower, name, (side, side))
    rows, columns = spatial.shape[-2:]
    if rows != columns:
        raise ConfigError(
            f"{name}: its map of {side}x{side} px is {rows}x{columns} cells; cells that are not "
            "square are not read here"
        )
    stride = next(_strides(tower, name, side, rows), None)
    if stride is None:
        raise ConfigError(
            f"{name}: its map of {side}x{side} px is {rows}x{columns} cells, which no stride "
            "explains; set options.native_size to a multiple of its stride"
        )
    return stride


def _strides(tower: nn.Module, name: str, side: int, cells: int) -> Iterator[int]:
    """Yield the strides that explain ``cells`` of ``side`` pixels, and of a far size if it runs."""
    for stride in range(1, side + 1):
        if cells not in (side // stride, -(-side // stride)):
            continue
        try:
            _, spatial = _run(tower, name, (_FAR * stride, _FAR * stride))
        except ConfigError:  # one size only: then the stride must divide it
            if side == cells * stride:
                yield stride
            continue
        if tuple(spatial.shape[-2:]) == (_FAR, _FAR):
            yield stride
