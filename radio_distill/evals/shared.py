"""Test items that the processes of a run share: each asks its own, and all get all answers."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..system.distributed import current_world, share_out
from ..types import Report, unheard
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
