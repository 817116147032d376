"""What a server gives as more and more clients ask: throughput, latency (docs/results-serving.md).

A closed loop: every client asks, waits for its answer, and asks again. Answers have unequal
lengths, else plain decoding's sequences would go in step, which no clients do; one that is under
way at the end counts with the share of it that its time before the end is. Servers of one model,
without drafts, with as many as pay, and with eight for every answer whoever else asks, run beside
each other and are measured in turns, each as often first as last and behind each other (where
turns are a multiple of six), so that what else the machine does, and what the last one left of its
caches, hits all alike; only one of them is asked at a time. Ratios have their 95% bootstrap
interval, turns resampled. One process of the same kind is up to some percent faster than another as
long as both live, which no number of turns shows: with `--servers` there are several of each, for
so many turns one after the other, and the interval resamples those. Temperature 0, generated
problems that neither training nor calibration saw. The first line is `generate` in Python, one
question after the other: what servers should gain with a single client. An answer differs if it is
not the first one that plain decoding gave, which is a near-tie of floating point at most
(docs/losslessness.md).

    python studies/load.py --model tiny-sdar --cache block
    python studies/load.py --model tiny-llada --cache dual --lengths 64 32 96
    python studies/load.py --model tiny-sdar --cache block --shape 0.3b --clients 1 4 --seconds 60 \
        --lengths 32 16 24
    python studies/load.py --clients 16 32 --ways none auto --servers 6 --turns 24 --seconds 96
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, cycle
from math import lcm
from pathlib import Path
from time import perf_counter

from spiffy.cli.threads import set_threads, wait_passively

wait_passively()  # as servers do, before torch is imported

# ruff: noqa: E402
import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from pages import add_into, expect, fill
from rich.console import Console
from scipy.stats import bootstrap
from serving import Server, calibrated, percentile, questions, serving

from spiffy.bench.grow import grow
from spiffy.runtime import DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.generate import Budget
from spiffy.runtime.models.prepack import prepack_if_faster
from spiffy.schemas import DraftGraph

WAYS: dict[str, Budget | None] = {"none": None, "auto": "auto", "8 each": 8}
Floats = NDArray[np.float64]
ALONE = 0  # clients: no server at all
_FEW = 6  # turns that make no interval
log = Console(stderr=True, highlight=False, markup=False)


@dataclass
class Measured:
    """What servers of a kind gave to a number of clients; `tokens` turn by turn."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    differing: int = 0

    def begin(self, seconds: float) -> None:
        """Begin a turn."""
        self.seconds += seconds
        self.tokens.append(0.0)

    def by_server(self, servers: int) -> Floats:
        """Tokens by what is resampled: of every server if there are several, else of every turn."""
        each = len(self.tokens) // servers if servers > 1 else 1
        return np.array(self.tokens).reshape(-1, each).sum(1)

    def add(self, began: float, ended: float, end: float, tokens: int) -> None:
        """Count an answer; of one that was under way at the `end`, the share until then."""
        took = ended - began
        self.latencies.append(took)
        self.tokens[-1] += tokens * (min(ended, end) - began) / took

    @property
    def rate(self) -> float:
        """Tokens per second, of all clients."""
        return sum(self.tokens) / self.seconds


async def ask(
    server: Server,
    clients: int,
    seconds: float,
    prompts: Sequence[str],
    lengths: Sequence[int],
    known: dict[tuple[str, int], str],
    into: Measured | None,
) -> None:
    """Let clients ask for some seconds; what is under way then is waited for."""
    numbers = count()
    if into is not None:
        into.begin(seconds)
    end = perf_counter() + seconds
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as http:

        async def client() -> None:
            while perf_counter() < end:
                number = next(numbers)
                prompt, length = prompts[number % len(prompts)], lengths[number % len(lengths)]
                began = perf_counter()
                response = await http.post(
                    "/v1/chat/completions",
                    json={
                        "messages": [{"role": "user", "content": prompt}],
                        "max_tokens": length,
                    },
                )
                ended = perf_counter()
                answer = response.raise_for_status().json()
                if into is None:
                    continue
                text = answer["choices"][0]["message"]["content"]
                into.add(began, ended, end, answer["usage"]["completion_tokens"])
                into.differing += text != known[prompt, length]

        await asyncio.gather(*(client() for _ in range(clients)))


@dataclass
class Alone:
    """The model in this process, with as many threads as a server takes."""

    model: DiffusionLM
    graph: DraftGraph

    def ask(
        self,
        budget: Budget | None,
        seconds: float,
        prompts: Sequence[str],
        lengths: Sequence[int],
        known: dict[tuple[str, int], str],
        into: Measured | None,
    ) -> None:
        """Decode one question after the other for some seconds."""
        options = self.graph.decoding.model_dump(exclude={"gen_length"})
        if budget is not None:
            options.update(graph=self.graph, budget=budget, any_model=True)
        if into is not None:
            into.begin(seconds)
        end = perf_counter() + seconds
        for prompt, length in zip(cycle(prompts), cycle(lengths), strict=False):
            began = perf_counter()
            if began >= end:
                break
            messages = [{"role": "user", "content": prompt}]
            answer = generate(self.model, messages, gen_length=length, **options)
            if into is not None:
                into.add(began, perf_counter(), end, len(answer.token_ids))
                into.differing += answer.text != known[prompt, length]

    def plainly(self, prompts: Sequence[str], lengths: Sequence[int]) -> dict[tuple[str, int], str]:
        """Plain decoding's answers to all that will be asked."""
        options = self.graph.decoding.model_dump(exclude={"gen_length"})
        answers = {}
        for number in range(lcm(len(prompts), len(lengths))):
            prompt, length = prompts[number % len(prompts)], lengths[number % len(lengths)]
            messages = [{"role": "user", "content": prompt}]
            answer = generate(self.model, messages, gen_length=length, **options)
            answers[prompt, length] = answer.text
        return answers


def alone(name: str, shape: str | None, graph: DraftGraph) -> Alone:
    """A model loaded as a server loads it."""
    model = load_model(name, device="cpu")
    if shape is not None:
        model = grow(model, shape)
        prepack_if_faster(model)
    set_threads(model, decoding_settings(model, graph, any_model=True), None)
    return Alone(model, graph)


def measure(args: argparse.Namespace) -> dict[int, dict[str, Measured]]:
    """All numbers of clients, all ways, in turns."""
    prompts = questions(args.prompts)
    decoding = ("--cache", args.cache, "--gen-length", str(max(args.lengths)))
    room = ("--max-batch", str(args.max_batch), "--max-waiting", str(max(args.clients)))
    found: dict[int, dict[str, Measured]] = {}
    each = args.turns // args.servers
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        graph = calibrated(args.model, args.graphs or Path(temporary), *decoding)
        by_itself = alone(args.model, args.shape, DraftGraph.load(graph))
        known = by_itself.plainly(prompts, args.lengths)
        servers: dict[str, list[Server]] = {way: [] for way in args.ways}
        for way in args.servers * args.ways:
            budget = WAYS[way]
            drafts = () if budget is None else ("--graph", graph, "--budget", str(budget))
            options = ("--model", args.model, *decoding, *room, *drafts)
            servers[way].append(stack.enter_context(serving(*options, shape=args.shape)))
        for clients in (ALONE, *args.clients):
            found[clients] = {way: Measured() for way in args.ways}
            # The first ones warm up, and let auto learn.
            for turn in range(-args.servers, args.turns):
                for way in order(args.ways, turn):
                    server = servers[way][turn // each if turn >= 0 else turn]
                    seconds = args.warm_up if turn < 0 else args.seconds / args.turns
                    into = None if turn < 0 else found[clients][way]
                    what = (seconds, prompts, args.lengths, known, into)
                    if clients == ALONE:
                        by_itself.ask(WAYS[way], *what)
                    else:
                        asyncio.run(ask(server, clients, *what))
            log.print(
                f"{clients} clients:", *(f"{w} {m.rate:.1f}" for w, m in found[clients].items())
            )
    return found


def order(ways: Sequence[str], turn: int) -> Sequence[str]:
    """The order of a turn: every other round backwards, so that each way follows each other."""
    first = turn % len(ways)
    found = [*ways[first:], *ways[:first]]
    return found[::-1] if turn // len(ways) % 2 else found


def ratio(ours: Measured, plain: Measured, servers: int) -> str:
    """Throughput over another's with its interval, turns or servers resampled."""

    def over(a: Floats, b: Floats, axis: int = -1) -> Floats:
        total: Floats = a.sum(axis) / b.sum(axis)
        return total

    pair = (ours.by_server(servers), plain.by_server(servers))
    told = f"{over(*pair):.2f}x"
    if len(pair[0]) < _FEW:
        return told
    found = bootstrap(pair, over, paired=True, vectorized=True, method="percentile", rng=0)
    low, high = found.confidence_interval
    return f"{told}, {low:.2f} to {high:.2f}"


def table(found: dict[int, dict[str, Measured]], ways: Sequence[str], servers: int) -> str:
    """Markdown: throughput against the server without drafts, and latencies."""
    heads = " | ".join(f"{way}: tokens/s | p50, p95 (s)" for way in ways)
    lines = [f"| clients | {heads} | differing |", "| ---: |" + " ---: |" * (2 * len(ways) + 1)]
    for clients, by_way in found.items():
        plain, cells = by_way["none"], []
        for way, measured in by_way.items():
            over = "" if way == "none" else f" ({ratio(measured, plain, servers)})"
            middle, late = (percentile(measured.latencies, share) for share in (0.5, 0.95))
            rate = f"{measured.rate:.0f}" if plain.rate >= 30 else f"{measured.rate:.1f}"
            cells += [f"{rate}{over}", f"{middle:.2f}, {late:.2f}"]
        wrong = sum(measured.differing for measured in by_way.values())
        total = sum(len(measured.latencies) for measured in by_way.values())
        lines.append(f"| {clients or 'no server'} | {' | '.join(cells)} | {wrong} of {total} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-sdar")
    parser.add_argument("--shape", help="of a real model, such as 0.3b")
    parser.add_argument("--cache", default="block")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30, help="per way and number of clients")
    parser.add_argument("--turns", type=int, default=6, help="that these are split into")
    parser.add_argument("--servers", type=int, default=1, help="of each kind; they share the turns")
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS], help="with none")
    parser.add_argument("--warm-up", type=float, default=5, help="seconds before, not counted")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 40, 56, 32, 48])
    parser.add_argument("--graphs", type=Path, help="folder of calibrated graphs, to use again")
    add_into(parser)
    args = parser.parse_args()
    if args.turns % args.servers or "none" not in args.ways:
        parser.error("--turns has to be a multiple of --servers, and none one of --ways")
    shape = f" --shape {args.shape}" if args.shape else ""
    several = f" --servers {args.servers}" if args.servers > 1 else ""
    key = f"load {args.model}{shape}{several}"
    expect(parser, args.into, key)
    found = measure(args)
    ways = "" if args.ways == [*WAYS] else f" --ways {' '.join(args.ways)}"
    block = (
        f"`python studies/load.py --model {args.model} --cache {args.cache}{shape} --clients "
        f"{' '.join(map(str, args.clients))}{ways}{several} --max-batch {args.max_batch} --seconds "
        f"{args.seconds:g} --turns {args.turns} --warm-up {args.warm_up:g} --lengths "
        f"{' '.join(map(str, args.lengths))}` (torch {torch.__version__}, {os.cpu_count()} CPUs, "
        f"{platform.machine()})\n\n{table(found, args.ways, args.servers)}"
    )
    print(f"\n{block}")
    fill(args.into, key, block)


if __name__ == "__main__":
    main()
