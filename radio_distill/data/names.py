"""Names of shards and of their members: which are used, and how any name is shown.

A name out of a shard is never used as a path. What cannot be printed is left out all the same, for
a name ends up in logs, where an escape sequence is read by a terminal and half a surrogate pair
cannot be written at all.
"""

MAX_LENGTH = 1000
_SHOWN_LENGTH = 100


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
    """Tell whether a member's name is relative, stays below its folder, and can be printed."""
    rises = name.startswith("/") or ".." in name.split("/")
    return not rises and name.isprintable() and len(name) <= MAX_LENGTH


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
