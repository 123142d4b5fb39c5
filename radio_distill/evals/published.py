"""Gain tables that were printed in papers, recomputed from the raw metrics printed beside them.

They prove the definition in ``mtl_gain.py`` against numbers that are not ours. Where a paper
contradicts itself, both readings are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import build
from ..errors import UnknownNameError
from ..registry import nearest
from ..report.tables import Cell, Column, Table
from .mtl_gain import GainTable, Metric, multi_task_gain
from .score_files import read_yaml

PAPERS = {"featsharp": Path(__file__).parent / "data" / "featsharp_tables.yaml"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One printed value that contradicts the paper's own gain table."""

    model: str
    metric: str
    printed: float
    corrected: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How closely a group's printed gains can be met, and why not better."""

    tolerance: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """Raw metrics of a paper, and the gains that it prints."""

    source: str
    baseline: str
    metrics: dict[str, Metric]
    results: dict[str, dict[str, float]]
    """Every number as printed."""
    gains: dict[str, dict[str, float]]
    """``gains[model][group]`` as printed, with the total under ``Δm``."""
    corrections: tuple[Correction, ...] = ()
    tolerances: dict[str, Tolerance]

    def recompute(self, corrected: bool) -> GainTable:
        """Compute the gains, from the values as printed or with the corrections."""
        results = {model: dict(run) for model, run in self.results.items()}
        for item in self.corrections if corrected else ():
            results[item.model][item.metric] = item.corrected
        return multi_task_gain(results, self.baseline, self.metrics)


def load_paper(name: str) -> Paper:
    """Load a paper's tables by name; raises UnknownNameError."""
    if name not in PAPERS:
        raise UnknownNameError(f"no tables of paper {name!r} ({nearest(name, [*PAPERS])})")
    paper: Paper = build(Paper, read_yaml(PAPERS[name]), name)
    return paper


def comparison(paper: Paper) -> list[Table]:
    """Lay out the recomputed gains and their distance to the printed ones, corrected or not."""
    as_printed, corrected = paper.recompute(corrected=False), paper.recompute(corrected=True)
    changed = {item.model: item for item in paper.corrections}
    gains: list[tuple[str, dict[str, float], dict[str, float]]] = []
    for model, printed in paper.gains.items():
        label = f"{model} ({changed[model].corrected:g})" if model in changed else model
        gains.append((label, _row(corrected, model), printed))
        if model in changed:
            gains.append(
                (f"{model} ({changed[model].printed:g})", _row(as_printed, model), printed)
            )
    names = ["Δm", *corrected.num_metrics]
    notes = [f"Source: {paper.source}.", *corrected.notes()]
    misprints = [_explain(item) for item in paper.corrections]
    limits = [
        f"{group}: met within {limit.tolerance:g}, because {limit.reason}."
        for group, limit in paper.tolerances.items()
    ]
    recomputed: list[tuple[Cell, ...]] = [
        (label, *(gain[name] for name in names)) for label, gain, _ in gains
    ]
    # At the printed precision, two digits.
    distances: list[tuple[Cell, ...]] = [
        (label, *(round(gain[name], 2) - printed[name] for name in names))
        for label, gain, printed in gains
    ]
    return [
        _table("Gains over the baseline, recomputed", names, "+.2f", recomputed, notes),
        _table("Recomputed minus printed", names, ".2f", distances, misprints + limits),
    ]


def _table(
    title: str, names: list[str], spec: str, rows: Sequence[tuple[Cell, ...]], notes: list[str]
) -> Table:
    columns = (Column("Model"), *(Column(name, spec) for name in names))
    return Table(title, columns, tuple(rows), tuple(notes))


def _row(table: GainTable, model: str) -> dict[str, float]:
    gains = {group: estimate.mean for group, estimate in table.groups[model].items()}
    return gains | {"Δm": table.totals[model].mean}


def _explain(item: Correction) -> str:
    return (
        f"{item.model}, {item.metric}: printed {item.printed:g}, taken as {item.corrected:g}. "
        f"{item.reason[0].upper()}{item.reason[1:]}. Both are shown."
    )
