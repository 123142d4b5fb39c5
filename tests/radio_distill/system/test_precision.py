"""Number types: what is native where, what `auto` becomes, and what is said of emulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radio_distill.system import precision
from radio_distill.system.precision import (
    autocast,
    emulation_warning,
    is_native,
    native_dtype,
    resolved_dtype,
)

pytestmark = pytest.mark.usefixtures("own_dtype")

CPU = torch.device("cpu")
WITHOUT_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
IMITATED = """
import json, torch
from radio_distill.system.precision import *
fields = {"engine.precision": "bfloat16", "teachers.a.dtype": "float16", "teachers.b.dtype": "auto"}
with autocast("auto", torch.device("cpu")):
    product = torch.ones(2, 2) @ torch.ones(2, 2)
print(json.dumps({
    "native": native_dtype("cpu"),
    "slowdown": slowdown("bfloat16"),
    "warning": emulation_warning(fields, torch.device("cpu")),
    "computed": str(product.dtype),
}))
"""


def has_flag(name: str) -> bool:
    """Whether Linux lists an instruction set of this processor."""
    try:
        return name in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def in_new_process(environment: dict[str, str]) -> dict:
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", IMITATED],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
@pytest.mark.skipif(
    any(name.endswith("MAX_CPU_ISA") for name in os.environ), reason="oneDNN is limited"
)
def test_native_dtype__as_the_processor_lists_it():
    has = has_flag("avx512_bf16") or has_flag("amx_bf16") or has_flag("bf16")
    assert native_dtype("cpu") == ("bfloat16" if has else "float32")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_native_dtype__processor_without_bfloat16():
    """oneDNN and ATen are limited to AVX2, as on most laptops; only a new process heeds that."""
    seen = in_new_process(WITHOUT_BFLOAT16)
    assert seen["native"] == "float32"
    assert seen["computed"] == "torch.float32"
    assert seen["slowdown"] > 1.5  # measured: 4 to 11
    warning = seen["warning"]
    assert warning.startswith("this processor emulates bfloat16 at ")
    assert "(engine.precision, teachers.a.dtype)" in warning
    assert "auto would be float32 here" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("limit", ["AVX512_CORE", "avx512_core_vnni"])
def test_is_native__oneDNN_limited_to_plain_avx512(monkeypatch, limit):  # noqa: N802
    """oneDNN itself says there that it has bfloat16."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    assert not is_native("bfloat16", "cpu")


def test_is_native__float32_is_everywhere():
    assert is_native("float32", "cpu")
    assert is_native("float32", "meta")
    assert not is_native("bfloat16", "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_native_dtype__gpus_from_ampere_on():
    ampere = torch.cuda.get_device_capability()[0] >= 8
    assert native_dtype("cuda") == ("bfloat16" if ampere else "float32")


def test_resolved_dtype__only_auto_changes():
    assert resolved_dtype("auto", CPU) == native_dtype(CPU)
    assert [resolved_dtype(name, CPU) for name in ("float32", "float16")] == ["float32", "float16"]


@pytest.mark.parametrize("outer", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_autocast__type_of_products_whatever_is_around(outer, name):
    with autocast(outer, CPU), autocast(name, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, name)


def test_emulation_warning__silent_where_nothing_is_emulated():
    native = native_dtype(CPU)
    assert emulation_warning({"engine.precision": native, "a": "auto", "b": "float32"}, CPU) == ""
