"""List the names that a recipe can use, and what each is.

radio-distill list teachers
"""

import argparse
import inspect
import re
from importlib import import_module
from pathlib import Path

from rich.table import Table

from radio_distill.config.recipes import find_recipe, recipe_names
from radio_distill.models import HEADS
from radio_distill.normalize import NORMALIZERS
from radio_distill.registry import Registry
from radio_distill.system.progress import print_table, table_console
from teachers import FIELDS, SOURCES, TEACHERS
from upsamplers import PER_IMAGE, UPSAMPLERS
from upsamplers.networks import NETWORKS

KINDS = ("teachers", "sources", "heads", "upsamplers", "normalizers", "benchmarks", "recipes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill list``."""
    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to list; default: everything")
    parser.add_argument("--all", action="store_true", help="teachers for tests too")


def run(arguments: argparse.Namespace) -> int:
    """Print the names, each with what is worth knowing of it."""
    kinds = [arguments.kind] if arguments.kind else KINDS
    for kind in kinds:
        if len(kinds) > 1:
            print(f"{kind}:")
        if kind == "teachers":
            _print_teachers(arguments.all)
        elif kind == "sources":
            _print_sources()
        else:
            _print_descriptions(_descriptions(kind))
    return 0


def _descriptions(kind: str) -> dict[str, str]:
    """Return a line for each name."""
    if kind == "upsamplers":
        known = _of_registry(UPSAMPLERS)
        # A fitted one is what its network is; interpolation is a method too, without a fit.
        networks = {name: text for name, text in _of_registry(NETWORKS).items() if name in known}
        plain = {"bilinear": known["bilinear"]}
        return known | networks | plain | _of_registry(PER_IMAGE)
    if kind == "heads":
        return _of_registry(HEADS)
    if kind == "normalizers":
        return _of_registry(NORMALIZERS)
    if kind == "benchmarks":
        from radio_distill.evals.run import BENCHMARKS

        return _of_registry(BENCHMARKS)
    return {name: _of_recipe(find_recipe(name)) for name in recipe_names()}


def _of_registry(registry: Registry) -> dict[str, str]:
    found = {}
    for name in registry.names():
        try:
            found[name] = first_sentence(inspect.getdoc(registry.get(name)))
        except Exception as error:  # a package of the user's may fail with any
            found[name] = f"cannot be imported: {' '.join(str(error).split())}"
    return found


def _of_recipe(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    return first_sentence("\n".join(comment))


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring or a comment, on one line and without markup."""
    paragraph = " ".join((text or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=\w\w[.)])\s+(?=[A-Z])", paragraph)[0]
    sentence = re.sub(r" ?\(:\w+:`[^`]*`\)", "", sentence)
    return re.sub(r"(:\w+:)?`+~?([^`]*)`+", r"\2", sentence)


def _print_descriptions(lines: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    table_console().print(table)


def _print_sources() -> None:
    """Print where teachers come from, and what ``teachers.NAME.options`` can say of each source."""
    lines = {name: inspect.getdoc(import_module(place)) for name, place in SOURCES.items()}
    _print_descriptions({name: first_sentence(text) for name, text in lines.items()})
    print("options of any source:")
    _print_descriptions(FIELDS)
    for name, place in SOURCES.items():
        if options := import_module(place).ARGUMENTS:
            print(f"options of {name}:")
            _print_descriptions(options)


def _print_teachers(for_tests: bool) -> None:
    presets = {name: TEACHERS.get(name) for name in TEACHERS.names()}
    shown = {name: preset for name, preset in presets.items() if for_tests or not preset.random}
    rows = []
    for name, preset in shown.items():
        size, patch = (str(value or "") for value in (preset.native_size, preset.patch_size))
        rows.append((name, size, patch, "yes" if preset.summary else "", preset.licence))
    print_table(("name", "size", "patch", "summary", "licence"), rows)
    if len(shown) < len(presets):
        print(f"and {len(presets) - len(shown)} with random weights, for tests (--all)")
