"""Statistics of a teacher's outputs: mean and covariance of tokens, dispersion of summaries.

Both are taken in one pass over any number of images, add up over processes, and go into a file that
the caller names after all that its numbers depend on, so that a run that starts again need not
estimate them again. Moments and not normalizers are kept: one file serves every normalizer.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..distill.distances import angle
from ..errors import CheckpointError, DataError
from ..system.distributed import all_reduce_sum
from ..system.files import check_writable, reason_of, replacing

logger = logging.getLogger(__name__)

DISPERSION = "dispersion"
SUMMARY = "summary."
"""How the names of the summaries' moments begin in a file."""

CHUNK = 8192
"""Tokens that are centred at once: at 1536 channels a float64 copy of 100 MB."""


class Moments:
    """Streaming mean and covariance of ``[B, C, h, w]`` features over their tokens.

    Sums are kept in float64 and of centred tokens (Chan, Golub and LeVeque 1979), so that a mean
    that is large against the spread costs no digits: mean and covariance agree with a two-pass
    computation to about 1e-15 of the largest entry. The price is a float64 matrix product of 2·N·C²
    operations for N tokens, small beside an encoder wherever float64 is not emulated. Of summaries
    each is a map of one cell.

    Args:
        channels: C.
        device: where the sums live and the products run.
    """

    def __init__(self, channels: int, device: torch.device | str | None = None):
        self.count = 0
        """Tokens seen."""
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)  # [C]
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:
        """``[C, C]`` float64, the sum divided by ``count``; raises DataError without tokens."""
        if self.count == 0:
            raise DataError("no tokens to take statistics of: no image was usable")
        return self._scatter / self.count

    @torch.no_grad()
    def update(self, spatial: Tensor, valid: Tensor | None = None) -> None:
        """Add the tokens of ``[B, C, h, w]``, or those where ``valid`` ``[B, h, w]`` is True."""
        channels = len(self.mean)
        assert spatial.shape[1] == channels, f"{spatial.shape[1]} channels, not {channels}"
        tokens = rearrange(spatial, "b c h w -> (b h w) c")
        if valid is not None:
            tokens = tokens[rearrange(valid, "b h w -> (b h w)")]
        for chunk in tokens.split(CHUNK):
            chunk = chunk.to(self.mean)  # [n, C]
            mean = chunk.sum(0) / max(len(chunk), 1)
            centred = chunk - mean
            self._add(len(chunk), mean, centred.T @ centred)

    def all_reduce(self) -> None:
        """Merge over all processes, which end with equal numbers; alone, do nothing."""
        total = int(all_reduce_sum(self.mean.new_tensor([self.count])).item())
        mean = all_reduce_sum(self.mean * (self.count / max(total, 1)))
        offset = self.mean - mean
        scatter = self._scatter + self.count * torch.outer(offset, offset)
        self.count, self.mean, self._scatter = total, mean, all_reduce_sum(scatter)

    def state(self) -> dict[str, Tensor]:
        """Return tensors that make equal moments through :meth:`from_state`."""
        return {
            "count": torch.tensor(self.count),
            "mean": self.mean.cpu(),
            "scatter": self._scatter.cpu(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Moments":
        """Make moments, on the CPU, of what :meth:`state` returned."""
        moments = cls(len(state["mean"]))
        moments._add(int(state["count"]), state["mean"], state["scatter"])
        return moments

    @classmethod
    def standard(cls, channels: int) -> "Moments":
        """Make moments of mean 0 and covariance 1, for a teacher of which nothing is known."""
        moments = cls(channels)
        moments.count, moments._scatter = 1, torch.eye(channels, dtype=torch.float64)
        return moments

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        offset = mean - self.mean
        between = torch.outer(offset, offset) * (self.count * count / total)
        self._scatter = self._scatter + scatter + between
        self.mean = self.mean + offset * (count / total)
        self.count = total


FLOOR = 1e-8
"""The least dispersion, as in TAO Toolkit: a loss can be divided by it."""

ANGLES = 1024
"""Kept summaries whose angles are taken at once, in float64."""


class SummaryMoments:
    """Streaming sum of a teacher's summaries ``[B, S]``, and the directions of the first images.

    They give the dispersion: how far the summaries spread around their mean direction.

    Summaries of one teacher lie in a narrow cone, those of another all around the sphere, so that
    the same angular error is worth more with the first. C-RADIOv4 (arXiv 2601.17237) divides the
    squared angle between student and teacher by

        Disp = E[θ(y, μ)²],   μ = E[y] / ‖E[y]‖,   θ(x, y) = arccos(cos(x, y)),

    and reports 0.694 for SigLIP2-g and 2.120 for DINOv3-H+. The angles can only be taken once μ is
    known. TAO Toolkit's port therefore takes those of each batch to the mean so far; here μ is that
    of all summaries and the angles are those of the first images, which are kept.

    Images are known by their position in the order of all processes' images, so that the result
    does not depend on how many processes there are.

    Args:
        channels: S.
        kept: directions of the images at positions below this are kept, in float32; 16,384 of 1536
            channels are 100 MB.
        device: where the sum and the directions live.
    """

    def __init__(self, channels: int, kept: int, device: torch.device | str | None = None):
        self.count = 0
        """Summaries seen."""
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)  # [S]
        self._directions = torch.zeros(kept, channels, device=device)  # [kept, S]
        self._times_seen = torch.zeros(kept, dtype=torch.int32, device=device)  # [kept]

    @torch.no_grad()
    def update(self, summary: Tensor, start: int) -> None:
        """Add ``[B, S]``; the first is that of the image at ``start``, the others follow it."""
        channels = len(self._sum)
        assert summary.shape[1] == channels, f"{summary.shape[1]} channels, not {channels}"
        summary = summary.to(self._sum)
        rows = slice(start, start + len(summary))
        first = summary[: max(len(self._directions) - start, 0)]
        self.count += len(summary)
        self._sum += summary.sum(0)
        self._directions[rows] = F.normalize(first, dim=1).float()
        self._times_seen[rows] += 1

    def all_reduce(self) -> None:
        """Merge over all processes, which end with equal numbers; alone, do nothing."""
        self.count = int(all_reduce_sum(self._sum.new_tensor([self.count])).item())
        self._sum = all_reduce_sum(self._sum)
        # A direction is zero everywhere but on the process that saw it, so a sum gathers it.
        self._directions = all_reduce_sum(self._directions)
        self._times_seen = all_reduce_sum(self._times_seen)

    def dispersion(self) -> float:
        """Return the mean squared angle to the mean direction, in rad², at least 1e-8.

        Raises:
            DataError: where no summary was seen.
        """
        if self.count == 0:
            raise DataError("no summaries to take the dispersion of: no image was usable")
        assert int(self._times_seen.max()) == 1, "an image counted twice, or none of the first seen"
        directions = self._directions[self._times_seen == 1]  # [n, S]
        mean = self._sum[None]  # the mean's length does not matter
        angles = [angle(chunk.double(), mean) for chunk in directions.split(ANGLES)]
        return max(float(torch.cat(angles).mean()), FLOOR)


class Statistics(NamedTuple):
    """Mean, covariance and dispersion of a teacher's outputs on a set of images."""

    moments: Moments
    """Of its spatial features."""
    dispersion: float | None = None
    """Of its summaries (:class:`SummaryMoments`), in rad²; None where it was not asked for."""
    summary: Moments | None = None
    """Of its summaries; None where they were not asked for."""


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write them to a safetensors file, whole or not at all.

    Raises:
        CheckpointError: where the file cannot be written; a former one stays as it was.
    """
    try:
        with replacing(path) as temporary:
            save_file(_tensors(statistics), temporary)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error


def check_can_save(folder: Path) -> None:
    """Raise CheckpointError where no statistics can be written to a folder; leaves nothing."""
    try:
        check_writable(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot write statistics to {path}: {reason_of(error)}; "
        "set normalizer.cache to a folder of yours with room"
    )


def load_statistics(path: Path) -> Statistics | None:
    """Read statistics, on the CPU; None where there are none, or with a warning where damaged."""
    if not path.exists():
        return None
    try:
        state = load_file(path)
        problem = _problem(state)
    except (OSError, SafetensorError) as error:
        problem = reason_of(error)
    if problem:
        logger.warning("statistics in %s are damaged (%s): estimating them again", path, problem)
        return None
    dispersion = float(state.pop(DISPERSION)) if DISPERSION in state else None
    of_summary = _below(SUMMARY, state)
    summary = Moments.from_state(of_summary) if of_summary else None
    return Statistics(Moments.from_state(state), dispersion, summary)


def _tensors(statistics: Statistics) -> dict[str, Tensor]:
    tensors = statistics.moments.state()
    if statistics.dispersion is not None:
        tensors[DISPERSION] = torch.tensor(statistics.dispersion, dtype=torch.float64)
    if statistics.summary is not None:
        of_summary = statistics.summary.state()
        tensors |= {f"{SUMMARY}{name}": value for name, value in of_summary.items()}
    return tensors


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name] for name in names}


def _problem(state: dict[str, Tensor]) -> str:
    of_summary = _below(SUMMARY, state)
    rest = {name: value for name, value in state.items() if not name.startswith(SUMMARY)}
    for moments in (rest, of_summary) if of_summary else (rest,):
        if sorted(moments.keys() - {DISPERSION}) != ["count", "mean", "scatter"]:
            return f"holds {', '.join(sorted(state)) or 'nothing'}"
        channels = moments["mean"].shape
        if len(channels) != 1 or moments["scatter"].shape != channels * 2 or moments["count"].ndim:
            return "shapes do not fit together"
        finite = all(torch.isfinite(value).all() for value in moments.values())
        if not finite or moments["count"] <= 0:
            return "numbers are not statistics"
    return ""
