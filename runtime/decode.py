"""The decode loop, plain and speculative, and the driver that runs its forwards.

One loop serves both: plain decoding is speculation without drafts. Read `denoise` first.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from spiffy.runtime.cache import CACHES, BlockEdges, Cache, Evaluation
from spiffy.runtime.canvas import Canvas, Cursor
from spiffy.runtime.draft import Candidates, Drafter, rank_candidates, with_rejected
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.pack import Row, RowOutput, forward
from spiffy.runtime.policy import Distribution, choose, gumbel_noise, select, step_quota
from spiffy.schemas import DecodingSettings, SpiffyError
from spiffy.schemas.graph import MAX_NODES


@dataclass
class Stats:
    """Raw counts of one decode; ratios are for reports.

    Attributes
    ----------
    nfe
        Model forwards, every one: cache refreshes, prefill and stores too.
    positions_computed
        Token positions that those forwards ran.
    steps
        Denoising steps made. Without drafts each needs a forward, unless the one before committed
        nothing (Dream's timesteps).
    drafted, accepted
        Draft states evaluated, and steps gained by hopping to one.
    halvings
        Times that a forward did not fit into memory and its drafts were halved.
    seconds
        Wall-clock time from prompt ids to answer ids; forwards shared by several sequences count
        in full for each.
    forward_seconds, draft_seconds, verify_seconds
        What of it went into the transformer; into ranking candidates and choosing drafts; into the
        walk (output head, softmax, unmasking policy), which plain decoding makes step by step too.
    """

    nfe: int = 0
    positions_computed: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    halvings: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@dataclass
class Task:
    """One sequence to decode: what decides its tokens, and what has become of it so far.

    Attributes
    ----------
    prompt
        int64 [prompt], on the model's device.
    seed, sequence
        The noise of a denoising step is a function of these and of the step alone.
    most_drafts
        Drafts per forward that memory allows: a forward that does not fit halves it.
    path
        The state after every denoising step made so far.
    """

    model: DiffusionLM
    settings: DecodingSettings
    canvas: Canvas
    prompt: Tensor
    seed: int = 0
    sequence: int = 0
    drafter: Drafter | None = None
    edges: BlockEdges = field(default_factory=BlockEdges)
    most_drafts: int = MAX_NODES
    path: list[Cursor] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)


Decoding = Generator[list[Row], list[RowOutput], None]


def denoise(task: Task) -> Decoding:
    """Decode one sequence; yields the rows of each forward and is sent their outputs.

    One turn of the outer loop is one forward over the root and its drafts; the inner loop is the
    walk over what that forward verified. Drafts decide how many steps a forward is worth and
    nothing else: every step is a `denoising_step` on what the model says at a true state.
    """
    canvas, stats = task.canvas, task.stats
    cache = CACHES[task.settings.cache](task.model, canvas, task.edges)
    root = canvas.start(task.prompt, task.model.mask_token_id)
    candidates: Candidates | None = None  # what is known about the root before its forward
    while not root.finished:
        turned = perf_counter()
        states = root.ids[None]
        if task.drafter is not None and candidates is not None:
            may_complete = cache.crosses and root.block + 1 < canvas.blocks
            room = len(candidates.positions) - (not may_complete)
            drafts = task.drafter(root, candidates, room)[: task.most_drafts]
            states = torch.cat((states, drafts))
            stats.draft_seconds += perf_counter() - turned
        states, evaluation = yield from _evaluated(task, cache, root, states)
        stats.drafted += len(states) - 1

        arrived = perf_counter()
        here, cursor = 0, root
        while True:
            masked = canvas.masked(cursor, task.model.mask_token_id)
            if evaluation.first_only:
                masked = masked[:1]
            distribution = evaluation.distribution(here, masked)
            cursor = denoising_step(task, cursor, distribution, evaluation.first_only)
            task.path.append(cursor)
            stats.steps += 1
            verified = find(states, cursor.ids)
            if verified is None or cursor.finished:
                break
            if not evaluation.windows[verified].covers(canvas.span(cursor.block)):
                break
            stats.accepted += verified != here
            here = verified
        walked = perf_counter()
        stats.verify_seconds += walked - arrived

        cache.settle(here)
        root, candidates = cursor, None
        if task.drafter is not None and not root.finished and cache.takes_drafts(root):
            candidates = _candidates(task, root, states, evaluation, here, distribution)
            stats.draft_seconds += perf_counter() - walked


class _TooLargeError(Exception):
    """Thrown into a decode in place of outputs: its rows did not fit into memory."""


def _evaluated(
    task: Task, cache: Cache, root: Cursor, states: Tensor
) -> Generator[list[Row], list[RowOutput], tuple[Tensor, Evaluation]]:
    """Evaluate the root and as many of its drafts as memory allows; returns those states.

    A cache changes only after the outputs of a forward have come, so one that failed can be asked
    for again with fewer drafts. Drafts are no matter of tokens.
    """
    while True:
        try:
            evaluation = yield from cache.evaluate(root, states)
        except _TooLargeError:
            if len(states) > 1:
                task.most_drafts = (len(states) - 1) // 2
                task.stats.halvings += 1
                states = states[: 1 + task.most_drafts]
        else:
            return states, evaluation


def _candidates(
    task: Task,
    root: Cursor,
    states: Tensor,
    evaluation: Evaluation,
    here: int,
    distribution: Distribution,
) -> Candidates | None:
    """What is known about the new root's masked positions: the best source of drafts.

    That is the distribution that produced the root; beside it stands what rejected drafts say, if
    the drafter asks. It does not reach into a new block, except where the forward did; then a draft
    that completed the old block, though it was rejected, may have seen nearly the right thing. The
    last two are what `BlockEdges.first` switches.
    """
    masked = task.canvas.masked(root, task.model.mask_token_id)
    origin = None
    if root.block_step > 0 and not evaluation.first_only:
        origin, seen = distribution, here
    elif root.block_step > 0 or task.edges.first:
        span = task.canvas.span(root.block)
        for seen in (here, *range(len(evaluation.windows))):
            if evaluation.windows[seen].covers(span):
                origin = evaluation.distribution(seen, masked)
                break
    if origin is None or task.drafter is None:
        return None
    fresh = (states[seen] != root.ids).nonzero()[:, 0]
    mask, ranks = task.model.mask_token_id, task.drafter.token_ranks
    candidates = rank_candidates(origin, task.settings, mask, ranks, masked, fresh)
    if origin is distribution and task.drafter.asks_rejected:
        span = task.canvas.span(root.block)
        return with_rejected(candidates, evaluation, root, states, seen, span, mask)
    return candidates


def denoising_step(
    task: Task, cursor: Cursor, distribution: Distribution, first_only: bool = False
) -> Cursor:
    """The next true state: the unmasking policy applied to what the model says at this one."""
    settings, model, canvas = task.settings, task.model, task.canvas
    positions, span = distribution.positions, canvas.span(cursor.block)
    if not distribution.is_number:
        raise _no_number(task, cursor)
    noise = None
    if settings.temperature > 0:
        drawn = gumbel_noise(
            task.seed, task.sequence, cursor.step, canvas.block_length, model.vocab_size
        )
        noise = drawn.to(positions.device)[positions - span.start]
    tokens, score = choose(distribution, settings, model.mask_token_id, noise)
    quota = 1 if first_only else step_quota(settings, cursor.block_step, len(positions))
    chosen = select(score, quota, settings, model.family.threshold_strict)
    ids = cursor.ids.scatter(0, positions[chosen], tokens[chosen])

    answer = ids[max(span.start, canvas.prompt_length) : span.stop].tolist()
    step = cursor.step + 1
    if model.mask_token_id in answer:
        return Cursor(ids, cursor.block, cursor.block_step + 1, step)
    ended = settings.stop_at_eos and not model.eos_token_ids.isdisjoint(answer)
    finished = ended or cursor.block + 1 == canvas.blocks
    return Cursor(ids, cursor.block + 1, 0, step, finished)


def _no_number(task: Task, cursor: Cursor) -> SpiffyError:
    """What to say about logits that are NaN: whose fault it is, as far as that can be told."""
    model = task.model
    dtype = str(model.dtype).removeprefix("torch.")
    broken = model.broken_weights()
    if broken is not None:
        cause = f"its weights hold NaN or infinity ({broken}): get an intact checkpoint"
    else:
        cause = f"its weights are finite, so the forward overflows in {dtype}: try another dtype"
    return SpiffyError(
        f"{model.name} computed NaN at block {cursor.block}, step {cursor.step} "
        f"(sequence {task.sequence}); {cause}"
    )


def find(states: Tensor, ids: Tensor) -> int | None:
    """Row of `states` (int64 [n, length]) that equals `ids`, if any."""
    found = (states == ids).all(-1).nonzero()
    return int(found[0, 0]) if len(found) else None


def synchronize(device: torch.device) -> None:
    """Wait for the device: a launched kernel is not a finished one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_Running = tuple[Task, Decoding, list[Row]]


def run(model: DiffusionLM, tasks: Sequence[Task], batch_size: int = 1) -> Iterator[list[Task]]:
    """Decode tasks, up to `batch_size` at a time sharing their forwards.

    Yields after every forward the tasks that it finished, often none; their `path` and `stats`
    are up to date at any time.
    """
    waiting = iter(tasks)
    running: list[_Running] = []
    most = MAX_NODES  # drafts that fitted
    while True:
        while len(running) < batch_size and (task := next(waiting, None)) is not None:
            task.most_drafts = min(task.most_drafts, most)
            decoding = denoise(task)
            running.append((task, decoding, next(decoding)))
        if not running:
            return
        started = perf_counter()
        while (outputs := _forward(model, running)) is None:
            running = _with_fewer_drafts(running)
            most = min(most, *(task.most_drafts for task, _, _ in running))
        synchronize(model.device)  # the walk waits for the values anyway
        forwarded = perf_counter() - started
        finished: list[Task] = []
        still: list[_Running] = []
        for task, decoding, rows in running:
            task.stats.nfe += 1
            task.stats.forward_seconds += forwarded
            task.stats.positions_computed += sum(len(row.ids) for row in rows)
            ours, outputs = outputs[: len(rows)], outputs[len(rows) :]
            try:
                still.append((task, decoding, decoding.send(ours)))
            except StopIteration:
                finished.append(task)
        for task, _, _ in running:
            task.stats.seconds += perf_counter() - started
        running = still
        yield finished


def _forward(model: DiffusionLM, running: Sequence[_Running]) -> list[RowOutput] | None:
    """Outputs of all rows; None if they do not fit into memory."""
    try:
        return forward(model, [row for _, _, rows in running for row in rows])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None  # outside of the handler, which keeps the failed forward's tensors alive


def _with_fewer_drafts(running: Sequence[_Running]) -> list[_Running]:
    """The same decodes with half the drafts.

    Raises
    ------
    torch.OutOfMemoryError
        If there are no drafts to do without: plain decoding does not fit either.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    before = sum(task.stats.halvings for task, _, _ in running)
    smaller = [(task, decoding, decoding.throw(_TooLargeError())) for task, decoding, _ in running]
    if sum(task.stats.halvings for task, _, _ in running) == before:
        raise torch.OutOfMemoryError("a forward without drafts does not fit into memory")
    return smaller


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator failed; that of CPUs has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
