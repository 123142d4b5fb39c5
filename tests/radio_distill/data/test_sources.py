import json
import logging
import os
import shutil

import pytest

from radio_distill.config import DataConfig
from radio_distill.data import tar_index as index
from radio_distill.data.sources import open_sources
from radio_distill.data.tar_index import index_path
from radio_distill.data.tar_reader import ShardReader
from radio_distill.errors import DataError


def config_of(*shards, **options):
    return DataConfig(shards=tuple(map(str, shards)), workers=0, **options)


@pytest.fixture
def damaged(shard_folder):
    """Five shards, of which one is cut."""
    path = shard_folder / "part-2.tar"
    path.write_bytes(path.read_bytes()[:6000])
    return shard_folder


def test_open_sources__refuses_damage_and_names_both_mends(damaged):
    with pytest.raises(DataError) as error:
        open_sources(config_of(damaged))
    message = str(error.value)
    assert "1 of 5 shards damaged" in message
    assert "part-2.tar" in message
    assert "data.max_bad_shards=0.2" in message
    assert "\n" not in message
    with pytest.raises(DataError, match="no shards found"):
        open_sources(config_of(damaged / "no"))


def test_open_sources__the_share_that_the_message_names_is_enough(shard_folder):
    for name in ("part-1.tar", "part-4.tar"):
        (shard_folder / name).write_bytes(b"junk")
    (shard_folder / "part-0.tar").unlink()
    (shard_folder / "part-2.tar").unlink()
    with pytest.raises(DataError, match="2 of 3 shards") as error:
        open_sources(config_of(shard_folder, max_bad_shards=0.5))
    share = float(str(error.value).split("max_bad_shards=")[1].split(" ")[0])
    sources = open_sources(config_of(shard_folder, max_bad_shards=share))
    assert [shard.path.name for shard in sources.shards] == ["part-3.tar"]


def test_open_sources__within_the_budget_damaged_shards_are_left_out(damaged, caplog):
    sources = open_sources(config_of(damaged, max_bad_shards=0.2))
    assert [shard.num_samples for shard in sources.shards] == [3, 4, 6, 7]
    (line,) = sources.damaged
    assert "part-2.tar" in line
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "part-2.tar" in caplog.text
    whole = [damaged / f"part-{i}.tar" for i in (0, 1, 3, 4)]
    assert sources.fingerprint == open_sources(config_of(*whole)).fingerprint


def test_open_sources__a_source_needs_a_whole_shard(damaged):
    patterns = damaged / "part-[0-1].tar", damaged / "part-2.tar"
    config = config_of(*patterns, weights=(0.5, 0.5), max_bad_shards=1.0)
    with pytest.raises(DataError, match=r"all shards of .*part-2\.tar"):
        open_sources(config)
    for path in damaged.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="all shards of"):
        open_sources(config_of(damaged, max_bad_shards=1.0))


@pytest.fixture
def unclean(tmp_path, encode, write_tar):
    """Two shards of ten samples, and of eight with two that must not be used."""
    good = {f"a{i}.png": encode(i) for i in range(10)}
    write_tar(tmp_path / "a.tar", good)
    bad = [("../b.png", encode(0)), ("c.txt", b"")]
    write_tar(tmp_path / "b.tar", [*list(good.items())[:8], *bad])
    return tmp_path


def test_open_sources__samples_left_out_have_a_budget(unclean, caplog):
    sources = open_sources(config_of(unclean, max_bad_share=0.1))
    assert [(shard.num_samples, shard.num_left_out) for shard in sources.shards] == [
        (10, 0),
        (8, 2),
    ]
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "b.tar: left out 2 of 10 samples: 1 no_image (c.txt), 1 unsafe_name (../b.png)"
    )
    for _ in range(2):  # from the stored index too
        with pytest.raises(DataError, match=r"2 of 20 .*unsafe_name \(\.\./b"):
            open_sources(config_of(unclean, max_bad_share=0.09))


def test_open_sources__many_unclean_shards_do_not_flood_the_log(
    tmp_path, encode, write_tar, caplog
):
    for number in range(30):
        write_tar(tmp_path / f"{number}.tar", {"a.png": encode(0), "../a.png": b""})
    open_sources(config_of(tmp_path, max_bad_share=0.5))
    assert len(caplog.records) == 21
    assert "10 shards more" in caplog.records[-1].getMessage()


def test_open_sources__names_that_are_no_text_reach_no_log(tmp_path, encode, write_tar, caplog):
    folder = tmp_path / os.fsdecode(b"caf\xe9\x1b[2J")
    folder.mkdir()
    write_tar(folder / os.fsdecode(b"\xff.tar"), {"a.png": encode(0), "../b.png": b""})
    write_tar(folder / "b.tar", {"a.png": encode(0)})
    (folder / "b.tar").write_bytes(b"junk")
    open_sources(config_of(folder, max_bad_share=0.5, max_bad_shards=0.5))
    with pytest.raises(DataError) as error:
        open_sources(config_of(folder))
    for line in (*(record.getMessage() for record in caplog.records), str(error.value)):
        assert line.isprintable()
        assert json.dumps(line, ensure_ascii=False).encode()
    assert r"\udcff.tar" in caplog.text


def test_fingerprint__is_that_of_the_order(shard_folder, tmp_path, encode, write_tar):
    def fingerprint(*patterns, **options):
        return open_sources(config_of(*patterns, **options)).fingerprint

    first = fingerprint(shard_folder)
    for path in shard_folder.glob("*.tar"):
        index_path(path).unlink()
        os.utime(path, ns=(1, 1))
    assert fingerprint(shard_folder) == first
    shutil.copytree(
        shard_folder, tmp_path / "elsewhere" / "deep", ignore=shutil.ignore_patterns("else*")
    )
    assert fingerprint(tmp_path / "elsewhere") == first
    shutil.rmtree(tmp_path / "elsewhere")

    low, high = shard_folder / "part-[0-3].tar", shard_folder / "part-4.tar"
    assert fingerprint(low, high) == first
    others = [
        fingerprint(low),
        fingerprint(high, low),  # another order of the shards
        fingerprint(low, high, weights=(0.5, 0.5)),
    ]
    write_tar(shard_folder / "part-0.tar", {f"s0_{i}.png": encode(70 + i) for i in range(3)})
    others.append(fingerprint(shard_folder))
    assert len({first, *others}) == 5


def test_open_sources__empty_shards_are_no_fault_and_are_said(
    shard_folder, write_tar, caplog, monkeypatch
):
    sound = open_sources(config_of(shard_folder))
    write_tar(shard_folder / "failed.tar", {})
    sources = open_sources(config_of(shard_folder))
    assert sources.fingerprint == sound.fingerprint
    assert [shard.path.name for shard in sources.empty] == ["failed.tar"]
    assert "failed.tar" in caplog.text
    monkeypatch.setattr(index, "scan_shard", lambda path: pytest.fail("read again"))
    open_sources(config_of(shard_folder))
    with pytest.raises(DataError, match="1 without images"):
        open_sources(config_of(shard_folder / "failed.tar"))


def test_open_sources__shards_of_which_nothing_can_be_used_count_as_left_out(
    shard_folder, write_tar
):
    write_tar(shard_folder / "texts.tar", {f"{i}.txt": b"" for i in range(25)})
    with pytest.raises(DataError, match=r"25 of 50 .*no_image"):
        open_sources(config_of(shard_folder))
    assert len(open_sources(config_of(shard_folder, max_bad_share=0.5)).shards) == 5


def test_open_sources__says_what_is_notable(tmp_path, encode, write_tar, caplog):
    caplog.set_level(logging.INFO)
    write_tar(tmp_path / "a.tar", {"a.jpg": encode(0), "a.png": encode(1), "a.1.jpg": encode(2)})
    assert open_sources(config_of(tmp_path)).num_images == 2
    assert "1 members are further" in caplog.text
    assert "(a.png)" in caplog.text


def test_open_sources__where_shards_cannot_have_indexes_beside_them(
    shard_folder, tmp_path_factory, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    other = tmp_path_factory.mktemp("run") / "indexes"
    walks = []
    scan_shard = index.scan_shard
    monkeypatch.setattr(index, "scan_shard", lambda path: (walks.append(path), scan_shard(path))[1])
    for path in shard_folder.glob("*.tar"):
        index_path(path).mkdir()  # in the way of every user, root too
    config = config_of(shard_folder, index=("beside", str(other)))
    first = open_sources(config)
    assert len(walks) == 5
    assert f"indexes of 5 shards go to {other}" in caplog.text
    assert open_sources(config).fingerprint == first.fingerprint
    assert len(walks) == 5, "read once"
    assert len(list(other.iterdir())) == 5
    reader = ShardReader(open_sources(config).shards)
    assert reader.sample(4, 6).key == "s4_6"
    open_sources(config_of(shard_folder))
    assert len(walks) == 10
    assert "indexes of 5 shards stay in memory" in caplog.text


def test_open_sources__index_folder_holds_shards_of_one_name(tmp_path, encode, write_tar):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write_tar(tmp_path / str(number) / "a.tar", {f"{number}.png": encode(number)})
    folder = tmp_path / "indexes"
    for _ in range(2):
        sources = open_sources(config_of(tmp_path / "0", tmp_path / "1", index=(str(folder),)))
        keys = [ShardReader(sources.shards).sample(number, 0).key for number in range(2)]
        assert keys == ["0", "1"]
    assert not list(tmp_path.glob("*/*.tar.index.jsonl"))


def test_open_sources__damage_is_found_once(damaged, monkeypatch):
    for _ in range(2):
        with pytest.raises(DataError, match=r"part-2\.tar"):
            open_sources(config_of(damaged))
        monkeypatch.setattr(index, "scan_shard", lambda path: pytest.fail("read again"))
    monkeypatch.undo()
    shutil.copy(damaged / "part-1.tar", damaged / "part-2.tar")
    assert open_sources(config_of(damaged)).num_images == 24
