"""The tables that `spiffy-calibrate` ends in: what a graph saves, and what it pays where."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from rich.table import Table

from spiffy.cli.common import console, log, note_if_inexact
from spiffy.schemas import Objective, SpiffyError
from spiffy.schemas.labels import shown_budgets

if TYPE_CHECKING:
    from spiffy.calib.pipeline import Traces
    from spiffy.runtime.budget.roofline import Shape
    from spiffy.runtime.decode import Task
    from spiffy.schemas import CostProfile, DraftGraph

_MOST_COMPARED = 200_000  # distinct chains; rival rules unpack each, 2 kB and 40 microseconds
_OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
_LARGE = 100e6  # parameters from which a roofline says something


def summarise(graph: DraftGraph, traces: Traces) -> None:
    """Print expected steps per forward by number of drafts, beside those of the other rule."""
    from spiffy.calib.fit import can_fit
    from spiffy.calib.pipeline import grow_by, steps_per_forward

    record, settings = graph.calibration, graph.decoding
    counts = traces.counts
    measured = traces.held_out or traces.growing
    columns: dict[str, list[float]] = {}
    points = () if graph.acceptance is None else graph.acceptance.expected_steps
    chosen = {point.drafts: point.steps for point in points}
    for objective in _OBJECTIVES:
        if objective == record.objective:
            continue
        if objective != "expected-steps" and len(counts) > _MOST_COMPARED:
            log.print(
                f"{objective} objective: left out, {len(counts)} distinct chains are too many "
                "for it"
            )
            continue
        rival = grow_by(objective, counts, graph.budget)
        columns[objective] = steps_per_forward((trace.chains for trace in measured), rival)
    on = "held-out prompts" if traces.held_out else "prompt that the graph also grew on"
    table = Table(
        title=f"Denoising steps per forward on {len(measured)} {on} "
        f"({settings.policy}, cache {settings.cache}, block {settings.block_length})"
    )
    table.add_column("drafts", justify="right")
    if chosen:
        table.add_column("chosen at run time", justify="right")
    table.add_column(f"this graph ({record.objective})", justify="right")
    for name in columns:
        table.add_column(f"{name} objective", justify="right")
    for drafts in shown_budgets(graph.budget):
        table.add_row(
            str(drafts),
            *([_cell(chosen.get(drafts))] if chosen else []),
            f"{graph.expected_steps[drafts]:.2f}",
            *(f"{steps[min(drafts, len(steps) - 1)]:.2f}" for steps in columns.values()),
        )
    console.print(table)
    for way, found in graph.measured_steps.items():
        steps = ", ".join(f"{point.drafts}: {point.steps:.2f}" for point in found)
        log.print(
            f"held-out prompts decoded with drafts by the {way}, tokens compared: steps per "
            f"forward at drafts {steps}",
            soft_wrap=True,
        )
    note_if_inexact(settings)
    if graph.acceptance is None and record.objective == "expected-steps":
        few = "too few states were recorded for one: record more prompts"
        none = "there is none for sequential unmasking, nor for static of several tokens per step"
        why = few if can_fit(settings) else none
        log.print(f"no acceptance model, the graph alone drafts: {why}", soft_wrap=True)
    log.print(
        f"{graph.budget} nodes from {record.roots} roots of {record.samples} prompts; all "
        f"{len(traces.prompts)} took {traces.nfe} forwards, {traces.positions_computed} positions"
    )


def _cell(steps: float | None) -> str:
    """Empty where that number of drafts was not replayed, as where a graph has all nodes it can."""
    return "" if steps is None else f"{steps:.2f}"


def predict(graph: DraftGraph, measured: CostProfile, task: Task, like: str | None) -> None:
    """Print how many drafts pay, here and on named accelerators, and what they should bring.

    Accelerators are left out for small models: kernel launches decide there, which a roofline does
    not know. `like` names a shape that they are predicted for instead.
    """
    from spiffy.runtime.budget.estimates import ladder
    from spiffy.runtime.budget.predict import best_plan, steps_by_drafts
    from spiffy.runtime.budget.roofline import ACCELERATORS, Shape, predicted_profile
    from spiffy.schemas.records import MOST_UNASKED

    shape = Shape.of(task.model) if like is None else shape_like(like)
    # Not those at which this machine gave up.
    budgets = [0, *ladder(min(graph.budget, MOST_UNASKED))]
    profiles = {"this machine": measured}
    for accelerator in ACCELERATORS if shape.parameters >= _LARGE else ():
        predicted = predicted_profile(
            shape, accelerator, task.canvas, task.settings.cache, budgets, measured.drafting
        )
        profiles[accelerator.name if like is None else f"{like} on {accelerator.name}"] = predicted
    table = Table(title="Predicted speedup over plain decoding")
    for heading in ("device", "forward times"):
        table.add_column(heading)
    for heading in ("plain forward", "drafts", "chosen by", "speedup"):
        table.add_column(heading, justify="right")
    for device, profile in profiles.items():
        plan = best_plan(steps_by_drafts(graph), profile)
        table.add_row(
            device,
            f"{'measured' if profile is measured else 'roofline'}, {profile.dtype}",
            f"{1000 * profile.points[0].seconds:.3g} ms",
            str(plan.drafts),
            plan.selection or "-",
            f"{plan.speedup:.2f}x",
        )
    console.print(table)
    note = (
        "predictions from few held-out prompts and briefly timed forwards: spiffy-decode --verify "
        "and spiffy-bench measure"
    )
    if len(profiles) > 1:
        note += (
            ". Roofline: bandwidth and peak of the data sheet, without kernel launches, drafting "
            "as timed on this machine"
        )
    log.print(note, soft_wrap=True)


def shape_like(name: str) -> Shape:
    """A real model's shape by name.

    Raises
    ------
    SpiffyError
        If it is none of those known.
    """
    from spiffy.bench.grow import SHAPES
    from spiffy.runtime.budget.roofline import MIXTURES, Shape

    if name in MIXTURES:
        return MIXTURES[name]
    if name not in SHAPES:
        raise SpiffyError(
            f"unknown shape {name!r}: choose one of {', '.join((*SHAPES, *MIXTURES))}"
        )
    known = SHAPES[name]
    sizes = (known.layers, known.hidden, known.heads, known.kv_heads, known.head_dim)
    return Shape.of_sizes(*sizes, known.feed_forward, known.vocabulary)
