"""`spiffy-graph`: look into draft graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text
from rich.tree import Tree

from spiffy.cli.common import VERSION_OPTION, console, run_app
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.io import read_json

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__
)
File = Annotated[Path, typer.Argument(help="Draft graph, as written by spiffy-calibrate.")]


@app.callback()
def _common(version: Annotated[bool, VERSION_OPTION] = False) -> None:
    """Look into draft graphs: print, check, describe the format."""


@app.command()
def show(file: File) -> None:
    """Print where a graph comes from and its nodes as a tree.

    A node is printed below its first parent, with what it fills in beyond it: "+2.0" is the best
    token (rank 0) at the third most confident position (rank 2).
    """
    graph = DraftGraph.load(file)
    record, settings = graph.calibration, graph.decoding
    console.print(
        f"{graph.model.id} ({graph.model.family}): {graph.budget} drafts, {settings.policy}, "
        f"cache {settings.cache}{'' if graph.exact else ' (near-lossless)'}, "
        f"block {settings.block_length}\n"
        f"grown on {record.roots} roots of {record.samples} prompts ({record.dataset}), "
        f"objective {record.objective}; digest {graph.digest()[:12]}",
        highlight=False,
        soft_wrap=True,
    )
    trees = [Tree(Text("root"))]
    for number, node in enumerate(graph.nodes, start=1):
        parent = node.parents[0]
        known = graph.nodes[parent - 1].fill if parent else ()
        fill = " ".join(f"+{i}.{j}" for i, j in node.fill if (i, j) not in known)
        share = f"{node.count / record.roots:.1%} of roots" if record.roots else ""
        also = f", also from {', '.join(map(str, node.parents[1:]))}" if node.parents[1:] else ""
        trees.append(trees[parent].add(Text(f"{number}: {fill}  ({share}{also})")))
    console.print(trees[0])


@app.command()
def validate(
    file: File,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also recompute what can be, and say what cannot.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="With --strict: where its prompts can be drawn from.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --strict: model that it should belong to.")
    ] = None,
) -> None:
    """Check an artifact completely; exit code 2 and one line if anything is wrong with it."""
    graph = DraftGraph.load(file)
    if (dataset is not None or model is not None) and not strict:
        raise SpiffyError("--dataset and --model are compared by --strict: give that too")
    if strict:
        _audit(file, graph, dataset, model)
    console.print(f"{file}: valid, {graph.budget} drafts, digest {graph.digest()}", soft_wrap=True)


def _audit(file: Path, graph: DraftGraph, dataset: str | None, model: str | None) -> None:
    from spiffy.calib.audit import audit

    lm = None
    if model is not None:
        from spiffy.runtime import load_model

        lm = load_model(model, device="cpu")
    found = audit(graph, read_json(file).get("digest"), dataset, lm)
    if found.wrong:
        more = f" (and {len(found.wrong) - 1} more)" if found.wrong[1:] else ""
        raise SpiffyError(f"{file}: {found.wrong[0]}{more}")
    console.print(f"checked: {', '.join(found.checked)}", highlight=False, soft_wrap=True)
    for line in found.unchecked:
        console.print(f"not checked: {line}", highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the artifact."""
    typer.echo(json.dumps(DraftGraph.json_schema(), indent=2, sort_keys=True))


def main() -> None:
    """Entry point of `spiffy-graph`."""
    run_app(app)


if __name__ == "__main__":
    main()
