"""What a denoising step, and the choice of drafts, have to know of a distribution: on the host.

Where the distribution lies there, it is looked at as needed (`Reading.of`). Any other device works
out all of it as one table of numbers (`Rules.table`), which comes over in one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.step.policy import Distribution, choose, likeliest_ids
from spiffy.schemas import DecodingSettings

_AT_ONCE = 1 << 25  # log-probabilities that a table is worked out from: 256 MB
_ON_HOST = 1 << 19  # and on the host: 4 MB, which its caches hold
FIRST = 4  # columns before those of the likeliest tokens


@dataclass(frozen=True)
class Rules:
    """How a distribution is read.

    Attributes
    ----------
    settings, mask_token_id, scores_drawn
        As `choose` takes them.
    ranks
        How many of each position's likeliest tokens are wanted.
    """

    settings: DecodingSettings
    mask_token_id: int
    ranks: int
    scores_drawn: bool = False

    def choose(self, distribution: Distribution, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and scores by these rules: `choose`."""
        return choose(distribution, self.settings, self.mask_token_id, keys, self.scores_drawn)

    def table(self, logits: Tensor, keys: Tensor | None = None) -> Tensor:
        """Read logits [M, vocab] on their device, without a question to it; `keys` as in `choose`.

        Returns
        -------
        int64 [M, C]: chosen token; by their bits float64 score and logarithm of all tokens' weights
        (the exponentiated logits); whether the row is no number; the likeliest tokens, fewer than
        `ranks` in a small vocabulary; by their bits float64 log-probabilities of those.
        """
        # Sorting takes room for as much again, and for what is sorted.
        most = _AT_ONCE // (4 if self.settings.top_p is not None else 1)
        rows = max(1, most // logits.shape[1])
        parts = torch.split(logits, rows)
        own = [None] * len(parts) if keys is None else torch.split(keys, rows)
        return torch.cat([self._table(*pair) for pair in zip(parts, own, strict=True)])

    def _table(self, logits: Tensor, keys: Tensor | None) -> Tensor:
        distribution = Distribution.of(logits)
        tokens, score = self.choose(distribution, keys)
        broken = distribution.no_number[:, None]
        columns = [tokens[:, None], _bits(score[:, None])]
        columns += [_bits(_log_total(distribution, tokens)), broken.long()]
        if self.ranks:
            log_p, ids = distribution.top(self.ranks)
            columns += [ids, _bits(log_p)]
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class Reading:
    """What is known of M positions of one state.

    Attributes
    ----------
    positions
        int64 [M], ascending positions in the sequence.
    tokens, score
        int64 and float64 [M], as `choose` chooses.
    is_number
        Whether the model computed numbers.
    top
        From a number to that many likeliest tokens of each position, as `Distribution.top`.
    """

    positions: Tensor
    tokens: Tensor
    score: Tensor
    is_number: bool
    top: Callable[[int], tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls, logits: Tensor, positions: Tensor, rules: Rules, keys: Tensor | None = None
    ) -> Reading:
        """Read logits [M, vocab] of these positions (int64 [M]) that lie on the host.

        Log-probabilities of a block and a large vocabulary are more than the caches hold: they are
        worked out a few rows at a time, and kept where they are few.
        """
        rows = max(1, _ON_HOST // logits.shape[1])
        parts = torch.split(logits, rows)
        own = [None] * len(parts) if keys is None else torch.split(keys, rows)
        chosen, totals, is_number = [], [], True
        for part, mine in zip(parts, own, strict=True):
            distribution = Distribution.of(part)
            chosen.append(rules.choose(distribution, mine))
            is_number &= not bool(distribution.no_number.any())
            if len(parts) > 1:
                totals.append(_log_total(distribution, chosen[-1][0]))
        if len(parts) == 1:
            return cls(positions, *chosen[0], is_number, distribution.top)
        log_total = torch.cat(totals)

        def top(count: int) -> tuple[Tensor, Tensor]:
            ids = likeliest_ids(logits, count)
            return logits.gather(1, ids).double() - log_total, ids

        tokens, score = map(torch.cat, zip(*chosen, strict=True))
        return cls(positions, tokens, score, is_number, top)


def _log_total(distribution: Distribution, tokens: Tensor) -> Tensor:
    """The logarithm of all tokens' weights, float64 [M, 1]; by one of them (int64 [M])."""
    chosen = tokens[:, None]
    logits = distribution.logits.gather(1, chosen).double()
    return logits - distribution.log_p.gather(1, chosen)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int64)


def ids_of(table: Tensor) -> Tensor:
    """The likeliest tokens that a table (int64 [M, C]) has, int64 [M, J]."""
    return table[:, FIRST:].chunk(2, 1)[0]


def likeliest(table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` of them and their log-probabilities, which come first; on the host."""
    numbers = table.numpy()[:, FIRST:]
    ranks = numbers.shape[1] // 2
    ids, bits = numbers[:, : min(count, ranks)], numbers[:, ranks : ranks + count]
    return torch.from_numpy(bits.view(np.float64)), torch.from_numpy(ids)


def log_total(table: Tensor) -> NDArray[np.float64]:
    """The logarithm of all tokens' weights from a table on the host (int64 [M, C]), [M]."""
    total: NDArray[np.float64] = table.numpy()[:, 2].view(np.float64)
    return total


def is_number(table: Tensor) -> bool:
    """Whether the model computed numbers, by a table on the host (int64 [M, C])."""
    return not any(table.numpy()[:, 3].tolist())


def reading_of(
    table: Tensor, positions: Tensor, top: Callable[[int], tuple[Tensor, Tensor]]
) -> Reading:
    """The reading of positions (int64 [M]) from a table on the host (int64 [M, C])."""
    tokens, score, *_ = table.numpy().T
    score = torch.from_numpy(score.view(np.float64))
    return Reading(positions, torch.from_numpy(tokens), score, is_number(table), top)
