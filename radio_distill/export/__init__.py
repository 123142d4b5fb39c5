"""Students written so that other libraries load them; each format is a module with one face.

``check(student)`` raises ExportError where the format cannot hold a student, with the reason.
``export(student, folder)`` writes the folder, whole or not at all, and returns its main file.
"""

from importlib import import_module
from types import ModuleType

from ..errors import UnknownNameError
from ..registry import nearest

FORMATS = {
    "transformers": "a folder that transformers' AutoModel loads as RadioModel, with the heads",
    "timm": "a checkpoint of timm's RADIO models, or of a plain vision transformer",
    "radio": "a checkpoint in the layout that NVlabs/RADIO's hub code reads, with the heads",
    "onnx": "a graph for batches and sizes of any kind",
}


def format_named(name: str) -> ModuleType:
    """Import a format's module; raises UnknownNameError."""
    if name not in FORMATS:
        raise UnknownNameError(f"unknown format {name!r} ({nearest(name, list(FORMATS))})")
    return import_module(f"{__name__}.{name}")
