"""Tables and sheets of images of :mod:`.upsampler_comparison`, for its page.

In a sheet a column is a photograph: all its maps are painted in one basis, so equal colours below
each other mean equal features.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from radio_distill.config import FitConfig
from radio_distill.data.folder import load_images
from radio_distill.evals.encoder import to_pixels
from radio_distill.report.charts import line_chart
from radio_distill.report.feature_images import difference_image, image_grid, pca_images
from radio_distill.report.page import Figure
from radio_distill.report.tables import Cell, Column, Table
from upsamplers.comparison import maps_of
from upsamplers.fitted import read_header, times
from upsamplers.methods.native import Native
from upsamplers.methods.tile import Tile
from upsamplers.methods.tiling import fine_grid
from upsamplers.metrics import VIEWS_PER_IMAGE

from ..fits import fit_name
from .upsampler_report import Row, is_network

if TYPE_CHECKING:
    from .upsampler_comparison import Comparison

MEASURES = {
    "fidelity": Column("fidelity", ".3f", "higher"),
    "total_variation": Column("TV", ".4f", "lower"),
    "crf": Column("CRF", ".4f", "lower"),
    "mmd": Column("MMD", ".5f", "lower"),
    "preservation": Column("preserved mIoU", ".1%", "higher"),
}
SIDE = 224
"""Of one image on a sheet, in pixels."""
_OF_THE_MODEL = ("teacher", "upsampler", "factor", "options", "de_bias", "images_every", "size")
"""Fields of a fit that the rows of a table say themselves, or that change no number."""


def tables_of(made: "Comparison") -> list[Table]:
    """Make those of the tables that have any value; a dash stands for what is not there."""
    tables = []
    for number in made.request.tables:
        rows = made.request.rows(number, made.recipe)
        if number in (7, 10):
            tables.append((_de_bias if number == 7 else _modules)(made, rows))
        else:
            table = _inputs if number == 8 else _upsamplers
            tables += [table(made, factor, same) for factor, same in rows.items()]
    return [
        table for table in tables if any(cell is not None for r in table.rows for cell in r[1:])
    ]


def _de_bias(made: "Comparison", rows: Mapping[int, Sequence[Row]]) -> Table:
    """Table 7: rows come in pairs, without and with."""
    columns, cells = [Column("upsampler")], dict[str, list[Cell]]()
    for factor, same in rows.items():
        columns += [Column(f"{factor}x {word}", ".3f") for word in ("without", "with")]
        columns.append(Column(f"{factor}x change", "+.3f", "higher"))
        for (label, without), (_, with_bias) in zip(same[::2], same[1::2], strict=True):
            low, high = (_value(made, config, "fidelity") for config in (without, with_bias))
            change = None if low is None or high is None else high - low
            cells.setdefault(label, []).extend([low, high, change])
    title = "De-bias: fidelity without and with (FeatSharp, Table 7)"
    note = "The bias is taken off predictions again, so the target is the same."
    every = [row for same in rows.values() for row in same]
    return _table(made, title, columns, cells, every, note)


def _inputs(made: "Comparison", factor: int, rows: Sequence[Row]) -> Table:
    title, first = f"Inputs of FeatSharp, {factor}x (FeatSharp, Table 8)", "inputs, residual first"
    return _measured(made, title, first, rows, ("fidelity", "total_variation", "crf"))


def _upsamplers(made: "Comparison", factor: int, rows: Sequence[Row]) -> Table:
    """Table 9, and AnyUp's feature-space preservation where masks are named."""
    measures = ["fidelity", "total_variation", "crf", "mmd"]
    notes = ["bilinear has a fitted de-bias and downsampler, and no network."]
    free = [label for label, config in rows if not is_network(config.upsampler)]
    if free:
        notes.append(
            f"Nothing is fitted in {', '.join(free)}: no de-bias, and fidelity is taken through "
            "the downsampler that was fitted for bilinear."
        )
    low = [_value(made, config, "preservation_low") for _, config in rows]
    known = [value for value in low if value is not None]
    if known and made.segmentation is not None:
        measures.append("preservation")
        notes.append(
            "Preserved mIoU: a linear probe, trained on the teacher's own low-resolution maps of "
            f"{made.recipe.evaluation.segmentation} ({len(made.segmentation.classes)} classes), "
            "applied to upsampled ones in the "
            f"teacher's own space; on the teacher's own maps it has {known[0]:.1%}."
        )
    title = f"Upsamplers, {factor}x (FeatSharp, Table 9)"
    return _measured(made, title, "upsampler", rows, measures, *notes)


def _modules(made: "Comparison", rows: Mapping[int, Sequence[Row]]) -> Table:
    """Table 10."""
    columns = [Column("modules"), *(Column(f"{factor}x", ".3f", "higher") for factor in rows)]
    every, cells = [row for same in rows.values() for row in same], dict[str, list[Cell]]()
    for label, config in every:
        cells.setdefault(label, []).append(_value(made, config, "fidelity"))
    title = "Modules of FeatSharp: fidelity (FeatSharp, Table 10)"
    note = "The inputs are bilinear, which is the residual path, and tiles."
    return _table(made, title, columns, cells, every, note)


def _measured(
    made: "Comparison",
    title: str,
    first: str,
    rows: Sequence[Row],
    measures: Sequence[str],
    *notes: str,
) -> Table:
    """Make a table whose columns are measures."""
    cells = {label: [_value(made, config, name) for name in measures] for label, config in rows}
    return _table(made, title, [Column(first), *map(MEASURES.get, measures)], cells, rows, *notes)  # type: ignore[list-item]


def _table(
    made: "Comparison",
    title: str,
    columns: Sequence[Column],
    cells: Mapping[str, Sequence[Cell]],
    rows: Sequence[Row],
    *notes: str,
) -> Table:
    body = tuple((label, *values) for label, values in cells.items())
    unequal = unequal_settings(made, [row.config for row in rows])
    return Table(title, tuple(columns), body, (measured_on(made), *notes, *unequal))


def unequal_settings(made: "Comparison", configs: Sequence[FitConfig]) -> list[str]:
    """Say under a table where its fits were not made alike: a file that is there is not made anew.

    Args:
        made: has the files.
        configs: of the table's rows.
    """
    names = dict.fromkeys(map(fit_name, configs))
    fits = {name: read_header(made.files[name]).fit for name in names if name in made.files}
    unequal = []
    for field in dict.fromkeys(field for fit in fits.values() for field in fit):
        values: dict[str, list[str]] = {}
        for name, fit in fits.items():
            values.setdefault(str(fit.get(field, "unknown")), []).append(name)
        if field not in _OF_THE_MODEL and len(values) > 1:
            told = (f"{value} in {', '.join(members)}" for value, members in values.items())
            unequal.append(f"{field} {'; '.join(told)}")
    return [f"These fits are not of one setting: {'. '.join(unequal)}."] if unequal else []


def measured_on(made: "Comparison", views: bool = True) -> str:
    """Say what a table was measured on."""
    name = made.recipe.normalizer.name
    return (
        f"Teacher {made.teacher.spec.name} at {times(made.size)} px; {made.num_images} held-out "
        f"images of {made.recipe.evaluation.images}"
        + (f", {VIEWS_PER_IMAGE} random views each" if views else "")
        + f"; in the space normalised by {'PHI-S' if name == 'phi_s' else name}."
    )


def _value(made: "Comparison", config: FitConfig, measure: str) -> float | None:
    return made.scores.get(fit_name(config), {}).get(measure)


def fits_table(made: "Comparison") -> Table:
    """List the fits that are compared, with what decides how good they can be."""
    keys = ("steps", "batch_size", "pool", "learning_rate", "views", "view_range")
    headers = {name: read_header(path).fit for name, path in made.files.items()}
    rows = [
        (name, *(fit.get(key) for key in keys), str(made.files[name]))
        for name, fit in headers.items()
    ]
    heads = ("fit", "steps", "batch", "pool", "learning rate", "views", "kind of views", "file")
    return Table("Fits that are compared", tuple(map(Column, heads)), tuple(rows))


def tile_table(made: "Comparison") -> list[Table]:
    """Make the table of Figure 15, if anything was measured."""
    errors, (height, width) = made.tile_errors, made.size
    rows = [
        (f"{n} x {n}", f"{height * n}x{width * n}", error["tiles"], error["bilinear"])
        for n, error in errors.items()
    ]
    heads = (Column("MSE of tiles", ".4f"), Column("MSE of bilinear", ".4f"))
    notes = (
        measured_on(made, views=False),
        "In that space a feature's variance is 1. Bilinear interpolates the teacher's map of "
        "the whole image at the low resolution.",
    )
    title = "Error of tiles from the teacher at the full resolution (FeatSharp, Figure 15)"
    columns = (Column("tiles"), Column("image, px"), *heads)
    return [Table(title, columns, tuple(rows), notes)] if errors else []


def cost_table(made: "Comparison") -> list[Table]:
    """Make the table of Figure 14, if time was taken."""
    rows = [
        (
            cost.name,
            f"{cost.factor}x",
            cost.tokens,
            1e3 * cost.seconds,
            1e6 * cost.seconds / cost.tokens,
        )
        for cost in made.costs
    ]
    heads = (Column("ms an image", ".1f"), Column("µs a token", ".2f"))
    note = (
        f"Teacher {made.teacher.spec.name}, low resolution {times(made.size)} px, one image at a "
        "time, medians. The teacher is shown the full resolution; featup and featsharp make a "
        "map of that grid, the teacher's forwards included."
    )
    columns = (Column("method"), Column("factor"), Column("tokens"), *heads)
    return (
        [Table("Throughput (FeatSharp, Figure 14)", columns, tuple(rows), (note,))] if rows else []
    )


def tile_chart(made: "Comparison") -> list[Figure]:
    """Draw Figure 15, if anything was measured."""
    errors = made.tile_errors.items()
    lines = {name: [(float(n), e[name]) for n, e in errors] for name in ("tiles", "bilinear")}
    if not errors:
        return []
    return [Figure("Error of tiles", "", line_chart(lines, "tiles a side", "MSE"))]


def cost_charts(made: "Comparison") -> list[Figure]:
    """Draw Figure 14, time for a token and for an image against the factor, if it was taken."""
    figures = []
    for name, unit, scale in (("a token", "µs", 1e6), ("an image", "ms", 1e3)):
        lines: dict[str, list[tuple[float, float]]] = {}
        for cost in made.costs:
            time = scale * cost.seconds / (cost.tokens if unit == "µs" else 1)
            lines.setdefault(cost.name, []).append((cost.factor, time))
        if lines:
            figures.append(Figure(f"Time {name}", "", line_chart(lines, "factor", unit)))
    return figures


def feature_sheets(made: "Comparison") -> list[Figure]:
    """Paint photographs through each upsampler of Table 9, and how it differs from bilinear."""
    figures = []
    for factor, rows in _measured_rows(made).items():
        loaded = {label: made.load(config) for label, config in rows}
        models = {label: each.model for label, each in loaded.items() if each is not None}
        if not models:
            continue
        photographs, features, changes = _photographs(made, factor), [], []
        for pixels in photographs.values():
            shown: list[Tensor] = []
            changed = []
            for label, model in models.items():
                maps = maps_of(model, made.teacher, pixels[None], made.size, factor, made.precision)
                if not shown:
                    shown.append(model.normalizer.invert(maps.low)[0])
                shown.append(model.normalizer.invert(maps.fine)[0])
                if label != "bilinear":
                    changed.append(difference_image(maps.fine[0], maps.base[0], SIDE))
            features.append([_photograph(pixels), *pca_images(shown, SIDE)])
            changes.append([_photograph(pixels), *changed])
        others, names = [label for label in models if label != "bilinear"], list(photographs)
        figures += [
            Figure(
                f"Features, {factor}x",
                "Three principal components of the features as colours, one basis a photograph: "
                "equal colours below each other mean equal features.",
                _sheet(features, ["photograph", "teacher", *models], names),
            ),
            Figure(
                f"Difference from bilinear, {factor}x (FeatSharp, Figure 10)",
                "1 - cosine between an upsampler's map and the bilinear interpolation of the "
                "low-resolution map that it starts from, de-biased where it is: black for 0, white "
                "for 1 or more.",
                _sheet(changes, ["photograph", *others], names),
            ),
        ]
    return figures


def bias_sheet(made: "Comparison") -> list[Figure]:
    """Paint the bias that each fit learned, a column a factor."""
    painted, sizes, factors = {}, [], _measured_rows(made)
    for factor, rows in factors.items():
        for label, config in rows:
            loaded = made.load(config)
            if loaded is not None and loaded.model.bias is not None:
                bias = loaded.model.bias.detach()
                painted[label, factor] = loaded.model.correct(torch.zeros_like(bias))[0]
                sizes.append(f"{label} {factor}x {bias.square().mean().sqrt():.3f}")
    if not painted:
        return []
    images = dict(zip(painted, pca_images(list(painted.values()), SIDE), strict=True))
    labels = list(dict.fromkeys(label for label, _ in painted))
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    columns = [[images.get((label, factor), blank) for label in labels] for factor in factors]
    return [
        Figure(
            "Learned biases (FeatSharp, Figure 11)",
            "What each fit adds to the teacher's map at each position, at the teacher's own grid, "
            "all in one basis. Root mean square, where a feature's variance is 1: "
            f"{', '.join(sizes)}.",
            _sheet(columns, labels, [f"{factor}x" for factor in factors]),
        )
    ]


@torch.inference_mode()
def tile_sheets(made: "Comparison") -> list[Figure]:
    """Paint the teacher at full resolution, its tiles, and where they differ."""
    figures = []
    for level in (level for level in made.request.factors if level in made.tile_errors):
        grid, photographs = fine_grid(made.teacher, made.size, level), _photographs(made, level)
        columns = []
        for pixels in photographs.values():
            native, tiles = (
                kind(level)(made.teacher, pixels[None], grid).spatial for kind in (Native, Tile)
            )
            first, second = (made.normalizer.apply(maps)[0] for maps in (native, tiles))
            painted = pca_images([native[0], tiles[0]], SIDE)
            columns.append([_photograph(pixels), *painted, difference_image(first, second, SIDE)])
        figures.append(
            Figure(
                f"{level} x {level} tiles against the teacher at the full resolution "
                "(FeatSharp, Figure 16)",
                "One basis a photograph. The difference is 1 - cosine in the normalised space: "
                "black for 0, white for 1 or more (the paper's is a Euclidean distance).",
                _sheet(columns, ["photograph", "teacher", "tiles", "difference"], photographs),
            )
        )
    return figures


def _measured_rows(made: "Comparison") -> dict[int, list[Row]]:
    """Return the rows of Table 9 that were measured."""
    factors = made.request.rows(9, made.recipe).items()
    return {n: [row for row in rows if fit_name(row.config) in made.scores] for n, rows in factors}


def _photographs(made: "Comparison", factor: int) -> dict[str, Tensor]:
    """Load held-out images ``[3, H, W]`` of ``factor`` times the teacher's input, by name."""
    size = (made.size[0] * factor, made.size[1] * factor)
    images = load_images(made.recipe.evaluation.images, made.request.num_images)
    return {key: to_pixels(image, size).to(made.device) for key, image in images}


def _photograph(pixels: Tensor) -> Image.Image:
    values = rearrange((pixels * 255).round().byte().cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _sheet(
    columns: Sequence[Sequence[Image.Image]], rows: Sequence[str], heads: Iterable[str]
) -> Image.Image:
    lines = [list(line) for line in zip(*columns, strict=True)]
    return image_grid(lines, rows, list(heads), SIDE)
