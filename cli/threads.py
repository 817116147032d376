"""How many threads a command computes with: no more than it may use, and no spinning.

OpenMP's threads wait for each other by spinning. Beside another process, or in a container whose
quota is smaller than the machine, they spin while the one they wait for is not running: a forward
then takes many times as long (studies/threads.py). In Python nothing is changed: docs/cpu.md
says what to set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from spiffy.schemas import SpiffyError

if TYPE_CHECKING:
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import DecodingSettings

_Result = TypeVar("_Result")

#: Multiplications of a plain forward below which a second thread costs more than it gives
#: (studies/threads.py).
_FEW = 2e8

#: How long one looks before it sleeps. To be woken takes longer than most waits; beside another
#: process, to look ten times as long takes much longer still (studies/threads.py).
LOOKS = 3000


def wait_passively() -> None:
    """Let OpenMP's threads soon sleep while they wait; before anything imports torch or NumPy."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(LOOKS))
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))


def read_threads(words: str) -> int | None:
    """What `--threads` asks for; None: auto.

    Raises
    ------
    SpiffyError
        If it is neither "auto" nor a positive number.
    """
    if words == "auto":
        return None
    if not words.isdecimal() or not 1 <= int(words) <= 4096:
        raise SpiffyError(f"--threads {words}: give a number of threads from 1, or auto")
    return int(words)


def set_threads(model: DiffusionLM, settings: DecodingSettings, threads: int | None) -> None:
    """Compute with that many threads; None: one where a model is too small for all there are.

    What earlier calls have chosen does not count as what there is.
    """
    import torch

    everything = _initial_threads()  # before it is changed here for the first time
    if threads is None:
        whole = settings.plain_cache in ("none", "prefix")
        positions = settings.gen_length if whole else settings.block_length
        small = _multiplications(model, positions) < _FEW
        threads = 1 if small else everything
    torch.set_num_threads(threads)


@cache
def _initial_threads() -> int:
    """What torch, the environment or the program had chosen before the first call here."""
    import torch

    return torch.get_num_threads()


def apart(work: Callable[[], _Result]) -> _Result:
    """Do something in a thread of its own, for those who will compute in another one.

    Every thread that computes keeps OpenMP threads, and once a process has more of them than it
    may use CPUs, all of them sleep at once where they would have looked (docs/cpu.md). These
    end with the thread.

    Raises
    ------
    BaseException
        What the work raises.
    """
    future: Future[_Result] = Future()
    context = copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=run, daemon=True)  # an interrupted process does not wait for it
    thread.start()
    thread.join()
    return future.result()


def _multiplications(model: DiffusionLM, positions: int) -> int:
    """Of the transformer's layers for that many positions; experts count as if all were asked."""
    embedding: int = model.module.get_input_embeddings().weight.numel()  # type: ignore[operator]
    return positions * (sum(p.numel() for p in model.module.parameters()) - embedding)


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, and the quota of its control groups.

    Parameters
    ----------
    root
        Where /proc and /sys are.
    """
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cpus = os.cpu_count() or 1
    quotas = [quota for quota in map(_quota, _groups(root)) if quota is not None]
    return max(1, min([cpus, *(int(quota + 0.5) for quota in quotas)]))


def _groups(root: Path) -> list[Path]:
    """Folders of the control groups that limit this process, version 1 and 2."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        base = mounted / controllers if controllers else mounted
        if controllers and not base.is_dir():
            base = mounted / "cpu"
        here = base / path.lstrip("/")
        # In a container the path may name what only its host sees: then the mount is its own.
        found += [here, *(parent for parent in here.parents if base in (parent, *parent.parents))]
    return found


def _quota(group: Path) -> float | None:
    """CPUs' worth of time that a control group may use; None: not limited."""
    try:
        if (limits := group / "cpu.max").is_file():
            quota, period = limits.read_text(encoding="ascii").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
