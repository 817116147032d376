"""Noise of temperatures above 0: numbers that depend on where they are needed and on nothing else.

So it does not matter in which forward, in which row of it and on which device a state happened to
be evaluated, nor what else was drawn there: plain and speculative decoding draw the same tokens.
The numbers are those of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014), whose k-th number is a function of its seed and k: a tree, in which every number
may be the seed of others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.weights import GROUP
from spiffy.schemas import DecodingSettings


def _signed(bits: int) -> int:
    """The same 64 bits as torch's integers, which wrap around alike."""
    return bits - (bits >> 63 << 64)


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def numbers(seeds: Tensor, which: Tensor) -> Tensor:
    """The numbers `which` (int64, from 0) of the generators seeded by `seeds`, as 64 bits: int64.

    Shapes are broadcast. Integers only, so the same on every device.
    """
    bits = seeds + (which + 1) * _STEP
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifted to the right, with zeros in front."""
    return (bits >> by) & ((1 << 64 - by) - 1)


@dataclass(frozen=True)
class Noise:
    """The noise of one decode."""

    seed: int
    sequence: int

    @cached_property
    def _root(self) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {self.sequence}".encode()).digest()
        return torch.tensor(int.from_bytes(digest[:8], "little", signed=True), device="cpu")

    def keys(self, committed: Tensor, redraw: int, positions: Tensor) -> Tensor:
        """Keys of what a step draws, int64 [M]: `draw` makes tokens of them.

        Parameters
        ----------
        committed
            int64, [M] or a number: tokens committed in the block before the step. It tells steps
            apart and, unlike their number, is known of a state before the walk comes to it.
        redraw
            See `redraw`.
        positions
            int64 [M], of the sequence.
        """
        step = numbers(numbers(self._root, committed), torch.tensor(redraw, device="cpu"))
        return numbers(step, positions)


def redraw(settings: DecodingSettings, cursor: Cursor) -> int:
    """What tells a step from one before it with as many tokens committed in the block.

    That is one of `joint` in a block without masks, or one that found no token likely enough and
    did not have to commit any: what it drew has had its chance. Where the schedule alone lets a
    step commit nothing, its draws have decided nothing yet, and the next step makes the same.
    """
    rejects = settings.policy in ("threshold", "joint") or settings.own_policy
    if settings.schedule == "timestep" and rejects:
        return cursor.block_step
    return cursor.post_steps


def exponential(keys: Tensor, count: int) -> Tensor:
    """Independent numbers with the standard exponential law, float64 [M, count], by keys [M].

    The uniform number below has the same 52 bits on every device; its logarithm, in which devices
    differ, may have another last bit.
    """
    bits = numbers(keys[:, None], torch.arange(count, device=keys.device))
    uniform = (bits >> 12).double().mul_(2.0**-52).add_(0.5 + 2.0**-53)  # exact; never 0 or 1
    return uniform.log_().neg_()


def draw(weights: Tensor, keys: Tensor) -> Tensor:
    """Tokens (int64 [M]) drawn by weights float64 [M, vocab], as `weights_of` gives them.

    By the rule of LLaDA's `add_gumbel_noise`: the largest weight divided by an exponential number,
    which is Gumbel noise added to the logits. Applied twice, to groups of tokens, whose weight is
    the sum of their tokens', and to the tokens of the chosen group: one law, and a hundredth of the
    numbers. Equals go to the lower token id.
    """
    groups = weights.shape[1] // GROUP
    grouped = weights.view(len(weights), groups, GROUP)
    # Tokens first: whatever the vocabulary is filled up with does not change the numbers.
    of_token, of_group = torch.split(exponential(keys, GROUP + groups), [GROUP, groups], 1)
    group = (grouped.sum(-1) / of_group).max(-1).indices
    own = grouped.gather(1, group[:, None, None].expand(-1, 1, GROUP))[:, 0]
    return group * GROUP + (own / of_token).max(-1).indices
