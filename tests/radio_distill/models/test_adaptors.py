from collections.abc import Callable

import pytest
import torch
from torch import nn

from radio_distill.config import StudentConfig
from radio_distill.models.heads import Adaptor, MLPHead


@pytest.mark.parametrize("num_layers", [0, 2])
@torch.no_grad()
def test_mlp_head__equals_the_formula(num_layers: int) -> None:
    head = MLPHead(5, 8, 3, num_layers)
    for parameter in head.parameters():
        parameter.normal_()
    state = head.state_dict()

    def norm_gelu_linear(x: torch.Tensor, name: str) -> torch.Tensor:
        normed = (x - x.mean(1, keepdim=True)) / (
            x.var(1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        normed = normed * state[f"{name}.0.weight"] + state[f"{name}.0.bias"]
        active = normed * 0.5 * (1 + torch.erf(normed / 2**0.5))
        return active @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]

    tokens = torch.randn(7, 5)
    hidden = tokens @ state["fc1.weight"].T + state["fc1.bias"]
    for index in range(num_layers):
        hidden = hidden + norm_gelu_linear(hidden, f"blocks.{index}")
    expected = norm_gelu_linear(hidden, "final")
    torch.testing.assert_close(head(tokens), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_adaptor__each_cell_is_the_head_of_its_own_token(
    student_config: Callable[..., StudentConfig],
) -> None:
    adaptor = Adaptor(6, channels=4, summary_channels=3, config=student_config(head_layers=1))
    token, spatial = torch.randn(2, 6), torch.randn(2, 6, 3, 5)
    features = adaptor(token, spatial)
    assert features.summary is not None
    assert features.summary.shape == (2, 3)
    assert features.spatial.shape == (2, 4, 3, 5)
    for row, column in ((0, 0), (1, 4), (2, 3)):
        expected = adaptor.spatial(spatial[:, :, row, column])
        torch.testing.assert_close(features.spatial[:, :, row, column], expected)


def test_adaptor__without_summary_has_no_parameters_for_it(
    student_config: Callable[..., StudentConfig],
) -> None:
    adaptor = Adaptor(6, channels=4, summary_channels=None, config=student_config())
    assert adaptor(torch.randn(2, 6), torch.randn(2, 6, 3, 5)).summary is None
    assert all(name.startswith("spatial.") for name, _ in adaptor.named_parameters())


def test_adaptor__last_linear_can_be_exchanged(
    student_config: Callable[..., StudentConfig],
) -> None:
    """Folding a normalizer replaces ``final[-1]``."""
    adaptor = Adaptor(6, channels=4, summary_channels=None, config=student_config())
    token, spatial = torch.randn(1, 6), torch.randn(1, 6, 2, 2)
    before = adaptor(token, spatial).spatial
    last = adaptor.spatial.final[-1]
    assert isinstance(last, nn.Linear)
    scaled = nn.Linear(last.in_features, last.out_features)
    with torch.no_grad():
        scaled.weight.copy_(2 * last.weight)
        scaled.bias.copy_(2 * last.bias + 1)
    adaptor.spatial.final[-1] = scaled
    torch.testing.assert_close(adaptor(token, spatial).spatial, 2 * before + 1)
