"""Tables of gains (Δm) and of the scores behind them."""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..evals.gain import Estimate, Measured, Metric, MultiTaskGain, Results, Run, estimate, runs_of
from ..evals.headlines import in_order
from .tables import Cell, Column, Table

DEFINITION = (
    "δ of a metric is 100·(M - B)/B, with the sign reversed where lower is better (M: its value, "
    "B: the baseline's); a group is the mean of its δ; Δm is the mean of the groups. All in %."
)

NOTHING_COUNTS = (
    "No Δm: only tasks that no student was trained for count in it, and none was scored; name some "
    "in evaluation.benchmarks (knn, segmentation, correspondence, agreement, stereo) and run "
    "radio-distill eval."
)


def gain_tables(gain: MultiTaskGain) -> list[Table]:
    """Return the table of gains, and behind it the scores that do not count."""
    return [gain_table(gain), *beside_tables(gain)]


def gain_table(gain: MultiTaskGain, title: str = "Multi-task gain") -> Table:
    """Lay out one row a model and one column a group, Δm first, with the definition below."""
    names = ["Δm", *gain.num_metrics]
    columns = [Column("Model"), *(Column(name, "+.2f", "higher") for name in names)]
    rows: list[tuple[Cell, ...]] = [
        (model, gain.totals.get(model), *(gains.get(group) for group in gain.num_metrics))
        for model, gains in gain.groups.items()
    ]
    return Table(title, tuple(columns), tuple(rows), gain_notes(gain))


def beside_tables(gain: MultiTaskGain) -> list[Table]:
    """Lay out the scores of what students are trained for."""
    return score_tables(gain.beside, gain.trained)


def gain_notes(gain: MultiTaskGain) -> tuple[str, ...]:
    """Say how the numbers came about, in lines to be printed under the table."""
    counts = ", ".join(f"{group} {count}" for group, count in gain.num_metrics.items())
    notes = [DEFINITION, f"Baseline: {gain.baseline}. Metrics in each group: {counts}."]
    shown = {name for runs in gain.beside.values() for run in runs for name in run}
    beside = dict.fromkeys(m.group for name, m in gain.trained.items() if name in shown)
    if not gain.num_metrics:
        notes = [f"Baseline: {gain.baseline}. {NOTHING_COUNTS}"]
    elif beside:
        notes.append(f"{', '.join(beside)} does not count: students are trained for it.")
    lacking = [model for model in gain.groups if model not in gain.totals]
    if lacking and gain.num_metrics:
        notes.append(f"Without Δm, because a metric is lacking: {', '.join(lacking)}.")
    repeated = [f"{model} {n}" for model, n in gain.num_results.items() if n > 1]
    if repeated:
        several = "Mean ± standard deviation over several results: "
        notes.append(several + ", ".join(repeated) + ". The baseline is its mean.")
    if gain.excluded:
        left_out = ", ".join(gain.excluded)
        notes.append(f"Left out for every model, because some model lacks it: {left_out}.")
    return (*notes, *gain.remarks)


def score_tables(
    results: Results,
    definitions: Mapping[str, Metric],
    measured: Mapping[str, Mapping[str, Measured]] | None = None,
) -> list[Table]:
    """Lay out the scores themselves: a table for each group, a row for each model that has any.

    A group whose metrics are ``benchmark/metric/OF`` (fidelity to each teacher) has a table for
    each of those metrics, with a column for each OF.

    Args:
        results: a result, or several, for each model.
        definitions: of the metrics that are shown.
        measured: ``{model: {metric: how}}``, for notes.
    """
    runs = runs_of(results)
    tables = []
    for (group, kind), names in _tabled(definitions).items():
        rows = [
            (model, *(_score(repeats, name) for name in names))
            for model, repeats in runs.items()
            if any(name in run for run in repeats for name in names)
        ]
        if not rows:
            continue
        shared = f"{kind}/" if kind else _shared_prefix(names)
        scores = zip(*(row[1:] for row in rows), strict=True)
        columns = [
            _score_column(name, definitions[name], column, shared)
            for name, column in zip(names, scores, strict=True)
        ]
        notes = _notes([str(row[0]) for row in rows], names, measured or {})
        title = _title(group, kind or shared.rstrip("/"))
        tables.append(Table(title, (Column("Model"), *columns), tuple(rows), notes))
    return tables


def headline_table(
    results: Results,
    definitions: Mapping[str, Metric],
    measured: Mapping[str, Mapping[str, Measured]] | None = None,
) -> Table:
    """Lay out the metrics that count, of all groups: one row a model, in the paper's order.

    The arguments are those of :func:`score_tables`.
    """
    runs = runs_of(results)
    metrics = {name: metric for name, metric in in_order(definitions).items() if metric.counts}
    rows = [
        (model, *(_score(repeats, name) for name in metrics))
        for model, repeats in runs.items()
        if any(name in run for run in repeats for name in metrics)
    ]
    columns = [
        _score_column(name, metric, [row[number] for row in rows], "")
        for number, (name, metric) in enumerate(metrics.items(), start=1)
    ]
    known = {model: (measured or {}).get(model, {}) for model in runs}
    return Table("Headlines", (Column("Model"), *columns), tuple(rows), _protocols(known, metrics))


MOST_METRICS = 6
"""Of a group in one table; a group of more has one for each benchmark."""


def _tabled(definitions: Mapping[str, Metric]) -> dict[tuple[str, str], list[str]]:
    """Sort metrics into tables: by group, and by measure where they are of several teachers."""
    groups: dict[str, list[str]] = {}
    for name, metric in definitions.items():
        groups.setdefault(metric.group, []).append(name)
    tables: dict[tuple[str, str], list[str]] = {}
    for group, names in groups.items():
        for name in names:
            *shared, _ = name.split("/", 2)
            kind = "/".join(shared) if len(shared) > 1 or len(names) > MOST_METRICS else ""
            tables.setdefault((group, kind), []).append(name)
    return tables


def _shared_prefix(names: Sequence[str]) -> str:
    """Return ``benchmark/`` where all names begin with it."""
    prefixes = {name.partition("/")[0] for name in names if "/" in name}
    return f"{prefixes.pop()}/" if len(prefixes) == 1 and all("/" in name for name in names) else ""


def _title(group: str, of: str) -> str:
    """Say what all columns of a table share, each word of it once."""
    words = [word for word in of.split("/") if word and word.lower() != group.lower()]
    return f"{group}: {' '.join(words)}" if words else group


def _notes(
    models: Sequence[str], names: Sequence[str], measured: Mapping[str, Mapping[str, Measured]]
) -> tuple[str, ...]:
    """Say at which size each model was scored, on what, and under which protocol."""
    sizes: dict[str, list[str]] = {}
    what: dict[str, None] = {}
    for model in models:
        known = {name: how for name, how in measured.get(model, {}).items() if name in names}
        for size in dict.fromkeys(how.pixels for how in known.values() if how.pixels):
            sizes.setdefault(size, []).append(model)
        for name, how in known.items():
            if how.details:
                what[f"{name.partition('/')[0]}: {how.of}"] = None
    notes = (*what, *_protocols({it: measured.get(it, {}) for it in models}, names))
    if not sizes:
        return notes
    alike = len(sizes) == 1 and [*sizes.values()] == [list(models)]
    parts = [size if alike else f"{size} ({', '.join(of)})" for size, of in sizes.items()]
    return (*notes, f"Input in pixels: {'; '.join(parts)}.")


def _protocols(
    measured: Mapping[str, Mapping[str, Measured]], names: Iterable[str]
) -> tuple[str, ...]:
    """Say under which protocols some metrics were measured, where that is known.

    Where models were asked for a metric under several, say which under which.
    """
    models: dict[str, dict[str, list[str]]] = {name: {} for name in names}  # by protocol
    for model, known in measured.items():
        for name, how in known.items():
            if name in models and how.protocol:
                models[name].setdefault(how.protocol, []).append(model)
    every = {protocol: "" for of in models.values() for protocol in of}
    for of in models.values():
        if len(of) > 1:
            every |= {protocol: f" ({', '.join(some)})" for protocol, some in of.items()}
    if not every:
        return ()
    unlike = "; rows of different ones do not compare" if any(every.values()) else ""
    return (f"Protocol: {', '.join(name + of for name, of in every.items())}{unlike}.",)


def _score(repeats: Iterable[Run], name: str) -> Cell:
    values = [run[name] for run in repeats if name in run]
    return estimate(values) if values else None


def _score_column(name: str, metric: Metric, cells: Sequence[Cell], shared: str) -> Column:
    """Write four significant digits of the largest value, the same decimals down the column."""
    means = [abs(cell.mean) for cell in cells if isinstance(cell, Estimate)]
    largest = max(filter(math.isfinite, means), default=0.0)
    digits = math.ceil(math.log10(largest)) if largest > 0 else 1
    heading = name.removeprefix(shared)
    if metric.unit not in ("", "1"):
        heading = f"{heading} ({metric.unit})"
    spec = f".{min(max(4 - digits, 1), 8)}f"
    return Column(heading, spec, "higher" if metric.higher_is_better else "lower")
