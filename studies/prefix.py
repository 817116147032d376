"""What a long prefix costs a forward, in time and memory (docs/results-time.md).

tiny-sdar grown into a real shape decodes random prompts of some lengths, with no draft and with the
chain of some, one sequence on one thread, every case in a process of its own. Stated are the median
time of the forwards after the one that stores the prompt, the most memory that they held beyond the
loaded model, and the most that the one with the prompt did: the resident sets' peaks, which Linux
alone sets back. The script uses nothing but the decode loop, so it runs with the package of another
commit too.

    python studies/prefix.py --shape 0.3b
    python studies/prefix.py --prefix 128 --blocks 8 --forwards 2     # seconds, to try it out
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from pages import add_into, at_least, command, expect, fill, machine, start, whole
from rich.progress import track

from spiffy.bench.grow import SHAPES, grow
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.draft import GraphDrafter

HEAD = """| prefix | block | drafts | ms per forward | MB beyond the model | with the prompt |
| ---: | ---: | ---: | ---: | ---: | ---: |"""
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Case:
    """What is decoded."""

    prefix: int
    block: int
    drafts: int


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a forward; bytes beyond the model then, and while the prompt was stored."""

    ms: float
    later: int
    first: int


def resident(which: str) -> int:
    """Bytes of this process that are in memory (VmRSS), or were at most (VmHWM)."""
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{which}:"))
    return 1024 * int(kilobytes)


def set_back() -> int:
    """Forget the peak so far; bytes that are in memory now, what is free given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def measured(model: DiffusionLM, case: Case, forwards: int) -> Cost:
    """Decode, in a process that does nothing else."""
    settings = decoding_settings(model, gen_length=64, block_length=case.block, stop_at_eos=False)
    chain = [[(rank, 0) for rank in range(depth)] for depth in range(1, case.drafts + 1)]
    prompt = torch.randint(5, 500, (case.prefix,), generator=torch.Generator().manual_seed(0))
    drafter = GraphDrafter(chain, model) if case.drafts else None
    decode = run(model, [make_task(model, prompt, settings, drafter)])
    before = set_back()
    next(decode)
    first = resident("VmHWM") - before
    set_back()
    times = []
    for _ in range(forwards):
        started = perf_counter()
        if next(decode, None) is None:
            break
        times.append(1000 * (perf_counter() - started))
    return Cost(median(times), resident("VmHWM") - before, first)


def alone(case: Case, shape: str, forwards: int) -> Cost:
    """`measured` in a fresh process."""
    given = ["--shape", shape, "--forwards", str(forwards), "--case", json.dumps(asdict(case))]
    command = [sys.executable, __file__, *given]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Cost(**json.loads(printed))


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="0.3b", choices=[*SHAPES])
    parser.add_argument("--prefix", type=at_least(1), nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--blocks", type=at_least(1), nargs="+", default=[8, 32])
    parser.add_argument("--drafts", type=at_least(0), nargs="+", default=[0, 8])
    parser.add_argument("--forwards", type=at_least(1), default=12)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    add_into(parser)
    args = parser.parse_args()
    whole(parser, args, "shape", "prefix", "blocks", "drafts")
    expect(parser, args.into, "prefix")
    if not os.access(PROCESS / "clear_refs", os.W_OK):
        parser.error("peaks of memory are set back as Linux does: start it there")
    if args.case is not None:
        torch.set_num_threads(1)
        model = grow(load_model("tiny-sdar", device="cpu", dtype="float32"), args.shape)
        model.max_length = None  # the answers are of no interest
        print(json.dumps(asdict(measured(model, Case(**args.case), args.forwards))))
        return
    cases = [Case(*each) for each in product(args.prefix, args.blocks, args.drafts)]
    lines = [HEAD]
    for case in track(cases, "decoding"):
        cost = alone(case, args.shape, args.forwards)
        lines.append(
            f"| {case.prefix} | {case.block} | {case.drafts} | {cost.ms:.0f} | "
            f"{cost.later / 1e6:.0f} | {cost.first / 1e6:.0f} |"
        )
    note = f"`{command(args)}` (tiny-sdar grown, random prompts; {machine(1)}, float32)"
    text = "\n".join([note, "", *lines])
    print(text)
    fill(args.into, "prefix", text)


if __name__ == "__main__":
    start(main)
