"""Draft graphs for networkx and other graph tools."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest
from example_bench import example_graph
from typer.testing import CliRunner

from spiffy.cli.graph import app
from spiffy.graphs.export import exported
from spiffy.schemas import DraftGraph


@pytest.fixture(scope="module")
def artifact() -> DraftGraph:
    return example_graph()


def test_node_zero_is_the_root_and_edges_are_the_parents(artifact: DraftGraph) -> None:
    graph = artifact.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.descendants(graph, 0) == set(range(1, artifact.budget + 1))
    assert graph.nodes[0] == {"fill": (), "count": artifact.calibration.roots}
    for number, node in enumerate(artifact.nodes, start=1):
        assert sorted(graph.predecessors(number)) == sorted(node.parents)
        assert graph.nodes[number]["fill"] == node.fill
        assert graph.nodes[number]["count"] == node.count
    gains = [graph.nodes[k]["expected_gain"] for k in range(1, artifact.budget + 1)]
    assert 1 + sum(gains) == pytest.approx(artifact.expected_steps[-1], abs=1e-4)


def test_networkx_reads_back_what_is_exported(artifact: DraftGraph) -> None:
    graph = artifact.to_networkx()
    graphml = nx.parse_graphml(exported(artifact, "graphml"), node_type=int)
    node_link = nx.node_link_graph(json.loads(exported(artifact, "json")), edges="edges")
    for back in (graphml, node_link):
        assert set(back.edges) == set(graph.edges)
        assert [back.nodes[k]["count"] for k in graph] == [graph.nodes[k]["count"] for k in graph]
    assert [tuple(map(tuple, node_link.nodes[k]["fill"])) for k in graph] == [
        graph.nodes[k]["fill"] for k in graph
    ]
    dot = exported(artifact, "dot")
    for parent, child in graph.edges:
        assert f"{parent} -> {child}" in dot


@pytest.mark.parametrize("form", ["graphml", "dot", "json"])
def test_the_command_prints_or_writes(artifact: DraftGraph, form: str, tmp_path: Path) -> None:
    source, out = tmp_path / "graph.json", tmp_path / f"drawn.{form}"
    artifact.save(source)
    printed = CliRunner().invoke(app, ["export", str(source), "--format", form])
    assert (printed.exit_code, printed.stdout) == (0, exported(artifact, form))  # type: ignore[arg-type]
    written = CliRunner().invoke(app, ["export", str(source), "--format", form, "--out", str(out)])
    assert written.exit_code == 0
    assert out.read_text() == printed.stdout
