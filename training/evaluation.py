"""How many unseen problems `tiny-llada` solves, decoded by LLaDA's own rule on its own network."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from checkpoint import load_exported
from corpus import EOS_ID, MASK_ID, prompt_ids, unseen
from network import TinyLlada

from spiffy.calib.synthetic import final_answer


@dataclass(slots=True)
class Decoded:
    """What one row's decoding gave: its tokens up to EOS, steps, and padding committed."""

    ids: list[int]
    steps: int
    committed: int  # tokens written in all, EOS padding included


@torch.no_grad()
def decode(
    model: TinyLlada,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    block_length: int,
    threshold: float | None,
) -> list[Decoded]:
    """Decode prompts together by LLaDA's rule; ties go to the lowest position.

    Static (no threshold) commits the single most confident position of the block per step;
    with a threshold, all others that reach it as well. A row stops after its first block with EOS.
    Prompts are padded on the left and the padding is hidden, which rotary embeddings do not notice.
    """
    batch, start = len(prompts), max(map(len, prompts))
    ids = torch.full((batch, start + gen_length), MASK_ID)
    seen = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, start - len(prompt) : start] = torch.tensor(prompt)
        seen[row, : start - len(prompt)] = False
    steps = [0] * batch
    ends = [start + gen_length] * batch
    active = torch.arange(batch)
    for begin in range(start, start + gen_length, block_length):
        block = slice(begin, begin + block_length)
        at = torch.arange(begin, begin + block_length).expand(batch, -1)
        running = active
        while len(running):
            logits = model(ids[running], at[: len(running)], seen[running]).double()
            confidence, tokens = logits.softmax(-1).max(-1)
            masked = ids[running, block] == MASK_ID
            confidence = confidence.masked_fill(~masked, -1.0)
            chosen = torch.zeros_like(masked)
            chosen[torch.arange(len(running)), confidence.argmax(-1)] = True
            if threshold is not None:
                chosen |= confidence >= threshold
            ids[running, block] = torch.where(chosen, tokens, ids[running, block])
            for row in running.tolist():
                steps[row] += 1
            running = running[(ids[running, block] == MASK_ID).any(-1)]
        finished = (ids[active, block] == EOS_ID).any(-1)
        for row in active[finished].tolist():
            ends[row] = begin + block_length
        active = active[~finished]
    results = []
    for row in range(batch):
        answer = ids[row, start : ends[row]].tolist()
        kept = answer[: answer.index(EOS_ID)] if EOS_ID in answer else answer
        results.append(Decoded(kept, steps[row], len(answer)))
    return results


def evaluate(args: argparse.Namespace) -> None:
    """Print exact answers and tokens per step for each generation length and policy."""
    model, tokenizer = load_exported(args.checkpoint)
    chosen = unseen(args.problems, args.seed)
    for gen_length in args.gen_lengths:
        for threshold in (None, args.threshold):
            right: dict[int, list[bool]] = defaultdict(list)
            outputs: list[Decoded] = []
            for first in range(0, len(chosen), args.batch):
                group = chosen[first : first + args.batch]
                prompts = [prompt_ids(tokenizer, problem.question) for problem in group]
                decoded = decode(model, prompts, gen_length, args.block_length, threshold)
                outputs += decoded
                for problem, output in zip(group, decoded, strict=True):
                    text = tokenizer.decode(output.ids)
                    correct = final_answer(text) == final_answer(problem.answer)
                    right[problem.answer.count("<<")].append(correct)
                    if args.show and not correct:
                        print(f"--- {problem.question}\n{text}\n(right: {problem.answer})")
            report(gen_length, threshold, right, outputs)


def report(
    gen_length: int,
    threshold: float | None,
    right: dict[int, list[bool]],
    outputs: Sequence[Decoded],
) -> None:
    """Print one line of results; tokens per step count the answer's EOS but not its padding."""
    steps = sum(output.steps for output in outputs)
    answered = sum(len(output.ids) + 1 for output in outputs)
    committed = sum(output.committed for output in outputs)
    total = sum(len(flags) for flags in right.values())
    exact = sum(sum(flags) for flags in right.values())
    by_steps = " ".join(f"{n}-step {sum(f)}/{len(f)}" for n, f in sorted(right.items()))
    policy = "static" if threshold is None else f"threshold {threshold}"
    print(
        f"gen_length {gen_length} {policy}: exact {exact}/{total} = {exact / total:.1%} "
        f"({by_steps}); tokens per step {answered / steps:.2f}, "
        f"with padding {committed / steps:.2f}",
        flush=True,
    )
