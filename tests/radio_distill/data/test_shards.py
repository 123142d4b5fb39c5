import os

import pytest
import webdataset

from radio_distill.config import DataConfig
from radio_distill.data.check import check_shards
from radio_distill.data.find import find_shards, list_tree
from radio_distill.data.images import decode_image
from radio_distill.data.shards import write_shards
from radio_distill.data.tar_index import open_shards, parse_sample
from radio_distill.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path, encode):
    """Two class folders, with companions, strange names, and things that are no images."""
    folder = tmp_path / "source"
    for name, data in {
        "cat/tabby.v1.jpg": encode(0, "JPEG"),
        "cat/tabby.v1.txt": "a tabby, señor".encode(),
        "cat/ünder way.png": encode(1),
        "dog/rex.JPEG": encode(2, "JPEG"),
        "dog/rex.json": b'{"url": "x"}',
        "dog/really_a_png.jpg": encode(3),
        "dog/notes.txt": b"no image beside it",
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
    shards = open_shards(find_shards([str(tmp_path / "out")]).paths)
    assert [shard.num_samples for shard in shards] == [2, 2]
    assert parse_sample(shards[0].lines()[0]).members.keys() == {"jpg", "txt"}
    assert tuple(shard.path for shard in shards) == summary.shards
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_write_shards__equal_sources_give_equal_bytes(source, tmp_path):
    first, second = (write_shards(source, tmp_path / name).shards for name in ("a", "b"))
    assert [shard.read_bytes() for shard in first] == [shard.read_bytes() for shard in second]


def test_write_shards__bad_images_are_listed_and_left_out(source, tmp_path, encode):
    (source / "cat" / "broken.jpg").write_bytes(encode(7, "JPEG")[:200])
    (source / "cat" / "empty.png").write_bytes(b"")
    (source / "cat" / "nowhere.png").symlink_to(tmp_path / "nothing")
    calls = []
    out = tmp_path / "out"
    summary = write_shards(source, out, progress=lambda done, total: calls.append((done, total)))
    assert summary.bad.keys() == {"cat/broken.jpg", "cat/empty.png", "cat/nowhere.png"}
    assert summary.num_images == len(read_back(summary.shards)) == 4
    assert calls == [(done, 7) for done in range(1, 8)]
    lines = "\n".join(summary.describe())
    assert lines.startswith("4 images in 1 shards")
    assert all(lines.count(f"left out {name}: ") == 1 for name in summary.bad)
    assert "3 of 7 images (2 undecodable, 1 unreadable)" in lines


def test_write_shards__real_photographs(real, tmp_path):
    folder = real / "classification" / "caltech101_20x60" / "val" / "ketch"
    originals = [path.read_bytes() for path in list_tree(folder).images]
    summary = write_shards(folder, tmp_path / "out", images_per_shard=7)
    assert [sample["jpg"] for sample in read_back(summary.shards)] == originals
    assert decode_image(originals[0]).mode == "RGB"


def test_write_shards__nothing_to_write(tmp_path, source):
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no images found in"):
        write_shards(tmp_path / "void", tmp_path / "out")
    (tmp_path / "void" / "a.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="1 of 1 images"):
        write_shards(tmp_path / "void", tmp_path / "out")
    with pytest.raises(ConfigError, match="images_per_shard"):
        write_shards(source, tmp_path / "out", images_per_shard=0)


def test_write_shards__does_not_mix_with_older_shards(source, tmp_path):
    before = write_shards(source, tmp_path / "out").shards[0].read_bytes()
    with pytest.raises(DataError, match="already holds"):
        write_shards(source, tmp_path / "out", images_per_shard=1)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


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
        r"caf\udce9\n/\udcfe.png": "not an image in a known format",
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
    with pytest.raises(DataError, match=r"loose\.png"):
        write_shards(source, tmp_path / "out", labels=True)


@pytest.mark.parametrize(("field", "value"), [("min_size", 50), ("max_pixels", 2000)])
def test_write_shards__takes_what_training_takes(tmp_path, encode, field, value):
    (tmp_path / "in").mkdir()
    sides = {"min_size": [40, 60], "max_pixels": [60, 40]}[field]
    for name, side in zip(["bad.png", "good.png"], sides, strict=True):
        (tmp_path / "in" / name).write_bytes(encode(1, size=(side, side)))
    limits = DataConfig(shards=(), **{field: value})
    summary = write_shards(tmp_path / "in", tmp_path / "out", limits=limits)
    assert (summary.num_images, list(summary.bad)) == (1, ["bad.png"])
    assert f"data.{field} (now {value})" in "\n".join(summary.describe())
    assert check_shards([str(tmp_path / "out")], limits).is_clean
    (tmp_path / "in" / "good.png").unlink()
    with pytest.raises(DataError, match=rf"1 of 1 images .*data\.{field}"):
        write_shards(tmp_path / "in", tmp_path / "none", limits=limits)


def test_write_shards__what_is_passed_over_is_counted(source, tmp_path, encode):
    (source / "cat" / "a.NEF").write_bytes(b"raw")
    (source / "cat" / "b.nef").write_bytes(b"raw")
    (source / "cat" / "saved.jfif").write_bytes(encode(3, "JPEG"))
    (source / "cat" / "noname").write_bytes(encode(4, "JPEG"))
    (source / "dog" / "up").symlink_to("..")
    (source / "dog" / "gone").symlink_to("nothing")
    (source / "Thumbs.db").write_bytes(b"")
    summary = write_shards(source, tmp_path / "out")
    assert summary.num_images == 5
    (line,) = (line for line in summary.notes if line.startswith("passed over"))
    for part in ("2 .nef", "1 without suffix", "1 .txt", "3 hidden", "1 links to nothing"):
        assert part in line
    assert "1 links back to a folder above" in line


def test_write_shards__links_are_followed(source, tmp_path, encode):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(source / "cat")
    (tmp_path / "linked" / "dog").symlink_to(source / "dog")
    (tmp_path / "linked" / "cat2").symlink_to(source / "cat")
    summary = write_shards(tmp_path / "linked", tmp_path / "out", labels=True)
    assert (summary.num_images, summary.class_names) == (6, ("cat", "cat2", "dog"))


def test_write_shards__captions_of_every_spelling(tmp_path, encode):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.JPG").write_bytes(encode(number, "JPEG"))
    captions = {
        "0.txt": "café".encode("latin-1"),
        "1.TXT": "café".encode(),
        "2.jpg.txt": "café".encode("utf-16"),
        "3.JPG.Json": b"{}",
        "4.txt": b"",
        "6.txt": b"of nothing",
    }
    for name, text in captions.items():
        (folder / name).write_bytes(text)
    summary = write_shards(folder, tmp_path / "out")
    samples = read_back(summary.shards)
    texts = [sample["txt"].decode() for sample in samples if "txt" in sample]
    assert texts == ["café", "café", "café", ""]
    assert samples[3]["json"] == b"{}"
    (line,) = (line for line in summary.notes if line.startswith("side files"))
    assert "4 .txt" in line
    assert "2 .txt encoded anew" in line
    assert "1 empty .txt" in line
    assert "passed over: 1 .txt" in summary.notes


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/n1/images/a", "train/n2/images/b"], ("n1", "n2")),
        (["x/y/train/n1/a", "x/y/train/n2/b"], ("n1", "n2")),
        (["animals/cat/a", "animals/dog/b", "cars/c"], ("animals", "cars")),
        (["train/n1/images/a"], ("n1",)),
    ],
)
def test_write_shards__class_is_the_folder_of_the_first_level(tmp_path, put, names, classes):
    put(tmp_path / "in", [f"{name}.png" for name in names])
    summary = write_shards(tmp_path / "in", tmp_path / "out", labels=True)
    assert summary.class_names == classes
    assert f"classes: {len(classes)}" in "\n".join(summary.notes)


def test_write_shards__splits_are_no_classes(tmp_path, put):
    put(tmp_path / "in", ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"))
    with pytest.raises(DataError, match=r"train, val.*in/train OUT --labels"):
        write_shards(tmp_path / "in", tmp_path / "out", labels=True)
    summary = write_shards(tmp_path / "in", tmp_path / "out")
    assert any("train and val are packed together" in line for line in summary.notes)


def test_write_shards__holds_a_share_out(tmp_path, put):
    put(tmp_path / "in", [f"{number:02}.png" for number in range(20)])
    summary = write_shards(tmp_path / "in", tmp_path / "out", hold_out=0.2)
    assert summary.num_images == 16
    assert summary.held_out == (tmp_path / "out_held_out" / "shard-000000.tar",)
    trained, held = (
        {s["png"] for s in read_back(part)} for part in (summary.shards, summary.held_out)
    )
    assert (len(trained), len(held), trained & held) == (16, 4, set())
    with pytest.raises(ConfigError, match="hold_out"):
        write_shards(tmp_path / "in", tmp_path / "other", hold_out=1.0)
