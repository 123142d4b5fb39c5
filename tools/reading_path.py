"""Count how much code a reader of an entry point may have to open, and what makes it hard to read.

    python -m tools.reading_path [MODULE]      (default: stages.stage3)

Imports are counted wherever they stand in a file, those for type checkers left out.
"""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import grimp

from stages.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


def file_of(module: str) -> Path:
    """Return a module's file in the checkout."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def count_lines(modules: Iterable[str]) -> int:
    """Count the lines of modules, blank ones and docstrings included."""
    return sum(len(file_of(name).read_text(encoding="utf-8").splitlines()) for name in modules)


def functions_of(modules: Iterable[str]) -> list[ast.FunctionDef]:
    """Return all functions and methods of modules."""
    trees = [ast.parse(file_of(name).read_text(encoding="utf-8")) for name in modules]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def takes(function: ast.FunctionDef, *names: str) -> bool:
    """Return whether a function has parameters of all these names."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return set(names) <= {argument.arg for argument in arguments}


def in_circles(graph: grimp.ImportGraph) -> list[str]:
    """List the modules that import themselves through others."""
    return sorted(
        name
        for name in graph.modules
        if any(
            name in graph.find_upstream_modules(imported)
            for imported in graph.find_modules_directly_imported_by(name)
        )
    )


def with_one_user(graph: grimp.ImportGraph) -> list[str]:
    """List the modules of less than 115 lines that one other imports, and no registry names.

    A package itself, its `__init__`, is none of them.
    """
    texts = [file_of(module).read_text(encoding="utf-8") for module in graph.modules]
    plugged = {name for text in texts for name in re.findall(r'"([\w.]+):\w+"', text)}
    return sorted(
        name
        for name in graph.modules - plugged
        if len(graph.find_modules_that_directly_import(name)) == 1
        and count_lines([name]) < 115
        and file_of(name).name != "__init__.py"
    )


def main() -> None:
    """Print the counts."""
    entry = sys.argv[1] if len(sys.argv) > 1 else "stages.stage3"
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    if entry not in graph.modules:
        sys.exit(f"no module {entry!r} in {', '.join(PACKAGES)}")
    read = {entry, *graph.find_upstream_modules(entry)}
    functions = functions_of(graph.modules)
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    both = [node.name for node in functions if takes(node, "recipe", "stage")]
    print(f"{entry} imports {len(read)} files, {count_lines(read):,} lines")
    print(f"all packages: {len(graph.modules)} files, {count_lines(graph.modules):,} lines")
    print(
        f"{len(functions)} functions: nine in ten of at most {lengths[int(0.9 * len(lengths))]} "
        f"lines, the longest {lengths[-1]}; {len(both)} take both recipe and stage"
    )
    print(f"files in circles of imports: {', '.join(in_circles(graph)) or 'none'}")
    alone = with_one_user(graph)
    print(f"{len(alone)} files of less than 115 lines with a single user: {', '.join(alone)}")


if __name__ == "__main__":
    main()
