"""Tiles and launches of the Triton kernels: numbers only, to be counted without a GPU.

Along one axis, a target pixel of the folded layer sees ``window`` low-resolution cells around its
own. A product of :mod:`.triton_apply` multiplies the weights ``[target pixels, cells]`` of a tile
of cells with the tile's neighbourhood ``[cells, channels]``. Larger tiles read less, as
neighbourhoods overlap, and multiply more zeros.

``launches.json`` beside this file has what ``python -m benchmarks.joint_bilateral_gpu --sweep``
found to be fastest, by architecture and number type: ``{"90": {"bfloat16": {"multiply": {...}}}}``,
by compute capability. What has no entry is launched by :data:`DEFAULT`. Nothing is searched for
while a program runs: that would synchronise, and might choose another order of additions in the
next run.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from operator import le
from pathlib import Path
from typing import NamedTuple

import torch

_WARP_GROUP = 64
"""Rows of one warp group's matrix instruction; a group is 4 warps."""
_LARGEST_PIXELS, _LARGEST_CELLS = 128, 64
"""Rows and columns of a product; more cells would be mostly zeros, and spill."""
_LARGEST_STRIP = 32
"""Low-resolution cells whose gradients a program sums at a time."""
TABLE = Path(__file__).with_name("launches.json")
Settings = Mapping[str, int]
"""``BLOCK``, channels of a block (half for 32 bits); ``num_warps``, which ``multiply`` and
``grad_folded`` take for each 64 target pixels of a product; ``num_stages``, depth of pipeline."""
DEFAULT: Mapping[str, Settings] = {
    "multiply": {"BLOCK": 128, "num_warps": 4, "num_stages": 3},
    "grad_folded": {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
    "grad_low": {"BLOCK": 256, "num_warps": 8, "num_stages": 3},
}
"""By kernel: at most 64 sums a thread. Read off the machine code for sm_80 and sm_90, not timed."""


class Folding(NamedTuple):
    """Upsampling of one map; factors and windows are (rows, columns)."""

    factor: tuple[int, int]
    radius: int
    bicubic: bool

    @property
    def window(self) -> tuple[int, int]:
        """The cells that a target pixel sees, itself in the middle."""
        rows, columns = (_window(factor, self.radius, self.bicubic) for factor in self.factor)
        return rows, columns

    @property
    def cells(self) -> int:
        """Number of cells that a target pixel sees."""
        return self.window[0] * self.window[1]

    @property
    def constants(self) -> dict[str, int]:
        """The same as constants of a kernel."""
        names = ("FACTOR_Y", "FACTOR_X", "WINDOW_Y", "WINDOW_X")
        return dict(zip(names, (*self.factor, *self.window), strict=True))

    @property
    def tile(self) -> "Tile":
        """The cells of one product."""
        return _tile(self.factor, self.window)

    @property
    def strip(self) -> int:
        """The columns of cells whose gradients one program sums."""
        return max(1, _LARGEST_STRIP // self.window[0])


class Tile(NamedTuple):
    """A block of cells, and the shape of its product padded to powers of two."""

    rows: int
    columns: int
    pixels: int
    """Target pixels of one product; a tile that has more takes several."""
    cells: int

    @property
    def constants(self) -> dict[str, int]:
        """The same as constants of a kernel."""
        return {name.upper(): value for name, value in self._asdict().items()}

    @property
    def warp_groups(self) -> int:
        """Groups of 4 warps that share a product."""
        return max(1, self.pixels // _WARP_GROUP)

    def products(self, factor: tuple[int, int]) -> int:
        """Return how many products of ``pixels`` target pixels a tile takes."""
        return -(-self.rows * self.columns * factor[0] * factor[1] // self.pixels)


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two from ``number`` and ``least`` on."""
    return max(least, 1 << (number - 1).bit_length())


def _window(factor: int, radius: int, bicubic: bool) -> int:
    """Return the cells along one axis whose weight can differ from zero.

    The farthest of the ``radius`` neighbours of a cell's last pixel lies ``far / (2 * factor)``
    cells from the cell's centre; interpolation reaches less than one cell (bilinear) or two
    (bicubic) from there. At factor 1 it reaches none.
    """
    if factor == 1:
        return 2 * radius + 1
    far = factor - 1 + 2 * radius
    reach = 2 * factor * (2 if bicubic else 1)
    return 2 * ((far + reach - 1) // (2 * factor)) + 1


@lru_cache
def _tile(factor: tuple[int, int], window: tuple[int, int]) -> Tile:
    """Return the tile that reads the fewest cells for each of its own, then multiplies least."""
    sides = [(rows, columns) for rows in range(1, 9) for columns in range(1, 9)]
    shapes = {side: _shape(side, factor, window) for side in sides}
    largest = (_LARGEST_PIXELS, _LARGEST_CELLS)
    fitting = [side for side in sides if all(map(le, shapes[side], largest))] or [(1, 1)]

    def cost(side: tuple[int, int]) -> tuple[float, float]:
        own = side[0] * side[1]
        read = (side[0] + window[0] - 1) * (side[1] + window[1] - 1)
        return read / own, shapes[side][0] * shapes[side][1] / own

    best = min(fitting, key=cost)
    pixels, cells = shapes[best]
    return Tile(*best, min(pixels, _LARGEST_PIXELS), cells)


def _shape(
    side: tuple[int, int], factor: tuple[int, int], window: tuple[int, int]
) -> tuple[int, int]:
    """Return the padded target pixels and cells of a tile; matrix instructions take 16 or more."""
    pixels = side[0] * side[1] * factor[0] * factor[1]
    cells = (side[0] + window[0] - 1) * (side[1] + window[1] - 1)
    return power_of_two(pixels, 16), power_of_two(cells, 16)


def launch_settings(kernel: str, map_: torch.Tensor) -> Settings:
    """Return how a kernel is launched for a map, by its device and number type."""
    timed = _table(TABLE).get(architecture(map_.device), {}).get(number_type(map_.dtype), {})
    settings: Settings = timed.get(kernel, DEFAULT[kernel])
    return settings


def architecture(device: torch.device) -> str:
    """Return the compute capability as two digits; of the interpreter ``cpu``."""
    if device.type != "cuda":
        return device.type
    return "{}{}".format(*torch.cuda.get_device_capability(device))


def number_type(dtype: torch.dtype) -> str:
    """Return a type's name in the table."""
    return str(dtype).removeprefix("torch.")


def write_table(device: str, dtype: str, found: Mapping[str, Settings], path: Path = TABLE) -> None:
    """Put settings of kernels in the place of those of one architecture and type."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table.setdefault(device, {})[dtype] = {name: dict(found[name]) for name in sorted(found)}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _table.cache_clear()


@lru_cache
def _table(path: Path) -> dict[str, dict[str, dict[str, Settings]]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
