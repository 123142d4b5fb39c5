"""Our safetensors files are those of the library, and are written while the caller goes on."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from radio_distill.errors import CheckpointError
from radio_distill.train.checkpointer import AsyncCheckpointer, verify, write_tensors

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


@st.composite
def tensor_maps(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        values = torch.randn(shape) * 50
        tensors[name] = values.to(draw(st.sampled_from(DTYPES)))
    return tensors


@settings(max_examples=100, deadline=None)
@given(tensors=tensor_maps())
def test_write_tensors__equals_the_library(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    digest = write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors)
    assert digest == hashlib.sha256(save(tensors)).hexdigest()


def test_write_tensors__what_is_not_contiguous_or_not_finite(tmp_path):
    tensors = {"t": torch.randn(5, 7).T, "n": torch.tensor([float("nan"), float("inf")])}
    write_tensors(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert torch.equal(found["t"], tensors["t"])
    assert found["n"].isnan()[0]


def test_verify__a_flipped_bit(tmp_path):
    digest = write_tensors(tmp_path / "x", {"t": torch.zeros(1000)})
    verify(tmp_path / "x", digest)
    data = bytearray((tmp_path / "x").read_bytes())
    data[2000] ^= 4
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="what was written"):
        verify(tmp_path / "x", digest)


def test_async_checkpointer__writes_while_the_caller_goes_on():
    gate, checkpointer = threading.Event(), AsyncCheckpointer(Path("before"))

    def write():
        assert gate.wait(10)
        return Path("after")

    checkpointer.start(write)
    assert checkpointer.newest == Path("before")
    gate.set()
    checkpointer.wait()
    assert checkpointer.newest == Path("after")
    assert checkpointer.error is None


@pytest.mark.parametrize("error", [CheckpointError("the disk is full"), ZeroDivisionError()])
def test_async_checkpointer__keeps_what_went_wrong(error):
    def write():
        raise error

    checkpointer = AsyncCheckpointer(Path("before"))
    checkpointer.start(write)
    checkpointer.wait()
    assert checkpointer.error is error
    assert checkpointer.newest == Path("before")
