"""Draft graphs in the formats of other graph tools, as networkx writes them."""

from __future__ import annotations

import json

import networkx as nx

from spiffy.schemas import DraftGraph
from spiffy.schemas.labels import beyond_parent, written
from spiffy.schemas.records import ExportFormat


def exported(artifact: DraftGraph, to: ExportFormat) -> str:
    """The nodes of an artifact as GraphML, DOT or networkx's node-link JSON.

    Fills are written "+position rank.token rank ..." where a format knows no lists (GraphML, DOT);
    DOT labels every node by what it fills in beyond its first parent.
    """
    graph = artifact.to_networkx()
    if to == "json":
        return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1) + "\n"
    for number, facts in graph.nodes(data=True):
        facts["fill"] = written(facts["fill"])
        if to == "dot":
            facts["label"] = beyond_parent(artifact.nodes, number) if number else "root"
    if to == "graphml":
        return "\n".join(nx.generate_graphml(graph)) + "\n"
    return str(nx.nx_pydot.to_pydot(graph).to_string())
