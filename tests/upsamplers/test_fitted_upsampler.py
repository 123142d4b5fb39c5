"""Fitted upsamplers: what a file gives back, whom it serves, what it costs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from radio_distill.config import UpsamplerConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.normalizers import Identity
from radio_distill.normalize.statistics import Moments
from radio_distill.protocols import Corrector, NormalisedUpsampler, Upsampler
from upsamplers import build_upsampler
from upsamplers.fitted import UpsamplerModel, load_model, save_model
from upsamplers.fitted_files import FittedHeader, read_header
from upsamplers.networks import NETWORKS, Observation, build_network

CHANNELS, GRID, FACTOR = 32, (3, 4), 2
KINDS = [name for name in NETWORKS.names() if name != "bilinear"]
PIXELS = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))


def model_of(name, normalizer, factor=FACTOR, grid=GRID, **options) -> UpsamplerModel:
    """Make a model none of whose parameters is what it starts from."""
    torch.manual_seed(0)
    network = build_network(name, CHANNELS, factor, options)
    model = UpsamplerModel(network, normalizer, CHANNELS, grid)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def header_of(name, spec, factor=FACTOR, **values) -> FittedHeader:
    known = {
        "upsampler": name,
        "teacher": spec.name,
        "weights_hash": spec.weights_hash,
        "channels": spec.channels,
        "factor": factor,
        "size": spec.native_size,
    }
    return FittedHeader(**(known | values))


def rewrite(path, change) -> None:
    """Change the tensors of a file and leave its header as it was."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.fixture
def file_of(tiny, phi_s, tmp_path):
    """Return the file of a fitted upsampler of a teacher."""

    def write(name, teacher="tiny_vit", factor=FACTOR, options=None, **header):
        spec, options = tiny(teacher).spec, options or {}
        model = model_of(name, phi_s(CHANNELS), factor, spec.grid(spec.native_size), **options)
        path = tmp_path / f"{teacher}-{name}-{factor}.safetensors"
        save_model(path, model, header_of(name, spec, factor, options=options, **header))
        return path

    return write


def build(path, teacher, name="featup", factor=FACTOR, **options):
    spec = teacher.spec
    config = UpsamplerConfig(
        name=name, factor=factor, weights={spec.name: str(path)}, options=options
    )
    return build_upsampler(config, {spec.name: teacher})


@pytest.mark.parametrize("name", NETWORKS.names())
@pytest.mark.parametrize("de_bias", [True, False])
def test_load_model__gives_back_what_was_saved(tmp_path, tiny, phi_s, name, de_bias):
    path, spec = tmp_path / "x.safetensors", tiny("tiny_vit").spec
    model = model_of(name, phi_s(CHANNELS), grid=GRID if de_bias else None)
    save_model(path, model, header_of(name, spec), {"w": torch.ones(2, 2)})
    again = load_model(path)
    expected = model.network.state_dict()
    for key, value in again.network.state_dict().items():
        rounded = expected[key].bfloat16().float() if value.ndim > 1 else expected[key]
        assert torch.equal(value, rounded), key
    assert (again.bias is not None) == de_bias
    if de_bias:
        assert torch.equal(again.bias, model.bias)

    observation = Observation(
        torch.rand(1, 3, 48, 64),
        torch.randn(1, CHANNELS, *GRID),
        {level: torch.randn(1, CHANNELS, 6, 8) for level in model.tile_levels},
    )
    with torch.no_grad():
        found, wanted = again.eval()(observation), model(observation)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # bfloat16 has 3 digits
    spatial = torch.randn(1, CHANNELS, *GRID)
    torch.testing.assert_close(
        again.normalizer.apply(spatial), model.normalizer.apply(spatial), rtol=1e-5, atol=1e-5
    )


def test_save_model__matrices_in_bfloat16_and_what_is_small_as_it_is(file_of):
    tensors = load_file(file_of("featsharp"))
    parts = {name.partition(".")[0] for name in tensors}
    assert parts == {"network", "bias", "normalizer"}
    for name, value in tensors.items():
        matrix = name.startswith("network.") and value.ndim > 1
        assert value.dtype == (torch.bfloat16 if matrix else torch.float32), name


def test_load_model__builds_the_network_with_the_header_s_options(file_of):
    options = {"window": 3, "inputs": ["bilinear", "tiles"], "block": "attention"}
    path = file_of("featsharp", options=options)
    assert read_header(path).options == options
    plain = load_model(file_of("featsharp", factor=3))
    loaded = load_model(path)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in plain.parameters())


def test_load_model__without_statistics(tmp_path, tiny):
    path, spec = tmp_path / "x.safetensors", tiny("tiny_vit").spec
    save_model(path, model_of("featup", Identity()), header_of("featup", spec, normalizer="none"))
    assert isinstance(load_model(path).normalizer, Identity)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("normalizer.rotation"), "PHI-S"),
        (put("normalizer.mean", torch.zeros(CHANNELS)), "PHI-S"),
        (put("bias", torch.full((1, CHANNELS, 6, 6), float("nan"))), "bias"),
        (put("bias", torch.zeros(1, 7, 6, 6)), "bias"),
        (put("bias", torch.zeros(7)), "does not hold what its header says"),
        (put("network.extra", torch.zeros(2)), "Unexpected key"),
        (lambda tensors: [tensors.pop(k) for k in list(tensors) if "network" in k], "Missing key"),
    ],
)
def test_load_model__a_file_that_was_tampered_with_is_one_line(file_of, change, reason):
    path = file_of("featup")
    rewrite(path, change)
    with pytest.raises(WeightsError, match=reason) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("upsampler", "featpu", "'featup'"),
        ("normalizer", "layer_norm", "normalizer"),
        ("options", {"windw": 3}, "'windw'"),
        ("options", {"radius": "three"}, "radius: 'three' is not a whole number"),
        ("channels", 16, "does not hold what its header says"),
        ("channels", 2.5, "does not hold what its header says"),
        ("factor", 0, "must be at least 1"),
    ],
)
def test_load_model__a_header_that_does_not_fit_is_one_line(file_of, field, value, reason):
    path = file_of("featup")
    header = replace(read_header(path), **{field: value})
    save_file(load_file(path), path, {"radio_distill": json.dumps(header.__dict__)})
    with pytest.raises(WeightsError, match=reason) as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_build_upsampler__the_file_of_another_teacher_factor_or_kind(file_of, tiny):
    vit, cnn = tiny("tiny_vit"), tiny("tiny_cnn")
    path = file_of("featup", weights_hash="ab" * 32)
    with pytest.raises(WeightsError, match="'tiny_vit'"):
        build(path, vit)
    assert isinstance(build(file_of("featup"), vit), Upsampler)
    with pytest.raises(WeightsError, match=r"factor 2.* 3"):
        build(file_of("featup"), vit, factor=3)
    with pytest.raises(WeightsError, match=r"'featup'.*'featsharp'"):
        build(file_of("featup"), vit, name="featsharp")
    with pytest.raises(WeightsError, match="another teacher"):
        build(file_of("featup", channels=64), cnn)


@pytest.mark.parametrize("name", ["featup", "bilinear", "tile"])
@pytest.mark.parametrize("factor", [0, -2])
def test_build_upsampler__a_factor_below_one(tiny, name, factor):
    config = UpsamplerConfig(name=name, factor=factor)
    with pytest.raises(ConfigError, match=f"upsampler.factor is {factor}"):
        build_upsampler(config, {"tiny_vit": tiny("tiny_vit")})


def test_call__a_teacher_input_of_another_size_is_refused_unless_any_size(file_of, tiny):
    teacher, path = tiny("tiny_vit"), file_of("featup")  # native 48 px, 6 cells
    with pytest.raises(ConfigError, match=r"48x48.*64x64"):
        build(path, teacher)(teacher, PIXELS, (16, 16))
    found = build(path, teacher, any_size=True)(teacher, PIXELS, (16, 16))
    assert found.spatial.shape[-2:] == (16, 16)


def test_call__precision_is_an_option_and_changes_rounding_only(file_of, tiny):
    teacher, path = tiny("tiny_vit"), file_of("featsharp")
    reduced, full = (
        build(path, teacher, name="featsharp", precision=name)(teacher, PIXELS, (12, 12)).spatial
        for name in ("bfloat16", "float32")
    )
    assert not torch.equal(reduced, full)
    config = UpsamplerConfig(name="featsharp", factor=FACTOR, weights={"tiny_vit": str(path)})
    for precision, expected in (("bfloat16", reduced), ("float32", full)):
        made = build_upsampler(config, {"tiny_vit": teacher}, precision)
        assert torch.equal(made(teacher, PIXELS, (12, 12)).spatial, expected), "as the recipe's"
    torch.testing.assert_close(reduced, full, atol=0.05 * float(full.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["phi_s", "layer_norm"])
def test_normalised__is_a_call_and_the_normalizer(file_of, tiny, name):
    teacher, path = tiny("tiny_vit"), file_of("featsharp")
    upsampler = build(path, teacher, name="featsharp", precision="float32")
    assert isinstance(upsampler, NormalisedUpsampler)
    raw = upsampler(teacher, PIXELS, (12, 12))
    moments = Moments(CHANNELS)
    moments.update(raw.spatial)
    normalizer = NORMALIZERS.get(name)().fit(moments)
    expected = normalizer.apply(raw.spatial)
    summary, spatial = upsampler.normalised(teacher, PIXELS, (12, 12), normalizer)
    assert float((spatial - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(summary, raw.summary)


@pytest.mark.parametrize("grid", [(12, 6), (10, 12), (12, 4), (12, 12)])
def test_call__views_whose_longer_side_is_the_fit_s_are_taken(file_of, tiny, grid):
    teacher = tiny("tiny_vit")
    found = build(file_of("featsharp"), teacher, name="featsharp")(teacher, PIXELS, grid)
    assert found.spatial.shape == (2, CHANNELS, *grid)
    assert found.spatial.isfinite().all()


@pytest.mark.parametrize(
    ("name", "factor", "options", "images"),
    [
        *((name, 2, {}, 1) for name in KINDS if name != "featsharp"),
        ("featsharp", 2, {}, 5),
        ("featsharp", 3, {}, 10),
        ("featsharp", 4, {"progressive": True}, 21),
        ("featsharp", 4, {}, 17),
        ("featsharp", 2, {"inputs": ["featup"]}, 1),
        ("resfu", 3, {"tiles": True}, 10),
    ],
)
def test_cost__is_what_the_teacher_encodes(file_of, spy, name, factor, options, images):
    teacher = spy("tiny_vit")
    upsampler = build(file_of(name, "tiny_vit", factor, options), teacher, name, factor)
    upsampler(teacher, PIXELS, (6 * factor, 4 * factor))
    assert teacher.calls == [2 * images]
    assert upsampler.cost((6 * factor, 4 * factor)) == images


@pytest.mark.parametrize("preset", ["tiny_vit", "tiny_dinov2", "tiny_cnn", "tiny_samvit"])
@pytest.mark.parametrize("name", ["featup", "featsharp"])
def test_call__teachers_of_every_build(file_of, tiny, name, preset):
    """With register tokens, without any, convolutional, without a summary."""
    teacher = tiny(preset)
    rows, columns = teacher.spec.grid(teacher.spec.native_size)
    upsampler = build(file_of(name, preset, 3), teacher, name, 3)
    assert isinstance(upsampler, Corrector)
    summary, spatial = upsampler(teacher, PIXELS[:1], (3 * rows, 3 * columns))
    assert spatial.shape == (1, CHANNELS, 3 * rows, 3 * columns)
    assert spatial.dtype == torch.float32
    assert spatial.is_contiguous(memory_format=torch.channels_last)
    assert (summary is None) == (teacher.spec.summary_channels is None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("grid", [(7, 3), (5, 9), (2, 2)])
def test_call__odd_grids_of_the_teacher(file_of, tiny, name, grid):
    teacher, fine = tiny("tiny_vit"), (grid[0] * 3, grid[1] * 3)
    upsampler = build(file_of(name, factor=3), teacher, name, 3, any_size=True)
    found = upsampler(teacher, PIXELS[:1], fine).spatial
    assert found.shape == (1, CHANNELS, *fine)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["featup", "featsharp"])
def test_call__a_map_smaller_than_the_filter_s_window_is_one_line(file_of, tiny, name):
    teacher = tiny("tiny_vit")
    upsampler = build(file_of(name, factor=3), teacher, name, 3, any_size=True)
    with pytest.raises(ConfigError, match="3x3"):
        upsampler(teacher, PIXELS, (3, 3))


def test_correct__takes_a_teacher_s_own_bias_out_and_leaves_others(file_of, tiny):
    path, teacher = file_of("featup"), tiny("tiny_vit")
    upsampler, spatial = build(path, teacher), teacher.encode(torch.rand(2, 3, 48, 48)).spatial
    expected = load_model(path).correct(spatial)
    torch.testing.assert_close(upsampler.correct("tiny_vit", spatial), expected)
    assert not torch.allclose(expected, spatial, atol=0.01)
    assert upsampler.correct("other", spatial) is spatial


@pytest.mark.parametrize("kind", KINDS)
def test_untrained__costs_and_shapes_of_a_fitted_one(tiny, kind):
    from upsamplers import UPSAMPLERS

    teacher = tiny("tiny_cnn")
    upsampler = UPSAMPLERS.get(kind).untrained(kind, 2, {"tiny_cnn": teacher.spec})
    found = upsampler(teacher, PIXELS, (4, 6))
    assert found.spatial.shape == (2, CHANNELS, 4, 6)
    assert upsampler.cost((4, 6)) == (5 if kind == "featsharp" else 1)
