"""Published checkpoints give the published programs' outputs, and bad ones a line."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import register_parametrization

from radio_distill.errors import WeightsError
from radio_distill.normalize.phi_s import PhiS
from radio_distill.normalize.statistics import Moments
from radio_distill.system.trust import trusting_pickles
from upsamplers.convert import convert_featsharp, convert_featup, fold_spectral, phi_s_state
from upsamplers.methods.tiling import cut, stitch
from upsamplers.networks import Observation, build_network

SPECTRAL = "a.parametrizations.weight"


def weights(tensors):
    return {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}


@pytest.fixture(scope="module")
def stack(golden):
    return golden("featup_jbu_stack_16x")


@pytest.fixture(scope="module")
def toy(golden):
    return golden("featsharp_full_2x_toy")


def featup_checkpoint(stack):
    state = {f"upsampler.{key}": value.clone() for key, value in weights(stack).items()}
    state["model.0.blocks.0.norm1.weight"] = torch.full((4,), float("nan"))  # nobody's business
    state["downsampler.w"] = torch.ones(7, 7)
    return {"state_dict": state, "epoch": 0, "pytorch-lightning_version": "1.9.0"}


def statistics(channels=16):
    moments = Moments(channels)
    moments.update(3 + torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(2)))
    return PhiS().fit(moments)


def featsharp_checkpoint(toy):
    state = {f"upsampler.{key}": value.clone() for key, value in weights(toy).items()}
    state |= {"bias_buffer.buffer": toy["bias_buffer"], "downsampler.kernel_bias": torch.ones(49)}
    state["scale_net.conv.weight"] = torch.ones(1)
    fitted = statistics().state()
    state |= {f"normalizer.{key}": fitted[key].float() for key in ("mean", "rotation")}
    state["normalizer.alpha"] = fitted["scale"].float()
    state["normalizer.inv_rotation"] = fitted["rotation"].T.float()
    arguments = {"type": "featsharp", "factor": 2, "normalizer": "phi-s"}
    return {"model_state": state, "upsample_args": arguments, "global_step": 9000}


def saved(checkpoint, tmp_path):
    path = tmp_path / "last.pth.tar"
    torch.save(checkpoint, path)
    return path


def built(converted):
    network = build_network(
        converted.network_name, converted.channels, converted.factor, converted.options
    )
    network.load_state_dict(converted.tensors)
    return network.eval()


@torch.no_grad()
def test_convert_featup__gives_the_published_outputs(stack, tmp_path):
    """Level by level: the image is smaller than the last, where the published stack repeats pixels.

    Ours would refuse.
    """
    converted = convert_featup(saved(featup_checkpoint(stack), tmp_path))
    assert (converted.channels, converted.factor) == (8, 16)
    layers = built(converted).stack
    maps = [stack["source"]]
    for level, size in zip(layers.levels, [(6, 8), (12, 16), (24, 32), (48, 64)], strict=True):
        maps.append(level(maps[-1], F.adaptive_avg_pool2d(stack["guidance"], size)))
    fixup = (
        converted.tensors["stack.fixup_proj.1.weight"],
        converted.tensors["stack.fixup_proj.1.bias"],
    )
    out = maps[-1] + 0.1 * F.conv2d(maps[-1], *fixup)
    for found, expected in ((maps[1], "after_up1"), (maps[2], "after_up2"), (out, "out")):
        torch.testing.assert_close(found, stack[expected], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_convert_featsharp__gives_the_published_outputs(toy, tmp_path):
    converted = convert_featsharp(saved(featsharp_checkpoint(toy), tmp_path))
    assert (converted.network_name, converted.channels, converted.factor) == ("featsharp", 16, 2)
    observation = Observation(toy["images"], toy["low_res"], {2: toy["tiles"]})
    found = built(converted)(observation)
    torch.testing.assert_close(found, toy["out_high"], atol=1e-5, rtol=1e-5)


def test_convert_featsharp__the_bias_de_biases_low_map_and_tiles(toy, tmp_path):
    bias = convert_featsharp(saved(featsharp_checkpoint(toy), tmp_path)).de_bias

    def encode(pixels):  # the golden file's encoder, de-biased
        rows = 0.1 * torch.arange(5)[:, None]
        return F.conv2d(pixels, toy["toy_conv_w"], toy["toy_conv_b"], 2) + rows + bias

    small = F.interpolate(toy["images"], (10, 10), mode="bilinear")
    torch.testing.assert_close(encode(small), toy["low_res"], atol=1e-5, rtol=1e-5)
    tiles = stitch(encode(cut(toy["images"], 2)), 2)
    torch.testing.assert_close(tiles, toy["tiles"], atol=1e-5, rtol=1e-5)


def test_convert_featsharp__statistics_normalise_as_those_that_were_saved(toy, tmp_path):
    converted = convert_featsharp(saved(featsharp_checkpoint(toy), tmp_path))
    maps = torch.randn(1, 16, 3, 4)
    found = PhiS().load_state(converted.normalizer_state)
    torch.testing.assert_close(found.apply(maps), statistics().apply(maps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.invert(found.apply(maps)), maps, atol=1e-4, rtol=1e-4)


def test_phi_s_state__gives_the_published_normalisation(golden):
    published = golden("featsharp_phi_s")
    normalizer = PhiS().load_state(phi_s_state(weights(published), "file"))
    found = normalizer.apply(published["features"])
    torch.testing.assert_close(found, published["normalized"], atol=1e-5, rtol=1e-5)


def test_phi_s_state__nothing_saved_is_nothing():
    assert phi_s_state({}, "file") is None


@pytest.mark.parametrize("wrapped", ["module.{}.{}", "module.inner.{}.{}", "{}.inner.{}"])
def test_convert_featsharp__wrappers_leave_no_trace(toy, tmp_path, wrapped):
    checkpoint = featsharp_checkpoint(toy)
    plain = convert_featsharp(saved(checkpoint, tmp_path))
    state = {
        wrapped.format(*key.split(".", 1)): value
        for key, value in checkpoint["model_state"].items()
    }
    found = convert_featsharp(saved({**checkpoint, "model_state": state}, tmp_path))
    assert found.options == plain.options
    torch.testing.assert_close(found.tensors, plain.tensors)
    torch.testing.assert_close(found.de_bias, plain.de_bias)


def reparametrised(weight, parts, keep_vectors=True):
    """Write a weight as the training has it: any matrix of the same direction, and its norm."""
    entries = {"original": 3.7 * weight}
    for index, part in enumerate(weight.chunk(parts)):
        u, sigma, v = torch.linalg.svd(part)
        place = f"0.parts.{index}" if parts > 1 else "0"
        entries[f"{place}.scale"] = (sigma[0] - 0.05).expm1().log().reshape(1, 1)
        if keep_vectors:
            entries |= {f"{place}._u": u[:, 0], f"{place}._v": v[0]}
    return entries


@torch.no_grad()
@pytest.mark.parametrize("keep_vectors", [True, False])
def test_convert_featsharp__folds_the_spectral_reparametrisation(toy, tmp_path, keep_vectors):
    checkpoint = featsharp_checkpoint(toy)
    plain = convert_featsharp(saved(checkpoint, tmp_path))
    state = checkpoint["model_state"]
    for name, parts in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.w12", 2), ("mlp.w3", 1)):
        linear = f"upsampler.ups.0.block.{name}"
        entries = reparametrised(state.pop(f"{linear}.weight"), parts, keep_vectors)
        state |= {f"{linear}.parametrizations.weight.{key}": entries[key] for key in entries}
    folded = convert_featsharp(saved(checkpoint, tmp_path))
    assert folded.tensors.keys() == plain.tensors.keys()
    for key, value in plain.tensors.items():
        torch.testing.assert_close(folded.tensors[key], value, atol=1e-5, rtol=1e-4)


class Scaled(_SpectralNorm):
    """torch's spectral norm, and a learned one: W (softplus(s) + 0.05) / sigma(W)."""

    def __init__(self, weight):
        super().__init__(weight)
        self.scale = torch.nn.Parameter(torch.randn(1, 1))

    def forward(self, weight):
        return super().forward(weight) * (F.softplus(self.scale) + 0.05)


class ScaledParts(torch.nn.Module):
    """Each part of a weight with a norm of its own."""

    def __init__(self, weight, count):
        super().__init__()
        self.parts = torch.nn.ModuleList(Scaled(part) for part in weight.chunk(count))

    def forward(self, weight):
        parts = zip(self.parts, weight.chunk(len(self.parts)), strict=True)
        return torch.cat([one(part) for one, part in parts])

    def right_inverse(self, weight):
        return weight


@pytest.mark.parametrize("parts", [1, 3])
def test_fold_spectral__what_torch_writes_of_a_layer_in_training_is_the_layers_weight(parts):
    layers = torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 12)})
    weight = layers["qkv"].weight.detach()
    norm = ScaledParts(weight, parts) if parts > 1 else Scaled(weight)
    register_parametrization(layers["qkv"], "weight", norm)
    for _ in range(3):  # the vectors follow the weight
        layers["qkv"](torch.randn(5, 8)).square().sum().backward()
        with torch.no_grad():
            for value in layers.parameters():
                value -= 0.01 * value.grad
    folded = fold_spectral(layers.state_dict(), "file")
    assert folded.keys() == {"qkv.weight", "qkv.bias"}
    torch.testing.assert_close(folded["qkv.weight"], layers.eval()["qkv"].weight)


def test_fold_spectral__the_parts_of_a_weight_keep_their_order_beyond_ten():
    weight = torch.randn(24, 3)
    entries = reparametrised(weight, 12)
    state = {f"a.parametrizations.weight.{key}": entries[key] for key in sorted(entries)[::-1]}
    torch.testing.assert_close(fold_spectral(state, "file"), {"a.weight": weight})


@pytest.mark.parametrize(
    ("kind", "window", "inputs"),
    [
        ("featsharp.wnd-5", 5, ("featup", "tiles")),
        ("featsharp.inputs-jbu-tiles.wnd-3", 3, ("featup", "tiles")),
        ("featsharp.inputs-tiles-jbu", 7, ("tiles", "featup")),
    ],
)
def test_convert_featsharp__takes_window_and_inputs_from_the_name(
    toy, tmp_path, kind, window, inputs
):
    checkpoint = featsharp_checkpoint(toy)
    checkpoint["upsample_args"]["type"] = kind
    options = convert_featsharp(saved(checkpoint, tmp_path)).options
    assert (options["window"], tuple(options["inputs"])) == (window, inputs)


def line(convert, path, *words):
    with pytest.raises(WeightsError) as error:
        convert(path)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, str(path)):
        assert word in message
    return message


@pytest.mark.parametrize("convert", [convert_featup, convert_featsharp])
def test_convert__files_that_are_no_checkpoints(convert, stack, tmp_path):
    line(convert, tmp_path / "none.ckpt", "no checkpoint at")
    for name, content in (("empty", b""), ("text", b"<html>not found</html>")):
        path = tmp_path / name
        path.write_bytes(content)
        line(convert, path, "cannot read weights")
    path = saved(featup_checkpoint(stack), tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    line(convert, path, "cannot read weights")
    line(convert, saved({"other": {}}, tmp_path), "not a checkpoint of this program")
    line(convert, saved([1, 2], tmp_path), "not a checkpoint of this program")


@pytest.mark.parametrize("convert", [convert_featup, convert_featsharp])
def test_convert__code_runs_only_where_it_is_trusted(convert, stack, toy, trap, tmp_path):
    checkpoint = {**featup_checkpoint(stack), **featsharp_checkpoint(toy), "cfg": trap}
    path = saved(checkpoint, tmp_path)
    line(convert, path, "wants to import ", "--trust-checkpoint", "safetensors")
    assert not trap.ran.exists()
    with trusting_pickles():
        assert convert(path).channels in (8, 16)
    assert trap.ran.exists()


def test_convert_featup__another_factor_or_missing_keys(stack, tmp_path):
    for change in ("up4.", "up1.range_temp", "fixup_proj.1.bias"):
        checkpoint = featup_checkpoint(stack)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            k: v for k, v in state.items() if f"upsampler.{change}" not in k
        }
        line(convert_featup, saved(checkpoint, tmp_path), "not a featup of factor 16: stack.")
    checkpoint = featup_checkpoint(stack)
    checkpoint["state_dict"]["upsampler.up5.range_temp"] = torch.ones(())
    line(convert_featup, saved(checkpoint, tmp_path), "not a featup of factor 16", "levels.4")
    checkpoint["state_dict"] = {"model.weight": torch.ones(1)}
    line(convert_featup, saved(checkpoint, tmp_path), "holds no FeatUp stack")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_convert__numbers_that_are_not_finite(stack, toy, tmp_path, bad):
    checkpoint = featup_checkpoint(stack)
    checkpoint["state_dict"]["upsampler.up2.sigma_spatial"] = torch.tensor(bad)
    line(convert_featup, saved(checkpoint, tmp_path), "up2.sigma_spatial is not finite")
    checkpoint = featsharp_checkpoint(toy)
    checkpoint["model_state"]["normalizer.mean"] = torch.full((16,), bad)
    line(convert_featsharp, saved(checkpoint, tmp_path), "normalizer.mean is not finite")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"factor": 3}, "says factor 3, its tensors are those of factor 2"),
        ({"factor": None}, "lacks a usable type and factor"),
        ({"type": "featup"}, "holds a 'featup'"),
        ({"type": "featsharp.inputs-jafar-tiles"}, "fitted with 'inputs-jafar-tiles'"),
        ({"type": "featsharp.xpos-qk"}, "fitted with 'xpos-qk'"),
        ({"type": "featsharp.wnd-4"}, "window: 4"),
        ({"type": "featsharp.inputs-tiles"}, "not a featsharp of factor 2"),
    ],
)
def test_convert_featsharp__arguments_that_do_not_fit(toy, tmp_path, arguments, words):
    checkpoint = featsharp_checkpoint(toy)
    checkpoint["upsample_args"] |= arguments
    line(convert_featsharp, saved(checkpoint, tmp_path), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probe.weight": torch.ones(4)}, "unknown keys probe.weight"),
        ({"upsampler.ups.0.jafar.weight": torch.ones(4)}, "jafar.weight"),
        ({"upsampler.weight": torch.ones(4)}, "cannot convert"),
        ({"normalizer.kappa": torch.ones(4)}, "unknown keys normalizer.kappa"),
        ({"normalizer.alpha": None}, "normalizer.alpha is missing"),
        ({"normalizer.rotation": torch.ones(16, 16)}, "not a rotation"),
        ({"normalizer.rotation": torch.ones(16)}, "not a rotation"),
        ({"normalizer.mean": torch.ones(8)}, "not a rotation"),
        (
            {"normalizer.mean": torch.ones(8), "normalizer.rotation": torch.eye(8)},
            "PHI-S has 8 channels, the upsampler 16",
        ),
        ({"bias_buffer.buffer": torch.ones(1, 8, 5, 5)}, "bias_buffer.buffer has shape [1, 8"),
        ({"upsampler.ups.0.tile_pos": None}, "lacks"),
        ({"upsampler.ups.0.block.ls1.gamma": torch.ones(16)}, "levels.0.block.attention.scale"),
        ({f"upsampler.{SPECTRAL}.0.kappa": torch.ones(4)}, f"{SPECTRAL}.0.kappa"),
        ({f"upsampler.{SPECTRAL}.original": torch.ones(4)}, f"{SPECTRAL}.original"),
    ],
)  # fmt: skip
def test_convert_featsharp__wrong_keys(toy, tmp_path, changes, words):
    checkpoint = featsharp_checkpoint(toy)
    for key, value in changes.items():
        checkpoint["model_state"][key] = value
        if value is None:
            del checkpoint["model_state"][key]
    line(convert_featsharp, saved(checkpoint, tmp_path), words)


def test_convert_featsharp__without_any_upsampler(tmp_path):
    checkpoint = {"model_state": {}, "upsample_args": {"type": "featsharp", "factor": 2}}
    line(convert_featsharp, saved(checkpoint, tmp_path), "cannot convert")
