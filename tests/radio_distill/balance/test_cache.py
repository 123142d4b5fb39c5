import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from radio_distill.balance import cache
from radio_distill.balance.cache import load_moments, save_moments
from radio_distill.balance.moments import Moments
from radio_distill.errors import CheckpointError


@pytest.fixture
def moments(skewed_tokens, moments_of):
    return moments_of(skewed_tokens(12, 40))


def test_save_moments__load_gives_equal_moments(tmp_path, moments):
    path = tmp_path / "new" / "dino-224x224.safetensors"
    save_moments(path, moments)
    loaded = load_moments(path)
    assert loaded.count == moments.count
    assert torch.equal(loaded.mean, moments.mean)
    assert torch.equal(loaded.covariance, moments.covariance)
    assert os.listdir(path.parent) == [path.name]


def test_load_moments__none_where_there_is_no_file(tmp_path, caplog):
    assert load_moments(tmp_path / "absent.safetensors") is None
    assert not caplog.records


def damaged(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changes = {
        "not finite": {"mean": state["mean"] * float("nan")},
        "no tokens": {"count": torch.tensor(0)},
        "another width": {"mean": torch.zeros(5, dtype=torch.float64)},
    }
    return state | changes[kind]


@pytest.mark.parametrize("kind", ["not finite", "no tokens", "another width"])
def test_load_moments__damaged_numbers_are_ignored_with_a_warning(tmp_path, moments, caplog, kind):
    path = tmp_path / "statistics.safetensors"
    save_file(damaged(kind, moments.state()), path)
    assert load_moments(path) is None
    assert "damaged" in caplog.text
    assert str(path) in caplog.text


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "other tensors", "folder"])
def test_load_moments__damaged_file_is_ignored_with_a_warning(tmp_path, moments, caplog, content):
    path = tmp_path / "statistics.safetensors"
    save_moments(path, moments)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "other tensors":
        save_file({"weight": torch.zeros(3)}, path)
    elif content == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("" if content == "empty" else "not safetensors at all")
    assert load_moments(path) is None
    assert "damaged" in caplog.text


def test_save_moments__full_disk_leaves_the_former_file(tmp_path, moments, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    save_moments(path, moments)
    before = path.read_bytes()

    def no_space(state, temporary):
        temporary.write_bytes(before[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "save_file", no_space)
    moments.update(torch.randn(1, 12, 2, 2))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_moments(path, moments)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_save_moments__error_where_nothing_can_be_written(tmp_path, moments):
    (tmp_path / "file").write_text("a file where a folder is wanted")
    with pytest.raises(CheckpointError, match="cannot write statistics"):
        save_moments(tmp_path / "file" / "statistics.safetensors", moments)


def test_load_moments__result_is_a_moments(tmp_path, moments):
    save_moments(tmp_path / "a.safetensors", moments)
    loaded = load_moments(tmp_path / "a.safetensors")
    assert isinstance(loaded, Moments)
    loaded.merge(moments)
    torch.testing.assert_close(loaded.covariance, moments.covariance)
