"""What a server gives as more and more clients ask: throughput, latency (docs/results-serving.md).

A closed loop: every client asks, waits for its answer, and asks again. Answers have unequal
lengths, else plain decoding's sequences would go in step, which no clients do. A turn begins to
count once every client has had an answer, and what is under way at its end ends among as many as
before: all go on asking until then. So rates and latencies are those of a server that is as full
all the time, however short a turn is; an answer that is under way at the beginning or at the end
counts with the share of its time in between, and a latency where the answer began in between.
Before its first turn with a number of clients each process warms up: `auto`, which learns, for
`--warm-up` seconds.
Servers of one model, without drafts, with as many as pay, and with eight for every answer whoever
else asks, run beside each other and are measured in turns, each as often first as last and behind
each other (where turns are a multiple of six), so that what else the machine does, and what the
last one left of its caches, hits all alike; only one of them is asked at a time. Ratios have their
95% interval (Student's, of the jackknife over turns, which few turns do not make too narrow). One
process of the same kind is up to some percent faster than another as long as both live, which no
number of turns shows: with `--servers` there are several of each, for so many turns one after the
other, and the interval is over those. Temperature 0, generated
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
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from math import lcm
from pathlib import Path
from time import perf_counter

from spiffy.cli.threads import set_threads, usable_cpus, wait_passively

wait_passively()  # as servers do, before torch is imported

# ruff: noqa: E402
import httpx
import numpy as np
from numpy.typing import NDArray
from pages import add_into, at_least, command, expect, fill, machine, start
from scipy.stats import t as student
from serving import Server, calibrated, percentile, questions, serving

from spiffy.bench.grow import SHAPES, grow
from spiffy.runtime import DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.models.prepack import prepack_if_faster
from spiffy.schemas import DraftGraph
from spiffy.schemas.records import Budget

WAYS: dict[str, Budget | None] = {"none": None, "auto": "auto", "8 each": 8}
Floats = NDArray[np.float64]
ALONE = 0  # clients: no server at all
_FEW = 4  # turns, or servers: fewer make no interval
_APART = 7  # requests from one turn's first to the next one's, so that they ask other questions
_WARM = 2.0  # seconds that warm up those who learn nothing


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

    def add(self, began: float, ended: float, start: float, end: float, tokens: int) -> bool:
        """Count an answer, as far as it was under way in a turn; whether it began in it."""
        within = max(0.0, min(ended, end) - max(began, start))
        self.tokens[-1] += tokens * within / (ended - began)
        if start <= began < end:
            self.latencies.append(ended - began)
            return True
        return False

    @property
    def rate(self) -> float:
        """Tokens per second, of all clients."""
        return sum(self.tokens) / self.seconds


@dataclass(frozen=True)
class Asked:
    """One answer: its request's number, when it was asked for and came, and its tokens and text."""

    number: int
    began: float
    ended: float
    tokens: int
    text: str


async def closed_loop(
    answer: Callable[[int], Awaitable[tuple[int, str]]],
    clients: int,
    seconds: float,
    first: int = 0,
) -> tuple[float, list[Asked]]:
    """Ask for some seconds, once every client has had an answer; when that began, and all answers.

    All go on asking until the last answer that was asked for before the end has come. Requests are
    numbered from `first` on.
    """
    clock, numbers = asyncio.get_running_loop().time, count(first)
    found: list[Asked] = []
    start = end = float("inf")
    waiting, counted = clients, 0  # for their first answer; answers on their way that count

    async def client() -> None:
        nonlocal start, end, waiting, counted
        first = True
        while clock() < end or counted:
            number, began = next(numbers), clock()
            counts = began < end
            counted += counts
            tokens, text = await answer(number)
            counted -= counts
            found.append(Asked(number, began, clock(), tokens, text))
            waiting -= first
            if first and not waiting:
                start = clock()
                end = start + seconds
            first = False

    await asyncio.gather(*(client() for _ in range(clients)))
    return start, found


async def ask(
    server: Server,
    clients: int,
    seconds: float,
    first: int,
    prompts: Sequence[str],
    lengths: Sequence[int],
    known: dict[tuple[str, int], str],
    into: Measured | None,
) -> None:
    """Let clients ask for some seconds."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as http:

        async def answer(number: int) -> tuple[int, str]:
            prompt, length = asked(number, prompts, lengths)
            messages = [{"role": "user", "content": prompt}]
            request = {"messages": messages, "max_tokens": length}
            response = await http.post("/v1/chat/completions", json=request)
            found = response.raise_for_status().json()
            text: str = found["choices"][0]["message"]["content"]
            return found["usage"]["completion_tokens"], text

        start, answers = await closed_loop(answer, clients, seconds, first)
    if into is None:
        return
    into.begin(seconds)
    for each in answers:
        if into.add(each.began, each.ended, start, start + seconds, each.tokens):
            into.differing += each.text != known[asked(each.number, prompts, lengths)]


def asked(number: int, prompts: Sequence[str], lengths: Sequence[int]) -> tuple[str, int]:
    """The prompt and the length of a request."""
    return prompts[number % len(prompts)], lengths[number % len(lengths)]


@dataclass
class Alone:
    """The model in this process, with as many threads as a server takes."""

    model: DiffusionLM
    graph: DraftGraph

    def ask(
        self,
        budget: Budget | None,
        seconds: float,
        first: int,
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
        for number in count(first):
            prompt, length = asked(number, prompts, lengths)
            began = perf_counter()
            if began >= end:
                break
            messages = [{"role": "user", "content": prompt}]
            answer = generate(self.model, messages, gen_length=length, **options)
            if into is not None:
                into.add(began, perf_counter(), end - seconds, end, len(answer.token_ids))
                into.differing += answer.text != known[prompt, length]

    def plainly(self, prompts: Sequence[str], lengths: Sequence[int]) -> dict[tuple[str, int], str]:
        """Plain decoding's answers to all that will be asked."""
        options = self.graph.decoding.model_dump(exclude={"gen_length"})
        answers = {}
        for number in range(lcm(len(prompts), len(lengths))):
            prompt, length = asked(number, prompts, lengths)
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
            # The first ones warm up, each process once, and let auto learn.
            for turn in range(-1 if clients == ALONE else -args.servers, args.turns):
                for way in order(args.ways, turn):
                    server = servers[way][turn // each if turn >= 0 else turn]
                    warm_up = args.warm_up if WAYS[way] == "auto" else min(args.warm_up, _WARM)
                    seconds = warm_up if turn < 0 else args.seconds / args.turns
                    into = None if turn < 0 else found[clients][way]
                    first = _APART * (turn + args.servers)
                    what = (seconds, first, prompts, args.lengths, known, into)
                    if clients == ALONE:
                        by_itself.ask(WAYS[way], *what)
                    else:
                        asyncio.run(ask(server, clients, *what))
            empty = [way for way, m in found[clients].items() if not m.latencies or not m.rate]
            if empty:
                raise SystemExit(f"{clients} clients, {empty[0]}: no answer, give more --seconds")
            print(table({clients: found[clients]}, args.ways, args.servers), flush=True)
    return found


def order(ways: Sequence[str], turn: int) -> Sequence[str]:
    """The order of a turn: every other round backwards, so that each way follows each other."""
    first = turn % len(ways)
    found = [*ways[first:], *ways[:first]]
    return found[::-1] if turn // len(ways) % 2 else found


def ratio(ours: Measured, plain: Measured, servers: int) -> str:
    """Throughput over another's, with its 95% interval over turns, or over servers if several."""
    a, b = ours.by_server(servers), plain.by_server(servers)
    over = a.sum() / b.sum()
    if len(a) < _FEW:
        return f"{over:.2f}x"
    low, high = over * np.exp(_spread(a, b) * np.array([-1, 1]))
    return f"{over:.2f}x, {low:.2f} to {high:.2f}"


def _spread(a: Floats, b: Floats) -> float:
    """Half the interval of the logarithm of a ratio of sums, by the jackknife over pairs."""
    others, n = np.log((a.sum() - a) / (b.sum() - b)), len(a)
    error = np.sqrt((n - 1) * np.mean((others - others.mean()) ** 2))
    return float(student.ppf(0.975, n - 1) * error)


def table(found: dict[int, dict[str, Measured]], ways: Sequence[str], servers: int) -> str:
    """Markdown: throughput against the server without drafts, and latencies."""
    heads = " | ".join(f"{way}: tokens/s | p50, p95 (s)" for way in ways)
    lines = [f"| clients | {heads} | differing |", "| ---: |" + " ---: |" * (2 * len(ways) + 1)]
    digits = int(min(m.rate for by_way in found.values() for m in by_way.values()) < 30)
    for clients, by_way in found.items():
        plain, cells = by_way["none"], []
        for way, measured in by_way.items():
            over = "" if way == "none" else f" ({ratio(measured, plain, servers)})"
            late = [f"{percentile(measured.latencies, share):.2f}" for share in (0.5, 0.95)]
            cells += [f"{measured.rate:.{digits}f}{over}", ", ".join(late)]
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
    parser.add_argument("--clients", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--max-batch", type=at_least(1), default=16)
    parser.add_argument("--seconds", type=float, default=30, help="per way and clients, counted")
    parser.add_argument("--turns", type=at_least(1), default=6, help="that these are split into")
    parser.add_argument("--servers", type=at_least(1), default=1, help="of each kind")
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS], help="with none")
    parser.add_argument("--warm-up", type=float, default=5, help="of auto: seconds, not counted")
    parser.add_argument("--prompts", type=at_least(1), default=40)
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=[64, 40, 56, 32, 48])
    parser.add_argument("--graphs", type=Path, help="folder of calibrated graphs, to use again")
    add_into(parser)
    args = parser.parse_args()
    if args.turns % args.servers or "none" not in args.ways:
        parser.error("--turns has to be a multiple of --servers, and none one of --ways")
    if args.shape is not None and args.shape not in SHAPES:
        parser.error(f"--shape {args.shape} is none of {', '.join(SHAPES)}")
    if args.seconds <= 0:
        parser.error("--seconds has to be above 0")
    shape = f" --shape {args.shape}" if args.shape else ""
    several = f" --servers {args.servers}" if args.servers > 1 else ""
    ways = "" if args.ways == [*WAYS] else f" --ways {' '.join(args.ways)}"
    key = f"load {args.model}{shape}{several}{ways}"
    expect(parser, args.into, key)
    found = measure(args)
    block = (
        f"`{command(args)}` (generated problems; against the server without drafts; {machine()}, "
        f"{usable_cpus()} cores)\n\n{table(found, args.ways, args.servers)}"
    )
    print(f"\n{block}")
    fill(args.into, key, block)


if __name__ == "__main__":
    start(main)
