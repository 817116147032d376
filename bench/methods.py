"""Every way of decoding that is measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spiffy.bench.order import OrderNetwork, check_fits
from spiffy.bench.order_drafter import OrderDrafter
from spiffy.runtime import BlockEdges, DiffusionLM
from spiffy.runtime.budget.auto import auto_budget
from spiffy.runtime.decode import Adviser, make_task, median_task
from spiffy.runtime.draft import (
    Candidates,
    Drafter,
    GeometricMeanDrafter,
    GraphDrafter,
    confidence_chain,
    graph_drafter,
)
from spiffy.runtime.draft.acceptance import acceptance_of
from spiffy.runtime.forward.cache import NO_EDGES
from spiffy.runtime.models.text import Prompt
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.bench import MethodKind

#: Caches with which edges change what a decode costs.
_WITH_EDGES = ("none", "block")

KINDS: tuple[MethodKind, ...] = (
    "plain",
    "freedave",
    "chain",
    "paper",
    "pruned",
    "graph",
    "model",
    "order",
    "auto",
    "perfect",
)

#: From the path of plain decoding to a drafter: only "perfect" looks at it.
MakeDrafter = Callable[[Sequence[Cursor]], Drafter | None]


@dataclass(frozen=True)
class Method:
    """One way of decoding; see `spiffy.schemas.bench.Result` for the fields.

    Attributes
    ----------
    edges
        What may happen at block edges, if that is not what the run says.
    """

    name: str
    kind: MethodKind
    settings: DecodingSettings
    drafter: MakeDrafter
    budget: int | None = None
    adviser: Adviser | None = None
    edges: BlockEdges | None = None


class PerfectDrafter:
    """Drafts the next `budget` true states: what no drafting can beat.

    Parameters
    ----------
    path
        The states of plain decoding, one per denoising step.
    """

    token_ranks = 1
    asks_rejected = False

    def __init__(self, path: Sequence[Cursor], budget: int) -> None:
        self.path = path
        self.budget = budget

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `spiffy.runtime.draft.Drafter`; ends with the root's block or the answer."""
        future = []
        for state in self.path[root.step : root.step + self.budget]:
            filled = (state.ids != root.ids).nonzero()[:, 0]
            if (
                state.finished
                or len(filled) > room
                or not torch.isin(filled, candidates.positions).all()
            ):
                break
            future.append(state.ids)
        return torch.stack(future) if future else root.ids.new_empty((0, len(root.ids)))


def methods(
    model: DiffusionLM,
    settings: DecodingSettings,
    graph: DraftGraph,
    kinds: Sequence[MethodKind],
    budgets: Sequence[int],
    paper: DraftGraph | None = None,
    prompts: Sequence[Prompt] = (),
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    any_model: bool = False,
    order: OrderNetwork | None = None,
    order_of: str | None = None,
) -> list[Method]:
    """All methods of the given kinds, in the order in which they are shown.

    The first is plain decoding under `settings`, the baseline; plain decoding by the other of the
    two common policies follows for reference. So does plain decoding without block edges, where
    "freedave" is measured, which has none. Kinds that cannot be had are left out: "paper" and
    "pruned" without a graph grown by the paper's rule (or with more drafts than that has nodes),
    "model" without an acceptance model, "order" without a network; and "freedave" where it is what
    "chain" is.

    Parameters
    ----------
    prompts
        Costs for "auto" are measured behind the one of median length.
    any_model
        Take a paper's graph, or an order network, of another model of the family.
    order_of
        Fingerprint of the model that the network has to be trained on (default: this one's).

    Raises
    ------
    SpiffyError
        If a budget exceeds the graph, or the paper's graph or the network belongs to another model.
    """
    if over := [n for n in budgets if not 1 <= n <= graph.budget]:
        raise SpiffyError(f"--budgets {over[0]}: the graph holds 1 to {graph.budget} drafts")
    if paper is not None:
        paper.check_fits(model.family.name, model.fingerprint, model.vocab_size, any_model)
    if order is not None:
        of = order_of or model.fingerprint
        check_fits(order.shape, settings, None if any_model else of)

    def fixed(drafter: Drafter | None) -> MakeDrafter:
        return lambda path: drafter

    found = [Method(f"plain {settings.policy}", "plain", settings, fixed(None))]
    if "plain" in kinds:
        other = settings.model_copy(
            update={"policy": "static" if settings.policy == "threshold" else "threshold"}
        )
        found.append(Method(f"plain {other.policy}", "plain", other, fixed(None)))

    def add(
        kind: MethodKind, budget: int, drafter: MakeDrafter, own: BlockEdges | None = None
    ) -> None:
        if kind in kinds:
            name = f"{kind} {budget}"
            found.append(Method(name, kind, settings, drafter, budget, edges=own))

    own_edges = settings.cache in _WITH_EDGES and edges != NO_EDGES
    if own_edges and "freedave" in kinds:  # what to hold it against, besides ours
        name = f"{found[0].name}, no edges"
        found.append(Method(name, "plain", settings, fixed(None), edges=NO_EDGES))
    for n in budgets if own_edges else ():
        # Its own loop drafts inside a block, and spends a forward on storing it.
        add("freedave", n, fixed(GraphDrafter(confidence_chain(n), model)), NO_EDGES)
    for n in budgets:
        add("chain", n, fixed(GraphDrafter(confidence_chain(n), model)))
    if paper is not None:
        for n in (n for n in budgets if n <= paper.budget):
            nodes = [node.fill for node in paper.nodes[:n]]
            add("paper", n, fixed(GraphDrafter(nodes, model)))
        for n in budgets:
            if n < paper.budget:
                add("pruned", n, fixed(GeometricMeanDrafter(paper.nodes, model, n)))
    for n in budgets:
        add("graph", n, fixed(graph_drafter(model, graph, settings, n, "graph")))
    if acceptance_of(graph) is not None:
        for n in budgets:
            add("model", n, fixed(graph_drafter(model, graph, settings, n, "model")))
    if order is not None:
        for n in budgets:
            add("order", n, fixed(OrderDrafter(order, n, model)))
    if "auto" in kinds:
        tasks = (make_task(model, prompt, settings, edges=edges) for prompt in prompts)
        adviser = auto_budget(median_task(tasks), graph)
        found.append(Method("auto", "auto", settings, fixed(None), adviser=adviser))
    for n in budgets:
        add("perfect", n, lambda path, n=n: PerfectDrafter(path, n))  # type: ignore[misc]
    return found


def to_step_through(methods: Sequence[Method]) -> Method:
    """Of those that draft, the best chosen with up to 8 drafts: more cannot be looked at.

    Where all have more, of those that have fewest; "auto" only where there is no other.
    """
    order = ["model", "graph", "pruned", "paper", "order", "chain", "freedave", "perfect", "auto"]
    most = max(8, min((method.budget for method in methods if method.budget), default=8))
    small = [method for method in methods if method.budget and method.budget <= most]
    return min(small or methods, key=lambda m: ([*order, "plain"].index(m.kind), -(m.budget or 0)))
