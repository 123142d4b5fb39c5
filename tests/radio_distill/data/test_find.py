import os
import shutil

import pytest

from radio_distill.data.find import find_shards, is_hidden
from radio_distill.errors import DataError


def test_find_shards__files_folders_and_patterns(shard_folder):
    shards = [shard_folder / f"part-{i}.tar" for i in range(5)]
    deeper = shard_folder / "deeper"
    deeper.mkdir()
    shutil.move(shards[4], deeper)
    shards[4] = deeper / "part-4.tar"
    assert find_shards([str(shard_folder)]).paths == sorted(shards)
    assert find_shards([str(shards[3]), str(shard_folder / "part-[0-3].tar")]).paths == [
        shards[3],
        *shards[:3],
    ]
    assert find_shards([str(shard_folder / "**" / "part-4.tar")]).paths == [shards[4]]


def test_find_shards__each_comes_once(shard_folder, monkeypatch):
    monkeypatch.chdir(shard_folder)
    spellings = ["part-0.tar", str(shard_folder / "part-0.tar"), f"../{shard_folder.name}"]
    assert len(find_shards(spellings).paths) == 5


@pytest.mark.parametrize("entries", [["nothing-*.tar"], ["nothing.tar"], ["empty"], ["::"], []])
def test_find_shards__none_found_says_what_to_run(tmp_path, entries, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="radio-distill shards SRC OUT"):
        find_shards(entries)


@pytest.mark.parametrize(
    ("entry", "numbers"),
    [
        ("part-{0..4}.tar", [0, 1, 2, 3, 4]),
        ("part-{3..1}.tar", [3, 2, 1]),
        ("part-{0..4..2}.tar", [0, 2, 4]),
        ("part-{0,3}.tar", [0, 3]),
        ("{part,part}-{1..2}.tar", [1, 2]),
        ("part-2.tar::part-0.tar", [2, 0]),
        ("part-{3..4}.tar::part-0.tar", [3, 4, 0]),
        ("part-?.tar", [0, 1, 2, 3, 4]),
        ("part-[01].tar", [0, 1]),
        ("part-*", [0, 1, 2, 3, 4]),
        ("./", [0, 1, 2, 3, 4]),
    ],
)
def test_find_shards__spellings_of_other_tools(shard_folder, monkeypatch, entry, numbers):
    monkeypatch.chdir(shard_folder)
    (shard_folder / "part-0.tar.index.jsonl").write_bytes(b"ours")
    names = [path.name for path in find_shards([entry]).paths]
    assert names == [f"part-{number}.tar" for number in numbers]


def test_find_shards__numbers_in_braces_keep_their_width(tmp_path, write_tar, monkeypatch):
    for number in range(8, 12):
        write_tar(tmp_path / f"{number:05}.tar", {})
    found = find_shards([str(tmp_path / "{00008..00011}.tar")])
    assert [path.name for path in found.paths] == [
        "00008.tar",
        "00009.tar",
        "00010.tar",
        "00011.tar",
    ]
    with pytest.raises(DataError, match=r"2 of the 6 .*00012\.tar"):
        find_shards([str(tmp_path / "{00008..00013}.tar")])
    monkeypatch.setattr("radio_distill.data.find._MAX_EXPANDED", 1000)
    for braces in ("{0..9999}" * 3, "{0..999999999999}", "{0..999999}{0..999999}", "{a,b}" * 40):
        with pytest.raises(DataError, match="1,000"):
            find_shards([str(tmp_path / f"{braces}.tar")])


def test_find_shards__what_exists_under_that_name_is_taken(tmp_path, write_tar):
    folder = tmp_path / "my [2024] {a,b}::photos"
    folder.mkdir()
    path = write_tar(folder / "a*.tar", {})
    write_tar(folder / "ab.tar", {})
    assert len(find_shards([str(folder)]).paths) == 2
    assert find_shards([str(path)]).paths == [path]
    plain = tmp_path / "my [2024] photos"
    plain.mkdir()
    path = write_tar(plain / "a.tar", {})
    assert find_shards([str(plain / "*.tar")]).paths == [path]
    assert find_shards([str(plain / "{a,a}.tar")]).paths == [path]


def test_find_shards__lists_of_shards(shard_folder, monkeypatch):
    monkeypatch.chdir(shard_folder.parent)
    here = f"{shard_folder.name}/part-1.tar"
    lines = ["# a comment", str(shard_folder / "part-3.tar"), "", here, "part-0.tar"]
    (shard_folder / "list.txt").write_text("\n".join(lines))
    found = find_shards([str(shard_folder / "list.txt")])
    assert [path.name for path in found.paths] == ["part-3.tar", "part-1.tar", "part-0.tar"]
    monkeypatch.setattr("radio_distill.data.find._MAX_LIST_BYTES", 20)
    for text, reason in (
        ("", "empty"),
        ("gone.tar", "lists 'gone.tar'"),
        ("list.txt", "no file"),
        ("part-3.tar\n" * 2, "more than"),
    ):
        (shard_folder / "list.txt").write_text(text)
        with pytest.raises(DataError, match=reason):
            find_shards([str(shard_folder / "list.txt")])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("pipe:cat a.tar", "elsewhere.*data.cache"),
        ("| cat a.tar", "command.*pipe:"),
        ("s3://bucket/a.tar", "elsewhere.*data.cache"),
        ("gs://bucket/{000..999}.tar", "elsewhere"),
        ("hdfs://host/a.tar", "kind that is not read.*s3://"),
        ("https://x.org/a.tar::b.tar", "elsewhere"),
        ("a.tar.gz", "compressed.*gunzip"),
        ("a.zip", "compressed.*unzip"),
        ("*.tgz", "compressed.*gunzip"),
        ("images/a.png", "an image, not a tar"),
        ("a.parquet", "no tar"),
        ("packed", r"compressed \(2 \.gz\)"),
        ("images", "1 images and no .tar; make shards with `radio-distill shards .*images OUT`"),
        ("absent", "no such file or folder.*radio-distill shards SRC OUT"),
        ("absent-*.tar", "no file matches"),
    ],
)
def test_find_shards__says_what_it_is_and_what_to_do(tmp_path, encode, monkeypatch, entry, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar.gz", "a.tgz", "a.zip", "a.parquet", "packed/a.tar.gz", "packed/b.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode(0))
    with pytest.raises(DataError, match=f"{reason}") as error:
        find_shards([entry])
    assert "\n" not in str(error.value)


def test_find_shards__links_are_followed_and_no_shard_comes_twice(shard_folder, tmp_path_factory):
    top = tmp_path_factory.mktemp("top")
    (top / "all").symlink_to(shard_folder)
    (top / "all2").symlink_to(shard_folder)
    (shard_folder / "back").symlink_to(top)
    found = find_shards([str(top)])
    assert [path.name for path in found.paths] == [f"part-{number}.tar" for number in range(5)]
    text = "\n".join(found.notes)
    assert "5 shards are named more than once" in text
    assert "links back to a folder above" in text
    again = find_shards([str(shard_folder / "part-0.tar")] * 3)
    assert len(again.paths) == 1
    assert "2 shards are named more than once" in again.notes[0]


def test_find_shards__what_lies_beside_is_counted(shard_folder):
    for name in ("0.parquet", "1.parquet", "0_stats.json", "._part-0.tar", "classes.txt"):
        (shard_folder / name).write_bytes(b"")
    (shard_folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(shard_folder / "part-0.tar", shard_folder / ".ipynb_checkpoints")
    (shard_folder / "part-0.tar.index.jsonl").write_bytes(b"")
    (shard_folder / "part-1.tar").rename(shard_folder / "part-1.TAR")
    found = find_shards([str(shard_folder)])
    assert len(found.paths) == 5
    (note,) = found.notes
    assert note.endswith("2 .parquet, 1 .json, 2 hidden")


def test_find_shards__names_too_long_or_impossible(tmp_path):
    long = os.path.join(str(tmp_path), "b" * 300, "*.tar")
    for entry in ("a" * 5000, "a\0b", long, "{a", "{" * 1200 + "}" * 1200, "{0.." + "9" * 5000):
        with pytest.raises(DataError, match="no shards found"):
            find_shards([entry])


def test_is_hidden__files_that_systems_make():
    hidden = [".ipynb_checkpoints", "._a.jpg", ".DS_Store", "Thumbs.db", "__MACOSX", "desktop.ini"]
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, [".", "..", "a.jpg", "a.", "thumbs", "macosx"]))
