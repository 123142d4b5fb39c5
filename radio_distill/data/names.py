"""Names of shards and of their members: which are used, and how any name is shown.

A name out of a shard is never used as a path, and is escaped wherever it is shown. Names that are
made to deceive a reader or a terminal are left out all the same: those with control characters,
separators of lines, or marks of writing direction. Everything else that people have is used: spaces
of every kind, joined emoji, bytes of another encoding than UTF-8.
"""

import re

MAX_LENGTH = 1000
_SHOWN_LENGTH = 100
_UNSAFE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters
    "\u2028\u2029"  # separators of lines and paragraphs
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of writing direction
    "\ud800-\udc7f\udd00-\udfff"  # surrogates; the others stand for bytes that are not UTF-8
    "]"
)
_MADE_BY_SYSTEMS = {
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "thumbs.db",
    "desktop.ini",
}


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case suffix of a member, split at the first dot as webdataset does.

    The suffix is empty where webdataset passes the member over.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, _, suffix = file_name.partition(".")
    if not stem or (not slash and stem.startswith("__") and name.endswith("__")):
        return name, ""
    return folder + slash + stem, suffix.lower()


def is_safe(name: str) -> bool:
    """Tell whether a member's name is relative, stays below its folder, and deceives nobody."""
    rises = name.startswith("/") or ".." in name.split("/")
    return not rises and not _UNSAFE.search(name) and len(name) <= MAX_LENGTH


def is_hidden(name: str) -> bool:
    """Tell whether the name of a file or folder says that it is not for the eye.

    That is a dot at its beginning (``.ipynb_checkpoints``, ``._a.jpg``), or a name that operating
    systems give to files of their own (``Thumbs.db``, ``__MACOSX``).
    """
    dotted = name.startswith(".") and name not in (".", "..")
    return dotted or name.lower() in _MADE_BY_SYSTEMS


def printable(name: object) -> str:
    """Return a name with everything escaped that could harm a log."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shortened(name: str) -> str:
    """Return a printable name of at most a line's length."""
    text = printable(name[: _SHOWN_LENGTH + 1])
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 1] + "…"
