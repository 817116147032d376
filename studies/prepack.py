"""What prepacked weights save: milliseconds of a forward by its positions (docs/what-pays.md).

A tiny model grown into real shapes, its layers' weights as torch has them and as oneDNN computes
with them on this CPU (`spiffy.runtime.models.prepack`), in turns.

    python studies/prepack.py --shapes 0.3b,qwen3-0.6b,qwen3-1.7b
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from pages import add_into, fill
from real_sizes import numbers, words
from rich.progress import track

from spiffy.bench.grow import grow
from spiffy.runtime import DiffusionLM, load_model
from spiffy.runtime.budget.cost import device_name
from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.prepack import prepack


def seconds(model: DiffusionLM, positions: int) -> float:
    """Of one forward of a sequence."""
    ids = torch.arange(positions) % model.vocab_size
    started = perf_counter()
    model.hidden_states(ids, ids, [Group(1, positions, whole=positions)])
    return perf_counter() - started


def measure(
    shape: str, dtype: str, sizes: Sequence[int], repeats: int
) -> list[tuple[float, float]]:
    """Medians without and with, by number of positions."""
    tiny = load_model("tiny-sdar", device="cpu", dtype=dtype)
    usual, ours = grow(tiny, shape), grow(tiny, shape)
    prepack(ours)
    found = []
    for size in sizes:
        took: list[tuple[float, float]] = []
        for k in range(1 + repeats):
            pair = [(m, seconds(m, size)) for m in ((usual, ours), (ours, usual))[k % 2]]
            took.append((dict(pair)[usual], dict(pair)[ours]))
        without, with_ = zip(*took[1:], strict=True)
        found.append((median(without), median(with_)))
    return found


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=words, default=["0.3b", "qwen3-0.6b", "qwen3-1.7b"])
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--positions", type=numbers, default=[4, 8, 16, 40, 72])
    parser.add_argument("--repeats", type=int, default=10)
    add_into(parser)
    args = parser.parse_args()
    heads = " | ".join(map(str, args.positions))
    lines = [f"| shape | dtype | {heads} |", "| --- | --- |" + " ---: |" * len(args.positions)]
    cases = [(shape, dtype) for shape in args.shapes for dtype in args.dtypes]
    for shape, dtype in track(cases, description="timing"):
        cells = [
            f"{1000 * a:.0f} -> {1000 * b:.0f} ({a / b:.2f}x)"
            for a, b in measure(shape, dtype, args.positions, args.repeats)
        ]
        lines.append(f"| {shape} | {dtype} | {' | '.join(cells)} |")
    note = (
        f"`python studies/prepack.py --shapes {','.join(args.shapes)} --dtypes "
        f"{','.join(args.dtypes)}` (tiny-sdar grown, no prefix, output head left out; "
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()})"
    )
    block = "\n".join([note, "", *lines])
    print(f"\n{block}")
    for path in args.into:
        fill(path, "prepack", block)


if __name__ == "__main__":
    main()
