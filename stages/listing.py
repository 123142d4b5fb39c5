"""List the names that a recipe can use.

radio-distill list teachers
"""

import argparse

KINDS = ("teachers", "upsamplers", "normalizers", "benchmarks", "recipes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill list``."""
    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to list; default: everything")


def run(arguments: argparse.Namespace) -> int:
    """Print the names, teachers with what is worth knowing of them."""
    kinds = [arguments.kind] if arguments.kind else KINDS
    for kind in kinds:
        if len(kinds) > 1:
            print(f"{kind}:")
        if kind == "teachers":
            _print_teachers()
            continue
        for name in _names(kind):
            print(f"  {name}")
    return 0


def _names(kind: str) -> list[str]:
    if kind == "upsamplers":
        from upsamplers import UPSAMPLERS

        return UPSAMPLERS.names()
    if kind == "normalizers":
        from radio_distill.balance import NORMALIZERS

        return NORMALIZERS.names()
    if kind == "benchmarks":
        from radio_distill.evals.harness import BENCHMARKS

        return ["fidelity", *BENCHMARKS.names()]
    from stages.common import recipe_names

    return recipe_names()


def _print_teachers() -> None:
    from rich.console import Console
    from rich.table import Table

    from teachers import TEACHERS

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("size")
    table.add_column("patch")
    table.add_column("summary")
    table.add_column("licence")
    for name in TEACHERS.names():
        preset = TEACHERS.get(name)
        size, patch = (str(value or "") for value in (preset.native_size, preset.patch_size))
        table.add_row(name, size, patch, "yes" if preset.summary else "", preset.licence)
    Console().print(table)
