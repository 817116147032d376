"""Several processes, on one machine or many, that record into one work directory.

`torchrun` (or any launcher that sets the same variables) starts them. All they have to tell each
other is "so far"; the traces go through the file system. That is why gloo serves on GPUs too: NCCL
would hold a stream on every GPU, and give up, only to wait.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said

Opened = TypeVar("Opened")

_PATIENCE = timedelta(days=30)  # the slowest rank decides; a dead one closes its connection


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; alone without a launcher."""

    rank: int = 0
    local: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What the launcher says.

        Raises
        ------
        SpiffyError
            If it does not say it in numbers.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return cls()
        values = [os.environ.get(name, "0") for name in names]
        if not all(value.isdecimal() for value in values):
            raise SpiffyError(f"{', '.join(names)} must be numbers, got {', '.join(values)}")
        return cls(*map(int, values))

    def device(self, asked: str) -> str:
        """Its own GPU where there are any."""
        import torch  # only now: what the command refuses, it refuses without

        several = self.world > 1 and asked in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local}" if several else asked

    def join(self) -> None:
        """Meet the other processes.

        Raises
        ------
        SpiffyError
            If they do not come.
        """
        if self.world > 1:
            import torch.distributed as dist

            try:
                dist.init_process_group("gloo", timeout=timedelta(minutes=30))
            except (RuntimeError, ValueError) as error:
                reason = said(error)
                raise SpiffyError(f"rank {self.rank}: the ranks did not meet: {reason}") from None

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises
        ------
        SpiffyError
            If one has ended; rank 0 knows which.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(timeout=_PATIENCE)
        except RuntimeError as error:
            found = re.search(r"Rank (\d+) failed", str(error))  # only rank 0 is told, mostly
            others = [found[1]] if found else [*{*range(self.world)} - {self.rank}]
            who = f"rank {others[0]}" if len(others) == 1 else "another rank"
            raise SpiffyError(
                f"rank {self.rank}: {who} has ended; what is recorded is safe, run the same "
                "command again"
            ) from None

    @contextmanager
    def sharing(self, opened: Callable[[], AbstractContextManager[Opened]]) -> Iterator[Opened]:
        """Open what rank 0 makes and all record into; it is closed when all are done.

        Nobody goes on before all have it open and have seen what is there.

        Raises
        ------
        SpiffyError
            If a rank does not come, or ends before the others are done.
        """
        self.join()
        try:
            if self.rank > 0:
                self.wait()
            with opened() as shared:
                if self.rank == 0:
                    self.wait()
                self.wait()
                yield shared
                self.wait()
        finally:
            self.leave()

    def leave(self) -> None:
        """Close the connections."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
