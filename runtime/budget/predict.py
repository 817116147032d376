"""What drafts bring, predicted: expected denoising steps on one side, seconds on the other.

Decoding S steps with n drafts per forward takes S * step + S / E(n) * (forward(n) + drafting(n))
seconds, where E(n) is the expected number of steps per forward. The steps themselves cost the same
with and without drafts, so the best n is the one with most steps per second of forward and
drafting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spiffy.runtime.budget.cost import cost_profile
from spiffy.runtime.budget.estimates import interpolated
from spiffy.runtime.decode import Task
from spiffy.runtime.draft import Drafter, Selection, way_of
from spiffy.runtime.draft.acceptance import acceptance_of
from spiffy.schemas import CostPoint, CostProfile, DraftGraph, ExpectedSteps
from spiffy.schemas.records import MOST_UNASKED

#: Drafts must promise this much over plain decoding, or there are none: measured on a machine that
#: does other things too, a promise was wrong by up to a tenth.
MARGIN = 0.08


@dataclass(frozen=True)
class Plan:
    """What pays on a device.

    Attributes
    ----------
    selection
        Who chooses the drafts; None: nobody, decode plainly.
    drafts
        Most drafts per forward.
    speedup
        Predicted, over plain decoding.
    """

    selection: Selection | None
    drafts: int
    speedup: float


def steps_by_drafts(graph: DraftGraph) -> dict[Selection, tuple[ExpectedSteps, ...]]:
    """Expected steps per forward, by who chooses the drafts and by how many there may be."""
    steps: dict[Selection, tuple[ExpectedSteps, ...]] = {}
    if graph.expected_steps:
        steps["graph"] = tuple(
            ExpectedSteps(drafts=n, steps=max(s, 1.0)) for n, s in enumerate(graph.expected_steps)
        )
    acceptance = acceptance_of(graph)
    if acceptance is not None and acceptance.expected_steps:
        steps["model"] = acceptance.expected_steps
    return {
        way: _as_measured(curve, graph.measured_steps.get(way, ())) for way, curve in steps.items()
    }


def _as_measured(
    replayed: tuple[ExpectedSteps, ...], measured: tuple[ExpectedSteps, ...]
) -> tuple[ExpectedSteps, ...]:
    """A replayed curve, its accepted drafts scaled as those of the points measured were.

    The few prompts that were measured may be easier than the curve's many. So each measured point
    is compared with a replay of the same prompts. (Before 1.5 none is stated; then the curve has
    to do.)
    """
    curve = [(p.drafts, p.steps) for p in replayed]
    scale = [
        (p.drafts, float(np.clip((p.steps - 1) / (at - 1), 0.2, 5)))
        for p in measured
        if (at := p.replayed or interpolated(curve, p.drafts)) > 1
    ]
    if not scale:
        return replayed
    return tuple(
        ExpectedSteps(drafts=n, steps=min(1 + (s - 1) * interpolated(scale, n), n + 1.0))
        for n, s in curve
    )


def best_plan(
    steps: Mapping[Selection, Sequence[ExpectedSteps]],
    profile: CostProfile,
    margin: float = MARGIN,
) -> Plan:
    """The way of drafting with most steps per second; plain unless it promises `margin` more.

    Only numbers of drafts that were measured are considered; of equals the fewest drafts win.
    """
    plain = Plan(None, 0, 1.0)
    best = plain
    for selection, points in steps.items():
        for cost in profile.points[1:]:
            if cost.drafts > min(points[-1].drafts, MOST_UNASKED):
                break
            plan = plan_of(points, profile, selection, cost.drafts)
            if plan.speedup > best.speedup:
                best = plan
    return best if best.speedup >= 1 + margin else plain


def plan_of(
    points: Sequence[ExpectedSteps], profile: CostProfile, selection: Selection, drafts: int
) -> Plan:
    """What a number of drafts brings, by the steps that are expected of it and measured costs."""
    plain_forward, step = profile.points[0].seconds, profile.step_seconds
    per_forward = interpolated([(p.drafts, p.steps) for p in points], drafts)
    # Timed in another moment, a forward may seem to take less with drafts than without.
    spent = max(turn_seconds(profile, selection, drafts), plain_forward)
    speedup = (plain_forward + step) / (spent / per_forward + step)
    return Plan(selection, drafts, speedup)


def turn_seconds(profile: CostProfile, selection: Selection, drafts: int) -> float:
    """Seconds of choosing up to `drafts` drafts, and of the forward over them."""
    if turns := profile.turns.get(selection):
        return interpolated(pairs(turns), drafts)
    drafting = profile.drafting.get(selection)
    forward = interpolated(pairs(profile.points), drafts)
    return forward + (interpolated(pairs(drafting), drafts) if drafting else 0.0)


def pairs(points: Sequence[CostPoint]) -> list[tuple[int, float]]:
    """Numbers of drafts, and their seconds."""
    return [(point.drafts, point.seconds) for point in points]


def auto_profile(task: Task, graph: DraftGraph, remeasure: bool = False) -> CostProfile:
    """Cost profile of drafting with a graph on this machine, measured unless it is known."""

    def maker(way: Selection) -> Callable[[int], Drafter]:
        return lambda drafts: way_of(task.model, graph, task.settings, drafts, way)

    ways = steps_by_drafts(graph)
    makers: dict[str, Callable[[int], Drafter]] = {way: maker(way) for way in ways}
    largest = min(graph.budget, MOST_UNASKED)
    return cost_profile(task, largest, makers, graph.cost_profiles, remeasure)
