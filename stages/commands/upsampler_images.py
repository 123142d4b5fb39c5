"""Images of the report of upsamplers: features, differences, biases, tiles, and two charts.

A column is a photograph: all its maps are painted in one basis, so equal colours below each other
mean equal features.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from radio_distill.data.folder import load_images
from radio_distill.evals.encoder import to_pixels
from radio_distill.report.feature_images import difference_image, image_grid, pca_images
from radio_distill.report.page import Figure, line_chart
from radio_distill.system.progress import Progress
from upsamplers.comparison import Cost, maps_of
from upsamplers.fit.lessons import fine_grid
from upsamplers.fitted import UpsamplerModel
from upsamplers.methods.native import Native
from upsamplers.methods.tile import Tile

from .upsampler_fits import Row
from .upsampler_measures import Bench, Scores

SIDE = 224
"""Of one image on a sheet, in pixels."""


def feature_figures(bench: Bench, factor: int, rows: Sequence[Row], count: int) -> list[Figure]:
    """Paint held-out photographs through each upsampler, and how it differs from bilinear."""
    models = {label: made.model for label, config in rows if (made := bench.load(config))}
    if not models:
        return []
    photographs, columns = _photographs(bench, factor, count), []
    with Progress(f"images, {factor}x", len(photographs), "images") as bar:
        for number, pixels in enumerate(photographs.values(), 1):
            columns.append(_feature_columns(bench, factor, models, pixels))
            bar.update(number)
    features, differences = zip(*columns, strict=True)
    keys, others = list(photographs), [label for label in models if label != "bilinear"]
    return [
        Figure(
            f"Features, {factor}x",
            "Three principal components of the features as colours, one basis a photograph: equal "
            "colours below each other mean equal features.",
            _sheet(features, ["photograph", "teacher", *models], keys),
        ),
        Figure(
            f"Difference from bilinear, {factor}x (FeatSharp, Figure 10)",
            "1 - cosine between an upsampler's map and the bilinear interpolation of the "
            "low-resolution map that it starts from, de-biased where it is: black for 0, white for "
            "1 or more.",
            _sheet(differences, ["photograph", *others], keys),
        ),
    ]


def _feature_columns(
    bench: Bench, factor: int, models: Mapping[str, UpsamplerModel], pixels: Tensor
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Paint one photograph's features, and their differences from bilinear."""
    subject, changes = bench.subject, []
    shown: list[Tensor] = []
    for label, model in models.items():
        maps = maps_of(
            model, subject.teacher, pixels[None], subject.size, factor,
            subject.recipe.engine.precision,
        )  # fmt: skip
        if not shown:
            shown.append(model.normalizer.invert(maps.low)[0])
        shown.append(model.normalizer.invert(maps.fine)[0])
        if label != "bilinear":
            changes.append(difference_image(maps.fine[0], maps.base[0], SIDE))
    photograph = _photograph(pixels)
    return [photograph, *pca_images(shown, SIDE)], [photograph, *changes]


def bias_figures(bench: Bench, rows: Mapping[int, Sequence[Row]]) -> list[Figure]:
    """Paint the bias that each fit learned, a column a factor."""
    painted, sizes = {}, []
    for factor, same in rows.items():
        for label, config in same:
            made = bench.load(config)
            if made is not None and made.model.bias is not None:
                bias = made.model.bias.detach()
                painted[label, factor] = made.model.correct(torch.zeros_like(bias))[0]
                sizes.append(f"{label} {factor}x {bias.square().mean().sqrt():.3f}")
    if not painted:
        return []
    images = dict(zip(painted, pca_images(list(painted.values()), SIDE), strict=True))
    labels = list(dict.fromkeys(label for label, _ in painted))
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    columns = [[images.get((label, factor), blank) for label in labels] for factor in rows]
    return [
        Figure(
            "Learned biases (FeatSharp, Figure 11)",
            "What each fit adds to the teacher's map at each position, at the teacher's own grid, "
            "all in one basis. Root mean square, where a feature's variance is 1: "
            f"{', '.join(sizes)}.",
            _sheet(columns, labels, [f"{factor}x" for factor in rows]),
        )
    ]


@torch.inference_mode()
def tile_figure(bench: Bench, level: int, count: int) -> Figure:
    """Paint the teacher at full resolution, its tiles, and where they differ."""
    subject, photographs = bench.subject, _photographs(bench, level, count)
    grid, columns = fine_grid(subject.teacher, subject.size, level), []
    for pixels in photographs.values():
        whole, tiles = (
            kind(level)(subject.teacher, pixels[None], grid).spatial for kind in (Native, Tile)
        )
        first, second = (bench.normalizer.apply(item)[0] for item in (whole, tiles))
        painted = pca_images([whole[0], tiles[0]], SIDE)
        columns.append([_photograph(pixels), *painted, difference_image(first, second, SIDE)])
    return Figure(
        f"{level} x {level} tiles against the teacher at the full resolution "
        "(FeatSharp, Figure 16)",
        "One basis a photograph. The difference is 1 - cosine in the normalised space: black for "
        "0, white for 1 or more (the paper's is a Euclidean distance).",
        _sheet(columns, ["photograph", "teacher", "tiles", "difference"], list(photographs)),
    )


def tile_chart(errors: Mapping[int, Scores]) -> Figure:
    """Draw Figure 15."""
    lines = {
        name: [(float(level), error[name]) for level, error in errors.items()]
        for name in ("tiles", "bilinear")
    }
    return Figure("Error of tiles", "", line_chart(lines, "tiles a side", "MSE"))


def cost_charts(costs: Sequence[Cost]) -> list[Figure]:
    """Draw Figure 14: time for a token and for a image, against the factor."""
    names = dict.fromkeys(item.name for item in costs)

    def lines(value: Callable[[Cost], float]) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(item.factor, value(item)) for item in costs if item.name == name]
            for name in names
        }

    token = lines(lambda item: 1e6 * item.seconds / item.tokens)
    image = lines(lambda item: 1e3 * item.seconds)
    return [
        Figure("Time a token", "", line_chart(token, "factor", "µs")),
        Figure("Time a image", "", line_chart(image, "factor", "ms")),
    ]


def _photographs(bench: Bench, factor: int, count: int) -> dict[str, Tensor]:
    """Load held-out images ``[3, H, W]`` of ``factor`` times the teacher's input, by name."""
    height, width = bench.subject.size
    return {
        key: to_pixels(image, (height * factor, width * factor)).to(bench.subject.device)
        for key, image in load_images(bench.subject.recipe.evaluation.images, count)
    }


def _photograph(pixels: Tensor) -> Image.Image:
    values = rearrange((pixels * 255).round().byte().cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _sheet(
    columns: Sequence[Sequence[Image.Image]], rows: Sequence[str], heads: Sequence[str]
) -> Image.Image:
    lines = [list(line) for line in zip(*columns, strict=True)]
    return image_grid(lines, rows, heads, SIDE)
