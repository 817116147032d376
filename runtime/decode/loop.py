"""The decode loop, plain and speculative.

One loop serves both: plain decoding is speculation without drafts. Read `denoise` first.
"""

from __future__ import annotations

from collections.abc import Generator
from time import perf_counter

import torch
from torch import Tensor

from spiffy.runtime.decode.task import Task, is_stopped
from spiffy.runtime.draft import Candidates, Drafter, rank_candidates
from spiffy.runtime.draft.rejected import with_rejected
from spiffy.runtime.forward.cache import CACHES, Cache, Evaluation
from spiffy.runtime.forward.pack import Row, RowOutput
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.policy import Distribution, choose, gumbel_noise, select, step_quota
from spiffy.schemas import SpiffyError

_FORESEEN = 32  # rows that pass through a dear output head at once

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
    drafter, advice = task.drafter, None
    candidates: Candidates | None = None  # what is known about the root before its forward
    drafting = 0.0  # seconds
    if task.adviser is not None:
        task.adviser.begin(canvas)
    while not root.finished:
        turned = perf_counter()
        states = root.ids[None]
        if drafter is not None and candidates is not None:
            may_complete = cache.crosses and root.block + 1 < canvas.blocks
            room = len(candidates.positions) - (not may_complete)
            drafts = drafter(root, candidates, room)[: task.most_drafts]
            states = torch.cat((states, drafts))
            drafting += perf_counter() - turned
        drafted = perf_counter()
        states, evaluation = yield from _evaluated(task, cache, root, states)
        stats.drafted += len(states) - 1

        arrived = perf_counter()
        here, cursor = 0, root
        while True:
            masked = canvas.masked(cursor, task.model.mask_token_id)
            if evaluation.first_only:
                masked = masked[:1]
            elif len(states) > 1 and task.model.head_is_dear and here not in evaluation.foreseen:
                evaluation.foresee(_likely(task, cursor, states, evaluation, here))
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
        stats.draft_seconds += drafting
        if task.adviser is not None and advice is not None:
            steps = cursor.step - root.step
            task.adviser.learn(advice, steps, arrived - drafted, drafting)
            chosen = str(advice.choice)
            stats.budgets[chosen] = stats.budgets.get(chosen, 0) + 1

        cache.settle(here)
        root, candidates, advice, drafting = cursor, None, None, 0.0
        if not root.finished and cache.takes_drafts(root):
            if task.adviser is not None:
                advice = task.adviser.advise()
                drafter = advice.drafter
            if drafter is not None:
                candidates = _candidates(
                    task, drafter, root, states, evaluation, here, distribution
                )
                drafting = perf_counter() - walked


def _likely(
    task: Task, cursor: Cursor, states: Tensor, evaluation: Evaluation, here: int
) -> dict[int, Tensor]:
    """The state of the cursor, and states that the walk may come to in its block, by number.

    Drafts that extend it, the first ones first, with masks left; each with its masked positions.
    """
    span, mask = task.canvas.span(cursor.block), task.model.mask_token_id
    blocks = states[:, span.start : span.stop]
    extends = ((blocks == blocks[here]) | (blocks[here] == mask)).all(1)
    extends &= (blocks == mask).any(1)
    extends[here] = False
    found = {here: task.canvas.masked(cursor, mask)}
    rows = len(found[here])
    for number in extends.nonzero()[:, 0].tolist():
        if not evaluation.windows[number].covers(span):
            continue
        masked = task.canvas.masked(Cursor(states[number], cursor.block), mask)
        rows += len(masked)
        if rows > _FORESEEN:
            break
        found[number] = masked
    return found


class TooLargeError(Exception):
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
        except TooLargeError:
            if len(states) > 1:
                task.most_drafts = (len(states) - 1) // 2
                task.stats.halvings += 1
                states = states[: 1 + task.most_drafts]
        else:
            return states, evaluation


def _candidates(
    task: Task,
    drafter: Drafter,
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
    source = None
    if root.block_step > 0 and not evaluation.first_only:
        source, seen = distribution, here
    elif root.block_step > 0 or task.edges.first:
        span = task.canvas.span(root.block)
        for seen in (here, *range(len(evaluation.windows))):
            if evaluation.windows[seen].covers(span):
                source = evaluation.distribution(seen, masked)
                break
    if source is None:
        return None
    fresh = (states[seen] != root.ids).nonzero()[:, 0]
    mask, ranks = task.model.mask_token_id, drafter.token_ranks
    candidates = rank_candidates(source, task.settings, mask, ranks, masked, fresh)
    if source is distribution and drafter.asks_rejected:
        span = task.canvas.span(root.block)
        return with_rejected(candidates, evaluation, root, states, seen, span, mask)
    return candidates


def denoising_step(
    task: Task, cursor: Cursor, distribution: Distribution, first_only: bool = False
) -> Cursor:
    """The next true state: the unmasking policy applied to what the model says at this one."""
    settings, model, canvas = task.settings, task.model, task.canvas
    positions, span = distribution.positions, canvas.span(cursor.block)
    own = canvas.answer(cursor.block)
    if not distribution.is_number:
        raise _no_number(task, cursor)
    noise = None
    if settings.temperature > 0:
        drawn = gumbel_noise(
            task.seed, task.sequence, cursor.step, canvas.block_length, model.vocab_size
        )
        noise = drawn.to(positions.device)[positions - span.start]
    tokens, score = choose(distribution, settings, model.mask_token_id, noise)
    shared = len(own) if model.family.splits_masks else None
    steady = step_quota(settings, cursor.block_step, len(positions), shared)
    quota = 1 if first_only else steady
    chosen = select(score, quota, settings, model.family.threshold_strict)
    ids = cursor.ids.scatter(0, positions[chosen], tokens[chosen])

    answer = ids[own.start : own.stop].tolist()
    step = cursor.step + 1
    if model.mask_token_id in answer:
        return Cursor(ids, cursor.block, cursor.block_step + 1, step)
    ended = settings.stop_at_eos and not model.eos_token_ids.isdisjoint(answer)
    finished = ended or cursor.block + 1 == canvas.blocks or is_stopped(task, ids, own.stop)
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
