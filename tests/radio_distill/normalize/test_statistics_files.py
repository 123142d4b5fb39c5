import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from radio_distill.errors import CheckpointError
from radio_distill.normalize import statistics as cache
from radio_distill.normalize.statistics import Statistics, load_statistics, save_statistics


@pytest.fixture
def statistics(skewed_tokens, moments_of):
    return Statistics(moments_of(skewed_tokens(12, 40)))


def test_save_statistics__load_gives_equal_moments(tmp_path, statistics):
    path = tmp_path / "new" / "dino-224x224.safetensors"
    save_statistics(path, statistics)
    loaded = load_statistics(path)
    assert loaded.dispersion is None
    assert loaded.moments.count == statistics.moments.count
    assert torch.equal(loaded.moments.mean, statistics.moments.mean)
    assert torch.equal(loaded.moments.covariance, statistics.moments.covariance)
    assert os.listdir(path.parent) == [path.name]


def test_load_statistics__none_where_there_is_no_file(tmp_path, caplog):
    assert load_statistics(tmp_path / "absent.safetensors") is None
    assert not caplog.records


def damaged(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changes = {
        "not finite": {"mean": state["mean"] * float("nan")},
        "no tokens": {"count": torch.tensor(0)},
        "another width": {"mean": torch.zeros(5, dtype=torch.float64)},
    }
    return state | changes[kind]


@pytest.mark.parametrize("kind", ["not finite", "no tokens", "another width"])
def test_load_statistics__damaged_numbers_are_ignored(tmp_path, statistics, caplog, kind):
    path = tmp_path / "statistics.safetensors"
    save_file(damaged(kind, statistics.moments.state()), path)
    assert load_statistics(path) is None
    assert "damaged" in caplog.text
    assert str(path) in caplog.text


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "other tensors", "folder"])
def test_load_statistics__damaged_file_is_ignored(tmp_path, statistics, caplog, content):
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, statistics)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "other tensors":
        save_file({"weight": torch.zeros(3)}, path)
    elif content == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("" if content == "empty" else "not safetensors at all")
    assert load_statistics(path) is None
    assert "damaged" in caplog.text


def test_save_statistics__full_disk_leaves_the_former_file(tmp_path, statistics, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, statistics)
    before = path.read_bytes()

    def no_space(state, temporary):
        temporary.write_bytes(before[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "save_file", no_space)
    statistics.moments.update(torch.randn(1, 12, 2, 2))
    with pytest.raises(CheckpointError, match="No space"):
        save_statistics(path, statistics)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_save_statistics__error_where_nothing_can_be_written(tmp_path, statistics):
    (tmp_path / "file").write_text("a file where a folder is wanted")
    with pytest.raises(CheckpointError, match="statistics"):
        save_statistics(tmp_path / "file" / "statistics.safetensors", statistics)


def test_save_statistics__dispersion(tmp_path, statistics):
    save_statistics(tmp_path / "a.safetensors", statistics._replace(dispersion=0.694))
    assert load_statistics(tmp_path / "a.safetensors").dispersion == 0.694
