"""Dealing work to ranks, so that none waits long for another and none needs every teacher.

Work comes in units that cannot be cut: an image, or the images of a full canvas. Groups of equal
units are dealt longest unit first, each to the ranks that have most room under a limit. So a group
fills rank after rank, and a rank seldom serves more than two. The limit is the lowest under which
all of it fits, found by bisection (multifit: Coffman, Garey and Johnson, SIAM J. Computing 7, 1978,
here with worst fit). Where that comes close to the mean, a limit a little higher is taken if it
cuts up fewer groups: small gaps are left empty rather than run another teacher for an image or two.
"""

from collections.abc import Sequence

SLACK = 0.04
"""Work above the mean that a rank may have, as a share of it, so that fewer groups are cut up."""
_TRIES = 9
_HALVINGS = 12


def deal(units: Sequence[int], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return how many units of each group every rank gets, ``[group][rank]``.

    A function of its arguments alone, so all ranks find the same.

    Args:
        units: of each group.
        costs: of one unit of each group, above zero.
        ranks: how many share the work.
    """
    mean = sum(count * cost for count, cost in zip(units, costs, strict=True)) / ranks
    limits = [mean * (1 + SLACK * number / (_TRIES - 1)) for number in range(_TRIES)]
    if close := [dealt for limit in limits if (dealt := _fill(units, costs, ranks, limit))]:
        return min(close, key=_parts)
    # Where a unit fits nowhere, every rank has more than the limit less this unit. So under the
    # mean and the longest unit all have room; the last term is for rounding.
    low, high = mean, mean + max(costs) * (1 + 1e-6)
    best = _fill(units, costs, ranks, high)
    assert best is not None, "below the mean and one unit there is room"
    for _ in range(_HALVINGS):
        limit = (low + high) / 2
        found = _fill(units, costs, ranks, limit)
        low, high, best = (limit, high, best) if found is None else (low, limit, found)
    return best


def _fill(
    units: Sequence[int], costs: Sequence[float], ranks: int, limit: float
) -> list[list[int]] | None:
    """Deal under a limit of the work of a rank; None where not all of it fits."""
    room = [limit] * ranks
    dealt = [[0] * ranks for _ in units]
    for group in sorted(range(len(units)), key=lambda index: (-costs[index], index)):
        left, cost = units[group], costs[group]
        for rank in sorted(range(ranks), key=lambda index: (-room[index], index)):
            taken = min(left, int(room[rank] / cost))
            dealt[group][rank] = taken
            room[rank] -= taken * cost
            left -= taken
        if left:
            return None
    return dealt


def _parts(dealt: list[list[int]]) -> int:
    """Return into how many parts the groups are cut."""
    return sum(count > 0 for group in dealt for count in group)
