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
from typing import Any
from urllib.parse import quote

from .nested import leaves, plain_data

_SHORTEST = 8
_VARIABLE = re.compile(
    r"(TOKEN(?!I|S)|SECRET|PASSW(OR)?D|PASSPHRASE|API_?KEY|(ACCESS|PRIVATE)_?KEY|CREDENTIAL)"
    r"(?!.*(PATH|FILE|DIR|SOCK|HELPER)$)",
    re.IGNORECASE,
)
_FIELD = re.compile(
    r"^(?!(cls|class|mask)_)(.*_)?"
    r"(token|secret|password|passwd|api_?key|access_?key|secret_?key|credentials?)$",
    re.IGNORECASE,
)
_TOKENS = (
    r"(?<![A-Za-z0-9_])(?:(?:hf_|api_org_|gh[pousr]_)[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|sk-(?=[\w-]{0,60}\d)[\w-]{20,}|AIza[\w-]{35}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)?)"
)
_QUERY = r"[\w.-]{0,40}(?:token|signature|credential|password|secret|api[_-]?key|access[_-]?key)"
_NAMED = r"(?:passw(?:or)?d|secret|api[_-]?key|(?:auth|access|hf|hub)[_-]?token)"
_PLACES = (
    r"(://)[^\s/@:]*:[^\s/]*(?=@)",
    r"(https?://)[^\s/@]+(?=@)",
    r"(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+)[^\s\"',}]+",
    r"\b(bearer\s+)[\w.~+/=-]{16,}",
    rf"([?&](?:{_QUERY}[\w-]*|sig|policy)=)[^&\s\"'`#)]+",
    rf"({_NAMED}[\"']?\s*[:=]\s*[\"']?)[\w.~+/=@%-]{{8,}}",
)
_PATTERNS = [
    (re.compile(_TOKENS), "***"),
    *((re.compile(pattern, re.IGNORECASE), r"\1***") for pattern in _PLACES),
]


def redact(text: str) -> str:
    """Return ``text`` with every secret in it replaced by ``***``."""
    values = {
        line.strip()
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and not os.path.exists(value)
        for line in value.splitlines()
    }
    values = {value for value in values if len(value) >= _SHORTEST}
    for value in sorted(values | {quote(value, "") for value in values}, key=len, reverse=True):
        text = text.replace(value, "***")
    for pattern, hidden in _PATTERNS:
        text = pattern.sub(hidden, text)
    return text


def secrets_in(values: Any) -> list[str]:
    """Return the fields, as ``teachers.x.options.token``, whose values look like secrets."""
    return [
        ".".join(path)
        for path, value in leaves(plain_data(values), "opened")
        if isinstance(value, str)
        and ((_is_named(path[-1]) and len(value) >= _SHORTEST) or redact(value) != value)
    ]


def _is_named(name: str) -> bool:
    return bool(_FIELD.search(name))


def redact_output() -> None:
    """Take secrets out of all that this process logs, warns of, or dies with.

    Records are changed where they are made, since libraries have handlers of their own.
    """
    logging.captureWarnings(True)
    logging.setLogRecordFactory(_redacted_record)
    sys.excepthook = _print_error
    threading.excepthook = _print_error_of_thread


def _print_error(*error: Any) -> None:
    print(_redacted_trace(*error), end="", file=sys.stderr)


def _print_error_of_thread(thread: threading.ExceptHookArgs) -> None:
    if thread.exc_type is not SystemExit:
        _print_error(thread.exc_type, thread.exc_value, thread.exc_traceback)


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        message = record.getMessage()
    except Exception:  # arguments that do not fit the format, which logging would print apart
        message = f"{record.msg} {record.args}"
    record.msg, record.args = redact(message), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = _redacted_trace(*record.exc_info).rstrip()
    return record


def _redacted_trace(*error: Any) -> str:
    return redact("".join(traceback.format_exception(*error)))
