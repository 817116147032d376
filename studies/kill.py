"""Kill calibration over and over; what comes out must be what an undisturbed run writes.

Every trial starts with an empty work directory, kills the command (SIGKILL), runs it again to the
end, and compares the artifact byte for byte with one made without a work directory. Half of the
trials are killed after a random time, half in the middle of a random file operation: a record half
written, written and not synced, the artifact or manifest written and not renamed. Processes are
forked from one that has imported everything, which saves most of the time.

Do not commit meanwhile: artifacts record the commit of the checkout, and would differ.

    python studies/kill.py --kills 50
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from spiffy.schemas import DraftGraph

_SETTINGS = "--model tiny-sdar --gen-length 16 --samples 6 --batch-size 2 --budget 4 --device cpu"


def _command(out: Path, workdir: Path | None, log: Path) -> None:
    """Run the command in this process and end it."""
    from spiffy.cli import calibrate

    where = [] if workdir is None else ["--workdir", str(workdir)]
    sys.argv = ["spiffy-calibrate", *_SETTINGS.split(), "--out", str(out), *where]
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            calibrate.main()
        except SystemExit as stop:
            file.flush()
            os._exit(int(stop.code or 0))


def die_in_operation(number: int) -> None:
    """Let this process kill itself in its `number`-th file operation, halfway if it writes."""
    counter = 0

    def guarded(name: str) -> None:
        original = getattr(os, name)

        def operation(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal counter
            counter += 1
            if counter == number:
                if name == "pwrite":
                    file, data, at = arguments
                    original(file, bytes(data)[: len(data) // 2], at)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, name, operation)

    for name in ("pwrite", "fsync", "replace", "ftruncate"):
        guarded(name)


def run(
    out: Path, workdir: Path | None, log: Path, seconds: float | None = None, operation: int = 0
) -> tuple[int, float]:
    """Run the command in a child; exit status (negative: signal) and seconds it lived."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        if operation:
            die_in_operation(operation)
        _command(out, workdir, log)
    timer = None
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(child, 0)
    if timer is not None:
        timer.cancel()
    return os.waitstatus_to_exitcode(status), time.perf_counter() - started


def trials(kills: int, seed: int, folder: Path) -> tuple[int, int]:
    """Kill that many runs; how many there were, and how many of the killed came out right."""
    draw = random.Random(seed)
    plain, log = folder / "plain.json", folder / "log"
    code, _ = run(plain, None, log)
    assert code == 0, log.read_text()
    expected, digest = plain.read_bytes(), DraftGraph.load(plain).digest()
    code, whole = run(folder / "first.json", folder / "first", log)
    assert code == 0, log.read_text()
    assert (folder / "first.json").read_bytes() == expected
    trial = killed = survived = 0
    while killed < kills:
        trial += 1
        out, workdir = folder / f"{trial}.json", folder / f"work-{trial}"
        # 1 manifest, 6 records, 3 groups, and the artifact without and with what is measured of it:
        # 6 + (1 + 3 + 1) + 2 + 2 operations
        if trial % 2:
            when = {"operation": draw.randint(1, 15)}
        else:
            when = {"seconds": draw.uniform(0, whole)}
        code, _ = run(out, workdir, log, **when)
        killed += code == -signal.SIGKILL
        early = out.exists() and DraftGraph.load(out).digest() != digest
        again, seconds = run(out, workdir, log)
        right = again == 0 and not early and out.read_bytes() == expected
        survived += right and code == -signal.SIGKILL
        print(f"{killed} {when} exit {code}, again {again} in {seconds:.1f} s, same bytes: {right}")
        sys.stdout.flush()
        if not right:
            print(log.read_text())
        shutil.rmtree(workdir, ignore_errors=True)
    return trial, survived


def main() -> None:
    """Print a line per trial; exit 1 if any artifact differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    import spiffy.calib.workdir
    import spiffy.runtime.generate  # noqa: F401

    torch.set_num_threads(1)  # forked processes must not inherit threads
    with tempfile.TemporaryDirectory() as folder:
        runs, survived = trials(options.kills, options.seed, Path(folder))
    print(f"{options.kills} of {runs} runs were killed, {survived} of them survived")
    sys.exit(survived < options.kills)


if __name__ == "__main__":
    main()
