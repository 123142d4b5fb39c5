"""HTML pages of tables, figures and facts, from the templates beside this file.

A page is one file and loads nothing: style is inline, images are base64. It follows the reader's
light or dark setting, fits a phone, and prints on white. There is no script in it, and every text
is escaped by the templates.
"""

import base64
import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import ConfigError
from ..system.files import write_text
from .tables import Table, render_template

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Figure:
    """An image with a title and a caption."""

    title: str
    caption: str
    image: "Image | bytes"
    """A PIL image, or the bytes of a PNG, WebP or SVG file."""

    @property
    def address(self) -> str:
        """The image as an address. An SVG stays an image: nothing in it can run or load.

        Raises:
            ConfigError: it is no PNG, WebP or SVG.
        """
        content = self.image
        if not isinstance(content, bytes):
            buffer = io.BytesIO()
            content.save(buffer, format="PNG", optimize=True)
            content = buffer.getvalue()
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            kind = "png"
        elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            kind = "webp"
        elif content.lstrip().startswith((b"<svg", b"<?xml")):
            kind = "svg+xml"
        else:
            raise ConfigError(f"figure {self.title!r} is no PNG, WebP or SVG; pass a PIL image")
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, with a link to it at the top; what it holds is shown in this order."""

    key: str
    """Letters, for the link."""
    heading: str
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()
    """Names and texts, as a list."""
    panels: Sequence[Figure] = ()
    """Small figures, side by side."""
    sheets: Sequence[Figure] = ()
    """Large figures."""
    settings: str = ""
    """The resolved recipe, folded up."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.facts or self.panels or self.sheets or self.settings)


def machine_facts(device: "torch.device") -> list[tuple[str, str]]:
    """Say on which machine and with which versions a page's numbers were computed."""
    import torch

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    python = f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    versions = f"radio_distill {__version__}, torch {torch.__version__}"
    return [("machine", f"{kind}, {python}"), ("versions", versions)]


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write a page of those sections that hold something, whole or not at all; return its path.

    Raises:
        ConfigError: the file cannot be written, or a figure is no PNG, WebP or SVG.
    """
    shown = [section for section in sections if not section.is_empty]
    page = render_template("page.html.j2", title=title, sections=shown, version=__version__)
    write_text(Path(path), page)
    return Path(path)
