"""What notebooks show: answers, graphs, benchmarks and decodes; nothing foreign is markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import a_graph_of, parity_model

from spiffy.bench.watch import step_through
from spiffy.runtime import generate
from spiffy.runtime.decode import Stats
from spiffy.runtime.generate import Output
from spiffy.schemas import DraftGraph, Node
from spiffy.schemas.bench import (
    Bench,
    DataRecord,
    Draft,
    Interval,
    Machine,
    Result,
    Split,
    Turn,
    Walkthrough,
)
from spiffy.schemas.drawing import layout, svg
from spiffy.schemas.html import visible

HOSTILE = '<script>alert(1)</script><img src=x onerror=y>&amp;"$x^2$"\u202e\x07'


class Seen(HTMLParser):
    """Elements that a browser would make, their attributes, and the text that it would show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def a_graph() -> DraftGraph:
    return a_graph_of(parity_model("llada-a"))


def a_result(name: str, nfe: int, **fields: Any) -> Result:
    counts = dict.fromkeys(("drafted", "accepted", "tokens"), 7)
    return Result(
        name=name,
        kind="plain",
        nfe=nfe,
        positions_computed=6 * nfe,
        steps=4321,
        tokens_per_second=12.34,
        speedup=Interval(value=1.75, low=1.5, high=2.0),
        seconds=Split(forward=1.0, draft=0.0, verify=0.0, rest=0.0),
        **{"compared": 5, "differing": 1, **counts, **fields},
    )


def a_bench() -> Bench:
    graph = a_graph()
    digests = {"sha256": "0" * 64, "left_out": 0, "seed": 0, "calibrated_on": 0}
    return Bench(
        command="spiffy-bench",
        machine=Machine(
            device="a core", dtype="float32", threads=1, system="any", load=None, versions={}
        ),
        model=graph.model,
        decoding=graph.decoding,
        edges=(),
        graph_digest=graph.digest(),
        nodes=graph.nodes,
        roots=4,
        data=DataRecord(dataset="problems", samples=5, warm_up=0, repeats=1, **digests),
        baseline="plain",
        results=(a_result("plain", 4321), a_result("graph 3", 1234)),
    )


def shown(thing: object) -> Seen:
    return Seen(thing._repr_html_())  # type: ignore[attr-defined]


def test_an_answer_comes_with_what_it_cost() -> None:
    model = parity_model("llada-a")
    out = generate(model, [5, 6, 7], graph=a_graph_of(model, stop_at_eos=False), budget=2)
    text = shown(out).text
    for name, value in (
        ("forwards (NFE)", out.stats.nfe),
        ("positions computed", out.stats.positions_computed),
        ("drafts accepted", f"{out.stats.accepted} of {out.stats.drafted}"),
    ):
        assert f"{name}{value}" in text
    assert text.startswith(" ".join(map(str, out.token_ids)))  # it has no tokenizer


def test_a_graph_is_drawn_and_a_bench_is_a_table() -> None:
    graph = a_graph()
    seen = shown(graph)
    assert seen.elements.count("circle") == graph.budget
    assert seen.elements.count("line") == sum(len(node.parents) for node in graph.nodes)
    assert "expected steps per forward1.502.002.25" in seen.text
    text = shown(a_bench()).text
    assert "plain4,3211.00x1.0012.31" in text
    assert "graph 31,234 (3.50x fewer)0.29x3.5012.31.75x4 of 5" in text


def test_a_decode_can_be_stepped_through() -> None:
    model = parity_model("sdar-a")
    graph = a_graph_of(model, block_length=4, stop_at_eos=False)
    plain = generate(model, [5, 6, 7, 8, 9], graph=graph, budget=1, selection="graph")
    walk = step_through(model, [5, 6, 7, 8, 9], graph, budget=1)
    assert len(walk.turns) == plain.stats.nfe
    committed = {p: text for turn in walk.turns for step in turn.steps for p, text in step}
    assert [committed[5 + k] for k in range(8)] == [f"<{token}>" for token in plain.token_ids]
    seen = shown(walk)
    assert seen.elements.count("details") == len(walk.turns)
    assert seen.text.count("accepted") >= len(walk.turns)
    assert f"where plain decoding takes {walk.plain_nfe}" in seen.text


@pytest.mark.parametrize("kind", ["output", "graph", "bench", "walkthrough"])
def test_what_others_wrote_is_text(kind: str) -> None:
    graph, bench = a_graph(), a_bench()
    draft = Draft(fill=((3, HOSTILE),), parents=(0,), accepted=True)
    turn = Turn(block=0, span=(2, 5), drafts=(draft,), steps=(((3, HOSTILE),),), seconds=0.1)
    walk = Walkthrough(
        prompt=HOSTILE,
        method=HOSTILE,
        answer_start=3,
        length=5,
        turns=(turn,),
        plain_nfe=4,
        text=HOSTILE,
        prompt_tokens=(HOSTILE,),
    )
    named = graph.model.model_copy(update={"id": HOSTILE, "family": HOSTILE})
    data = bench.data.model_copy(update={"dataset": HOSTILE})
    first = bench.results[0].model_copy(update={"name": HOSTILE})
    things = {
        "output": Output(HOSTILE, [1], Stats(nfe=1, budgets={HOSTILE: 1})),
        "graph": graph.model_copy(update={"model": named}),
        "bench": bench.model_copy(
            update={"model": named, "data": data, "results": (first,), "baseline": HOSTILE}
        ),
        "walkthrough": walk,
    }
    html = things[kind]._repr_html_()  # type: ignore[attr-defined]
    seen = Seen(html)
    assert "alert(1)" in seen.text
    assert not {"script", "img"} & set(seen.elements)
    assert not {"onerror", "src"} & seen.attributes
    assert "$x" not in html
    assert not re.search("[\u202e\x07]", html)


def test_every_node_has_a_place_of_its_own_right_of_its_parents() -> None:
    """Its picture is XML, whatever the graph; only a part of a large one is drawn."""
    nodes = a_graph().nodes
    places, edges = layout(nodes)
    assert len(set(places)) == len(nodes) + 1
    assert all(places[parent][0] < places[child][0] for parent, child, _ in edges)
    assert all(ElementTree.fromstring(svg(nodes, roots)).tag.endswith("svg") for roots in (0, 5))
    many = [Node(fill=((k, 0),), parents=(0,), count=0) for k in range(300)]
    drawn = ElementTree.fromstring(svg(many, 0))
    heights = [float(c.attrib["cy"]) for c in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(heights) == 128
    assert drawn.attrib["aria-label"] == "Draft graph, the first 128 of 300 nodes"
    whole = ElementTree.fromstring(svg(many[:128], 0))
    assert whole.attrib["aria-label"] == "Draft graph, 128 nodes"
    assert all(below > above for above, below in pairwise(heights))
    assert visible("") != ""
