"""What forwards and drafting cost here: turns of the decode loop, timed at some roots.

`cost` asks for it once per machine and setting, and remembers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from spiffy.runtime.budget.estimates import ladder
from spiffy.runtime.decode import (
    Task,
    batches_head,
    denoising_step,
    find,
    keys_of,
    likely_states,
    looked_at,
    may_complete,
)
from spiffy.runtime.draft import Drafter, rank_candidates, search_of
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.forward.cache import CACHES, Cache, Forwards, OverflowedError
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.forward.request import Reader
from spiffy.runtime.models.device import synchronize
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.reading import Reading
from spiffy.schemas import CostPoint
from spiffy.schemas.errors import is_out_of_memory

_ROUNDS = 20  # times that every number of drafts is timed, at most
_ROOTS = 3  # roots at which they are
#: A forward this many times the price of a plain one never pays: walks are not that long.
_HOPELESS = 6.0


#: From a number of drafts to a drafter of at most that many.
MakeDrafter = Callable[[int], Drafter]
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class _TimedRoot:
    """A root on the way through a task's first block, and what is known there."""

    root: Cursor
    known: Reading
    fresh: Tensor


@dataclass(frozen=True)
class _DecodeParts:
    """The decode loop's parts, to be run one by one at some roots of a task's first block.

    Roots differ: the first of a block has most masked positions, the last ones have drafts that
    complete it. So several are taken, spread evenly over a plain decode of the block.
    """

    task: Task
    cache: Cache
    roots: tuple[_TimedRoot, ...]

    @classmethod
    def at_roots(cls, task: Task, limit: float) -> _DecodeParts:
        """Decode the first block plainly, for at most about `limit` seconds."""
        started = perf_counter()
        task = _whole_blocks(task)
        model, canvas = task.model, task.canvas
        reader = Reader(
            model, task.settings, canvas, TOKEN_RANKS + 1, asks_rejected=True, noise=task.noise
        )
        cache = CACHES[task.settings.cache](model, canvas, task.edges, reader)
        cursor = canvas.start(task.prompt, model.mask_token_id)
        passed: list[_TimedRoot] = []
        while True:
            evaluation = _run(task, cache.evaluate(cursor, cursor.ids[None], False))
            first_only = cache.first_only(cursor)
            positions = looked_at(task, cursor, first_only)
            known = evaluation.reading(0, positions, keys_of(task, cursor, positions))
            following = denoising_step(task, cursor, known, first_only)
            if first_only and following.block == cursor.block:  # tells about one position only
                cursor = following
                continue
            if not passed:  # what is known before a block's first forward is known less well
                passed.append(_TimedRoot(cursor, known, known.positions[:0]))
            if following.block > cursor.block or following.finished:
                break
            fresh = (following.ids != cursor.ids).nonzero()[:, 0]
            passed.append(_TimedRoot(following, known, fresh))
            if perf_counter() - started > limit:
                break
            cursor = following
        if not cache.crosses:  # a block's first forward has no drafts
            passed = passed[1:] or passed
        count = min(len(passed), _ROOTS)
        return cls(
            task,
            cache,
            tuple(passed[(2 * k + 1) * len(passed) // (2 * count)] for k in range(count)),
        )

    def draft(self, at: _TimedRoot, drafter: Drafter) -> Tensor:
        """Root and drafts, int64 [1 + n, length]."""
        task, root = self.task, at.root
        masked = task.canvas.masked(root, task.model.mask_token_id)
        candidates = rank_candidates(
            at.known,
            task.settings,
            task.model.mask_token_id,
            drafter.token_ranks,
            masked,
            at.fresh,
            search_of(drafter),
        )
        drafts = drafter(root, candidates, len(masked) - (not may_complete(task, self.cache, root)))
        return torch.cat((root.ids[None], drafts))

    def forward(self, at: _TimedRoot, states: Tensor) -> Evaluation:
        """One forward over root and drafts, and what it passes through an expensive output head."""
        try:
            evaluation = _run(self.task, self.cache.evaluate(at.root, states, len(states) > 1))
        except OverflowedError:  # as decoding does
            states = states[:1]
            evaluation = _run(self.task, self.cache.evaluate(at.root, states, False))
        if batches_head(self.task):
            evaluation.precompute(likely_states(self.task, at.root, states, evaluation, 0))
        return evaluation

    def step(self, at: _TimedRoot, states: Tensor, evaluation: Evaluation) -> None:
        """One denoising step of the walk."""
        positions = looked_at(self.task, at.root)
        keys = keys_of(self.task, at.root, positions)
        following = denoising_step(self.task, at.root, evaluation.reading(0, positions, keys))
        find(states, following.ids)


def _whole_blocks(task: Task) -> Task:
    """The task without the end of its prompt that opens the first block, if it does."""
    canvas = task.canvas
    if canvas.first in (0, canvas.prompt_length):
        return task
    shorter = replace(canvas, prompt_length=canvas.first)
    return replace(task, prompt=task.prompt[: canvas.first], canvas=shorter, path=[])


def _run(task: Task, forwards: Forwards) -> Evaluation:
    rows = next(forwards)
    while True:
        try:
            rows = forwards.send(forward(task.model, rows, [task.canvas.length] * len(rows)))
        except StopIteration as done:
            evaluation: Evaluation = done.value
            return evaluation


@dataclass(frozen=True)
class Timed:
    """What was timed: for numbers of drafts, in seconds.

    Attributes
    ----------
    points
        Forwards, with no draft too.
    step_seconds
        One denoising step.
    drafting, turns
        By way: choosing drafts, and that with the forward after it.
    """

    points: tuple[CostPoint, ...]
    step_seconds: float
    drafting: Mapping[str, tuple[CostPoint, ...]]
    turns: Mapping[str, tuple[CostPoint, ...]]


def timed(
    task: Task, largest: int, drafters: Mapping[str, MakeDrafter], limit: float = 4.0
) -> Timed:
    """Time what a forward with 0 to `largest` drafts costs behind the task's prompt.

    Drafting, forwards and denoising steps are those of the decode loop, in its order and several
    turns in a row: what runs before leaves the processor's caches in its own state, which makes a
    tenth of a small model's forward. Numbers of drafts are interleaved, so that drift of the
    machine hits them alike, for up to `limit` seconds; medians are reported. On slow models one
    draft is tried in any case.
    """
    if largest < 1:
        raise ValueError(f"largest {largest}: must be at least 1")
    budgets = [0, *ladder(largest)]
    made = {way: {n: make(n) for n in budgets[1:]} for way, make in drafters.items()}
    turns = _Turns(_DecodeParts.at_roots(task, limit / 4), made, limit)
    found, promising = turns.warm_up(budgets)
    turns.repeat(promising)

    def points(of: Callable[[int], float], least: int = 1) -> tuple[CostPoint, ...]:
        return tuple(CostPoint(drafts=n, seconds=of(n)) for n in found if n >= least)

    timed_ways = [way for way in made if len(found) > 1]  # a single draft may not fit into memory
    return Timed(
        points(turns.forward_seconds, least=0),
        turns.seconds("step", 0),
        {way: points(partial(turns.seconds, way)) for way in timed_ways},
        {way: points(partial(turns.turn_seconds, way)) for way in timed_ways},
    )


@dataclass
class _Turns:
    """Times turns of a decode loop's parts, and keeps the seconds.

    Attributes
    ----------
    drafters
        By way and by most drafts.
    limit
        Seconds for all of it.
    """

    parts: _DecodeParts
    drafters: Mapping[str, Mapping[int, Drafter]]
    limit: float
    _seconds: dict[tuple[str, int], dict[_TimedRoot | None, list[float]]] = field(
        default_factory=dict
    )  # by what was done, for how many drafts, and at which root (None: not warmed up)

    def __post_init__(self) -> None:
        self._began = perf_counter()
        self._device = self.parts.task.model.device
        self._middle = self.parts.roots[len(self.parts.roots) // 2]

    def warm_up(self, budgets: Sequence[int]) -> tuple[list[int], list[int]]:
        """Find out how far to go: numbers of drafts that were timed, and those that may pay."""
        found: list[int] = []
        for n in budgets:
            if n > 1 and self._is_late():
                break
            try:
                took = self._all_ways(n, warm=False)
                if self._is_hopeless(n):  # or the first of its size, which compiles something
                    self._began += max(0.0, took - self._all_ways(n, warm=True))
            except RuntimeError as error:
                if not is_out_of_memory(error) or not n:
                    raise
                break
            found.append(n)
            if self._is_hopeless(n):
                return found, found[:-1]
        return found, found

    def repeat(self, budgets: Sequence[int]) -> None:
        """Time them at all roots, in turns, for as long as there is time."""
        for _ in range(_ROUNDS):
            for n in budgets:
                if self._is_late():
                    return
                self._plain(n, self._middle, warm=False)
                roots = self.parts.roots
                for at in [self._middle] if n else 2 * roots:  # all is compared with 0 drafts
                    self._plain(n, at, warm=True)
                for way in self.drafters if n else ():
                    self._drafted(way, n, roots[-1], warm=False)
                    for at in roots:
                        self._drafted(way, n, at, warm=True)

    def seconds(self, what: str, n: int) -> float:
        """Mean over the roots of their medians; of what was never timed warm, of the cold ones."""
        medians = {at: median(values) for at, values in self._seconds[what, n].items()}
        return fmean([v for at, v in medians.items() if at is not None] or medians.values())

    def forward_seconds(self, n: int) -> float:
        """Of a forward behind another one."""
        return self.seconds("forward", n)

    def turn_seconds(self, way: str, n: int) -> float:
        """Of choosing drafts, and of the forward after that: it finds colder caches."""
        return self.seconds(way, n) + self.seconds(f"forward after {way}", n)

    def _is_late(self) -> bool:
        return perf_counter() - self._began > self.limit

    def _is_hopeless(self, n: int) -> bool:
        return self.forward_seconds(n) > _HOPELESS * self.forward_seconds(0)

    def _all_ways(self, n: int, warm: bool) -> float:
        """A turn of every way; seconds of all."""
        began = perf_counter()
        self._plain(n, self._middle, warm)
        for way in self.drafters if n else ():
            self._drafted(way, n, self._middle, warm)
        return perf_counter() - began

    def _plain(self, n: int, at: _TimedRoot, warm: bool) -> None:
        """A forward over the root and as many copies of it, and a step."""
        self._verified("forward", n, at, at.root.ids.repeat(1 + n, 1), warm)

    def _drafted(self, way: str, n: int, at: _TimedRoot, warm: bool) -> None:
        """The same with drafts that are chosen before."""
        drafter = self.drafters[way][n]
        states = self._time(way, n, at, warm, partial(self.parts.draft, at, drafter))
        self._verified(f"forward after {way}", n, at, states, warm)

    def _verified(self, what: str, n: int, at: _TimedRoot, states: Tensor, warm: bool) -> None:
        forward_of, step_of = self.parts.forward, self.parts.step
        evaluation = self._time(what, n, at, warm, partial(forward_of, at, states))
        self._time("step", 0, at, warm, partial(step_of, at, states, evaluation))

    def _time(
        self, what: str, n: int, at: _TimedRoot, warm: bool, action: Callable[[], _Result]
    ) -> _Result:
        synchronize(self._device)
        started = perf_counter()
        result = action()
        synchronize(self._device)
        by_root = self._seconds.setdefault((what, n), {})
        by_root.setdefault(at if warm else None, []).append(perf_counter() - started)
        return result
