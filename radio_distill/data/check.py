"""Read every image of some shards once, and say what is wrong before a run meets it."""

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from ..system.files import printable
from .bands import decode
from .cache import CacheError, cache_of
from .find import find_shards
from .images import FIELD_OF_KIND, BadImageError
from .remote import FetchError, Place
from .sources import describe_notes, index_folders
from .tar_index import Shard, open_shard
from .tar_reader import ShardReader

SIZE_STEPS = (0, 64, 128, 256, 512, 1024, 2048, 4096)
"""Borders of the histogram of shortest sides, in pixels."""
_THREADS = 2


@dataclass
class ShardReport:
    """The findings of :func:`check_shards`."""

    num_shards: int = 0
    num_images: int = 0
    num_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    """One line for each shard that cannot be used at all; its images are in no count."""
    not_fetched: list[str] = field(default_factory=list)
    """One line for each shard that lies elsewhere and did not come, so that nobody looked at it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of samples that training never uses, by kind; see :mod:`.tar_scan`."""
    left_out_names: dict[str, list[str]] = field(default_factory=dict)
    """The first of them in each shard, ``shard:member``, by kind."""
    empty: list[str] = field(default_factory=list)
    """Names of shards without an image."""
    notes: list[str] = field(default_factory=list)
    """Notable things that are no fault, one line each."""
    bad: dict[str, list[str]] = field(default_factory=dict)
    """``shard:member: reason`` of each image that training would replace, by kind."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Number of good images by shortest side, for instance ``256-511``."""
    levels: Tensor | float = 0.0
    """Sums over good arrays of mean and mean square of each band, ``[2, bands]``."""

    @property
    def statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation of each band of pixels in [0, 1], images alike; of arrays only."""
        if not isinstance(self.levels, Tensor):
            return None
        mean, square = self.levels / self.sizes.total()
        return mean.tolist(), (square - mean**2).clamp(min=0).sqrt().tolist()

    @property
    def num_bad(self) -> int:
        """Images that training would replace."""
        return sum(map(len, self.bad.values()))

    @property
    def is_clean(self) -> bool:
        """True where training can use all that is meant for it; an empty shard is no fault."""
        return not (self.damaged or self.not_fetched or self.left_out or self.bad)


@dataclass
class _Checked:
    """The findings in one shard."""

    shard: Shard
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Kind and line of each bad image."""
    sizes: Counter[str] = field(default_factory=Counter)
    levels: Tensor | float = 0.0


def check_shards(
    patterns: Sequence[str],
    config: DataConfig,
    progress: Callable[[int, int], None] | None = None,
) -> ShardReport:
    """Decode every image under the limits of ``config``.

    Shards without a fresh index get one on the way.

    Args:
        patterns: as ``data.shards``.
        progress: called with shards done and shards in all.

    Raises:
        DataError: no shards found. Damage is reported, not raised.
        CacheError: nothing can be fetched at all.
    """
    found = find_shards(patterns, cache_of(config))
    report, shards = ShardReport(num_shards=len(found.paths)), []
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # what matters is reported
        results = pool.map(lambda path: _check_shard(path, config), found.paths)
        for done, result in enumerate(results, 1):
            if isinstance(result, DataError):
                came = not isinstance(result.__cause__, FetchError)
                (report.damaged if came else report.not_fetched).append(str(result))
            else:
                _add(report, result)
                shards.append(result.shard)
            if progress is not None:
                progress(done, len(found.paths))
    report.notes = [*found.notes, *describe_notes(shards)]
    return report


def limits_of(kind: str, config: DataConfig) -> str:
    """Return which field makes images of a kind bad, and what it is, or nothing."""
    name = FIELD_OF_KIND.get(kind)
    return f"{name} is {getattr(config, name.removeprefix('data.'))}" if name else ""


def _check_shard(path: Place, config: DataConfig) -> _Checked | DataError:
    try:
        checked = _Checked(open_shard(path, index_folders(config)))
        reader = ShardReader([checked.shard], timeout=config.read_timeout)
        for number in range(checked.shard.num_samples):
            sample = reader.sample(0, number)
            try:
                data = reader.image_bytes(0, sample)
                pixels = decode(data, config)
                checked.sizes[_bucket(min(pixels.shape[1:]))] += 1
                if not config.photographs:
                    shares = pixels.double().div_(255).flatten(1)
                    checked.levels += torch.stack([shares.mean(1), shares.square().mean(1)])
            except BadImageError as error:
                checked.bad.append((error.kind, f"{reader.key(0, sample)}: {error}"))
    except CacheError:
        raise
    except DataError as error:
        return error
    return checked


def _add(report: ShardReport, checked: _Checked) -> None:
    shard = checked.shard
    report.num_images += shard.num_samples
    report.num_bytes += shard.size
    report.sizes += checked.sizes
    report.levels += checked.levels
    report.empty += [] if shard.num_samples else [printable(shard.path)]
    for kind, line in checked.bad:
        report.bad.setdefault(kind, []).append(line)
    for kind, item in shard.left_out.items():
        report.left_out[kind] += item.num_samples
        names = [f"{printable(shard.path.name)}:{name}" for name in item.names]
        report.left_out_names.setdefault(kind, []).extend(names)


def _bucket(side: int) -> str:
    place = bisect_right(SIZE_STEPS, side)
    upper = f"-{SIZE_STEPS[place] - 1}" if place < len(SIZE_STEPS) else "+"
    return f"{SIZE_STEPS[place - 1]}{upper}"
