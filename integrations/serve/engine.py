"""One thread owns the model: jobs come through a queue and share their forwards.

Nothing here knows of HTTP. A job's `tell` is called from the engine's thread, in the order in which
things happen to it, and a last time with `Done` or `Failed`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from time import monotonic
from typing import Any, Literal, NamedTuple

import torch

from spiffy.bench.watch import Watch, Watched, WatchedAdviser
from spiffy.integrations.serve.checking import Answer, compared
from spiffy.integrations.serve.metrics import Metrics
from spiffy.integrations.serve.watching import forward_event
from spiffy.runtime.budget.auto import auto_budget
from spiffy.runtime.decode import Scheduler, Stats, Task, decoded, make_task, planned
from spiffy.runtime.draft import Drafter, graph_drafter
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.generate import collect
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.source import served_name
from spiffy.runtime.models.text import Prompt, given_ids
from spiffy.runtime.streaming import NewText
from spiffy.schemas import Budget, DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.decoding import FILTERS

_LOG = logging.getLogger("spiffy")

_LONGEST = 4096  # positions, of a model that states no limit
_UNCHECKED = 64  # answers that wait for an idle moment to be compared
_RECENT = 0.9  # weight of the past in what a job takes


class TooLongError(SpiffyError):
    """Prompt and answer together are longer than the model reaches."""


class BusyError(Exception):
    """As many jobs wait as may; `seconds` says after how long it is worth another try."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests wait already: try again in {seconds} s")
        self.seconds = seconds


class StoppedError(Exception):
    """No jobs are taken any more."""


class Text(NamedTuple):
    """More of an answer: blocks that are finished."""

    job: Job
    text: str


class Seen(NamedTuple):
    """A forward of a watched job (`watching.forward_event`)."""

    job: Job
    forward: dict[str, Any]


class Done(NamedTuple):
    """A whole answer; `ids` hold its end-of-sequence token, if there is one."""

    job: Job
    text: str
    ids: list[int]
    stats: Stats
    reason: Literal["stop", "length"]


class Failed(NamedTuple):
    """The end of a job without an answer."""

    job: Job
    error: Exception


Event = Text | Seen | Done | Failed


class Job:
    """One answer that somebody waits for.

    Parameters
    ----------
    task
        What is decoded (`Engine.task`).
    tell
        Is called with all that happens to it.
    number
        Of the answer among those to one request.
    stream, watch
        Whether finished blocks, and whether forwards, are told.
    """

    def __init__(
        self,
        task: Task,
        tell: Callable[[Event], None],
        number: int = 0,
        *,
        stream: bool = False,
        watch: bool = False,
    ) -> None:
        self.task, self.tell, self.number = task, tell, number
        self._new = NewText(task) if stream else None
        self._watch: Watch | None = None
        task.keeps_path = watch
        if watch:
            if task.adviser is not None:
                task.adviser = WatchedAdviser(task.adviser)
            elif task.drafter is not None:
                task.drafter = Watched(task.drafter)
            self._watch = Watch(task, keeps_path=False)
        #: When its first forward began.
        self.joined: float | None = None

    def follow(self) -> None:
        """Tell what the last forward brought; called after each."""
        if self._watch is not None:
            self.tell(Seen(self, forward_event(self.task, self._watch.forward())))
        if self._new is not None and (text := self._new.more()):
            self.tell(Text(self, text))

    def end(self) -> Done | Failed:
        """Tell how it ended."""
        event: Done | Failed
        self.task.keeps_path = False  # nobody watches it any more, nor a copy of it
        try:
            event = self._done()
        except Exception as error:  # such as of a tokenizer
            event = Failed(self, error)
        self.tell(event)
        return event

    def _done(self) -> Done:
        task = self.task
        if task.error is not None:
            raise task.error
        output = collect(task)
        return Done(self, output.text, output.token_ids, output.stats, _reason(task))


def _reason(task: Task) -> Literal["stop", "length"]:
    """Whether an answer ended by itself: with an end-of-sequence token or before a stop string."""
    cursor = task.path[-1]
    ids = decoded(task, cursor.ids, task.canvas.span(cursor.block).start)
    if task.stop and task.model.codec.before_stop(ids, task.stop) is not None:
        return "stop"
    ended = task.settings.stop_at_eos and ids and ids[-1] in task.model.eos_token_ids
    return "stop" if ended else "length"


@dataclass(frozen=True)
class Limits:
    """What an engine takes on.

    Attributes
    ----------
    batch
        Jobs that share a forward.
    waiting
        Jobs beside those.
    verify_share
        Share of the answers that are compared with plain decoding when nothing else is to be done.
    """

    batch: int = 16
    waiting: int = 64
    verify_share: float = 0.0


class Engine:
    """Decodes what is submitted, as many at a time as there may be.

    Parameters
    ----------
    settings
        Of all answers; a job may have its own length, temperature and filters.
    graph, budget
        What drafts, and how many; without a graph nothing does.
    """

    def __init__(
        self,
        model: DiffusionLM,
        settings: DecodingSettings,
        graph: DraftGraph | None = None,
        budget: Budget = "auto",
        *,
        edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
        limits: Limits = Limits(),
        metrics: Metrics | None = None,
    ) -> None:
        self.model, self.settings, self.graph = model, settings, graph
        # Of a model that is served nobody changes the weights: after a NaN they are scanned once.
        model.broken_weights = cache(model.broken_weights)  # type: ignore[method-assign]
        self.edges, self.limits = edges, limits
        #: What the model is called: of a folder, its own name.
        self.name = served_name(model.name)
        self.metrics = Metrics() if metrics is None else metrics
        self.max_length = model.max_length or _LONGEST
        self.is_auto = graph is not None and budget == "auto"
        self._drafter: Drafter | None = None
        if graph is not None and budget != "auto":
            self._drafter = graph_drafter(model, graph, settings, budget)
        self._changed = threading.Condition()  # guards the next five
        self._arrived: list[Job] = []
        self._left: list[Job] = []
        self._count = 0  # jobs submitted that have not ended
        self._seconds = 1.0  # that a job took of late, once it had joined
        self._stopping = False
        # Of the engine's thread alone:
        self._jobs: dict[int, Job] = {}  # by id of their tasks
        self._scheduler = Scheduler(model, limits.batch)
        self._checker = Scheduler(model, 1)
        self._unchecked: deque[tuple[Task, Answer]] = deque()
        self._checked: Answer | None = None  # the one that `_checker` decodes plainly
        self._draw = random.Random(0)
        self.metrics.running.set_function(self._together)
        self.metrics.waiting.set_function(lambda: max(0, self._count - self._together()))
        self._thread = threading.Thread(target=self._run, name="spiffy-engine", daemon=True)

    # ------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the forward in hand; jobs that are left fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken and decoded."""
        return self._thread.is_alive() and not self._stopping

    def task(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        filters: Mapping[str, object] | None = None,
        seed: int = 0,
        sequence: int = 0,
        stop: str | Sequence[str] | None = (),
        drafts: bool = True,
    ) -> Task:
        """What a job decodes: an answer of at most `max_tokens` tokens.

        Blocks are decoded whole: where the length is no multiple of the block's, positions behind
        the answer are decoded too. Without `max_tokens` there is room for as much as the settings
        say, or as the model reaches. `filters` are values of `top_k` and `top_p` other than the
        settings'; without a temperature they change nothing.

        Raises
        ------
        TooLongError
            If prompt and answer are longer than the model reaches.
        SpiffyError
            If the prompt, or an option, is bad.
        """
        ids = given_ids(self.model.encode(prompt, raw=raw), self.model.vocab_size)
        wanted = self._room(len(ids)) if max_tokens is None else max_tokens
        settings = self._settings(wanted, temperature, filters or {})
        length = planned(self.model, settings, len(ids)).length
        if length > self.max_length:
            raise TooLongError(
                f"a prompt of {len(ids)} tokens and an answer of {wanted} take {length} positions, "
                f"more than the {self.max_length} of {self.model.name}: shorten one of them"
            )
        task = make_task(self.model, ids, settings, None, seed, sequence, self.edges, stop)
        task.canvas = replace(task.canvas, gen_length=wanted)
        if drafts:
            self._equip(task)
        return task

    def check_room(self, jobs: int) -> None:
        """Refuse as `submit` would refuse so many jobs now: before their prompts are encoded."""
        with self._changed:
            if self._stopping:
                raise StoppedError
            if self._count + jobs > self.limits.batch + self.limits.waiting:
                turns = self._count / self.limits.batch
                raise BusyError(min(60, max(1, ceil(turns * self._seconds))))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs on, all or none.

        Raises
        ------
        BusyError
            If too many wait already.
        StoppedError
            If none are decoded any more.
        """
        with self._changed:
            self.check_room(len(jobs))
            self._count += len(jobs)
            self._arrived += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give jobs up: the next forward is without their rows. Ended ones are no matter."""
        with self._changed:
            self._left += jobs
            self._changed.notify()

    def _together(self) -> int:
        """Jobs that share a forward."""
        return min(self._count, self._scheduler.most_decodes)

    def _room(self, prompt_length: int) -> int:
        """Tokens of an answer that none were asked for."""
        settings, block = self.settings, self.settings.block_length
        first = planned(self.model, settings, prompt_length).first
        most = (self.max_length - first) // block * block - (prompt_length - first)
        return max(1, min(settings.gen_length, most))

    def _settings(
        self, max_tokens: int, temperature: float | None, filters: Mapping[str, object]
    ) -> DecodingSettings:
        block = self.settings.block_length
        whole = max_tokens if self.settings.cache == "block" else ceil(max_tokens / block) * block
        if temperature is None:
            temperature = self.settings.temperature
        own = filters if temperature > 0 else {}
        return self.settings.changed(gen_length=whole, temperature=temperature, **own)

    def _equip(self, task: Task) -> None:
        """Give a task what drafts for it."""
        if self.graph is None:
            return
        if self._drafter is not None:
            task.drafter = self._drafter
            return
        # One for all who share forwards: what these take depends on all of them.
        usual = {name: getattr(self.settings, name) for name in ("temperature", *FILTERS)}
        settings = task.settings.model_copy(update=usual)
        task.adviser = auto_budget(replace(task, settings=settings), self.graph)

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._take():
                if self._scheduler.busy:
                    self._forward()
                else:
                    self._check()
        except Exception:  # an error in this file
            _LOG.exception("the engine failed: no more requests are answered")
        finally:
            with self._changed:
                self._stopping = True
                left = [*self._jobs.values(), *self._arrived]
                self._jobs = {id(job.task): job for job in left}
            for job in left:
                self._fail(job, StoppedError("the server is stopping"))

    def _take(self) -> bool:
        """Take in what came and what left, between two forwards; returns whether to go on.

        Waits where there is nothing else to do.
        """
        with self._changed:
            while not (
                self._arrived
                or self._left
                or self._stopping
                or self._scheduler.busy
                or self._checker.busy
                or self._unchecked
            ):
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
            left, self._left = self._left, []
            going_on = not self._stopping
        for job in arrived:
            self._jobs[id(job.task)] = job
            self._scheduler.add(job.task)
        for job in left:
            if self._jobs.pop(id(job.task), None) is not None:
                self._scheduler.remove(job.task)
                self._forget(job)
                self.metrics.gave_up(job.task)
        return going_on

    def _forward(self) -> None:
        before, began = self._scheduler.forwards, monotonic()
        halvings = self._scheduler.halvings
        try:
            finished = self._scheduler.step()
        except Exception as error:  # of the forward itself: whose fault it is, nobody knows
            _LOG.exception("a forward failed")
            for task in self._scheduler.running:
                self._fail(self._jobs[id(task)], error)
            torch.ones(1, device=self.model.device).cpu()  # a lost device fails all, and fast: end
            return
        self.metrics.halvings.inc(self._scheduler.halvings - halvings)
        if self._scheduler.forwards > before:
            together = [*self._scheduler.running, *finished]
            self.metrics.forward(len(together))
            for task in together:
                job = self._jobs[id(task)]
                job.joined = began if job.joined is None else job.joined
                self._follow(job)
        for task in finished:
            if id(task) in self._jobs:
                self._end(self._jobs[id(task)])

    def _follow(self, job: Job) -> None:
        if job.task.error is None:
            try:
                job.follow()
            except Exception as error:  # such as of a tokenizer
                self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        job.task.error = error
        self._scheduler.remove(job.task)
        self._end(job)

    def _end(self, job: Job) -> None:
        del self._jobs[id(job.task)]
        self._forget(job, ended=True)  # whoever has the answer may ask again at once
        event = job.end()
        if isinstance(event, Failed):
            self.metrics.ended(job.task, None)
            return
        self.metrics.ended(job.task, event.ids)
        # Without drafts it was decoded plainly already.
        if event.stats.drafted and self._draw.random() < self.limits.verify_share:
            self._keep_to_check(event)

    def _keep_to_check(self, done: Done) -> None:
        if len(self._unchecked) >= _UNCHECKED:
            self.metrics.verified.labels("skipped").inc()
            return
        task = replace(done.job.task, path=[], roots=[], stats=Stats())
        task.drafter = task.adviser = None
        self._unchecked.append((task, Answer(done.ids, done.text)))

    def _forget(self, job: Job, *, ended: bool = False) -> None:
        with self._changed:
            self._count -= 1
            if ended and job.joined is not None:
                took = monotonic() - job.joined
                self._seconds = _RECENT * self._seconds + (1 - _RECENT) * took

    def _check(self) -> None:
        """Go on comparing an answer with plain decoding, by one forward."""
        answer = self._checked
        if answer is None:
            if not self._unchecked:
                return
            task, answer = self._unchecked.popleft()
            self._checker.add(task)
            self._checked = answer
        try:
            finished = self._checker.step()
        except Exception as error:  # of the forward itself
            finished = self._checker.running
            for task in finished:
                task.error = error
                self._checker.remove(task)
        for task in finished:
            self.metrics.verified.labels(compared(answer, task)).inc()
            self._checked = None
