"""`spiffy-graph`: look into draft graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spiffy.cli.common import console, log, run_app
from spiffy.cli.options import VersionOption
from spiffy.cli.streams import write_utf8
from spiffy.schemas import CostProfile, DraftGraph, SpiffyError
from spiffy.schemas.errors import printable
from spiffy.schemas.hub import graph_file
from spiffy.schemas.io import check_writable, read_json, write_atomically
from spiffy.schemas.labels import (
    acceptance_in_words,
    beyond_parent,
    device_in_words,
    shown_budgets,
)
from spiffy.schemas.records import ExportFormat

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Look into draft graphs: print, compare, draw, check, publish, describe the format.\n\n"
    "Examples: spiffy-graph show llada.json; spiffy-graph diff old.json new.json; spiffy-graph "
    "plot llada.json --out graph.html",
)
File = Annotated[
    str,
    typer.Argument(
        help="Draft graph, as written by spiffy-calibrate: a file, or a folder or hub id "
        "(owner/name) that has draft_graph.json."
    ),
]


@app.callback()
def _common(version: VersionOption = False) -> None:
    """Look into draft graphs: print, compare, draw, check, describe the format."""


def _put(text: str, out: Path | None, source: str) -> None:
    """Write what was made of a graph to a file, or to standard output."""
    if out is None:
        write_utf8(text)
        return
    check_writable(out)
    if out.resolve() == graph_file(source).resolve():
        raise SpiffyError(f"--out {out}: that is the graph itself, which took hours to make")
    write_atomically(out, text)
    log.print(f"wrote {out}", soft_wrap=True)


@app.command()
def show(file: File) -> None:
    """Print where a graph comes from, its nodes as a tree, its acceptance model and costs.

    A node is printed below its first parent, with what it fills in beyond it: "+2.0" is the best
    token (rank 0) at the third most confident position (rank 2). Then come its calibration roots,
    what it adds to the expected steps per forward, and other nodes that lead to it.
    """
    graph = DraftGraph.find(file)
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
    console.print("\n".join(_tree(graph)), highlight=False, soft_wrap=True)
    shared = sum(len(node.parents) > 1 for node in graph.nodes)
    lines = [f"{shared} of {graph.budget} nodes are shared: several nodes lead to them"]
    if graph.expected_steps:
        shown = shown_budgets(graph.budget)
        steps = ", ".join(f"{n}: {graph.expected_steps[n]:.2f}" for n in shown)
        lines.append(f"expected steps per forward at drafts {steps}")
    lines += [_acceptance_line(graph), *map(_profile_line, graph.cost_profiles)]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _tree(graph: DraftGraph) -> list[str]:
    """A line for every node, however deep: in a width it would run out of columns."""
    below: dict[int, list[int]] = {}
    for number, node in enumerate(graph.nodes, start=1):
        below.setdefault(node.parents[0], []).append(number)
    lines, left = ["root"], [(number, "") for number in reversed(below.get(0, []))]
    plain = console.options.ascii_only
    while left:
        number, before = left.pop()
        last = below[graph.nodes[number - 1].parents[0]][-1] == number
        fork = ("`-- " if last else "+-- ") if plain else ("└── " if last else "├── ")
        lines.append(f"{before}{fork}{_node_line(graph, number)}")
        before += "    " if last else ("|   " if plain else "│   ")
        left += [(child, before) for child in reversed(below.get(number, []))]
    return lines


def _node_line(graph: DraftGraph, number: int) -> str:
    node = graph.nodes[number - 1]
    facts = [f"{node.count} roots"]
    if graph.calibration.roots:
        facts = [f"{node.count} roots, {node.count / graph.calibration.roots:.1%}"]
    if graph.expected_steps:
        gain = graph.expected_steps[number] - graph.expected_steps[number - 1]
        facts.append(f"{gain:+.3f} steps")
    if node.parents[1:]:
        facts.append(f"also from {', '.join(map(str, node.parents[1:]))}")
    return f"{number}: {beyond_parent(graph.nodes, number)}  ({'; '.join(facts)})"


def _acceptance_line(graph: DraftGraph) -> str:
    model = graph.acceptance
    line = f"acceptance model: {acceptance_in_words(model)}"
    if model is not None and model.expected_steps:
        steps = ", ".join(f"{p.drafts}: {p.steps:.2f}" for p in model.expected_steps if p.drafts)
        line += f"; expected steps at drafts {steps}"
    return line


def _profile_line(profile: CostProfile) -> str:
    first, last = profile.points[0], profile.points[-1]
    where = device_in_words(profile.device, profile.dtype, profile.threads)
    return (
        f"cost profile: {where}: {1000 * first.seconds:.3g} ms plain, "
        f"{1000 * last.seconds:.3g} ms with {last.drafts} drafts"
    )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="FIRST", help="Draft graph.")],
    b: Annotated[str, typer.Argument(metavar="SECOND", help="Another one.")],
) -> None:
    """Say in words what changed from one artifact to another; exit code 1 if anything did.

    Cost profiles are not compared: they belong to machines. A node counts as moved if its rank
    among the common nodes changed.
    """
    from spiffy.graphs.diff import differences

    lines = differences(DraftGraph.find(a), DraftGraph.find(b))
    console.print("\n".join(lines or ["no differences"]), highlight=False, soft_wrap=True)
    if lines:
        raise typer.Exit(1)


@app.command()
def plot(
    file: File,
    out: Annotated[
        Path, typer.Option(help="graph.svg or graph.png: the drawing; graph.html: a report.")
    ],
) -> None:
    """Draw a graph, or write a report about the whole artifact (needs the extra "report")."""
    kind = out.suffix.lower().lstrip(".")
    if kind not in ("svg", "png", "html"):
        raise SpiffyError(f"--out {out}: give a file name that ends in .svg, .png or .html")
    graph = DraftGraph.find(file)
    check_writable(out)
    from spiffy.bench.report import graph_picture, write_calibration_report

    if kind == "html":
        write_calibration_report(graph, out)
    else:
        write_atomically(out, graph_picture(graph).file(kind))
    log.print(f"wrote {out}", soft_wrap=True)


@app.command()
def export(
    file: File,
    format: Annotated[
        ExportFormat,
        typer.Option(help="graphml (Gephi, yEd), dot (Graphviz), json (networkx node-link data)."),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: print it.")] = None,
) -> None:
    """Write the nodes for graph tools: node 0 is the root, an edge is one denoising step.

    Nodes carry fill, count and expected_gain; the same as DraftGraph.to_networkx() in Python.
    """
    from spiffy.graphs.export import exported

    _put(exported(DraftGraph.find(file), format), out, file)


@app.command()
def validate(
    file: File,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also recompute what can be, and say what cannot.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="With --strict: where its prompts can be drawn from.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="With --dataset: field or column that holds the prompt.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --strict: model that it should belong to.")
    ] = None,
) -> None:
    """Check an artifact completely; exit code 2 and one line if anything is wrong with it."""
    graph = DraftGraph.find(file)
    if (dataset is not None or model is not None) and not strict:
        raise SpiffyError("--dataset and --model are compared by --strict: give that too")
    if field is not None and dataset is None:
        raise SpiffyError(f"--field {field} is one of --dataset: give that too")
    if strict:
        _audit(file, graph, dataset, model, field)
    console.print(f"{file}: valid, {graph.budget} drafts, digest {graph.digest()}", soft_wrap=True)


def _audit(
    file: str, graph: DraftGraph, dataset: str | None, model: str | None, field: str | None
) -> None:
    from spiffy.calib.audit import audit

    lm = None
    if model is not None:
        from spiffy.runtime import load_model

        lm = load_model(model, device="meta")  # no weights: nothing here asks for them
    found = audit(graph, read_json(graph_file(file)).get("digest"), dataset, lm, field)
    if found.wrong:
        more = f" (and {len(found.wrong) - 1} more)" if found.wrong[1:] else ""
        raise SpiffyError(f"{file}: {found.wrong[0]}{more}")
    console.print(f"checked: {', '.join(found.checked)}", highlight=False, soft_wrap=True)
    for line in found.unchecked:
        console.print(f"not checked: {line}", highlight=False, soft_wrap=True)


@app.command()
def card(
    file: File,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: print it.")] = None,
) -> None:
    """Write a model card for the hub: Markdown with front matter, and what was measured."""
    from spiffy.integrations.hub import card as card_of

    _put(card_of(DraftGraph.find(file)), out, file)


@app.command()
def push(
    file: File,
    repo: Annotated[str, typer.Argument(help="Repository on the hub: owner/name.")],
    beside_weights: Annotated[
        bool,
        typer.Option(
            "--beside-weights",
            help="The repository is the model's: its card gets a part about the graph, and the "
            "folder custom_generate lets transformers decode with it.",
        ),
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that is not there yet private.")
    ] = False,
) -> None:
    """Put a graph and its card on the hub, in one commit.

    The repository is the graph's own and is made if there is none, unless --beside-weights says
    that it is the model's. Then `--graph owner/name` finds the graph.
    """
    from spiffy.integrations.hub import push as push_to

    graph = DraftGraph.find(file)
    address = push_to(graph, repo, weights_there=beside_weights, private=private)
    console.print(printable(address), highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the artifact."""
    write_utf8(json.dumps(DraftGraph.json_schema(), indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Entry point of `spiffy-graph`."""
    run_app(app)


if __name__ == "__main__":
    main()
