"""From prompts to an artifact: decode, record, grow, check on held-out prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from spiffy.calib.acceptance import fit_acceptance
from spiffy.calib.prompts import PromptSet
from spiffy.calib.provenance import provenance
from spiffy.calib.record import Recorder, Trace
from spiffy.calib.replay import replay_drafter
from spiffy.graphs import Chain, Fill, Prompt, count_chains, edges, grow, grow_paper, replay
from spiffy.runtime.cache import BlockEdges
from spiffy.runtime.decode import Task, run
from spiffy.runtime.draft import AcceptanceDrafter
from spiffy.runtime.generate import acceptance_weights, make_task
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import (
    AcceptanceModel,
    CalibrationRecord,
    DecodingSettings,
    DraftGraph,
    ExpectedSteps,
    ModelRecord,
    Node,
    Objective,
    SpiffyError,
)
from spiffy.schemas.errors import printable

_MEASURED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # budgets
HOLD_OUT_EVERY = 5  # every fifth prompt measures the graph instead of growing it


@dataclass(frozen=True)
class Traces:
    """Recorded plain decodes of one prompt set, in its order.

    Attributes
    ----------
    prompts
        One trace per prompt that was decoded.
    nfe, positions_computed
        What recording cost.
    """

    prompts: tuple[Trace, ...]
    nfe: int
    positions_computed: int

    @property
    def growing(self) -> Sequence[Trace]:
        """Prompts that the graph is grown on."""
        held_out = set(self._held_out_indices())
        return [prompt for k, prompt in enumerate(self.prompts) if k not in held_out]

    @property
    def held_out(self) -> Sequence[Trace]:
        """Prompts that the graph is measured on; none if there is only one prompt."""
        return [self.prompts[k] for k in self._held_out_indices()]

    def _held_out_indices(self) -> Sequence[int]:
        every = min(HOLD_OUT_EVERY, len(self.prompts))
        return range(every - 1, len(self.prompts), every) if every > 1 else ()


def prepare(
    model: DiffusionLM,
    prompts: PromptSet,
    settings: DecodingSettings,
    seed: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
) -> list[Task]:
    """Set up the recorded decode of every prompt that leaves room for an answer.

    `edges` says what decoding with the graph will allow: chains hold no draft beyond it.

    Raises
    ------
    SpiffyError
        If none does.
    """
    tasks: list[Task] = []
    last_problem: SpiffyError | None = None
    for text in prompts.texts:
        recorder = Recorder()
        try:
            tasks.append(make_task(model, text, settings, recorder, seed, len(tasks), edges))
        except SpiffyError as problem:
            last_problem = problem
    if not tasks:
        raise SpiffyError(f"{prompts.dataset}: no prompt can be decoded: {last_problem}")
    return tasks


def record(
    model: DiffusionLM,
    tasks: Sequence[Task],
    batch_size: int = 8,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> Traces:
    """Decode prepared tasks plainly, in batches, and collect their traces.

    `on_prompt` is called after every forward with the number of prompts that are done.
    """
    done: dict[int, Trace] = {}
    for finished in run(model, tasks, batch_size):
        for task in finished:
            done[task.sequence] = Trace.of(task)
        on_prompt(len(done))
    return Traces(
        tuple(done[task.sequence] for task in tasks),
        nfe=sum(task.stats.nfe for task in tasks),
        positions_computed=sum(task.stats.positions_computed for task in tasks),
    )


def steps_per_forward(prompts: Sequence[Prompt], fills: Sequence[Fill]) -> list[float]:
    """Replayed denoising steps per forward at budgets 0, 1, ... len(fills)."""
    return [
        round(replay(prompts, set(fills[:budget])).steps_per_forward, 6)
        for budget in range(len(fills) + 1)
    ]


def chain_counts(traces: Traces) -> Counter[Chain]:
    """Chains of all prompts that the graph is grown on."""
    return count_chains(trace.chains for trace in traces.growing)


def expected_steps(
    model: DiffusionLM,
    settings: DecodingSettings,
    traces: Sequence[Trace],
    acceptance: AcceptanceModel,
    budget: int,
) -> tuple[ExpectedSteps, ...]:
    """Replayed denoising steps per forward of drafts chosen by an acceptance model."""
    found = [ExpectedSteps(drafts=0, steps=1.0)]
    for drafts in (*(b for b in _MEASURED if b < budget), budget):
        weights = acceptance_weights(acceptance, model.vocab_size)
        drafter = AcceptanceDrafter(weights, drafts, model, settings)
        steps = replay_drafter(traces, drafter).steps_per_forward
        found.append(ExpectedSteps(drafts=drafts, steps=round(steps, 6)))
    return tuple(found)


def grow_by(objective: Objective, counts: dict[Chain, int], budget: int) -> list[Fill]:
    """Grow by our objective or by the paper's."""
    return grow_paper(counts, budget) if objective == "paper" else grow(counts, budget)


def build_graph(
    model: DiffusionLM,
    prompts: PromptSet,
    settings: DecodingSettings,
    traces: Traces,
    budget: int,
    seed: int = 0,
    objective: Objective = "expected-steps",
    switches: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    command: Sequence[str] = (),
) -> DraftGraph:
    """Grow a graph of up to `budget` nodes and put it into an artifact.

    `switches` are the block edges that the traces were recorded with; `command` is the command line
    to put on record, if there is one.
    """
    counts = chain_counts(traces)
    fills = grow_by(objective, counts, budget)
    measured = traces.held_out or traces.growing
    acceptance = None
    if objective == "expected-steps" and counts:
        acceptance = fit_acceptance(model, settings, traces.growing)
    if acceptance is not None:
        steps = expected_steps(model, settings, measured, acceptance, budget)
        acceptance = acceptance.model_copy(update={"expected_steps": steps})
    return DraftGraph(
        model=ModelRecord(
            family=model.family.name,
            id=_portable_id(model.name),
            revision=model.revision,
            fingerprint=model.fingerprint,
            vocab_size=model.vocab_size,
        ),
        decoding=settings,
        exact=settings.exact,
        calibration=CalibrationRecord(
            dataset=prompts.dataset,
            dataset_sha256=prompts.sha256,
            prompt_digests=prompts.digests,
            samples=len(traces.growing),
            held_out_samples=len(traces.held_out),
            roots=counts.total(),
            seed=seed,
            objective=objective,
            tool_version=version("spiffy-dllm"),
            prompts=len(prompts.texts),
            edges=tuple(name for name, allowed in asdict(switches).items() if allowed),
        ),
        nodes=nodes_of(fills, counts),
        expected_steps=tuple(steps_per_forward([trace.chains for trace in measured], fills)),
        acceptance=acceptance,
        provenance=provenance(command),
    )


def _portable_id(name: str) -> str:
    """A local folder's own name: where it lies on this machine is nobody else's business."""
    return printable(Path(name).resolve().name) if Path(name).is_dir() else name


def nodes_of(fills: Sequence[Fill], counts: dict[Chain, int]) -> tuple[Node, ...]:
    """Artifact nodes: every fill with the observed parents that stand before it in the list."""
    before = edges(counts)
    numbers: dict[Fill, int] = {(): 0}
    nodes = []
    for fill in fills:
        parents = sorted(numbers[parent] for parent in before[fill] if parent in numbers)
        nodes.append(Node(fill=fill, parents=tuple(parents), count=before[fill].total()))
        numbers[fill] = len(numbers)
    return tuple(nodes)
