import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "real"


@pytest.fixture
def real() -> Path:
    """The folder of real photographs beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no real photographs beside the checkout")
    return SHARED


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encode an image; a whole number stands for a noise image with that seed."""

    def encode_image(
        image: Image.Image | int, kind: str = "PNG", size: tuple[int, int] = (40, 48), **options
    ) -> bytes:
        if isinstance(image, int):
            noise = np.random.default_rng(image).integers(0, 256, (*size, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode_image


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """Write members, by name or in pairs, to a plain tar file; instead of bytes, a header."""

    def write(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, Any]]) -> Path:
        pairs = members.items() if isinstance(members, Mapping) else members
        with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
            for name, data in pairs:
                if isinstance(data, bytes):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                else:
                    tar.addfile(data)
        return path

    return write


@pytest.fixture
def captioned(tmp_path, encode, write_tar) -> Path:
    """A shard of six images, each with a caption."""
    members = {}
    for number in range(6):
        members[f"a{number}.png"] = encode(number)
        members[f"a{number}.txt"] = b"caption %d" % number
    return write_tar(tmp_path / "a.tar", members)


@pytest.fixture
def shard_folder(tmp_path, encode, write_tar) -> Path:
    """Five shards of 3, 4, 5, 6 and 7 different images."""
    for shard in range(5):
        members = {f"s{shard}_{i}.png": encode(10 * shard + i) for i in range(3 + shard)}
        write_tar(tmp_path / f"part-{shard}.tar", members)
    return tmp_path


@pytest.fixture
def put(encode) -> Callable[..., Path]:
    """Write an image of its own to each of some places below a folder; returns the folder."""

    def put_images(folder: Path, names: Iterable[str]) -> Path:
        for number, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(number))
        return folder

    return put_images
