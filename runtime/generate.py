"""The public entry points of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spiffy.runtime.acceptance import AcceptanceWeights, acceptance_of
from spiffy.runtime.auto import (
    Pays,
    Plan,
    best_plan,
    expected_steps,
    forward_seconds,
)
from spiffy.runtime.cache import BlockEdges, most_drafts
from spiffy.runtime.canvas import Canvas
from spiffy.runtime.cost import cost_profile
from spiffy.runtime.decode import Stats, Task, run
from spiffy.runtime.draft import AcceptanceDrafter, Drafter, GraphDrafter, Selection
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import AcceptanceModel, CostProfile, DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.graph import MOST_UNASKED


@dataclass
class Output:
    """One decoded answer.

    Attributes
    ----------
    text, token_ids
        The answer up to and with its first end-of-sequence token (which the text leaves out).
    stats
        What it cost.
    states
        With `trace=True`: the whole sequence (prompt and answer ids) after every denoising step.
    """

    text: str
    token_ids: list[int]
    stats: Stats
    states: list[list[int]] = field(default_factory=list)


def decoding_settings(
    model: DiffusionLM, graph: DraftGraph | None = None, **options: Any
) -> DecodingSettings:
    """Settings for a model: the given options, then the graph's, then the family's defaults.

    Raises
    ------
    SpiffyError
        If an option is unknown or invalid, or the family cannot decode that way.
    """
    if graph is not None:
        graph.check_fits(model.family.name, model.fingerprint, model.vocab_size)
        base = graph.decoding.model_dump()
    else:
        base = {"block_length": model.default_block_length, "cache": model.family.caches[0]}
    given = {key: value for key, value in options.items() if value is not None}
    if "tokens_per_step" in given:  # the graph's other way of saying the same gives way
        base["steps_per_block"] = None
    settings = DecodingSettings.parse(**{**base, **given})
    if settings.cache not in model.family.caches:
        known = ", ".join(model.family.caches)
        raise SpiffyError(f"{model.family.name} has no cache {settings.cache!r}: choose {known}")
    return settings


def make_task(
    model: DiffusionLM,
    prompt: str | Tensor,
    settings: DecodingSettings,
    drafter: Drafter | None = None,
    seed: int = 0,
    sequence: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
) -> Task:
    """Prepare the decoding of one prompt (text, or int64 [length] ids).

    Raises
    ------
    SpiffyError
        If the prompt is empty, holds ids outside the vocabulary, or leaves no room for the answer.
    """
    ids = model.encode(prompt) if isinstance(prompt, str) else torch.as_tensor(prompt)
    if ids.dim() != 1 or not len(ids) or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise SpiffyError(
            f"prompt ids must be a non-empty 1-D tensor of integers, got {ids.dtype} of shape "
            f"{[*ids.shape]}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size:
        raise SpiffyError(f"prompt ids must lie in [0, {model.vocab_size})")
    canvas = Canvas.plan(
        len(ids), settings.gen_length, settings.block_length, model.family.block_causal
    )
    if model.max_length is not None and canvas.length > model.max_length:
        raise SpiffyError(
            f"prompt of {len(ids)} tokens plus gen_length {settings.gen_length} exceeds the "
            f"{model.max_length} positions of {model.name}: shorten the prompt or gen_length"
        )
    return Task(
        model,
        settings,
        canvas,
        ids.to(model.device, torch.long),
        seed,
        sequence,
        drafter,
        edges,
        most_drafts(settings, canvas),
    )


def acceptance_weights(acceptance: AcceptanceModel, vocab: int) -> AcceptanceWeights:
    """The artifact's acceptance model as arrays."""
    return AcceptanceWeights.of(
        acceptance.position, acceptance.commit, acceptance.token, acceptance.bigrams, vocab
    )


def graph_drafter(
    model: DiffusionLM,
    graph: DraftGraph,
    settings: DecodingSettings,
    budget: int | None = None,
    selection: Selection = "model",
) -> Drafter:
    """An artifact as a drafter of up to `budget` drafts per forward (default: its nodes, or 128).

    With `selection="model"` the artifact's acceptance model chooses the drafts at run time, where
    it has one for this unmasking policy; otherwise, and with "graph", they are the first nodes.

    Raises
    ------
    SpiffyError
        If the budget is not positive.
    """
    if budget is not None and budget < 1:
        raise SpiffyError(f"budget {budget}: must be at least 1; to draft nothing, use no graph")
    budget = budget or min(graph.budget, MOST_UNASKED)
    acceptance = acceptance_of(graph) if selection == "model" else None
    if acceptance is not None and _same_steps(graph, settings):
        weights = acceptance_weights(acceptance, model.vocab_size)
        return AcceptanceDrafter(weights, budget, model)
    return GraphDrafter([node.fill for node in graph.nodes[:budget]], model)


def auto_drafter(
    task: Task, graph: DraftGraph, selection: Selection = "model", remeasure: bool = False
) -> tuple[Plan, Drafter | None]:
    """What pays on this machine for tasks like this one; no drafter where plain decoding is best.

    Costs are measured with the task's model, settings and prompt, or taken from an earlier
    measurement (`cost_profile`); expected steps are the artifact's. Where it was calibrated with
    other settings they do not hold, and there are no drafts. With `selection="model"` the graph's
    nodes compete too: choosing by the acceptance model takes time.

    Raises
    ------
    SpiffyError
        If the artifact states no expected steps.
    """
    steps = expected_steps(graph)
    if selection == "graph":
        steps.pop("model", None)
    if not steps:
        raise SpiffyError("budget auto: the graph has no expected_steps; calibrate again")
    model, settings = task.model, task.settings
    if graph.differences(settings) or not graph.nodes:
        return Plan(None, 0, 1.0, 0.0), None
    profile = auto_profile(task, graph, remeasure)
    plan = best_plan(steps, profile)
    if plan.selection is None:
        return plan, None
    drafter = graph_drafter(model, graph, settings, plan.drafts, plan.selection)
    if isinstance(drafter, AcceptanceDrafter):
        # The plan holds on average; where much is likely, twice as many may pay.
        drafter.budget = min(2 * plan.drafts, profile.points[-1].drafts, graph.budget, MOST_UNASKED)
        drafter.pays = Pays(plan.rate, forward_seconds(profile, drafter.budget))
    return plan, drafter


def auto_profile(task: Task, graph: DraftGraph, remeasure: bool = False) -> CostProfile:
    """Cost profile of drafting with a graph on this machine, measured unless it is known."""

    def maker(who: Selection) -> Callable[[int], Drafter]:
        return lambda drafts: graph_drafter(task.model, graph, task.settings, drafts, who)

    makers: dict[str, Callable[[int], Drafter]] = {who: maker(who) for who in expected_steps(graph)}
    largest = min(graph.budget, MOST_UNASKED)
    return cost_profile(task, largest, makers, graph.cost_profiles, remeasure)


def _same_steps(graph: DraftGraph, settings: DecodingSettings) -> bool:
    """Whether a denoising step commits what it did when the graph was calibrated."""
    calibrated = graph.decoding
    return (settings.policy, settings.tokens_per_step, settings.steps_per_block) == (
        calibrated.policy,
        calibrated.tokens_per_step,
        calibrated.steps_per_block,
    )


def generate(
    model: DiffusionLM,
    prompt: str | Tensor,
    *,
    graph: DraftGraph | None = None,
    budget: int | Literal["auto"] | None = None,
    selection: Selection = "model",
    seed: int = 0,
    sequence: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    trace: bool = False,
    **options: Any,
) -> Output:
    """Decode one prompt; with a graph speculatively, to the same tokens.

    Parameters
    ----------
    prompt
        Text (put into the chat template), or token ids int64 [length].
    graph
        Draft graph of this model, also the source of options not given; None decodes plainly.
    budget
        Drafts per forward, the root not counted; by default the graph's size, 128 at most.
        "auto": as many as pay on this machine, measured in the first few seconds and remembered
        (`auto_drafter`).
    selection
        "model" lets the artifact's acceptance model choose the drafts, where it has one; "graph"
        takes its nodes in order.
    seed, sequence
        With temperature > 0: the noise of a step is a function of these and the step alone.
    edges
        What may happen at the edge between two blocks; changes the cost, never the tokens.
    trace
        Also return the sequence after every denoising step.
    options
        Fields of `DecodingSettings` (gen_length, block_length, policy, cache, ...).

    Raises
    ------
    SpiffyError
        If an option, the prompt, or the graph does not fit the model.
    """
    if graph is None and budget is not None:
        raise SpiffyError(f"budget {budget} counts drafts: give a graph")
    settings = decoding_settings(model, graph, **options)
    task = make_task(model, prompt, settings, None, seed, sequence, edges)
    if graph is not None:
        if budget == "auto":
            _, task.drafter = auto_drafter(task, graph, selection)
        else:
            task.drafter = graph_drafter(model, graph, settings, budget, selection)
    for _ in run(model, [task]):
        pass
    return collect(task, trace)


def generate_batch(
    model: DiffusionLM, tasks: Sequence[Task], batch_size: int
) -> Iterator[tuple[Task, Output]]:
    """Decode tasks whose forwards are shared, up to `batch_size` at a time, as they finish."""
    for finished in run(model, tasks, batch_size):
        for task in finished:
            yield task, collect(task)


def answer_ids(task: Task) -> list[int]:
    """The answer decoded so far: finished blocks, up to and with the first EOS token."""
    if not task.path:
        return []
    canvas, cursor = task.canvas, task.path[-1]
    stop = min(canvas.span(cursor.block).start, canvas.prompt_length + canvas.gen_length)
    ids: list[int] = cursor.ids[canvas.prompt_length : stop].tolist()
    if task.settings.stop_at_eos:
        end = next((k for k, t in enumerate(ids) if t in task.model.eos_token_ids), len(ids))
        ids = ids[: end + 1]
    return ids


def collect(task: Task, trace: bool = False) -> Output:
    """The output of a finished task."""
    ids = answer_ids(task)
    states = [cursor.ids.tolist() for cursor in task.path] if trace else []
    return Output(task.model.decode_text(ids), ids, task.stats, states)
