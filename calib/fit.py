"""Fitting the acceptance model to recorded decodes (`spiffy.runtime.draft.acceptance`).

Both regressions are fitted to true states: at a state on the path of a recorded decode, which
position came next, and which of its likely tokens. The features are computed by the runtime's own
code. A bigram table that has seen the answer it is asked about would be trusted too much, so the
regressions see tables counted on other prompts (cross-fitting); the table that ships is counted on
all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from math import gcd

import numpy as np
from scipy.optimize import minimize

from spiffy.calib.record import Trace, spread
from spiffy.runtime.draft import AcceptanceDrafter, Vocabulary
from spiffy.runtime.draft.acceptance import (
    OFFSETS,
    POSITION_FEATURES,
    TOKEN_FEATURES,
    AcceptanceWeights,
)
from spiffy.runtime.draft.features import States, position_features, token_features
from spiffy.runtime.draft.ngrams import Bools, Floats, Ints
from spiffy.runtime.draft.outlook import Outlook, changed_beside
from spiffy.schemas import AcceptanceModel, DecodingSettings

FOLDS = 4
MAX_PAIRS = 4096  # bigrams that ship: at most some 60 kB of JSON
_MAX_STATES = 12_000  # states that the regressions look at, spread evenly
_MAX_PROMPTS = 256  # that these are taken from: laying out a root takes a millisecond
_DEPTH = 10
_RIDGE = 1e-3
_DECAY = 0.7  # deeper states count less: fewer walks get there
_TIGHT = {"ftol": 1e-13, "gtol": 1e-8, "maxiter": 2000}  # to more digits than are kept
_FEW = 200  # states below which a static graph is the safer choice


Pairs = Counter[tuple[int, int]]  # neighbouring tokens and how often


@dataclass(frozen=True)
class _Example:
    """One root and the true states after it that drafts can name.

    Attributes
    ----------
    choice
        int64 [n, M] token ranks filled in, the root itself first.
    following
        bool [n, M], positions that the next step commits.
    """

    prompt: int
    outlook: Outlook
    choice: Ints
    following: Bools

    @property
    def depth(self) -> Ints:
        """Denoising steps since the root, int64 [n]."""
        return np.arange(len(self.choice))


def can_fit(settings: DecodingSettings) -> bool:
    """Whether there is an acceptance model for this unmasking policy."""
    one = settings.tokens_per_step == 1 and settings.steps_per_block is None
    return _commits_sets(settings) or (settings.policy == "static" and one)


def _commits_sets(settings: DecodingSettings) -> bool:
    """Whether a step commits as many positions as it likes: as a policy that is not shipped may."""
    return settings.policy in ("threshold", "entropy-bounded", "joint") or settings.own_policy


def fit_acceptance(
    model: Vocabulary, settings: DecodingSettings, traces: Sequence[Trace]
) -> AcceptanceModel | None:
    """Fit to plain decodes; None if the policy has no such model or the data are too few."""
    if not can_fit(settings):
        return None
    # Only its `outlook` is used: it needs no coefficients.
    nothing = AcceptanceWeights.of({}, None, {"log_p": 1.0}, (), model.vocab_size)
    layout = AcceptanceDrafter(nothing, 0, model)
    # Twice over the traces instead of holding all examples of hundreds of prompts.
    shown = spread(len(traces), _MAX_PROMPTS)
    states = sum(len(example.choice) for example in _examples(traces, shown, layout))
    if states < _FEW:
        return None
    # Blocks that take a denoising step per position have so many roots, but with a cache none of
    # the first, about which nothing is known beforehand.
    roots = settings.block_length - (settings.cache != "none")
    stride = _out_of_step(-(-states // _MAX_STATES), roots)
    examples = list(islice(_examples(traces, shown, layout), 0, None, stride))
    pairs: list[Pairs] = [Counter() for _ in range(FOLDS)]
    for prompt, trace in enumerate(traces):
        pairs[prompt % FOLDS].update(_pairs(trace, model.mask_token_id))
    folds = []
    for fold in range(FOLDS):
        others = pairs[:fold] + pairs[fold + 1 :]  # of one prompt alone: none, so it counts nothing
        folds.append(replace(nothing, bigrams=_weights(others, model.vocab_size).bigrams))

    token = _fit_tokens(examples, folds)
    folds = [replace(weights, token=token) for weights in folds]
    position, commit = _fit_positions(examples, folds, _commits_sets(settings))
    return AcceptanceModel(
        position=dict(zip(POSITION_FEATURES, _rounded(position), strict=True)),
        commit=None
        if commit is None
        else dict(zip((*POSITION_FEATURES, "constant", "spread"), _rounded(commit), strict=True)),
        token=dict(zip(TOKEN_FEATURES, _rounded(token), strict=True)),
        bigrams=_most_common(pairs),
    )


def _out_of_step(least: int, period: int) -> int:
    """The first stride from `least` on that comes to every part of a period, if it goes on."""
    return next(stride for stride in count(least) if gcd(stride, max(period, 1)) == 1)


def _rounded(coefficients: Floats) -> list[float]:
    """Four digits: more would depend on how a machine, or a number of threads, rounds."""
    return [float(f"{value:.4g}") for value in coefficients]


def _unscaled(w: Floats, scale: Floats) -> Floats:
    """Coefficients of features from those of standardised ones, of which noise is left out."""
    coefficients: Floats = np.round(w, 3) / scale
    return coefficients


def _examples(
    traces: Sequence[Trace], shown: Iterable[int], layout: AcceptanceDrafter
) -> Iterator[_Example]:
    for prompt in shown:
        trace = traces[prompt]
        ids = [cursor.ids.cpu().numpy() for cursor in trace.path]
        for step, root in enumerate(trace.roots):
            if root is None or not len(root.candidates.positions):
                continue
            outlook = layout.outlook(trace.path[step], root.candidates)
            rows = np.arange(len(outlook.positions))
            at = [state[outlook.positions] for state in ids[step : step + _DEPTH + 1]]
            masked = [tokens == layout.mask_token_id for tokens in at]
            choice, following = [np.full(len(rows), -1, dtype=np.int64)], []
            for k in range(len(at) - 1):
                following.append(masked[k] & ~masked[k + 1])
                same = outlook.tokens == at[k + 1][:, None]
                filled = ~masked[k + 1]
                if not same[filled].any(-1).all() or filled.all() or k + 2 == len(at):
                    break
                choice.append(np.where(filled, same.argmax(-1), -1))
            keep = [k for k, new in enumerate(following) if new.any()]
            if keep:
                yield _Example(prompt, outlook, np.stack(choice)[keep], np.stack(following)[keep])


def _pairs(trace: Trace, mask_token_id: int) -> Pairs:
    """Neighbouring tokens of the answer."""
    ids = trace.path[-1].ids.tolist()
    answer = (trace.path[0].ids == mask_token_id).nonzero()[:, 0].tolist()
    shown = [k for k in answer if k > 0 and mask_token_id not in (ids[k - 1], ids[k])]
    return Counter((ids[k - 1], ids[k]) for k in shown)


def _most_common(pairs: Sequence[Pairs]) -> tuple[tuple[int, int, int], ...]:
    total: Pairs = Counter()
    for counts in pairs:
        total.update(counts)
    ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MAX_PAIRS]
    return tuple((left, right, count) for (left, right), count in ordered)


def _weights(pairs: Sequence[Pairs], vocab: int) -> AcceptanceWeights:
    return AcceptanceWeights.of({}, None, {}, _most_common(pairs), vocab)


def _fit_tokens(examples: Sequence[_Example], folds: Sequence[AcceptanceWeights]) -> Floats:
    """Softmax regression over the likely tokens of positions beside a new token."""
    features, targets = [], []
    for example in examples:
        weights = folds[example.prompt % FOLDS]
        shown = changed_beside(example.outlook, example.choice) & example.following
        # Where the token is known: the next state of the example has it.
        shown[-1] = False
        states = States.of(example.outlook, weights, example.choice, example.depth)
        at, m = shown.nonzero()
        after = example.choice[np.minimum(at + 1, len(example.choice) - 1), m]
        known = after >= 0
        at, m = at[known], m[known]
        if len(at):
            features.append(token_features(example.outlook, weights.bigrams, states, at, m))
            targets.append(after[known])
    identity = np.array([float(name == "log_p") for name in TOKEN_FEATURES])
    if sum(map(len, targets)) < _FEW:
        return identity
    x = np.concatenate(features, 1)
    width, count, ranks = x.shape
    starts = np.arange(count) * ranks
    targets = starts + np.concatenate(targets)
    return _fit_softmax(x.reshape(width, -1).T, starts, targets, np.ones(count))


def _fit_positions(
    examples: Sequence[_Example], folds: Sequence[AcceptanceWeights], sets: bool
) -> tuple[Floats, Floats | None]:
    """Softmax over positions (from steps that commit one), and the law of sets."""
    rows, sizes, single, chosen, weigh = [], [], [], [], []
    for example in examples:
        weights = folds[example.prompt % FOLDS]
        states = States.of(example.outlook, weights, example.choice, example.depth)
        features, masked = position_features(example.outlook, states)
        rows.append(features[:, masked].T)
        chosen.append(example.following[masked])
        sizes.append(masked.sum(1))
        single.append(example.following.sum(1) == 1)
        weigh.append(_DECAY**example.depth)
    x, y, size = np.concatenate(rows), np.concatenate(chosen), np.concatenate(sizes)
    weight = np.concatenate(weigh)
    one = np.concatenate(single)
    if one.sum() < _FEW:  # threshold unmasking that commits several nearly always
        position = np.array([float(name == "logit") for name in POSITION_FEATURES])
    else:
        alone = np.repeat(one, size)
        starts = np.cumsum(size[one]) - size[one]
        position = _fit_softmax(x[alone], starts, np.flatnonzero(y[alone]), weight[one])
    return position, _fit_sets(x, y, size, weight, x @ position) if sets else None


def _standardised(x: Floats) -> tuple[Floats, Floats, Floats]:
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    return (x - mean) / scale, mean, scale


def _fit_softmax(x: Floats, starts: Ints, targets: Ints, weight: Floats) -> Floats:
    """Coefficients of a conditional softmax over groups of rows (`starts`), one target row each."""
    z, _, scale = _standardised(x)
    sizes = np.diff(np.append(starts, len(x)))
    weight = weight / weight.sum()

    def loss(w: Floats) -> tuple[float, Floats]:
        score = z @ w
        top = np.maximum.reduceat(score, starts)
        e = np.exp(score - np.repeat(top, sizes))
        total = np.add.reduceat(e, starts)
        value = weight @ (np.log(total) + top - score[targets]) + _RIDGE * w @ w
        p = e * np.repeat(weight / total, sizes)
        slope = z.T @ p - weight @ z[targets] + 2 * _RIDGE * w
        return float(value), slope

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=_TIGHT)
    return _unscaled(found.x, scale)


def _fit_sets(x: Floats, y: Bools, size: Ints, weight: Floats, score: Floats) -> Floats:
    """Coefficients of the law that `expand` draws sets by, the constant and the spread last.

    A state has `size` rows of `x`, of which `y` says which are committed: each by its own log-odds
    plus an offset that they share, or, if none is, the one by a softmax over `score`.
    """
    z, mean, scale = _standardised(x)
    z = np.concatenate((z, np.ones((len(z), 1))), 1)
    starts = np.cumsum(size) - size
    sign = np.where(y, 1.0, -1.0)
    top = np.repeat(np.maximum.reduceat(score, starts), size)
    e = np.exp(score - top)
    log_one = score - top - np.repeat(np.log(np.add.reduceat(e, starts)), size)
    single = np.add.reduceat(y, starts, dtype=np.int64) == 1
    log_forced = np.where(single, np.add.reduceat(np.where(y, log_one, 0.0), starts), -np.inf)
    weight = weight / (weight @ size)

    def loss(w: Floats) -> tuple[float, Floats]:
        base, spread = z @ w[:-1], w[-1]
        log_p, pull = [], []  # of either way to each set, by offset; d log P / d log-odds
        for offset, share in OFFSETS:
            odds = base + spread * offset
            log_p.append(np.add.reduceat(-np.logaddexp(0, -sign * odds), starts) + np.log(share))
            pull.append((offset, sign * _sigmoid(-sign * odds)))
            none = np.add.reduceat(-np.logaddexp(0, odds), starts) + log_forced
            log_p.append(none + np.log(share))
            pull.append((offset, -_sigmoid(odds)))
        most = np.max(log_p, axis=0)
        p = np.exp(np.stack(log_p) - most)
        total = p.sum(0)
        value = -weight @ (np.log(total) + most) + _RIDGE * w[:-2] @ w[:-2]
        slope = np.zeros_like(w)
        for part, (offset, by_odds) in zip(p, pull, strict=True):
            rows = np.repeat(weight * part / total, size) * by_odds
            slope[:-1] -= z.T @ rows
            slope[-1] -= offset * rows.sum()
        slope[:-2] += 2 * _RIDGE * w[:-2]
        return float(value), slope

    # At 0 the spread would have no slope, because the offsets are symmetric.
    start = np.append(np.zeros(z.shape[1]), 0.5)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=_TIGHT)
    slopes = _unscaled(found.x[:-2], scale)
    return np.concatenate((slopes, [found.x[-2] - mean @ slopes, abs(found.x[-1])]))


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))
