import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from radio_distill.config import DataConfig
from radio_distill.data.curation import read_curation, write_curation
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.data.sources import open_sources
from radio_distill.errors import DataError

SIZE = (16, 24)
KEPT = np.arange(25) % 3 != 1  # of 25 images
STEP = 6


@pytest.fixture
def curated(shard_folder: Path) -> DataConfig:
    """Five shards, and a file that keeps two thirds of their images."""
    config = DataConfig(shards=(str(shard_folder),), workers=0, shuffle_shards=2)
    return keeping(config, shard_folder / "curation.jsonl", KEPT)


def keeping(config: DataConfig, path: Path, kept: np.ndarray) -> DataConfig:
    write_curation(path, open_sources(replace(config, curation="")).shards, kept, {})
    return replace(config, curation=str(path))


def keys_of(config: DataConfig, steps: int, start: int = 0, parts: int = 1) -> list[str]:
    """Keys of the images of some steps, as ``parts`` processes read them together."""
    per_process = []
    for rank in range(parts):
        part = StepSlice(rank * STEP // parts, (rank + 1) * STEP // parts, SIZE)
        source = ShardBatches(config, seed=3, images_per_step=STEP, slices=in_every_step([part]))
        stream = source.batches(start)
        per_process.append([batch.keys for (batch,) in itertools.islice(stream, steps)])
        stream.close()
    return [key for step in zip(*per_process, strict=True) for keys in step for key in keys]


def test_each_kept_image_comes_once_an_epoch_and_no_other(curated):
    names = [f"part-{shard}.tar:s{shard}_{i}.png" for shard in range(5) for i in range(3 + shard)]
    expected = {name for name, keep in zip(names, KEPT, strict=True) if keep}
    number = len(expected)  # 17: steps do not end with epochs
    keys = keys_of(curated, steps=3 * number // STEP + 1)
    assert Counter(keys[: 2 * number]) == Counter(dict.fromkeys(expected, 2))
    assert open_sources(curated).num_images == number


def test_order_is_the_same_on_two_processes_and_after_a_resume(curated):
    whole = keys_of(curated, steps=9)
    assert keys_of(curated, steps=9, parts=2) == whole
    assert keys_of(curated, steps=5, start=4, parts=3) == whole[4 * STEP :]


def test_a_curation_that_keeps_all_changes_nothing(curated, tmp_path):
    everything = keeping(curated, tmp_path / "all.jsonl", np.ones(25, bool))
    without = DataConfig(shards=curated.shards, workers=0, shuffle_shards=2)
    assert keys_of(everything, steps=6) == keys_of(without, steps=6)


def test_fingerprint__of_what_is_kept_wherever_it_lies(curated, tmp_path_factory):
    place = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(curated.shards[0], place / "shards")
    (place / "shards" / "curation.jsonl").rename(place / "c.jsonl")
    moved = DataConfig(shards=(str(place / "shards"),), curation=str(place / "c.jsonl"))
    without = DataConfig(shards=curated.shards)
    other = keeping(without, place / "other.jsonl", np.roll(KEPT, 1))
    prints = [open_sources(it).fingerprint for it in (curated, moved, other, without)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_shards_without_a_kept_image_are_not_in_use(curated, tmp_path):
    kept = np.zeros(25, bool)
    kept[[0, 8]] = True  # of part-0 and part-2
    config = keeping(curated, tmp_path / "few.jsonl", kept)
    assert [shard.path.name for shard in open_sources(config).shards] == [
        "part-0.tar",
        "part-2.tar",
    ]
    assert set(keys_of(config, steps=2)) == {"part-0.tar:s0_0.png", "part-2.tar:s2_1.png"}


def test_shards_of_equal_contents_keep_each_their_own(captioned, tmp_path):
    twin = shutil.copy(captioned, tmp_path / "b.tar")
    both = DataConfig(shards=(str(captioned), str(twin)), workers=0)
    kept = np.arange(12) >= 6
    config = keeping(both, tmp_path / "second.jsonl", kept)
    assert [shard.path.name for shard in open_sources(config).shards] == ["b.tar"]


def test_weighted_entries_draw_from_what_is_kept_of_each(curated, tmp_path):
    folder = Path(curated.shards[0])
    entries = tuple(str(folder / f"part-{number}.tar") for number in (0, 4))
    config = replace(curated, shards=entries, weights=(0.5, 0.5), curation="")
    config = keeping(config, tmp_path / "two.jsonl", np.arange(10) % 2 == 0)
    counts = Counter(key.partition(":")[0] for key in keys_of(config, steps=4))
    assert counts == {"part-0.tar": 12, "part-4.tar": 12}
    none = keeping(replace(config, curation=""), tmp_path / "one.jsonl", np.arange(10) >= 3)
    with pytest.raises(DataError, match=r"keeps no image of \S*part-0\.tar"):
        open_sources(none)


def test_errors(curated, captioned, tmp_path):
    path = Path(curated.curation)
    with pytest.raises(DataError, match=r"does not know \S*a\.tar"):
        open_sources(replace(curated, shards=(str(captioned),)))
    whole = path.read_text()
    head, first, *rest = whole.splitlines(keepends=True)
    broken = {"cut": whole[: len(whole) // 2], "line lost": head + "".join(rest), "text": "hello\n"}
    broken |= {"empty": "", "bit": head + first.replace('", 3,', '", 4,') + "".join(rest)}
    for text in broken.values():
        path.write_text(text)
        with pytest.raises(DataError, match=r"curation\.jsonl is (not whole|no such file)"):
            read_curation(path)
    with pytest.raises(DataError, match="No such file"):
        open_sources(replace(curated, curation=str(tmp_path / "none.jsonl")))


def test_written_bytes_depend_on_the_arguments_alone(curated, tmp_path):
    shards = open_sources(DataConfig(shards=curated.shards)).shards
    for name in "ab":
        write_curation(tmp_path / name, shards, KEPT, {"seed": 0})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
