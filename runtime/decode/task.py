"""One sequence to decode: what decides its tokens, what has become of it, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from spiffy.runtime.draft import Drafter
from spiffy.runtime.forward.cache import BlockEdges, most_drafts
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.text import Prompt, given_ids, stop_strings
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.runtime.step.noise import Noise
from spiffy.schemas import DecodingSettings, SpiffyError
from spiffy.schemas.records import MAX_NODES

_SPELLED = 8  # tokens that a character of a stop string may take; most take less than one


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
        Draft states evaluated, and steps gained by hopping to one, or from one, as it is, into the
        next block (policy "joint").
    halvings
        Times that a forward did not fit into memory and its drafts were halved.
    overflows
        Forwards made again without drafts, because the numbers of one overflowed.
    seconds
        Wall-clock time from prompt ids to answer ids; forwards shared by several sequences count
        in full for each.
    forward_seconds, draft_seconds, verify_seconds
        What of it went into the transformer; into ranking candidates and choosing drafts; into the
        walk (output head, softmax, unmasking policy), which plain decoding makes step by step too.
        Off the CPU head and softmax belong to the forward.
    budgets
        With budget "auto": forwards by what was chosen for them ("plain", "graph 8", "model 4").
    why
        What the choice at the end rests on, in words.
    """

    nfe: int = 0
    positions_computed: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    halvings: int = 0
    overflows: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    budgets: dict[str, int] = field(default_factory=dict)
    why: str = ""


class Advice(NamedTuple):
    """Who drafts the next forward (None: nobody), and as what that is learned from."""

    drafter: Drafter | None
    choice: Any


class Adviser(Protocol):
    """Chooses the drafter of every forward that may have drafts, and is told what came of it."""

    @property
    def rests(self) -> bool:
        """Whether the next forward is plain whatever `advise` would say.

        Then neither `advise` nor `learn` is called for it. Changes only in `after_forward`.
        """
        ...

    def begin(self, canvas: Canvas) -> None:
        """A sequence is about to be decoded."""
        ...

    def after_forward(self, sequences: int, seconds: float) -> None:
        """A forward that so many sequences shared is done; called once, before they `learn`."""
        ...

    def advise(self) -> Advice:
        """Choose for the next forward; called where it may have drafts."""
        ...

    def learn(self, advice: Advice, steps: int, seconds: float) -> None:
        """Take in a forward: steps that it was worth, and seconds to choose and pack its states."""
        ...

    def why(self) -> str:
        """What the present choice rests on, in words."""
        ...


@dataclass(eq=False)  # two of the same prompt are two
class Task:
    """One sequence to decode: what decides its tokens, and what has become of it so far.

    Attributes
    ----------
    prompt
        int64 [prompt], on the host.
    seed, sequence
        The noise of a denoising step is a function of these and of the state alone.
    drafter, adviser
        The drafter of all forwards, or who chooses one for each; neither: plain decoding.
    most_drafts
        Drafts per forward that memory allows: a forward that does not fit halves it.
    stop
        Strings that end the answer, as soon as the block in which one is complete is done.
    until
        Asked after every finished block but the last, with the answer so far (`decoded`): whether
        it ends there.
    path
        The state after every denoising step made so far; the last one at least.
    keeps_path
        Whether all of them are kept: a long answer's take gigabytes.
    roots
        For every forward that made denoising steps, how many had been made before it.
    error
        What ended it before its time.
    ready
        When its rows for the next forward were there (`perf_counter`).
    given_up, anew
        Forwards made before it was begun anew, for want of memory, without `Stats.overflows`;
        whether it was.
    overflowed
        Whether the numbers of a draft overflowed: then there are no more.
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
    stop: tuple[str, ...] = ()
    until: Callable[[list[int]], bool] | None = None
    path: list[Cursor] = field(default_factory=list)
    keeps_path: bool = True
    roots: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    adviser: Adviser | None = None
    error: Exception | None = None
    ready: float = 0.0
    given_up: int = 0
    anew: bool = False
    overflowed: bool = False

    @property
    def may_draft(self) -> bool:
        """Whether a forward may have drafts, as far as memory and numbers go."""
        return self.most_drafts > 0 and not self.overflowed

    def allow(self, drafts: int) -> None:
        """Let forwards have so many drafts, or as many as its length allows."""
        self.most_drafts = min(drafts, most_drafts(self.settings, self.canvas))

    def begin_anew(self) -> None:
        """Forget the states so far, and the steps to them; what they took stays counted."""
        self.path.clear()
        self.roots.clear()
        self.stats.steps = self.stats.drafted = self.stats.accepted = 0
        self.given_up, self.anew = self.stats.nfe - self.stats.overflows, True

    @property
    def plain_nfe(self) -> int:
        """Forwards that plain decoding needs to come as far."""
        return self.stats.nfe - self.given_up - self.stats.overflows + self.stats.accepted

    @property
    def noise(self) -> Noise | None:
        """What temperatures above 0 draw from."""
        return Noise(self.seed, self.sequence) if self.settings.temperature > 0 else None


def make_task(
    model: DiffusionLM,
    prompt: Prompt,
    settings: DecodingSettings,
    drafter: Drafter | None = None,
    seed: int = 0,
    sequence: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    stop: str | Sequence[str] | None = (),
) -> Task:
    """Prepare the decoding of one prompt: whatever `DiffusionLM.encode` takes.

    Raises
    ------
    SpiffyError
        If the prompt is empty, holds ids outside the vocabulary, or leaves no room for the answer;
        if there are stop strings that are none, or no tokenizer to find them.
    """
    stop = checked_stop(model, stop)
    ids = given_ids(model.encode(prompt), model.vocab_size)
    canvas = planned(model, settings, len(ids))
    if model.max_length is not None and canvas.length > model.max_length:
        raise SpiffyError(
            f"prompt of {len(ids)} tokens plus gen_length {settings.gen_length} exceeds the "
            f"{model.max_length} positions of {model.name}: shorten the prompt or gen_length"
        )
    return Task(
        model,
        settings,
        canvas,
        ids.to("cpu", torch.long),
        seed,
        sequence,
        drafter,
        edges,
        most_drafts(settings, canvas),
        stop=stop,
    )


def checked_stop(model: DiffusionLM, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings, one or several; None: none.

    Raises
    ------
    SpiffyError
        If one is none, or the model has no tokenizer to find them.
    """
    words = stop_strings(stop)
    if words and model.tokenizer is None:
        raise SpiffyError(
            f"{model.name} ships no tokenizer, so its answers have no text to stop at"
        )
    return words


def planned(model: DiffusionLM, settings: DecodingSettings, prompt_length: int) -> Canvas:
    """Where prompt, blocks and answer will lie."""
    family = model.family
    return Canvas.plan(
        prompt_length,
        settings.gen_length,
        settings.block_length,
        family.block_causal,
        ends_with_prompt=family.blocks_end_with_prompt,
        cut=family.cuts_last_block,
    )


def median_task(tasks: Iterable[Task]) -> Task:
    """Of some tasks the one whose prompt is of median length."""
    ordered = sorted(tasks, key=lambda task: len(task.prompt))
    return ordered[len(ordered) // 2]


def decoded(task: Task, ids: Tensor, stop: int) -> list[int]:
    """The answer in a state (int64 [length]) up to position `stop`, and its first EOS token."""
    canvas = task.canvas
    stop = min(stop, canvas.prompt_length + canvas.gen_length)
    answer: list[int] = ids[canvas.prompt_length : stop].tolist()
    if task.settings.stop_at_eos:
        end = next((k for k, t in enumerate(answer) if t in task.model.eos_token_ids), len(answer))
        answer = answer[: end + 1]
    return answer


def is_stopped(task: Task, ids: Tensor, stop: int) -> bool:
    """Whether the answer up to position `stop` ends there, by a stop string or by `until`."""
    if not task.stop and task.until is None:
        return False
    so_far = decoded(task, ids, stop)
    if task.until is not None and task.until(so_far):
        return True
    if not task.stop:
        return False
    # What was there before the last block has been looked at; a stop string may begin in it.
    recent = so_far[-task.canvas.block_length - _SPELLED * (1 + max(map(len, task.stop))) :]
    found = task.model.codec.before_stop
    return found(recent, task.stop) is not None and found(so_far, task.stop) is not None
