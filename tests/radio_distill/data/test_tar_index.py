import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time

import pytest

from radio_distill.data import tar_index as index
from radio_distill.data.tar_index import (
    index_path,
    open_shard,
    open_shards,
    parse_sample,
    try_open_shards,
)
from radio_distill.errors import DataError


def test_open_shard__makes_a_stale_index_anew(captioned, encode, write_tar):
    open_shard(captioned)
    write_tar(captioned, {"new.png": encode(9)})
    assert [parse_sample(line).key for line in open_shard(captioned).lines()] == ["new"]
    same_size = captioned.read_bytes().replace(b"new.png", b"old.png")
    info = tarfile.TarInfo("old.png")
    info.size = len(encode(9))
    captioned.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + same_size[512:])
    os.utime(captioned, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert [parse_sample(line).key for line in open_shard(captioned).lines()] == ["old"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]\n", b"{}\n", b'{"version": 99}\n', b"\xff\xfe\n"]
)
def test_open_shard__replaces_an_unusable_index(captioned, content):
    index_path(captioned).write_bytes(content)
    assert open_shard(captioned).num_samples == 6
    assert json.loads(index_path(captioned).read_bytes().splitlines()[0])["num_samples"] == 6


def test_shard_lines__refuses_an_index_that_was_cut(captioned):
    opened = open_shard(captioned)
    index_path(captioned).write_bytes(
        b"\n".join(index_path(captioned).read_bytes().splitlines()[:-1])
    )
    with pytest.raises(DataError, match="damaged"):
        opened.lines()


def test_open_shard__keeps_the_index_in_memory_where_it_cannot_write(captioned, monkeypatch):
    stored = open_shard(captioned)
    index_path(captioned).unlink()
    # A folder in the way makes writing fail for every user, root too.
    index_path(captioned).mkdir()
    kept = open_shard(captioned)
    assert len(kept.lines()) == 6
    assert kept.digest == stored.digest
    assert [path.name for path in captioned.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_open_shards__keeps_order_and_names_what_is_missing(shard_folder):
    paths = sorted(shard_folder.glob("*.tar"))
    assert [shard.num_samples for shard in open_shards(paths)] == [3, 4, 5, 6, 7]
    with pytest.raises(DataError, match=r"gone\.tar: No such file"):
        open_shards([*paths, shard_folder / "gone.tar"])


def test_shard__digest_depends_on_content_not_on_place(captioned, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "a.tar"
    copy.write_bytes(captioned.read_bytes())
    assert open_shard(copy).digest == open_shard(captioned).digest
    place = parse_sample(open_shard(copy).lines()[0]).members["png"].offset
    raw = bytearray(copy.read_bytes())
    raw[place] ^= 1
    copy.write_bytes(raw)
    os.utime(copy, ns=(0, 0))
    assert open_shard(copy).digest != open_shard(captioned).digest


def test_shard__digest_of_a_sound_shard_stays_from_version_to_version(tmp_path, write_tar):
    """Else runs begun with an earlier version could not be resumed; this one is of that."""
    names = ["a.png", "a.txt", "a.seg.png", "b.jpg", "b.png", "b.json", "./c/d.webp", "./c/d.cls"]
    path = write_tar(tmp_path / "a.tar", {name: name.encode() for name in names})
    digest = "7b6960eb8decc68f7531907d4b650042a1f587fb4e7ff0fa9b16a058fce1a17e"
    assert open_shard(path).digest == digest


def test_open_shard__says_the_same_the_second_time(tmp_path, encode, write_tar, monkeypatch):
    members = [("a.png", encode(0)), ("../b.png", encode(1)), ("c.txt", b""), ("a.png", encode(2))]
    path = write_tar(tmp_path / "a.tar", members)
    first = open_shard(path)
    monkeypatch.setattr(index, "scan_shard", lambda path: pytest.fail("walked again"))
    assert open_shard(path) == first
    assert [parse_sample(line).key for line in first.lines()] == ["a"]
    assert {kind: item.num_samples for kind, item in first.left_out.items()} == {
        "unsafe_name": 1,
        "no_image": 1,
        "duplicate": 1,
    }
    assert first.num_left_out == 3


def test_open_shard__head_stays_small(tmp_path, encode, write_tar):
    hostile = "\U0001f98a" + "\x1b" * 200
    members = [("a.png", encode(0)), *((f"{i}{hostile}.png", b"") for i in range(300))]
    path = write_tar(tmp_path / "a.tar", members)
    assert open_shard(path).left_out["unsafe_name"].num_samples == 300
    assert index_path(path).stat().st_size < 5000


def test_open_shard__every_flipped_bit_of_the_head_is_found(captioned):
    sound = open_shard(captioned)
    stored = index_path(captioned).read_bytes()
    for place in range(0, stored.index(b"\n"), 3):
        flipped = bytearray(stored)
        flipped[place] ^= 1 << place % 8
        index_path(captioned).write_bytes(flipped)
        assert open_shard(captioned) == sound


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[",
        b"[1]",
        b'["a",{"png":[0]}]',
        b'["a",{"png":[0,-1,0]}]',
        b'["a",{"txt":[0,1,0]}]',
        b'["a",{"png":[0,99999999999999,0]}]',
        b"[" * 100_000,
    ],
)
def test_parse_sample__refuses_what_is_no_sample(line):
    with pytest.raises(DataError, match="damaged"):
        parse_sample(line)


def test_open_shard__index_that_is_no_file(captioned):
    os.mkfifo(index_path(captioned))
    assert open_shard(captioned).num_samples == 6
    assert index_path(captioned).is_file()


def test_try_open_shards__errors_stand_in_their_place(shard_folder):
    paths = sorted(shard_folder.glob("*.tar"))
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    results = try_open_shards(paths)
    assert [isinstance(result, DataError) for result in results] == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_try_open_shards__ctrl_c_does_not_wait_for_what_is_being_read(shard_folder, monkeypatch):
    """Were it to wait, this would never end: the read goes on when the command is over."""
    over, num_begun = threading.Event(), []

    def endless(path):
        num_begun.append(path)
        os.kill(os.getpid(), signal.SIGINT)
        over.wait()
        raise DataError("read to the end")

    for path in shard_folder.glob("*.index.jsonl"):
        path.unlink()
    monkeypatch.setattr(index, "scan_shard", endless)
    monkeypatch.setattr(index, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        index.try_open_shards(sorted(shard_folder.glob("*.tar")))
    over.set()
    assert len(num_begun) == 1


def open_at_once(paths, barrier, results):
    barrier.wait()
    results.put(
        [(shard.num_samples, shard.digest, len(shard.lines())) for shard in open_shards(paths)]
    )


def test_open_shards__four_processes_at_once(tmp_path, encode, write_tar):
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", {f"{i}.png": encode(i) for i in range(40)})
    paths = sorted(tmp_path.glob("*.tar"))
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        barrier, results = context.Barrier(4), context.Queue()
        processes = [
            context.Process(target=open_at_once, args=(paths, barrier, results)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        found = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        assert found[0] == found[1] == found[2] == found[3]
        for path in paths:
            head = index_path(path).read_bytes()
            assert open_shard(path).lines() == head.splitlines()[1:]
            index_path(path).unlink()
        assert sorted(tmp_path.iterdir()) == paths, "nothing is left behind"
