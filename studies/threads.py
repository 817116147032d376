"""One thread against all: milliseconds of a forward by its positions.

    python studies/threads.py --into docs/cpu.md

Quiet, and beside a process that keeps a core busy. Each line is measured in a process of its own,
because OpenMP's waiting is settled when it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch
from pages import add_into, expect, fill

from spiffy.cli.threads import LOOKS, usable_cpus
from spiffy.runtime.budget.cost import device_name

TIMED = """
import json, sys
from statistics import median
from time import perf_counter
import torch
from spiffy.runtime import load_model
from spiffy.runtime.models.attention import Group
torch.set_num_threads(int(sys.argv[1]))
model = load_model(sys.argv[2], device="cpu", dtype="float32")
found = {}
for n in map(int, sys.argv[3].split(",")):
    ids = torch.arange(n) % 900
    times = []
    for _ in range(25):
        started = perf_counter()
        model.hidden_states(ids, torch.arange(n), [Group(1, n, whole=n)])
        times.append(1000 * (perf_counter() - started))
    found[n] = median(times[5:])
print(json.dumps(found))
"""
POSITIONS = (8, 32, 64, 128, 256, 512)
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
WAITING = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": PASSIVE,
    "soon passive": PASSIVE | {"GOMP_SPINCOUNT": str(LOOKS)},
    "later passive": PASSIVE | {"GOMP_SPINCOUNT": str(10 * LOOKS)},
}


def timed(threads: int, waiting: str, model: str) -> dict[str, float]:
    """Median milliseconds by number of positions."""
    command = [sys.executable, "-c", TIMED, str(threads), model, ",".join(map(str, POSITIONS))]
    env = {**os.environ, **WAITING[waiting]}
    env.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(model: str, busy: bool) -> list[str]:
    """Lines of a Markdown table."""
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    lines = []
    try:
        for threads in sorted({1, usable_cpus()}):
            for waiting in WAITING if threads > 1 else ("passive",):
                found = timed(threads, waiting, model)
                cells = " | ".join(f"{found[str(n)]:.1f}" for n in POSITIONS)
                beside = "a busy process" if busy else "nothing"
                lines.append(f"| {threads} | {waiting} | {beside} | {cells} |")
    finally:
        if spin is not None:
            spin.kill()
    return lines


def main() -> None:
    """Print a Markdown table, or put it into a file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-sdar")
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "threads")
    block = "\n".join(
        (
            f"`python studies/threads.py --model {args.model}` (milliseconds of a forward by its "
            f"positions, float32, {device_name(torch.device('cpu'))})",
            "",
            "| threads | waiting | beside | " + " | ".join(map(str, POSITIONS)) + " |",
            "| ---: | --- | --- |" + " ---: |" * len(POSITIONS),
            *table(args.model, busy=False),
            *table(args.model, busy=True),
        )
    )
    print(block)
    fill(args.into, "threads", block)


if __name__ == "__main__":
    main()
