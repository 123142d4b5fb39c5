"""Keeps numbers that are not finite away from the weights.

DeepSpeed's own check differs between ZeRO stages (with float32 and stage 0 there is none), so every
pass is looked at here, before the update, and all processes agree on what they found. Such a step
is skipped: its images are used up, the weights stay. One bad image in a million, or one overflow
of a teacher in half precision, must not end a run of days; what comes again and again must.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DivergedError
from ..types import Features

_NAMED = 3  # images that a message names


class Finding(NamedTuple):
    """Why numbers were not finite, and in which images."""

    cause: str
    """``teacher NAME``, ``loss PARTITION/TEACHER/KIND`` or ``gradient``."""
    keys: tuple[str, ...]


class _Pass(NamedTuple):
    cause: str
    finite: Tensor
    """``[B]`` bool, on the device."""
    keys: Sequence[str]
    terms: Mapping[str, Tensor]


class Findings:
    """What the passes of one step gave on this process.

    Nothing is copied from the device, which would stop it, before something is wrong.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._keys: list[str] = []

    def targets(self, targets: Mapping[str, Features], keys: Sequence[str]) -> None:
        """Look at what each teacher said of the images ``keys``."""
        self._keys += keys
        for name, features in targets.items():
            self._passes.append(_Pass(f"teacher {name}", finite_images(features), keys, {}))

    def loss(self, loss: Tensor, terms: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        """Look at the loss of each image ``[B]``, and at the terms that it is made of."""
        self._passes.append(_Pass("loss", torch.isfinite(loss.detach()), keys, terms))

    def trouble(self, device: torch.device) -> Tensor:
        """Return 1 where anything is not finite, else 0, on the device."""
        flags = [~item.finite.all() for item in self._passes]
        found = torch.stack(flags).any() if flags else torch.tensor(False, device=device)
        return found.to(device, torch.float64)

    def found(self) -> list[Finding]:
        """List what is wrong; a teacher's numbers are not blamed on the loss once more."""
        keys_of: dict[str, dict[str, None]] = {}
        blamed = set[str]()
        for item in self._passes:
            finite = item.finite.tolist()
            bad = [key for key, good in zip(item.keys, finite, strict=True) if not good]
            if item.cause == "loss":
                bad = [key for key in bad if key not in blamed]
            if bad:
                blamed |= set(bad)
                keys_of.setdefault(_cause(item), {}).update(dict.fromkeys(bad))
        return [Finding(cause, tuple(keys)) for cause, keys in keys_of.items()]

    def gradient(self) -> list[Finding]:
        """Name all images of the step: a gradient that is not finite may come from any of them."""
        return [Finding("gradient", tuple(dict.fromkeys(self._keys)))]


def finite_images(features: Features) -> Tensor:
    """Return which images ``[B]`` a teacher gave finite numbers for."""
    finite = torch.isfinite(features.spatial).flatten(1).all(1)
    if features.summary is not None:
        finite = finite & torch.isfinite(features.summary).all(1)
    return finite


def check_targets(targets: Mapping[str, Features], keys: Sequence[str]) -> None:
    """Raise DivergedError, naming teacher and images, where a teacher's output is not finite.

    For what must be right for every image, as the statistics.
    """
    for name, features in targets.items():
        finite = finite_images(features).tolist()
        if not all(finite):
            bad = [key for key, good in zip(keys, finite, strict=True) if not good]
            raise DivergedError(
                f"teacher {name!r} gave numbers that are not finite for {_first(bad)}; "
                f"check its weights, or set teachers.{name}.dtype to float32"
            )


class Skips:
    """Counts the steps that were skipped, alike on every process.

    Args:
        limit: steps in a row that may be skipped.
        in_all: skipped before, in a resumed run.
        in_a_row: of these, the last ones.
    """

    def __init__(self, limit: int, in_all: int = 0, in_a_row: int = 0):
        self._limit = limit
        self.in_all, self.in_a_row = in_all, in_a_row

    def passed(self) -> None:
        """Note a step that was not skipped."""
        self.in_a_row = 0

    def skipped(self, step: int, findings: Sequence[Finding], last_good: Path | None) -> None:
        """Note a skipped step, counted from 1; raises DivergedError where it was one too many."""
        self.in_all += 1
        self.in_a_row += 1
        if self.in_a_row > self._limit:
            where = f"step {step}"
            if self.in_a_row > 1:
                where += f", the {_ordinal(self.in_a_row)} in a row,"
            raise DivergedError(
                f"{where} is not finite: {describe(findings)}; {_last(last_good)}; "
                f"{_hint(findings)}"
            )


def describe(findings: Sequence[Finding]) -> str:
    """Write findings of all processes in one line."""
    images: dict[str, list[str]] = {}
    for cause, keys in findings:
        images.setdefault(cause, []).extend(keys)
    return "; ".join(f"{cause} for {_first(keys)}" for cause, keys in images.items())


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}th" if number % 100 in (11, 12, 13) else f"{number}{ending}"


def _cause(item: _Pass) -> str:
    names = [name for name, value in item.terms.items() if not bool(torch.isfinite(value))]
    return " ".join([item.cause, *names])


def _first(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _last(last_good: Path | None) -> str:
    if last_good is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {last_good}"


def _hint(findings: Sequence[Finding]) -> str:
    teachers = [cause.split()[1] for cause, _ in findings if cause.startswith("teacher")]
    if teachers:
        return f"check the weights of {teachers[0]}, or set teachers.{teachers[0]}.dtype to float32"
    return "lower the learning rate, or set engine.precision to float32"
