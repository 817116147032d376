"""An artifact as a drafter."""

from __future__ import annotations

from spiffy.runtime.draft.acceptance import acceptance_of, acceptance_weights
from spiffy.runtime.draft.best_of import BestOfDrafter, Standing
from spiffy.runtime.draft.by_graph import GraphDrafter, confidence_chain
from spiffy.runtime.draft.by_model import AcceptanceDrafter
from spiffy.runtime.draft.candidates import Drafter, Selection
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.kept import KeptPerModule
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.records import MOST_UNASKED

_standings: KeptPerModule[tuple[DraftGraph, Standing]] = KeptPerModule()


def graph_drafter(
    model: DiffusionLM,
    graph: DraftGraph,
    settings: DecodingSettings,
    budget: int | None = None,
    selection: Selection = "model",
) -> Drafter:
    """An artifact as a drafter of up to `budget` drafts per forward (default: its nodes, or 128).

    With `selection="graph"` they are the first nodes. With "model" the artifact's acceptance model
    chooses them at run time, where it has one for this unmasking policy; but where the nodes, or a
    confidence chain, would have more drafts accepted, these are drafted (`BestOfDrafter`).

    Raises
    ------
    SpiffyError
        If the budget is not positive.
    """
    if budget is not None and budget < 1:
        raise SpiffyError(f"budget {budget}: must be at least 1; to draft nothing, use no graph")
    budget = budget or min(graph.budget, MOST_UNASKED)
    nodes = way_of(model, graph, settings, budget, "graph")
    if selection == "graph":
        return nodes
    chosen = way_of(model, graph, settings, budget, "model")
    chain = confidence_chain(min(budget, settings.block_length, MOST_UNASKED))
    ways = [nodes, GraphDrafter(chain, model)]
    return BestOfDrafter(ways if isinstance(chosen, GraphDrafter) else [chosen, *ways])


def lasting_drafter(
    model: DiffusionLM,
    graph: DraftGraph,
    settings: DecodingSettings,
    budget: int,
    selection: Selection = "model",
) -> Drafter:
    """`graph_drafter` for calls that make one each: it knows what those before it have learned."""
    drafter = graph_drafter(model, graph, settings, budget, selection)
    if isinstance(drafter, BestOfDrafter):
        same = settings.model_dump_json(exclude={"gen_length", "stop_at_eos"})
        key = (id(graph), same, budget)  # it holds on to the graph
        own = graph, drafter.standing
        _, drafter.standing = _standings.get(model.module, key, lambda: own)
    return drafter


def way_of(
    model: DiffusionLM,
    graph: DraftGraph,
    settings: DecodingSettings,
    budget: int,
    selection: Selection,
) -> Drafter:
    """One way alone: the acceptance model, where there is one for such steps, else the nodes."""
    acceptance = acceptance_of(graph) if selection == "model" else None
    if acceptance is not None and same_steps(graph, settings):
        weights = acceptance_weights(acceptance, model.vocab_size)
        return AcceptanceDrafter(weights, budget, model)
    return GraphDrafter([node.fill for node in graph.nodes[:budget]], model)


def same_steps(graph: DraftGraph, settings: DecodingSettings) -> bool:
    """Whether a denoising step commits what it did when the graph was calibrated."""
    calibrated = graph.decoding
    return (settings.policy, settings.tokens_per_step, settings.steps_per_block) == (
        calibrated.policy,
        calibrated.tokens_per_step,
        calibrated.steps_per_block,
    )
