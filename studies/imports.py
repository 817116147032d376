"""Print the import graph: which room of the package imports which, and how much is in each.

    python studies/imports.py              # rooms: packages, and the runtime's rooms one by one
    python studies/imports.py --modules    # every module

A line a room: lines of code, modules, and the rooms it imports with the number of imports.
`make lint` checks the directions (import-linter, `[tool.importlinter]` in pyproject.toml).
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

import grimp
import networkx as nx

PACKAGES = [
    f"spiffy.{name}"
    for name in ("schemas", "graphs", "runtime", "calib", "bench", "integrations", "cli")
]


def room(module: str) -> str:
    """Where a module stands: its package; within the runtime, the room or file there."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "runtime" else parts[0]


def lines(module: str) -> int:
    """Lines of a module's file."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return len(Path(spec.origin).read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Print a line for every room."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modules", action="store_true", help="every module instead of rooms")
    named = str if parser.parse_args().modules else room
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports: defaultdict[str, Counter[str]] = defaultdict(Counter)
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for module in sorted(graph.modules):
        here = named(module)
        modules[here].append(module)
        for imported in graph.find_modules_directly_imported_by(module):
            if named(imported) != here:
                imports[here][named(imported)] += 1
    for here, names in modules.items():
        there = ", ".join(f"{to} {count}" for to, count in sorted(imports[here].items()))
        size = sum(map(lines, names))
        print(f"{here:28} {size:6} lines {len(names):3} modules  -> {there or 'nothing'}")
    arrows = nx.DiGraph([(here, to) for here, counts in imports.items() for to in counts])
    cycles = [sorted(part) for part in nx.strongly_connected_components(arrows) if len(part) > 1]
    print(f"{arrows.number_of_edges()} arrows between {len(modules)}; cycles: {cycles or 'none'}")


if __name__ == "__main__":
    main()
