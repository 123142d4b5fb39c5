"""Hadamard matrices: square, entries +1 and -1, rows orthogonal. Exact, or an error.

PHI-S needs one of the order of a teacher's channels, with entries that are flat to the last bit:
only then does every channel come out with the same variance. Built here are Sylvester's doubling,
Paley's two constructions over every finite field of odd order (Paley, "On orthogonal matrices",
1933), and all Kronecker products of these. That leaves out, below 200, the orders 92, 116, 156,
172, 184 and 188, which need Williamson's or rarer methods.
"""

from functools import cache, reduce
from math import isqrt

import torch
from torch import Tensor

from ..errors import ConfigError


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix H, ``[order, order]`` float64 of +1 and -1, with H Hᵀ = order · I.

    Raises:
        ConfigError: where no construction gives this order; it names the nearest that work.
    """
    blocks = _blocks(order)
    if blocks is None:
        near = " and ".join(map(str, _nearest_orders(order)))
        raise ConfigError(
            f"no Hadamard matrix of order {order} can be built (nearest orders: {near}); for a "
            f"teacher of {order} channels choose another normalizer, such as global_standardise"
        )
    one = torch.ones(1, 1, dtype=torch.float64)
    return reduce(torch.kron, map(_block, blocks), one)


def has_hadamard(order: int) -> bool:
    """Say whether :func:`hadamard` can build this order."""
    return _blocks(order) is not None


def _nearest_orders(order: int) -> list[int]:
    below = next((n for n in range(order - 1, 0, -1) if has_hadamard(n)), None)
    above = next(n for n in range(max(order + 1, 1), 2 * abs(order) + 2) if has_hadamard(n))
    return [above] if below is None else [below, above]


@cache
def _blocks(order: int) -> tuple[int, ...] | None:
    """Split ``order`` into orders whose matrices multiply up to it, smallest first."""
    if order in (1, 2):
        return (order,)
    if order < 1 or order % 4:
        return None
    for left in range(2, isqrt(order) + 1):
        if order % left == 0:
            first, rest = _blocks(left), _blocks(order // left)
            if first is not None and rest is not None:
                return first + rest
    return (order,) if _field_order(order) else None


def _block(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    return _paley(order)


def _field_order(order: int) -> int | None:
    """Return the order q of the field that Paley's first or second construction needs."""
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == residue and _prime_power(q):
            return q
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p ** k and p prime, or None."""
    if q < 2:
        return None
    p = next((n for n in range(2, isqrt(q) + 1) if q % n == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _paley(order: int) -> Tensor:
    q = _field_order(order)
    assert q is not None, f"_blocks promised a Paley matrix of order {order}"
    skew = q % 4 == 3
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if skew else 1
    core[1:, 1:] = _jacobsthal(q)
    identity = torch.eye(q + 1, dtype=torch.float64)
    if skew:  # construction I, order q + 1
        return core + identity
    first = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    second = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(core, first) + torch.kron(identity, second)  # II, order 2 (q + 1)


def _jacobsthal(q: int) -> Tensor:
    """Return ``[q, q]`` with χ(a - b) for all a, b of GF(q): 1 for squares, -1 for the others.

    An element is the integer whose digits in base p are the coefficients of its polynomial.
    """
    field = _prime_power(q)
    assert field is not None, f"{q} is not the order of a field"
    p, k = field
    places = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // places % p  # [q, k]
    difference = ((digits[:, None] - digits[None]) % p * places).sum(-1)  # [q, q]
    character = torch.zeros(q, dtype=torch.float64)
    powers = torch.tensor(_generator_powers(p, k))
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    return character[difference]


def _generator_powers(p: int, k: int) -> list[int]:
    """Return all p ** k - 1 non-zero elements of GF(p ** k) as successive powers of a generator.

    Polynomials ``x ** k - r(x)`` are tried until x itself generates; squares are its even powers.
    """
    q = p**k
    for remainder in range(1, q):
        powers, element = [1], _times_x(1, remainder, p, k)
        while element > 1 and len(powers) < q:
            powers.append(element)
            element = _times_x(element, remainder, p, k)
        if element == 1 and len(powers) == q - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a generator, none was found")


def _times_x(element: int, remainder: int, p: int, k: int) -> int:
    """Multiply by x modulo ``x ** k - remainder(x)``."""
    top, rest = divmod(element, p ** (k - 1))
    shifted = rest * p
    return sum(
        (shifted // place + top * (remainder // place)) % p * place
        for place in (p**i for i in range(k))
    )
