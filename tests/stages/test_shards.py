import io
import shlex
import tarfile

import pytest
from PIL import Image

from radio_distill.config import parse_yaml
from stages.cli import main


@pytest.fixture
def image():
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


def test_check__sound_shards(tmp_path, image, capfd):
    write_shard(tmp_path / "a.tar", ("a.png", image), ("b.png", image))
    status, (first, *_) = check(tmp_path, capfd)
    assert status == 0
    assert first.endswith("0 bad images, 0 samples left out, 0 damaged shards")


def test_check__reports_all_that_training_would_not_use(tmp_path, image, capfd):
    hostile = [(f"../{number}.png", image) for number in range(12)]
    write_shard(tmp_path / "a.tar", ("a.png", image), ("a.png", image), *hostile)
    write_shard(tmp_path / "b.tar", ("a.png", image), ("b.png", image[:60]))
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
def test_check__one_fault_is_enough(tmp_path, image, capfd, name):
    write_shard(tmp_path / "a.tar", ("good.png", image), (name, image))
    assert check(tmp_path, capfd)[0] == 1


def test_check__names_the_field_of_a_limit(tmp_path, image, capfd):
    write_shard(tmp_path / "a.tar", ("a.png", image))
    assert main(["shards", "--check", str(tmp_path), "--data.min_size", "41"]) == 1
    assert "1 too_small: data.min_size is 41" in capfd.readouterr().out
    assert main(["shards", "--check", str(tmp_path), "--data.max_pixels", "1599"]) == 1
    assert "1 too_large: data.max_pixels is 1599" in capfd.readouterr().out


def test_check__says_what_is_notable_and_no_fault(tmp_path, image, capfd):
    write_shard(tmp_path / "a.tar", ("a.png", image), ("a.2.png", image), ("._a.png", b""))
    write_shard(tmp_path / "b.tar")
    (tmp_path / "b.parquet").write_bytes(b"")
    status, lines = check(tmp_path, capfd)
    assert status == 0
    assert lines[0].startswith("2 images in 2 shards")
    assert f"no images: {tmp_path / 'b.tar'}" in lines
    for text in (
        "1 members are further images",
        "1 members are passed over as hidden",
        "1 .parquet",
    ):
        assert any(text in line for line in lines)


def test_check__puts_indexes_where_it_is_told(tmp_path, image):
    write_shard(tmp_path / "a.tar", ("a.png", image))
    place = tmp_path / "indexes"
    assert main(["shards", "--check", str(tmp_path / "a.tar"), "--data.index", str(place)]) == 0
    assert len(list(place.iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "indexes"]


def test_shards__holds_out(tmp_path, image, capfd):
    (tmp_path / "in").mkdir()
    for number in range(10):
        (tmp_path / "in" / f"{number}.png").write_bytes(image)
    arguments = ["shards", str(tmp_path / "in"), str(tmp_path / "my #1, out"), "--hold-out", "0.2"]
    assert main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"8 images in 1 shards: {tmp_path / 'my #1, out'}"
    assert lines[1] == f"2 images held out in 1 shards: {tmp_path / 'my #1, out_held_out'}"
    flags = shlex.split(lines[-1])[2:]  # of a shell that the line is pasted into
    assert [flags[0], flags[2]] == ["--data.shards", "--evaluation.images"]
    assert [parse_yaml(text) for text in flags[1::2]] == [
        [str(tmp_path / "my #1, out")],
        str(tmp_path / "my #1, out_held_out"),
    ]
    assert main(["shards", str(tmp_path / "in"), str(tmp_path / "a"), "--hold-out", "2"]) == 2
