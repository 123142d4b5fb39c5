"""Multi-task gain: the relative change of many metrics against a baseline, as one number.

FeatSharp (Ranzinger et al., ICML 2025), eq. 8 and 9, after Maninis et al. 2019. The paper's prose
leaves open what the sum in eq. 9 runs over; its Table 2 follows only if the total is the mean of
the *group* means (macro), not of all metrics, and that is what is computed here. Relative change
has no meaning for a baseline at or below zero, so such a metric is refused, not guessed at.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ..errors import ConfigError, UnknownNameError
from ..registry import nearest
from .tables import Cell, Column, Estimate, Table

DEFINITION = (
    "δ of a metric is 100·(M - B)/B, with the sign reversed where lower is better (M: its value, "
    "B: the baseline's); a group is the mean of its δ; Δm is the mean of the groups. All in %."
)

Run = Mapping[str, float]
"""One result of one model: metric name to value."""
Results = Mapping[str, Run | Sequence[Run]]
"""Model name to its result, or to its results over several seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What must be known of a metric before its change can be called a gain."""

    group: str
    """The column of the gain table that it counts in."""
    higher_is_better: bool
    unit: str = ""
    headline: bool = True
    """Whether it counts; several views of one measurement would weigh it several times."""


@dataclass(frozen=True, slots=True)
class GainTable:
    """Gains over the baseline, in percent; mean and deviation where a model has several results."""

    baseline: str
    groups: dict[str, dict[str, Estimate]]
    """``groups[model][group]``."""
    totals: dict[str, Estimate]
    """Δm of each model."""
    num_metrics: dict[str, int]
    """How many metrics each group is the mean of."""
    num_results: dict[str, int]
    """How many results each model has."""
    excluded: tuple[str, ...] = ()
    """Metrics left out for every model, because some model lacks them."""

    def to_table(self, title: str = "Multi-task gain") -> Table:
        """Lay out one row a model and one column a group, Δm first, with the definition below."""
        names = ["Δm", *self.num_metrics]
        columns = [Column("Model"), *(Column(name, "+.2f", "higher") for name in names)]
        rows: list[tuple[Cell, ...]] = [
            (model, total, *self.groups[model].values()) for model, total in self.totals.items()
        ]
        return Table(title, tuple(columns), tuple(rows), self.notes())

    def notes(self) -> tuple[str, ...]:
        """Say how the numbers came about, in lines to be printed under the table."""
        counts = ", ".join(f"{group} {count}" for group, count in self.num_metrics.items())
        notes = [DEFINITION, f"Baseline: {self.baseline}. Metrics in each group: {counts}."]
        repeated = [f"{model} {n}" for model, n in self.num_results.items() if n > 1]
        if repeated:
            several = "Mean ± standard deviation over several results: "
            notes.append(several + ", ".join(repeated) + ". The baseline is its mean.")
        if self.excluded:
            left_out = ", ".join(self.excluded)
            notes.append(f"Left out for every model, because some model lacks it: {left_out}.")
        return tuple(notes)


def relative_gain(value: float, baseline: float, higher_is_better: bool) -> float:
    """Return δ = 100·(-1)^l·(M - B)/B in percent, l = 1 where lower is better (FeatSharp eq. 8).

    Raises:
        ConfigError: a value that is not finite, or a baseline at or below zero.
    """
    if not (math.isfinite(value) and math.isfinite(baseline)):
        raise ConfigError(f"no relative gain from {baseline} to {value}: both must be finite")
    if baseline <= 0:
        raise ConfigError(
            f"no relative gain over a baseline of {baseline}: it must be above zero; "
            "leave the metric out or choose another baseline"
        )
    sign = 1 if higher_is_better else -1
    return sign * 100 * (value - baseline) / baseline


def multi_task_gain(
    results: Results,
    baseline: str,
    definitions: Mapping[str, Metric],
    *,
    exclude_missing: bool = False,
) -> GainTable:
    """Compare every model with ``baseline`` on the metrics of ``definitions``.

    With several results of a model, each is compared with the mean of the baseline's results.

    Args:
        results: a result, or several, for each model.
        baseline: name of the model that the others are compared with.
        definitions: metric name to group and direction; the order of groups is kept.
        exclude_missing: leave a metric that some model lacks out for every model, and list it in
            the table's notes; by default it is an error.

    Raises:
        ConfigError: an unknown baseline or metric, a missing metric, or a baseline that is not
            above zero.
    """
    runs = _runs(results)
    if baseline not in runs:
        raise UnknownNameError(
            f"no results of baseline {baseline!r} ({nearest(baseline, [*runs])})"
        )
    excluded = _missing(runs, definitions, exclude_missing)
    metrics = {
        name: metric
        for name, metric in definitions.items()
        if metric.headline and name not in excluded
    }
    if not metrics:
        raise ConfigError("no metric is left that every model has; compare fewer models")
    reference = {name: fmean(run[name] for run in runs[baseline]) for name in metrics}
    names = _group(metrics)
    groups: dict[str, dict[str, Estimate]] = {}
    totals = {}
    for model, repeats in runs.items():
        gains = [_group_gains(run, reference, metrics, names) for run in repeats]
        groups[model] = {group: _estimate([gain[group] for gain in gains]) for group in names}
        totals[model] = _estimate([fmean(gain.values()) for gain in gains])
    num_metrics = {group: len(members) for group, members in names.items()}
    num_results = {model: len(repeats) for model, repeats in runs.items()}
    return GainTable(baseline, groups, totals, num_metrics, num_results, tuple(excluded))


def score_tables(results: Results, definitions: Mapping[str, Metric]) -> list[Table]:
    """Lay out the scores themselves: a table for each group, a row for each model that has any."""
    runs = _runs(results)
    tables = []
    for group, names in _group(definitions).items():
        rows = [
            (model, *(_score(repeats, name) for name in names))
            for model, repeats in runs.items()
            if any(name in run for run in repeats for name in names)
        ]
        scores = zip(*(row[1:] for row in rows), strict=True)
        columns = [
            _score_column(name, definitions[name], column)
            for name, column in zip(names, scores, strict=True)
        ]
        tables.append(Table(group, (Column("Model"), *columns), tuple(rows)))
    return tables


def _runs(results: Results) -> dict[str, list[Run]]:
    runs = {
        model: [given] if isinstance(given, Mapping) else list(given)
        for model, given in results.items()
    }
    for model, repeats in runs.items():
        if not repeats:
            raise ConfigError(f"model {model!r} has no results")
    return runs


def _missing(
    runs: Mapping[str, list[Run]], definitions: Mapping[str, Metric], exclude: bool
) -> list[str]:
    """List the metrics that some model lacks, or raise; unknown metrics always raise."""
    lacking: dict[str, str] = {}
    for model, repeats in runs.items():
        for run in repeats:
            for name in run:
                if name not in definitions:
                    known = nearest(name, [*definitions])
                    raise UnknownNameError(
                        f"metric {name!r} of model {model!r} has no definition ({known})"
                    )
            lacking |= {
                name: model
                for name, metric in definitions.items()
                if metric.headline and name not in run
            }
    if lacking and not exclude:
        name, model = next(iter(lacking.items()))
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise ConfigError(
            f"model {model!r} lacks metric {name!r}{more}; score it, drop the model, or leave the "
            "metric out for all with --exclude-missing"
        )
    return [name for name in definitions if name in lacking]


def _group(definitions: Mapping[str, Metric]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, metric in definitions.items():
        groups.setdefault(metric.group, []).append(name)
    return groups


def _group_gains(
    run: Run,
    reference: Run,
    metrics: Mapping[str, Metric],
    groups: Mapping[str, list[str]],
) -> dict[str, float]:
    gains = {}
    for name, metric in metrics.items():
        try:
            gains[name] = relative_gain(run[name], reference[name], metric.higher_is_better)
        except ConfigError as error:
            raise ConfigError(f"metric {name!r}: {error}") from error
    return {group: fmean(gains[name] for name in names) for group, names in groups.items()}


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None)


def _score(repeats: Iterable[Run], name: str) -> Cell:
    values = [run[name] for run in repeats if name in run]
    return _estimate(values) if values else None


def _score_column(name: str, metric: Metric, cells: Sequence[Cell]) -> Column:
    """Write four significant digits of the largest value, the same decimals down the column."""
    largest = max((abs(cell.mean) for cell in cells if isinstance(cell, Estimate)), default=0.0)
    digits = math.ceil(math.log10(largest)) if largest > 0 else 1
    heading = f"{name} ({metric.unit})" if metric.unit not in ("", "1") else name
    spec = f".{min(max(4 - digits, 1), 8)}f"
    return Column(heading, spec, "higher" if metric.higher_is_better else "lower")
