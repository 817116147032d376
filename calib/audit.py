"""What can be recomputed of an artifact, beyond what every reader checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spiffy.calib.prompts import MERGED, load_prompts
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import DraftGraph, ExpectedSteps, SpiffyError


@dataclass
class Audit:
    """Findings in words.

    Attributes
    ----------
    wrong
        What contradicts itself or what it was compared with.
    checked, unchecked
        What was recomputed, and what could not be, and why.
    """

    wrong: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def note(self, what: str, problems: Sequence[str]) -> None:
        """Add what one check found."""
        self.checked.append(what)
        self.wrong.extend(problems)


def audit(
    graph: DraftGraph,
    stated_digest: str | None,
    dataset: str | None = None,
    model: DiffusionLM | None = None,
    field: str | None = None,
) -> Audit:
    """Recompute what can be.

    Parameters
    ----------
    stated_digest
        The digest in the file, if there is one; the loader has compared it.
    dataset
        Where the prompts can be drawn from again (default: nowhere, unless they are synthetic).
    model
        The model that it should belong to.
    field
        Of the dataset's records, what holds the prompt; None: whichever is known.
    """
    found = Audit()
    if stated_digest is None:
        found.unchecked.append("digest: the file states none, so an edit would not show")
    elif stated_digest == graph.digest():
        found.note("digest", [])
    else:  # the loader refuses a digest that is wrong
        found.unchecked.append("digest: of another version of the format")
    found.note("closure of the graph", [])  # the loader refuses anything else
    found.note("counts", _counts(graph))
    found.note("expected steps", _expected_steps(graph))
    _data(found, graph, dataset, field)
    if model is None:
        found.unchecked.append("fingerprint: give --model")
    else:
        found.note("fingerprint", _fit(graph, model))
    found.unchecked.append(
        "values of counts, expected steps, coefficients and costs: only calibrating again tells"
    )
    return found


def _counts(graph: DraftGraph) -> list[str]:
    """Of two different fills of one size at most one lies on a root's future."""
    roots, problems = graph.calibration.roots, []
    by_size: dict[int, int] = {}
    for number, node in enumerate(graph.nodes, start=1):
        by_size[len(node.fill)] = by_size.get(len(node.fill), 0) + node.count
        if node.count > roots:
            problems.append(f"node {number}: count {node.count} of {roots} roots")
        elif len(node.fill) == 1 and node.parents != (0,):
            problems.append(f"node {number}: one token can only follow the root")
    for size, total in by_size.items():
        if total > roots:
            problems.append(f"nodes of {size} tokens: counts add up to {total} of {roots} roots")
    record = graph.calibration
    most = record.samples * (graph.decoding.gen_length + graph.decoding.block_length)
    if roots > most:
        problems.append(f"calibration.roots: {roots}, more than {most} positions were decoded")
    return problems


def _expected_steps(graph: DraftGraph) -> list[str]:
    """A forward makes a step of its own, and one more for each draft at most.

    That more drafts bring more is no law: a draft that comes true moves the next root, and a
    forward or two decide where few prompts were held out.
    """
    curves = {"expected_steps": list(enumerate(graph.expected_steps))}
    if graph.acceptance is not None:
        curves["acceptance.expected_steps"] = _points(graph.acceptance.expected_steps)
    for way, measured in graph.measured_steps.items():
        curves[f"measured_steps.{way}"] = _points(measured)
    return [
        f"{name}: {steps} steps of a forward with {drafts} drafts"
        for name, curve in curves.items()
        for drafts, steps in curve
        if steps > drafts + 1
    ]


def _points(curve: Sequence[ExpectedSteps]) -> list[tuple[int, float]]:
    return [(point.drafts, point.steps) for point in curve]


def _data(found: Audit, graph: DraftGraph, dataset: str | None, field: str | None) -> None:
    record = graph.calibration
    if record.dataset.startswith(MERGED):
        found.unchecked.append("data: joined from several sets of prompts")
        return
    if dataset is None and record.dataset != "synthetic":
        found.unchecked.append(f"data: give --dataset with the prompts of {record.dataset}")
        return
    drawn = record.prompts or record.samples + record.held_out_samples
    if not drawn:
        found.unchecked.append("data: the artifact states no prompts")
        return
    if dataset is None and drawn > 100_000:
        found.unchecked.append(f"data: {drawn} prompts are too many to draw again unasked")
        return
    try:
        prompts = load_prompts(
            dataset or record.dataset, drawn, record.seed, skip_bad=True, field=field
        )
    except SpiffyError as problem:
        found.unchecked.append(f"data: {problem}")
        return
    what = f"{drawn} prompts of {dataset or record.dataset} drawn with seed {record.seed}"
    # In Python all prompts of a file may have been taken, in the file's order.
    same = prompts.sha256 == record.dataset_sha256 or prompts.digests == record.prompt_digests
    told = f"data: {what} have digest {prompts.sha256}, not {record.dataset_sha256}"
    found.note("data", [] if same else [told if field else f"{told} (another --field?)"])


def _fit(graph: DraftGraph, model: DiffusionLM) -> list[str]:
    try:
        graph.check_fits(model.family.name, model.fingerprint, model.vocab_size)
    except SpiffyError as problem:
        return [str(problem)]
    return []
