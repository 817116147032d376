"""Likelihoods of continuations under models that unmask in any order, by LLaDA's estimate.

The log-likelihood of a continuation of L tokens is bounded from below by the mean, over l drawn
evenly from 1 to L and l of its positions drawn to be masked, of L / l times the sum of the
log-probabilities of the tokens at these positions (arXiv 2502.09992, Algorithm 3). Where all sets
of positions are no more than the samples, the mean is taken over all of them and is exact.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from itertools import combinations

import torch

from spiffy.runtime import generate
from spiffy.runtime.forward.request import reads_on_host
from spiffy.runtime.models import DiffusionLM
from spiffy.schemas import SpiffyError


def log_likelihood(
    model: DiffusionLM,
    context: Sequence[int],
    continuation: Sequence[int],
    samples: int = 128,
    batch_size: int = 1,
    seed: int = 0,
) -> float:
    """Estimate a continuation's log-likelihood, in nats.

    Parameters
    ----------
    context, continuation
        Token ids.
    samples
        Masked continuations to look at; each takes a row of a forward.
    batch_size
        Rows per forward.
    seed
        Decides, with the ids, which positions are masked.

    Raises
    ------
    SpiffyError
        If the family is block-causal, or the ids are too many for the model.
    """
    check_likelihood(model, context, continuation)
    length, start = len(continuation), len(context)
    if not length:
        return 0.0
    chosen = _masked_sets(length, samples, f"{seed} {[*context]} {[*continuation]}")
    weights = torch.zeros(len(chosen), length, dtype=torch.float64)  # 0 where nothing is masked
    for row, (positions, weight) in zip(weights, chosen, strict=True):
        row[[*positions]] = weight
    ids = torch.tensor([*context, *continuation], device=model.device)
    given, asked, masked = ids[:start], ids[start:], (weights > 0).to(model.device)
    total = 0.0
    with torch.inference_mode():
        for at in range(0, len(chosen), batch_size):
            places, of_each = (each[at : at + batch_size] for each in (masked, weights))
            whole = asked.expand_as(places)
            rows = (given.expand(len(places), -1), whole.masked_fill(places, model.mask_token_id))
            logits = model.forward_logits(torch.cat(rows, 1))[:, start:]
            if reads_on_host(model):
                logits, whole = logits.cpu(), whole.cpu()
            log_p = logits.double().log_softmax(-1).gather(-1, whole[..., None])[..., 0].cpu()
            total += float((log_p * of_each)[of_each > 0].sum())
    return total


def _masked_sets(length: int, samples: int, seed: str) -> list[tuple[tuple[int, ...], float]]:
    """Positions to mask, and the weights of the sums of their log-probabilities."""
    if length < 31 and 2**length - 1 <= samples:
        return [
            (positions, 1 / (size * math.comb(length, size)))  # 1 / L x L / size, of so many sets
            for size in range(1, length + 1)
            for positions in combinations(range(length), size)
        ]
    draw = random.Random(hashlib.sha256(seed.encode()).digest())
    first, chosen = draw.random(), []
    for k in range(samples):  # sizes are spread evenly from a random start
        size = 1 + int((first + k / samples) % 1 * length)
        positions = tuple(draw.sample(range(length), size))
        chosen.append((positions, length / size / samples))
    return chosen


def is_greedy(model: DiffusionLM, context: Sequence[int], continuation: Sequence[int]) -> bool:
    """Whether decoding of as many tokens, the most confident one per step, gives this one."""
    check_any_order(model)
    length = len(continuation)
    if not length:
        return True
    output = generate(
        model,
        [*context],
        gen_length=length,
        block_length=length,
        policy="static",
        score="confidence",
        tokens_per_step=1,
        cache="none",
        temperature=0.0,
        stop_at_eos=False,
    )
    return output.token_ids == [*continuation]


def check_likelihood(
    model: DiffusionLM, context: Sequence[int], continuation: Sequence[int]
) -> None:
    """Refuse what `log_likelihood` cannot estimate.

    Raises
    ------
    SpiffyError
        If the family is block-causal, or the ids are too many for the model.
    """
    check_any_order(model)
    count = len(context) + len(continuation)
    if model.max_length is not None and count > model.max_length:
        raise SpiffyError(
            f"context and continuation of {count} tokens exceed the {model.max_length} positions "
            f"of {model.name}"
        )


def check_any_order(model: DiffusionLM) -> None:
    """Refuse block-causal families: the estimate is of models that mask anywhere.

    Raises
    ------
    SpiffyError
        Names the family.
    """
    if model.family.block_causal:
        raise SpiffyError(
            f"likelihoods of block-causal families ({model.family.name}) are not supported: choose "
            "tasks that generate"
        )
