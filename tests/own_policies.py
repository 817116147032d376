"""Unmasking policies that are not shipped, for tests: importing this registers them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from spiffy.runtime import Step, register_policy
from spiffy.runtime.step.own_policy import Bools


@dataclass
class Factor:
    """Fast-dLLM's factor rule (arXiv 2505.22618)."""

    factor: float

    def score(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        return log_p.gather(1, tokens[:, None])[:, 0].exp()

    def select(self, step: Step) -> Bools:
        order = (-step.score).argsort(kind="stable")
        n = np.arange(1, len(order) + 1)
        chosen = np.zeros(len(order), dtype=np.bool_)
        chosen[order[(n + 1) * (1 - step.score[order]) < self.factor]] = True
        return chosen


class Odd:
    """The least sure first; by a hash of all it is told: many, few, none, the worst scores."""

    def score(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        return -log_p.exp().square().sum(-1)

    def select(self, step: Step) -> Bools:
        hashed = 31 * step.positions + 7 * step.tokens + 5 * step.block_step + step.block
        kind = int(hashed.sum() + step.quota) % 3
        if kind == 0:
            return step.score <= np.median(step.score)
        return (hashed % 4 == 0) & (kind == 1)


factor, odd = Factor(1.5), Odd()
FACTOR, ODD = "own_policies:factor", "own_policies:odd"
register_policy(FACTOR, factor)
register_policy(ODD, odd)
