"""Decoding: the loop, plain and speculative, and the driver that runs its forwards.

`loop` is meant to be read in one sitting. `task` is one sequence and what has become of it,
`driver` runs one or many at a time.
"""

from spiffy.runtime.decode.driver import Scheduler, run
from spiffy.runtime.decode.loop import (
    TooLargeError,
    batches_head,
    denoise,
    denoising_step,
    find,
    keys_of,
    likely_states,
    looked_at,
    may_complete,
)
from spiffy.runtime.decode.task import (
    Advice,
    Adviser,
    Stats,
    Task,
    checked_stop,
    decoded,
    make_task,
    median_task,
    planned,
)

__all__ = [
    "Advice",
    "Adviser",
    "Scheduler",
    "Stats",
    "Task",
    "TooLargeError",
    "batches_head",
    "checked_stop",
    "decoded",
    "denoise",
    "denoising_step",
    "find",
    "keys_of",
    "likely_states",
    "looked_at",
    "make_task",
    "may_complete",
    "median_task",
    "planned",
    "run",
]
