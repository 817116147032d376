"""Run the forwards of one decode or of many that share them, within the memory there is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from statistics import median_low
from time import perf_counter

import torch

from spiffy.runtime.decode.loop import Decoding, TooLargeError, denoise
from spiffy.runtime.decode.task import Task
from spiffy.runtime.forward.pack import Row, RowOutput, forward
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.device import synchronize
from spiffy.runtime.models.lanes import Pool
from spiffy.runtime.models.slots import KeyValues
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import is_of_one_decode, is_out_of_memory
from spiffy.schemas.records import MAX_NODES

_Running = tuple[Task, Decoding, list[Row]]

_TRY_AGAIN = 512  # forwards that fitted, after which a little more is tried
_FAR_LONGER = 2  # times the usual length


def run(
    model: DiffusionLM, tasks: Iterable[Task], batch_size: int = 1, *, failed_too: bool = False
) -> Iterator[list[Task]]:
    """Decode tasks, up to `batch_size` at a time sharing their forwards: see `Scheduler.run`."""
    return Scheduler(model, batch_size).run(tasks, failed_too=failed_too)


class Scheduler:
    """Decodes that share forwards: they join and leave between two of them, in order.

    A decode that fails ends alone, with its error. A forward that does not fit into memory is made
    again once what sequences and drafts before it left is given back, then with half the drafts; if
    there are none left, without the decode that is far longer than the others, else with half of
    them: the rest waits and is begun anew, for what it holds takes memory too. What fitted is
    remembered, and exceeded a little after many forwards; if a decode does not fit alone, all was
    its fault, and so it was if it is the far longer one and has ended.
    For one thread.

    Raises
    ------
    SpiffyError
        If no decode may be in a forward.

    Parameters
    ----------
    batch_size
        Decodes that share a forward, at most.

    Attributes
    ----------
    forwards
        Made so far, however many decodes shared them.
    halvings
        Forwards that had too many drafts for the memory, each time they were halved.
    """

    def __init__(self, model: DiffusionLM, batch_size: int = 1) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise SpiffyError(
                f"batch size {batch_size!r}: at least 1 sequence has to be in a forward"
            )
        self.model, self.batch_size = model, batch_size
        self.forwards = self.halvings = 0
        # Side by side, sequences attend together: on a CPU, which launches nothing, for nothing.
        self._pool = Pool(batch_size) if batch_size > 1 and model.device.type != "cpu" else None
        self._waiting: deque[Task] = deque()
        self._running: list[_Running] = []
        self._most_drafts, self._most_decodes = MAX_NODES, batch_size  # that fitted
        self._fitted = 0  # forwards since one did not
        self._unhurt: tuple[int, int] | None = None  # the same two before that
        self._far_longer: list[Task] = []  # on whose account they were lowered

    def __len__(self) -> int:
        """Number of tasks that are decoded or wait."""
        return len(self._waiting) + len(self._running)

    @property
    def busy(self) -> bool:
        """Whether there is anything to decode."""
        return len(self) > 0

    @property
    def most_decodes(self) -> int:
        """How many may share a forward, by the batch size and what fitted into memory."""
        return self._most_decodes

    @property
    def running(self) -> list[Task]:
        """Tasks that share the next forward with others that may join it."""
        return [task for task, _, _ in self._running]

    def run(self, tasks: Iterable[Task], *, failed_too: bool = False) -> Iterator[list[Task]]:
        """Decode tasks, which are taken when there is room for them.

        Yields after every forward the tasks that it finished, often none; their `path` and `stats`
        are up to date at any time. The error of a task that fails is raised after those that the
        same forward finished. With `failed_too` such a task is yielded too, with its `error`,
        unless that is no matter of this decode alone.
        """

        def is_yielded(task: Task) -> bool:
            return task.error is None or (failed_too and is_of_one_decode(task.error))

        more = iter(tasks)
        while True:
            while len(self) < self.batch_size and (task := next(more, None)) is not None:
                self.add(task)
            if not self.busy:
                return
            finished = self.step()
            yield [*filter(is_yielded, finished)]
            for task in finished:
                if task.error is not None and not is_yielded(task):
                    raise task.error

    def add(self, task: Task) -> None:
        """Let a task wait for its turn."""
        self._waiting.append(task)

    def remove(self, task: Task) -> None:
        """Give up a task: the next forward is without its rows. No matter if it is not there."""
        self._waiting = deque(other for other in self._waiting if other is not task)
        self._running = [entry for entry in self._running if entry[0] is not task]
        self._let_go(task)
        self._give_back_if_idle()

    def step(self) -> list[Task]:
        """Make a forward; returns the tasks that it finished.

        Also returns, without a forward, tasks that fail before it, or for which it has no room.

        Raises
        ------
        Exception
            What the forward itself raises; it can be made again.
        """
        finished = self._step()
        for task in finished:
            self._let_go(task)
            error = task.error
            if isinstance(error, SpiffyError) or (error is not None and is_of_one_decode(error)):
                # Nobody reads its frames, which hold what all who shared the forward had computed.
                error.__traceback__ = error.__context__ = None
        self._give_back_if_idle()
        return finished

    def _step(self) -> list[Task]:
        """See `step`."""
        finished = self._begin()
        if finished or not self._running:
            return finished
        started = perf_counter()
        trimmed = False
        while (outputs := _forward(self.model, self._running)) is None:
            # Not twice in a row: what a lane's failed growth took comes back every time.
            trimmed = not trimmed and self._has_trimmed()
            if not trimmed and (failed := self._do_with_less()):
                return failed
        self.forwards += 1
        self._remember_that_it_fitted()
        synchronize(self.model.device)  # the walk waits for the values anyway
        forwarded = perf_counter() - started
        # Methods, not advisers: one that is watched has that of the one which it stands for.
        advisers = [task.adviser for task in self.running if task.adviser is not None]
        for after_forward in {adviser.after_forward for adviser in advisers}:
            after_forward(len(self._running), forwarded)
        walked = self._running
        self._running = []
        for task, decoding, rows in walked:
            task.stats.nfe += 1
            task.stats.forward_seconds += forwarded
            task.stats.positions_computed += sum(len(row.ids) for row in rows)
            ours, outputs = outputs[: len(rows)], outputs[len(rows) :]
            try:
                self._running.append((task, decoding, decoding.send(ours)))
                task.ready = perf_counter()
            except StopIteration:
                if not task.path or not task.path[-1].finished:  # it was closed from outside
                    task.error = RuntimeError("the decode ended before its answer was whole")
                finished.append(task)
            except Exception as error:  # of this decode: the others go on
                task.error = error
                finished.append(task)
        for task, _, _ in walked:
            task.stats.seconds += perf_counter() - started
        return finished

    def _begin(self) -> list[Task]:
        """Let waiting tasks join; returns those that fail at once."""
        failed: list[Task] = []
        while self._waiting and len(self._running) < self._most_decodes:
            task = self._waiting.popleft()
            task.most_drafts = min(task.most_drafts, self._most_drafts)
            kv = None if self._pool is None else self._pool.open(task.canvas.length)
            decoding, started = denoise(task, kv), perf_counter()
            try:
                self._running.append((task, decoding, next(decoding)))
                task.ready = perf_counter()
                task.stats.seconds += task.ready - started
            except Exception as error:
                task.error = error
                failed.append(task)
        return failed

    def _give_back_if_idle(self) -> None:
        """Others may need the memory of lanes, such as a scheduler of the same model."""
        if self._pool is not None and not self.busy:
            self._pool.forget_unused()

    def _has_trimmed(self) -> bool:
        """Give back the memory of lanes that nobody uses, and of drafts; whether there was any."""
        held = {id(row.kv): row.kv for _, _, rows in self._running for row in rows}
        freed = [kv.shrink() for kv in held.values() if isinstance(kv, KeyValues)]
        freed.append(self._pool is not None and self._pool.trim())
        if not any(freed):
            return False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _do_with_less(self) -> list[Task]:
        """Halve the drafts, else the decodes; returns those that fail, such as one alone."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._fitted = 0
        self._unhurt = self._unhurt or (self._most_drafts, self._most_decodes)
        running, self._running = self._running, []
        halved, failed = [], []
        for task, decoding, _ in running:
            before = task.stats.halvings
            try:
                self._running.append((task, decoding, decoding.throw(TooLargeError())))
            except Exception as error:  # such as of the host's memory
                task.error = error
                failed.append(task)
                continue
            if task.stats.halvings > before:
                halved.append(task)
        tasks = self.running
        if halved:  # of the most that one of them had: another may have had a single one
            self.halvings += 1
            self._most_drafts = min(self._most_drafts, max(task.most_drafts for task in halved))
            for task in halved:
                task.allow(self._most_drafts)
        if halved or failed:
            return failed
        if len(tasks) == 1:
            self._running = []
            self._far_longer = [task for task in self._far_longer if task is not tasks[0]]
            self._restore()
            tasks[0].error = torch.OutOfMemoryError(
                "a forward without drafts does not fit into memory"
            )
            return tasks
        longest = _far_longer(tasks)
        left_out = tasks[len(tasks) // 2 :] if longest is None else [longest]  # the younger half
        if longest is not None and longest not in self._far_longer:
            self._far_longer.append(longest)
        self._most_decodes = len(tasks) - len(left_out)
        self._running = [entry for entry in self._running if entry[0] not in left_out]
        for task in reversed(left_out):
            task.begin_anew()
            self._waiting.appendleft(task)
        return []

    def _let_go(self, task: Task) -> None:
        """Where one that was far longer than the others is gone, what it took comes back."""
        if task in self._far_longer:
            self._far_longer.remove(task)
            if not self._far_longer:
                self._restore()

    def _restore(self) -> None:
        """Allow again what was allowed before memory was short."""
        if self._unhurt is None:
            return
        self._most_drafts, self._most_decodes = self._unhurt
        self._unhurt = None
        for task in (*self.running, *(task for task in self._waiting if task.anew)):
            task.allow(self._most_drafts)

    def _remember_that_it_fitted(self) -> None:
        self._fitted += 1
        if self._fitted % _TRY_AGAIN == 0:
            blamed = [*self._far_longer, *(task for task in self._waiting if task.anew)]
            if not blamed:  # else one may be to blame yet
                self._unhurt = None
            if self._most_drafts < MAX_NODES:
                self._most_drafts = min(2 * self._most_drafts + 1, MAX_NODES)
                for task in self.running:
                    task.allow(self._most_drafts)
            # One that was too long beside others goes on to its end before more may join it.
            if not any(task in self._far_longer for task in self.running):
                self._most_decodes = min(self._most_decodes + 1, self.batch_size)


def _far_longer(tasks: Sequence[Task]) -> Task | None:
    """The one that is far longer than most, if any is."""
    longest = max(tasks, key=lambda task: task.canvas.length)
    usual = median_low(task.canvas.length for task in tasks)
    return longest if longest.canvas.length > _FAR_LONGER * usual else None


def _forward(model: DiffusionLM, running: Sequence[_Running]) -> list[RowOutput] | None:
    """Outputs of all rows; None if they do not fit into memory."""
    try:
        rows = [row for _, _, rows in running for row in rows]
        lengths = [task.canvas.length for task, _, rows in running for _ in rows]
        return forward(model, rows, lengths)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None  # outside of the handler, which keeps the failed forward's tensors alive
