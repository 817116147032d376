"""How many drafts pay: expected denoising steps on one side, seconds on the other.

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
from spiffy.runtime.decode import Task
from spiffy.runtime.draft import AcceptanceDrafter, Drafter, Selection, graph_drafter
from spiffy.runtime.draft.acceptance import acceptance_of
from spiffy.runtime.draft.ngrams import Floats
from spiffy.schemas import CostPoint, CostProfile, DraftGraph, ExpectedSteps, SpiffyError
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
    rate
        Denoising steps per second of forwards and drafting.
    """

    selection: Selection | None
    drafts: int
    speedup: float
    rate: float


def expected_steps(graph: DraftGraph) -> dict[Selection, tuple[ExpectedSteps, ...]]:
    """Expected steps per forward, by who chooses the drafts and by how many there may be."""
    steps: dict[Selection, tuple[ExpectedSteps, ...]] = {}
    if graph.expected_steps:
        steps["graph"] = tuple(
            ExpectedSteps(drafts=n, steps=max(s, 1.0)) for n, s in enumerate(graph.expected_steps)
        )
    acceptance = acceptance_of(graph)
    if acceptance is not None and acceptance.expected_steps:
        steps["model"] = acceptance.expected_steps
    return steps


def best_plan(
    steps: Mapping[Selection, Sequence[ExpectedSteps]],
    profile: CostProfile,
    margin: float = MARGIN,
) -> Plan:
    """The way of drafting with most steps per second; plain unless it promises `margin` more.

    Only numbers of drafts that were measured are considered; of equals the fewest drafts win.
    """
    plain_forward, step = profile.points[0].seconds, profile.step_seconds
    plain = Plan(None, 0, 1.0, 1 / plain_forward)
    best = plain
    for selection, points in steps.items():
        for cost in profile.points[1:]:
            n = cost.drafts
            if n > min(points[-1].drafts, MOST_UNASKED):
                break
            per_forward = interpolated([(p.drafts, p.steps) for p in points], n)
            spent = turn_seconds(profile, selection, n)
            speedup = (plain_forward + step) / (spent / per_forward + step)
            if speedup > best.speedup:
                best = Plan(selection, n, speedup, per_forward / spent)
    return best if best.speedup >= 1 + margin else plain


def turn_seconds(profile: CostProfile, selection: Selection, drafts: int) -> float:
    """Seconds of choosing up to `drafts` drafts, and of the forward over them."""
    if turns := profile.turns.get(selection):
        return interpolated(_pairs(turns), drafts)
    drafting = profile.drafting.get(selection)
    forward = interpolated(_pairs(profile.points), drafts)
    return forward + (interpolated(_pairs(drafting), drafts) if drafting else 0.0)


def interpolated(points: Sequence[tuple[int, float]], at: int) -> float:
    """Piecewise linear through (drafts, value) points, constant beyond the ends."""
    x, y = zip(*points, strict=True)
    return float(np.interp(at, x, y))


def _pairs(points: Sequence[CostPoint]) -> list[tuple[int, float]]:
    return [(point.drafts, point.seconds) for point in points]


def forward_seconds(profile: CostProfile, drafts: int) -> Floats:
    """Seconds of a forward with 0, 1, ... `drafts` drafts, float64 [drafts + 1].

    Interpolated, and never falling: where more drafts were measured to cost less, that was noise.
    """
    x, y = zip(*_pairs(profile.points), strict=True)
    seconds: Floats = np.interp(np.arange(drafts + 1), x, np.maximum.accumulate(y))
    return seconds


@dataclass(frozen=True)
class Pays:
    """How many of a root's drafts are worth verifying.

    A draft with acceptance probability p gains p steps, which would otherwise take p / rate
    seconds, and makes the forward longer.

    Attributes
    ----------
    rate
        Steps per second of forwards and drafting that decoding achieves anyway.
    seconds
        float64 [n + 1], seconds of a forward with 0, 1, ... n drafts, not falling.
    """

    rate: float
    seconds: Floats

    def __call__(self, p: Floats) -> int:
        """From acceptance probabilities [k], descending, to how many drafts to keep."""
        n = min(len(p), len(self.seconds) - 1)
        gain = np.concatenate(([0.0], np.cumsum(p[:n])))
        worth = gain - self.rate * (self.seconds[: n + 1] - self.seconds[0])
        return int(worth.argmax())  # the fewest of equals


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
