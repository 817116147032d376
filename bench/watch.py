"""Watch a decode from outside: which drafts each forward verified, and which of them held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spiffy.runtime.decode import Advice, Adviser, Task, make_task, run
from spiffy.runtime.draft import Candidates, Chooser, Drafter, Selection, Walk, graph_drafter
from spiffy.runtime.generate import collect, decoding_settings
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.text import Prompt
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.schemas import DraftGraph
from spiffy.schemas.bench import Acceptance, Draft, RankTally, Tally, Turn, Walkthrough

Fill = dict[int, int]  # positions to token ids


class Call(NamedTuple):
    """What a drafter was told about a root and proposed for it (int64 [n, length])."""

    root: Cursor
    candidates: Candidates
    states: Tensor


class Watched:
    """A drafter that remembers what it proposed; a `Chooser` as far as its drafter is one.

    Attributes
    ----------
    calls
        Those that a `Watch` has not taken up yet.
    """

    def __init__(self, drafter: Drafter, calls: list[Call] | None = None) -> None:
        self.drafter = drafter
        self.token_ranks, self.asks_rejected = drafter.token_ranks, drafter.asks_rejected
        self.calls: list[Call] = [] if calls is None else calls

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `spiffy.runtime.draft.Drafter`."""
        states = self.drafter(root, candidates, room)
        self.calls.append(Call(root, candidates, states))
        return states

    @property
    def leader(self) -> Watched:
        """See `spiffy.runtime.draft.Chooser`."""
        if not isinstance(self.drafter, Chooser):
            return self
        return Watched(self.drafter.leader, self.calls)

    def learn(self, walk: Walk) -> None:
        """See `spiffy.runtime.draft.Chooser`."""
        if isinstance(self.drafter, Chooser):
            assert isinstance(walk.led, Watched)  # who else leads
            self.drafter.learn(replace(walk, led=walk.led.drafter))


class WatchedAdviser:
    """An adviser whose drafters' proposals are remembered; it may advise others meanwhile."""

    def __init__(self, adviser: Adviser) -> None:
        self.adviser = adviser
        self.begin, self.why = adviser.begin, adviser.why
        self.after_forward = adviser.after_forward
        self.calls: list[Call] = []

    @property
    def rests(self) -> bool:
        """See `spiffy.runtime.decode.Adviser`."""
        return self.adviser.rests

    def advise(self) -> Advice:
        """See `spiffy.runtime.decode.Adviser`."""
        drafter, choice = self.adviser.advise()
        return Advice(None if drafter is None else Watched(drafter, self.calls), choice)

    def learn(self, advice: Advice, steps: int, seconds: float) -> None:
        """See `spiffy.runtime.decode.Adviser`."""
        self.adviser.learn(advice, steps, seconds)


@dataclass(frozen=True)
class Forward:
    """One forward of a decode.

    Attributes
    ----------
    root
        The state that it started from.
    candidates, states
        What the drafter was told, and what of its proposal was verified (int64 [n, length]); None
        without a drafter.
    accepted
        Drafts that the walk hopped to, in order.
    reached
        States after every denoising step of the walk.
    seconds
        Drafting and verification included.
    """

    root: Cursor
    candidates: Candidates | None
    states: Tensor | None
    accepted: tuple[Cursor, ...]
    reached: tuple[Cursor, ...]
    seconds: float


class Watch:
    """Follows the decode of a task, forward by forward.

    Parameters
    ----------
    task
        It keeps its path. Its drafter or adviser, if any, must be a watched one.
    keeps_path
        Whether what of the path has been seen stays there: a long answer's takes gigabytes.
    """

    def __init__(self, task: Task, *, keeps_path: bool = True) -> None:
        self.task, self._keeps_path = task, keeps_path
        watched = task.adviser or task.drafter
        self._calls = watched.calls if isinstance(watched, (Watched, WatchedAdviser)) else []
        self._begin()
        self._started = perf_counter()

    def _begin(self) -> None:
        task = self.task
        self._root = task.canvas.start(task.prompt, task.model.mask_token_id)
        self._seen, self._given_up = 0, task.given_up  # states of the path; forwards
        self._drafted = 0  # drafts of the forwards seen

    def forward(self) -> Forward:
        """What the last forward did; to be called after each."""
        task = self.task
        if task.given_up != self._given_up:  # begun anew
            self._begin()
        root, reached = self._root, tuple(task.path[self._seen :])
        # A forward that only fills a cache makes no step; the root's drafts wait for the next.
        call = next((c for c in self._calls if c.root is root), None) if reached else None
        self._root = reached[-1] if reached else root
        self._calls[:] = [c for c in self._calls if c.root is self._root]
        if not self._keeps_path:
            del task.path[:-1]
        self._seen = len(task.path)
        verified, self._drafted = task.stats.drafted - self._drafted, task.stats.drafted
        before, self._started = self._started, perf_counter()
        seconds = self._started - before
        if call is None:
            return Forward(root, None, None, (), reached, seconds)
        states = call.states[:verified]  # what memory left of them
        return Forward(root, call.candidates, states, _hopped(root, reached), reached, seconds)


def _hopped(root: Cursor, reached: Sequence[Cursor]) -> tuple[Cursor, ...]:
    """Drafts that a walk came to: none after its last step, nor after one that changes nothing."""
    states = pairwise([root, *reached[:-1]])
    return tuple(after for before, after in states if not torch.equal(before.ids, after.ids))


def decode(task: Task) -> list[Forward]:
    """Decode a task to its end; its drafter or adviser, if any, must be a watched one."""
    watch = Watch(task)
    return [watch.forward() for _ in run(task.model, [task])]


def step_through(
    model: DiffusionLM,
    prompt: Prompt,
    graph: DraftGraph,
    budget: int = 8,
    selection: Selection = "model",
    **options: Any,
) -> Walkthrough:
    """One decode to step through, in a notebook for example.

    Parameters
    ----------
    prompt, graph, selection, options
        As for `spiffy.runtime.generate`.
    budget
        Drafts per forward.

    Raises
    ------
    SpiffyError
        As `spiffy.runtime.generate`.
    """
    settings = decoding_settings(model, graph, **options)
    ids = model.encode(prompt)
    plain = make_task(model, ids, settings)
    decode(plain)
    task = make_task(model, ids, settings)
    task.drafter = Watched(graph_drafter(model, graph, settings, budget, selection))
    forwards = decode(task)
    return told(
        model,
        task.canvas,
        forwards,
        prompt=model.decode_text(ids.tolist()),
        method=f"{selection} {budget}",
        plain_nfe=plain.stats.nfe,
        text=collect(task).text,
    )


def told(
    model: DiffusionLM, canvas: Canvas, forwards: Sequence[Forward], **facts: Any
) -> Walkthrough:
    """A decode's forwards as they are shown; `facts` are the fields that they do not tell."""
    tail = forwards[0].root.ids[canvas.first : canvas.prompt_length].tolist()
    return Walkthrough(
        answer_start=canvas.prompt_length,
        length=canvas.length,
        turns=tuple(turn(model, canvas, forward) for forward in forwards),
        prompt_tokens=tuple(token_text(model, token) for token in tail),
        **facts,
    )


def filled(root: Cursor, ids: Tensor) -> Fill:
    """What a state has that its root has not."""
    at = (root.ids != ids).nonzero()[:, 0]
    return dict(zip(at.tolist(), ids[at].tolist(), strict=True))


def _drafts(forward: Forward) -> list[tuple[Fill, bool]]:
    if forward.states is None:
        return []
    hopped = [cursor.ids.tolist() for cursor in forward.accepted]
    return [(filled(forward.root, ids), ids.tolist() in hopped) for ids in forward.states]


@dataclass(frozen=True)
class Tallies:
    """Drafts of some forwards, counted: far smaller than what they are counted in.

    Attributes
    ----------
    depth, place, rank
        Drafted and accepted, by how many positions a draft fills in, less one; by a fill's place
        in the block; and by its draft coordinates.
    walks
        Forwards by how many drafts were hopped along after them.
    """

    depth: Counter[tuple[int, bool]]
    place: Counter[tuple[int, bool]]
    rank: Counter[tuple[tuple[int, int], bool]]
    walks: Counter[int]

    @classmethod
    def of(cls, canvas: Canvas, forwards: Iterable[Forward]) -> Tallies:
        """Count the drafts of one decode."""
        found = cls.together(())
        for forward in forwards:
            if forward.states is None or forward.candidates is None or not len(forward.states):
                continue
            found.walks[len(forward.accepted)] += 1
            ranks = {p: i for i, p in enumerate(forward.candidates.positions.tolist())}
            tokens = forward.candidates.tokens.tolist()
            start = canvas.span(forward.root.block).start
            for fill, held in _drafts(forward):
                found.depth[len(fill) - 1, held] += 1
                for position, token in fill.items():
                    found.place[position - start, held] += 1
                    i = ranks[position]
                    if token in tokens[i]:  # perfect drafts know tokens of any rank
                        found.rank[(i, tokens[i].index(token)), held] += 1
        return found

    @classmethod
    def together(cls, parts: Iterable[Tallies]) -> Tallies:
        """Those of several decodes as one."""
        whole = cls(Counter(), Counter(), Counter(), Counter())
        for part in parts:
            whole.depth.update(part.depth)
            whole.place.update(part.place)
            whole.rank.update(part.rank)
            whole.walks.update(part.walks)
        return whole

    def acceptance(self) -> Acceptance:
        """Which drafts came true."""
        ranks = sorted({key for key, _ in self.rank})
        return Acceptance(
            by_depth=_by_index(self.depth),
            by_place=_by_index(self.place),
            by_rank=tuple(
                RankTally(position_rank=i, token_rank=j, **_tally(self.rank, (i, j)))
                for i, j in ranks
            ),
            walk_lengths=tuple(self.walks[k] for k in range(max(self.walks, default=-1) + 1)),
        )


def _by_index(counts: Counter[tuple[int, bool]]) -> tuple[Tally, ...]:
    last = max((k for k, _ in counts), default=-1)
    return tuple(Tally(**_tally(counts, k)) for k in range(last + 1))


def _tally(counts: Counter[Any], key: object) -> dict[str, int]:
    held = counts[key, True]
    return {"drafted": counts[key, False] + held, "accepted": held}


def turn(model: DiffusionLM, canvas: Canvas, forward: Forward) -> Turn:
    """A forward in words, to be stepped through."""

    def words(fill: Fill) -> tuple[tuple[int, str], ...]:
        return tuple((position, token_text(model, token)) for position, token in fill.items())

    drafts = _drafts(forward)
    span = canvas.span(forward.root.block)
    states = [forward.root, *forward.reached]
    return Turn(
        block=forward.root.block,
        span=(span.start, span.stop),
        drafts=tuple(
            Draft(fill=words(fill), parents=_parents(drafts, k), accepted=held)
            for k, (fill, held) in enumerate(drafts)
        ),
        steps=tuple(words(filled(before, after.ids)) for before, after in pairwise(states)),
        seconds=forward.seconds,
    )


def token_text(model: DiffusionLM, token: int) -> str:
    """A token as text, special tokens by name."""
    return f"<{token}>" if model.tokenizer is None else str(model.tokenizer.decode([token]))


def _parents(drafts: Sequence[tuple[Fill, bool]], k: int) -> tuple[int, ...]:
    """Numbers of the largest drafts that draft k extends; the root (0) if there is none."""
    own = drafts[k][0].items()
    within = [
        (len(fill), number)
        for number, (fill, _) in enumerate(drafts, start=1)
        if len(fill) < len(own) and fill.items() <= own
    ]
    largest = max(within, default=(0, 0))[0]
    return tuple(number for size, number in within if size == largest) or (0,)
