"""A small real benchmark run: tiny-sdar decodes word problems in several ways.

Counts, tokens and drafts are those of the decodes. Seconds are invented from the positions (so that
nothing depends on the machine) and only have to look like seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import torch
from helpers import Oracle
from torch import Tensor

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, load_model
from spiffy.runtime.canvas import Cursor
from spiffy.runtime.decode import Task, run
from spiffy.runtime.draft import Candidates, Drafter
from spiffy.runtime.generate import (
    Output,
    answer_ids,
    collect,
    decoding_settings,
    graph_drafter,
    make_task,
)
from spiffy.schemas import CostPoint, CostProfile, DecodingSettings, DraftGraph
from spiffy.schemas.bench import (
    Acceptance,
    Bench,
    DataRecord,
    Draft,
    Interval,
    Machine,
    MethodKind,
    RankTally,
    Result,
    Split,
    Tally,
    Turn,
    Walkthrough,
)

PROMPTS = 3
BUDGETS = (1, 2, 4, 8)


@cache
def model() -> DiffusionLM:
    return load_model("tiny-sdar", device="cpu", dtype="float32")


@cache
def settings() -> DecodingSettings:
    return decoding_settings(model(), gen_length=64)


@cache
def artifact() -> DraftGraph:
    prompts = load_prompts("synthetic", 6, 0)
    traces = record(model(), prepare(model(), prompts, settings(), 0), 6, lambda done: None)
    graph = build_graph(model(), prompts, settings(), traces, 12)
    return graph.model_copy(update={"cost_profiles": (_profile(graph),)})


def _profile(graph: DraftGraph) -> CostProfile:
    def points(more: float) -> tuple[CostPoint, ...]:
        sizes = (0, 1, 2, 4, 8, 12)
        return tuple(CostPoint(drafts=n, seconds=0.004 + n * 2e-4 + (n > 0) * more) for n in sizes)

    return CostProfile(
        device="an invented CPU core",
        dtype="float32",
        points=points(0),
        turns={"graph": points(1e-4), "model": points(9e-4)},
        threads=1,
        model=graph.model.fingerprint,
        cache="block",
        policy="static",
    )


@dataclass
class Watched:
    """A drafter that remembers what it drafted where."""

    drafter: Drafter
    said: dict[int, tuple[Cursor, Candidates, Tensor]] = field(default_factory=dict)

    @property
    def token_ranks(self) -> int:
        return self.drafter.token_ranks

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        states = self.drafter(root, candidates, room)
        self.said[root.step] = root, candidates, states
        return states


@dataclass
class Decoded:
    """A decode and how many steps had been made after each of its forwards."""

    task: Task
    output: Output
    steps_after: list[int]

    @property
    def seconds(self) -> Split:
        stats = self.output.stats
        drafting = 1e-4 * stats.nfe if self.task.drafter else 0.0
        forward = 3e-3 * stats.nfe + 2e-5 * stats.positions_computed
        return Split(forward=forward, draft=drafting, verify=6e-4 * stats.steps, rest=2e-3)


def _decoded(prompt: str, drafter: Drafter | None) -> Decoded:
    watched = None if drafter is None else Watched(drafter)
    task = make_task(model(), prompt, settings(), watched)
    steps_after = []
    for _ in run(model(), [task]):
        steps_after.append(len(task.path))
    return Decoded(task, collect(task), steps_after)


def _fill(root: Tensor, state: Tensor) -> dict[int, int]:
    return {int(p): int(state[p]) for p in (root != state).nonzero()[:, 0]}


def _turns(decoded: Decoded) -> list[tuple[Cursor, Candidates | None, Tensor, list[Cursor]]]:
    """Per forward: its root, what was known there, its drafts, and the states it led to."""
    task = decoded.task
    start = task.canvas.start(task.prompt, model().mask_token_id)
    turns = []
    before = 0
    for after in decoded.steps_after:
        root = task.path[before - 1] if before else start
        said = task.drafter.said.get(before) if isinstance(task.drafter, Watched) else None
        _, candidates, drafts = said or (root, None, root.ids.new_empty((0, len(root.ids))))
        turns.append((root, candidates, drafts, task.path[before:after]))
        before = after
    return turns


def _accepted(drafts: Tensor, states: Sequence[Cursor]) -> list[bool]:
    return [any(torch.equal(draft, cursor.ids) for cursor in states[:-1]) for draft in drafts]


def _acceptance(decodes: Sequence[Decoded]) -> Acceptance:
    depths: defaultdict[int, list[bool]] = defaultdict(list)
    places: defaultdict[int, list[bool]] = defaultdict(list)
    ranks: defaultdict[tuple[int, int], list[bool]] = defaultdict(list)
    walks: Counter[int] = Counter()
    for decoded in decodes:
        for root, candidates, drafts, states in _turns(decoded):
            walks[len(states) - 1] += 1
            if candidates is None:
                continue
            start = decoded.task.canvas.span(root.block).start
            for draft, came_true in zip(drafts, _accepted(drafts, states), strict=True):
                fill = _fill(root.ids, draft)
                depths[len(fill) - 1].append(came_true)
                for position, token in fill.items():
                    places[position - start].append(came_true)
                    i = candidates.positions.tolist().index(position)
                    ranks[i, candidates.tokens[i].tolist().index(token)].append(came_true)

    def tallies(counts: dict[int, list[bool]]) -> tuple[Tally, ...]:
        return tuple(
            Tally(drafted=len(counts.get(k, [])), accepted=sum(counts.get(k, [])))
            for k in range(max(counts, default=-1) + 1)
        )

    return Acceptance(
        by_depth=tallies(depths),
        by_place=tallies(places),
        by_rank=tuple(
            RankTally(position_rank=i, token_rank=j, drafted=len(c), accepted=sum(c))
            for (i, j), c in sorted(ranks.items())
        ),
        walk_lengths=tuple(walks[k] for k in range(max(walks, default=-1) + 1)),
    )


def _result(
    name: str,
    kind: MethodKind,
    budget: int | None,
    decodes: Sequence[Decoded],
    plain: Sequence[Decoded],
    note: str = "",
) -> Result:
    ratios = sorted(p.seconds.total / d.seconds.total for p, d in zip(plain, decodes, strict=True))
    stats = [d.output.stats for d in decodes]
    tokens = sum(len(d.output.token_ids) for d in decodes)
    splits = [d.seconds for d in decodes]
    pairs = list(zip(plain, decodes, strict=True))
    return Result(
        name=name,
        kind=kind,
        budget=budget,
        note=note,
        nfe=sum(s.nfe for s in stats),
        positions_computed=sum(s.positions_computed for s in stats),
        steps=sum(s.steps for s in stats),
        drafted=sum(s.drafted for s in stats),
        accepted=sum(s.accepted for s in stats),
        tokens=tokens,
        tokens_per_second=tokens / sum(s.total for s in splits),
        speedup=Interval(value=median(ratios), low=ratios[0], high=ratios[-1]),
        seconds=Split(
            forward=sum(s.forward for s in splits),
            draft=sum(s.draft for s in splits),
            verify=sum(s.verify for s in splits),
            rest=sum(s.rest for s in splits),
        ),
        peak_bytes=700 * 2**20 + 2**18 * (budget or 0),
        compared=len(pairs),
        differing=sum(p.output.token_ids != d.output.token_ids for p, d in pairs),
        scored=len(pairs),
        correct=sum("#### " in d.output.text for d in decodes),
        acceptance=Acceptance() if kind in ("plain", "perfect") else _acceptance(decodes),
    )


def _walkthrough(method: str, prompt: str, decoded: Decoded, plain: Decoded) -> Walkthrough:
    def token(position: int, ids: Tensor) -> tuple[int, str]:
        return position, model().decode_text([int(ids[position])])

    task = decoded.task
    turns = []
    for root, _, drafts, states in _turns(decoded):
        fills = [_fill(root.ids, draft) for draft in drafts]
        known = [set[tuple[int, int]](), *(set(fill.items()) for fill in fills)]
        parents = []
        for fill in known[1:]:
            below = [k for k, other in enumerate(known) if other < fill]
            nearest = max(len(known[k]) for k in below)
            parents.append(tuple(k for k in below if len(known[k]) == nearest))
        steps, last = [], root.ids
        for cursor in states:
            steps.append(tuple(token(p, cursor.ids) for p in _fill(last, cursor.ids)))
            last = cursor.ids
        span = task.canvas.span(root.block)
        turns.append(
            Turn(
                block=root.block,
                span=(span.start, span.stop),
                drafts=tuple(
                    Draft(
                        fill=tuple(token(p, draft) for p in fill), parents=above, accepted=came_true
                    )
                    for fill, draft, above, came_true in zip(
                        fills, drafts, parents, _accepted(drafts, states), strict=True
                    )
                ),
                steps=tuple(steps),
                seconds=3e-3 + 2e-5 * span.step * len(span) * (1 + len(drafts)),
            )
        )
    return Walkthrough(
        prompt=prompt,
        method=method,
        answer_start=task.canvas.prompt_length,
        length=task.canvas.length,
        turns=tuple(turns),
        plain_nfe=plain.output.stats.nfe,
        text=model().decode_text(answer_ids(task)),
        prompt_tokens=tuple(model().decode_text([t]) for t in task.prompt.tolist()),
    )


@cache
def example_bench() -> Bench:
    """The run."""
    lm, graph = model(), artifact()
    texts = load_prompts("synthetic", PROMPTS, 0, split="test").texts
    plain = [_decoded(text, None) for text in texts]
    results = [_result("plain", "plain", None, plain, plain)]
    makers: dict[MethodKind, Callable[[int, Decoded], Drafter]] = {
        "graph": lambda n, _: graph_drafter(lm, graph, settings(), n, "graph"),
        "model": lambda n, _: graph_drafter(lm, graph, settings(), n, "model"),
        "perfect": lambda n, known: Oracle(known.task, n),
    }
    shown: tuple[str, list[Decoded]] = ("", [])
    for kind, make in makers.items():
        for budget in BUDGETS:
            drafters = [make(budget, known) for known in plain]
            decodes = [_decoded(*pair) for pair in zip(texts, drafters, strict=True)]
            results.append(_result(f"{kind} {budget}", kind, budget, decodes, plain))
            if (kind, budget) == ("model", 4):
                shown = results[-1].name, decodes
    note = "auto took the graph's first 4 nodes"
    four = [_decoded(t, graph_drafter(lm, graph, settings(), 4, "graph")) for t in texts]
    results.append(_result("auto", "auto", 4, four, plain, note))
    return Bench(
        command="spiffy-bench --graph sdar.json --samples 3 --out bench",
        machine=Machine(
            device="cpu (an invented core)",
            dtype="float32",
            threads=1,
            system="Linux x86-64",
            load=(0.4, 1.1),
            versions={"spiffy-dllm": "0.1.0", "torch": torch.__version__},
        ),
        model=graph.model,
        decoding=settings(),
        edges=("complete", "first", "fold"),
        graph_digest=graph.digest(),
        nodes=graph.nodes,
        roots=graph.calibration.roots,
        data=DataRecord(
            dataset="synthetic",
            sha256="0" * 64,
            samples=PROMPTS,
            left_out=0,
            seed=0,
            calibrated_on=0,
            warm_up=1,
            repeats=3,
        ),
        baseline="plain",
        results=tuple(results),
        profile=graph.cost_profiles[0],
        walkthrough=_walkthrough(shown[0], texts[0], shown[1][0], plain[0]),
    )
