"""A server under clients as they are: many, some that vanish, some that ask for nonsense.

For some minutes clients ask for answers, whole or streamed, of several lengths, with and without
temperature; some hang up in the middle, and one in twenty requests is bad. In the end no request
may be stuck, every refusal must be the right one, every good answer must be plain decoding's, and
the memory of the process must be what it was after the first fifth of the time. Exit code 1 if not.
Memory is the median of a fifth of the time: single forwards over many drafts need more for as long
as they take, and come when they come; what is never given back stays in the median.

    python studies/soak.py --minutes 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from pages import add_into, at_least, command, expect, fill, machine, start
from serving import Server, calibrated, questions, serving

from spiffy.runtime import decoding_settings, generate, load_model

_STUCK_SECONDS = 120
_COMPARED_SECONDS = 3  # comparing one answer takes less
_GROWTH = 0.05  # of memory
_LEAST = 0.2  # minutes
_QUESTIONS = 12
_GEN_LENGTH = 64
_MEMORY, _IDLE = "memory kept", "server idle afterwards"  # true or not, in the end

_MESSAGES = [{"role": "user", "content": "How many?"}]
TOO_LONG = [  # which is known once the prompt is encoded
    json.dumps({"messages": _MESSAGES, "max_tokens": 100_000}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "a" * 500_000}]}).encode(),
]
BAD: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[]", 400),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
    (json.dumps({"messages": _MESSAGES, "colour": "red"}).encode(), 400),
    (json.dumps({"messages": _MESSAGES, "tools": [{"type": "function"}]}).encode(), 400),
    (json.dumps({"messages": [], "max_tokens": 5}).encode(), 400),
    *((body, 400) for body in TOO_LONG),
    (json.dumps({"messages": _MESSAGES, "model": "another"}).encode(), 404),
    (json.dumps({"messages": [{"role": "user", "content": "a" * 2_000_000}]}).encode(), 413),
]


@dataclass(frozen=True)
class Case:
    """A good request and its answer."""

    request: dict[str, Any]
    text: str


@dataclass
class Report:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def expect(self, true: bool, what: str, detail: object) -> None:
        """Count something, and keep what should not be."""
        self.counts[what if true else f"NOT {what}"] += 1
        if not true and len(self.wrong) < 10:
            self.wrong.append(f"{what}: {detail!r}")


def good_cases(model_name: str) -> list[Case]:
    """Requests, with the answers that plain decoding gives them alone."""
    model = load_model(model_name, device="cpu", dtype="float32")
    settings = decoding_settings(model)
    cases = []
    for number, question in enumerate(questions(_QUESTIONS)):
        options: dict[str, Any] = {
            "max_tokens": (5, 24, _GEN_LENGTH)[number % 3],
            "temperature": (0.0, 0.7)[number % 2],
            "seed": number,
        }
        messages = [{"role": "user", "content": question}]
        block = 1 if settings.cache == "block" else settings.block_length
        length = -(-options["max_tokens"] // block) * block
        plain = generate(
            model,
            messages,
            gen_length=length,
            temperature=options["temperature"],
            seed=number,
        )
        text = model.decode_text(plain.token_ids[: options["max_tokens"]])
        cases.append(Case({"messages": messages, **options}, text))
    return cases


async def client(
    http: httpx.AsyncClient, cases: list[Case], end: float, seed: int, to: Report
) -> None:
    """Ask until the end."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        kind = draw.random()
        try:
            async with asyncio.timeout(_STUCK_SECONDS):
                if kind < 0.05:
                    await _bad(http, draw, to)
                elif kind < 0.2:
                    await _vanishing(http, draw.choice(cases), draw, to)
                elif kind < 0.6:
                    await _streamed(http, draw.choice(cases), to)
                else:
                    await _whole(http, draw.choice(cases), to)
        except TimeoutError:
            to.expect(False, "requests ended", kind)
        except httpx.HTTPError as error:
            to.expect(False, "connections kept", error)


async def _bad(http: httpx.AsyncClient, draw: random.Random, to: Report) -> None:
    body, status = draw.choice(BAD)
    headers = {"Content-Type": "application/json"}
    response = await http.post("/v1/chat/completions", content=body, headers=headers)
    if body in TOO_LONG and response.status_code == 429:  # a full queue refuses before
        to.counts["told to come later"] += 1
        return
    error = response.json()["error"]
    right = response.status_code == status and bool(error["message"])
    to.expect(right, "bad requests refused", (response.status_code, status, error))


async def _vanishing(http: httpx.AsyncClient, case: Case, draw: random.Random, to: Report) -> None:
    """Ask for a stream and hang up after a few of its lines, or before the first."""
    stay = draw.randrange(5)
    request = {**case.request, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=request) as response:
        if await _told_to_wait(response, to):
            return
        lines = response.aiter_lines()
        for _ in range(stay):
            if await anext(lines, None) is None:
                to.counts["streams that ended before"] += 1
                return
    to.counts["clients vanished"] += 1


async def _whole(http: httpx.AsyncClient, case: Case, to: Report) -> None:
    response = await http.post("/v1/chat/completions", json=case.request)
    if await _told_to_wait(response, to):
        return
    text = response.json()["choices"][0]["message"]["content"]
    to.expect(text == case.text, "whole answers right", (case.request, text))


async def _streamed(http: httpx.AsyncClient, case: Case, to: Report) -> None:
    text = ""
    request = {**case.request, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=request) as response:
        if await _told_to_wait(response, to):
            return
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["delta"].get("content") or ""
    to.expect(text == case.text, "streamed answers right", (case.request, text))


async def _told_to_wait(response: httpx.Response, to: Report) -> bool:
    if response.status_code == 429:
        to.counts["told to come later"] += 1
        await asyncio.sleep(min(2, int(response.headers["retry-after"])))
        return True
    response.raise_for_status()
    return False


async def _watch_memory(server: Server, end: float, to: Report) -> None:
    while time.monotonic() < end:
        to.memory.append((time.monotonic(), await asyncio.to_thread(server.resident_bytes)))
        await asyncio.sleep(2)


async def soak(server: Server, cases: list[Case], args: argparse.Namespace, to: Report) -> None:
    """All clients at once, until the time is over."""
    end = time.monotonic() + 60 * args.minutes
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients // 2)
    async with httpx.AsyncClient(base_url=server.address, timeout=None, limits=limits) as http:
        await asyncio.gather(
            _watch_memory(server, end, to),
            *(client(http, cases, end, args.seed + k, to) for k in range(args.clients)),
        )


def verified(server: Server) -> dict[str, int]:
    """How answers compared with plain decoding's, once none is left to compare."""
    before: dict[str, int] = {}
    while True:
        now = {
            result: int(server.sample("spiffy_verified_total", result=result))
            for result in ("same", "different", "failed", "skipped")
        }
        if now == before:
            return now
        before = now
        time.sleep(_COMPARED_SECONDS)


def idle(server: Server) -> bool:
    """Whether nothing is decoded any more, shortly after the last client has gone."""
    for _ in range(100):
        if server.sample("spiffy_running") + server.sample("spiffy_waiting") == 0:
            return True
        time.sleep(0.1)
    return False


def main() -> None:
    """Soak, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-sdar")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--budget", default="auto", help="drafts for every answer")
    parser.add_argument("--clients", type=at_least(1), default=32)
    parser.add_argument("--max-batch", type=at_least(1), default=16)
    parser.add_argument("--max-waiting", type=at_least(1), default=12)
    parser.add_argument("--seed", type=int, default=0)
    add_into(parser)
    args = parser.parse_args()
    if not args.minutes >= _LEAST:
        parser.error(f"--minutes {args.minutes:g}: memory is looked at for {_LEAST} at least")
    expect(parser, args.into, "soak")
    report, cases = Report(), good_cases(args.model)
    room = ("--max-batch", str(args.max_batch), "--max-waiting", str(args.max_waiting))
    with tempfile.TemporaryDirectory() as folder:
        graph = calibrated(args.model, Path(folder))
        options = ("--model", args.model, "--graph", graph, "--dtype", "float32", *room)
        with serving(
            *options, "--device", "cpu", "--verify-share", "0.05", "--budget", args.budget
        ) as server:
            asyncio.run(soak(server, cases, args, report))
            report.expect(idle(server), _IDLE, "jobs are left")
            names = ("forwards", "nfe", "cancelled", "accepted")
            for name in names:
                report.counts[f"spiffy_{name}_total"] = int(server.sample(f"spiffy_{name}_total"))
            compared = verified(server)
            for result, number in compared.items():
                report.counts[f"verified {result}"] = number
            if compared["different"] or compared["failed"] or not compared["same"]:
                report.wrong.append(f"compared with plain decoding: {compared}")
    began = report.memory[0][0]
    settled = [b for at, b in report.memory if at - began > 12 * args.minutes]
    fifth = max(1, len(settled) // 4)
    first, last = median(settled[:fifth]), median(settled[-fifth:])
    report.expect(last <= first * (1 + _GROWTH), _MEMORY, (first, last))
    block = (
        f"`{command(args)}` (generated problems; {machine()}, float32)\n\n"
        f"{table(report)}\n\nMemory: {first / 1e6:.0f} MB in the second fifth of the time, "
        f"{last / 1e6:.0f} MB in the last (medians; between {min(settled) / 1e6:.0f} and "
        f"{max(settled) / 1e6:.0f} MB)."
    )
    print(f"\n{block}")
    for problem in report.wrong:
        print(f"wrong: {problem}")
    fill(args.into, "soak", block)
    sys.exit(bool(report.wrong))


def table(report: Report) -> str:
    """Markdown: what was counted."""
    shown = {**report.counts, **{what: "yes" for what in (_MEMORY, _IDLE) if report.counts[what]}}
    rows = [f"| {what} | {number} |" for what, number in sorted(shown.items())]
    return "\n".join(["| | |", "| --- | ---: |", *rows])


if __name__ == "__main__":
    start(main)
