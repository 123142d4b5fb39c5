"""Count how much code a reader of an entry point may have to open, and how long functions are.

    python -m tools.reading_path [MODULE]      (default: stages.stage3)

Imports are counted wherever they stand in a file, those for type checkers left out.
"""

import ast
import sys
from pathlib import Path

import grimp

PACKAGES = ("radio_distill", "upsamplers", "teachers", "stages", "slurm")
ROOT = Path(__file__).resolve().parents[1]


def file_of(module: str) -> Path:
    """Return a module's file in the checkout."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def count_lines(modules: set[str]) -> int:
    """Count the lines of modules, blank ones and docstrings included."""
    return sum(len(file_of(name).read_text(encoding="utf-8").splitlines()) for name in modules)


def function_lengths(modules: set[str]) -> list[int]:
    """Return the lengths of all functions in lines, the shortest first."""
    trees = [ast.parse(file_of(name).read_text(encoding="utf-8")) for name in modules]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)


def main() -> None:
    """Print the counts."""
    entry = sys.argv[1] if len(sys.argv) > 1 else "stages.stage3"
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    every = set(graph.modules)
    read = {entry, *graph.find_upstream_modules(entry)} & every
    lengths = function_lengths(every)
    ninth = lengths[int(0.9 * len(lengths))]
    print(f"{entry} imports {len(read)} files, {count_lines(read):,} lines")
    print(f"{', '.join(PACKAGES)}: {len(every)} files, {count_lines(every):,} lines")
    print(
        f"{len(lengths)} functions, nine in ten of at most {ninth} lines, the longest {lengths[-1]}"
    )


if __name__ == "__main__":
    main()
