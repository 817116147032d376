"""Measure what speculation itself costs: drafting, packing, verification, next to the forward.

Part of `make results`; the table is in docs/results-time.md.

    python studies/overhead.py            # a tiny trained model and 300M random parameters
    python studies/overhead.py --forwards 40
    python studies/overhead.py --tables host

Takes apart the time of each turn, a forward and its walk: the transformer; the output head at the
masked positions it is asked for; the walk (float64 softmax and unmasking at one state after the
other); comparing states; choosing drafts; and the rest (packing, bookkeeping). Head and walk are
what plain decoding spends on each step too. Comparing, drafting and the rest are what speculation
adds, less what a plain step spends on them.

Decoding is deterministic: every decode is repeated, and each turn's times are medians over the
repeats. The 300M model has random weights, so its drafts seldom come true: its time per denoising
step is a worst case.

The second table, `--tables host`, is in the paper's terms: drafting, and verifying beyond what a
plain forward spends, as shares of a forward of 25 ms on an accelerator. As there, every state is
read in its forward, and what counts is the host's time alone, not what the accelerator would
compute (transformer, head, what is read off logits): that is recorded in a decode before, and
handed over in those that are timed. Computing it meanwhile would push all else out of the
processor's caches, which an accelerator leaves alone. The model is tiny-sdar grown to 0.3B and a
vocabulary of 126,464, so drafts come true as on a trained model. How often a forward waits for the
device, and how many kernels it launches beside the transformer's, is counted on the pretend
accelerator of the tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter, thread_time
from typing import Any
from unittest.mock import patch

import torch
from pages import add_into, command, expect, fill
from transformers import Qwen3Config, Qwen3ForCausalLM

from spiffy.bench.grow import SHAPES, grow
from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.budget.cost import device_name
from spiffy.runtime.decode import Task, loop, make_task
from spiffy.runtime.draft import (
    AcceptanceDrafter,
    BestOfDrafter,
    Drafter,
    GraphDrafter,
    by_model,
    candidates,
    graph_drafter,
    rejected,
    search,
)
from spiffy.runtime.draft.acceptance import acceptance_weights
from spiffy.runtime.forward import pack, question
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.models.sdar import SDAR
from spiffy.schemas import AcceptanceModel, DecodingSettings, DraftGraph

FORWARD = 25.0  # milliseconds, on an accelerator
SHAPE = replace(SHAPES["0.3b"], vocabulary=126_464)
WITHOUT = "model, without numba"
WAYS = (
    ("plain", 0),
    ("graph", 8),
    ("graph", 32),
    ("model", 8),
    ("model", 32),
    (WITHOUT, 8),
    (WITHOUT, 32),
)
PARTS = ("forward", "head", "walk", "compare", "draft", "rest")
KEYS = {"parts": "overhead", "host": "overhead-host"}  # of the tables in the page


def random_model(layers: int) -> DiffusionLM:
    """SDAR's layout, random parameters (20 layers: 302 million) and a vocabulary of 32,000."""
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    facts = {"mask_token_id": 0, "block_size": 8, "max_position_embeddings": 4096}
    module = Qwen3ForCausalLM(config)
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return DiffusionLM(module, SDAR, facts, name=f"{millions:.0f}M random")


@dataclass(frozen=True)
class Turn:
    """One turn: milliseconds by part, and the denoising steps that it was worth."""

    ms: dict[str, float]
    steps: int


_TIMED: list[str] = []  # under way


@contextmanager
def timed(
    owner: Any, name: str, clock: Callable[[], float] = perf_counter
) -> Iterator[list[float]]:
    """Collect the milliseconds of each call of a function or method, of a generator to its end.

    What another one that is timed calls counts there.
    """
    function, spent = getattr(owner, name), []

    def timing(*args: Any) -> Any:
        outermost = not _TIMED
        _TIMED.append(name)
        started = clock()
        try:
            result = function(*args)
            if isinstance(result, Generator):
                result = iter(list(result))
        finally:
            _TIMED.pop()
        if outermost:
            spent.append(1000 * (clock() - started))
        return result

    setattr(owner, name, timing)
    try:
        yield spent
    finally:
        setattr(owner, name, function)


def take_apart(
    model: DiffusionLM,
    settings: DecodingSettings,
    prompt: torch.Tensor,
    drafter: Drafter | None,
    forwards: int,
) -> list[Turn]:
    """The first turns of a decode, without the very first, which also warms up."""
    task = make_task(model, prompt, settings)
    task.drafter = drafter
    stats, turns = task.stats, []
    with timed(model, "head") as heads, timed(loop, "find") as finds, timed(loop, "_candidates"):
        decoding = loop.denoise(task)
        rows = next(decoding)
        for _ in range(forwards):
            before = replace(stats)
            heads.clear()
            finds.clear()
            started = perf_counter()
            outputs = forward(model, rows)
            forwarded = perf_counter()
            try:
                rows = decoding.send(outputs)
            except StopIteration:
                break
            rest = 1000 * (perf_counter() - forwarded)
            walk = 1000 * (stats.verify_seconds - before.verify_seconds)
            draft = 1000 * (stats.draft_seconds - before.draft_seconds)
            steps = stats.steps - before.steps
            head = sum(heads)  # of the walk: calls from `_candidates` count there
            ms = {
                "forward": 1000 * (forwarded - started),
                "head": head,
                "walk": walk - head - sum(finds),
                "compare": sum(finds),
                "draft": draft,
                "rest": rest - walk - draft,
            }
            turns.append(Turn(ms, steps))
    return turns[1:]


def repeated(repeats: int, *args: Any) -> list[Turn]:
    """`take_apart` several times: each turn's times are medians."""
    decodes = [take_apart(*args) for _ in range(repeats)]
    return [
        Turn({part: median(turn.ms[part] for turn in same) for part in PARTS}, same[0].steps)
        for same in zip(*decodes, strict=True)
    ]


def lines(
    name: str,
    model: DiffusionLM,
    settings: DecodingSettings,
    prompt: torch.Tensor,
    acceptance: AcceptanceModel,
    forwards: int,
    repeats: int,
) -> Iterator[str]:
    """Markdown rows of one model, plain decoding first."""
    weights = acceptance_weights(acceptance, model.vocab_size)
    plain = 0.0  # what a plain step spends on what is not counted as every step's
    for budget in (0, 8, 32):
        drafter = AcceptanceDrafter(weights, budget, model) if budget else None
        turns = repeated(repeats, model, settings, prompt, drafter, forwards)
        steps = mean(turn.steps for turn in turns)
        ms = {part: mean(turn.ms[part] for turn in turns) for part in PARTS}
        spent = ms["compare"] + ms["draft"] + ms["rest"]
        if not budget:
            plain = spent / steps
        added = max(spent - plain * steps, 0.0)
        yield (
            f"| {name} | {budget} | {steps:.2f} "
            + "".join(f"| {ms[part]:.2f} " for part in PARTS)
            + f"| {added / steps:.2f} | {added / ms['forward']:.1%} |"
        )


def drafter_of(
    model: DiffusionLM, graph: DraftGraph, settings: DecodingSettings, way: str, drafts: int
) -> Drafter | None:
    """One of `WAYS`."""
    selection: Any = "model" if way == WITHOUT else way
    return graph_drafter(model, graph, settings, drafts, selection) if drafts else None


@contextmanager
def searching(way: str) -> Iterator[None]:
    """Search for drafts as one of `WAYS` does."""
    chosen = search.IN_NUMPY if way == WITHOUT else search.fastest_search()
    with ExitStack() as patches:
        for user in (candidates, by_model, rejected):
            patches.enter_context(patch.object(user, "fastest_search", lambda: chosen))
        yield


@contextmanager
def read_ahead() -> Iterator[None]:
    """Read every state in its forward, as off the CPU."""
    kept = question._HOSTS
    question._HOSTS = frozenset()
    try:
        yield
    finally:
        question._HOSTS = kept


@dataclass(frozen=True)
class Host:
    """The host's milliseconds of one turn, and the denoising steps that it was worth."""

    draft: float
    rest: float
    steps: int


@contextmanager
def handed_over(owner: Any, name: str, results: list[Any], known: bool) -> Iterator[None]:
    """Collect what a function returns, or return what was collected, call by call."""
    function, left = getattr(owner, name), iter(results)

    def collecting(*args: Any) -> Any:
        result = function(*args)
        results.append(list(result) if isinstance(result, Generator) else result)
        return results[-1]

    setattr(owner, name, (lambda *args: next(left)) if known else collecting)
    try:
        yield
    finally:
        setattr(owner, name, function)


def on_host(
    model: DiffusionLM,
    settings: DecodingSettings,
    prompt: torch.Tensor,
    drafter: Drafter | None,
    forwards: int,
    computed: dict[str, list[Any]],
) -> list[Host]:
    """The first turns of a decode, without the very first.

    In processor time of the one thread that does what is counted: other processes do not add to it.

    Parameters
    ----------
    computed
        What the accelerator computes, by function; empty: to be collected.
    """
    task = make_task(model, prompt, settings)
    task.drafter = drafter
    turns = []
    with ExitStack() as stack:
        stack.enter_context(read_ahead())
        elsewhere, known = [], bool(computed)
        for owner, name in ((model, "hidden_states"), (pack, "read")):  # the accelerator's
            results = computed.setdefault(name, [])
            stack.enter_context(handed_over(owner, name, results, known))
            elsewhere.append(stack.enter_context(timed(owner, name, thread_time)))
        drafting = [
            stack.enter_context(timed(*place, thread_time))
            for place in (
                (loop, "_candidates"),
                (GraphDrafter, "__call__"),
                (AcceptanceDrafter, "__call__"),
                (BestOfDrafter, "learn"),  # who is to draft
            )
        ]
        decoding = loop.denoise(task)
        rows = next(decoding)
        for _ in range(forwards):
            steps = task.stats.steps
            for spent in (*elsewhere, *drafting):
                spent.clear()
            started = thread_time()
            try:
                rows = decoding.send(forward(model, rows))
            except StopIteration:
                break
            whole = 1000 * (thread_time() - started)
            draft, away = (sum(map(sum, parts)) for parts in (drafting, elsewhere))
            turns.append(Host(draft, whole - draft - away, task.stats.steps - steps))
    return turns[1:]


def launches(calls: Counter[str]) -> int:
    """Kernels among calls by name: those that compute or copy, not the views of what is there."""
    return sum(number for name, number in calls.items() if not _is_view(name))


def _is_view(name: str) -> bool:
    packet = getattr(torch.ops.aten, name)
    returns = getattr(packet, packet.overloads()[0])._schema.returns
    shared = any(part.alias_info and not part.alias_info.is_write for part in returns)
    return shared or name.startswith("empty")


def counted(model: DiffusionLM, task: Task, far: Any) -> tuple[float, float]:
    """Waits and kernels per forward, the transformer's kernels left out."""
    hidden_states, transformer = model.hidden_states, Counter[str]()

    def counting(*args: Any) -> torch.Tensor:
        before = far.calls.copy()
        hidden = hidden_states(*args)
        transformer.update(far.calls - before)
        return hidden

    vars(model)["hidden_states"] = counting
    far.reset()
    decoding, forwards = loop.denoise(task), 0
    rows = next(decoding)
    while True:
        forwards += 1
        try:
            rows = decoding.send(forward(model, rows))
        except StopIteration:
            break
    del vars(model)["hidden_states"]
    kernels = launches(far.calls - transformer)
    return far.crossings.total() / forwards, kernels / forwards


def count(graph: Path) -> None:
    """Print waits and kernels of all ways, counted on the pretend accelerator."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    far = importlib.import_module("far")
    artifact = DraftGraph.load(graph)
    model = load_model("tiny-sdar", device="cpu", dtype="float32")
    prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])
    settings = decoding_settings(model, artifact).model_copy(update={"gen_length": 32})
    large = grow(model, SHAPE)
    large.module.to("far")
    found = []
    for way, drafts in WAYS:
        task = make_task(large, prompt, settings)
        task.drafter = drafter_of(large, artifact, settings, way, drafts)
        found.append(counted(large, task, far))
    print(json.dumps(found))


def counts_of(graph: DraftGraph) -> list[tuple[float, float]]:
    """What `count` finds, in a process of its own: the pretend accelerator lasts as long as one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.json"
        graph.save(path)
        command = [sys.executable, __file__, "--count", str(path)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: list[tuple[float, float]] = json.loads(printed)
    return found


def host_lines(model: DiffusionLM, graph: DraftGraph, forwards: int, repeats: int) -> Iterator[str]:
    """Markdown rows in the paper's terms, of a model grown from `model`."""
    large = grow(model, SHAPE)
    settings = decoding_settings(model, graph)
    prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])
    plain, computed = 0.0, [dict[str, list[Any]]() for _ in WAYS]
    decodes: list[list[list[Host]]] = [[] for _ in WAYS]
    for _ in range(1 + repeats):  # in turns: a machine that slows down does so for all of them
        for k, (way, drafts) in enumerate(WAYS):
            with searching(way):
                new = drafter_of(large, graph, settings, way, drafts)  # has learned nothing yet
                decodes[k].append(on_host(large, settings, prompt, new, forwards, computed[k]))
    for k, ((way, drafts), (waits, kernels)) in enumerate(zip(WAYS, counts_of(graph), strict=True)):
        turns = list(zip(*decodes[k][1:], strict=True))  # the first one computes
        steps = mean(same[0].steps for same in turns)
        draft = mean(median(turn.draft for turn in same) for same in turns)
        rest = mean(median(turn.rest for turn in same) for same in turns)
        plain = plain if drafts else rest
        more = max(rest - plain, 0.0)
        yield (
            f"| {way} | {drafts} | {steps:.2f} | {draft:.2f} | {draft / FORWARD:.1%} | {rest:.2f} "
            f"| {more:.2f} | {more / FORWARD:.1%} | {waits:.1f} | {kernels:.0f} |"
        )


def by_part(
    model: DiffusionLM, settings: DecodingSettings, graph: DraftGraph, layers: int, *counts: int
) -> Iterator[str]:
    """The first table."""
    acceptance = graph.acceptance
    assert acceptance is not None  # 16 prompts are enough for one
    yield (
        "| model | drafts | steps per forward | transformer, ms | head, ms | walk, ms "
        "| comparing, ms | drafting, ms | rest, ms | added per step, ms "
        "| added, of the transformer |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])
    yield from lines("tiny-sdar", model, settings, prompt, acceptance, *counts)
    large = random_model(layers)
    settings = decoding_settings(large, gen_length=256, block_length=8, stop_at_eos=False)
    prompt = torch.arange(1, 129)
    without = acceptance.model_copy(update={"bigrams": ()})  # of another vocabulary
    for block in (8, 32):
        sized = settings.model_copy(update={"block_length": block})
        name = f"{large.name}, block {block}"
        yield from lines(name, large, sized, prompt, without, *counts)


def in_papers_terms(model: DiffusionLM, graph: DraftGraph, *counts: int) -> Iterator[str]:
    """The second table."""
    yield (
        "| drafts by | drafts | steps per forward | drafting, ms | of 25 ms | all else, ms "
        "| beyond plain, ms | of 25 ms | waits | kernels |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    yield from host_lines(model, graph, *counts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="*", choices=KEYS, default=[*KEYS], help="which")
    parser.add_argument("--forwards", type=int, default=16, help="forwards to take apart")
    parser.add_argument("--repeats", type=int, default=3, help="decodes that medians are over")
    parser.add_argument("--layers", type=int, default=20, help="of the random model (20: 302M)")
    add_into(parser)
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    expect(parser, args.into, *(KEYS[name] for name in args.tables))
    if args.count is not None:
        count(args.count)
        return
    model = load_model("tiny-sdar", device="cpu", dtype="float32")
    settings = decoding_settings(model, gen_length=256)
    prompts = load_prompts("synthetic", 16)
    traces = record(model, prepare(model, prompts, settings))
    graph = build_graph(model, prompts, settings, traces, 32)
    counts = (args.forwards, args.repeats)
    machine = f"{device_name(model.device)}, {torch.get_num_threads()} threads, float32"
    for name in args.tables:
        started = os.getloadavg()[0]
        if name == "parts":
            found = by_part(model, settings, graph, args.layers, *counts)
        else:
            found = in_papers_terms(model, graph, *counts)
        table = "\n".join(found)
        load = f"load average {started:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
        note = f"`{command()}` ({machine}, torch {torch.__version__}; {load})"
        print(f"{note}\n\n{table}\n")
        fill(args.into, KEYS[name], f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
