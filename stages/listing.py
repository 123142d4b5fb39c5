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
        from radio_distill.evals import BENCHMARKS

        return BENCHMARKS.names()
    from stages.common import recipe_names

    return recipe_names()


def _print_teachers() -> None:
    raise NotImplementedError
