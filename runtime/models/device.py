"""What a device needs that computes while the host goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.backends import cuda


def synchronize(device: torch.device) -> None:
    """Wait for the device: a launched kernel is not a finished one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median_seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Seconds that some work takes until the device has done it, the median."""
    times = []
    for _ in range(repetitions):
        synchronize(device)
        started = perf_counter()
        work()
        synchronize(device)
        times.append(perf_counter() - started)
    return median(times)


class _Lent(NamedTuple):
    own: bool  # whether torch may use cuDNN otherwise
    users: int  # under way


_LENT: _Lent | None = None
_LOCK = Lock()


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """On CUDA, let torch's attention use any of its kernels but cuDNN's, as long as this lasts.

    On some GPUs torch prefers cuDNN's, which plans each shape that it has not seen, for as long as
    several forwards take. Here nearly every number of drafts and every prefix is another shape. The
    others, flash attention first, need no plan.

    torch has one such setting for all threads. The first that comes changes it, and the last that
    goes changes it back. Where the caller allows no other, cuDNN's stays.
    """
    global _LENT
    if device.type != "cuda":
        yield
        return
    with _LOCK:
        own, users = _LENT or (_can_spare(), 0)
        _LENT = _Lent(own, users + 1)
        if not users and own:
            cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _LOCK:
            own, users = _LENT
            _LENT = _Lent(own, users - 1) if users > 1 else None
            if users == 1 and own:
                cuda.enable_cudnn_sdp(True)


def _can_spare() -> bool:
    """Whether torch may use cuDNN's attention, and would have another one without it."""
    own: Any = cuda  # whose questions have no types
    others = (own.flash_sdp_enabled(), own.mem_efficient_sdp_enabled(), own.math_sdp_enabled())
    return own.cudnn_sdp_enabled() and any(others)
