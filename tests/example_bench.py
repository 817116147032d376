"""A small real benchmark run: tiny-sdar decodes two word problems in every way there is."""

from __future__ import annotations

from functools import cache
from itertools import islice

from spiffy.bench.measure import machine, measure, results, walkthrough
from spiffy.bench.methods import KINDS, methods
from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import problems
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.schemas import CostPoint, CostProfile, DraftGraph, Objective
from spiffy.schemas.bench import Bench, DataRecord, Interval, Result

PROMPTS = 2
BUDGETS = (1, 4)


@cache
def _model() -> DiffusionLM:
    return load_model("tiny-sdar", device="cpu", dtype="float32")


@cache
def example_graph(objective: Objective = "expected-steps") -> DraftGraph:
    """An artifact for up to 12 drafts, with a cost profile of an invented machine."""
    model, prompts = _model(), load_prompts("synthetic", 6)
    settings = decoding_settings(model, gen_length=48)
    traces = record(model, prepare(model, prompts, settings))
    graph = build_graph(model, prompts, settings, traces, 12, objective=objective)
    return graph.model_copy(update={"cost_profiles": (_profile(graph),)})


def _profile(graph: DraftGraph) -> CostProfile:
    def points(more: float) -> tuple[CostPoint, ...]:
        return tuple(
            CostPoint(drafts=n, seconds=0.004 + n * 2e-4 + (n > 0) * more)
            for n in (0, 1, 2, 4, 8, 12)
        )

    return CostProfile(
        device="an invented core",
        dtype="float32",
        points=points(0),
        turns={"graph": points(1e-4), "model": points(9e-4)},
        threads=1,
        model=graph.model.fingerprint,
    )


@cache
def example_bench() -> Bench:
    """The run; "auto" is left out, which would measure this machine, and invented instead."""
    model, graph = _model(), example_graph()
    settings = decoding_settings(model, graph)
    unseen = list(islice(problems("test"), PROMPTS))
    texts = [problem.question for problem in unseen]
    kinds = [kind for kind in KINDS if kind != "auto"]
    found = methods(model, settings, graph, kinds, BUDGETS, example_graph("paper"), texts)
    records = [{"answer": problem.answer} for problem in unseen]
    measured = measure(model, found, texts, records, repeats=1, warm_up=0)
    rows = list(results(found, measured))
    rows.append(_auto(next(row for row in rows if row.name == "graph 4")))
    return Bench(
        command="spiffy-bench --graph sdar.json --paper paper.json --samples 2 --out bench",
        machine=machine(model, 0.5),
        model=graph.model,
        decoding=settings,
        edges=("complete", "first", "fold"),
        graph_digest=graph.digest(),
        nodes=graph.nodes,
        roots=graph.calibration.roots,
        data=DataRecord(
            dataset="synthetic",
            sha256=load_prompts("synthetic", PROMPTS, split="test").sha256,
            samples=PROMPTS,
            left_out=0,
            seed=0,
            calibrated_on=0,
            warm_up=0,
            repeats=1,
        ),
        baseline=found[0].name,
        results=tuple(rows),
        profile=graph.cost_profiles[0],
        walkthrough=walkthrough(model, found[0], texts[0], measured),
    )


def _auto(like: Result) -> Result:
    note = "chose up to 4 drafts by the graph, predicted 1.70x"
    speedup = Interval(value=1.7, low=1.6, high=1.8)
    return like.model_copy(
        update={"name": "auto", "kind": "auto", "note": note, "speedup": speedup}
    )
