"""What prepacked weights save: milliseconds by the number of positions (docs/cpu.md).

A tiny model grown into real shapes, its weights as torch has them and as oneDNN computes with them
on this CPU (`spiffy.runtime.models.prepack`), in turns: a forward of the layers, and the output
head over as many positions.

    python studies/prepack.py --shapes 0.3b,qwen3-0.6b,qwen3-1.7b
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from spiffy.cli.threads import wait_passively

wait_passively()  # as the commands do, before torch is imported

# ruff: noqa: E402
import torch
from pages import add_into, at_least, command, expect, fill, machine, numbers, start, whole, words
from rich.progress import track

from spiffy.bench.grow import SHAPES, grow
from spiffy.runtime import DiffusionLM, load_model
from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.prepack import prepack
from spiffy.schemas import SpiffyError


def layers(model: DiffusionLM, positions: int) -> None:
    """One forward of a sequence, without the output head."""
    ids = torch.arange(positions) % model.vocab_size
    model.hidden_states(ids, ids, [Group(1, positions, whole=positions)])


def head(model: DiffusionLM, positions: int) -> None:
    """The output head."""
    config: Any = model.module.config
    model.head(torch.ones(positions, config.hidden_size, dtype=model.dtype))


def medians(
    part: Callable[[DiffusionLM, int], None],
    models: tuple[DiffusionLM, DiffusionLM],
    positions: int,
    repeats: int,
) -> list[float]:
    """Seconds of both models, in turns."""
    took: dict[DiffusionLM, list[float]] = {model: [] for model in models}
    for k in range(1 + repeats):
        for model in models[:: 1 - 2 * (k % 2)]:
            started = perf_counter()
            part(model, positions)
            took[model].append(perf_counter() - started)
    return [median(seconds[1:]) for seconds in took.values()]


def rows(shape: str, dtype: str, sizes: Sequence[int], repeats: int) -> Iterator[str]:
    """Markdown, without and with."""
    tiny = load_model("tiny-sdar", device="cpu", dtype=dtype)
    usual, ours = grow(tiny, shape), grow(tiny, shape)
    try:
        prepack(ours)
    except SpiffyError as problem:  # bfloat16 without AVX-512
        yield f"| {shape} | {dtype} | {problem} |{' |' * len(sizes)}"
        return
    for what, part in (("layers", layers), ("output head", head)):
        pairs = (medians(part, (usual, ours), size, repeats) for size in sizes)
        cells = [f"{1000 * a:.0f} -> {1000 * b:.0f} ({a / b:.2f}x)" for a, b in pairs]
        yield f"| {shape} | {dtype} | {what} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    dtypes = words("float32", "bfloat16", "float16")
    parser.add_argument("--shapes", type=words(*SHAPES), default="0.3b,qwen3-0.6b,qwen3-1.7b")
    parser.add_argument("--dtypes", type=dtypes, default="float32,bfloat16")
    parser.add_argument("--positions", type=numbers(), default="4,8,16,40,72")
    parser.add_argument("--repeats", type=at_least(1), default=10)
    add_into(parser)
    args = parser.parse_args()
    whole(parser, args, "shapes", "dtypes", "positions")
    expect(parser, args.into, "prepack")
    heads = " | ".join(map(str, args.positions))
    lines = [
        f"| shape | dtype | | {heads} |",
        "| --- | --- | --- |" + " ---: |" * len(args.positions),
    ]
    cases = [(shape, dtype) for shape in args.shapes for dtype in args.dtypes]
    for shape, dtype in track(cases, description="timing"):
        lines += rows(shape, dtype, args.positions, args.repeats)
    note = (
        f"`{command(args)}` (tiny-sdar grown, no prefix, medians; against the same weights as "
        f"torch has them; {machine()})"
    )
    block = "\n".join([note, "", *lines])
    print(f"\n{block}")
    fill(args.into, "prepack", block)


if __name__ == "__main__":
    start(main)
