"""Train RADIO-style agglomerative vision backbones from your own teachers and images.

``radio_distill.load(path)`` and ``radio_distill.from_config(config)`` give a backbone to use.
"""

from importlib import import_module
from typing import Any

PROJECT = "radio-distill"
__version__ = "0.2.0"
__all__ = ["PROJECT", "from_config", "load"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use, so that the command line answers without it."""
    if name in ("from_config", "load"):
        return getattr(import_module(f"{__name__}.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
