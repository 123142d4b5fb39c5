import pytest

from radio_distill.config import DataConfig
from radio_distill.data.check import check_shards
from radio_distill.data.shards import write_shards
from radio_distill.errors import DataError


def test_check_shards__lists_all_that_is_wrong(tmp_path, encode, write_tar):
    picture = encode(0, size=(70, 300))
    write_tar(
        tmp_path / "a.tar",
        {
            "good.png": picture,
            "cut.png": picture[:5000],
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
