"""Run the forwards of one decode or of many that share them, within the memory there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

import torch

from spiffy.runtime.decode.loop import Decoding, TooLargeError, denoise
from spiffy.runtime.decode.task import Task
from spiffy.runtime.forward.pack import Row, RowOutput, forward
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas.records import MAX_NODES


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
        advisers = {id(task.adviser): task.adviser for task, _, _ in running}
        for adviser in advisers.values():
            if adviser is not None:
                adviser.turn(len(running))
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
        rows = [row for _, _, rows in running for row in rows]
        lengths = [task.canvas.length for task, _, rows in running for _ in rows]
        return forward(model, rows, lengths)
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
    smaller = [(task, decoding, decoding.throw(TooLargeError())) for task, decoding, _ in running]
    if sum(task.stats.halvings for task, _, _ in running) == before:
        raise torch.OutOfMemoryError("a forward without drafts does not fit into memory")
    return smaller


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator failed; that of CPUs has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
