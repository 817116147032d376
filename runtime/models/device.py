"""What a device needs that computes while the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device: a launched kernel is not a finished one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
