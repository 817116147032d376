"""Training an order network on recorded plain decodes, those that calibration records.

Recorded with as many tokens as the network reads (`Recorder(RANKS)`). The network sees a root by
the distribution before it, some of the true states that followed filled in as drafts, and learns
which position, with which token, came next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from spiffy.bench.order import OrderNetwork, OrderShape, drafted, scene_of
from spiffy.calib.record import Trace
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.schemas import SpiffyError

_DEPTH = 12  # steps ahead that are learned from
_DECAY = 0.7  # deeper states are drawn less often, because fewer walks get there
_BATCH = 64
_RATE = 1e-3
_WARM_UP = 100  # steps
_CHECKED = 8192  # roots at most that say when to stop


@dataclass(frozen=True)
class Training:
    """How long to train.

    Attributes
    ----------
    epochs
        At most; the learning rate falls to 0 over so many.
    patience
        Epochs without a better one on the prompts kept out, after which it stops.
    """

    epochs: int = 10
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What came of a training.

    Attributes
    ----------
    prompts, checked_prompts
        Trained on, and stopped by.
    roots
        Trained on; each once in an epoch, with drafts of a depth drawn anew.
    losses
        On the prompts kept out, by epoch.
    best
        Number of the epoch that was kept, from 1 on.
    accuracy
        Share of roots kept out of which the next position was the best-scored one.
    by_confidence
        The same of the most confident position.
    """

    prompts: int
    checked_prompts: int
    roots: int
    losses: tuple[float, ...]
    best: int
    seconds: float
    accuracy: float
    by_confidence: float


@dataclass(frozen=True)
class Examples:
    """Roots, and what was filled in after each; of tensors [n, ...] see `Scene`.

    Attributes
    ----------
    places, ranks
        int64 [n, D] place in the block and token rank of each of the next steps; -1 where the
        block ends, or no draft can say what came.
    """

    seen: Tensor
    masked: Tensor
    log_p: Tensor
    places: Tensor
    ranks: Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def some(self, which: Tensor) -> Examples:
        """Those with numbers `which` (int64 [k])."""
        return Examples(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def examples_of(traces: Iterable[Trace], shape: OrderShape, mask_token_id: int) -> Examples:
    """Every root that a step of one position follows.

    Raises
    ------
    SpiffyError
        If there is none.
    """
    rows = [row for trace in traces for row in _rows(trace, shape, mask_token_id)]
    if not rows:
        raise SpiffyError("no decode to train an order network on: record more prompts")
    return Examples(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _rows(
    trace: Trace, shape: OrderShape, mask_token_id: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    for step, root in enumerate(trace.roots):
        if root is None or not len(root.candidates.positions):
            continue
        scene = scene_of(trace.path[step], root.candidates, shape, mask_token_id)
        places, ranks = torch.full((2, _DEPTH), -1)
        states = [cursor.ids for cursor in trace.path[step : step + _DEPTH + 1]]
        for k, (before, after) in enumerate(pairwise(states)):
            (new,) = (before != after).nonzero(as_tuple=True)
            place = int(new[0]) - scene.start if len(new) == 1 else -1
            if not 0 <= place < shape.block_length or not scene.masked[place]:
                break
            same = (scene.tokens[place] == after[new[0]]).nonzero()[:, 0]
            places[k], ranks[k] = place, int(same[0]) if len(same) else TOKEN_RANKS
            if not len(same):
                break  # a target, but no draft
        if places[0] >= 0:
            yield scene.seen, scene.masked, scene.log_p, places, ranks


def losses(network: OrderNetwork, examples: Examples, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Losses float32 [n] of roots that lie `depth` (int64 [n]) true steps back, and scores [n, B].

    The logarithm of the probability that the network gives to the next position and its token.
    """
    n, size = examples.masked.shape
    rows, steps = torch.arange(n), torch.arange(examples.places.shape[1])
    known = steps < depth[:, None]
    at = examples.places.where(known, size)  # a column too many, for what is not filled in
    choice = torch.full((n, size + 1), -1).scatter(1, at, examples.ranks)[:, :size]
    when = torch.zeros((n, size + 1), dtype=torch.int64).scatter(1, at, (steps + 1).expand(n, -1))
    draft = drafted(choice, when[:, :size], examples.log_p)
    score, tokens = network(examples.seen, draft, examples.log_p)
    score = score.masked_fill(~examples.masked | (choice >= 0), -torch.inf)
    place, rank = examples.places[rows, depth], examples.ranks[rows, depth]
    loss = functional.cross_entropy(score, place, reduction="none")
    return loss + functional.nll_loss(tokens[rows, place], rank, reduction="none"), score


def train(
    growing: Sequence[Trace],
    held_out: Sequence[Trace],
    shape: OrderShape,
    mask_token_id: int,
    training: Training = Training(),
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[OrderNetwork, Report]:
    """Train on some prompts, and stop by others; the same bits from the same seed on one thread.

    `on_batch` is called after every batch with how many are done, and how many there are at most.

    Raises
    ------
    SpiffyError
        If there is nothing to train on or to stop by.
    """
    started = perf_counter()
    examples = examples_of(growing, shape, mask_token_id)
    checked = examples_of(held_out, shape, mask_token_id)
    drawn = torch.Generator().manual_seed(training.seed)
    if len(checked) > _CHECKED:
        checked = checked.some(torch.randperm(len(checked), generator=drawn)[:_CHECKED])
    depth = _depths(checked, drawn)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = OrderNetwork(shape)
    optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=0.01)
    batches = -(-len(examples) // _BATCH)
    total = batches * training.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 - step / total)
    )
    found: list[float] = []
    kept = network.state_dict()
    for epoch in range(training.epochs):
        network.train()
        order = torch.randperm(len(examples), generator=drawn)
        depths = _depths(examples, drawn)
        for k, which in enumerate(torch.split(order, _BATCH)):
            each, _ = losses(network, examples.some(which), depths[which])
            optimizer.zero_grad()
            each.mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            on_batch(epoch * batches + k + 1, total)
        loss, _ = _checked_losses(network, checked, depth)
        found.append(loss)
        if loss == min(found):
            kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        elif len(found) - found.index(min(found)) > training.patience:
            break
    network.load_state_dict(kept)
    _, accuracy = _checked_losses(network, checked, torch.zeros_like(depth))
    confident = checked.log_p[:, :, 0].masked_fill(~checked.masked, -torch.inf).argmax(1)
    report = Report(
        prompts=len(growing),
        checked_prompts=len(held_out),
        roots=len(examples),
        losses=tuple(found),
        best=found.index(min(found)) + 1,
        seconds=perf_counter() - started,
        accuracy=accuracy,
        by_confidence=float((confident == checked.places[:, 0]).float().mean()),
    )
    return network.eval(), report


def _depths(examples: Examples, drawn: torch.Generator) -> Tensor:
    """A depth for each root, int64 [n]: one that a true state is known for."""
    known = (examples.places >= 0).double()
    weights = known * _DECAY ** torch.arange(known.shape[1])
    return weights.multinomial(1, generator=drawn)[:, 0]


@torch.inference_mode()
def _checked_losses(
    network: OrderNetwork, examples: Examples, depth: Tensor
) -> tuple[float, float]:
    """Mean loss, and how often the next position is the best-scored one."""
    network.eval()
    loss = right = 0.0
    for which in torch.split(torch.arange(len(examples)), _BATCH):
        some = examples.some(which)
        each, score = losses(network, some, depth[which])
        loss += float(each.sum())
        target = some.places[torch.arange(len(some)), depth[which]]
        right += float((score.argmax(1) == target).sum())
    return loss / len(examples), right / len(examples)
