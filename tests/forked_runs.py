"""Calibrations that are killed or have several ranks, forked from a process that has imported all.

As a script: prints what went wrong in each part as JSON, "" for nothing.

    python forked_runs.py FOLDER
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import study

from spiffy.calib.ranks import Ranks
from spiffy.runtime import load_model
from spiffy.runtime.budget import predict
from spiffy.runtime.draft import fastest_search
from spiffy.schemas import DraftGraph, SpiffyError

kill = study("kill")
IMPORTED = ("calib.measure", "calib.pipeline", "calib.workdir", "cli.calibrate")


def ranks(job: Callable[[int], None]) -> list[int]:
    """Exit statuses of two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            job(rank)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def killed(folder: Path, plain: Path) -> None:
    log = folder / "log"
    for number in (1, 4, 13, 15):
        out, work = folder / f"{number}.json", folder / f"{number}"
        assert kill.run(out, work, log, operation=number)[0] == -9, number
        assert out.exists() == (number == 15)
        if out.exists():  # all but what is measured of it
            graph = DraftGraph.load(out)
            assert not graph.measured_steps
            assert graph.digest() == DraftGraph.load(plain).digest()
        assert kill.run(out, work, log)[0] == 0, log.read_text()
        assert out.read_bytes() == plain.read_bytes(), number


def two_ranks(folder: Path, plain: Path) -> None:
    logs = [folder / f"log-{rank}" for rank in range(2)]
    out, work = folder / "two.json", folder / "work"
    ended = ranks(lambda rank: kill._command(out, work, logs[rank]))
    assert ended == [0, 0], [log.read_text() for log in logs]
    assert out.read_bytes() == plain.read_bytes()
    traces = sorted(work.glob("traces*"))
    assert [path.name for path in traces] == ["traces-0000.bin", "traces-0001.bin"]
    assert all(path.stat().st_size for path in traces)
    assert "wrote" in logs[0].read_text()
    assert logs[1].read_text() == ""
    # One process goes on with what two have begun.
    traces[1].unlink()
    again, log = folder / "again.json", folder / "log"
    assert kill.run(again, work, log)[0] == 0, log.read_text()
    assert "recorded already" in log.read_text()
    assert again.read_bytes() == plain.read_bytes()


def dead_rank(folder: Path, plain: Path) -> None:
    log = folder / "log"

    def wait(_: int) -> None:
        both = Ranks.from_environment()
        both.join()
        both.wait()  # both are there
        if both.rank == 1:
            os.kill(os.getpid(), 9)
        with log.open("w") as file:
            try:
                both.wait()
            except SpiffyError as error:
                print(error, file=file)
        os._exit(0)

    ranks(wait)
    text = log.read_text()
    assert text.startswith("rank 0: rank 1 has ended; what is recorded is safe"), text


PARTS = (killed, two_ranks, dead_rank)


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # forked processes must not inherit threads
    predict.auto_profile = lambda *_: None  # type: ignore[assignment]  # it times forwards
    for name in IMPORTED:
        importlib.import_module(f"spiffy.{name}")
    load_model("tiny-sdar", device="cpu")  # and what these import
    fastest_search()
    ours, plain, log = os.getpid(), folder / "plain.json", folder / "log"
    assert kill.run(plain, None, log)[0] == 0, log.read_text()
    wrong = {}
    for part in PARTS:
        own = folder / part.__name__
        own.mkdir()
        try:
            part(own, plain)
            wrong[part.__name__] = ""
        except BaseException:
            if os.getpid() != ours:  # a forked one, which goes on with nothing
                traceback.print_exc()
                os._exit(1)
            wrong[part.__name__] = traceback.format_exc()
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
