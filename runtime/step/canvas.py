"""Geometry of one answer, and a decoding state in it."""

from __future__ import annotations

from dataclasses import dataclass

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
        block-causal models, the last multiple of `block_length` in it.
    """

    prompt_length: int
    gen_length: int
    block_length: int
    first: int

    @classmethod
    def plan(
        cls, prompt_length: int, gen_length: int, block_length: int, block_causal: bool
    ) -> Canvas:
        """Lay out an answer behind a prompt."""
        tail = prompt_length % block_length if block_causal else 0
        return cls(prompt_length, gen_length, block_length, prompt_length - tail)

    @property
    def blocks(self) -> int:
        """Number of decoded blocks; block-causal answers are rounded up to whole blocks."""
        return -((self.first - self.prompt_length - self.gen_length) // self.block_length)

    @property
    def length(self) -> int:
        """Positions of the whole sequence."""
        return self.first + self.blocks * self.block_length

    def span(self, block: int) -> range:
        """Positions of a decoded block."""
        start = self.first + block * self.block_length
        return range(start, start + self.block_length)

    def masked(self, cursor: Cursor, mask_token_id: int) -> Tensor:
        """Masked positions of the cursor's block, int64 [M]; prompt tokens never count."""
        span = self.span(cursor.block)
        start = max(span.start, self.prompt_length)
        return (cursor.ids[start : span.stop] == mask_token_id).nonzero()[:, 0] + start

    def start(self, prompt: Tensor, mask_token_id: int) -> Cursor:
        """The state that decoding starts from: the prompt (int64 [prompt]), then masks."""
        ids = prompt.new_full((self.length,), mask_token_id)
        ids[: self.prompt_length] = prompt
        return Cursor(ids)


@dataclass(frozen=True)
class Cursor:
    """A state of the sequence and how far decoding has come.

    Attributes
    ----------
    ids
        int64 [length]: prompt, committed tokens, masks.
    block, block_step, step
        The block being decoded; denoising steps made in it, and since the start.
    finished
        Whether nothing is left to decode.
    """

    ids: Tensor
    block: int = 0
    block_step: int = 0
    step: int = 0
    finished: bool = False
