"""Recipes and command lines that are broken, or that lie, from a seed."""

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

import yaml

VALUES: tuple[Any, ...] = (
    None, [], {}, "", "x", True, -1, 0, 1, 10**30, -(10**30), 2**63, 0.5, 1e308, -1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"), "../../evil", "/proc/self/mem", "a\0b",
    "a\nINJECTED",
    "\x1b[31mINJECTED", "\ud800", "\N{GRINNING FACE}", "x" * 100_000, [[[]]], [None], ["x", 1],
    {"a": {"b": 1}}, {"__class__": "x"}, [1, 2], [-1, -1], [0, 0], [1e9, 1e9], "1e3", "${HOME}",
    "!!python/object/apply:os.system ['touch evil']",
)  # fmt: skip
NAMES = (
    "../../evil", "OUTSIDE/evil", "..", ".", "", "a/b", "a/../../b", "a\0b", "a\nINJECTED",
    "x" * 300, "~",
    "C:\\evil", "\udcff", "-rf", "step-00000001", "checkpoints", "\x1b[31mINJECTED", "con.", " ",
)  # fmt: skip
MEANT = ("output", "normalizer.cache")
"""Folders that a recipe names on purpose: what they say is where one writes."""
UNBOUNDED = ("data.workers", "engine.micro_batch")
"""Counts of processes: large ones are no input to try out on a machine that others use."""


def recipes(draw: Random, base: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield recipes made of a good one."""
    yield from _texts(base)
    for field in _fields(base):
        value = draw.choice(VALUES)
        if field not in MEANT and not (field in UNBOUNDED and isinstance(value, int)):
            yield f"{field} = {str(value)[:24]!r}", _dumped(changed(base, field, value))
    for name in NAMES:
        yield f"called {name[:20]!r}", _dumped(changed(base, "name", name))
        for what in ("stages", "teachers"):
            yield f"{what} {name[:20]!r}", _dumped(_renamed(base, what, name))
        yield f"upsampler {name[:20]!r}", _dumped(_upsampled(base, name))
        yield f"start_from {name[:20]!r}", _dumped(changed(base, "stages.stage1.start_from", name))


def changed(base: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """Return a recipe with another value; ``0`` in a field's name is a place in a list."""
    recipe = copy.deepcopy(base)
    node: Any = recipe
    *path, last = field.split(".")
    for key in path:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[int(last) if isinstance(node, list) else last] = value
    return recipe


def _renamed(base: dict[str, Any], what: str, name: str) -> dict[str, Any]:
    recipe = copy.deepcopy(base)
    section = recipe[what]
    section[name] = section.pop(next(iter(section)))
    if what == "teachers":
        recipe["stages"]["stage1"]["partitions"][0]["teachers"] = list(section)
    return recipe


def _upsampled(base: dict[str, Any], name: str) -> dict[str, Any]:
    recipe = changed(base, "stages.stage1.upsampler.name", name)
    partition = recipe["stages"]["stage1"]["partitions"][0]
    partition["upsample"] = partition["teachers"][:1]
    return recipe


def _dumped(recipe: dict[str, Any]) -> bytes:
    return yaml.safe_dump(recipe, sort_keys=False, width=10**9).encode("utf-8", "surrogatepass")


def _fields(base: dict[str, Any]) -> Iterator[str]:
    """Yield every field that a recipe can have, one item of each list and mapping included."""
    from radio_distill.config import Recipe, describe_fields

    for name, *_ in describe_fields(Recipe):
        place = name.replace("stages.NAME", "stages.stage1").replace(".N.", ".0.")
        yield place.replace("NAME", next(iter(base["teachers"])))


def _texts(base: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield files that are hard on whoever reads YAML, most of them behind a good recipe."""
    good = _dumped(base)
    letters = "abcdefghi"
    laughs = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
    for before, name in zip(["a0", *letters], letters, strict=False):
        laughs += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    yield "billion laughs", good + laughs.encode()
    yield "billion laughs in a field", good.replace(b"seed: 3", laughs.encode() + b"seed: *i")
    for name, data in {
        "anchor that holds itself": b"fit: &a {options: *a}\n",
        "list that holds itself": b"fit: {options: {x: &a [*a]}}\n",
        "merge that holds itself": b"fit: &a {<<: *a}\n",
        "python object": b"fit: !!python/object/apply:os.system ['touch evil']\n",
        "python name": b"fit: !!python/name:os.system\n",
        "python tuple": b"fit: !!python/tuple [1]\n",
        "unknown tag": b"fit: !evil 1\n", "binary": b"seed: !!binary aGVsbG8=\n",
        "bad binary": b"seed: !!binary '%%%'\n", "set": b"fit: !!set {a, b}\n",
        "ordered map": b"fit: !!omap [a: 1]\n", "merge": b"fit: {<<: [1, 2]}\n",
        "integer of 5,000 digits": b"seed: " + b"9" * 5000 + b"\n",
        "hexadecimal of 10,000 digits": b"seed: 0x" + b"f" * 10_000 + b"\n",
        "date": b"seed: 2024-01-01\n", "no date": b"seed: 2024-99-99\n",
        "no time": b"seed: 2024-01-01 99:99:99\n", "sexagesimal": b"seed: 1:2:3:4\n",
        "equals sign": b"seed: =\n", "int tag on a word": b"seed: !!int word\n",
        "float tag on a word": b"seed: !!float word\n", "bool tag": b"seed: !!bool word\n",
        "key that is a list": b"? [a]\n: 1\n", "key that is a map": b"? {a: b}\n: 1\n",
        "key that is null": b"null: 1\n", "key that is a number": b"1: 1\n",
        "key .nan": b".nan: 1\n",
        "key of 10 MB": b"'" + b"k" * 10**7 + b"': 1\n", "key twice": b"seed: 1\nseed: 2\n",
        "key of two lines": b'"a\\nINJECTED": 1\n', "value of two lines": b'loss: "a\\nINJECTED"\n',
        "field of two lines": b'fit: {"a\\nINJECTED": 1}\n', "escape": b'"\\e[31mINJECTED": 1\n',
        "two documents": b"--- \na: 1\n", "tabulator": b"\tseed: 1\n", "directive": b"%YAML 9.9\n",
        "not UTF-8": b"\xff\xfe\xfa: 1\n", "NUL": b"a: \0\n",
        "lone surrogate": b"\xed\xa0\x80: 1\n",
    }.items():  # fmt: skip
        yield name, good + data
    for name, data in {
        "nothing": b"", "comment": b"# nothing\n", "scalar": b"evil", "list": b"[1, 2]",
        "null": b"~",
        "lists 10,000 deep": b"[" * 10_000,
        "closed lists 10,000 deep": b"[" * 10_000 + b"]" * 10_000,
        "maps 10,000 deep": b"{a: " * 10_000, "UTF-16": good.decode().encode("utf-16"),
        "blocks 5,000 deep": b"".join(b" " * i + b"a:\n" for i in range(5000)),
        "rubbish": bytes(range(256)),
        "dashes": b"- " * 20_000, "gzip": b"\x1f\x8b\x08\0", "pickle": b"\x80\x04\x95.",
        "only a key": b"name",
    }.items():  # fmt: skip
        yield name, data


COMMANDS = (
    "plan", "train", "eval", "export", "report", "score", "shards", "list", "fields",
    "fit-upsampler", "convert-upsampler", "sweep", "", "trian", "--help",
)  # fmt: skip
FLAGS = (
    "--stage.x", "--stages.stage1.steps", "--stages.stage9.steps",
    "--stages.stage1.partitions.9.size",
    "--stages.stage1.partitions.low.size", "--stages.stage1.partitions.low.x.y", "--data.workers",
    "--seed", "--name.x", "--.", "--..", "--a..b", "--", "-", "---", "--=", "--=x", "--.=", "-x",
    "-1",
    "--override", "--stages", "--resume", "--student.max_size", "--teachers.vit.preset", "--stage.",
    "--teachers.new.preset", "--loss", "--loss.feature", "--fit.options", "--nonsense", "--format",
    "--data.shards", "--engine.device", "--help", "--limit", "--log.every", "--data.flip", "--size",
)  # fmt: skip
WORDS = (
    "", " ", "x", "-1", "1e999", "nan", "[", "]", "{", "{}", "[]", "null", "*a", "&a",
    "!!python/name:os",
    "../../evil", "/proc/self/mem", "/dev/zero", "\N{GRINNING FACE}", "a\nINJECTED", "\udcff",
    "a\0b", "=",
    "9" * 5000, "[" * 5000, "x" * 100_000, "a=b", "seed=[", "a.b.c=1", "@x", "%s", "~", "-", "--",
    ": :",
    "2024-99-99", "0x", "!!int x", "'", '"', "\t", "---", "? [a]", "stage1", "stages=1", "data=x",
)  # fmt: skip


def command_lines(draw: Random, recipe: str, count: int) -> Iterator[list[str]]:
    """Yield arguments of ``radio-distill``; most name a good recipe, and a flag that spoils it."""
    for number in range(count):
        command = COMMANDS[number % len(COMMANDS)]
        line = [command]
        if command in ("plan", "train", "fit-upsampler", "sweep"):
            line.append(recipe if draw.random() < 0.9 else draw.choice(WORDS))
        elif draw.random() < 0.7:
            line.append(draw.choice(WORDS))
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            line += [draw.choice(FLAGS), draw.choice(WORDS)][: draw.choice((1, 2, 2, 2))]
        yield line
