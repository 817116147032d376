"""What speculation costs the host of an accelerator: the second table of `studies/overhead.py`.

Drafting, and verifying beyond what a plain forward spends, in milliseconds and as shares of
forwards of 25, 10 and 5 ms on an accelerator. As there, every state is read in its forward, and
what counts is the host's time alone, not what the accelerator would compute (transformer, head,
what is read off logits): that is recorded in a decode before, and handed over in those that are
timed. Computing it meanwhile would push all else out of the processor's caches, which an
accelerator leaves alone. The model is tiny-sdar grown to 0.3B and a vocabulary of 126,464, so
drafts come true as on a trained model. How often a forward waits for the device, and how many
kernels it launches beside the transformer's, is counted on the pretend accelerator of the tests.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import thread_time
from typing import Any
from unittest.mock import patch

import torch
from timing import timed

from spiffy.bench.grow import SHAPES, grow
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Scheduler, Task, loop, make_task
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
from spiffy.runtime.forward import pack, request
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.models.lanes import Pool
from spiffy.schemas import DecodingSettings, DraftGraph

FORWARDS = (25.0, 10.0, 5.0)  # milliseconds, on an accelerator
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
    kept = request._HOSTS
    request._HOSTS = frozenset()
    try:
        yield
    finally:
        request._HOSTS = kept


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
    prompts: Sequence[torch.Tensor],
    drafter: Drafter | None,
    forwards: int,
    computed: dict[str, list[Any]],
) -> list[Host]:
    """The first turns of decodes that share forwards, without the very first; until one ends.

    In processor time of the one thread that does what is counted: other processes do not add to it.

    Parameters
    ----------
    computed
        What the accelerator computes, by function; empty: to be collected.
    """
    scheduler = Scheduler(model, len(prompts))
    if len(prompts) > 1:
        scheduler._pool = Pool(len(prompts))  # as off the CPU
    tasks = [make_task(model, prompt, settings) for prompt in prompts]
    for task in tasks:
        task.drafter = drafter
        scheduler.add(task)
    turns = []
    with ExitStack() as stack:
        stack.enter_context(read_ahead())
        elsewhere, known = [], bool(computed)
        for owner, name in ((model, "hidden_states"), (pack, "read_rows")):  # the accelerator's
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
        for _ in range(forwards):
            steps = sum(task.stats.steps for task in tasks)
            for spent in (*elsewhere, *drafting):
                spent.clear()
            started = thread_time()
            finished = scheduler.step()
            whole = 1000 * (thread_time() - started)
            for task in finished:
                if task.error is not None:
                    raise task.error
            if finished:
                break
            draft, away = (sum(map(sum, parts)) for parts in (drafting, elsewhere))
            made = sum(task.stats.steps for task in tasks) - steps
            turns.append(Host(draft, whole - draft - away, made))
    return turns[1:]


def launches(calls: Counter[str]) -> int:
    """Kernels among calls by name: those that compute or copy, not the views of what is there."""
    return sum(number for name, number in calls.items() if not _is_view(name))


def _is_view(name: str) -> bool:
    packet = getattr(torch.ops.aten, name)
    returns = getattr(packet, packet.overloads()[0])._schema.returns
    shared = any(part.alias_info and not part.alias_info.is_write for part in returns)
    return shared or name == "_unsafe_view" or name.removeprefix("new_").startswith("empty")


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
        command = [sys.executable, __file__, str(path)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: list[tuple[float, float]] = json.loads(printed)
    return found


def means(decodes: Sequence[Sequence[Host]]) -> tuple[float, float, float]:
    """Steps, and milliseconds of drafting and of all else, of a turn of a decode that is repeated.

    Of its repetitions the first one computes, and does not count; of the others medians do.
    """
    turns = list(zip(*decodes[1:], strict=True))
    draft = mean(median(turn.draft for turn in same) for same in turns)
    rest = mean(median(turn.rest for turn in same) for same in turns)
    return mean(same[0].steps for same in turns), draft, rest


def host_lines(model: DiffusionLM, graph: DraftGraph, forwards: int, repeats: int) -> Iterator[str]:
    """The second table, of a model grown from `model`."""
    yield (
        "| drafts by | drafts | steps per forward | drafting, ms | of 25, 10, 5 ms | all else, ms "
        "| beyond plain, ms | of 25, 10, 5 ms | waits | kernels |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    large = grow(model, SHAPE)
    settings = decoding_settings(model, graph)
    prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])
    plain, computed = 0.0, [dict[str, list[Any]]() for _ in WAYS]
    decodes: list[list[list[Host]]] = [[] for _ in WAYS]
    for _ in range(1 + repeats):  # in turns: a machine that slows down does so for all of them
        for k, (way, drafts) in enumerate(WAYS):
            with searching(way):
                new = drafter_of(large, graph, settings, way, drafts)  # has learned nothing yet
                decodes[k].append(on_host(large, settings, [prompt], new, forwards, computed[k]))
    for k, ((way, drafts), (waits, kernels)) in enumerate(zip(WAYS, counts_of(graph), strict=True)):
        steps, draft, rest = means(decodes[k])
        plain = plain if drafts else rest
        more = max(rest - plain, 0.0)
        yield (
            f"| {way} | {drafts} | {steps:.2f} | {draft:.2f} | {shares(draft)} | {rest:.2f} "
            f"| {more:.2f} | {shares(more)} | {waits:.1f} | {kernels:.0f} |"
        )


SEQUENCES = (1, 4, 16)  # that share a forward
SHARED_WAYS = (("plain", 0), ("graph", 8), ("model", 8))


def shared_lines(
    model: DiffusionLM, graph: DraftGraph, forwards: int, repeats: int
) -> Iterator[str]:
    """The third table, of forwards that sequences share.

    Of the tiny model itself: what the host does depends neither on width nor on vocabulary.
    """
    yield (
        "| drafts by | drafts | sequences | steps per forward of each | drafting, ms "
        "| all else, ms | both, per sequence | both, of 25, 10, 5 ms |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    settings = decoding_settings(model, graph)
    texts = load_prompts("synthetic", max(SEQUENCES), split="test").texts
    prompts = [model.encode(text) for text in texts]
    cells = [(way, drafts, count) for way, drafts in SHARED_WAYS for count in SEQUENCES]
    computed = [dict[str, list[Any]]() for _ in cells]
    decodes: list[list[list[Host]]] = [[] for _ in cells]
    for _ in range(1 + repeats):
        for k, (way, drafts, count) in enumerate(cells):
            drafter = drafter_of(model, graph, settings, way, drafts)
            asked = (prompts[:count], drafter, forwards, computed[k])
            decodes[k].append(on_host(model, settings, *asked))
    for (way, drafts, count), found in zip(cells, decodes, strict=True):
        steps, draft, rest = means(found)
        yield (
            f"| {way} | {drafts} | {count} | {steps / count:.2f} | {draft:.2f} | {rest:.2f} "
            f"| {(draft + rest) / count:.2f} | {shares(draft + rest)} |"
        )


def shares(milliseconds: float) -> str:
    """Of forwards of all lengths."""
    return ", ".join(f"{milliseconds / forward:.1%}" for forward in FORWARDS)


if __name__ == "__main__":
    count(Path(sys.argv[1]))
