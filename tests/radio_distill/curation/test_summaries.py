"""Summaries of shards: those of the evaluation's own way, whoever makes them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.config import DataConfig, TeacherConfig
from radio_distill.curation.summaries import encode_shards, read_summaries, without_mean
from radio_distill.data.sources import open_sources
from radio_distill.data.tar_index import Shard
from radio_distill.errors import DataError
from radio_distill.evals.encoder import Encoder, encode_summaries, teacher_encoder
from radio_distill.system.distributed import World
from teachers import build_teacher

SIZE = (48, 48)


@pytest.fixture
def images() -> list[Image.Image]:
    """Smooth images of several shapes; the last is too small to be used."""
    shapes = [(60, 90), (120, 50), (48, 48), (80, 80), (200, 64), (70, 60), (20, 40)]
    draws = np.random.default_rng(0)
    coarse = [Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in shapes]
    return [image.resize(shape, 3) for image, shape in zip(coarse, shapes, strict=True)]


@pytest.fixture
def config(images, tmp_path) -> DataConfig:
    """Three shards of these images."""
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(images), 3):
                buffer = io.BytesIO()
                images[number].save(buffer, "PNG")
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return DataConfig(shards=(str(tmp_path),), workers=0)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return teacher_encoder(build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit")))


def encode(config: DataConfig, encoder: Encoder, folder: Path, world: World) -> list[Shard]:
    shards = open_sources(config).shards
    encode_shards(shards, encoder, SIZE, config, folder, 2, world)
    return shards


def test_they_are_those_of_the_evaluation(config, encoder, images, tmp_path):
    shards = encode(config, encoder, tmp_path / "kept", World())
    ours = read_summaries(shards, tmp_path / "kept")
    order = [0, 3, 6, 1, 4, 2, 5]
    theirs = encode_summaries(encoder, [images[number] for number in order], SIZE[0])
    good = torch.tensor(order) != 6
    assert (ours.pixels > 0).tolist() == good.tolist()
    assert ours.pixels[0] == 60 * 90
    mean = theirs[good].double().mean(dim=0)
    torch.testing.assert_close(ours.mean.double(), mean, atol=1e-3, rtol=0)
    cosines = torch.cosine_similarity(ours.vectors.double(), theirs.double() - mean)
    # Pillow resizes there, torch here; but for that they are the same.
    assert cosines[good].min() > 0.999
    assert not ours.vectors[~good].any()
    assert torch.equal(without_mean(theirs, torch.zeros_like(ours.mean))[good], theirs[good])


def test_two_processes_make_what_one_makes(config, encoder, tmp_path):
    encode(config, encoder, tmp_path / "one", World())
    shards = encode(config, encoder, tmp_path / "two", World(0, 2))
    assert len(list((tmp_path / "two").iterdir())) == 2
    with pytest.raises(DataError, match=r"no summaries of \S*1\.tar"):
        read_summaries(shards, tmp_path / "two")
    encode(config, encoder, tmp_path / "two", World(1, 2))
    ours, theirs = (read_summaries(shards, tmp_path / name) for name in ("two", "one"))
    assert torch.equal(ours.vectors, theirs.vectors)
    assert (ours.pixels == theirs.pixels).all()


def test_without_mean__copies_of_one_image_alone_are_alike():
    vectors = torch.nn.functional.normalize(torch.tensor([[3.0, -1, 2]] * 3 + [[0, 0, 0]])).half()
    apart = without_mean(vectors, vectors[:3].double().mean(dim=0).float()).float()
    torch.testing.assert_close((apart @ apart.T)[:3, :3], torch.ones(3, 3), atol=1e-3, rtol=0)
    assert not apart[3].any()
