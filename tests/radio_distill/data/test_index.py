import io
import json
import os
import random
import tarfile
import time

import pytest
import webdataset

from radio_distill.data import index
from radio_distill.data.index import index_path, index_shard, open_shard, open_shards, parse_sample
from radio_distill.errors import DataError


@pytest.fixture
def shard(tmp_path, encode, write_tar):
    members = {}
    for number in range(6):
        members[f"a{number}.png"] = encode(number)
        members[f"a{number}.txt"] = b"caption %d" % number
    return write_tar(tmp_path / "a.tar", members)


def test_index_shard__places_and_sums_fit_the_file(shard):
    import zlib

    raw = shard.read_bytes()
    samples = index_shard(shard)
    assert [sample.key for sample in samples] == [f"a{i}" for i in range(6)]
    with tarfile.open(shard) as tar:
        for sample in samples:
            assert sample.image_suffix == "png"
            for suffix, member in sample.members.items():
                content = tar.extractfile(f"{sample.key}.{suffix}").read()
                assert raw[member.offset : member.offset + member.size] == content
                assert member.crc32 == zlib.crc32(content)


def test_index_shard__groups_as_webdataset_does(tmp_path, encode, write_tar):
    picture = encode(0)
    names = [
        "./d.x/a.JPG",
        "./d.x/a.seg.png",
        "b.jpeg",
        "b.json",
        "__meta__",
        ".hidden.jpg",
        "plain",
    ]
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, picture))
    theirs = [
        (sample["__key__"], {name for name in sample if not name.startswith("__")})
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    ours = [(sample.key, set(sample.members)) for sample in index_shard(path)]
    assert ours == theirs == [("./d.x/a", {"jpg", "seg.png"}), ("b", {"jpeg", "json"})]


def damage(raw: bytes, how: str) -> bytes:
    header = 512 * next(i for i in range(1, 99) if raw[512 * i : 512 * i + 6] == b"a2.png")
    return {
        "header byte": raw[: header + 3] + b"\xff" + raw[header + 4 :],
        "first header": b"\xff" + raw[1:],
        "size field": raw[: header + 124] + b"77777777777" + raw[header + 135 :],
        "lost block": raw[:header] + bytes(1536) + raw[header + 1536 :],
        "cut at a member": raw[:header],
        "cut in a header": raw[: header + 100],
        "cut in data": raw[: header + 512 + 700],
        "no end marker": raw.rstrip(b"\0")[: -(len(raw.rstrip(b"\0")) % 512)],
        "half an end marker": raw.rstrip(b"\0") + bytes(-len(raw.rstrip(b"\0")) % 512 + 512),
        "garbage behind": raw + b"x",
        "empty": b"",
        "text": b"<html>404 not found</html>" * 100,
        "gzip": b"\x1f\x8b\x08\x00" + bytes(2000),
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "header byte",
        "first header",
        "size field",
        "lost block",
        "cut at a member",
        "cut in a header",
        "cut in data",
        "no end marker",
        "half an end marker",
        "garbage behind",
        "empty",
        "text",
        "gzip",
    ],
)
def test_open_shard__refuses_damage_in_one_line(shard, how):
    shard.write_bytes(damage(shard.read_bytes(), how))
    with pytest.raises(DataError, match=r"a\.tar") as error:
        open_shard(shard)
    assert "\n" not in str(error.value)
    assert not index_path(shard).exists()


def test_index_shard__random_damage_is_refused_or_harmless(shard):
    raw, sound = shard.read_bytes(), index_shard(shard)
    chance = random.Random(0)
    num_refused = 0
    for _ in range(150):
        broken = bytearray(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.2 else raw)
        for _ in range(chance.randrange(1, 4)):
            if broken:
                broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        shard.write_bytes(broken)
        try:
            found = index_shard(shard)
        except DataError:
            num_refused += 1
        else:  # only data or padding was hit
            places = [{s: m[:2] for s, m in sample.members.items()} for sample in found]
            assert places == [{s: m[:2] for s, m in sample.members.items()} for sample in sound]
    assert num_refused > 20


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "b/../../a.png", "a\n.png", "a\x1b[2J.png", "a\udcff.png"]
)
def test_index_shard__refuses_hostile_names(tmp_path, encode, write_tar, name):
    path = write_tar(tmp_path / "a.tar", {name: encode(0)})
    with pytest.raises(DataError, match="unsafe name") as error:
        index_shard(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_index_shard__refuses_all_but_plain_files(tmp_path, kind):
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match="not a regular file"):
        index_shard(tmp_path / "a.tar")


def test_index_shard__passes_over_folders(tmp_path, encode):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(encode(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "d", "d")
    assert [sample.key for sample in index_shard(tmp_path / "a.tar")] == ["d/a"]


def test_index_shard__refuses_samples_that_come_twice(tmp_path, encode):
    for names in (["a.png", "a.png"], ["a.png", "b.png", "a.txt"], ["a.png", "a.PNG"]):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(encode(0))
                tar.addfile(info, io.BytesIO(encode(0)))
        with pytest.raises(DataError, match="'a' comes twice"):
            index_shard(tmp_path / "a.tar")


def test_index_shard__refuses_samples_without_picture(tmp_path, encode, write_tar):
    path = write_tar(tmp_path / "a.tar", {"a.png": encode(0), "b.txt": b"lost its picture"})
    with pytest.raises(DataError, match="sample 'b' has no picture"):
        index_shard(path)
    path = write_tar(tmp_path / "b.tar", {})
    with pytest.raises(DataError, match="has no pictures"):
        index_shard(path)


def test_index_shard__refuses_members_above_the_limit(shard, monkeypatch):
    monkeypatch.setattr(index, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(DataError, match="more than 1000"):
        index_shard(shard)


def test_open_shard__second_time_reads_the_stored_index(shard, monkeypatch):
    first = open_shard(shard)
    monkeypatch.setattr(index, "index_shard", lambda path: pytest.fail("walked again"))
    second = open_shard(shard)
    assert second == first
    assert [parse_sample(line).key for line in second.lines()] == [f"a{i}" for i in range(6)]


def test_open_shard__makes_a_stale_index_anew(shard, encode, write_tar):
    open_shard(shard)
    write_tar(shard, {"new.png": encode(9)})
    assert [parse_sample(line).key for line in open_shard(shard).lines()] == ["new"]
    same_size = shard.read_bytes().replace(b"new.png", b"old.png")
    info = tarfile.TarInfo("old.png")
    info.size = len(encode(9))
    shard.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + same_size[512:])
    os.utime(shard, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert [parse_sample(line).key for line in open_shard(shard).lines()] == ["old"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]\n", b"{}\n", b'{"version": 99}\n', b"\xff\xfe\n"]
)
def test_open_shard__replaces_an_unusable_index(shard, content):
    index_path(shard).write_bytes(content)
    assert open_shard(shard).num_samples == 6
    assert json.loads(index_path(shard).read_bytes().splitlines()[0])["num_samples"] == 6


def test_shard_lines__refuses_an_index_that_was_cut(shard):
    opened = open_shard(shard)
    index_path(shard).write_bytes(b"\n".join(index_path(shard).read_bytes().splitlines()[:-1]))
    with pytest.raises(DataError, match="damaged; delete it"):
        opened.lines()


def test_open_shard__keeps_the_index_in_memory_where_it_cannot_write(shard, monkeypatch):
    stored = open_shard(shard)
    index_path(shard).unlink()
    # A folder in the way makes writing fail for every user, root too.
    index_path(shard).mkdir()
    kept = open_shard(shard)
    assert len(kept.lines()) == 6
    assert kept.digest == stored.digest
    assert [path.name for path in shard.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_open_shards__keeps_order_and_names_what_is_missing(shard_folder):
    paths = sorted(shard_folder.glob("*.tar"))
    assert [shard.num_samples for shard in open_shards(paths)] == [3, 4, 5, 6, 7]
    with pytest.raises(DataError, match=r"gone\.tar: No such file"):
        open_shards([*paths, shard_folder / "gone.tar"])


def test_shard__digest_depends_on_content_not_on_place(shard, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "a.tar"
    copy.write_bytes(shard.read_bytes())
    assert open_shard(copy).digest == open_shard(shard).digest
    place = index_shard(copy)[0].members["png"].offset
    raw = bytearray(copy.read_bytes())
    raw[place] ^= 1
    copy.write_bytes(raw)
    os.utime(copy, ns=(0, 0))
    assert open_shard(copy).digest != open_shard(shard).digest
