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

Decoding is deterministic: every decode is repeated, numbers of drafts in turns, and each part of
each turn is a median over the repeats. The 300M model has random weights, so its drafts seldom come
true: its time per denoising step is a worst case.

The second table, `--tables host`, is in the paper's terms, on the host of an accelerator
(`studies/overhead_host.py`). The third, `--tables shared`, is of sequences that share forwards
there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import mean, median
from time import perf_counter

from spiffy.cli.threads import wait_passively

wait_passively()  # as the commands do, before torch is imported

# ruff: noqa: E402
import torch
from overhead_host import SEQUENCES, host_lines, shared_lines
from pages import add_into, at_least, command, expect, fill, load_average, machine, start
from timing import timed
from transformers import Qwen3Config, Qwen3ForCausalLM

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import loop, make_task
from spiffy.runtime.draft import AcceptanceDrafter, Drafter
from spiffy.runtime.draft.acceptance import acceptance_weights
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.models.sdar import SDAR
from spiffy.schemas import AcceptanceModel, DecodingSettings, DraftGraph

BUDGETS = (0, 8, 32)
PARTS = ("forward", "head", "walk", "compare", "draft", "rest")
# Of the tables in the page.
KEYS = {"parts": "overhead", "host": "overhead-host", "shared": "overhead-shared"}


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
    with ExitStack() as stack:
        heads, finds, ranked = (
            stack.enter_context(timed(*place))
            for place in ((model, "head"), (loop, "find"), (loop, "_candidates"))
        )
        drafting = [ranked]  # of the forward that the turn ends with, as all else that is timed
        if drafter is not None:
            drafting.append(stack.enter_context(timed(type(drafter), "__call__")))
        decoding = loop.denoise(task)
        rows = next(decoding)
        for _ in range(forwards):
            before = replace(stats)
            for spent in (heads, finds, *drafting):
                spent.clear()
            started = perf_counter()
            outputs = forward(model, rows)
            forwarded = perf_counter()
            try:
                rows = decoding.send(outputs)
            except StopIteration:
                break
            rest = 1000 * (perf_counter() - forwarded)
            walk = 1000 * (stats.verify_seconds - before.verify_seconds)
            draft = sum(map(sum, drafting))
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


def medians(decodes: list[list[Turn]]) -> list[Turn]:
    """The turns of one decode that was repeated: each part's time is a median."""
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
    decodes: dict[int, list[list[Turn]]] = {budget: [] for budget in BUDGETS}
    for _ in range(repeats):  # in turns: a machine that slows down does so for all of them
        for budget, found in decodes.items():
            drafter = AcceptanceDrafter(weights, budget, model) if budget else None
            found.append(take_apart(model, settings, prompt, drafter, forwards))
    for budget, found in decodes.items():
        turns = medians(found)
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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="*", choices=KEYS, default=[*KEYS], help="which")
    parser.add_argument("--forwards", type=at_least(2), default=16, help="forwards to take apart")
    parser.add_argument(
        "--repeats", type=at_least(1), default=3, help="decodes that medians are over"
    )
    parser.add_argument(
        "--layers", type=at_least(1), default=20, help="of the random model (20: 302M)"
    )
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, *(KEYS[name] for name in args.tables))
    model = load_model("tiny-sdar", device="cpu", dtype="float32")
    settings = decoding_settings(model, gen_length=256)
    prompts = load_prompts("synthetic", 16)
    traces = record(model, prepare(model, prompts, settings))
    graph = build_graph(model, prompts, settings, traces, 32)
    counts = (args.forwards, args.repeats)
    for name in args.tables:
        started = load_average()
        if name == "parts":
            found = by_part(model, settings, graph, args.layers, *counts)
        elif name == "host":
            found = host_lines(model, graph, *counts)
        else:
            found = shared_lines(model, graph, *counts)
        table = "\n".join(found)
        alone = argparse.Namespace(**{**vars(args), "tables": [name]})
        problems = (
            f"{max(SEQUENCES)} generated problems" if name == "shared" else "a generated problem"
        )
        note = (
            f"`{command(alone)}` ({problems}; against plain decoding; {machine()}, "
            f"float32; load average {started} at the start, {load_average()} at the end)"
        )
        print(f"{note}\n\n{table}\n", flush=True)
        fill(args.into, KEYS[name], f"{note}\n\n{table}")


if __name__ == "__main__":
    start(main)
