"""The report of upsamplers: measures what was asked for, prints the tables, writes the page."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from radio_distill import __version__
from radio_distill.config import FitConfig, dump
from radio_distill.errors import ConfigError
from radio_distill.report.page import (
    Section,
    definitions,
    figures_html,
    settings,
    write_page,
)
from radio_distill.report.tables import Table, print_tables, render
from radio_distill.system.files import reason_of, replacing
from radio_distill.system.precision import resolved_dtype
from upsamplers.comparison import Cost

from ..arguments import check_output
from ..common import fit_name
from .upsampler_fits import Request, Subject
from .upsampler_images import bias_figures, cost_charts, feature_figures, tile_chart, tile_figure
from .upsampler_measures import Bench, Scores
from .upsampler_tables import cost_table, fits_table, tables_of, tile_table

LEVELS = (2, 3, 4)
"""Tiles a side that are compared with the teacher at the full resolution; factors are added."""


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    bench: Bench
    tile_errors: dict[int, Scores]
    costs: list[Cost]


def report(
    subject: Subject,
    request: Request,
    files: Mapping[str, Path],
    missing: Sequence[str] = (),
) -> Path:
    """Measure, print the tables, and write RUN/upsampler_report/TEACHER; returns the page's path.

    Args:
        subject: the teacher.
        request: what to show.
        files: fitted upsamplers, by the names of their fits.
        missing: commands that would fit the others, for the page.
    """
    folder = subject.recipe.folder / "upsampler_report" / subject.teacher.spec.name
    check_output(folder / "index.html")
    results = _measured(Bench(subject, files), request)
    bench = results.bench
    tables = tables_of(bench, request)
    tiles = [tile_table(bench, results.tile_errors)] if results.tile_errors else []
    timing = [cost_table(bench, results.costs)] if results.costs else []
    print_tables([*tables, *tiles, *timing])
    sections = [
        Section("scores", "Upsamplers compared", _html(tables)),
        Section("run", "What was compared", definitions(_summary(bench, missing))),
        Section("fits", "Fits", fits_table(bench).to_html()),
        *_images(results, request, tiles),
        Section("throughput", "Throughput", _throughput(results.costs, timing)),
        Section("recipe", "Recipe", settings(dump(subject.recipe))),
    ]
    _write(folder / "tables.md", render([*tables, *tiles, *timing], "markdown"))
    _write(folder / "scores.json", json.dumps(_scores(results, request, missing), indent=2) + "\n")
    return write_page(folder / "index.html", f"Upsamplers of teacher {subject.name}", sections)


def _measured(bench: Bench, request: Request) -> Results:
    """Measure the upsamplers of all tables, then tiles, then time."""
    recipe = bench.subject.recipe
    rows = [request.rows(table, recipe) for table in request.tables]
    for factor in request.factors:
        bench.measure(factor, [row.config for table in rows for row in table[factor]])
        if 9 in request.tables:
            compared = request.rows(9, recipe)[factor]
            bench.measure_preservation(factor, [row.config for row in compared])
    errors = bench.tile_errors(sorted({*LEVELS, *request.factors}))
    costs = bench.costs([1, *sorted({*LEVELS, *request.factors})]) if request.throughput else []
    return Results(bench, errors, costs)


def _images(results: Results, request: Request, tiles: Sequence[Table]) -> list[Section]:
    """Paint the upsamplers of Table 9 that were measured, their biases, and tiles."""
    bench, count = results.bench, request.images
    rows = {
        factor: [row for row in same if fit_name(row.config) in bench.scores]
        for factor, same in request.rows(9, bench.subject.recipe).items()
    }
    features = [
        figure
        for factor, same in rows.items()
        for figure in feature_figures(bench, factor, same, count)
    ]
    painted = [
        tile_figure(bench, level, count)
        for level in request.factors
        if level in results.tile_errors
    ]
    chart = [tile_chart(results.tile_errors)] if results.tile_errors else []
    error = _html(tiles) + figures_html(chart, "panels") + figures_html(painted, "sheets")
    return [
        Section("features", "Features", figures_html(features, "sheets")),
        Section("biases", "Biases", figures_html(bias_figures(bench, rows), "sheets")),
        Section("tiles", "Tiles", error),
    ]


def _throughput(costs: Sequence[Cost], tables: Sequence[Table]) -> str:
    return _html(tables) + figures_html(cost_charts(costs) if costs else [], "panels")


def _html(tables: Sequence[Table]) -> str:
    return "".join(table.to_html() for table in tables)


def _summary(bench: Bench, missing: Sequence[str]) -> list[tuple[str, str]]:
    subject = bench.subject
    recipe, spec = subject.recipe, subject.teacher.spec
    config = recipe.teachers[subject.name]
    dtype = resolved_dtype(config.dtype, subject.device)
    cuda = subject.device.type == "cuda"
    lines = [
        ("teacher", f"{subject.name} ({config.preset}, {dtype}), {spec.channels} channels"),
        ("input", f"{subject.size[0]}x{subject.size[1]} px, patch {spec.patch_size}"),
        ("held-out images", f"{bench.num_images} of {recipe.evaluation.images}"),
        ("not fitted", "\n".join(missing)),
        ("not measured", "\n".join(bench.notes)),
        (
            "machine",
            f"{torch.cuda.get_device_name() if cuda else platform.machine()}, "
            f"{torch.get_num_threads()} threads, Python {platform.python_version()}",
        ),
        ("versions", f"radio_distill {__version__}, torch {torch.__version__}"),
    ]
    return [(name, text) for name, text in lines if text]


def _scores(results: Results, request: Request, missing: Sequence[str]) -> dict[str, Any]:
    """Return everything that was measured, unrounded, for programs."""
    bench, recipe = results.bench, results.bench.subject.recipe
    configs = {
        fit_name(row.config): row.config
        for table in request.tables
        for rows in request.rows(table, recipe).values()
        for row in rows
    }
    return {
        "teacher": bench.subject.name,
        "weights_hash": bench.subject.teacher.spec.weights_hash,
        "size": list(bench.subject.size),
        "images": {"source": recipe.evaluation.images, "number": bench.num_images},
        "upsamplers": {
            name: _described(config, bench.files.get(name)) | bench.scores[name]
            for name, config in configs.items()
            if name in bench.scores
        },
        "tile_errors": {str(level): errors for level, errors in results.tile_errors.items()},
        "costs": [item._asdict() for item in results.costs],
        "missing": list(missing),
        "notes": bench.notes,
    }


def _described(config: FitConfig, file: Path | None) -> dict[str, Any]:
    values: dict[str, Any] = {"upsampler": config.upsampler, "factor": config.factor}
    if file is not None:
        values |= {"options": config.options, "de_bias": config.de_bias, "file": str(file)}
    return values


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}") from error
