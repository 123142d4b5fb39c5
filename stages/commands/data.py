"""Published data sets of the evaluation: which there are, and whether a folder holds one whole.

radio-distill data list
radio-distill data check ade20k /data/ADEChallengeData2016
"""

import argparse

from radio_distill.errors import ConfigError
from radio_distill.system.progress import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill data``."""
    parser.add_argument("action", choices=("list", "check"))
    parser.add_argument("name", nargs="?", help="with check: one of `radio-distill data list`")
    parser.add_argument(
        "path", nargs="?", help="with check: its folder, as evaluation.data takes it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table; returns 1 where a set is not whole."""
    if arguments.action == "list":
        return _list()
    if arguments.path is None:
        raise ConfigError("data check takes the name of a data set and its folder")
    return _check(arguments.name, arguments.path)


def _list() -> int:
    from radio_distill.evals.datasets import DATASETS

    rows = []
    for name in DATASETS.names():
        kind = DATASETS.get(name)
        items = ", ".join(f"{part} {whole:,}" for part, whole in kind.published.items())
        rows.append((name, kind.layout, items, kind.licence))
    print_table(("name", "the folder holds", "items", "licence"), rows)
    return 0


def _check(name: str, path: str) -> int:
    from radio_distill.evals.datasets import DATASETS

    contents = DATASETS.get(name)(path).check()
    rows = []
    for part, whole in contents.published.items():
        found = contents.counts.get(part)
        missing = max(whole - (found or 0), 0)
        seen = "not readable" if found is None else f"{found:,}"
        rows.append((part, seen, f"{whole:,}", f"{missing:,}" if missing else ""))
    print_table(("part", "found", "published", "missing"), rows)
    for problem in contents.problems.values():
        print(problem)
    return 1 if contents.missing else 0
