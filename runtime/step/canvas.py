"""Geometry of one answer, and a decoding state in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """Where prompt, blocks and answer lie in the sequence.

    Attributes
    ----------
    prompt_length, gen_length, block_length
        In positions.
    first
        Position at which the first decoded block starts: the end of the prompt, or, for
        block-causal models whose blocks count from position 0, the last multiple of
        `block_length` in it.
    cut
        Whether the last block ends with the answer instead of being whole.
    """

    prompt_length: int
    gen_length: int
    block_length: int
    first: int
    cut: bool = False

    @classmethod
    def plan(
        cls,
        prompt_length: int,
        gen_length: int,
        block_length: int,
        block_causal: bool,
        *,
        ends_with_prompt: bool = False,
        cut: bool = False,
    ) -> Canvas:
        """Lay out an answer behind a prompt; the last two as the facts of `Family`."""
        tail = prompt_length % block_length if block_causal and not ends_with_prompt else 0
        return cls(prompt_length, gen_length, block_length, prompt_length - tail, cut)

    @cached_property
    def blocks(self) -> int:
        """Number of decoded blocks, the last one included that may hold more than the answer."""
        return -((self.first - self.prompt_length - self.gen_length) // self.block_length)

    @cached_property
    def length(self) -> int:
        """Positions of the whole sequence."""
        if self.cut:
            return self.prompt_length + self.gen_length
        return self.first + self.blocks * self.block_length

    def span(self, block: int) -> range:
        """Positions of a decoded block."""
        start = self.first + block * self.block_length
        return range(start, min(start + self.block_length, self.length))

    def answer(self, block: int) -> range:
        """Positions of a decoded block that start as masks, not as the prompt's tail."""
        span = self.span(block)
        return range(max(span.start, self.prompt_length), span.stop)

    def attention_blocks(self, start: int, stop: int) -> list[range]:
        """The blocks, of the prompt too, that a run of whole ones consists of.

        The prompt's first one is shorter where blocks end with the prompt.
        """
        if start >= stop:
            return []
        edge = start + 1 + (self.first - start - 1) % self.block_length
        edges = [start, *range(edge, stop, self.block_length), stop]
        return [range(*pair) for pair in pairwise(edges)]

    def masked(self, cursor: Cursor, mask_token_id: int) -> Tensor:
        """Masked positions of the cursor's block, int64 [M]; prompt tokens never count."""
        answer = self.answer(cursor.block)
        ids = cursor.ids.numpy()[answer.start : answer.stop]
        return torch.from_numpy((ids == mask_token_id).nonzero()[0] + answer.start)

    def answered(self, cursor: Cursor) -> Tensor:
        """All positions of the cursor's block that are the answer's, int64 [M]."""
        answer = self.answer(cursor.block)
        return torch.arange(answer.start, answer.stop, device="cpu")

    def sub_block(self, block: int, position: int, length: int) -> range:
        """The sub-block of a block, `length` positions from its start on, that holds a position."""
        span = self.span(block)
        start = position - (position - span.start) % length
        return range(start, min(start + length, span.stop))

    def start(self, prompt: Tensor, mask_token_id: int) -> Cursor:
        """The state that decoding starts from: the prompt (int64 [prompt]), then masks."""
        ids = prompt.new_full((self.length,), mask_token_id)
        ids[: self.prompt_length] = prompt
        return Cursor(ids)


@dataclass(frozen=True)
class Cursor:
    """A state: all that the next denoising step depends on, the model aside.

    What the model says depends on `ids` and on where the block lies; what a step makes of it, on
    the counters too. So a forward over the same tokens tells about a state whoever evaluated it,
    and the cursor brings along what the tokens do not show.

    Attributes
    ----------
    ids
        int64 [length] on the host: prompt, committed tokens, masks.
    block, block_step, step
        The block being decoded; denoising steps made in it, and since the start.
    finished
        Whether nothing is left to decode.
    post_steps
        Steps made in the block that found no mask in it (policy "joint").
    """

    ids: Tensor
    block: int = 0
    block_step: int = 0
    step: int = 0
    finished: bool = False
    post_steps: int = 0
