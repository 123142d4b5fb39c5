"""Students written so that other libraries load them; :func:`.write.export` writes any format."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UnknownNameError
from ..registry import nearest

if TYPE_CHECKING:
    from .write import Format

FORMATS = {
    "transformers": "a folder that transformers' AutoModel loads as RadioModel, with the heads",
    "timm": "a checkpoint of timm's RADIO models, or of a plain vision transformer",
    "radio": "a checkpoint in the layout that NVlabs/RADIO's hub code reads, with the heads",
    "onnx": "a graph for batches and sizes of any kind",
}


def format_named(name: str, **options: Any) -> "Format":
    """Make a format with its options (``size`` of timm, ``heads`` of onnx).

    Raises:
        UnknownNameError: where there is none of that name.
    """
    if name not in FORMATS:
        raise UnknownNameError(f"unknown format {name!r} ({nearest(name, list(FORMATS))})")
    made: Format = getattr(import_module(f"{__name__}.{name}"), name.title())(**options)
    return made
