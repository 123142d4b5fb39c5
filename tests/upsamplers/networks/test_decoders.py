"""Networks of the field, and plain interpolation: what holds for all, and for each."""

from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.errors import ConfigError
from upsamplers.networks import NETWORKS, Observation, build_network
from upsamplers.networks.carafe import bilinear_logits, neighbourhoods, reassemble
from upsamplers.networks.resfu import shifted_interpolation
from upsamplers.networks.sapa import SapaNetwork

MIXING = ["carafe", "sapa", "a2u", "fade", "resfu", "uplift"]
"""Positive weights that sum to one."""
LEARNED = [*MIXING, "resize_conv", "deconvolution", "indexnet", "lift"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", LEARNED)
def test_network__trains_every_parameter(observation, name, factor, dtype):
    network, seen = build_network(name, 16, factor, {}), observation(16, factor)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fine = network(seen)
    (fine.float() ** 2).mean().backward()
    for label, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", LEARNED)
def test_network__bf16_is_close_to_float32(observation, name):
    network, seen = build_network(name, 16, 3, {}), observation(16, 3)
    expected = network(seen)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(seen)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["carafe", "sapa", "a2u", "fade", "deconvolution", "indexnet"])
def test_network__a_bad_cell_reaches_no_further_than_the_kernels(observation, name):
    seen = observation(8, 2, size=(12, 12))
    seen.low[0, 0, 1, 1] = torch.nan
    fine = build_network(name, 8, 2, {})(seen)
    assert fine[1].isfinite().all()
    assert fine[0, 0, :4].isnan().any()
    assert fine[0, :, 8:].isfinite().all()
    assert fine[0, :, :, 8:].isfinite().all()


@pytest.mark.parametrize("name", [*MIXING, "resize_conv"])
def test_network__a_constant_map_stays_constant_to_its_border(name):
    network = scrambled(build_network(name, 4, 3, {}))
    fine = network(Observation(torch.rand(1, 3, 60, 48), torch.full((1, 4, 5, 4), 0.7)))
    torch.testing.assert_close(fine, fine[:, :, :1, :1].expand_as(fine))
    if name != "resize_conv":
        torch.testing.assert_close(fine, torch.full((1, 4, 15, 12), 0.7))


@pytest.mark.parametrize("name", MIXING)
def test_network__mixes_what_is_there(observation, name):
    """Whatever the parameters, no result is beyond the values of its channel."""
    seen = observation(4, 3)
    fine = scrambled(build_network(name, 4, 3, {}))(seen)
    assert (fine.amax((2, 3)) <= seen.low.amax((2, 3)) + 1e-5).all()
    assert (fine.amin((2, 3)) >= seen.low.amin((2, 3)) - 1e-5).all()


@pytest.mark.parametrize("name", LEARNED)
def test_network__gradients(observation, name):
    torch.manual_seed(0)
    network = scrambled(build_network(name, 2, 2, {})).double()
    guidance, low, _ = observation(2, 2, (2, 3), batch=1)
    inputs = (guidance.double().requires_grad_(), low.double().requires_grad_())
    if name in ("carafe", "resize_conv", "deconvolution"):  # the image is not looked at
        inputs = (guidance.double(), inputs[1])
    assert torch.autograd.gradcheck(
        lambda guidance, low: network(Observation(guidance, low)), inputs, fast_mode=True
    )


@pytest.mark.parametrize("name", [*MIXING, "deconvolution", "indexnet"])
def test_network__learns_an_edge_that_the_low_map_lacks(name):
    """Two colours with features of different size meet inside a cell."""
    torch.manual_seed(0)
    guidance = torch.zeros(1, 3, 16, 32)
    guidance[..., 18:] = 1
    target = torch.cat([1 - guidance[:, :1], 2 * guidance[:, :1]], dim=1)
    low = F.avg_pool2d(target, 4)
    options = {"cell_pixels": 2} if name == "uplift" else {}  # a fraction of its time
    network, seen = build_network(name, 2, 4, options), Observation(guidance, low)
    start = F.mse_loss(network(seen), target).item()
    optimizer = torch.optim.NAdam(network.parameters(), 0.005)
    for _ in range(40):
        loss = F.mse_loss(network(seen), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * start


def scrambled(network):
    """Give every parameter other numbers than it starts from."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize(
    ("name", "factor", "options", "message"),
    [
        ("carafe", 2, {"kernel_size": 4}, "kernel_size: 4 .*1, 3, 5"),
        ("carafe", 2, {"kernel_sise": 5}, "'kernel_size'"),
        ("carafe", 0, {}, "factor is 0"),
        ("fade", 2, {"guide_channels": 30}, "guide_channels: 30 .*8, 16, 24"),
        ("a2u", 2, {"guide_channels": 8}, "guide_channels: 8 .*32, 64"),
        ("resfu", 1, {"tiles": True}, "factor 2"),
        ("bilinear", 2, {"mode": "bicubic"}, "'mode'"),
        ("uplift", 2, {"width": 16}, "width: 16"),
        ("featup", 2, {"similarity": "dot"}, r"'dot'.*cosine"),
        ("featsharp", 2, {"inputs": ["jbu", "tiles"]}, "'jbu'"),
        ("featsharp", 2, {"inputs": []}, "one to three"),
        ("featsharp", 2, {"inputs": ["tiles", "tiles"]}, "one to three"),
        ("featsharp", 2, {"window": 4}, "window: 4"),
        ("featsharp", 2, {"window": 13}, "window: 13"),
        ("featsharp", 2, {"mlp_ratio": 0.0}, "mlp_ratio"),
        ("featsharp", 1, {}, "factor is 1"),
    ],
)
def test_network__bad_options(name, factor, options, message):
    with pytest.raises(ConfigError, match=message):
        build_network(name, 8, factor, options)


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network__an_option_of_another_type_is_one_line(name):
    for option in list(signature(NETWORKS.get(name)).parameters)[2:]:  # behind channels, factor
        for value in (-1, "x", [[1]]):
            with pytest.raises(ConfigError, match=f"{name}.{option}") as error:
                build_network(name, 8, 2, {option: value})
            assert "\n" not in str(error.value)


def test_bilinear__learns_nothing():
    assert list(build_network("bilinear", 8, 2, {}).parameters()) == []


def test_sapa__large_values_stay_finite():
    guidance = torch.rand(1, 3, 60, 48)
    fine = SapaNetwork(4, 3)(Observation(guidance, 1e6 * torch.randn(1, 4, 5, 4)))
    assert fine.isfinite().all()


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (8, 2)])
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["carafe", "sapa", "fade"])
def test_network__starts_near_bilinear(observation, name, factor, size):
    """In the mean of sixteen images, as that of two is up to a half larger by chance."""
    seen = observation(32, factor, size, batch=16)
    fine = build_network(name, 32, factor, {})(seen)
    expected = F.interpolate(seen.low, scale_factor=factor, mode="bilinear", align_corners=False)
    assert fine.shape == (16, 32, size[0] * factor, size[1] * factor)
    assert (fine - expected).square().mean().sqrt() < 0.05  # of features whose spread is one


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resize_conv", {}),
        ("bilinear", {}),
        ("deconvolution", {}),
        ("deconvolution", {"depthwise": True}),
    ],
)
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 2)])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_network__starts_at_bilinear(observation, name, options, factor, size):
    seen = observation(6, factor, size)
    network = build_network(name, 6, factor, options)
    expected = F.interpolate(seen.low, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(seen), expected)
    assert network.tile_levels == ()


def test_sapa__is_the_softmax_of_similarities():
    """One fine cell of each kind, computed from the definition."""
    factor, network = 3, SapaNetwork(8, 3, kernel_size=3, embedding_channels=6).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    seen = Observation(
        torch.rand(1, 3, 4 * 9, 5 * 9).double(), torch.randn(1, 8, 4, 5).double()
    )  # three pixels a fine cell
    fine = network(seen)[0]
    for row, column in ((0, 0), (5, 7), (11, 14), (4, 2)):
        pixels = seen.guidance[0, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        query = network.query(pixels.mean((1, 2)).view(1, 3, 1, 1)).flatten()
        logits, values = [], []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                y = min(max(row // factor + down, 0), 3)
                x = min(max(column // factor + right, 0), 4)
                value = seen.low[0, :, y, x]
                logits.append(network.key(network.norm(value)) @ query / 6**0.5)
                values.append(value)
        bias = network.position[row % factor * factor + column % factor]
        weights = (torch.stack(logits) + bias).softmax(0)
        expected = (weights[:, None] * torch.stack(values)).sum(0)
        torch.testing.assert_close(fine[:, row, column], expected)


def reassemble_by_unfolding(low, weights, factor):
    """Every fine cell's neighbourhood written out at the size of the result."""
    side = int(weights.shape[-1] ** 0.5)
    padded = F.pad(low, (side // 2,) * 4, mode="replicate")
    cells = F.unfold(padded, side).view(len(low), low.shape[1], side**2, *low.shape[2:])
    cells = cells.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    kernel = rearrange(weights, "b h w (i j) t -> b 1 t (h i) (w j)", i=factor)
    return (cells * kernel).sum(2)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 2, 3, 7]), st.sampled_from([3, 5]))
def test_reassemble__is_the_unfolded_form(height, width, factor, side):
    low = torch.randn(2, 3, height, width)
    weights = torch.randn(2, height, width, factor**2, side**2)
    fine = reassemble(low, weights, factor)
    torch.testing.assert_close(fine, reassemble_by_unfolding(low, weights, factor))
    assert fine.is_contiguous(memory_format=torch.channels_last)


def test_reassemble__gradients():
    low = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 4, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: reassemble(a, b, 2), (low, weights))


def test_reassemble__keeps_no_neighbourhoods_for_the_backward_pass():
    low = torch.randn(1, 64, 16, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 16, 16, 4, 25, dtype=torch.float64, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fine = reassemble(low, weights, 2)
    assert sum(kept.values()) < 2 * fine.nbytes
    fine.sum().backward()
    torch.testing.assert_close(weights.grad.sum(), neighbourhoods(low, 5).sum() * 4)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_bilinear_logits__are_those_of_interpolation(factor):
    weights = bilinear_logits(factor, 5).exp() - 1e-3
    torch.testing.assert_close(weights.sum(-1), torch.ones(factor**2))
    low = torch.randn(1, 4, 5, 6)
    fine = reassemble(low, weights.expand(1, 5, 6, -1, -1), factor)
    expected = F.interpolate(low, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(fine, expected)


@pytest.mark.parametrize("factor", [2, 3])
def test_deconvolution__each_cell_paints(factor):
    """Every cell, the repeated edge included, adds its painting where it lies."""
    network = scrambled(build_network("deconvolution", 2, factor, {})).double()
    low, weight = torch.randn(1, 2, 2, 3).double(), network.paint.weight
    side = 2 * factor - factor % 2
    padded = F.pad(low, (1, 1, 1, 1), mode="replicate")
    canvas = torch.zeros(2, 6 * factor, 7 * factor).double()  # two more cells on each side
    for row in range(4):
        for column in range(5):
            painted = torch.einsum("c, c d i j -> d i j", padded[0, :, row, column], weight)
            top, left = ((at + 1) * factor - factor // 2 for at in (row, column))
            canvas[:, top : top + side, left : left + side] += painted
    expected = canvas[:, 2 * factor : 4 * factor, 2 * factor : 5 * factor]
    expected = expected + network.paint.bias[:, None, None]
    found = network(Observation(torch.rand(1, 3, 16, 24).double(), low))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("factor", [2, 3])
def test_indexnet__is_sigmoids_over_their_mean_in_each_cell(observation, factor, context):
    guidance, low, _ = observation(5, factor, (2, 3), batch=1)
    network = scrambled(build_network("indexnet", 5, factor, {"context": context})).double()
    seen = Observation(guidance.double(), low.double())
    found, logits = network(seen), network.index(network.guide(seen))
    for row, column in ((0, 0), (1, 2)):
        gates = logits[0, :, row, column].sigmoid()
        indices = (gates / gates.mean()).view(factor, factor)
        cell = found[
            0,
            :,
            row * factor : (row + 1) * factor,
            column * factor : (column + 1) * factor,
        ]
        torch.testing.assert_close(cell, indices * seen.low[0, :, row, column, None, None])
    torch.testing.assert_close(F.avg_pool2d(found, factor), seen.low)


@pytest.mark.parametrize("kind", ["o2o", "m2o"])
def test_indexnet__depthwise_has_an_index_for_each_channel(observation, kind):
    """Branch by branch, by functions of torch: o2o sees one channel, m2o all of them."""
    factor, channels, wide = 2, 5, 8
    guidance, low, _ = observation(channels, factor, (2, 3), batch=1)
    options = {"context": False, "kind": kind, "guide_channels": wide}
    network = scrambled(build_network("indexnet", channels, factor, options)).double()
    seen = Observation(guidance.double(), low.double())
    guide = network.bring(network.guide(seen))
    _, first, norm, _, last = network.index
    sources = guide[0].split(1) if kind == "o2o" else [guide[0]] * channels
    gates = torch.empty(channels, factor**2, 2, 3).double()
    for channel, source in enumerate(sources):
        each = 2 * len(source)  # hidden channels of a branch
        branches = []
        for cell in range(factor**2):
            place = channel * factor**2 + cell if kind == "o2o" else cell
            rows = slice(place * each, (place + 1) * each)
            branches.append(F.conv2d(source[None], first.weight[rows], first.bias[rows], stride=2))
        if kind == "o2o":  # the branches of a channel are normalised together
            rows = slice(channel * each * factor**2, (channel + 1) * each * factor**2)
            joint = F.group_norm(torch.cat(branches, 1), 1, norm.weight[rows], norm.bias[rows])
            branches = joint.split(each, 1)
        else:
            weights, biases = norm.weight.split(each), norm.bias.split(each)
            branches = [
                F.group_norm(*branch)
                for branch in zip(branches, [8] * 4, weights, biases, strict=True)
            ]
        for cell, branch in enumerate(branches):
            row = channel * factor**2 + cell if kind == "o2o" else cell * channels + channel
            logits = F.conv2d(F.relu6(branch), last.weight[row, None], last.bias[row, None])
            gates[channel, cell] = logits[0, 0].sigmoid()
    indices = F.pixel_shuffle(gates / gates.mean(1, keepdim=True), factor)[:, 0]
    nearest = F.interpolate(seen.low, scale_factor=2.0, mode="nearest")
    found = network(seen)
    torch.testing.assert_close(found[0], nearest[0] * indices)
    found.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(("factor", "side"), [(2, 3), (3, 5)])
def test_a2u__is_the_softmax_of_sigmoids_of_affinities(observation, factor, side):
    guidance, low, _ = observation(3, factor, (2, 3))
    network = scrambled(build_network("a2u", 3, factor, {"kernel_size": side})).double()
    seen = Observation(guidance.double(), low.double())
    guide, kernel = network.guide(seen), 3 * factor
    padded = F.pad(guide, (factor,) * 4, mode="replicate")
    coarse = []
    for part in (network.left, network.right):
        made = torch.zeros(2, guide.shape[1], 2, 3).double()
        weights = part.kernel(F.adaptive_avg_pool2d(guide, kernel))  # [B, 1, k, k]
        for row in range(2):
            for column in range(3):
                seen_there = padded[:, :, row * factor :, column * factor :]
                made[:, :, row, column] = (seen_there[..., :kernel, :kernel] * weights).sum((2, 3))
        coarse.append(F.leaky_relu(part.norm(made)))
    affinity = (coarse[0] * coarse[1]).sum(1) / guide.shape[1] ** 0.5
    spread = network.spread(guide.mean((2, 3), keepdim=True))[:, :, 0, 0]
    logits = F.pixel_shuffle(affinity[:, None] * spread[:, :, None, None], factor)  # [B, T, H, W]
    weights = logits.sigmoid().softmax(1)
    assert (weights.amax(1) / weights.amin(1) < torch.e + 1e-6).all()
    expected = mixed(seen.low, weights, factor)
    torch.testing.assert_close(network(seen), expected)


@pytest.mark.parametrize(("factor", "lite"), [(2, False), (3, False), (2, True)])
def test_fade__adds_logits_of_image_and_features_on_the_fine_grid(observation, factor, lite):
    guidance, low, _ = observation(3, factor, (2, 4))
    options = {"kernel_size": 3, "gate": True, "lite": lite}
    network = scrambled(build_network("fade", 3, factor, options)).double()
    seen = Observation(guidance.double(), low.double())
    guide, size = network.guide(seen), (2 * factor, 4 * factor)
    assert network.encode.weight.shape == ((9, 1, 3, 3) if lite else (9, 64, 3, 3))
    encoded = network.encode(network.from_features(seen.low))
    enlarged = F.interpolate(encoded, size, mode="nearest")
    position = network.position.unflatten(0, (factor, factor)).permute(2, 0, 1).repeat(1, 2, 4)
    logits = network.encode(network.from_image(guide)) + enlarged + position
    expected = mixed(seen.low, logits.softmax(1), factor)
    gate = F.interpolate(network.gate(seen.low).sigmoid(), size, mode="nearest")
    expected = gate * network.project(guide) + (1 - gate) * expected
    torch.testing.assert_close(network(seen), expected)


def mixed(low, weights, factor):
    """Sum each fine cell's neighbourhood of low cells under ``[B, T, H, W]``, one by one."""
    side = int(weights.shape[1] ** 0.5)
    batch, channels, height, width = low.shape
    fine = torch.zeros(batch, channels, height * factor, width * factor).to(low)
    for row in range(height * factor):
        for column in range(width * factor):
            for tap in range(side**2):
                y = min(max(row // factor + tap // side - side // 2, 0), height - 1)
                x = min(max(column // factor + tap % side - side // 2, 0), width - 1)
                weight = weights[:, tap, row, column, None]
                fine[:, :, row, column] += weight * low[:, :, y, x]
    return fine


@pytest.mark.parametrize(("factor", "tiles"), [(2, True), (3, False)])
def test_resfu__mixes_nine_shifts_of_the_interpolated_map(observation, factor, tiles):
    guidance, low, _ = observation(8, factor, (3, 2))
    network = build_network("resfu", 8, factor, {"tiles": tiles}).double()
    network.shifted_interpolation = shifted_interpolation(factor)  # thirds are no float32
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    size = (3 * factor, 2 * factor)
    tiled = {factor: torch.randn(2, 8, *size).double()} if tiles else {}
    assert network.tile_levels == tuple(tiled)
    seen = Observation(guidance.double(), low.double(), tiled)
    colours = F.adaptive_avg_pool2d(seen.guidance, size)
    query = network.query(torch.cat([colours, *tiled.values()], 1))
    key = F.interpolate(network.key(seen.low), size, mode="bilinear", align_corners=False)
    scores = score(network.meaning, key, filtered(query, key), factor)
    scores = scores + score(network.details, blurred(query), query, factor)
    scores = scores + network.bias[:, None, None]
    fine = F.interpolate(seen.low, size, mode="bilinear", align_corners=False)
    expected = torch.zeros_like(fine)
    for row in range(size[0]):
        for column in range(size[1]):
            near = [
                (tap, row + factor * (tap // 3 - 1), column + factor * (tap % 3 - 1))
                for tap in range(9)
            ]
            near = [(t, y, x) for t, y, x in near if 0 <= y < size[0] and 0 <= x < size[1]]
            logits = scores[:, [tap for tap, _, _ in near], row, column]
            for weight, (_, y, x) in zip(logits.softmax(1).T, near, strict=True):
                expected[:, :, row, column] += weight[:, None] * fine[:, :, y, x]
    torch.testing.assert_close(network(seen), expected)


def score(block, around, here, factor):
    """Differences between nine places and the middle one, written out and then convolved."""
    around, here = block.norm(around), block.norm(here)
    height, width = around.shape[2:]
    padded = F.pad(around, (factor,) * 4, mode="replicate")
    summed = block.difference.bias.view(1, -1, 1, 1)
    for tap in range(9):
        top, left = factor * (tap // 3), factor * (tap % 3)
        difference = padded[:, :, top : top + height, left : left + width] - here
        weight = block.difference.weight[:, :, tap // 3, tap % 3, None, None]
        summed = summed + F.conv2d(difference, weight, groups=4)
    return block.head(summed)


def blurred(maps):
    kernel = torch.tensor([[-1.0, 0, 1]]).double()
    kernel = (-(kernel**2 + kernel.T**2) / 2).exp()
    kernel, padded = kernel / kernel.sum(), F.pad(maps, (1, 1, 1, 1), mode="replicate")
    return (padded.unfold(2, 3, 1).unfold(3, 3, 1) * kernel).sum((-2, -1))


def filtered(guide, maps):
    """Fit ``slope * guide + offset`` in each box of 9 x 9 by least squares with a ridge."""
    small = [each[:, :, ::2, ::2] for each in (guide, maps)]
    height, width = small[0].shape[2:]
    slope, offset = torch.zeros_like(small[0]), torch.zeros_like(small[0])
    for row in range(height):
        for column in range(width):
            box = (slice(max(row - 4, 0), row + 5), slice(max(column - 4, 0), column + 5))
            x, y = (each[:, :, box[0], box[1]].flatten(2) for each in small)
            x_mean, y_mean = x.mean(2), y.mean(2)
            variance = x.var(2, unbiased=False) + 1e-3
            covariance = ((x - x_mean[..., None]) * (y - y_mean[..., None])).mean(2)
            slope[:, :, row, column] = covariance / variance
            offset[:, :, row, column] = y_mean - slope[:, :, row, column] * x_mean
    slope, offset = (
        F.interpolate(each, guide.shape[2:], mode="bilinear", align_corners=False)
        for each in (slope, offset)
    )
    return slope * guide + offset
