"""What a forward asks of an accelerator: kernels, attention's shapes, bytes. Nothing is timed.

    python studies/launched.py
    python studies/launched.py --tables kernels

All of it is counted on the pretend accelerator of the tests (`tests/far.py`), with tiny models:
what is launched depends on the number of layers, sequences and drafts, and not on their width.
`kernels` is of one forward in the middle of a block, whose drafts are the likeliest tokens of some
positions; attention is one kernel each time, whichever computes it. `shapes` is of whole decodes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from overhead_host import launches
from pages import add_into, command, expect, fill, start

from spiffy.bench.grow import Shape, grow
from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, loop, make_task, run
from spiffy.runtime.draft import Drafter, GraphDrafter, graph_drafter
from spiffy.runtime.forward.pack import Row, forward
from spiffy.runtime.models import attention
from spiffy.runtime.models.batch import BatchMask
from spiffy.runtime.models.lanes import Pool
from spiffy.runtime.models.slots import KeyValues
from spiffy.schemas import DecodingSettings, DraftGraph

MODELS = (("tiny-llada", "dual"), ("tiny-sdar", "block"))
SHARING = ("tiny-sdar",)  # heads share keys and values in SDAR-8B, and not in LLaDA-8B
DRAFTS = (0, 8, 32)
SEQUENCES = (1, 4, 16)
LAYERS = 36  # of a model of 8B
TURNS = 3  # forwards of a block that come before the one that is counted
TABLES = ("kernels", "shapes")


@dataclass
class Launched:
    """Kernels of one forward, and bytes that were sent for it."""

    masks: int = 0  # made in the first layer that needs them, for all
    attention: int = 0  # these, and putting keys and values away
    transformer: int = 0
    all: int = 0
    sent: int = 0


class Counted:
    """Counts what forwards launch on the pretend accelerator."""

    def __init__(self, far: Any, model: DiffusionLM) -> None:
        self.far, self.model = far, model
        self.config: Any = model.module.config

    def forward(self, rows: Sequence[Row]) -> tuple[Launched, list[Any]]:
        """What one forward launches, and what it gives."""
        found, far = Launched(), self.far
        far.reset()
        with ExitStack() as stack:
            for owner, method, name in (
                (attention._Arrangement, "_added", "masks"),
                (BatchMask, "added", "masks"),
                (attention._Arrangement, "attend", "attention"),
                (DiffusionLM, "hidden_states", "transformer"),
            ):
                usual = getattr(owner, method)

                def counting(*args: Any, usual: Any = usual, name: str = name, **kw: Any) -> Any:
                    before = far.calls.copy()
                    result = usual(*args, **kw)
                    more = launches(far.calls - before)
                    setattr(found, name, getattr(found, name) + more)
                    return result

                stack.enter_context(patch.object(owner, method, counting))
            outputs = forward(self.model, rows)
        found.all, found.sent = launches(far.calls), far.sent.total()
        return found, outputs


def loaded(name: str) -> DiffusionLM:
    """A model on the pretend accelerator; with shared heads if larger ones of its family have them.

    For that it has twice the heads, without changing its function.
    """
    model = load_model(name, device="cpu", dtype="float32")
    shape = Shape.of(model)
    if name in SHARING:
        model = grow(model, replace(shape, name=name, heads=2 * shape.heads))
    model.module.to("far")
    return model


def drafts_of(model: DiffusionLM, drafts: int) -> Drafter | None:
    """The likeliest tokens of the most confident positions, one position and token a draft."""
    fills = [[pair] for pair in product(range(6), range(6))]
    return GraphDrafter(fills[:drafts], model) if drafts else None


def in_mid_block(counted: Counted, tasks: Sequence[Task]) -> Launched:
    """A forward that sequences share, after some that began their blocks."""
    pool = Pool(len(tasks))
    lanes = [pool.open(task.canvas.length) if len(tasks) > 1 else None for task in tasks]
    decodings = [loop.denoise(task, kv) for task, kv in zip(tasks, lanes, strict=True)]
    rows = [next(decoding) for decoding in decodings]
    for _ in range(TURNS):
        _, outputs = counted.forward([row for own in rows for row in own])
        for k, decoding in enumerate(decodings):
            mine, outputs = outputs[: len(rows[k])], outputs[len(rows[k]) :]
            rows[k] = decoding.send(mine)
    found, _ = counted.forward([row for own in rows for row in own])
    return found


def kernel_lines(far: Any) -> Iterator[str]:
    """Markdown rows of the first table."""
    yield (
        "| model, cache | drafts | sequences | beside the layers | in a layer | of these attention "
        f"| with {LAYERS} layers | bytes sent |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, cache in MODELS:
        model = loaded(name)
        settings = decoding_settings(model, gen_length=64, cache=cache)
        texts = load_prompts("synthetic", max(SEQUENCES), split="test").texts
        counted = Counted(far, model)
        layers = counted.config.num_hidden_layers
        for drafts, sequences in product(DRAFTS, SEQUENCES):
            tasks = [make_task(model, model.encode(text), settings) for text in texts[:sequences]]
            for task in tasks:
                task.drafter = drafts_of(model, drafts)
            found = in_mid_block(counted, tasks)
            layer, more = divmod(found.transformer - found.masks, layers)
            attending = (found.attention - found.masks) // layers
            beside = found.all - found.transformer + found.masks + more
            yield (
                f"| {name}, {cache} | {drafts} | {sequences} | {beside} | {layer} | {attending} "
                f"| {beside + LAYERS * layer} | {found.sent:,} |"
            )


@dataclass
class Shapes:
    """What attention computed in a decode."""

    calls: Counter[tuple[int, int]] = field(default_factory=Counter)  # by query and key lengths
    laid_out: set[tuple[Any, ...]] = field(default_factory=set)  # these with all strides
    grown: int = 0  # buffers of keys, or values, that were made larger


@contextmanager
def watched() -> Iterator[Shapes]:
    """Collect the shapes that torch's attention is called with."""
    found = Shapes()
    usual, grown = attention.scaled_dot_product_attention, KeyValues._grown

    def attend(query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> Any:
        found.calls[query.shape[2], key.shape[2]] += 1
        strides = [None if part is None else part.stride() for part in (query, key, value, mask)]
        found.laid_out.add((query.shape, key.shape, *strides))
        return usual(query, key, value, mask, **options)

    def growing(self: Any, number: int, like: Any, before: Any) -> Any:
        found.grown += before is not None
        return grown(self, number, like, before)

    with (
        patch.object(attention, "scaled_dot_product_attention", attend),
        patch.object(KeyValues, "_grown", growing),
    ):
        yield found


def shape_lines(graphs: Sequence[tuple[DecodingSettings, DraftGraph]]) -> Iterator[str]:
    """Markdown rows of the second table."""
    yield (
        "| model, cache | drafts by | drafts | forwards | query and key lengths | with strides "
        "| stores grew |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for (name, cache), (settings, graph) in zip(MODELS, graphs, strict=True):
        model = loaded(name)
        layers: int = model.module.config.num_hidden_layers  # type: ignore[union-attr, assignment]
        prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])
        for way, drafts in (("nobody", 0), ("graph", 8), ("model", 8)):
            task = make_task(model, prompt, settings)
            if drafts:
                selection: Any = way
                task.drafter = graph_drafter(model, graph, settings, drafts, selection)
            with watched() as found:
                forwards = sum(1 for _ in run(model, [task], 1))
            yield (
                f"| {name}, {cache} | {way} | {drafts} | {forwards} | {len(found.calls)} "
                f"| {len(found.laid_out)} | {found.grown // (2 * layers)} |"
            )


def calibrated(name: str, cache: str) -> tuple[DecodingSettings, DraftGraph]:
    """A graph of some prompts; on the CPU, before there is a pretend accelerator."""
    model = load_model(name, device="cpu", dtype="float32")
    settings = decoding_settings(model, gen_length=128, cache=cache)
    settings = settings.model_copy(update={"stop_at_eos": False})
    prompts = load_prompts("synthetic", 8)
    traces = record(model, prepare(model, prompts, settings))
    return settings, build_graph(model, prompts, settings, traces, 32)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=[*TABLES], help="which")
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, *args.tables)
    graphs = [calibrated(*pair) for pair in MODELS] if "shapes" in args.tables else []
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    far = importlib.import_module("far")
    for table in args.tables:
        lines = "\n".join(kernel_lines(far) if table == "kernels" else shape_lines(graphs))
        alone = argparse.Namespace(**{**vars(args), "tables": [table]})
        note = f"`{command(alone)}` (counted; torch {torch.__version__}, float32)"
        print(f"{note}\n\n{lines}\n", flush=True)
        fill(args.into, table, f"{note}\n\n{lines}")


if __name__ == "__main__":
    start(main)
