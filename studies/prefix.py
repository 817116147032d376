"""What a long prefix costs a forward, in time and in memory (docs/results-time.md).

tiny-sdar grown into a real shape decodes random prompts of some lengths, with no draft and with the
chain of 8, one sequence on one thread. Stated are the median of the forwards after the one that
stores the prompt, and the most memory beyond that of the loaded model which any of them took (high
water of the process, Linux only). A run of another commit prints what that one needs: the script
uses nothing but the decode loop.

    python studies/prefix.py --shape 0.3b
"""

from __future__ import annotations

import argparse
import platform
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from pages import add_into, fill

from spiffy.bench.grow import grow
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.draft import GraphDrafter

HEAD = """| prefix | block | drafts | ms per forward | memory, MB |
| ---: | ---: | ---: | ---: | ---: |"""


def memory(reset: bool = False) -> float:
    """Megabytes: the high water since it was last reset, or what is used now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    name = "VmRSS" if reset else "VmHWM"
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def measured(
    model: DiffusionLM, prefix: int, block: int, drafts: int, forwards: int
) -> tuple[float, float]:
    """Milliseconds and megabytes of a forward."""
    settings = decoding_settings(model, gen_length=64, block_length=block, stop_at_eos=False)
    chain = [[(rank, 0) for rank in range(depth)] for depth in range(1, drafts + 1)]
    prompt = torch.randint(5, 500, (prefix,), generator=torch.Generator().manual_seed(0))
    drafter = GraphDrafter(chain, model) if drafts else None
    before = memory(reset=True)
    decode = run(model, [make_task(model, prompt, settings, drafter)])
    next(decode)
    memory(reset=True)
    times = []
    for _ in range(forwards):
        started = perf_counter()
        if next(decode, None) is None:
            break
        times.append(1000 * (perf_counter() - started))
    return median(times), memory() - before


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="0.3b")
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--forwards", type=int, default=12)
    add_into(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = grow(load_model("tiny-sdar", device="cpu"), args.shape)
    model.max_length = None  # the answers are of no interest
    lines = [HEAD]
    for prefix, block, drafts in product(args.prefix, args.blocks, args.drafts):
        took, room = measured(model, prefix, block, drafts, args.forwards)
        lines.append(f"| {prefix} | {block} | {drafts} | {took:.0f} | {room:.0f} |")
        print(lines[-1], flush=True)
    text = (
        f"`python studies/prefix.py --shape {args.shape} --forwards {args.forwards}` (one thread, "
        f"torch {torch.__version__}, {platform.machine()}, float32)\n\n" + "\n".join(lines)
    )
    for path in args.into:
        fill(path, "prefix", text)


if __name__ == "__main__":
    main()
