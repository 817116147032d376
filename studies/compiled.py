"""What compiling a transformer gains, plain and with `auto` (docs/results-time.md).

Every model decodes generated problems that neither training nor calibration saw, as it is and
compiled, in turns, so that what else the machine does hits all alike; one thread, and weights as
torch has them (the commands prepack those of large models, where that is faster). Stated are the
medians over prompts of milliseconds per forward and of ratios of seconds, how many answers differ,
and how long compiling takes in a fresh process, where torch remembers nothing and where it
remembers the time before.

    python studies/compiled.py
    python studies/compiled.py --shape 0.3b --models tiny-sdar --prompts 4
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from fresh import forgetting_costs
from pages import add_into, at_least, command, expect, fill, machine, start, whole
from serving import calibrated, questions
from torch._dynamo.utils import counters

from spiffy.bench.grow import SHAPES, grow, grow_graph
from spiffy.runtime import DiffusionLM, generate, load_model
from spiffy.runtime.generate import Output
from spiffy.runtime.models.compiled import compile_transformer
from spiffy.schemas import DraftGraph

CACHES = {"tiny-llada": "dual", "tiny-dream": "dual", "tiny-sdar": "block", "tiny-llada2": "block"}
HEAD = """| model, cache | compiling, s | again, s | ms per forward | compiled | gain | auto | \
both | differ | compiled anew |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def loaded(name: str, shape: str | None, *, compiled: bool) -> tuple[DiffusionLM, float]:
    """A model, and the seconds that compiling it took."""
    model = load_model(name, device="cpu")
    if shape is not None:
        model = grow(model, shape)
    started = perf_counter()
    if compiled:
        compile_transformer(model)
    return model, perf_counter() - started


def compiling(name: str, shape: str | None, remembered: Path) -> float:
    """Seconds in a fresh process, with what torch remembers in a folder."""
    given = ["--compile", name, *([] if shape is None else ["--shape", shape])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(remembered)}
    command = [sys.executable, __file__, *given]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(run.stdout)


def per_forward(outputs: list[Output]) -> float:
    """Milliseconds, by the median prompt."""
    return median(1000 * out.stats.forward_seconds / out.stats.nfe for out in outputs)


def line(name: str, args: argparse.Namespace, folder: Path) -> str:
    """One row of the table."""
    cache = CACHES[name]
    graph = DraftGraph.load(calibrated(name, folder, "--cache", cache))
    with tempfile.TemporaryDirectory() as remembered:
        first, again = (compiling(name, args.shape, Path(remembered)) for _ in range(2))
    eager, _ = loaded(name, args.shape, compiled=False)
    fast, _ = loaded(name, args.shape, compiled=True)
    if args.shape is not None:
        graph = grow_graph(graph, load_model(name, device="cpu"), eager)
    anew = counters["stats"]["unique_graphs"]
    ways = {
        "plain": (eager, None),
        "plain, compiled": (fast, None),
        "auto": (eager, graph),
        "auto, compiled": (fast, graph),
    }
    options = {"cache": cache, "gen_length": args.gen_length}
    found: dict[str, list[Output]] = {way: [] for way in ways}
    with forgetting_costs():  # calibration measured the model as it is, not the compiled one
        for number, prompt in enumerate(questions(args.prompts + 1)):
            # Nobody follows a heavy one.
            order = random.Random(number).sample(list(ways), len(ways))
            for way in order:
                model, artifact = ways[way]
                out = generate(model, prompt, graph=artifact, **options)
                if number:  # the first one is slow, however it is decoded
                    found[way].append(out)
    seconds = {way: [out.stats.seconds for out in outs] for way, outs in found.items()}

    def gain(way: str) -> float:
        return median(a / b for a, b in zip(seconds["plain"], seconds[way], strict=True))

    plain = [out.token_ids for out in found["plain"]]
    differ = sum(
        mine != out.token_ids
        for outs in found.values()
        for mine, out in zip(plain, outs, strict=True)
    )
    return (
        f"| {name}, {cache} | {first:.0f} | {again:.0f} | {per_forward(found['plain']):.2f} | "
        f"{per_forward(found['plain, compiled']):.2f} | {gain('plain, compiled'):.2f}x | "
        f"{gain('auto'):.2f}x | {gain('auto, compiled'):.2f}x | {differ} of {3 * args.prompts} | "
        f"{counters['stats']['unique_graphs'] - anew} |"
    )


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--shape", choices=[*SHAPES], help="of a real model, such as 0.3b")
    parser.add_argument("--prompts", type=at_least(1), default=20)
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    parser.add_argument("--graphs", type=Path, help="folder of calibrated graphs, to use again")
    parser.add_argument("--compile", choices=CACHES, help=argparse.SUPPRESS)
    add_into(parser)
    args = parser.parse_args()
    key = "compiled" if args.shape is None else f"compiled-{args.shape}"
    if args.shape is None:
        whole(parser, args, "models")
    expect(parser, args.into, key)
    torch.set_num_threads(1)
    if args.compile is not None:
        print(loaded(args.compile, args.shape, compiled=True)[1])
        return
    lines = [HEAD]
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            lines.append(line(name, args, args.graphs or Path(temporary)))
            print(lines[-1], flush=True)
    note = (
        f"`{command(args)}` (generated problems; against plain decoding, not compiled, not "
        f"prepacked; {machine()}, float32)"
    )
    text = "\n".join([note, "", *lines])
    print(f"\n{text}")
    fill(args.into, key, text)


if __name__ == "__main__":
    start(main)
