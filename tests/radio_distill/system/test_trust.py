"""What is in a torch file runs where its origin is trusted, and nowhere else."""

import os
import pickle
import shutil
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from subprocess import run

import pytest
import torch

import radio_distill
from radio_distill.errors import CheckpointError, WeightsError
from radio_distill.system.trust import check_sha256, read_torch_file, trusting_pickles
from radio_distill.weights.files import checksummed_files, files_of, read_checkpoint


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_read_torch_file__runs_code_only_where_it_is_trusted(zipped, trap, tmp_path, caplog):
    content = {"w": torch.ones(2), "cfg": trap}
    path = saved(tmp_path / "w.pt", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError) as error:
        read_torch_file(path)
    opening = f"{open.__module__}.open"  # io or, from Python 3.12 on, _io
    assert str(error.value) == (
        f"cannot read weights {path}: it wants to import {opening}, which would run code when "
        "read; save its tensors as safetensors, or add --trust-checkpoint if you trust the file's "
        "origin"
    )
    assert not trap.ran.exists()
    assert not caplog.records
    with trusting_pickles():
        assert read_torch_file(path)["w"].sum() == 2
    assert trap.ran.exists()
    assert f"running the code in {path}, as --trust-checkpoint allows" in caplog.text


def test_trusting_pickles__ends_with_its_block(trap, tmp_path):
    path = saved(tmp_path / "w.pt", trap)
    with pytest.raises(KeyError), trusting_pickles():
        raise KeyError
    with trusting_pickles():
        with trusting_pickles(False), pytest.raises(WeightsError, match="would run code"):
            read_torch_file(path)
        assert not trap.ran.exists()
        read_torch_file(path)
    assert trap.ran.exists()
    with trusting_pickles(False), pytest.raises(WeightsError, match="would run code"):
        read_torch_file(path)


def test_read_torch_file__plain_files_need_no_trust(tmp_path, caplog):
    content = {"w": torch.ones(2), "epoch": 3, "args": {"lr": 1e-3}}
    with trusting_pickles():
        assert read_torch_file(saved(tmp_path / "w.pt", content))["epoch"] == 3
    assert not caplog.records


def test_read_torch_file__a_whole_module_gives_its_state(tmp_path):
    layer = torch.nn.Linear(2, 3)
    path = saved(tmp_path / "module.pt", layer)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_torch_file(path)
    with trusting_pickles():
        assert torch.equal(read_torch_file(path)["weight"], layer.weight)


class Importing:
    """Unpickles by importing what is not installed."""

    def __reduce__(self):
        return import_module, ("no_such_package",)


def test_read_torch_file__a_trusted_file_needs_what_is_not_here(tmp_path):
    path = saved(tmp_path / "w.pt", Importing())
    with trusting_pickles(), pytest.raises(WeightsError) as error:
        read_torch_file(path)
    assert str(error.value) == f"cannot read weights {path}: No module named 'no_such_package'"


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"PK no archive", pickle.dumps({"a": 1}, 4)]
)
def test_read_torch_file__no_torch_file(content, trusted, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with trusting_pickles(trusted), pytest.raises(WeightsError, match="no torch file") as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    path.unlink()
    with trusting_pickles(trusted), pytest.raises(WeightsError, match="No such file"):
        read_torch_file(path)


def test_load__a_file_with_code(trap, tmp_path):
    path = saved(tmp_path / "radio.pth.tar", {"state_dict": {"w": torch.ones(1)}, "x": trap})
    with pytest.raises(WeightsError, match="would run code"):
        radio_distill.load(path)
    assert not trap.ran.exists()
    with trusting_pickles(), pytest.raises(WeightsError, match="RADIO"):
        radio_distill.load(path)
    assert trap.ran.exists()


def test_load__a_model_folder_with_code(trap, tmp_path):
    saved(tmp_path / "pytorch_model.bin", {"w": torch.ones(1), "x": trap})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        radio_distill.load(tmp_path)
    assert not trap.ran.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_load__a_run_never_reads_a_torch_file(trusted, trap, write_run, caplog):
    """Neither beside its own files nor, under their names, in place of them."""
    folder = write_run()
    checkpoint = folder / "stage1" / "checkpoints" / "step-00000007"
    for place in (folder, folder / "stage1", checkpoint):
        for name in ("student.pt", "pytorch_model.bin", ".metadata", "mp_rank_00_model_states.pt"):
            (place / name).write_bytes(pickle.dumps(trap))
    with trusting_pickles(trusted):
        assert radio_distill.load(folder).head_names
        saved(checkpoint / "student.safetensors", {"x": trap})
        with pytest.raises(CheckpointError):
            radio_distill.load(folder)
    assert not trap.ran.exists()


def test_files_of__the_index_names_files_beside_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for table in ('{"w": "../w.pt"}', '{"w": "/etc/passwd"}', '{"w": ".."}', '{"w": 3}', "{}", "3"):
        index.write_text(f'{{"weight_map": {table}}}')
        with pytest.raises(WeightsError, match="weight_map"):
            read_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"w": "b.pt", "v": "a.pt", "u": "b.pt"}}')
    for name in "ab":
        saved(tmp_path / f"{name}.pt", {name: torch.ones(1)})
    assert files_of(tmp_path) == [tmp_path / "a.pt", tmp_path / "b.pt"]
    assert read_checkpoint(tmp_path).keys() == {"a", "b"}


def test_check_sha256__of_one_file(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    digest = sha256(b"weights").hexdigest()
    check_sha256([path], digest, "f")
    check_sha256([path], f" {digest.upper()}\n", "f")
    check_sha256([path], "", "f")
    with pytest.raises(WeightsError) as error:
        check_sha256([path], "ab" * 32, "student.pretrained_sha256")
    assert str(error.value) == (
        f"student.pretrained_sha256: {path} has sha256 {digest}, not {'ab' * 32}; "
        "take the file that was meant, or correct the checksum where you trust this one"
    )
    with pytest.raises(WeightsError, match="none: No such file"):
        check_sha256([tmp_path / "none"], digest, "f")


def test_check_sha256__sees_a_file_that_changed(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    check_sha256([path], sha256(b"one").hexdigest(), "f")
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    with pytest.raises(WeightsError, match="sha256"):
        check_sha256([path], sha256(b"one").hexdigest(), "f")


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs coreutils")
def test_check_sha256__of_several_files_is_what_sha256sum_says_twice(tmp_path):
    for name in ("b.bin", "a.bin"):
        (tmp_path / name).write_bytes(name.encode())
    command = "sha256sum a.bin b.bin | sha256sum"
    printed = run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    check_sha256([tmp_path / "a.bin", tmp_path / "b.bin"], printed.stdout.split()[0], "f")


def test_checksummed_files__of_a_run_is_the_list_of_checksums(write_run, tmp_path):
    folder = write_run()
    meta = folder / "stage1" / "checkpoints" / "step-00000007" / "meta.json"
    for path in (folder, folder / "stage1", meta.parent):
        assert checksummed_files(path) == [meta]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no run"):
        checksummed_files(empty)
    (empty / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no weights"):
        checksummed_files(empty)
    for name in ("model.safetensors", "adaptors.safetensors"):
        Path(empty, name).touch()
    assert [path.name for path in checksummed_files(empty)] == [
        "model.safetensors",
        "adaptors.safetensors",
    ]
