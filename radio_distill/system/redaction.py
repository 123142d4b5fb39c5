"""Secrets that must not be written: taken out of what is printed, refused in what is kept.

Libraries put URLs, headers and answers of servers into their errors, and those end in logs that are
shared. A secret is known by the environment variable that holds it, by its looks (tokens of the
common services), or by its place (``user:password@`` in a URL, ``Authorization:``, ``?token=``).
Sums, paths and names of models look like none of these.
"""

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "***"

_SHORTEST = 8
_VARIABLE = re.compile(
    r"(TOKEN(?!I|S)|SECRET|PASSW(OR)?D|PASSPHRASE|API_?KEY|(ACCESS|PRIVATE)_?KEY|CREDENTIAL)"
    r"(?!.*(PATH|FILE|DIR|SOCK|HELPER)$)",
    re.IGNORECASE,
)
_FIELD = re.compile(
    r"(^|_)(token|secret|password|passwd|api_?key|access_?key|secret_?key|credentials?)$",
    re.IGNORECASE,
)
_NO_SECRET = ("cls_token", "class_token", "mask_token")

_TOKENS = (
    r"(?:hf_|api_org_|gh[pousr]_)[A-Za-z0-9]{20,}",
    r"github_pat_\w{20,}",
    r"glpat-[\w-]{16,}",
    r"xox[a-z]-[\w-]{10,}",
    r"sk-(?=[\w-]{0,60}\d)[\w-]{20,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    r"AIza[\w-]{35}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)?",
)
_QUERY = r"[\w.-]{0,40}(?:token|signature|credential|password|secret|api[_-]?key|access[_-]?key)"
_NAMED = r"(?:passw(?:or)?d|secret|api[_-]?key|(?:auth|access|hf|hub)[_-]?token)"
_PLACES = (
    (r"(://)[^\s/@:]*:[^\s/]*@", r"\1***@"),
    (r"(https?://)[^\s/@]+@", r"\1***@"),
    (r"(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+)[^\s\"',}]+", r"\1***"),
    (r"\b(bearer\s+)[\w.~+/=-]{16,}", r"\1***"),
    (rf"([?&](?:{_QUERY}[\w-]*|sig|policy)=)[^&\s\"'`#)]+", r"\1***"),
    (rf"({_NAMED}[\"']?\s*[:=]\s*[\"']?)[\w.~+/=@%-]{{8,}}", r"\1***"),
)
_PATTERNS = [
    (re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(_TOKENS)})"), HIDDEN),
    *((re.compile(pattern, re.IGNORECASE), hidden) for pattern, hidden in _PLACES),
]


def redact(text: str) -> str:
    """Return ``text`` with every secret in it replaced by ``***``."""
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    for pattern, hidden in _PATTERNS:
        text = pattern.sub(hidden, text)
    return text


def secrets_in(values: Mapping[str, Any]) -> list[str]:
    """Return the fields, as ``teachers.x.options.token``, whose values look like secrets."""
    return [".".join(path) for path, value in _leaves(values, ()) if _is_secret(path[-1], value)]


def install() -> None:
    """Take secrets out of all that this process logs, warns of, or dies with.

    Log records are changed where they are made, since libraries have handlers of their own.
    """
    if logging.getLogRecordFactory() is _record:
        return
    logging.setLogRecordFactory(_record)
    sys.excepthook = _print_exception
    threading.excepthook = _print_exception_of_thread
    warnings.formatwarning = _format_warning


def _secret_values() -> list[str]:
    """Values of the environment that are secrets, the longest first, also as URLs spell them."""
    lines = {
        line.strip()
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and not os.path.exists(value)
        for line in value.splitlines()
    }
    found = {spelt for line in lines if len(line) >= _SHORTEST for spelt in (line, quote(line, ""))}
    return sorted(found, key=len, reverse=True)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield path, value


def _is_secret(name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    named = bool(_FIELD.search(name)) and name not in _NO_SECRET and len(value) >= _SHORTEST
    return named or redact(value) != value


_make_record = logging.getLogRecordFactory()


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _make_record(*args, **kwargs)
    try:
        message = record.getMessage()
    except Exception:  # arguments that do not fit the format, which logging would print apart
        message = f"{record.msg} {record.args}"
    record.msg, record.args = redact(message), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
    if record.stack_info:
        record.stack_info = redact(record.stack_info)
    return record


def _print_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _print_exception_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit or arguments.exc_value is None:
        return
    name = arguments.thread.name if arguments.thread else "?"
    print(f"Exception in thread {name}:", file=sys.stderr)
    _print_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


_plain_warning = warnings.formatwarning


def _format_warning(*args: Any, **kwargs: Any) -> str:
    return redact(_plain_warning(*args, **kwargs))
