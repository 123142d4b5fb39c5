import io
import tarfile

import pytest
from PIL import Image

from stages.cli import main


@pytest.fixture
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def check(folder, capfd):
    """Exit status and lines of ``radio-distill shards --check``."""
    status = main(["shards", "--check", str(folder)])
    return status, capfd.readouterr().out.splitlines()


def test_check__sound_shards(tmp_path, picture, capfd):
    write_shard(tmp_path / "a.tar", ("a.png", picture), ("b.png", picture))
    status, (first, *_) = check(tmp_path, capfd)
    assert status == 0
    assert first.endswith("0 bad images, 0 samples left out, 0 damaged shards")


def test_check__reports_all_that_training_would_not_use(tmp_path, picture, capfd):
    hostile = [(f"../{number}.png", picture) for number in range(12)]
    write_shard(tmp_path / "a.tar", ("a.png", picture), ("a.png", picture), *hostile)
    write_shard(tmp_path / "b.tar", ("a.png", picture), ("b.png", picture[:60]))
    (tmp_path / "c.tar").write_bytes(b"junk")
    for _ in range(2):
        status, lines = check(tmp_path, capfd)
        assert status == 1
        assert lines[0].endswith("1 bad images, 13 samples left out, 1 damaged shards")
        assert "left out (duplicate): a.tar:a.png" in lines
        assert "left out (unsafe_name): a.tar:../9.png" in lines
        assert "left out (unsafe_name): 2 more" in lines
        assert sum(line.startswith("bad (undecodable): b.tar:b.png") for line in lines) == 1
        assert sum(line.startswith("damaged: ") and "c.tar" in line for line in lines) == 1


@pytest.mark.parametrize("name", ["a.txt", "../a.png"])
def test_check__one_fault_is_enough(tmp_path, picture, capfd, name):
    write_shard(tmp_path / "a.tar", ("good.png", picture), (name, picture))
    assert check(tmp_path, capfd)[0] == 1
