"""Images of features for people: principal components as colours, and where two maps differ.

All maps of one encoder, whatever their resolution, share one basis, so that equal colours mean
equal features from one resolution to the next; a basis for each would hide a mode switch. Each map
weighs alike, whatever its number of cells. Saving is the caller's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..evals.encoder import Encoder, to_pixels
from ..types import Size, format_size

MARGIN = 8
LABEL_HEIGHT = 24


@dataclass(frozen=True, slots=True)
class ColourBasis:
    """Three directions in feature space, and the range that colours span along each."""

    mean: Tensor
    """``[C]``."""
    components: Tensor
    """``[C, 3]``, largest variance first."""
    low: Tensor
    """``[3]``, shown as 0."""
    high: Tensor
    """``[3]``, shown as 255."""

    def paint(self, spatial: Tensor) -> np.ndarray:
        """Return ``[C, h, w]`` as ``[h, w, 3]`` uint8."""
        values = (_tokens(spatial) - self.mean) @ self.components
        share = ((values - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1)
        colours = (share * 255).round().byte().numpy()
        return rearrange(colours, "(h w) c -> h w c", h=spatial.shape[1])


def joint_pca(maps: Sequence[Tensor], clip: float = 0.02) -> ColourBasis:
    """Fit one basis to several ``[C, h, w]``.

    Colours span from the ``clip`` to the ``1 - clip`` quantile, so that a few outlying tokens do
    not flatten the image. A component's sign makes its entry of largest magnitude positive: the
    same features always give the same colours.
    """
    tokens = [_tokens(spatial) for spatial in maps]
    mean = torch.stack([part.mean(dim=0) for part in tokens]).mean(dim=0)
    covariance = sum((part - mean).T @ (part - mean) / len(part) for part in tokens)
    assert isinstance(covariance, Tensor), "joint_pca needs at least one map"
    components = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)  # [C, 3]
    if components.shape[1] < 3:
        components = F.pad(components, (0, 3 - components.shape[1]))
    peak = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(peak < 0, -1.0, 1.0)
    quantiles = [
        torch.quantile((part - mean) @ components, torch.tensor([clip, 1 - clip]).double(), dim=0)
        for part in tokens
    ]
    low, high = torch.stack(quantiles).mean(dim=0)
    return ColourBasis(mean, components, low, high)


def pca_images(maps: Sequence[Tensor], side: int = 224) -> list[Image.Image]:
    """Paint several ``[C, h, w]`` of one encoder in one basis, ``side`` pixels on the long side."""
    basis = joint_pca(maps)
    return [_enlarge(Image.fromarray(basis.paint(spatial)), side) for spatial in maps]


def difference_image(first: Tensor, second: Tensor, side: int = 224) -> Image.Image:
    """Show 1 - cosine of two ``[C, h, w]`` on the finer grid: black for 0, white for 1 or more."""
    from matplotlib import colormaps

    grid = [max(sides) for sides in zip(first.shape[1:], second.shape[1:], strict=True)]
    first, second = (
        F.interpolate(spatial[None].float().cpu(), grid, mode="bilinear")
        for spatial in (first, second)
    )
    distance = (1 - F.cosine_similarity(first, second, dim=1)[0]).clamp(0, 1)  # [h, w]
    colours = colormaps["magma"](distance.numpy(), bytes=True)[..., :3]
    return _enlarge(Image.fromarray(np.ascontiguousarray(colours)), side)


def size_sheet(
    image: Image.Image, encoders: Mapping[str, Encoder], sides: Sequence[int], side: int = 224
) -> Image.Image:
    """Draw a labelled sheet: the image, then what each encoder sees in it at several sizes.

    An encoder that cannot take a size is given the one that :meth:`Encoder.nearest_size` names. Its
    row says which sizes it was given where they are not those of the columns, and none is painted
    twice: the cell that it is farther from stays empty.

    Args:
        image: what is encoded, cropped to a square.
        encoders: by name.
        sides: sides of the square input, in pixels, one a column.
        side: side of each cell, in pixels.
    """
    empty = Image.new("RGB", (side, side), "white")
    rows = {}
    for name, encoder in encoders.items():
        given = _given(encoder, sides)
        sizes = list(given.values())
        maps = [encoder(to_pixels(image, size)[None]).spatial[0] for size in sizes]
        painted = dict(zip(given, pca_images(maps, side), strict=True))
        others = [format_size(size) for column, size in given.items() if size != (column, column)]
        label = name if not others and len(given) == len(sides) else _sizes_label(name, sizes)
        rows[label] = [painted.get(column, empty) for column in sides]
    square = ImageOps.fit(image.convert("RGB"), (side, side))
    columns = ["image", *(f"{column} px" for column in sides)]
    return image_grid([[square, *cells] for cells in rows.values()], list(rows), columns, side)


@torch.inference_mode()
def head_sheet(image: Image.Image, encoder: Encoder, size: Size, side: int = 224) -> Image.Image:
    """Draw a student's map and those of its heads, above those of the teachers that they imitate.

    FeatSharp (arXiv 2502.16025), Figures 8 and 9. A head and its teacher share one basis, so equal
    colours mean equal features; the student's own map has another.

    Args:
        image: what is encoded, cropped to each encoder's aspect ratio.
        encoder: a student with heads.
        size: of the student's input, in pixels.
        side: side of each cell, in pixels.
    """
    assert encoder.heads is not None, f"{encoder.name} has no heads"
    pixels = to_pixels(image, encoder.nearest_size(size))[None].to(encoder.device)
    predicted = encoder.heads.predict(pixels)
    students, teachers = pca_images([encoder(pixels).spatial[0]], side), []
    for name, target in encoder.heads.targets.items():
        truth = target(to_pixels(image, target.size)[None].to(encoder.device))
        maps = [each.spatial[0].float() for each in (predicted[name], truth)]
        head, teacher = pca_images(maps, side)
        students.append(head)
        teachers.append(teacher)
    square = ImageOps.fit(image.convert("RGB"), (side, side))
    empty = Image.new("RGB", (side, side), "white")
    columns = ["image", "backbone", *encoder.heads.targets]
    return image_grid(
        [[square, *students], [empty, empty, *teachers]], [encoder.name, "teachers"], columns, side
    )


def _given(encoder: Encoder, sides: Sequence[int]) -> dict[int, Size]:
    """Return the size that an encoder is given in a column, each in its nearest column only."""
    nearest = {side: encoder.nearest_size((side, side)) for side in sides}
    return {
        min(
            (side for side, other in nearest.items() if other == size),
            key=lambda side: abs(side - max(size)),
        ): size
        for size in dict.fromkeys(nearest.values())
    }


def _sizes_label(name: str, sizes: Sequence[Size]) -> str:
    return f"{name}, at {', '.join(map(format_size, sizes))} px"


def image_grid(
    images: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    side: int = 224,
) -> Image.Image:
    """Lay images out in a table with a label above each column and above each row.

    They are at most ``side`` pixels wide; rows are as high as the highest.
    """
    highest = max((cell.height for line in images for cell in line), default=side)
    pitch_x, pitch_y = side + MARGIN, highest + LABEL_HEIGHT + MARGIN
    size = (MARGIN + len(columns) * pitch_x, LABEL_HEIGHT + len(rows) * pitch_y + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, label in enumerate(columns):
        draw.text((MARGIN + index * pitch_x, 4), label, "black", font)
    for row, (label, line) in enumerate(zip(rows, images, strict=True)):
        assert len(line) == len(columns), f"row {label!r} has {len(line)} images for {columns}"
        top = LABEL_HEIGHT + row * pitch_y
        draw.text((MARGIN, top + 4), label, "black", font)
        for column, cell in enumerate(line):
            sheet.paste(cell, (MARGIN + column * pitch_x, top + LABEL_HEIGHT))
    return sheet


def _tokens(spatial: Tensor) -> Tensor:
    return rearrange(spatial.detach().double().cpu(), "c h w -> (h w) c")


def _enlarge(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer side measures ``side``; cells stay visible as squares."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = scale < 1
    return image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
