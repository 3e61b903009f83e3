"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME [options]` runs one."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from benchmarks.lab.needs import BenchmarkError


def catalogue() -> dict[str, str]:
    """Name -> first line of the docstring of every module here with a `main`, not imported.

    A study in several files is a folder, with its `main` in `__init__.py`.
    """
    room, found = Path(__file__).parent, {}
    for path in [*room.glob("[!_]*.py"), *room.glob("[!_]*/__init__.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            name = path.parent.name if path.stem == "__init__" else path.stem
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return dict(sorted(found.items()))


def main(argv: list[str]) -> int:
    """Run the benchmark named first, with the other arguments; without a name, list them.

    Returns the exit status.
    """
    known = catalogue()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]")
        print("       python -m benchmarks NAME --help      shows the options\n")
        print("\n".join(f"  {name:<15}{line}" for name, line in known.items()))
        return 0
    name, *options = argv
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 1, cutoff=0.0)) or "none yet"
        print(f"error: no benchmark is called {name!r}; the nearest is: {near}", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f"benchmarks.{name}").main(options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
