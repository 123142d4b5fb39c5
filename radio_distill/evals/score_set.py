"""Results of several models: what they are, and whether they may be compared."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from ..errors import DataError, UnknownNameError
from ..registry import nearest
from .gain import Measured, Metric
from .headlines import coverage
from .subjects import Subject, full_label, matches


@dataclass(frozen=True, slots=True)
class ScoreSet:
    """Results of several models, and what is known of their metrics."""

    results: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """``{label: results}``, each result ``{metric: value}``."""
    definitions: dict[str, Metric] = field(default_factory=dict)
    subjects: dict[str, list[Subject]] = field(default_factory=dict)
    """The subject of each result, for those out of JSON lines."""
    files: dict[str, list[Path]] = field(default_factory=dict)
    """The file of each of these."""
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """``{label: {metric: how}}``, for those out of JSON lines."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the files, for the reader."""

    @property
    def teachers(self) -> frozenset[str]:
        """Labels of teachers."""
        return frozenset(label for label, of in self.subjects.items() if of[0].is_teacher)

    def add(self, model: str, run: Mapping[str, float]) -> None:
        """Add a result: to one of the model's that shares no metric with it, else as a new one."""
        runs = self.results.setdefault(model, [])
        for known in runs:
            if not known.keys() & run.keys():
                known.update(run)
                return
        runs.append(dict(run))

    def define(self, name: str, metric: Metric, where: str) -> None:
        """Add a definition; raises DataError where it contradicts an earlier one."""
        if self.definitions.setdefault(name, metric) != metric:
            raise DataError(
                f"{where}: metric {name!r} is {metric}, but was {self.definitions[name]} before; "
                "settle it with --definitions"
            )

    def named(self, wanted: str, what: str = "model") -> str:
        """Return the label that a user means: all of it, or parts that only one model has.

        For instance ``runA/stage3-tile``, ``stage3-tile`` or ``tile``; run and step may be named
        where the label has none, and a model of several seeds by any of its runs.

        Raises:
            UnknownNameError: none, or several.
        """
        if wanted in self.results:
            return wanted
        names = {
            label: [label, *(full_label(of) for of in self.subjects.get(label, []) if of.is_known)]
            for label in self.results
        }
        fitting = [label for label in names if any(matches(wanted, name) for name in names[label])]
        students = [
            label for label in fitting if not any(o.reference for o in self.subjects.get(label, []))
        ]
        if len(students) == 1:  # a run's name means its student, not its teachers
            return students[0]
        if len(fitting) > 1:
            raise UnknownNameError(f"{what} {wanted!r} may be {' or '.join(fitting)}; name one")
        if not fitting:
            raise UnknownNameError(f"no scores of {what} {wanted!r} ({_known(wanted, self)})")
        return fitting[0]

    def label_of(self, subject: Subject) -> str | None:
        """Return the label of a checkpoint's scores; None where it has none."""
        for label, members in self.subjects.items():
            if any(replace(of, name=subject.name).is_same(subject) for of in members):
                return label
        return None

    def remarks(self) -> tuple[str, ...]:
        """Say what a reader must know: files, unlike sizes and teachers, protocols."""
        unlike = []
        protocols: dict[str, None] = {}
        for name, metric in self.definitions.items():
            sizes = self._by(name, lambda how: how.pixels)
            if metric.counts and len(sizes) > 1:
                parts = "; ".join(f"{size} ({', '.join(of)})" for size, of in sizes.items())
                unlike.append(f"{name} is at different sizes in pixels: {parts}.")
            teachers = self._by(name, lambda how: how.against)
            if metric.headline and len(teachers) > 1:
                parts = " and ".join(", ".join(of) for of in teachers.values())
                unlike.append(f"{name} is to different teachers of that name: {parts}.")
            if metric.counts:
                protocols |= dict.fromkeys(self._by(name, lambda how: how.protocol))
        under = [f"Protocols: {', '.join(protocols)}."] if protocols else []
        counted = coverage(name for name, metric in self.definitions.items() if metric.counts)
        return (*self.notes, *unlike, *under, *filter(None, [counted]))

    def _by(self, metric: str, value: Callable[[Measured], str]) -> dict[str, list[str]]:
        """Sort labels by how their metric was measured, where that is known."""
        sorted_labels: dict[str, list[str]] = {}
        for label, metrics in self.measured.items():
            if metric in metrics and value(metrics[metric]):
                sorted_labels.setdefault(value(metrics[metric]), []).append(label)
        return sorted_labels

    def check_alike(self) -> None:
        """Raise DataError where a metric that counts is measured otherwise for some model.

        That is on other images, or under another protocol.
        """
        kinds: tuple[tuple[str, Callable[[Measured], str], str], ...] = (
            ("", lambda how: how.of, "on the same (radio-distill eval, --evaluation.limit 0)"),
            (
                "protocol ",
                lambda how: how.protocol,
                "with the same section evaluation and version (radio-distill eval)",
            ),
        )
        counting = [name for name, metric in self.definitions.items() if metric.counts]
        for name, (what, value, fix) in product(counting, kinds):
            found = self._by(name, value)
            if len(found) > 1:
                (first, one), (second, other) = list(found.items())[:2]
                raise DataError(
                    f"{name} is of {what}{first} for {one[0]} and of {what}{second} for "
                    f"{other[0]}; score both {fix}, or leave one out with --models"
                )

    def only(self, chosen: Iterable[str]) -> "ScoreSet":
        """Return the results of some labels, and the metrics that these have."""
        names = list(dict.fromkeys(chosen))
        results = {name: self.results[name] for name in names}
        metrics = {metric for runs in results.values() for run in runs for metric in run}
        return ScoreSet(
            results,
            {name: metric for name, metric in self.definitions.items() if name in metrics},
            {name: self.subjects[name] for name in names if name in self.subjects},
            {name: self.files[name] for name in names if name in self.files},
            {name: self.measured[name] for name in names if name in self.measured},
            self.notes,
        )


def _known(wanted: str, scores: ScoreSet) -> str:
    parts = [part for label in scores.results for part in (label, *label.split("/"))]
    names = dict.fromkeys([*parts, *(part.partition("-")[2] for part in parts)])
    hint = nearest(wanted, [name for name in names if name])
    return hint if hint.startswith("did you") else f"known: {', '.join(scores.results)}"
