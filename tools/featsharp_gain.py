"""FeatSharp's gain table (Table 2), recomputed from the raw metrics printed in its Tables 3 to 6.

    python -m tools.featsharp_gain [FORMAT]

It proves the definition of Δm (radio_distill/evals/gain.py) against numbers that are not ours.
Where the paper contradicts itself, both readings are shown. FORMAT is one of `radio-distill score`;
docs/multi_task_gain.md has the tables in `markdown`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radio_distill.config import build
from radio_distill.evals.gain import Metric, MultiTaskGain, multi_task_gain
from radio_distill.evals.score_tables import read_yaml
from radio_distill.report.gain_tables import gain_notes
from radio_distill.report.tables import Cell, Column, Table, render

FILE = Path(__file__).with_name("featsharp_tables.yaml")


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

    def recompute(self, corrected: bool) -> MultiTaskGain:
        """Compute the gains, from the values as printed or with the corrections."""
        results = {model: dict(run) for model, run in self.results.items()}
        for change in self.corrections if corrected else ():
            results[change.model][change.metric] = change.corrected
        return multi_task_gain(results, self.baseline, self.metrics)


def load_paper() -> Paper:
    """Read the paper's tables."""
    paper: Paper = build(Paper, read_yaml(FILE), FILE.stem)
    return paper


def comparison(paper: Paper) -> list[Table]:
    """Lay out the recomputed gains and their distance to the printed ones, corrected or not."""
    as_printed, corrected = paper.recompute(corrected=False), paper.recompute(corrected=True)
    changed = {change.model: change for change in paper.corrections}
    names = ["Δm", *corrected.num_metrics]
    recomputed: list[tuple[Cell, ...]] = []
    distances: list[tuple[Cell, ...]] = []
    for model, printed in paper.gains.items():
        readings = {model: corrected}
        if model in changed:
            change = changed[model]
            readings = {
                f"{model} ({change.corrected:g})": corrected,
                f"{model} ({change.printed:g})": as_printed,
            }
        for label, table in readings.items():
            gain = {group: value.mean for group, value in table.groups[model].items()}
            gain["Δm"] = table.totals[model].mean
            recomputed.append((label, *(gain[name] for name in names)))
            # At the printed precision, two digits.
            distances.append((label, *(round(gain[name], 2) - printed[name] for name in names)))
    misprints = [
        f"{change.model}, {change.metric}: printed {change.printed:g}, taken as "
        f"{change.corrected:g}. {change.reason[0].upper()}{change.reason[1:]}. Both are shown."
        for change in paper.corrections
    ]
    limits = [
        f"{group}: met within {limit.tolerance:g}, because {limit.reason}."
        for group, limit in paper.tolerances.items()
    ]
    notes = [f"Source: {paper.source}.", *gain_notes(corrected)]
    return [
        _table("Gains over the baseline, recomputed", names, "+.2f", recomputed, notes),
        _table("Recomputed minus printed", names, ".2f", distances, misprints + limits),
    ]


def _table(
    title: str, names: list[str], spec: str, rows: Sequence[tuple[Cell, ...]], notes: list[str]
) -> Table:
    columns = (Column("Model"), *(Column(name, spec) for name in names))
    return Table(title, columns, tuple(rows), tuple(notes))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    (form,) = [*(sys.argv[1:] if argv is None else argv)] or ["terminal"]
    print(render(comparison(load_paper()), form), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
