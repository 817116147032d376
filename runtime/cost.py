"""What a forward over the root and n drafts costs here, and the budget that pays."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from spiffy.runtime.cache import CACHES
from spiffy.runtime.decode import Task
from spiffy.runtime.pack import Row, forward
from spiffy.schemas import CostPoint, CostProfile, DraftGraph

_BUDGETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def measure_cost(task: Task, largest: int, repeats: int = 5) -> CostProfile:
    """Time denoising forwards with 0 to `largest` drafts behind the task's prompt.

    Runs real rows of the task's cache, interleaved so that drift of the machine hits every budget
    alike, and takes the median of `repeats`; a few seconds at most on a small model.
    """
    model, canvas = task.model, task.canvas
    root = canvas.start(task.prompt, model.mask_token_id)
    cache = CACHES[task.settings.cache](model, canvas, task.edges)
    rows = next(opening := cache.evaluate(root, root.ids[None]))
    while not cache.takes_drafts(root) or any(row.keep for row in rows):
        try:
            rows = opening.send(forward(model, rows))
        except StopIteration:  # the block is open; what follows are denoising forwards
            break

    def rows_for(drafts: int) -> list[Row]:
        states: Tensor = root.ids.repeat(1 + drafts, 1)
        return next(cache.evaluate(root, states))

    budgets = [budget for budget in _BUDGETS if budget < largest] + [largest]
    seconds: dict[int, list[float]] = {budget: [] for budget in budgets}
    for _ in range(repeats):
        for budget in budgets:
            packed = rows_for(budget)
            started = _now(model.device)
            forward(model, packed)
            seconds[budget].append(_now(model.device) - started)
    return CostProfile(
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        points=tuple(CostPoint(drafts=b, seconds=median(seconds[b])) for b in budgets),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a launched kernel is not a finished one
    return perf_counter()


def best_budget(graph: DraftGraph, profile: CostProfile) -> int:
    """The measured budget with the most denoising steps per second; 0 if no draft pays.

    Expected steps per forward come from the artifact's held-out replay.
    """

    def speed(point: CostPoint) -> float:
        return graph.expected_steps[min(point.drafts, graph.budget)] / point.seconds

    return max(profile.points, key=speed).drafts
