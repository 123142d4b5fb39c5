import pytest
import torch
from torch import nn

from radio_distill.errors import ConfigError
from radio_distill.models.vit import (
    attend_in_windows,
    create_body,
    from_windows,
    spread_global_blocks,
    to_windows,
)


@pytest.mark.parametrize(
    ("architecture", "near"),
    [
        ("resnet50", "vit_|known: .* in all"),
        ("vit_bas_patch16_224", "'vit_base_patch16_224'"),
        ("deit_tiny_distilled_patch16_224", "'deit_tiny_patch16_224'"),
        ("vit_tiny", "'vit_tiny_patch16_224'"),
        ("deit3_small", "'deit3_small_patch16_224'"),
    ],
)
def test_create_body__what_is_no_plain_vit(architecture: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"'{architecture}' is not a plain .*{near}") as error:
        create_body(architecture, pretrained=False, drop_path=0.0)
    assert len(str(error.value)) < 250


def test_create_body__drop_path_grows_with_depth() -> None:
    body = create_body("vit_tiny_patch16_224", pretrained=False, drop_path=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in body.blocks]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("depth", "num_global", "expected"),
    [
        (12, 4, {2, 5, 8, 11}),
        (24, 4, {5, 11, 17, 23}),
        (12, 1, {11}),
        (5, 2, {1, 4}),
        (3, 3, {0, 1, 2}),
    ],
)
def test_spread_global_blocks__even_and_the_last(
    depth: int, num_global: int, expected: set[int]
) -> None:
    assert spread_global_blocks(depth, num_global) == expected


@pytest.mark.parametrize("num_global", [0, 13])
def test_spread_global_blocks__impossible_number(num_global: int) -> None:
    with pytest.raises(ConfigError, match=f"global_blocks: {num_global} is not between 1 and 12"):
        spread_global_blocks(12, num_global)


def test_to_windows__each_window_is_a_square_of_neighbours() -> None:
    patches = torch.arange(4 * 6).view(1, 4, 6, 1)
    first, second, *_ = to_windows(patches, 2)[0, :, 0].split(4)
    assert first.tolist() == [0, 1, 6, 7]
    assert second.tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_from_windows__undoes_to_windows(window: int) -> None:
    patches = torch.randn(2, 6, 12, 5)
    assert torch.equal(from_windows(to_windows(patches, window), (6, 12), window), patches)


def test_attend_in_windows__equals_a_loop_over_windows() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    tokens = torch.randn(2, 3 + 5 * 4, 8)
    prefix, windows = tokens[:, :3], tokens[:, 3:].split(4, dim=1)
    parts = [block(torch.cat((prefix, window), dim=1)) for window in windows]
    mean_prefix = torch.stack([part[:, :3] for part in parts]).mean(dim=0)
    expected = torch.cat([mean_prefix, *(part[:, 3:] for part in parts)], dim=1)
    torch.testing.assert_close(attend_in_windows(block, tokens, 3, 2), expected)
