"""One thread against all: milliseconds of a forward by its positions.

    python studies/threads.py --into docs/cpu.md

Quiet, and beside a process that keeps a core busy. Each line is measured in processes of its own,
because OpenMP's waiting is settled when it starts: in several, in turns with all other lines, for
one is faster than another of its kind as long as both live. Stated are their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from itertools import product
from statistics import median

from pages import add_into, at_least, command, expect, fill, machine, start
from rich.progress import track

from spiffy.cli.threads import LOOKS, usable_cpus

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


def timed(threads: int, waiting: str, busy: bool, model: str) -> dict[str, float]:
    """Median milliseconds by number of positions, in a process of its own."""
    given = [sys.executable, "-c", TIMED, str(threads), model, ",".join(map(str, POSITIONS))]
    env = {**os.environ, **WAITING[waiting]}
    env.pop("OMP_NUM_THREADS", None)
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run(given, env=env, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        if spin is not None:
            spin.kill()
            spin.wait()
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(model: str, processes: int) -> list[str]:
    """Lines of a Markdown table, quiet ones first."""
    ways = [(1, "passive"), *((usable_cpus(), w) for w in WAITING if usable_cpus() > 1)]
    cases = [(threads, waiting, busy) for busy, (threads, waiting) in product((False, True), ways)]
    found: dict[tuple[int, str, bool], list[dict[str, float]]] = {case: [] for case in cases}
    for turn in track(range(processes), description="timing"):
        for case in random.Random(turn).sample(cases, len(cases)):
            found[case].append(timed(*case, model))
    lines = []
    for (threads, waiting, busy), times in found.items():
        cells = " | ".join(f"{median(each[str(n)] for each in times):.1f}" for n in POSITIONS)
        beside = "a busy process" if busy else "nothing"
        lines.append(f"| {threads} | {waiting} | {beside} | {cells} |")
    return lines


def main() -> None:
    """Print a Markdown table, or put it into a file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-sdar")
    parser.add_argument("--processes", type=at_least(1), default=3, help="of each line")
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "threads")
    block = "\n".join(
        (
            f"`{command(args)}` (milliseconds of a forward by its positions, medians, no prefix; "
            f"{machine(usable_cpus())} at most, float32)",
            "",
            "| threads | waiting | beside | " + " | ".join(map(str, POSITIONS)) + " |",
            "| ---: | --- | --- |" + " ---: |" * len(POSITIONS),
            *table(args.model, args.processes),
        )
    )
    print(block)
    fill(args.into, "threads", block)


if __name__ == "__main__":
    start(main)
