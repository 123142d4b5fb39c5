import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

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
    """Encode an image; a whole number stands for a noise picture with that seed."""

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
def write_tar() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Write members to a plain tar file."""

    def write(path: Path, members: Mapping[str, bytes]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def shard_folder(tmp_path, encode, write_tar) -> Path:
    """Five shards of 3, 4, 5, 6 and 7 different pictures."""
    for shard in range(5):
        members = {f"s{shard}_{i}.png": encode(10 * shard + i) for i in range(3 + shard)}
        write_tar(tmp_path / f"part-{shard}.tar", members)
    return tmp_path
