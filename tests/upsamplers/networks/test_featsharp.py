import itertools

import pytest
import torch
from torch import Tensor

from radio_distill.errors import ConfigError, WeightsError
from upsamplers.convert import from_released_state
from upsamplers.networks import Observation
from upsamplers.networks.featsharp import PRESETS, FeatSharpNetwork


def observe(factor: int, channels: int = 8, grid: tuple[int, int] = (5, 6), batch: int = 2):
    """Return random features and tiles of every level up to ``factor``."""
    generator = torch.Generator().manual_seed(factor)
    height, width = grid

    def features(level: int) -> Tensor:
        shape = (batch, channels, height * level, width * level)
        return torch.randn(shape, generator=generator)

    guidance = torch.rand(batch, 3, 4 * height * factor, 4 * width * factor, generator=generator)
    tiles = {level: features(level) for level in range(2, factor + 1)}
    return Observation(guidance, features(1), tiles)


def stirred(network: FeatSharpNetwork) -> FeatSharpNetwork:
    """Move every parameter off its start, where branches are shut."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


LEVELS = {
    "2x": {},
    "3x_wnd5": {"window": 5},
    "2x_noln": {},
    "2x_bilinear_tiles": {},
    "2x_mlp_only": {},
}


@pytest.mark.parametrize("name", LEVELS)
def test_featsharp_network__equals_the_released_level(golden, name):
    published = golden(f"featsharp_level_{name}")
    state = {key[3:]: value for key, value in published.items() if key.startswith("sd.")}
    arguments, ours = from_released_state(state, **LEVELS[name])
    network = FeatSharpNetwork(**arguments).eval()
    network.load_state_dict(ours)
    low, tiles = published["lr_source"], {arguments["factor"]: published["tiles"]}
    level, grid = network.levels[0], tuple(published["out"].shape[-2:])
    found = {"out": network(Observation(published["guidance"], low, tiles))}
    found["tiles_plus_pos"] = level.placed(tiles, grid)
    if "jbu" in published:
        found["jbu"] = level.jbu(low, level.guided(published["guidance"], grid))
    if level.block.attention is not None:
        tokens = published["concat_tokens"].unflatten(1, grid)
        found["norm1"] = level.block.attention.norm(tokens).flatten(1, 2)
        found["attn_out"] = level.block.attention.body(found["norm1"].unflatten(1, grid))
        found["attn_out"] = found["attn_out"].flatten(1, 2)
    for key in found.keys() & published.keys():
        torch.testing.assert_close(found[key], published[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("block", ["linear", "attention", "mlp", "both"])
@pytest.mark.parametrize("residual", ["bilinear", "featup", "tiles"])
def test_featsharp_network__untrained_returns_its_first_input(preset, block, residual):
    inputs = [residual, *(name for name in ("featup", "tiles") if name != residual)]
    seen = observe(3)
    network = FeatSharpNetwork(8, 3, preset, inputs=inputs, block=block)
    level = network.levels[0]
    expected = {
        "bilinear": lambda: torch.nn.functional.interpolate(seen.low, (15, 18), mode="bilinear"),
        "featup": lambda: level.jbu(seen.low, level.guided(seen.guidance, (15, 18))),
        "tiles": lambda: seen.tiles[3],
    }[residual]()
    torch.testing.assert_close(network(seen), expected, atol=1e-5, rtol=0)


INPUTS = [
    list(names)
    for count in (1, 2, 3)
    for names in itertools.permutations(("bilinear", "featup", "tiles"), count)
]


@pytest.mark.parametrize("inputs", INPUTS, ids="-".join)
def test_featsharp_network__gradient_reaches_every_parameter_for_any_inputs(inputs):
    seen = observe(2)
    network = stirred(FeatSharpNetwork(8, 2, inputs=inputs, tile_position=True, layer_scale=0.1))
    out = network(seen)
    assert out.shape == (2, 8, 10, 12)
    out.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("block", ["linear", "attention", "mlp", "both"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_featsharp_network__gradient_reaches_every_parameter_for_any_block(
    preset, block, layer_norm
):
    network = stirred(FeatSharpNetwork(8, 2, preset, block=block, layer_norm=layer_norm))
    network(observe(2)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_featsharp_network__progressive_has_a_level_for_each_prime():
    network = stirred(FeatSharpNetwork(8, 6, progressive=True))
    assert network.tile_levels == (2, 6)
    seen = observe(6)
    out = network(seen)
    assert out.shape == (2, 8, 30, 36)
    first = network.levels[0](seen.low, seen.guidance, seen.tiles)
    assert first.shape == (2, 8, 10, 12)
    torch.testing.assert_close(network.levels[1](first, seen.guidance, seen.tiles), out)


@pytest.mark.parametrize(
    ("factor", "inputs", "levels"),
    [(4, ("featup", "tiles"), (4,)), (3, ("tiles",), (3,)), (4, ("featup", "bilinear"), ())],
)
def test_featsharp_network__asks_for_the_tiles_that_it_uses(factor, inputs, levels):
    assert FeatSharpNetwork(8, factor, inputs=inputs).tile_levels == levels


def test_featsharp_network__a_nan_in_a_tile_stays_near_and_in_its_image():
    network = stirred(FeatSharpNetwork(8, 2, inputs=("bilinear", "tiles")))
    seen = observe(2, grid=(15, 15))
    seen.tiles[2][0, :, 4, 4] = torch.nan
    bad = network(seen).isnan().any(1)
    assert bad[0, 4, 4]
    assert not bad[0, 16:].any()
    assert not bad[0, :, 16:].any()
    assert not bad[1].any()


def test_featsharp_network__bfloat16_autocast_trains_and_stays_close():
    network = stirred(FeatSharpNetwork(8, 2))
    seen = observe(2)
    expected = network(seen)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(seen)
    out.float().square().mean().backward()
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_featsharp_network__of_384_channels_fits_its_file(factor):
    network = FeatSharpNetwork(384, factor)
    assert 2 * sum(parameter.numel() for parameter in network.parameters()) <= 12e6


@pytest.mark.parametrize(
    ("channels", "preset", "hidden"),
    [(384, "paper", 1024), (384, "released", 2048), (1152, "released", 6144), (16, "paper", 48)],
)
def test_featsharp_network__swiglu_width(channels, preset, hidden):
    network = FeatSharpNetwork(channels, 2, preset, block="mlp")
    assert network.levels[0].block.mlp.body.w3.weight.shape == (channels, hidden)


def test_featsharp_network__released_guidance_is_four_pixels_a_cell():
    seen = observe(2)  # 4 x 4 pixels a cell, of which the middle 2 x 2 count
    rim = torch.zeros(4, 4, dtype=torch.bool)
    rim[1:3, 1:3] = True
    inside = rim.repeat(10, 12)
    released, paper = (FeatSharpNetwork(8, 2, preset) for preset in ("released", "paper"))
    masked = seen._replace(guidance=seen.guidance * inside)
    torch.testing.assert_close(released(seen), released(masked))
    assert (paper(seen) - paper(masked)).abs().max() > 1e-3


def test_featsharp_network__refuses_missing_or_other_tiles():
    network, seen = FeatSharpNetwork(8, 2), observe(2)
    with pytest.raises(ConfigError, match=r"level 2.*10x12"):
        network(seen._replace(tiles={}))
    with pytest.raises(ConfigError, match="9x12"):
        network(seen._replace(tiles={2: seen.tiles[2][:, :, 1:]}))


def test_from_released_state__cuts_the_padding_of_values_alone():
    state = FeatSharpNetwork(24, 2, "released").state_dict()
    ours = state["levels.0.block.attention.body.qkv.weight"]  # 16 heads of 3, padded to 4
    padded = torch.cat([ours[:128], torch.full((64, 48), torch.nan)])
    padded[128:].view(16, 4, 48)[:, :3] = ours[128:].view(16, 3, 48)
    theirs = {
        "tile_pos": torch.zeros(1, 24, 2, 2),
        "block.attn.qkv.weight": padded,
        "block.mlp.w3.weight": state["levels.0.block.mlp.body.w3.weight"],
    }
    arguments, tensors = from_released_state({f"ups.0.{key}": theirs[key] for key in theirs})
    assert torch.equal(tensors["levels.0.block.attention.body.qkv.weight"], ours)
    assert (arguments["factor"], arguments["channels"], arguments["mlp_ratio"]) == (2, 24, 8.0)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"'levels\.0\.tile_position'"),
        ({"tile_pos": torch.zeros(1, 8, 2, 2)}, r"'levels\.0\.block\.mlp\.body\.w3\.weight'"),
        ({"ups.0.jafar.weight": torch.zeros(1)}, r"'ups\.0\.jafar\.weight'"),
    ],
)
def test_from_released_state__refuses_what_is_not_one(state, message):
    with pytest.raises(WeightsError, match=message):
        from_released_state(state)
