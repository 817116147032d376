"""Which tokens of a batch are masked, and what each is worth in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from corpus import EOS_ID, MASK_ID, Bucket, Example
from tokenizers import Tokenizer
from torch import Tensor

from spiffy.calib.synthetic import CONTAINERS, PEOPLE, THINGS


@dataclass(frozen=True, slots=True)
class Batch:
    """Masked inputs; for the positions in the window their index, target and loss weight.

    `current` marks those a decoder could be about to fill: masked, and not in a later block.
    """

    inputs: Tensor
    wanted: Tensor
    targets: Tensor
    weights: Tensor
    current: Tensor


BLOCK_LENGTHS, BLOCK_ODDS = (32, 16, 8), (0.7, 0.15, 0.15)
NEAR_PADDING, FAR_PADDING = 0.3, 0.05
"""Loss weights of EOS padding in the block where the answer ends, and beyond it."""
LATER_BLOCKS = 0.2
"""Loss weight of positions after the current block, which decoding does not read."""
SMALLEST_RATIO = 0.04


def mask_batch(bucket: Bucket, examples: Sequence[Example], generator: torch.Generator) -> Batch:
    """Mask answers the two ways a decoder meets them, half of the examples each.

    Whole: every answer token is masked with probability t, weighted 1/t (LLaDA's objective).
    Blockwise: the blocks before a chosen one are clean, it is masked with probability t, all after
    it is masked. t is stratified over the batch, which lowers the variance of the loss.
    """
    batch, length = len(examples), bucket.length
    ids = padded(bucket, examples)
    starts = torch.tensor([len(prompt) for prompt, _ in examples]).unsqueeze(1)
    sizes = torch.tensor([len(answer) for _, answer in examples]).unsqueeze(1)
    offsets = torch.arange(length) - starts  # position inside the answer

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ranks = torch.randperm(batch, generator=generator).unsqueeze(1)
    ratio = SMALLEST_RATIO + (1 - SMALLEST_RATIO) * (ranks + uniform(batch, 1)) / batch
    blockwise = uniform(batch, 1) < 0.5
    odds = torch.tensor(BLOCK_ODDS).expand(batch, -1)
    block = torch.tensor(BLOCK_LENGTHS)[torch.multinomial(odds, 1, generator=generator)]
    last = (sizes - 1) // block  # the block in which the answer ends
    first = (uniform(batch, 1) * (last + 1)).long() * block
    begin = torch.where(blockwise, first, 0)
    end = torch.where(blockwise, first + block, length)

    current = (offsets >= begin) & (offsets < end)
    later = offsets >= end
    masked = later | (current & (uniform(batch, length) < ratio))
    weights = (masked & current) / ratio + LATER_BLOCKS * later
    weights = torch.where(offsets >= sizes, weights * NEAR_PADDING, weights)
    far = offsets >= (last + 1) * block
    weights = torch.where(far, weights * FAR_PADDING / NEAR_PADDING, weights)

    wanted = starts + torch.arange(bucket.window)
    inside = wanted < length
    wanted = wanted.clamp(max=length - 1)
    inputs = ids.masked_fill(masked, MASK_ID)
    scored = weights.gather(1, wanted) * inside
    # A row that shows only its current block should not count for less than a whole answer.
    scored = scored / torch.minimum(end - begin, sizes).clamp(min=8)
    open_now = (masked & current).gather(1, wanted) & inside
    return Batch(inputs, wanted, ids.gather(1, wanted), scored / batch, open_now)


def mask_results(bucket: Bucket, examples: Sequence[Example], marks: Tensor) -> Batch:
    """Mask the results of a drill: the numbers after one of `marks`."""
    ids = padded(bucket, examples)
    masked = torch.isin(ids.roll(1, dims=1), marks)
    wanted = torch.arange(bucket.window).expand(len(examples), -1)
    weights = masked / masked.sum()
    return Batch(ids.masked_fill(masked, MASK_ID), wanted, ids, weights, masked)


def mask_names(
    bucket: Bucket, examples: Sequence[Example], names: Tensor, generator: torch.Generator
) -> Batch:
    """Mask an answer's `names`, and in half of the rows everything from a random token on.

    An answer has one or two names among forty tokens, so without help the network learns late to
    look up who the story is about; a wrong name costs it no exact answer, but reads badly.
    """
    ids = padded(bucket, examples)
    starts = torch.tensor([[len(prompt)] for prompt, _ in examples])
    sizes = torch.tensor([[len(answer)] for _, answer in examples])
    offsets = torch.arange(bucket.length) - starts
    share = (2 * torch.rand(len(examples), 1, generator=generator)).clamp(max=1)
    cut = torch.where(share < 1, (share * sizes).long(), bucket.length)
    scored = torch.isin(ids, names) & (offsets >= 0) & (offsets < cut)
    wanted = (starts + torch.arange(bucket.window)).clamp(max=bucket.length - 1)
    inputs = ids.masked_fill(scored | (offsets >= cut), MASK_ID)
    current = scored.gather(1, wanted)
    weights = current / current.sum().clamp(min=1)
    return Batch(inputs, wanted, ids.gather(1, wanted), weights, current)


def name_tokens(tokenizer: Tokenizer) -> Tensor:
    """Return the tokens of names, pronouns, things and containers that are one token long."""
    words = [word for pair in PEOPLE for word in pair] + [*THINGS, *CONTAINERS]
    words += [word.capitalize() for _, word in PEOPLE]
    encoded = [tokenizer.encode(space + word).ids for word in words for space in ("", " ")]
    return torch.tensor(sorted({ids[0] for ids in encoded if len(ids) == 1}))


def padded(bucket: Bucket, examples: Sequence[Example]) -> Tensor:
    """Return prompts and answers, filled up with EOS: int64 [examples, bucket.length]."""
    ids = torch.full((len(examples), bucket.length), EOS_ID)
    for row, (prompt, answer) in enumerate(examples):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return ids


def result_marks(tokenizer: Tokenizer) -> Tensor:
    """Return the tokens that a result follows: `=` and `>>` (after `=`, also the annotation)."""
    return torch.tensor([tokenizer.token_to_id(token) for token in ("=", ">>")])
