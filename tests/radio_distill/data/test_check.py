import pytest

from radio_distill.config import DataConfig
from radio_distill.data.check import check_shards
from radio_distill.data.shards import write_shards
from radio_distill.data.tar_index import index_path
from radio_distill.errors import DataError


def test_check_shards__lists_all_that_is_wrong(tmp_path, encode, write_tar):
    image = encode(0, size=(70, 300))
    write_tar(
        tmp_path / "a.tar",
        {
            "good.png": image,
            "cut.png": image[:5000],
            "small.png": encode(1, size=(10, 90)),
            "large.png": encode(1, size=(200, 200)),
        },
    )
    write_tar(tmp_path / "b.tar", {"wide.png": encode(2, size=(128, 140))})
    (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    config = DataConfig(shards=(), max_pixels=30_000, workers=2)
    calls = []
    report = check_shards([str(tmp_path)], config, lambda *call: calls.append(call))
    assert (report.num_shards, report.num_images, report.num_bad) == (3, 5, 3)
    keys = {kind: [line.split(": ")[0] for line in lines] for kind, lines in report.bad.items()}
    assert keys == {
        "undecodable": ["a.tar:cut.png"],
        "too_small": ["a.tar:small.png"],
        "too_large": ["a.tar:large.png"],
    }
    assert report.sizes == {"64-127": 1, "128-255": 1}
    assert len(report.damaged) == 1
    assert "c.tar is not a whole, plain tar file" in report.damaged[0]
    assert report.num_bytes == sum((tmp_path / n).stat().st_size for n in ("a.tar", "b.tar"))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_check_shards__finds_nothing_in_real_photographs(real, tmp_path):
    summary = write_shards(real / "captions", tmp_path, images_per_shard=20)
    report = check_shards([str(tmp_path)], DataConfig(shards=()))
    assert (report.num_images, report.num_bad, report.damaged) == (summary.num_images, 0, [])
    assert sum(report.sizes.values()) == summary.num_images > 0


def test_check_shards__no_shards(tmp_path):
    with pytest.raises(DataError, match="no shards found"):
        check_shards([str(tmp_path)], DataConfig(shards=()))


def test_check_shards__lists_what_is_left_out(tmp_path, encode, write_tar):
    good = encode(0)
    hostile = [(f"../{i}.png", good) for i in range(12)]
    write_tar(tmp_path / "a.tar", [("a.png", good), ("a.png", good), ("b.txt", b""), *hostile])
    write_tar(tmp_path / "b.tar", {"a.png": good})
    for _ in range(2):  # the second time from the stored indexes
        report = check_shards([str(tmp_path)], DataConfig(shards=()))
        assert report.left_out == {"duplicate": 1, "no_image": 1, "unsafe_name": 12}
        assert report.left_out_names["duplicate"] == ["a.tar:a.png"]
        assert report.left_out_names["unsafe_name"][9] == "a.tar:../9.png"
        assert (report.num_images, report.num_bad, report.damaged) == (2, 0, [])
        assert not report.is_clean
    assert check_shards([str(tmp_path / "b.tar")], DataConfig(shards=())).is_clean


def test_check_shards__damaged_index_is_damage(tmp_path, encode, write_tar):
    path = write_tar(tmp_path / "a.tar", {"a.png": encode(0)})
    check_shards([str(path)], DataConfig(shards=()))
    head = index_path(path).read_bytes().splitlines()[0]
    index_path(path).write_bytes(head + b"\nrubbish\n")
    (line,) = check_shards([str(path)], DataConfig(shards=())).damaged
    assert "index.jsonl is damaged" in line
