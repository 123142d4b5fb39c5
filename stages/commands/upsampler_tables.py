"""Tables and sheets of images of :mod:`.upsampler_comparison`, for its page.

In a sheet a column is a photograph: all its maps are painted in one basis, so equal colours below
each other mean equal features.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from einops import rearrange
from PIL import Image
from torch import Tensor

from radio_distill.config import FitConfig
from radio_distill.data.folder import load_images
from radio_distill.evals.encoder import to_pixels
from radio_distill.report.feature_images import difference_image, image_grid, pca_images
from radio_distill.report.page import Figure
from radio_distill.report.tables import Cell, Column, Table
from radio_distill.types import format_size
from upsamplers.comparison import maps_of
from upsamplers.fitted_files import read_header
from upsamplers.metrics import VIEWS_PER_IMAGE

from ..fits import fit_name
from .upsampler_rows import FIGURE, Row, is_network

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


def tables_of(report: "Comparison") -> list[Table]:
    """Make those of the tables that have any value; a dash stands for what is not there."""
    tables = []
    for number in report.request.shown:
        rows = report.request.rows(number, report.recipe)
        if number in (7, 10, FIGURE):
            tables.append(_by_factor(report, number, rows))
        else:
            make = _inputs if number == 8 else _upsamplers
            tables += [make(report, factor, same) for factor, same in rows.items()]
    return [t for t in tables if any(cell is not None for row in t.rows for cell in row[1:])]


def _by_factor(report: "Comparison", number: int, rows: Mapping[int, Sequence[Row]]) -> Table:
    """Make one of fidelity: Table 7, whose rows are pairs without and with de-bias, 10 or 13."""
    title, first, note = {
        7: (
            "De-bias: fidelity without and with (FeatSharp, Table 7)",
            "upsampler",
            "The bias is taken off predictions again, so the target is the same.",
        ),
        10: (
            "Modules of FeatSharp: fidelity (FeatSharp, Table 10)",
            "modules",
            "The inputs are bilinear, which is the residual path, and tiles.",
        ),
        FIGURE: (
            "Window of FeatSharp's attention: fidelity (FeatSharp, Figure 13)",
            "cells a side",
            "Bilinear and FeatUp have no attention.",
        ),
    }[number]
    columns, cells = [Column(first)], dict[str, list[Cell]]()
    for factor, same in rows.items():
        values = [_value(report, row.config, "fidelity") for row in same]
        if number != 7:
            columns.append(Column(f"{factor}x", ".3f", "higher"))
            for row, value in zip(same, values, strict=True):
                cells.setdefault(row.label, []).append(value)
            continue
        columns += [Column(f"{factor}x {word}", ".3f") for word in ("without", "with")]
        columns.append(Column(f"{factor}x change", "+.3f", "higher"))
        for row, low, high in zip(same[::2], values[::2], values[1::2], strict=True):
            change = None if low is None or high is None else high - low
            cells.setdefault(row.label, []).extend([low, high, change])
    every = [row for same in rows.values() for row in same]
    return _table(report, title, columns, cells, every, note)


def _inputs(report: "Comparison", factor: int, rows: Sequence[Row]) -> Table:
    title, first = f"Inputs of FeatSharp, {factor}x (FeatSharp, Table 8)", "inputs, residual first"
    return _measured(report, title, first, rows, ("fidelity", "total_variation", "crf"))


def _upsamplers(report: "Comparison", factor: int, rows: Sequence[Row]) -> Table:
    """Make Table 9, with AnyUp's feature-space preservation where masks are named."""
    measures = ["fidelity", "total_variation", "crf", "mmd"]
    notes = ["bilinear has a fitted de-bias and downsampler, and no network."]
    free = [label for label, config in rows if not is_network(config.upsampler)]
    if free:
        notes.append(
            f"Nothing is fitted in {', '.join(free)}: no de-bias, and fidelity is taken through "
            "the downsampler that was fitted for bilinear."
        )
    low = [_value(report, config, "preservation_low") for _, config in rows]
    known = [value for value in low if value is not None]
    if known and report.segmentation is not None:
        measures.append("preservation")
        notes.append(
            "Preserved mIoU: a linear probe, trained on the teacher's own low-resolution maps of "
            f"{report.recipe.evaluation.segmentation} ({len(report.segmentation.classes)} "
            "classes), applied to upsampled ones in the teacher's own space; on the teacher's own "
            f"maps it has {known[0]:.1%}."
        )
    title = f"Upsamplers, {factor}x (FeatSharp, Table 9)"
    return _measured(report, title, "upsampler", rows, measures, *notes)


def _measured(
    report: "Comparison",
    title: str,
    first: str,
    rows: Sequence[Row],
    measures: Sequence[str],
    *notes: str,
) -> Table:
    """Make a table whose columns are measures."""
    cells = {label: [_value(report, config, name) for name in measures] for label, config in rows}
    columns = [Column(first), *(MEASURES[name] for name in measures)]
    return _table(report, title, columns, cells, rows, *notes)


def _table(
    report: "Comparison",
    title: str,
    columns: Sequence[Column],
    cells: Mapping[str, Sequence[Cell]],
    rows: Sequence[Row],
    *notes: str,
) -> Table:
    body = tuple((label, *values) for label, values in cells.items())
    unequal = unequal_settings(report, [row.config for row in rows])
    return Table(title, tuple(columns), body, (measured_on(report), *notes, *unequal))


def _value(report: "Comparison", config: FitConfig, measure: str) -> float | None:
    return report.scores.get(fit_name(config), {}).get(measure)


def unequal_settings(report: "Comparison", configs: Sequence[FitConfig]) -> list[str]:
    """Say under a table where its fits were not made alike: a file that is there is not made anew.

    Args:
        report: has the files.
        configs: of the table's rows.
    """
    names = dict.fromkeys(map(fit_name, configs))
    fits = {name: read_header(report.files[name]).fit for name in names if name in report.files}
    unequal = []
    for field in dict.fromkeys(field for fit in fits.values() for field in fit):
        values: dict[str, list[str]] = {}
        for name, fit in fits.items():
            values.setdefault(str(fit.get(field, "unknown")), []).append(name)
        if field not in _OF_THE_MODEL and len(values) > 1:
            told = (f"{value} in {', '.join(members)}" for value, members in values.items())
            unequal.append(f"{field} {'; '.join(told)}")
    return [f"These fits are not of one setting: {'. '.join(unequal)}."] if unequal else []


def measured_on(report: "Comparison", views: bool = True) -> str:
    """Say what a table was measured on."""
    name = report.recipe.normalizer.name
    return (
        f"Teacher {report.teacher.spec.name} at {format_size(report.size)} px; {report.num_images} "
        f"held-out images of {report.recipe.evaluation.images}"
        + (f", {VIEWS_PER_IMAGE} random views each" if views else "")
        + f"; in the space normalised by {'PHI-S' if name == 'phi_s' else name}."
    )


def fits_table(report: "Comparison") -> Table:
    """List the fits that are compared, with what decides how good they can be."""
    keys = ("steps", "batch_size", "pool", "learning_rate", "views", "view_range")
    headers = {name: read_header(path).fit for name, path in report.files.items()}
    rows = [
        (name, *(fit.get(key) for key in keys), str(report.files[name]))
        for name, fit in headers.items()
    ]
    heads = ("fit", "steps", "batch", "pool", "learning rate", "views", "kind of views", "file")
    return Table("Fits that are compared", tuple(map(Column, heads)), tuple(rows))


def feature_sheets(report: "Comparison") -> list[Figure]:
    """Paint photographs through each upsampler of Table 9, and how it differs from bilinear."""
    figures = []
    for factor, rows in _measured_rows(report).items():
        loaded = {label: report.load(config) for label, config in rows}
        models = {label: each.model for label, each in loaded.items() if each is not None}
        if not models:
            continue
        photographs, features, changes = _photographs(report, factor), [], []
        for pixels in photographs.values():
            shown: list[Tensor] = []
            changed = []
            for label, model in models.items():
                maps = maps_of(
                    model, report.teacher, pixels[None], report.size, factor, report.precision
                )
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


def _measured_rows(report: "Comparison") -> dict[int, list[Row]]:
    """Return the rows of Table 9 that were measured."""
    factors = report.request.rows(9, report.recipe).items()
    return {
        n: [row for row in rows if fit_name(row.config) in report.scores] for n, rows in factors
    }


def _photographs(report: "Comparison", factor: int) -> dict[str, Tensor]:
    """Load held-out images ``[3, H, W]`` of ``factor`` times the teacher's input, by name."""
    size = (report.size[0] * factor, report.size[1] * factor)
    images = load_images(report.recipe.evaluation.images, report.request.num_images)
    return {key: to_pixels(image, size).to(report.device) for key, image in images}


def _photograph(pixels: Tensor) -> Image.Image:
    values = rearrange((pixels * 255).round().byte().cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _sheet(
    columns: Sequence[Sequence[Image.Image]], rows: Sequence[str], heads: Iterable[str]
) -> Image.Image:
    lines = [list(line) for line in zip(*columns, strict=True)]
    return image_grid(lines, rows, list(heads), SIDE)
