"""Checkpoints that are damaged, or that lie and carry sums that fit, from a seed."""

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from radio_distill.train.checkpoint import sealed

Damage = Callable[[Path], None]
"""Changes the newest checkpoint folder of a stage, or what lies around it."""

FILES = (
    "student.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "statistics.safetensors",
)
META = "meta.json"
VALUES: tuple[Any, ...] = (None, [], {}, "", "x", -1, 10**30, 1.5, True, [[]], {"a": {"b": 1}},
                           "../../evil", "a\nINJECTED", float("nan"), "\ud800")  # fmt: skip


class Payload:
    """Runs a command where somebody loads its pickle."""

    def __reduce__(self):
        return os.system, ("touch pickle_was_run",)


def damages(draw: Random) -> Iterator[tuple[str, Damage]]:
    """Yield what is damaged, and what damages it."""
    for number in range(20):
        seed, seal = draw.randrange(2**32), bool(number % 2)
        name = (*FILES, META)[number % 5]
        yield f"flip {name} sealed={seal} {number}", partial(_flip, name, seed, seal)
    for number in range(10):
        share, seal = draw.random(), bool(number % 2)
        name = (*FILES, META)[number % 5]
        yield f"cut {name} sealed={seal} {number}", partial(_cut, name, share, seal)
    for name in (*FILES, META):
        yield f"without {name}", partial(_remove, name)
        yield f"empty {name}", partial(_replace, name, b"")
    yield "without ema, sealed", lambda folder: (_remove(FILES[1], folder), _seal(folder))
    for one, other in ((0, 2), (0, 3), (1, 2)):
        yield f"swapped {FILES[one]}, {FILES[other]}", partial(_swap, FILES[one], FILES[other])
    for name, head in _headers():
        yield f"header {name}", partial(_replace, FILES[draw.randrange(2)], head)
    for name, change in _tensors():
        for file in draw.sample(FILES, 2):
            yield f"tensors of {file} {name}", partial(_with_tensors, file, change)
    for name, data in _pickles():
        yield name, partial(_replace, FILES[1], data)
    yield from _metas(draw)
    yield from _places()
    yield from _around(draw)


def _flip(name: str, seed: int, seal: bool, folder: Path) -> None:
    data, draw = bytearray((folder / name).read_bytes()), Random(seed)
    data[draw.randrange(draw.choice((200, len(data))))] ^= 1 << draw.randrange(8)
    _replace(name, bytes(data), folder, seal)


def _cut(name: str, share: float, seal: bool, folder: Path) -> None:
    data = (folder / name).read_bytes()
    _replace(name, data[: int(share * len(data))], folder, seal)


def _remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def _replace(name: str, data: bytes, folder: Path, seal: bool = True) -> None:
    (folder / name).write_bytes(data)
    if seal and name != META:
        _seal(folder)


def _seal(folder: Path) -> None:
    """Let the sums in meta.json be those of the files."""
    found = sorted(folder.glob("*.safetensors"))
    _with_meta(
        {"sha256": {path.name: sha256(path.read_bytes()).hexdigest() for path in found}}, folder
    )


def _with_meta(values: dict[str, Any], folder: Path) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(sealed(meta | values)))


def _swap(one: str, other: str, folder: Path) -> None:
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    _replace(one, second, folder)
    _replace(other, first, folder)


def _safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _headers() -> Iterator[tuple[str, bytes]]:
    """Yield files whose header contradicts the format."""
    for length in (0, 1, 10**9, 2**63, 2**64 - 1):
        yield f"of {length} bytes", _safetensors({}, length=length)
    for name, entry in {
        "negative shape": {"dtype": "F32", "shape": [-1, -16], "data_offsets": [0, 64]},
        "huge shape": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]},
        "offsets beyond": {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**50]},
        "offsets swapped": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]},
        "unknown type": {"dtype": "EVIL", "shape": [16], "data_offsets": [0, 64]},
        "words": {"dtype": 5, "shape": "x", "data_offsets": None},
        "many dimensions": {"dtype": "U8", "shape": [1] * 5000 + [64], "data_offsets": [0, 64]},
    }.items():
        yield name, _safetensors({"a": entry})
    half = {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}
    yield "overlapping", _safetensors({"a": half, "b": half})
    yield "name of a path", _safetensors({"../../evil": half})
    yield "list", _safetensors([])
    yield "deep", _safetensors(b"[" * 100_000)
    yield "not UTF-8", _safetensors(b"\xff" * 100)
    yield "metadata of numbers", _safetensors({"__metadata__": {"a": 1}, "b": half})


def _tensors() -> Iterator[tuple[str, Callable[[dict], dict]]]:
    """Yield whole files that hold other tensors than they should."""
    yield "none", lambda tensors: {}
    yield "one too many", lambda tensors: tensors | {"a\nINJECTED": torch.ones(1)}
    yield "one missing", lambda tensors: dict(list(tensors.items())[1:])
    yield "not finite", lambda tensors: {k: torch.full_like(v, 7) / 0 for k, v in tensors.items()}
    yield "empty ones", lambda tensors: {k: v.new_zeros(0) for k, v in tensors.items()}
    yield "one dimension more", lambda tensors: {k: v[None].clone() for k, v in tensors.items()}
    yield "of bool", lambda tensors: {k: v.bool() for k, v in tensors.items()}
    yield "of int64", lambda tensors: {k: v.long() for k, v in tensors.items()}
    yield "renamed", lambda tensors: {f"../{k}": v for k, v in tensors.items()}


def _with_tensors(name: str, change: Callable[[dict], dict], folder: Path) -> None:
    save_file(change(load_file(folder / name)), folder / name)
    _seal(folder)


def _pickles() -> Iterator[tuple[str, bytes]]:
    yield "pickle", pickle.dumps(Payload())
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        file = io.BytesIO()
        torch.save({"a": Payload()}, file, **options)
        yield f"pickle of torch, {name}", file.getvalue()


def _metas(draw: Random) -> Iterator[tuple[str, Damage]]:
    """Yield descriptions that lie."""
    for key in ("step", "stage", "recipe", "teachers", "shards", "counts", "versions", "sha256"):
        for value in draw.sample(VALUES, 3):
            yield f"meta {key} = {value!r}", partial(_with_meta, {key: value})
    for data in (b"[]", b"5", b"\xff", b"{", b"[" * 100_000, b"9" * 5000, b"\x80\x04\x95."):
        yield f"meta of {data[:8]!r}", partial(_replace, META, data)
    for name in ("../../../../../../canary", "/etc/passwd", "", ".", "a\0b", "a\nINJECTED"):
        yield f"sum of {name!r}", partial(_with_sum, name)
    for field in ("channels", "summary_channels", "patch_size", "native_size", "name", "mean"):
        for value in draw.sample((*VALUES, 0, 10**12), 2):
            yield f"teacher {field} = {value!r}", partial(_with_teacher, field, value)
    yield "teacher with a field more", partial(_with_teacher, "evil", 1)
    for old, new in (
        ("name: tiny", "name: ../../evil"), ("name: tiny", "name: OUTSIDE/evil"),
        ("output: ", "output: OUTSIDE/"),
        ("seed: 3", "seed: &a [*a]"),
        ("seed: 3", "seed: !!python/object/apply:os.system ['touch evil']"),
        ("architecture: test_vit", "architecture: ../evil"),
        ("registers: 2", "registers: 1000000000000"),
        ("architecture: test_vit", "architecture: vit_small_patch16_224"),
        ("registers: 2", "registers: -3"),
        ("head_hidden: 32", "head_hidden: 0"), ("max_size: 256", "max_size: 10000000000"),
        ("name: phi_s", "name: evil"), ("preset: tiny_vit", "preset: evil"),
        ("preset: tiny_vit", "preset: tiny_cnn"),
    ):  # fmt: skip
        yield f"recipe with {new}", partial(_with_recipe, old, new)


def _with_sum(name: str, folder: Path) -> None:
    meta = json.loads((folder / META).read_text())
    _with_meta({"sha256": meta["sha256"] | {name: "0" * 64}}, folder)


def _with_teacher(field: str, value: Any, folder: Path) -> None:
    teachers = json.loads((folder / META).read_text())["teachers"]
    next(iter(teachers.values()))[field] = value
    _with_meta({"teachers": teachers}, folder)


def _with_recipe(old: str, new: str, folder: Path) -> None:
    recipe = json.loads((folder / META).read_text())["recipe"]
    assert old in recipe, f"the recipe has no {old!r}"
    new = new.replace("OUTSIDE", str(folder.parents[5] / "home"))
    _with_meta({"recipe": recipe.replace(old, new, 1)}, folder)


def _places() -> Iterator[tuple[str, Damage]]:
    """Yield what stands where a file should and is none, or is another's."""
    for target in ("/dev/zero", "/etc/passwd", "missing", "../../../../../../canary"):
        for name in (FILES[0], META):
            yield f"{name} links to {target}", partial(_link, name, target)
    for name in (FILES[1], META):
        yield f"{name} is a pipe", partial(_pipe, name)
        yield f"{name} is a folder", partial(_folder, name)
    yield "checkpoint links to itself", _link_to_itself


def _link(name: str, target: str, folder: Path) -> None:
    _remove(name, folder)
    (folder / name).symlink_to(target)


def _pipe(name: str, folder: Path) -> None:
    _remove(name, folder)
    os.mkfifo(folder / name)


def _folder(name: str, folder: Path) -> None:
    _remove(name, folder)
    (folder / name).mkdir()


def _link_to_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def _around(draw: Random) -> Iterator[tuple[str, Damage]]:
    """Yield what surprises beside the checkpoints and in the stage's folder."""
    for name in ("step-99999999", "step-00000009"):
        yield f"empty {name}", lambda folder, name=name: (folder.parent / name).mkdir()
    yield "file as folder", lambda folder: (folder.parent / "step-00000009").write_bytes(b"x")
    yield "leftover of a write", lambda folder: (folder.parent / ".step-00000003.1.tmp").mkdir()
    yield (
        "leftover is a link",
        lambda folder: (folder.parent / ".step-00000003.2.tmp").symlink_to("../../../../../home"),
    )
    for name in ("metrics.jsonl", "status.json", "owner.json", "skipped.jsonl", "recipe.yaml"):
        for data in (
            b"\xff\n[]\n5\n",
            b'{"step": "x"}\n',
            b"[" * 100_000,
            b"null\n",
            b'{"a": 1}\n',
        ):
            yield f"{name} of {data[:8]!r}", partial(_beside, name, data)
        yield f"{name} is a folder", partial(_folder_beside, name)


def _beside(name: str, data: bytes, folder: Path) -> None:
    (folder.parents[1] / name).write_bytes(data)


def _folder_beside(name: str, folder: Path) -> None:
    path = folder.parents[1] / name
    path.unlink(missing_ok=True)
    path.mkdir()
