"""Measure what speculation itself costs: drafting, packing, verification, next to the forward.

    python benchmarks/overhead.py            # a tiny trained model and 300M random parameters
    python benchmarks/overhead.py --forwards 40

Decodes with drafts and takes apart the time of each model call: the transformer, the output head at
the masked positions it is asked for, drafting, and the rest (packing, float64 softmax, unmasking,
comparing states). Plain decoding of the same prompt stands next to it, because head, softmax and
unmasking are not speculation's. The 300M model has random weights, so its drafts hardly ever come
true: its time per denoising step is a worst case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from losslessness import fill
from transformers import Qwen3Config, Qwen3ForCausalLM

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import denoise
from spiffy.runtime.draft import AcceptanceDrafter, Drafter
from spiffy.runtime.generate import acceptance_weights, make_task
from spiffy.runtime.models.sdar import SDAR
from spiffy.runtime.pack import forward
from spiffy.schemas import AcceptanceModel, DecodingSettings

PARTS = ("forward", "head", "draft", "rest")


def random_model() -> DiffusionLM:
    """SDAR's layout with 311 million random parameters and a vocabulary of 32,000."""
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    facts = {"mask_token_id": 0, "block_size": 8, "max_position_embeddings": 4096}
    return DiffusionLM(Qwen3ForCausalLM(config), SDAR, facts, name="311M random")


class Clock:
    """Seconds by part of the forward at hand; call it to wrap a function."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def __call__(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for `part`."""

        def timed(*args: Any, **options: Any) -> Any:
            started = perf_counter()
            result = function(*args, **options)
            self.seconds[part] += perf_counter() - started
            return result

        return timed


@contextmanager
def head_timed(model: DiffusionLM, clock: Clock) -> Iterator[None]:
    """Time the model's output head."""
    head = model.head
    model.head = clock("head", head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.head = head  # type: ignore[method-assign]


def take_apart(
    model: DiffusionLM,
    settings: DecodingSettings,
    prompt: torch.Tensor,
    drafter: Drafter | None,
    forwards: int,
) -> tuple[list[dict[str, float]], float]:
    """Seconds by part for each of the first `forwards` model calls, and steps per call."""
    clock = Clock()
    task = make_task(model, prompt, settings)
    if drafter is not None:
        timed: Any = clock("draft", drafter)
        timed.token_ranks = drafter.token_ranks
        task.drafter = timed
    calls = []
    with head_timed(model, clock):
        decoding = denoise(task)
        rows = next(decoding)
        for _ in range(forwards):
            started = perf_counter()
            outputs = forward(model, rows)
            clock.seconds["forward"] = perf_counter() - started
            try:
                rows = decoding.send(outputs)
            except StopIteration:
                break
            spent = perf_counter() - started
            clock.seconds["rest"] = spent - sum(clock.seconds.values())
            calls.append(clock.seconds)
            clock.seconds = dict.fromkeys(PARTS, 0.0)
    return calls[1:], task.stats.steps / max(len(calls), 1)  # the first call also warms up


def lines(
    name: str,
    model: DiffusionLM,
    settings: DecodingSettings,
    prompt: torch.Tensor,
    acceptance: AcceptanceModel,
    forwards: int,
) -> Iterator[str]:
    """Markdown rows of one model, plain decoding first."""
    weights = acceptance_weights(acceptance, model.vocab_size)
    plain = None
    for budget in (0, 8, 32):
        drafter = AcceptanceDrafter(weights, budget, model) if budget else None
        calls, steps = take_apart(model, settings, prompt, drafter, forwards)
        part = {key: 1000 * median(call[key] for call in calls) for key in PARTS}
        plain = plain or part
        # What a plain step spends on softmax and unmasking, every step of the walk spends too.
        added = max(part["draft"] + part["rest"] - plain["rest"] * steps, 0.0)
        yield (
            f"| {name} | {budget} | {steps:.2f} | {part['forward']:.1f} | {part['head']:.2f} "
            f"| {part['draft']:.2f} | {part['rest']:.2f} | {added / steps:.2f} "
            f"| {added / part['forward']:.1%} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--forwards", type=int, default=24, help="model calls to take apart")
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files to fill")
    args = parser.parse_args()
    model = load_model("tiny-sdar", device="cpu", dtype="float32")
    settings = decoding_settings(model, gen_length=256)
    prompts = load_prompts("synthetic", 16)
    traces = record(model, prepare(model, prompts, settings))
    acceptance = build_graph(model, prompts, settings, traces, 32).acceptance
    assert acceptance is not None  # 16 prompts are enough for one
    found = [
        "| model | drafts | steps per call | transformer, ms | head, ms | drafting, ms "
        "| rest, ms | added per step, ms | added, of the transformer |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    ]
    prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])
    for line in lines("tiny-sdar", model, settings, prompt, acceptance, args.forwards):
        found.append(line)
    large = random_model()
    settings = decoding_settings(large, gen_length=256, block_length=8, stop_at_eos=False)
    prompt = torch.arange(1, 129)
    without = acceptance.model_copy(update={"bigrams": ()})  # of another vocabulary
    for block in (8, 32):
        sized = settings.model_copy(update={"block_length": block})
        name = f"{large.name}, block {block}"
        for line in lines(name, large, sized, prompt, without, args.forwards):
            found.append(line)
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    table = "\n".join(found)
    note = f"`python benchmarks/overhead.py --forwards {args.forwards}` ({machine})"
    print(table)
    for path in args.into:
        fill(path, "overhead", f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
