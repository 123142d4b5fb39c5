"""Multi-task gain: the relative change of many metrics against a baseline, as one number.

FeatSharp (Ranzinger et al., ICML 2025), eq. 8 and 9, after Maninis et al. 2019. The paper's prose
leaves open what the sum in eq. 9 runs over; its Table 2 follows only if the total is the mean of
the *group* means (macro), not of all metrics, and that is what is computed here. Relative change
has no meaning for a baseline at or below zero, so such a metric is refused, not guessed at.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import NamedTuple

from ..errors import ConfigError, UnknownNameError
from ..registry import nearest

Run = Mapping[str, float]
"""One result of one model: metric name to value."""
Results = Mapping[str, Run | Sequence[Run]]
"""Model name to its result, or to its results over several seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric: its group, its direction, and whether it counts."""

    group: str
    """The column of the gain table that it counts in."""
    higher_is_better: bool
    unit: str = ""
    headline: bool = True
    """Whether it counts; several views of one measurement would weigh it several times."""
    trained_for: bool = False
    """Whether students are trained for it: then it is shown beside Δm, and does not count."""

    @property
    def counts(self) -> bool:
        """Whether it is part of Δm."""
        return self.headline and not self.trained_for


@dataclass(frozen=True, slots=True)
class Measured:
    """How a value came about: what must agree where values are compared."""

    num_samples: int = 0
    """Images or pairs; 0 where not known."""
    pixels: str = ""
    """Sizes that the encoder was given; empty where not known."""
    against: str = ""
    """Digest of the teacher that fidelity is to; empty where not known."""
    details: str = ""
    """Further facts of its benchmark, for instance the number of classes."""
    protocol: str = ""
    """``NAME@HASH`` of all that decides the number; empty where not known."""

    @property
    def of(self) -> str:
        """The images and classes that it was measured on, in words."""
        images = f"images {self.num_samples}" if self.num_samples else ""
        return ", ".join(filter(None, (images, self.details)))


class Estimate(NamedTuple):
    """A mean, and its standard deviation over repeated results where there are several."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True, slots=True)
class MultiTaskGain:
    """Gains over the baseline, in percent; mean and deviation where a model has several results."""

    baseline: str
    groups: dict[str, dict[str, Estimate]]
    """``groups[model][group]``; without those groups that a model lacks a metric of."""
    totals: dict[str, Estimate]
    """Δm of each model that has all metrics."""
    num_metrics: dict[str, int]
    """How many metrics each group is the mean of."""
    num_results: dict[str, int]
    """How many results each model has."""
    excluded: tuple[str, ...] = ()
    """Metrics left out for every model, because some model lacks them."""
    trained: dict[str, Metric] = field(default_factory=dict)
    """Metrics that students are trained for: they are shown beside Δm and do not count."""
    beside: dict[str, list[Run]] = field(default_factory=dict)
    """Results of these metrics, by model."""
    remarks: tuple[str, ...] = ()
    """Further notes of the table."""


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
    may_lack: Collection[str] = (),
    remarks: Sequence[str] = (),
) -> MultiTaskGain:
    """Compare every model with ``baseline`` on the metrics of ``definitions``.

    With several results of a model, each is compared with the mean of the baseline's results. What
    students are trained for does not count; where nothing else was scored no model has a Δm.

    Args:
        results: a result, or several, for each model.
        baseline: name of the model that the others are compared with.
        definitions: metric name to group and direction; the order of groups is kept.
        exclude_missing: leave a metric that some model lacks out for every model, and list it in
            the table's notes; by default it is an error.
        may_lack: models that have no Δm, instead of an error, where they lack a metric.
        remarks: further notes of the table.

    Raises:
        ConfigError: an unknown baseline or metric, a missing metric, or a baseline that is not
            above zero.
    """
    runs = runs_of(results)
    _check_names(runs, baseline, definitions)
    needed = {model: runs[model] for model in runs if model not in may_lack or model == baseline}
    metrics, excluded = _metrics_of(needed, definitions, exclude_missing, bool(may_lack))
    trained = {name: m for name, m in definitions.items() if m.trained_for and m.headline}
    if not metrics and not trained:
        raise ConfigError("no metric is left that every model has; compare fewer models")
    reference = {name: fmean(run[name] for run in runs[baseline]) for name in metrics}
    members: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        members.setdefault(metric.group, []).append(name)
    groups: dict[str, dict[str, Estimate]] = {}
    totals = {}
    for model, repeats in runs.items():
        gains = [_group_gains(run, reference, metrics, members) for run in repeats]
        whole = [group for group in members if all(group in gain for gain in gains)]
        groups[model] = {group: estimate([gain[group] for gain in gains]) for group in whole}
        if whole and len(whole) == len(members):
            totals[model] = estimate([fmean(gain.values()) for gain in gains])
    return MultiTaskGain(
        baseline,
        groups,
        totals,
        num_metrics={group: len(names) for group, names in members.items()},
        num_results={model: len(repeats) for model, repeats in runs.items()},
        excluded=excluded,
        trained=trained,
        beside={
            model: [{name: run[name] for name in trained if name in run} for run in repeats]
            for model, repeats in runs.items()
        },
        remarks=tuple(remarks),
    )


def runs_of(results: Results) -> dict[str, list[Run]]:
    """Return the results of each model as a list; raises ConfigError where one has none."""
    runs = {
        model: [given] if isinstance(given, Mapping) else list(given)
        for model, given in results.items()
    }
    for model, repeats in runs.items():
        if not repeats:
            raise ConfigError(f"model {model!r} has no results")
    return runs


def _check_names(
    runs: Mapping[str, list[Run]], baseline: str, definitions: Mapping[str, Metric]
) -> None:
    if baseline not in runs:
        hint = nearest(baseline, [*runs])
        raise UnknownNameError(f"no results of baseline {baseline!r} ({hint})")
    for model, repeats in runs.items():
        for name in (name for run in repeats for name in run):
            if name not in definitions:
                hint = nearest(name, [*definitions])
                raise UnknownNameError(
                    f"metric {name!r} of model {model!r} has no definition ({hint})"
                )


def _metrics_of(
    runs: Mapping[str, list[Run]],
    definitions: Mapping[str, Metric],
    exclude_missing: bool,
    only_known: bool,
) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """Return the metrics that count and that every result has, and those that one lacks, or raise.

    With ``only_known``, a metric that none of these results has is no metric of theirs.
    """
    every = [(model, run) for model, repeats in runs.items() for run in repeats]
    known = {name for _, run in every for name in run}
    counting = {
        name: metric
        for name, metric in definitions.items()
        if metric.counts and (name in known or not only_known)
    }
    lacking: dict[str, str] = {}
    for model, run in every:
        lacking |= {name: model for name in counting if name not in run}
    if lacking and not exclude_missing:
        name, model = next(iter(lacking.items()))
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise ConfigError(
            f"model {model!r} lacks metric {name!r}{more}; score it, drop the model, or leave the "
            "metric out for all with --exclude-missing"
        )
    metrics = {name: metric for name, metric in counting.items() if name not in lacking}
    return metrics, tuple(name for name in counting if name in lacking)


def _group_gains(
    run: Run,
    reference: Run,
    metrics: Mapping[str, Metric],
    groups: Mapping[str, list[str]],
) -> dict[str, float]:
    """Return the gains of those groups that a result has all metrics of."""
    gains = {}
    for name, metric in metrics.items():
        if name not in run:
            continue
        try:
            gains[name] = relative_gain(run[name], reference[name], metric.higher_is_better)
        except ConfigError as error:
            raise ConfigError(f"metric {name!r}: {error}") from error
    return {
        group: fmean(gains[name] for name in names)
        for group, names in groups.items()
        if all(name in gains for name in names)
    }


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of a model's values, and their deviation where there are several."""
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None)
