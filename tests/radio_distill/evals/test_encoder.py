import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from radio_distill.config import EvaluationConfig
from radio_distill.data.folder import spread
from radio_distill.errors import ConfigError, DataError, UnknownNameError
from radio_distill.evals.encoder import Encoder, encode_images, open_image, to_pixels
from radio_distill.evals.run import evaluate, make
from radio_distill.types import Features

SIDES = st.integers(1, 3000)


def _encoder(**fields) -> Encoder:
    return Encoder("x", lambda pixels: Features(None, pixels), **fields)


@given(st.tuples(SIDES, SIDES), st.integers(1, 64), st.one_of(st.none(), st.integers(64, 2000)))
def test_nearest_size__is_taken_by_the_encoder(size, multiple, longest):
    found = _encoder(size_multiple=multiple, max_size=longest).nearest_size(size)
    for side, asked in zip(found, size, strict=True):
        assert side >= multiple
        assert side % multiple == 0
        assert side <= max(longest or 0, multiple) or longest is None
        if longest is None:
            assert side == multiple or abs(side - asked) <= multiple / 2


def test_nearest_size__keeps_the_aspect_ratio_under_a_limit():
    assert _encoder(size_multiple=16, max_size=512).nearest_size((1024, 512)) == (512, 256)


def test_nearest_size__fixed():
    assert _encoder(size_multiple=16, fixed_size=(64, 96)).nearest_size((500, 10)) == (64, 96)


def test_encoder__resizes_what_it_does_not_take():
    seen = []

    def encode(pixels):
        seen.append(tuple(pixels.shape))
        return Features(None, pixels.half())

    spatial = Encoder("x", encode, 14)(torch.rand(2, 3, 30, 41)).spatial
    assert seen == [(2, 3, 28, 42)]
    assert spatial.dtype == torch.float32


def test_layers__are_of_the_size_that_a_call_is_given():
    def inner(pixels, count):
        return [Features(pixels.mean((2, 3)).half(), pixels.half())] * count

    encoder = _encoder(size_multiple=8, inner=inner)
    layers = encoder.layers(torch.rand(1, 3, 30, 17), 3)
    assert [(tuple(layer.spatial.shape), layer.spatial.dtype) for layer in layers] == [
        ((1, 3, 32, 16), torch.float32)
    ] * 3
    assert {layer.summary.dtype for layer in layers} == {torch.float32}


def test_layers__an_encoder_without_them_is_named():
    with pytest.raises(ConfigError, match="encoder 'x' has no inner layers"):
        _encoder(size_multiple=8).layers(torch.rand(1, 3, 16, 16), 4)


def test_to_pixels__covers_and_crops_the_centre():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("red", (100, 0, 200, 100))
    pixels = to_pixels(image, (50, 50))
    assert pixels.shape == (3, 50, 50)
    assert pixels[0, :, 2:-2].min() == 1
    assert pixels[1:, :, 2:-2].max() == 0


def test_open_image__turns_upright(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # camera held on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 20)


def test_open_image__broken_file_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.jpg"):
        open_image(tmp_path / "a.jpg")


def test_encode_images__batches_do_not_change_features(colours, gradient):
    images = [gradient, gradient.rotate(90), gradient.rotate(180)]
    calls = []
    one = torch.cat([f.spatial for f in encode_images(colours(8), images, (64, 64), batch_size=3)])
    many = torch.cat(
        [
            f.spatial
            for f in encode_images(
                colours(8), images, (64, 64), 2, lambda *done: calls.append(done)
            )
        ]
    )
    assert torch.equal(one, many)
    assert calls == [(2, 3), (3, 3)]


@given(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 60)))
def test_spread__is_ordered_distinct_and_as_many_as_asked(length, limit):
    found = spread(range(length), limit)
    assert len(found) == (min(length, limit) if limit else length)
    assert found == sorted(set(found))


def test_make__empty_data_names_the_field():
    with pytest.raises(ConfigError, match=r"evaluation\.labels.*'knn'"):
        make("knn", EvaluationConfig())


def test_make__options_reach_the_benchmark():
    config = EvaluationConfig(labels="x", options={"knn": {"k": 3}})
    assert make("knn", config).k == 3


def test_make__misspelt_option_names_the_nearest():
    config = EvaluationConfig(labels="x", options={"knn": {"temperatur": 1}})
    with pytest.raises(ConfigError, match=r"options\.knn\.temperatur.*'temperature'"):
        make("knn", config)


def test_evaluate__unknown_benchmark_names_the_nearest(colours):
    with pytest.raises(UnknownNameError, match="'agreement'"):
        evaluate(colours(8), EvaluationConfig(benchmarks=("agrement",)))


def test_evaluate__checks_all_before_the_first_runs(colours, photographs):
    config = EvaluationConfig(benchmarks=("agreement", "knn"), images=str(photographs))
    calls = []
    with pytest.raises(ConfigError, match=r"evaluation\.labels"):
        evaluate(colours(8), config, lambda *call: calls.append(call))
    assert calls == []


def test_evaluate__scores_say_the_sizes_that_the_encoder_was_given(colours, photographs):
    config = EvaluationConfig(
        benchmarks=("agreement", "correspondence"),
        images=str(photographs),
        size=32,
        dense_size=100,
    )

    def sizes(encoder):
        return {score.benchmark: score.pixels for score in evaluate(encoder, config)}

    asked = {"agreement": "32x32, 48x48, 64x64, 96x96", "correspondence": "96x96"}
    assert sizes(colours(8)) == asked | {"correspondence": "96x96"}
    limited = Encoder("limited", colours(8).encode, 8, max_size=64)
    assert sizes(limited) == {"agreement": "32x32, 48x48, 64x64", "correspondence": "64x64"}
    fixed = Encoder("fixed", colours(8).encode, 8, fixed_size=(40, 40))
    assert sizes(fixed) == {"correspondence": "40x40"}


def test_evaluate__runs_what_is_named_and_reports_progress(colours, photographs):
    config = EvaluationConfig(
        benchmarks=("agreement", "correspondence"),
        images=str(photographs),
        size=32,
        dense_size=64,
        limit=2,
    )
    calls = []
    scores = evaluate(colours(8), config, lambda *call: calls.append(call))
    assert {score.benchmark for score in scores} == {"agreement", "correspondence"}
    assert {score.num_samples for score in scores} == {2}
    assert ("correspondence", 2, 2) in calls
    assert scores == evaluate(colours(8), config)
