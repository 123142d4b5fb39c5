"""What benchmarks share: test items are dealt to the processes of a run, shares become scores."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from ..system.distributed import current_world, share_out
from ..types import Report, Score, unheard
from .examples import Show, shown_of

S = TypeVar("S")
T = TypeVar("T")


def answers(
    items: Sequence[S],
    answer: Callable[[S, Show | None], T],
    progress: Report = unheard,
    show: Show | None = None,
) -> list[T]:
    """Return what is answered of each item, in order; all processes of a run call together.

    Args:
        items: images, pairs, batches of images …
        answer: given an item and, for the few that are shown, where to; lies on the host.
        progress: told how many items have an answer.
        show: where the first process shows some of its own.
    """
    world = current_world()

    def ask(own: Sequence[S]) -> list[T]:
        shown, found = shown_of(len(own), show if world.is_main else None), list[T]()
        for number, item in enumerate(own):
            found.append(answer(item, show if number in shown else None))
            progress(min((number + 1) * world.world_size, len(items)), len(items))
        return found

    return share_out(items, ask)


def scores_of(
    benchmark: str,
    shares: Mapping[str, float],
    group: str,
    num_samples: int,
    headlines: Collection[str],
    protocol: str = "",
    **details: int | str,
) -> list[Score]:
    """Return scores, in per cent, of shares of what is right; higher is better.

    Args:
        benchmark: its name.
        shares: by metric, in [0, 1].
        group: the column of the gain table that they belong to.
        num_samples: of how many images or pairs they are.
        headlines: the metrics that count there.
        protocol: what decides the numbers.
        details: what else must agree where they are compared.
    """
    return [
        Score(
            benchmark, metric, 100 * share, "%", True, group, num_samples,
            headline=metric in headlines, details=details, protocol=protocol,
        )
        for metric, share in shares.items()
    ]  # fmt: skip
