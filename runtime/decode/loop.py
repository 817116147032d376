"""The decode loop, plain and speculative.

One loop serves both: plain decoding is speculation without drafts. Read `denoise` first.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.decode.task import Advice, Task, is_stopped
from spiffy.runtime.draft import Candidates, Chooser, Drafter, Walk, rank_candidates, search_of
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.draft.rejected import with_rejected
from spiffy.runtime.forward.cache import CACHES, Cache, OverflowedError
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.forward.pack import Row, RowOutput
from spiffy.runtime.forward.request import Reader, reads_on_host
from spiffy.runtime.models.slots import Slots
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.noise import redraw
from spiffy.runtime.step.own_policy import Step, own_choice
from spiffy.runtime.step.policy import replaced, select, step_quota
from spiffy.runtime.step.reading import Reading
from spiffy.schemas import SpiffyError
from spiffy.schemas.records import MAX_NODES

# Rows that pass through an expensive output head at once, times the bytes of a number: more of them
# take longer than what they may save.
_HEAD_BATCH = 128

Decoding = Generator[list[Row], list[RowOutput], None]


def denoise(task: Task, kv: Slots | None = None) -> Decoding:
    """Decode one sequence; yields the rows of each forward and is sent their outputs.

    Whoever runs the forwards otherwise than `Scheduler` does may have a `kv` of its own for keys
    and values (docs/engine.md).

    One turn is one forward over the root and its drafts, and the walk over what it verified. Drafts
    decide how many steps a forward is worth and nothing else: every step is a `denoising_step` on
    what the model says at a true state.
    """
    cache = open_cache(task, kv)
    drafting = _Drafting(task, cache)
    root = task.canvas.start(task.prompt, task.model.mask_token_id)
    while not root.finished:
        task.roots.append(root.step)
        states = drafting.draft(root)
        states, evaluation = yield from _verify(task, cache, root, states, drafting.expected)
        walk = _walk(task, cache, root, states, evaluation)
        drafting.learn(root, states, walk)
        cache.settle(walk.state, walk.last)
        root = walk.end
        drafting.prepare(root, states, evaluation, walk)
        del states, evaluation, walk  # they hold the forward's outputs: not during the next one
        if not task.keeps_path:
            del task.path[:-1]


class _Walked(NamedTuple):
    """Where a walk went.

    Attributes
    ----------
    end
        The first true state that the forward tells too little about: the next root.
    last, state
        The true state before it, and its number in the forward (0: the root).
    hops
        Steps that led to a state verified too, each of which saves a forward.
    reading
        What was read of the last state, if it is of all that may change there.
    """

    end: Cursor
    last: Cursor
    state: int
    hops: int
    reading: Reading | None


def _walk(
    task: Task, cache: Cache, root: Cursor, states: Tensor, evaluation: Evaluation
) -> _Walked:
    """Step from one true state to the next, for as long as the forward tells about them."""
    began = perf_counter()
    precomputes = len(states) > 1 and batches_head(task)
    cursor, state, hops = root, 0, 0
    last, stepped_from = root, 0
    while True:
        first_only = cache.first_only(cursor)
        positions = looked_at(task, cursor, first_only)
        if precomputes and not first_only and state not in evaluation.precomputed:
            evaluation.precompute(likely_states(task, cursor, states, evaluation, state))
        reading = evaluation.reading(state, positions, keys_of(task, cursor, positions))
        known = reading.is_number or not state
        if not known:  # another draft's doing: its own forward tells
            hops -= 1
            break
        stepped_from, last = state, cursor
        cursor = denoising_step(task, cursor, reading, first_only)
        task.path.append(cursor)
        task.stats.steps += 1
        verified = _find_verified(task, cache, states, evaluation, root, cursor)
        if verified is None or cursor.finished:
            break
        hops += verified != state or cursor.block > last.block
        state = verified
    task.stats.accepted += hops
    task.stats.verify_seconds += perf_counter() - began
    told = reading if known and not first_only else None
    return _Walked(cursor, last, stepped_from, hops, told)


class _Drafting:
    """Who drafts for a sequence, from forward to forward, and what they learn of it.

    That is the task's drafter, or whom its adviser names. Nobody drafts where nothing is known
    about the root before its forward.
    """

    def __init__(self, task: Task, cache: Cache) -> None:
        self.task, self.cache, self.drafter = task, cache, task.drafter
        self._drafts = 0  # chosen for this forward, whether or not they fit into memory
        self._chooser = self.drafter if isinstance(self.drafter, Chooser) else None
        self._known: Candidates | None = None
        self._advice: Advice | None = None
        self._seconds = 0.0  # of choosing drafts for one forward
        if task.adviser is not None:
            task.adviser.begin(task.canvas)

    @property
    def expected(self) -> bool:
        """Whether there may be drafts: forwards then tell what follows those that end a block."""
        return self.drafter is not None

    def draft(self, root: Cursor) -> Tensor:
        """The root and its drafts, int64 [1 + n, length]; without any the root alone."""
        began = perf_counter()
        states, self._drafts = root.ids[None], 0
        if self.drafter is not None and self._known is not None:
            completes = may_complete(self.task, self.cache, root)
            self._room = len(self._known.positions) - (not completes)
            self._led = self.drafter if self._chooser is None else self._chooser.leader
            drafts = self._led(root, self._known, self._room)
            self._drafts = len(drafts)
            states = torch.cat((states, drafts[: self.task.most_drafts]))
            self._seconds += perf_counter() - began
        self._drafted = perf_counter()
        return states

    def learn(self, root: Cursor, states: Tensor, walk: _Walked) -> None:
        """Tell whoever chose the drafts, or their number, what came of them."""
        task, self._ended = self.task, perf_counter()
        task.stats.draft_seconds += self._seconds
        if self._chooser is not None and self._known is not None:
            reached = _reached(root, task.path[root.step - walk.end.step :])
            cut = len(states) - 1 < self._drafts
            most = len(states) - 1 if cut else MAX_NODES
            candidates, room = self._known, self._room
            walked = Walk(self._led, root, candidates, room, states[1:], reached, most)
            self._chooser.learn(walked)
            learned = perf_counter()
            task.stats.draft_seconds += learned - self._ended
            self._ended = learned
        left_out = self._drafts > 0 and len(states) == 1  # by memory: no forward with drafts
        if task.adviser is not None and self._advice is not None and not left_out:
            # Without steps that commit nothing: they need no forward, with drafts or without.
            seconds = self._seconds + task.ready - self._drafted
            task.adviser.learn(self._advice, 1 + walk.hops, seconds)

    def prepare(self, root: Cursor, states: Tensor, evaluation: Evaluation, walk: _Walked) -> None:
        """Choose who drafts at the root that a walk ended at, and rank what they choose from."""
        task, adviser = self.task, self.task.adviser
        self._known, self._advice, self._seconds = None, None, 0.0
        if root.finished or not self.cache.takes_drafts(root):
            return
        if adviser is not None:
            mute = adviser.rests or not task.may_draft
            self._advice = None if mute else adviser.advise()
            self.drafter = None if self._advice is None else self._advice.drafter
            chosen = "plain" if self._advice is None else str(self._advice.choice)
            task.stats.budgets[chosen] = task.stats.budgets.get(chosen, 0) + 1
        if self.drafter is not None and task.may_draft:
            self._known = _candidates(
                task, self.drafter, root, states, evaluation, walk.state, walk.reading
            )
            self._seconds = perf_counter() - self._ended


def _reached(root: Cursor, path: list[Cursor]) -> Tensor:
    """The states of a walk, int64 [s, length]; steps that change nothing make none."""
    states = np.stack([cursor.ids.numpy() for cursor in (root, *path)])
    return torch.from_numpy(states[1:][(states[1:] != states[:-1]).any(1)])


def batches_head(task: Task) -> bool:
    """Whether several states pass the output head at once, before it is known which are walked."""
    return task.model.head_is_expensive and reads_on_host(task.model)


def likely_states(
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
    found = {here: looked_at(task, cursor)}
    rows, most = len(found[here]), _HEAD_BATCH // task.model.dtype.itemsize
    for number in extends.nonzero()[:, 0].tolist():
        if not evaluation.windows[number].covers(span):
            continue
        positions = looked_at(task, Cursor(states[number], cursor.block))
        rows += len(positions)
        if rows > most:
            break
        found[number] = positions
    return found


def open_cache(task: Task, kv: Slots | None = None) -> Cache:
    """The cache of a decode; without drafts a forward tells about the state that it is at."""
    drafter, advised = task.drafter, task.adviser is not None
    drafts = drafter is not None or advised
    edges = task.edges if drafts else replace(task.edges, complete=False)
    ranks = max(TOKEN_RANKS if advised else 0, 0 if drafter is None else drafter.token_ranks)
    reader = Reader(
        task.model,
        task.settings,
        task.canvas,
        ranks + 1 if drafts else 0,  # the mask token may be among them
        asks_rejected=advised or (drafter is not None and drafter.asks_rejected),
        noise=task.noise,
    )
    return CACHES[task.settings.cache](task.model, task.canvas, edges, reader, kv)


def may_complete(task: Task, cache: Cache, root: Cursor) -> bool:
    """Whether drafts may leave no mask in the root's block: if a forward can go on from there."""
    ends = root.block + 1 == task.canvas.blocks
    return (cache.crosses and not ends) or task.settings.edits_full_blocks


def looked_at(task: Task, cursor: Cursor, first_only: bool = False) -> Tensor:
    """Positions of which a step asks the model, int64 [M]: masked ones, or all that may change."""
    if first_only:
        return task.canvas.masked(cursor, task.model.mask_token_id)[:1]
    if task.settings.policy == "joint":
        return task.canvas.answered(cursor)
    return task.canvas.masked(cursor, task.model.mask_token_id)


def _find_verified(
    task: Task, cache: Cache, states: Tensor, evaluation: Evaluation, root: Cursor, cursor: Cursor
) -> int | None:
    """The state of the root's forward that tells what the next step has to know, if any does."""
    verified = find(states, cursor.ids, task.canvas.span(root.block))
    if verified is None or (cursor.block > root.block and not cache.crosses):
        return None
    read = task.canvas.span(cursor.block)
    if cache.first_only(cursor):
        before = read.start - task.model.family.logit_shift
        read = range(before, before + 1)
    return verified if evaluation.windows[verified].covers(read) else None


class TooLargeError(Exception):
    """Thrown into a decode in place of outputs: its rows did not fit into memory."""


def _verify(
    task: Task, cache: Cache, root: Cursor, states: Tensor, drafting: bool
) -> Generator[list[Row], list[RowOutput], tuple[Tensor, Evaluation]]:
    """Run the forward over the root and as many drafts as memory allows; returns those states.

    A cache changes only after the outputs of a forward have come and are numbers, so one that
    failed can be asked for again with fewer drafts. Drafts are no matter of tokens.
    """
    while True:
        try:
            evaluation = yield from cache.evaluate(root, states, drafting)
        except TooLargeError:
            if len(states) > 1:
                task.most_drafts = (len(states) - 1) // 2
                task.stats.halvings += 1
                states = states[: 1 + task.most_drafts]
        except OverflowedError:  # what the root's own forward says is not known yet
            task.overflowed, states = True, states[:1]
            task.stats.overflows += 1
        else:
            task.stats.drafted += len(states) - 1
            return states, evaluation


def _candidates(
    task: Task,
    drafter: Drafter,
    root: Cursor,
    states: Tensor,
    evaluation: Evaluation,
    here: int,
    reading: Reading | None,
) -> Candidates | None:
    """What is known about the new root's masked positions: the best source of drafts.

    That is the distribution that produced the root (what was read of it), unless it is of one
    position only; beside it stands what rejected drafts say, if the drafter asks. It does not reach
    into a new block, except where the forward did; then a draft that completed the old block,
    though it was rejected, may have seen nearly the right thing. The last two are what
    `BlockEdges.first` switches.
    """
    masked = task.canvas.masked(root, task.model.mask_token_id)
    at_source = None
    if root.block_step > 0 and reading is not None:
        at_source, source = reading, here
    elif root.block_step > 0 or task.edges.first:
        span = task.canvas.span(root.block)
        for source in (here, *range(len(evaluation.windows))):
            if not evaluation.windows[source].covers(span):
                continue
            at_source = evaluation.reading(source, masked)
            if at_source.is_number:
                break
            at_source = None  # a draft may overflow where the truth does not
    if at_source is None:
        return None
    fresh = torch.from_numpy((states.numpy()[source] != root.ids.numpy()).nonzero()[0])
    mask, ranks = task.model.mask_token_id, drafter.token_ranks
    candidates = rank_candidates(
        at_source, task.settings, mask, ranks, masked, fresh, search_of(drafter)
    )
    if at_source is reading and drafter.asks_rejected:
        span = task.canvas.span(root.block)
        return with_rejected(candidates, evaluation, root, states, source, span, mask)
    return candidates


def keys_of(task: Task, cursor: Cursor, positions: Tensor) -> Tensor | None:
    """Keys of what a state's next step draws at positions of its block (int64 [M]): int64 [M]."""
    noise, canvas = task.noise, task.canvas
    if noise is None:
        return None
    left = len(canvas.masked(cursor, task.model.mask_token_id))
    committed = torch.tensor(len(canvas.answer(cursor.block)) - left, device="cpu")
    return noise.keys(committed, redraw(task.settings, cursor), positions)


def denoising_step(
    task: Task, cursor: Cursor, reading: Reading, first_only: bool = False
) -> Cursor:
    """The next true state: the unmasking policy applied to what the model says at this one."""
    settings, model, canvas = task.settings, task.model, task.canvas
    given = (reading.positions, reading.tokens, reading.score)
    positions, tokens, score = (part.numpy() for part in given)
    own, held = canvas.answer(cursor.block), cursor.ids.numpy()[positions]
    if not reading.is_number:
        raise _no_number(task, cursor)
    masked = free = held == model.mask_token_id
    filling = bool(masked.any())
    if filling and settings.sub_block_length is not None:
        first = int(positions[masked][0])
        sub_block = canvas.sub_block(cursor.block, first, settings.sub_block_length)
        free = masked & (positions < sub_block.stop)
    shared = len(own) if model.family.splits_masks else None
    steady = step_quota(settings, cursor.block_step, int(free.sum()), shared)
    quota = 1 if first_only else steady
    if settings.own_policy:
        told = score[free], tokens[free], positions[free] - canvas.prompt_length
        own_step = Step(*told, quota, cursor.block, cursor.block_step)
        chosen = np.zeros_like(free)
        chosen[free] = own_choice(settings.policy, own_step)
    else:
        chosen = select(score, quota, settings, model.family.threshold_strict, free)
    if settings.policy == "joint":
        chosen |= replaced(tokens, score, held, settings) & ~masked
    ids = cursor.ids.clone()
    following = ids.numpy()
    following[positions[chosen]] = tokens[chosen]

    answer = following[own.start : own.stop].tolist()
    step, post_steps = cursor.step + 1, cursor.post_steps + (not filling)
    goes_on = model.mask_token_id in answer
    if settings.edits_full_blocks and not goes_on:
        changed = filling or bool(chosen.any())
        goes_on = changed and post_steps < settings.max_post_steps
    if goes_on:
        return Cursor(ids, cursor.block, cursor.block_step + 1, step, post_steps=post_steps)
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


def find(states: Tensor, ids: Tensor, differ: range | None = None) -> int | None:
    """First row of `states` (int64 [n, length]) that equals `ids`, if any.

    `differ`: where most of them are told apart, so that only others are looked at as a whole.
    """
    rows, wanted = states.numpy(), ids.numpy()
    part = slice(None) if differ is None else slice(differ.start, differ.stop)
    for row in (rows[:, part] == wanted[part]).all(1).nonzero()[0].tolist():
        if np.array_equal(rows[row], wanted):
            return int(row)
    return None
