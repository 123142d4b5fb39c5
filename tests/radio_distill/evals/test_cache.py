"""Summaries on disk: found again where all is the same, and only there."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.config import EvaluationConfig
from radio_distill.errors import ConfigError
from radio_distill.evals import cache
from radio_distill.evals.cache import SummaryCache
from radio_distill.evals.encoder import Encoder, encode_summaries
from radio_distill.evals.run import evaluate
from radio_distill.types import Features


@pytest.fixture
def paths(tmp_path):
    generator = np.random.default_rng(0)
    files = [tmp_path / "images" / f"{index}.png" for index in range(5)]
    files[0].parent.mkdir()
    for file in files:
        Image.fromarray(generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(file)
    return files


class Counting:
    """An encoder of colours that counts the images it is shown."""

    def __init__(self):
        self.shown = 0

    def __call__(self, pixels):
        self.shown += len(pixels)
        return Features(pixels.mean(dim=(2, 3)), pixels)

    def encoder(self, folder, digest="one", piece=1024):
        return Encoder("colours", self, 8, cache=SummaryCache(folder, digest, piece))


def test_encode_summaries__are_encoded_once_and_come_back_to_the_bit(tmp_path, paths):
    encode, folder = Counting(), tmp_path / "cache"
    fresh = encode_summaries(Encoder("colours", encode, 8), paths, 32, batch_size=2)
    kept = [encode_summaries(encode.encoder(folder), paths, 32, batch_size=size) for size in (2, 3)]
    assert torch.equal(kept[0], fresh)
    assert torch.equal(kept[1], fresh)
    assert encode.shown == 2 * len(paths)
    encode_summaries(encode.encoder(folder, "another"), paths, 32)
    encode_summaries(encode.encoder(folder), paths, 24)
    assert encode.shown == 4 * len(paths), "of another encoder, and at another size"
    Image.new("RGB", (32, 40), "red").save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    changed = encode_summaries(encode.encoder(folder), paths, 32)
    assert encode.shown == 5 * len(paths)
    assert torch.equal(changed[3], torch.tensor([1.0, 0.0, 0.0]).half())


def test_encode_summaries__a_pass_that_was_stopped_goes_on_by_pieces(tmp_path, paths):
    encode, folder = Counting(), tmp_path / "cache"
    good = paths[4].read_bytes()
    paths[4].write_bytes(good[:30])
    with pytest.raises(Exception, match=r"4\.png"):
        encode_summaries(encode.encoder(folder, piece=2), paths, 32)
    assert encode.shown == 4
    paths[4].write_bytes(good)
    calls = []
    found = encode_summaries(
        encode.encoder(folder, piece=2), paths, 32, progress=lambda *call: calls.append(call)
    )
    assert encode.shown == 5
    assert calls[-1] == (5, 5)
    assert torch.equal(found, encode_summaries(Encoder("c", Counting(), 8), paths, 32))


def test_summary_cache__a_damaged_file_is_made_anew_and_the_oldest_go(tmp_path, paths, monkeypatch):
    encode, folder = Counting(), tmp_path / "cache"
    first = encode_summaries(encode.encoder(folder), paths, 32)
    (file,) = folder.glob("*/*")
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(encode_summaries(encode.encoder(folder), paths, 32), first)
    os.utime(file, (1, 1))
    monkeypatch.setattr(cache, "LIMIT", file.stat().st_size)
    encode_summaries(encode.encoder(folder), paths, 24)
    assert not file.exists()
    assert len(list(folder.glob("*/*"))) == 1


def test_evaluate__scores_with_a_cache_are_those_without_and_say_their_sizes(tmp_path, paths):
    for split in ("train", "val"):
        for index in range(4):
            image = tmp_path / "set" / split / "ab"[index % 2] / f"{index}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(paths[index].read_bytes())
    options = {"knn": {"k": 2}}
    config = EvaluationConfig(
        benchmarks=("knn",), labels=str(tmp_path / "set"), size=30, options=options
    )
    encode = Counting()
    encoder = Encoder("colours", encode, 8, weights="w")
    plain = evaluate(encoder, config)
    kept = EvaluationConfig(
        benchmarks=("knn",), labels=config.labels, size=30, options=options,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    assert evaluate(encoder, kept) == evaluate(encoder, kept) == plain
    assert plain[0].pixels == "32x32"
    assert encode.shown == 2 * 8
    files = sorted((tmp_path / "set" / "val").glob("*/*"))
    (own,) = (path for path in (tmp_path / "cache").iterdir())
    encode_summaries(encode.encoder(own.parent, own.name), files, 32)
    assert encode.shown == 2 * 8, "what reads `val` alone shares it"
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ConfigError, match=r"evaluation\.cache: cannot write"):
        encode_summaries(encode.encoder(blocked), paths, 32)
