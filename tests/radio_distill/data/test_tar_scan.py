import gzip
import os
import random
import struct
import tarfile
import unicodedata
import zlib

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from radio_distill.data import tar_scan
from radio_distill.data.tar_scan import LeftOut, describe, is_safe, scan_shard, split_name
from radio_distill.errors import DataError


def test_scan_shard__places_and_sums_fit_the_file(captioned):
    raw = captioned.read_bytes()
    samples = scan_shard(captioned).samples
    assert [sample.key for sample in samples] == [f"a{i}" for i in range(6)]
    with tarfile.open(captioned) as tar:
        for sample in samples:
            assert sample.image_suffix == "png"
            for suffix, member in sample.members.items():
                content = tar.extractfile(f"{sample.key}.{suffix}").read()
                assert raw[member.offset : member.offset + member.size] == content
                assert member.crc32 == zlib.crc32(content)


def test_scan_shard__groups_as_webdataset_does(tmp_path, encode, write_tar):
    image = encode(0)
    names = ["./d.x/a.JPG", "./d.x/a.seg.png", "b.jpeg", "b.json"]
    names += ["__meta__", ".hidden.jpg", "plain"]
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, image))
    theirs = [
        (sample["__key__"], {name for name in sample if not name.startswith("__")})
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    ours = [(sample.key, set(sample.members)) for sample in scan_shard(path).samples]
    assert ours == theirs == [("./d.x/a", {"jpg", "seg.png"}), ("b", {"jpeg", "json"})]


def third_header(raw: bytes) -> int:
    return 512 * next(i for i in range(1, 99) if raw[512 * i : 512 * i + 6] == b"a2.png")


DAMAGE = {
    "header byte": lambda raw, at: raw[: at + 3] + b"\xff" + raw[at + 4 :],
    "first header": lambda raw, at: b"\xff" + raw[1:],
    "size field": lambda raw, at: raw[: at + 124] + b"77777777777" + raw[at + 135 :],
    "lost block": lambda raw, at: raw[:at] + bytes(1536) + raw[at + 1536 :],
    "cut at a member": lambda raw, at: raw[:at],
    "cut in a header": lambda raw, at: raw[: at + 100],
    "cut in data": lambda raw, at: raw[: at + 512 + 700],
    "no end marker": lambda raw, at: raw.rstrip(b"\0")[: -(len(raw.rstrip(b"\0")) % 512)],
    "half an end marker": lambda raw, at: (
        raw.rstrip(b"\0") + bytes(-len(raw.rstrip(b"\0")) % 512 + 512)
    ),
    "garbage behind": lambda raw, at: raw + b"x",
    "empty": lambda raw, at: b"",
    "text": lambda raw, at: b"<html>404 not found</html>" * 100,
    "gzip": lambda raw, at: b"\x1f\x8b\x08\x00" + bytes(2000),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_scan_shard__refuses_damage_in_one_line(captioned, how):
    raw = captioned.read_bytes()
    captioned.write_bytes(DAMAGE[how](raw, third_header(raw)))
    with pytest.raises(DataError, match=r"a\.tar") as error:
        scan_shard(captioned)
    assert "\n" not in str(error.value)


def test_scan_shard__random_damage_is_refused_or_harmless(captioned):
    raw, sound = captioned.read_bytes(), scan_shard(captioned).samples
    chance = random.Random(0)
    num_refused = 0
    for _ in range(150):
        broken = bytearray(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.2 else raw)
        for _ in range(chance.randrange(1, 4)):
            if broken:
                broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        captioned.write_bytes(broken)
        try:
            found = scan_shard(captioned).samples
        except DataError:
            num_refused += 1
        else:  # only data or padding was hit
            places = [{s: m[:2] for s, m in sample.members.items()} for sample in found]
            assert places == [{s: m[:2] for s, m in sample.members.items()} for sample in sound]
    assert num_refused > 20


def header(name: str, **fields) -> tarfile.TarInfo:
    """A member without content."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.fixture
def scan(tmp_path, encode, write_tar):
    """Scan a shard of members; a name alone stands for an image of its own."""

    def scan_members(members):
        pairs = members.items() if isinstance(members, dict) else members
        named = [(m, encode(i)) if isinstance(m, str) else m for i, m in enumerate(pairs)]
        return scan_shard(write_tar(tmp_path / "a.tar", named))

    return scan_members


def keys_of(contents) -> list[str]:
    return [sample.key for sample in contents.samples]


def images_of(contents) -> list[str]:
    return [f"{sample.key}.{sample.image_suffix}" for sample in contents.samples]


@pytest.mark.parametrize(
    "name",
    [
        *["/etc/a.png", "../a.png", "b/../../a.png", "a\n.png", "a\x1b[2J.png", "a\u2028.png"],
        "a\u202egnp.exe.png",  # written from right to left, it would read as another name
        "a" * 2000 + ".png",
    ],
)
def test_scan_shard__leaves_out_hostile_names(scan, name):
    contents = scan(["first.png", name, "last.png"])
    assert keys_of(contents) == ["first", "last"]
    assert contents.left_out.keys() == {"unsafe_name"}
    (shown,) = contents.left_out["unsafe_name"].names
    assert shown.isprintable()
    assert len(shown) <= 100
    describe(contents.left_out).encode("utf-8")  # no half of a surrogate pair


@pytest.mark.parametrize(
    "kind",
    [
        *[tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE],
        *[tarfile.GNUTYPE_SPARSE, b"Z"],
    ],
)
def test_scan_shard__leaves_out_all_but_plain_files(scan, kind):
    link = header("a.png", type=kind, linkname="/etc/passwd")
    contents = scan([("a.png", link), ("a.txt", b"of the link"), "b.png"])
    assert keys_of(contents) == ["b"]
    assert contents.left_out == {"not_a_file": LeftOut(1, ("a.png",))}


def test_scan_shard__link_that_claims_a_size(tmp_path, encode, write_tar):
    """Readers pass over no data behind a link, whatever its header says."""
    link = header("a.png", type=tarfile.LNKTYPE, linkname="b.png", size=700)
    path = write_tar(tmp_path / "a.tar", {"b.png": encode(0), "c.png": encode(1)})
    path.write_bytes(link.tobuf(tarfile.USTAR_FORMAT) + path.read_bytes())
    assert keys_of(scan_shard(path)) == ["b", "c"]
    path.write_bytes(link.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    assert scan_shard(path)[:2] == ([], {"not_a_file": LeftOut(1, ("a.png",))})


def test_scan_shard__passes_over_folders(tmp_path, encode):
    (tmp_path / "d.x").mkdir()
    (tmp_path / "d.x" / "a.png").write_bytes(encode(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "d.x", "d.x")
    contents = scan_shard(tmp_path / "a.tar")
    assert (keys_of(contents), contents.left_out) == (["d.x/a"], {})


@pytest.mark.parametrize(
    ("names", "num_left_out"),
    [
        (["a.png", "a.png"], 1),
        (["a.png", "a.PNG", "b.png"], 1),
        (["a.png", "b.png", "a.PNG", "a.txt"], 1),  # what follows a second one is of that
        (["a.png", "b.png", "a.png", "c.png", "a.png"], 2),
        (["a.png", "b.png", "a.png", "b.png"], 2),
    ],
)
def test_scan_shard__keeps_the_first_of_two(scan, encode, names, num_left_out):
    contents = scan(names)
    assert keys_of(contents) == sorted({name[0] for name in names})
    assert [(kind, n) for kind, (n, _) in contents.left_out.items()] == [
        ("duplicate", num_left_out)
    ]
    first = contents.samples[0].members
    assert first.keys() == {"png"}
    assert first["png"].crc32 == zlib.crc32(encode(0))


def test_scan_shard__leaves_out_samples_without_image(scan):
    contents = scan(["a.png", ("b.txt", b"lost its image"), ("b.json", b"{}"), ("c.cls", b"1")])
    assert keys_of(contents) == ["a"]
    assert contents.left_out == {"no_image": LeftOut(2, ("b.txt", "c.cls"))}


def test_scan_shard__whole_shard_without_images_is_empty(scan):
    assert scan([]) == ([], {}, {})
    contents = scan({"a.txt": b"only text"})
    assert contents == ([], {"no_image": LeftOut(1, ("a.txt",))}, {})


@pytest.mark.parametrize(
    ("names", "images", "notes"),
    [
        (["s0.input.jpg", "s0.outputs.txt"], ["s0.input.jpg"], {}),
        (["img.v2.JPG"], ["img.v2.jpg"], {}),
        (["22.05.png", "22.05.txt", "22.06.png"], ["22.05.png", "22.06.png"], {"further_image": 1}),
        (["x.left.png", "x.right.png"], ["x.left.png", "x.right.png"], {"further_image": 1}),
        (["a.jpg", "a.1.jpg", "a.2.jpg"], ["a.jpg", "a.1.jpg", "a.2.jpg"], {"further_image": 2}),
        (["a.png", "a.jpg"], ["a.jpg"], {"second_file": 1}),
        (["a.jfif", "b.jpe", "c.avif", "d.heic"], ["a.jfif", "b.jpe", "c.avif", "d.heic"], {}),
        (["a.seg.png", "a.jpg", "a.mask_1.png"], ["a.jpg"], {"second_file": 2}),
        (["a.mask.png"], ["a.mask.png"], {}),
        (
            ["a.1.jpg", "a.1.seg.png", "a.2.jpg", "a.json"],
            ["a.1.jpg", "a.2.jpg"],
            {"further_image": 1, "second_file": 1},
        ),
        (["a.jpg", ".a.jpg", "__MACOSX/._a.jpg", ".x/b.jpg"], ["a.jpg"], {"hidden": 3}),
        (["a.jpg", "LICENSE", "text/a.txt"], ["a.jpg"], {"side_file": 2}),
    ],
)
def test_scan_shard__every_image_is_one(scan, names, images, notes):
    contents = scan(names)
    assert images_of(contents) == images
    assert contents.left_out == {}
    assert {kind: item.num_samples for kind, item in contents.notes.items()} == notes


def test_scan_shard__members_go_with_the_image_of_their_name(scan):
    names = ["a.json", "a.1.jpg", "a.2.jpg", "a.2.txt", "a.1.txt", "a.2.seg.png", "a.3.txt"]
    assert [set(sample.members) for sample in scan(names).samples] == [
        {"json", "1.jpg", "1.txt", "3.txt"},
        {"2.jpg", "2.txt", "2.seg.png"},
    ]


@pytest.mark.parametrize("suffixes", [("jpg", "txt"), ("txt", "jpg")])
def test_scan_shard__members_need_not_stand_side_by_side(scan, suffixes):
    contents = scan([f"{i}.{suffix}" for suffix in suffixes for i in range(5)])
    assert images_of(contents) == [f"{i}.jpg" for i in range(5)]
    assert all(sample.members.keys() == {"jpg", "txt"} for sample in contents.samples)
    assert contents.left_out == contents.notes == {}


def test_scan_shard__links_within_the_shard_are_followed(tmp_path, encode):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(encode(0))
    os.link(folder / "a.png", folder / "hard.png")
    for name, target in (("soft", "../a.png"), ("out", "/etc/passwd"), ("nowhere", "nothing.png")):
        (folder / "deep" / f"{name}.png").symlink_to(target)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, ".")
    contents = scan_shard(tmp_path / "a.tar")
    assert sorted(keys_of(contents)) == ["./a", "./deep/soft", "./hard"]
    assert len({sample.members["png"] for sample in contents.samples}) == 1
    assert contents.left_out["not_a_file"].num_samples == 2


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (gzip.compress, "gunzip"),
        (lambda raw: b"PK\3\4" + raw, "zip file"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda raw: raw + raw, "tar -A"),
    ],
)
def test_scan_shard__says_what_else_a_file_is(captioned, make, what):
    captioned.write_bytes(make(captioned.read_bytes()))
    with pytest.raises(DataError, match=what):
        scan_shard(captioned)


def test_scan_shard__leaves_out_members_above_the_limit(scan, encode, monkeypatch):
    small, large = encode(0), encode(1, size=(60, 60))
    monkeypatch.setattr(tar_scan, "MAX_MEMBER_BYTES", len(small))
    members = {"a.png": large, "a.txt": b"of a", "b.png": small, "c.jpg": small, "c.png": large}
    contents = scan(members)
    assert images_of(contents) == ["b.png", "c.jpg"]
    assert contents.samples[1].members.keys() == {"jpg"}
    assert contents.left_out == {"too_large": LeftOut(2, ("a.png", "c.png"))}


def test_scan_shard__counts_are_exact_and_names_are_few(scan):
    contents = scan(["good.png", *((f"../{i}.png", b"x") for i in range(500))])
    assert contents.left_out["unsafe_name"].num_samples == 500
    assert len(contents.left_out["unsafe_name"].names) == 10
    assert describe(contents.left_out) == "500 unsafe_name (../0.png, ../1.png, ../2.png, …)"


def test_scan_shard__names_that_people_have_are_used_as_they_are(scan, tmp_path, encode):
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    names += ["🦊", "חתול", "猫", "a b", "é/é", "\U0001f468\u200d\U0001f469", "\ufeffmark"]
    names += ["Screenshot at 9-41-00\u202fAM", "non\u00a0breaking", "soft\u00adhyphen"]
    names += ["caf\udce9"]  # Latin-1
    contents = scan([f"{name}.png" for name in names])
    assert (keys_of(contents), contents.left_out) == (names, {})
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert [sample["png"] for sample in theirs] == [encode(i) for i in range(len(names))]


def pax(body: bytes) -> bytes:
    """An extended header."""
    info = header("x", type=tarfile.XHDTYPE, size=len(body))
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def sized(field: bytes, **fields) -> bytes:
    """A header with a size field of one's own."""
    raw = bytearray(header("a.png", **fields).tobuf(tarfile.USTAR_FORMAT))
    raw[124:136] = field
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


HOSTILE_HEADERS = {
    "negative size": sized(b"\xff" * 11 + b"\x00"),
    "size of minus one header": sized(struct.pack(">4sq", b"\xff" * 4, -512)),
    "negative size by an extended header": pax(b"14 size=-1024\n") + sized(b"0" * 12),
    "size of an exabyte": sized(struct.pack(">4sq", b"\x80\0\0\0", 1 << 60)),
    "beyond every number": sized(b"\x80" + b"\xff" * 11),
    "long name of a gigabyte": sized(b"10000000000\0", type=tarfile.GNUTYPE_LONGNAME),
    "extended header of megabytes": pax(b"1" * (4 << 20)),
    "extended header of nonsense": pax(b"99 path=\n" + bytes(range(256))),
    "nothing but long names": b"".join(
        header("x", type=tarfile.GNUTYPE_LONGNAME, size=2).tobuf(tarfile.GNU_FORMAT) + bytes(512)
        for _ in range(3000)
    ),
    "sparse map of nonsense": pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
    + header("a.png", size=512).tobuf(tarfile.USTAR_FORMAT)
    + b"9" * 512,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
def test_scan_shard__hostile_headers_neither_hang_nor_fill_memory(captioned, kind):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captioned.write_bytes(HOSTILE_HEADERS[kind] + captioned.read_bytes())
    try:
        contents = scan_shard(captioned)
    except DataError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert set(keys_of(contents)) <= {"a", *(f"a{i}" for i in range(6))}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


def test_scan_shard__names_do_not_depend_on_the_locale(tmp_path, encode, write_tar, monkeypatch):
    path = write_tar(tmp_path / "a.tar", {"ü.png": encode(0)})
    monkeypatch.setattr(tarfile, "ENCODING", "latin-1")
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    assert keys_of(scan_shard(path)) == ["ü"]


def test_scan_shard__refuses_what_is_no_file_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match=r"pipe\.tar: not a regular file"):
        scan_shard(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="not a regular file"):
        scan_shard(tmp_path)


def test_scan_shard__shard_that_grows_meanwhile(captioned, monkeypatch):
    measure = tar_scan._measure

    def measure_and_grow(file, info):
        os.utime(captioned, ns=(5, 5))
        return measure(file, info)

    monkeypatch.setattr(tar_scan, "_measure", measure_and_grow)
    with pytest.raises(DataError, match="written to"):
        scan_shard(captioned)


@pytest.mark.parametrize(
    "name",
    [
        *["/a.png", "..", "../a", "a/../b", "a\0b", "a\rb", "a\x7f", "\u2028", "\ud800"],
        *["a" * 1001, "\x85", "\u2029", "\u202e", "\u2066", "\u200f", "\u061c"],
    ],
)
def test_is_safe__hostile_names(name):
    assert not is_safe(name)


@given(st.lists(st.sampled_from([".", "/", "a", "B", "__", "x.y"]), max_size=6).map("".join))
def test_split_name__as_webdataset_does(name):
    key, suffix = split_name(name)
    theirs_key, theirs_suffix = base_plus_ext(name)
    is_meta = "/" not in name and name.startswith("__") and name.endswith("__")
    is_hidden = name.rpartition("/")[2].startswith(".")  # webdataset gives some the folder's key
    if theirs_key and theirs_suffix and not is_meta and not is_hidden:
        assert (key, suffix) == (theirs_key, theirs_suffix.lower())
    else:
        assert suffix == ""
