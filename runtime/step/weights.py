"""What tokens are drawn by at temperatures above 0: weights, tempered and filtered.

A function of each row alone, without a question to the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128  # tokens of the vocabulary
_FEW = 1024  # largest weights among which `top_p` mostly ends


def weights_of(
    log_p: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Weights of softmax(log_p / temperature), filtered: float64 [M, vocab], in whole groups.

    Of log_p float64 [M, vocab]. The vocabulary is filled up with weights of 0, and what is filtered
    out has none either.

    Parameters
    ----------
    top_k, top_p
        Only so many of the largest weights are left; of these, the fewest of the largest ones that
        make up such a share of their sum. Equals are left in the order of their ids.
    """
    weights = (log_p - log_p.amax(-1, keepdim=True)).div_(temperature).exp_()
    if weights.shape[1] % GROUP:
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % GROUP))
    if top_k is None and top_p is None:
        return weights
    least, number = _cut(weights, top_k, top_p)
    above, equal = weights > least, weights == least
    left = number - above.sum(-1, keepdim=True)
    kept = above.logical_or_(equal.logical_and_(equal.cumsum(-1) <= left))
    return weights.mul_(kept)


def total(weights: Tensor) -> Tensor:
    """The sum of each row, [M, 1]; by groups, so that it does not depend on the other rows."""
    groups = weights.shape[1] // GROUP
    return weights.view(len(weights), groups, GROUP).sum(-1).sum(-1, keepdim=True)


def _cut(weights: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """The smallest weight that is left in each row, and how many are: [M, 1] each."""
    vocab = weights.shape[1]
    if top_k is not None:
        largest = weights.topk(min(top_k, vocab), -1).values
        if top_p is None:
            number = torch.full_like(largest[:, :1], largest.shape[1], dtype=torch.int64)
        else:
            sums = largest.cumsum(-1)
            number = _reaching(sums, top_p * sums[:, -1:])
        return largest.gather(1, number - 1), number
    assert top_p is not None
    share = top_p * total(weights)
    if weights.is_cpu and vocab > _FEW:  # where a look is for free, rows are seldom sorted
        largest = weights.topk(_FEW, -1).values
        sums = largest.cumsum(-1)
        if bool((sums[:, -1:] >= share).all()):
            number = _reaching(sums, share)
            return largest.gather(1, number - 1), number
    largest = weights.sort(-1, descending=True).values
    number = _reaching(largest.cumsum(-1), share)
    return largest.gather(1, number - 1), number


def _reaching(sums: Tensor, share: Tensor) -> Tensor:
    """How many weights it takes for their sums [M, k] to reach the share [M, 1]: int64 [M, 1]."""
    return 1 + (sums[:, :-1] < share).sum(-1, keepdim=True)
