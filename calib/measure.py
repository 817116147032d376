"""Steps per forward of what will really be run: held-out prompts, decoded with drafts.

Replays do without what rejected drafts say, so they expect a little less than comes. Here some
held-out prompts are decoded for real, and every answer is compared with the recorded one. The same
prompts are replayed in the same way: how the two compare holds for all prompts, and what these few
bring does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

from spiffy.calib.pipeline import Traces
from spiffy.calib.record import Trace
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import Drafter, Selection, way_of
from spiffy.runtime.draft.acceptance import acceptance_of
from spiffy.schemas import DraftGraph, ExpectedSteps, SpiffyError
from spiffy.schemas.notes import note
from spiffy.schemas.records import MOST_UNASKED

MOST_PROMPTS = 4
_BUDGETS = (8, 2, 32)  # in this order, as far as positions go
_POSITIONS = 1.0  # times those that recording took: more is not spent
_EXACT = (torch.float32, torch.float64)


def measure_steps(
    graph: DraftGraph,
    tasks: Sequence[Task],
    traces: Traces,
    on_decode: Callable[[], None] = lambda: None,
) -> DraftGraph:
    """The graph with `measured_steps`, of up to 4 held-out prompts.

    Parameters
    ----------
    tasks
        Of the traces' prompts, in their order.
    on_decode
        Called after every decode.

    Raises
    ------
    SpiffyError
        If drafts changed a token in float32 or float64. In less exact dtypes ties are so near that
        they do: such a decode is left out, and a note says so.
    """
    held_out = [(tasks[k], traces.prompts[k]) for k in traces.held_out_indices()][:MOST_PROMPTS]
    left = _POSITIONS * traces.positions_computed
    found: dict[Selection, list[ExpectedSteps]] = {way: [] for way in _ways(graph)}
    decoded = differing = 0
    for n, way in _choices(graph) if held_out else ():
        if left <= 0:
            break
        steps = forwards = 0
        same: list[Trace] = []
        for task, trace in held_out:
            ours = _decoded(graph, task, way, n)
            left -= ours.stats.positions_computed
            decoded += 1
            on_decode()
            if _differs(ours, trace, f"{n} drafts by the {way}"):
                differing += 1
                continue
            # A step that commits nothing needs no forward, with drafts or without.
            steps += len(ours.roots) + ours.stats.accepted
            forwards += len(ours.roots)
            same.append(trace)
        if forwards:
            replayed = replay_drafter(same, _drafter(graph, held_out[0][0], way, n))
            found[way].append(
                ExpectedSteps(
                    drafts=n,
                    steps=round(max(steps / forwards, 1.0), 6),
                    replayed=round(max(replayed.steps_per_forward, 1.0), 6),
                )
            )
    if differing:
        task = held_out[0][0]
        why = f"by a near-tie of {_dtype(task)}"
        if task.settings.own_policy:
            why += f" (or policy {task.settings.policy} is no pure function)"
        note(
            f"{differing} of {decoded} decodes with drafts of held-out prompts differ from those "
            f"recorded, {why}: they are left out of what is measured"
        )
    curves = {
        way: tuple(sorted(points, key=lambda point: point.drafts))
        for way, points in found.items()
        if points
    }
    return graph.model_copy(update={"measured_steps": curves})


def decodes(graph: DraftGraph, traces: Traces) -> int:
    """How many decodes `measure_steps` makes at most."""
    prompts = min(len(traces.held_out_indices()), MOST_PROMPTS)
    return prompts * sum(1 for _ in _choices(graph))


def _ways(graph: DraftGraph) -> tuple[Selection, ...]:
    return ("graph",) if acceptance_of(graph) is None else ("model", "graph")


def _choices(graph: DraftGraph) -> Iterator[tuple[int, Selection]]:
    most = min(graph.budget, MOST_UNASKED)
    budgets = dict.fromkeys(min(n, most) for n in _BUDGETS)
    return product(budgets, _ways(graph)) if most else iter(())


def _drafter(graph: DraftGraph, task: Task, way: Selection, drafts: int) -> Drafter:
    return way_of(task.model, graph, task.settings, drafts, way)


def _decoded(graph: DraftGraph, task: Task, way: Selection, drafts: int) -> Task:
    """Decode a prompt with drafts."""
    drafter = _drafter(graph, task, way, drafts)
    ours = make_task(
        task.model, task.prompt, task.settings, drafter, task.seed, task.sequence, task.edges
    )
    for _ in run(task.model, [ours]):
        pass
    return ours


def _differs(ours: Task, trace: Trace, drafts: str) -> bool:
    """Whether its tokens are not the recorded ones."""
    same = ours.path[-1].ids.tolist() == trace.path[-1].ids.tolist()
    if same or not ours.settings.exact:
        return False
    if ours.model.dtype not in _EXACT:
        return True
    if ours.settings.own_policy:
        raise SpiffyError(
            f"drafts changed a token of prompt {ours.sequence} ({drafts}): is policy "
            f"{ours.settings.policy} a pure function of what it is given (docs/extending.md)? If "
            "it is, record again with --batch-size 1 (and another --workdir)"
        )
    raise SpiffyError(
        f"drafts changed a token of prompt {ours.sequence} ({drafts}): recorded in batches, "
        "decoded alone, a floating-point tie can do that, so record again with --batch-size 1 "
        "(and another --workdir); if it stays, please report it"
    )


def _dtype(task: Task) -> str:
    return str(task.model.dtype).removeprefix("torch.")
