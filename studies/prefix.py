"""What a long prefix costs a forward (docs/results-time.md).

tiny-sdar grown into a real shape decodes random prompts of some lengths, with no draft and with the
chain of 8, one sequence on one thread. Stated is the median of the forwards after the one that
stores the prompt. The script uses nothing but the decode loop, so it runs with the package of
another commit too.

    python studies/prefix.py --shape 0.3b
"""

from __future__ import annotations

import argparse
import platform
from itertools import product
from statistics import median
from time import perf_counter

import torch
from pages import add_into, fill

from spiffy.bench.grow import grow
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.draft import GraphDrafter

HEAD = """| prefix | block | drafts | ms per forward |
| ---: | ---: | ---: | ---: |"""


def measured(model: DiffusionLM, prefix: int, block: int, drafts: int, forwards: int) -> float:
    """Milliseconds of a forward."""
    settings = decoding_settings(model, gen_length=64, block_length=block, stop_at_eos=False)
    chain = [[(rank, 0) for rank in range(depth)] for depth in range(1, drafts + 1)]
    prompt = torch.randint(5, 500, (prefix,), generator=torch.Generator().manual_seed(0))
    drafter = GraphDrafter(chain, model) if drafts else None
    decode = run(model, [make_task(model, prompt, settings, drafter)])
    next(decode)
    times = []
    for _ in range(forwards):
        started = perf_counter()
        if next(decode, None) is None:
            break
        times.append(1000 * (perf_counter() - started))
    return median(times)


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="0.3b")
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 1024, 2048])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--forwards", type=int, default=12)
    add_into(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = grow(load_model("tiny-sdar", device="cpu"), args.shape)
    model.max_length = None  # the answers are of no interest
    lines = [HEAD]
    for prefix, block, drafts in product(args.prefix, args.blocks, args.drafts):
        took = measured(model, prefix, block, drafts, args.forwards)
        lines.append(f"| {prefix} | {block} | {drafts} | {took:.0f} |")
        print(lines[-1], flush=True)
    text = (
        f"`python studies/prefix.py --shape {args.shape} --forwards {args.forwards}` (one thread, "
        f"torch {torch.__version__}, {platform.machine()}, float32)\n\n" + "\n".join(lines)
    )
    for path in args.into:
        fill(path, "prefix", text)


if __name__ == "__main__":
    main()
