"""Tables 7 to 10 of FeatSharp (arXiv 2502.16025, appendix B), of one's own teacher and images."""

from collections.abc import Mapping, Sequence

from radio_distill.config import FitConfig
from radio_distill.report.tables import Cell, Column, Table
from upsamplers.comparison import Cost
from upsamplers.fitted import read_header
from upsamplers.measure import VIEWS_PER_PICTURE

from ..common import fit_name
from .upsampler_fits import Request, Row, is_network
from .upsampler_measures import Bench, Scores

MEASURES = {
    "fidelity": Column("fidelity", ".3f", "higher"),
    "total_variation": Column("TV", ".4f", "lower"),
    "crf": Column("CRF", ".4f", "lower"),
    "mmd": Column("MMD", ".5f", "lower"),
    "preservation": Column("preserved mIoU", ".1%", "higher"),
}


def tables_of(bench: Bench, request: Request) -> list[Table]:
    """Make those of the tables that have any value; a dash stands for what is not there."""
    made = []
    for number in request.tables:
        rows = request.rows(number, bench.subject.recipe)
        if number == 7:
            made.append(_de_bias(bench, rows))
        elif number == 8:
            made += [_inputs(bench, factor, same) for factor, same in rows.items()]
        elif number == 9:
            made += [_upsamplers(bench, factor, same) for factor, same in rows.items()]
        else:
            made.append(_modules(bench, rows))
    return [item for item in made if any(cell is not None for row in item.rows for cell in row[1:])]


def _de_bias(bench: Bench, rows: Mapping[int, Sequence[Row]]) -> Table:
    """Table 7: rows come in pairs, without and with."""
    columns = [Column("upsampler")]
    cells: dict[str, list[Cell]] = {}
    for factor, same in rows.items():
        columns += [
            Column(f"{factor}x without", ".3f"),
            Column(f"{factor}x with", ".3f"),
            Column(f"{factor}x change", "+.3f", "higher"),
        ]
        for (label, without), (_, with_bias) in zip(same[::2], same[1::2], strict=True):
            low, high = (_value(bench, config, "fidelity") for config in (without, with_bias))
            change = None if low is None or high is None else high - low
            cells.setdefault(label, []).extend([low, high, change])
    return Table(
        "De-bias: fidelity without and with (FeatSharp, Table 7)",
        tuple(columns),
        tuple((label, *values) for label, values in cells.items()),
        (
            measured_on(bench),
            "The bias is taken off predictions again, so the target is the same.",
            *unequal_settings(bench, [row.config for same in rows.values() for row in same]),
        ),
    )


def _inputs(bench: Bench, factor: int, rows: Sequence[Row]) -> Table:
    return _measured(
        bench,
        f"Inputs of FeatSharp, {factor}x (FeatSharp, Table 8)",
        "inputs, residual first",
        rows,
        ("fidelity", "total_variation", "crf"),
    )


def _upsamplers(bench: Bench, factor: int, rows: Sequence[Row]) -> Table:
    measures = ["fidelity", "total_variation", "crf", "mmd"]
    notes = ["bilinear has a fitted de-bias and downsampler, and no network."]
    free = [label for label, config in rows if not is_network(config.upsampler)]
    if free:
        notes.append(
            f"Nothing is fitted in {', '.join(free)}: no de-bias, and fidelity is taken through "
            "the downsampler that was fitted for bilinear."
        )
    low = [_value(bench, config, "preservation_low") for _, config in rows]
    known = [value for value in low if value is not None]
    if known:
        measures.append("preservation")
        notes.append(
            "Preserved mIoU: a linear probe, trained on the teacher's own low-resolution maps of "
            f"{bench.subject.recipe.evaluation.segmentation} ({bench.num_classes} classes), "
            "applied to upsampled ones in the "
            f"teacher's own space; on the teacher's own maps it has {known[0]:.1%}."
        )
    title = f"Upsamplers, {factor}x (FeatSharp, Table 9)"
    return _measured(bench, title, "upsampler", rows, measures, notes)


def _modules(bench: Bench, rows: Mapping[int, Sequence[Row]]) -> Table:
    cells: dict[str, list[Cell]] = {}
    for same in rows.values():
        for label, config in same:
            cells.setdefault(label, []).append(_value(bench, config, "fidelity"))
    return Table(
        "Modules of FeatSharp: fidelity (FeatSharp, Table 10)",
        (Column("modules"), *(Column(f"{factor}x", ".3f", "higher") for factor in rows)),
        tuple((label, *values) for label, values in cells.items()),
        (
            measured_on(bench),
            "The inputs are bilinear, which is the residual path, and tiles.",
            *unequal_settings(bench, [row.config for same in rows.values() for row in same]),
        ),
    )


def _measured(
    bench: Bench,
    title: str,
    first: str,
    rows: Sequence[Row],
    measures: Sequence[str],
    notes: Sequence[str] = (),
) -> Table:
    body = [
        (label, *(_value(bench, config, measure) for measure in measures)) for label, config in rows
    ]
    columns = (Column(first), *(MEASURES[measure] for measure in measures))
    unequal = unequal_settings(bench, [row.config for row in rows])
    return Table(title, columns, tuple(body), (measured_on(bench), *notes, *unequal))


_OF_THE_MODEL = ("teacher", "upsampler", "factor", "options", "de_bias", "images_every", "size")
"""Fields of a fit that the rows of a table say themselves, or that change no number."""


def unequal_settings(bench: Bench, configs: Sequence[FitConfig]) -> list[str]:
    """Say under a table where its fits were not made alike: a file that is there is not made anew.

    Args:
        bench: has the files.
        configs: of the table's rows.
    """
    names = dict.fromkeys(map(fit_name, configs))
    fits = {name: read_header(bench.files[name]).fit for name in names if name in bench.files}
    fields = dict.fromkeys(field for fit in fits.values() for field in fit)
    unequal = []
    for field in fields:
        values: dict[str, list[str]] = {}
        for name, fit in fits.items():
            values.setdefault(str(fit.get(field, "unknown")), []).append(name)
        if field not in _OF_THE_MODEL and len(values) > 1:
            told = (f"{value} in {', '.join(members)}" for value, members in values.items())
            unequal.append(f"{field} {'; '.join(told)}")
    return [f"These fits are not of one setting: {'. '.join(unequal)}."] if unequal else []


def fits_table(bench: Bench) -> Table:
    """List the fits that are compared, with what decides how good they can be."""
    rows = []
    for name, path in bench.files.items():
        fit = read_header(path).fit
        keys = ("steps", "batch_size", "pool", "learning_rate", "views", "view_range")
        rows.append((name, *(fit.get(key) for key in keys), str(path)))
    heads = ("fit", "steps", "batch", "pool", "learning rate", "views", "kind of views", "file")
    return Table("Fits that are compared", tuple(map(Column, heads)), tuple(rows))


def tile_table(bench: Bench, errors: Mapping[int, Scores]) -> Table:
    """Make the table of Figure 15."""
    height, width = bench.subject.size
    rows = [
        (
            f"{level} x {level}",
            f"{height * level}x{width * level}",
            error["tiles"],
            error["bilinear"],
        )
        for level, error in errors.items()
    ]
    return Table(
        "Error of tiles from the teacher at the full resolution (FeatSharp, Figure 15)",
        (
            Column("tiles"),
            Column("image, px"),
            Column("MSE of tiles", ".4f"),
            Column("MSE of bilinear", ".4f"),
        ),
        tuple(rows),
        (
            measured_on(bench, views=False),
            "In that space a feature's variance is 1. Bilinear interpolates the teacher's map of "
            "the whole image at the low resolution.",
        ),
    )


def cost_table(bench: Bench, costs: Sequence[Cost]) -> Table:
    """Make the table of Figure 14."""
    return Table(
        "Throughput (FeatSharp, Figure 14)",
        (
            Column("method"),
            Column("factor"),
            Column("tokens"),
            Column("ms a image", ".1f"),
            Column("µs a token", ".2f"),
        ),
        tuple(
            (
                item.name,
                f"{item.factor}x",
                item.tokens,
                1e3 * item.seconds,
                1e6 * item.seconds / item.tokens,
            )
            for item in costs
        ),
        (
            f"Teacher {bench.subject.name}, low resolution {_size(bench)} px, one image at a "
            "time, medians. The teacher is shown the full resolution; featup and featsharp make a "
            "map of that grid, the teacher's forwards included.",
        ),
    )


def measured_on(bench: Bench, views: bool = True) -> str:
    """Say what a table was measured on."""
    subject = bench.subject
    name = "PHI-S" if subject.recipe.normalizer.name == "phi_s" else subject.recipe.normalizer.name
    return (
        f"Teacher {subject.name} at {_size(bench)} px; {bench.num_images} held-out images of "
        f"{subject.recipe.evaluation.images}"
        + (f", {VIEWS_PER_PICTURE} random views each" if views else "")
        + f"; in the space normalised by {name}."
    )


def _size(bench: Bench) -> str:
    return "x".join(map(str, bench.subject.size))


def _value(bench: Bench, config: FitConfig, measure: str) -> float | None:
    return bench.scores.get(fit_name(config), {}).get(measure)
