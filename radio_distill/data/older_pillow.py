"""What Pillow bounds since version 13 of hostile files, for 12.3, the last one of Python 3.10.

Without it a directory of a few kB, whose tags all claim the same bytes, is read into gigabytes, and
a long comment of a GIF takes time by the square of its length.
"""

from typing import IO

from PIL import GifImagePlugin, Image, TiffImagePlugin

_MOST_BLOCKS = 4096  # of 255 bytes: a megabyte before an image, and half a second


def bound_older_pillow() -> None:
    """Make the Pillow of this process read no more of a file than it has; from 13 on, nothing."""
    if int(Image.__version__.partition(".")[0]) >= 13:
        return
    load = TiffImagePlugin.ImageFileDirectory_v2.load
    block = GifImagePlugin.GifImageFile.data

    def load_within(self: TiffImagePlugin.ImageFileDirectory_v2, fp: IO[bytes]) -> None:
        load(self, ReadOnce(fp))  # type: ignore[arg-type]

    def block_within(self: GifImagePlugin.GifImageFile) -> bytes | None:
        self.blocks = getattr(self, "blocks", 0) + 1  # type: ignore[attr-defined]
        if self.blocks > _MOST_BLOCKS:  # type: ignore[attr-defined]
            raise ValueError(f"more than {_MOST_BLOCKS} blocks of comments")
        return block(self)

    TiffImagePlugin.ImageFileDirectory_v2.load = load_within  # type: ignore[method-assign]
    GifImagePlugin.GifImageFile.data = block_within  # type: ignore[method-assign]


class ReadOnce:
    """A file that gives as many bytes as it has, wherever they are read, and then none."""

    def __init__(self, file: IO[bytes]):
        self.tell, self.seek = file.tell, file.seek
        self._read = file.read
        start = file.tell()
        self._left = file.seek(0, 2)
        file.seek(start)

    def read(self, size: int) -> bytes:
        data = self._read(min(size, self._left))
        self._left -= len(data)
        return data
