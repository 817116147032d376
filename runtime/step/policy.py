"""Unmasking policies: which masked positions of the block a denoising step commits, and to what.

Everything here is a pure function of logits, step counters and keys of noise. Speculation calls the
same functions on the logits of draft states, which is all that losslessness rests on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.step.noise import draw
from spiffy.runtime.step.own_policy import own_score
from spiffy.runtime.step.weights import total, weights_of
from spiffy.schemas import DecodingSettings

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_EPS = 1e-3  # Dream's smallest timestep
_GROUP = 64  # tokens of the vocabulary that `likeliest_ids` compares at once
_FEW = 1 << 18  # logits that are sorted sooner than grouped


@dataclass(frozen=True)
class Distribution:
    """What the model says about M masked positions, on the device that computed it.

    Attributes
    ----------
    logits
        [M, vocab] in the model's dtype: in the order of `log_p`, and less memory to pass over.
    log_p
        float64 [M, vocab], log-softmax of the logits; float32 saturates to 1.0 on trained models,
        which would turn the order of confident positions into a matter of ties.
    """

    logits: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Distribution:
        """Normalise logits [M, vocab] of any float dtype."""
        return cls(logits, logits.double().log_softmax(-1))

    @property
    def no_number(self) -> Tensor:
        """Where a logit was NaN or +inf, bool [M]: that makes the row NaN, so one column tells."""
        return self.log_p[:, 0].isnan()

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` most likely tokens: log-probabilities float64 and ids int64, [M, <= count].

        Equals come in any order.
        """
        ids = likeliest_ids(self.logits, count)
        return self.log_p.gather(1, ids), ids


def likeliest_ids(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits of each row ([M, vocab]): int64 [M, <= count].

    Equals come in any order. Many logits are looked at in groups: the best tokens lie in the groups
    with the best maxima, and only those are sorted.
    """
    rows, vocab = logits.shape
    groups = vocab // _GROUP
    if groups <= 8 * count or logits.numel() <= _FEW:
        return logits.topk(min(count, vocab), dim=-1).indices
    grouped = logits[:, : groups * _GROUP].reshape(rows, groups, _GROUP)
    best = grouped.amax(-1).topk(count, dim=-1).indices
    ids = (best[:, :, None] * _GROUP + torch.arange(_GROUP, device=best.device)).flatten(1)
    if vocab % _GROUP:
        rest = torch.arange(groups * _GROUP, vocab, device=best.device).expand(rows, -1)
        ids = torch.cat((ids, rest), 1)
    return ids.gather(1, logits.gather(1, ids).topk(count, dim=-1).indices)


def choose(
    distribution: Distribution,
    settings: DecodingSettings,
    mask_token_id: int,
    keys: Tensor | None = None,
    scores_drawn: bool = False,
) -> tuple[Tensor, Tensor]:
    """Token (int64 [M]) and score (float64 [M], higher is committed earlier) of every position.

    Parameters
    ----------
    keys
        int64 [M], see `Noise.keys`; needed if the temperature is above 0. The token is drawn from
        the tempered softmax, filtered by `top_k` and `top_p`.
    scores_drawn
        Scores of drawn tokens come from the distribution that they are drawn from, and not from the
        model's own (`Family.scores_drawn`).

    Notes
    -----
    Equals go to the lower token id. The mask token is never chosen: it would leave the
    position masked and the block could not finish.
    """
    log_p = distribution.log_p
    # Put out of sight and back: no copy of rows as wide as the vocabulary, no question to a device.
    masking = log_p[:, mask_token_id]
    seen = masking.clone()
    masking.fill_(-torch.inf)
    if keys is None:
        weights = None
        tokens = log_p.max(-1).indices  # the first maximum, as `argmax`, but several times faster
    else:
        weights = weights_of(log_p, settings.temperature, settings.top_k, settings.top_p)
        tokens = draw(weights, keys)
    masking.copy_(seen)
    if settings.own_policy:
        return tokens, own_score(settings.policy, log_p, tokens)
    if settings.policy == "sequential":
        return tokens, torch.zeros_like(log_p[:, 0])  # ties go to the lower position
    bounded = settings.policy == "entropy-bounded"
    by_token = settings.score == "confidence" and not bounded
    if weights is not None and scores_drawn:
        p = weights.div_(total(weights))
        score = p.gather(1, tokens[:, None])[:, 0] if by_token else _score(p, settings)
    elif by_token:
        score = log_p.gather(1, tokens[:, None])[:, 0].exp()
    else:
        score = _score(log_p.exp(), settings)
    return tokens, score


def _score(p: Tensor, settings: DecodingSettings) -> Tensor:
    """Of probabilities [M, vocab] as a whole, whichever token is chosen."""
    if settings.policy == "entropy-bounded":
        entropy: Tensor = torch.special.entr(p).sum(-1)
        return -entropy
    if settings.score == "margin":
        top = p.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    return (p * (p + 1e-10).log()).sum(-1)


def select(
    score: Floats, quota: int, settings: DecodingSettings, strict: bool, free: Bools | None = None
) -> Bools:
    """Choose the positions to commit: bool [M].

    The `quota` best scores, ties to the lower position, of those that are `free` (bool [M];
    default: all). Threshold unmasking adds every position
    whose score exceeds the threshold (`strict`: SDAR) or reaches it (LLaDA, Dream). Entropy-bounded
    unmasking, whose scores are negative entropies, takes at least as many as keep the sum of their
    entropies, without the largest, within the bound: one always does (EB-sampler, arXiv
    2505.24857).
    """
    if free is not None:
        score = np.where(free, score, -np.inf)
    order = (-score).argsort(kind="stable")
    if settings.policy == "entropy-bounded":
        entropies = -score[order]
        with np.errstate(invalid="ignore"):  # those that are not free have infinite ones
            before = entropies.cumsum() - entropies  # the sum of all before each
        quota = max(quota, int((before <= settings.entropy_bound).sum()))
    chosen = np.zeros(len(score), dtype=np.bool_)
    chosen[order[:quota]] = True
    if settings.policy in ("threshold", "joint"):
        tau = settings.threshold
        chosen |= (score > tau) if strict else (score >= tau)
    return chosen


def replaced(tokens: Ints, score: Floats, committed: Ints, settings: DecodingSettings) -> Bools:
    """Choose the committed tokens (int64 [M]) to replace by others: bool [M].

    Joint unmasking and editing (LLaDA2.1): where the model's token is another one, with a
    confidence above `edit_threshold`.
    """
    others: Bools = (tokens != committed) & (score > settings.edit_threshold)
    return others


def step_quota(
    settings: DecodingSettings, block_step: int, masked: int, shared: int | None = None
) -> int:
    """How many tokens step `block_step` (0-based) of a block commits, with `masked` left.

    With `steps_per_block`, "even" gives the remainder to the first steps (LLaDA's and SDAR's
    `get_num_transfer_tokens`; 8 in 3 steps: 3, 3, 2) and "timestep" is Dream's truncated share of
    the masks left, the last step taking the rest. A step may commit nothing (Dream). "round" is
    dllm's: masks left over steps left, rounded, without the steps that get none.

    `shared` is how many tokens "even" and "round" share out (default: the block's length).
    """
    steps, shared = settings.steps_per_block, shared or settings.block_length
    if steps is None:
        return min(settings.tokens_per_step, masked)
    if settings.schedule == "round":
        shares = _rounded_shares(shared, steps)
        return min(shares[block_step], masked) if block_step < len(shares) else masked
    if block_step >= steps - 1:
        return masked
    if settings.schedule == "even":
        base, remainder = divmod(shared, steps)
        return min(base + (block_step < remainder), masked)
    # By name: another thread that loads a model changes the default dtype meanwhile.
    times = torch.linspace(1, _EPS, steps + 1, dtype=torch.float32, device="cpu")
    share = 1 - times[block_step + 1] / times[block_step]
    return int(torch.tensor(float(masked), dtype=torch.float32, device="cpu") * share)


@cache
def _rounded_shares(tokens: int, steps: int) -> tuple[int, ...]:
    """Tokens of each step that has any; together they are all.

    With dllm's float32 of its timesteps, which decides what lies halfway between two numbers.
    """
    left = torch.arange(steps, -1, -1, device="cpu")
    masked = 1 - (1 - left.double().div(steps).float())
    shares = []
    for part in (1 - masked[1:] / masked[:-1]).tolist():
        shares.append(round(tokens * part))
        tokens -= shares[-1]
    return tuple(share for share in shares if share)
