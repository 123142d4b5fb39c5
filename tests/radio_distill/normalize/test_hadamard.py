import pytest
import torch

from radio_distill.errors import ConfigError
from radio_distill.normalize.hadamard import hadamard, has_hadamard

# Multiples of 4 up to 200 that no Paley matrix or product reaches.
UNREACHED = {92, 116, 156, 172, 184, 188}
BELOW_200 = [1, 2, *(n for n in range(4, 201, 4) if n not in UNREACHED)]
# Widths of encoders, and every order that the PHI-S authors' code builds exactly.
WIDTHS = [256, 320, 384, 512, 576, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 2048]
PRIME_POWERS = [
    20,  # I over 19, II over 3^2
    28,  # I over 3^3
    52,  # II over 5^2
    100,  # II over 7^2
    244,  # I over 3^5
    344,  # I over 7^3
    1332,  # I over 11^3
]


@pytest.mark.parametrize("order", [*BELOW_200, *WIDTHS, *PRIME_POWERS])
def test_hadamard__rows_are_orthogonal_signs(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=matrix.dtype))


@pytest.mark.parametrize("order", [2560, 3072, 3200, 4096])
def test_has_hadamard__wide_models(order):
    assert has_hadamard(order)


def test_has_hadamard__false_for_what_is_not_built():
    orders = set(range(-4, 201))
    assert {n for n in orders if not has_hadamard(n)} == orders - set(BELOW_200)


@pytest.mark.parametrize("order", [8, 16])
def test_hadamard__sylvester_equals_reference(order, golden_phi_s):
    assert torch.equal(hadamard(order), golden_phi_s[f"H{order}"].double())


@pytest.mark.parametrize(
    ("order", "near"),
    [(92, "88 and 96"), (770, "768 and 776"), (3, "2 and 4"), (188, "180 and 192"), (0, "1")],
)
def test_hadamard__error_names_nearest_orders(order, near):
    with pytest.raises(ConfigError) as caught:
        hadamard(order)
    message = str(caught.value)
    assert f"order {order} " in message
    assert f"nearest orders: {near})" in message
    assert "\n" not in message
    assert all(has_hadamard(int(n)) for n in near.split(" and "))


def test_hadamard__result_is_the_callers_own():
    hadamard(12).zero_()
    assert hadamard(12).abs().sum() == 144
