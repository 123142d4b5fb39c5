import os
import pickle

import pytest

from radio_distill.data.images import BadImageError
from radio_distill.data.index import open_shards
from radio_distill.data.reader import ShardReader
from radio_distill.errors import DataError


@pytest.fixture
def shards(shard_folder):
    return open_shards(sorted(shard_folder.glob("*.tar")))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_image_bytes__are_the_original_ones(shards, encode):
    reader = ShardReader(shards, max_open=2)
    before = open_files()
    for shard in (0, 4, 2, 0, 3, 4):
        sample = reader.sample(shard, 1)
        assert reader.key(shard, sample) == f"part-{shard}.tar:s{shard}_1.png"
        assert reader.image_bytes(shard, sample) == encode(10 * shard + 1)
        assert open_files() <= before + 2
    del reader
    assert open_files() == before


def test_image_bytes__survive_pickling(shards, encode):
    reader = ShardReader(shards)
    reader.sample(0, 0)
    copy = pickle.loads(pickle.dumps(reader))
    del reader
    assert copy.image_bytes(0, copy.sample(0, 2)) == encode(2)


def test_image_bytes__flipped_bit_is_a_bad_image(shards):
    sample = ShardReader(shards).sample(1, 0)
    raw = bytearray(shards[1].path.read_bytes())
    raw[sample.members["png"].offset + 50] ^= 4
    shards[1].path.write_bytes(raw)
    reader = ShardReader(shards)
    with pytest.raises(BadImageError, match="content differs") as error:
        reader.image_bytes(1, sample)
    assert error.value.kind == "checksum"
    assert reader.image_bytes(1, reader.sample(1, 1))


def test_sample__shard_that_vanished_or_changed(shards):
    reader = ShardReader(shards)
    shards[0].path.unlink()
    with pytest.raises(DataError, match=r"part-0\.tar: No such file"):
        reader.sample(0, 0)
    shards[1].path.write_bytes(shards[1].path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"part-1\.tar changed during the run"):
        reader.sample(1, 0)
