import os
import shutil

import pytest
import webdataset

from radio_distill.data.images import decode_image
from radio_distill.data.index import open_shards, parse_sample
from radio_distill.data.shards import find_pictures, find_shards, write_shards
from radio_distill.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path, encode):
    """Two class folders, with companions, strange names, and things that are no pictures."""
    folder = tmp_path / "source"
    for name, data in {
        "cat/tabby.v1.jpg": encode(0, "JPEG"),
        "cat/tabby.v1.txt": "a tabby, señor".encode(),
        "cat/ünder way.png": encode(1),
        "dog/rex.JPEG": encode(2, "JPEG"),
        "dog/rex.json": b'{"url": "x"}',
        "dog/really_a_png.jpg": encode(3),
        "dog/notes.txt": b"no picture beside it",
        ".hidden/secret.png": encode(5),
        "dog/._rex.jpg": b"resource fork",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def read_back(shards):
    urls = [str(shard) for shard in shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_write_shards__webdataset_reads_the_same_bytes(source, tmp_path, encode):
    summary = write_shards(source, tmp_path / "out", images_per_shard=3, labels=True)
    assert [shard.name for shard in summary.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert (summary.num_images, summary.bad, summary.class_names) == (4, {}, ("cat", "dog"))
    samples = read_back(summary.shards)
    assert [sample["__key__"] for sample in samples] == [
        "00000000-tabby_v1",
        "00000001-_nder_way",
        "00000002-really_a_png",
        "00000003-rex",
    ]
    tabby, under, png, rex = samples
    assert (tabby["jpg"], tabby["txt"]) == (encode(0, "JPEG"), "a tabby, señor".encode())
    assert (under["png"], under["cls"], "txt" in under) == (encode(1), b"0", False)
    assert (png["png"], "jpg" in png) == (encode(3), False)
    assert (rex["jpg"], rex["json"], rex["cls"]) == (encode(2, "JPEG"), b'{"url": "x"}', b"1")
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["cat", "dog"]


def test_write_shards__our_index_accepts_them(source, tmp_path):
    summary = write_shards(source, tmp_path / "out", images_per_shard=2)
    shards = open_shards(find_shards([str(tmp_path / "out")]))
    assert [shard.num_samples for shard in shards] == [2, 2]
    assert parse_sample(shards[0].lines()[0]).members.keys() == {"jpg", "txt"}
    assert tuple(shard.path for shard in shards) == summary.shards
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_write_shards__equal_sources_give_equal_bytes(source, tmp_path):
    first, second = (write_shards(source, tmp_path / name).shards for name in ("a", "b"))
    assert [shard.read_bytes() for shard in first] == [shard.read_bytes() for shard in second]


def test_write_shards__bad_pictures_are_listed_and_left_out(source, tmp_path, encode, caplog):
    (source / "cat" / "broken.jpg").write_bytes(encode(7, "JPEG")[:200])
    (source / "cat" / "empty.png").write_bytes(b"")
    (source / "cat" / "nowhere.png").symlink_to(tmp_path / "nothing")
    calls = []
    out = tmp_path / "out"
    summary = write_shards(source, out, progress=lambda done, total: calls.append((done, total)))
    assert summary.bad.keys() == {"cat/broken.jpg", "cat/empty.png", "cat/nowhere.png"}
    assert summary.num_images == len(read_back(summary.shards)) == 4
    assert calls == [(done, 7) for done in range(1, 8)]
    assert "left out cat/broken.jpg" in caplog.text


def test_write_shards__real_photographs(real, tmp_path):
    folder = real / "classification" / "caltech101_20x60" / "val" / "ketch"
    originals = [path.read_bytes() for path in find_pictures(folder)]
    summary = write_shards(folder, tmp_path / "out", images_per_shard=7)
    assert [sample["jpg"] for sample in read_back(summary.shards)] == originals
    assert decode_image(originals[0]).mode == "RGB"


def test_write_shards__nothing_to_write(tmp_path, source):
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no pictures found in"):
        write_shards(tmp_path / "void", tmp_path / "out")
    (tmp_path / "void" / "a.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        write_shards(tmp_path / "void", tmp_path / "out")
    with pytest.raises(ConfigError, match="images_per_shard"):
        write_shards(source, tmp_path / "out", images_per_shard=0)


def test_write_shards__does_not_mix_with_older_shards(source, tmp_path):
    before = write_shards(source, tmp_path / "out").shards[0].read_bytes()
    with pytest.raises(DataError, match="already holds"):
        write_shards(source, tmp_path / "out", images_per_shard=1)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]
    write_shards(source, tmp_path / "out", prefix="other")


def test_write_shards__an_interrupted_run_leaves_nothing(source, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source, tmp_path / "out", images_per_shard=1, progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_write_shards__names_that_are_no_text(tmp_path, encode):
    folder = tmp_path / "source" / os.fsdecode(b"caf\xe9\n")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff\x1b.png")).write_bytes(encode(0))
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"junk")
    os.mkfifo(folder / "pipe.png")
    summary = write_shards(tmp_path / "source", tmp_path / "out", labels=True)
    assert summary.num_images == 1
    assert summary.bad == {
        r"caf\udce9\n/\udcfe.png": "not a picture in a known format",
        r"caf\udce9\n/pipe.png": "not a regular file",
    }
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == [r"caf\udce9\n"]
    assert [sample["__key__"] for sample in read_back(summary.shards)] == ["00000000-_"]


def test_write_shards__cannot_write(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write shards to"):
        write_shards(source, tmp_path / "file" / "out")


def test_write_shards__labels_need_class_folders(source, tmp_path, encode):
    (source / "loose.png").write_bytes(encode(0))
    with pytest.raises(DataError, match=r"loose\.png lies in no class folder"):
        write_shards(source, tmp_path / "out", labels=True)


def test_find_shards__files_folders_and_patterns(shard_folder):
    shards = [shard_folder / f"part-{i}.tar" for i in range(5)]
    deeper = shard_folder / "deeper"
    deeper.mkdir()
    shutil.move(shards[4], deeper)
    shards[4] = deeper / "part-4.tar"
    assert find_shards([str(shard_folder)]) == sorted(shards)
    assert find_shards([str(shards[3]), str(shard_folder / "part-[0-3].tar")]) == [
        shards[3],
        *shards[:3],
    ]
    assert find_shards([str(shard_folder / "**" / "part-4.tar")]) == [shards[4]]


def test_find_shards__each_comes_once(shard_folder, monkeypatch):
    monkeypatch.chdir(shard_folder)
    spellings = ["part-0.tar", str(shard_folder / "part-0.tar"), f"../{shard_folder.name}"]
    assert len(find_shards(spellings)) == 5


@pytest.mark.parametrize("pattern", ["nothing-*.tar", "nothing.tar", "empty"])
def test_find_shards__none_found_says_what_to_run(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no shards found for .*radio-distill shards SRC OUT"):
        find_shards([str(tmp_path / pattern)])
