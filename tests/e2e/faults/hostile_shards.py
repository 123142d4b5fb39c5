"""Tar shards that are broken, or that lie, from a seed."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random

from PIL import Image

Writer = Callable[[Path], None]
"""Puts a shard, and what belongs to it, into a folder."""

BLOCK = 512
END = bytes(2 * BLOCK)
SIZE, CHECKSUM, KIND = slice(124, 136), slice(148, 156), slice(156, 157)  # of a header
KINDS = b"\x000123456 7ADGIKLMNSVXgx?\xff"
NAMES = (
    b"../../evil.png", b"/etc/evil.png", b"a/../../evil.png", b"a/..", b"..", b".", b"./", b"",
    b" ", b".png", b"..png", b"a.", b"a..png", b"a.PNG", b"a\nINJECTED.png", b"a\rINJECTED.png",
    b"\x1b[31mINJECTED.png", b"\xff\xfe.png", b"\xed\xa0\x80.png", "\u202egnp.a.png".encode(),
    "\N{GRINNING FACE}/\N{GREEK SMALL LETTER ALPHA}.png".encode(), b"C:\\evil.png", b"~root/a.png",
    b"__meta__", b"a.png/", b"a.pyd", b"a.pickle", b"-rf.png", b"a|sh.png", b"pipe:touch evil.png",
)  # fmt: skip


class Payload:
    """Runs a command where somebody loads its pickle."""

    def __reduce__(self):
        return os.system, ("touch pickle_was_run",)


def image() -> bytes:
    """Return a small PNG."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(file, "PNG")
    return file.getvalue()


PNG = image()
PICKLE = pickle.dumps(Payload())


def sealed(header: bytes) -> bytes:
    """Return a header with the checksum that fits it."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """Return the header of a member; a size in bytes is written as it is."""
    octal = b"%011o\0" % size if isinstance(size, int) else size
    fields = name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    fields += octal + b"00000000000\0" + bytes(8) + kind + link.ljust(100, b"\0")
    return sealed((fields + b"ustar\x0000").ljust(BLOCK, b"\0"))


def member(name: bytes, data: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """Return header and content of a member."""
    return header(name, len(data), kind, link) + data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """Return a record of a pax header."""
    body = b" " + key + b"=" + value + b"\n"
    digits = next(n for n in range(1, 20) if len(str(len(body) + n)) == n)
    return b"%d" % (len(body) + digits) + body


def good(count: int = 3) -> bytes:
    """Return a shard in which nothing is wrong."""
    return b"".join(member(b"%03d.png" % i, PNG) for i in range(count)) + END


def shards(draw: Random) -> Iterator[tuple[str, Writer]]:
    """Yield the names of broken shards, and what writes them."""
    for number in range(30):
        name, data = _damaged(draw)
        yield f"{name} {number}", _file(data)
    for name in NAMES:
        yield f"name {name[:20]!r}", _file(member(name, PNG) + member(b"b.png", PNG) + END)
    for kind in KINDS:
        typed = member(b"a.png", PNG, bytes([kind]), b"../../../etc/passwd")
        yield f"type {kind:#x}", _file(good()[:-1024] + typed + END)
    for name, data in _crafted():
        yield name, _file(data)
    yield from _places()
    for name, change in _indexes():
        yield f"index {name}", partial(_poisoned, change)


def _file(data: bytes) -> Writer:
    return lambda folder: _write(folder / "a.tar", data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _damaged(draw: Random) -> tuple[str, bytes]:
    """Damage a good shard at a place that is drawn."""
    data = bytearray(good())
    step = (len(data) - len(END)) // 3
    start = draw.randrange(3) * step
    head = slice(start, start + BLOCK)
    kind = draw.choice(["flip", "flip and seal", "data", "cut", "size", "drop", "insert"])
    if kind in ("flip", "flip and seal"):
        data[start + draw.randrange(BLOCK)] ^= 1 << draw.randrange(8)
        if kind == "flip and seal":
            data[head] = sealed(bytes(data[head]))
    elif kind == "data":
        data[start + BLOCK + draw.randrange(len(PNG))] ^= 0xFF
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "size":
        sizes = (b"0" * 11 + b"\0", b"7" * 11 + b"\0", b"\x80" + bytes(3) + b"\x3f" + b"\xff" * 7,
                 b"\xff" * 12, b"-0000000001\0", b"zzzzzzzzzzz\0", bytes(12))  # fmt: skip
        data[head.start + SIZE.start : head.start + SIZE.stop] = draw.choice(sizes)
        data[head] = sealed(bytes(data[head]))
    elif kind == "drop":
        del data[head]
    else:
        data[start:start] = draw.randbytes(BLOCK)
    return kind, bytes(data)


def _crafted() -> Iterator[tuple[str, bytes]]:
    """Yield whole shards that no writer of shards would make."""
    a, rest = member(b"a.png", PNG), member(b"b.png", PNG) + END
    yield "empty file", b""
    yield "one byte", b"x"
    yield "no members", END
    yield "one block of zeros", bytes(BLOCK)
    yield "rubbish", Random(1).randbytes(20_000)
    yield "gzip", gzip.compress(good())
    yield "no end", good()[: -len(END)]
    yield "rubbish behind the end", good() + b"INJECTED" * 100
    yield "second archive behind the end", good() + good()
    yield "twice", a + rest[:-1024] + a + END
    yield "twice in a row", a + a + END
    yield "two cases of a suffix", a + member(b"a.PNG", PNG) + END
    yield "nested", member(b"a.png", good()) + rest
    yield (
        "gzip inside",
        member(b"a.png", gzip.compress(bytes(10**7))) + member(b"a.png.gz", b"") + END,
    )
    yield "pickle inside", member(b"a.png", PICKLE) + member(b"a.pyd", PICKLE) + rest
    yield "pickle beside", member(b"a.pyd", PICKLE) + a + END
    yield "no images", member(b"a.txt", b"x") + END
    yield "zero bytes", member(b"a.png", b"") + rest
    yield "50,000 members", _many(50_000)
    yield "size of the last beyond the end", header(b"a.png", 10**6) + PNG
    yield "200 MB that are not there", header(b"a.png", 200 << 20) + PNG + END
    for name, records in {
        "size": record(b"size", b"9" * 18), "negative size": record(b"size", b"-5"),
        "size of words": record(b"size", b"many"), "traversal": record(b"path", b"../../evil.png"),
        "NUL": record(b"path", b"a\0b.png"), "long": record(b"path", b"a" * 100_000 + b".png"),
        "length": b"999999999 path=x\n", "zero length": b"0 path=x\n", "no length": b"path=x\n",
        "no end": b"12 path=xxxxxxxxx", "surrogates": record(b"path", b"\xed\xb0\x80.png"),
        "binary": record(b"hdrcharset", b"BINARY") + record(b"path", b"\xff\xfe.png"),
        "link": record(b"linkpath", b"/etc/passwd"), "time": record(b"mtime", b"nan"),
        "time without end": record(b"mtime", b"1e999"), "digits": record(b"size", b"1" * 5000),
        "sparse": record(b"GNU.sparse.map", b"0,1,x") + record(b"GNU.sparse.size", b"1"),
        "sparse size": record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"),
        "sparse huge": record(b"GNU.sparse.size", b"9" * 30),
        "10 MB": record(b"comment", b"x" * 10**7),
    }.items():  # fmt: skip
        yield f"pax {name}", member(b"pax", records, b"x") + rest
        if name in ("traversal", "size", "length"):
            yield f"global pax {name}", member(b"pax", records, b"g") + rest
    yield "chain of long names", member(b"x", b"long", b"L") * 3000 + rest
    yield "chain of pax headers", member(b"x", record(b"path", b"y"), b"x") * 3000 + rest
    yield "long name of 4 GB", header(b"x", 4 << 30, b"L") + rest
    yield "long link", member(b"x", b"../" * 1000, b"K") + rest
    sparse = bytearray(header(b"a.png", len(PNG), b"S"))
    sparse[386:482] = b"7" * 96
    yield "old sparse", sealed(bytes(sparse)) + PNG + rest


def _many(count: int) -> bytes:
    """Return a shard of ``count`` images without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(count):
            tar.addfile(tarfile.TarInfo(f"{number:06}.png"))
    return file.getvalue()


def _places() -> Iterator[tuple[str, Writer]]:
    """Yield what stands where a shard should and is no file, or has no end."""
    yield "folder", lambda folder: (folder / "a.tar").mkdir()
    yield "pipe", lambda folder: os.mkfifo(folder / "a.tar")
    for target in ("a.tar", "missing", "/dev/zero", "/dev/full", "/proc/self/mem"):
        yield f"link to {target}", lambda folder, to=target: (folder / "a.tar").symlink_to(to)
    yield "1 TB of zeros", lambda folder: _sparse(folder / "a.tar", b"")
    yield "1 TB of zeros behind the end", lambda folder: _sparse(folder / "a.tar", good())


def _sparse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.truncate(path, 1 << 40)


def _indexes() -> Iterator[tuple[str, Callable[[dict, list], bytes]]]:
    """Yield hostile indexes of a good shard: what makes one of its head and its lines."""
    yield "rubbish", lambda head, lines: b"\xff\xfe rubbish\n"
    yield "deep", lambda head, lines: b"[" * 100_000
    yield "list", lambda head, lines: b"[]\n"
    yield "number", lambda head, lines: b"1" * 5000 + b"\n"
    values: dict[str, tuple] = {
        "num_samples": (0, -1, 10**18, "3", None), "digest": (None, 5), "size": ("x",),
        "mtime_ns": (None,), "version": ("x", [1]), "kept": (["x"],), "path": ("/etc/passwd",),
    }  # fmt: skip
    for name, bad in values.items():
        for value in bad:
            yield f"{name}={value!r}", partial(_with_head, name, value)
    for place in ((-1, 10, 0), (0, -1, 0), (0, 1 << 50, 0), (1 << 70, 1, 0), ("0", 1, 0), (0, 1)):
        yield f"place {place}", partial(_with_lines, ["a", {"png": place}])
    for line in (5, [], ["a"], ["a", {}], ["a", {"txt": [0, 1, 0]}], [["a"], {"png": [0, 1, 0]}]):
        yield f"line {line}", partial(_with_lines, line)


def _with_head(name: str, value: object, head: dict, lines: list) -> bytes:
    return b"\n".join([json.dumps(head | {name: value}).encode(), *lines]) + b"\n"


def _with_lines(line: object, head: dict, lines: list) -> bytes:
    lines = [json.dumps(line).encode()] * len(lines)
    return _with_head("digest", sha256(b"\n".join(lines)).hexdigest(), head, lines)


def _poisoned(change: Callable[[dict, list], bytes], folder: Path) -> None:
    """Put a good shard down, with an index that was changed and still carries the right sums."""
    from radio_distill.data.tar_index import index_path, open_shard

    path = folder / "a.tar"
    path.write_bytes(good())
    open_shard(path)
    head, *lines = index_path(path).read_bytes().splitlines()
    index_path(path).write_bytes(change(json.loads(head), lines))
