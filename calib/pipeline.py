"""From prompts to an artifact: decode, record, grow, check on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spiffy.calib.fit import fit_acceptance
from spiffy.calib.prompt_files import question
from spiffy.calib.prompts import PromptSet
from spiffy.calib.provenance import provenance
from spiffy.calib.record import Recorder, Trace, spread
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.graphs import (
    ChainCounts,
    Fill,
    Prompt,
    Replay,
    grow_by_transitions,
    grow_counted,
    grow_paper,
    replay_prefixes,
)
from spiffy.runtime.budget.estimates import ladder
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import AcceptanceDrafter, Vocabulary
from spiffy.runtime.draft.acceptance import acceptance_weights
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.published import ALIASES
from spiffy.schemas import (
    AcceptanceModel,
    CalibrationRecord,
    DecodingSettings,
    DraftGraph,
    ExpectedSteps,
    Node,
    Objective,
    SpiffyError,
)
from spiffy.schemas.errors import printable
from spiffy.schemas.hub import is_hub_id
from spiffy.schemas.records import MAX_PROMPTS
from spiffy.schemas.workdir import ModelFacts

_SHOWN = 40  # characters of a prompt
_REPLAYED = 200  # prompts that the acceptance model's drafts are replayed on, at most
_HOPELESS = 16  # prompts one after the other that fail: not for what is in them
HOLD_OUT_EVERY = 5  # every fifth prompt measures the graph instead of growing it


@dataclass(frozen=True)
class Traces:
    """Recorded plain decodes of one prompt set, in its order.

    Attributes
    ----------
    prompts
        One trace per prompt that was decoded; of a work directory, read whenever asked for.
    nfe, positions_computed
        What recording them cost.
    failed
        Numbers (`Task.sequence`) of prompts whose decode failed: these have no trace. Of joined
        work directories, whose prompts have other numbers, none.
    """

    prompts: Sequence[Trace]
    nfe: int
    positions_computed: int
    failed: frozenset[int] = frozenset()

    @property
    def growing(self) -> Sequence[Trace]:
        """Prompts that the graph is grown on."""
        held_out = set(self.held_out_indices())
        return _Some(self.prompts, [k for k in range(len(self.prompts)) if k not in held_out])

    @property
    def held_out(self) -> Sequence[Trace]:
        """Prompts that the graph is measured on; none if there is only one prompt."""
        return _Some(self.prompts, self.held_out_indices())

    @cached_property
    def counts(self) -> ChainCounts:
        """Chains of all prompts that a graph is grown on, counted once."""
        counts = ChainCounts()
        for trace in self.growing:
            counts.add(trace.chains)
        return counts

    def held_out_indices(self) -> Sequence[int]:
        """Their places among all prompts."""
        every = min(HOLD_OUT_EVERY, len(self.prompts))
        return range(every - 1, len(self.prompts), every) if every > 1 else ()


class _Some(Sequence[Trace]):
    """Some of many traces, without holding any."""

    def __init__(self, traces: Sequence[Trace], indices: Sequence[int]) -> None:
        self.traces, self.indices = traces, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: Any) -> Any:
        """One trace, or those of a slice."""
        if isinstance(k, slice):
            return _Some(self.traces, self.indices[k])
        return self.traces[self.indices[k]]


@dataclass(frozen=True)
class Origin:
    """Where prompts come from.

    Attributes
    ----------
    sha256
        Digest of all prompts.
    prompts
        How many were drawn.
    digests
        A short digest of each, as in `PromptSet`.

    Raises
    ------
    SpiffyError
        If there are more than an artifact can name.
    """

    dataset: str
    sha256: str
    prompts: int
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_number(self.dataset, len(self.digests))

    @classmethod
    def of(cls, prompts: PromptSet) -> Origin:
        """What an artifact says of a set of prompts."""
        return cls(prompts.dataset, prompts.sha256, len(prompts.texts), prompts.digests)


def _check_number(dataset: str, prompts: int) -> None:
    if prompts > MAX_PROMPTS:
        raise SpiffyError(
            f"{dataset}: {prompts} prompts are more than an artifact can name ({MAX_PROMPTS}): "
            "draw fewer (--samples)"
        )


def prepare(
    model: DiffusionLM,
    prompts: PromptSet,
    settings: DecodingSettings,
    seed: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    left_out: list[str] | None = None,
    repeated: list[str] | None = None,
) -> list[Task]:
    """Set up the recorded decode of every prompt that can be decoded, of equal ones once.

    Else a graph would be measured on prompts that it was grown on.

    `edges` says what decoding with the graph will allow: chains hold no draft beyond it. `left_out`
    takes what is wrong with the other prompts, `repeated` which of them are prompts once more.

    Raises
    ------
    SpiffyError
        If none does, or there are more than an artifact can name.
    """
    _check_number(prompts.dataset, len(prompts.texts))  # now rather than after hours
    tasks: list[Task] = []
    problems: list[str] = [] if left_out is None else left_out
    seen: dict[bytes, int] = {}
    for number, text in enumerate(prompts.texts, start=1):
        recorder = Recorder()
        try:
            ids = model.encode(text, raw=prompts.raw, system=prompts.system)
            if (first := seen.setdefault(ids.numpy().tobytes(), number)) != number:
                if repeated is not None:
                    repeated.append(f"prompt {number} is prompt {first} once more")
                continue
            tasks.append(make_task(model, ids, settings, recorder, seed, len(tasks), edges))
        except SpiffyError as problem:
            problems.append(f"{_beginning(text)}: {problem}")
    if not tasks:
        why = problems[-1] if problems else "there is none"
        raise SpiffyError(f"{prompts.dataset}: no prompt can be decoded: {why}")
    return tasks


def _beginning(text: Any) -> str:
    """A prompt as its file's owner knows it: numbers are of those drawn, not of lines."""
    known = question(text) if isinstance(text, str | list) else str(text)
    words = " ".join(known[:_SHOWN].split())
    return f"{words!r}{'...' if len(known) > _SHOWN else ''}"


def groups(tasks: Sequence[Task], batch_size: int) -> list[Sequence[Task]]:
    """Split tasks into runs of `batch_size`, each decoded by itself.

    What shares a forward can change the last bits of what it computes. `run` would fill up its
    batch as prompts finish, so one prompt's bits would depend on how long those before it took.
    Fixed groups depend on nothing but the prompts and the batch size: recording can stop and go on,
    or be dealt to several machines, group by group, and the bits stay. The price is a batch that
    empties towards the end of every group (docs/calibration.md).
    """
    return [tasks[k : k + batch_size] for k in range(0, len(tasks), batch_size)]


def traces_of(model: DiffusionLM, group: Sequence[Task]) -> Iterator[tuple[Task, Trace]]:
    """Decode one group of prepared tasks plainly; the traces as they finish.

    Finished tasks keep their counts and let go of their states. Of one that failed (the model
    computed NaN, or it did not fit into memory alone) `error` says why.
    """
    for finished in run(model, group, len(group), failed_too=True):
        for task in finished:
            trace = Trace.of(task) if task.error is None else Trace.of_failed(task)
            task.path, task.drafter = [], None
            yield task, trace


def failures_in_a_row(before: Sequence[Task], group: Sequence[Task], of: int) -> Sequence[Task]:
    """The decodes that failed one after the other, once those of another group have ended.

    Within a group failures end first: only a whole one is part of a row.

    Raises
    ------
    Exception
        Of the last one, where they are too many, or all there are (`of`): then it is not their
        prompts' fault, but the model's, or somebody else has the memory.
    """
    if any(task.error is None for task in group):
        return ()
    failed = [*before, *group]
    error = failed[-1].error
    if error is not None and (len(failed) >= _HOPELESS or len(failed) == of):
        raise error
    return failed


def record(
    model: DiffusionLM,
    tasks: Sequence[Task],
    batch_size: int = 8,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> Traces:
    """Decode prepared tasks plainly, in groups, and keep their traces in memory.

    `on_prompt` is called after every prompt with the number of those that are done.

    Raises
    ------
    SpiffyError, or what says that memory is short
        If all decodes fail, or many in a row.
    """
    done: dict[int, Trace] = {}
    failed: Sequence[Task] = ()
    for group in groups(tasks, batch_size):
        for task, trace in traces_of(model, group):
            done[task.sequence] = trace
            on_prompt(len(done))
        failed = failures_in_a_row(failed, group, len(tasks))
    decoded = [task for task in tasks if task.error is None]
    return Traces(
        tuple(done[task.sequence] for task in decoded),
        nfe=sum(task.stats.nfe for task in decoded),
        positions_computed=sum(task.stats.positions_computed for task in decoded),
        failed=frozenset(task.sequence for task in tasks if task.error is not None),
    )


def steps_per_forward(prompts: Iterable[Prompt], fills: Sequence[Fill]) -> list[float]:
    """Replayed denoising steps per forward at budgets 0, 1, ... len(fills).

    One prompt is looked at at a time.
    """
    found = replay_prefixes(prompts, fills)
    return [round(replayed.steps_per_forward, 6) for replayed in found]


def expected_steps(
    model: Vocabulary,
    traces: Sequence[Trace],
    acceptance: AcceptanceModel,
    budget: int,
    on_prompt: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[ExpectedSteps, ...]:
    """Replayed denoising steps per forward of drafts chosen by an acceptance model.

    Of many prompts up to 200, evenly spread, because each takes seconds. `on_prompt` is called
    after each with how many are done, and of how many.
    """
    weights = acceptance_weights(acceptance, model.vocab_size)
    budgets = ladder(budget)
    drafters = [AcceptanceDrafter(weights, drafts, model) for drafts in budgets]
    found = [Replay(0, 0)] * len(drafters)
    shown = spread(len(traces), _REPLAYED)
    for done, k in enumerate(shown, start=1):
        trace = traces[k]  # one at a time: they may come from disk
        found = [
            sofar + replay_drafter([trace], drafter)
            for sofar, drafter in zip(found, drafters, strict=True)
        ]
        on_prompt(done, len(shown))
    points = [(0, 1.0), *zip(budgets, (r.steps_per_forward for r in found), strict=True)]
    return tuple(ExpectedSteps(drafts=n, steps=round(steps, 6)) for n, steps in points)


def grow_by(objective: Objective, counts: ChainCounts, budget: int) -> list[Fill]:
    """Grow by our objective, by the paper's published rule, or by transitions."""
    if objective == "expected-steps":
        return grow_counted(counts, budget)
    grow = grow_paper if objective == "paper" else grow_by_transitions
    return grow(counts.chains(), budget)


def model_facts(model: DiffusionLM) -> ModelFacts:
    """What an artifact is bound to, and what fitting has to know."""
    return ModelFacts(
        family=model.family.name,
        id=_portable_id(model.name),
        revision=model.revision,
        fingerprint=model.fingerprint,
        vocab_size=model.vocab_size,
        mask_token_id=model.mask_token_id,
        eos_token_ids=tuple(sorted(model.eos_token_ids)),
    )


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
    on_replay: Callable[[int, int], None] = lambda done, of: None,
) -> DraftGraph:
    """Grow a graph of up to `budget` nodes and put it into an artifact.

    `switches` are the block edges that the traces were recorded with; `command` is the command line
    to put on record, if there is one; `on_replay` is the `on_prompt` of `expected_steps`.
    """
    facts, origin = model_facts(model), Origin.of(prompts)
    return build_from_facts(
        facts, origin, settings, traces, budget, seed, objective, switches, command, on_replay
    )


def build_from_facts(
    model: ModelFacts,
    origin: Origin,
    settings: DecodingSettings,
    traces: Traces,
    budget: int,
    seed: int,
    objective: Objective,
    switches: BlockEdges,
    command: Sequence[str],
    on_replay: Callable[[int, int], None] = lambda done, of: None,
) -> DraftGraph:
    """Build the graph without the model: the traces say everything."""
    counts = traces.counts
    fills = grow_by(objective, counts, budget)
    measured = traces.held_out or traces.growing
    acceptance = None
    if objective == "expected-steps" and counts:
        acceptance = fit_acceptance(model, settings, traces.growing)
    if acceptance is not None:
        steps = expected_steps(model, measured, acceptance, budget, on_replay)
        acceptance = acceptance.model_copy(update={"expected_steps": steps})
    return DraftGraph(
        model=model.record(),
        decoding=settings,
        exact=settings.exact,
        calibration=CalibrationRecord(
            dataset=origin.dataset,
            dataset_sha256=origin.sha256,
            prompt_digests=origin.digests,
            samples=len(traces.growing),
            held_out_samples=len(traces.held_out),
            roots=counts.total(),
            seed=seed,
            objective=objective,
            tool_version=version("spiffy-dllm"),
            prompts=origin.prompts,
            edges=tuple(name for name, allowed in asdict(switches).items() if allowed),
        ),
        nodes=nodes_of(fills, counts),
        expected_steps=tuple(steps_per_forward((trace.chains for trace in measured), fills)),
        acceptance=acceptance,
        provenance=provenance(command),
    )


def _portable_id(name: str) -> str:
    """A local folder's own name: where it lies on this machine is nobody else's business.

    It is no alias, whatever it is called, but for the folders that ship with the package; other
    aliases are the hub ids that they stand for, by which anybody finds the weights.
    """
    if is_hub_id(ALIASES.get(name, "")):
        return ALIASES[name]
    if name in ALIASES or not Path(name).is_dir():
        return name
    folder = Path(name).resolve()
    own = printable(folder.name)
    return f"./{own}" if own in ALIASES and folder != Path(ALIASES[own]).resolve() else own


def nodes_of(fills: Sequence[Fill], counts: ChainCounts) -> tuple[Node, ...]:
    """Artifact nodes: every fill with the observed parents that stand before it in the list."""
    passed, before = counts.passages(fills)
    return tuple(
        Node(fill=fill, parents=tuple(p for p in parents if p < number), count=count)
        for number, (fill, parents, count) in enumerate(
            zip(fills, before, passed, strict=True), start=1
        )
    )
