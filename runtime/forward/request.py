"""What is known of the states of a forward: read as the walk comes to them, or all of it at once.

On the CPU the output head is expensive and waiting for it is not, so it computes only the states
that the walk visits (`Evaluation.logits`). Any other device would be waited for at each of them, so
there all that the walk, and who drafts next, may need is planned beforehand (`ReadPlan`) and comes
back with the forward (`ReadResults`). Both give the same `Reading`s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.forward.pack import Row, RowOutput
from spiffy.runtime.forward.readout import RowRequest
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.runtime.step.noise import Noise, redraw
from spiffy.runtime.step.reading import FIRST, Rules, is_number, log_total
from spiffy.schemas import DecodingSettings

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_HOSTS = frozenset({"cpu", "mps"})  # of the latter logits are copied: it knows no float64

# Cross pairs of a forward; a GPU tells drafters nothing of those beyond, a CPU does. With the five
# likeliest tokens of each that is 0.6 MB to copy.
_MOST_PAIRS = 1 << 14


def reads_on_host(model: DiffusionLM) -> bool:
    """Whether distributions are read on the host."""
    return model.device.type in _HOSTS


class Place(NamedTuple):
    """Where a state lies in a forward: `length` positions of row `row`, from `first` on.

    In the sequence they start at `start`.
    """

    row: int
    first: int
    start: int
    length: int


@dataclass(frozen=True)
class Reader:
    """How one decode reads what the model says.

    Attributes
    ----------
    ranks
        How many likeliest tokens of a position whoever drafts may want; 0: nobody drafts.
    asks_rejected
        Whether whoever drafts wants to know what rejected drafts say.
    noise
        Of the decode, if its temperature is above 0.
    """

    model: DiffusionLM
    settings: DecodingSettings
    canvas: Canvas
    ranks: int
    asks_rejected: bool
    noise: Noise | None = None

    @cached_property
    def rules(self) -> Rules:
        """How a distribution is read."""
        model = self.model
        return Rules(self.settings, model.mask_token_id, self.ranks, model.family.scores_drawn)

    @cached_property
    def on_host(self) -> bool:
        """Whether distributions are read on the host, or all states in the forward itself."""
        return reads_on_host(self.model)

    def plan(self, root: Cursor, states: Tensor, places: Sequence[Place]) -> ReadPlan:
        """All that may be needed of the states (int64 [S, length]) of a forward.

        That is what a step looks at in the root's block, and the next block, which a draft or the
        step from it may come to, as far as the forward tells about it. Positions ascend by state.
        """
        canvas, mask = self.canvas, self.model.mask_token_id
        shift = self.model.family.logit_shift
        answer = canvas.answer(root.block)
        last = min(root.block + 1, canvas.blocks - 1)
        ids = states[:, answer.start : canvas.span(last).stop].numpy()
        size = len(answer)
        masked = ids == mask
        wanted = masked.copy()
        if self.settings.policy == "joint":
            wanted[:, :size] = True
        if not self.ranks:  # a plain walk ends with the block
            wanted[:, size:] = False
        # A state's place tells about its positions, and about `shift` more behind them.
        numbers = np.fromiter(chain.from_iterable(places), np.int64)
        row, first, start, length = numbers.reshape(-1, len(Place._fields)).T
        position = np.arange(answer.start, answer.start + ids.shape[1])
        behind = position - start[:, None]
        wanted &= (behind >= 0) & (behind - shift < length[:, None])
        state, at = wanted.nonzero()
        in_row = first[state] + np.maximum(behind[state, at] - shift, 0)
        number = np.full(wanted.shape, -1)
        number[state, at] = np.arange(len(state))
        rejected = slice(size if self.asks_rejected else 0)
        cross = _cross_pairs(ids[:, rejected], masked[:, rejected], number[:, rejected])
        position = position[at]
        keys = self._keys(root, masked, size, state, position)
        return ReadPlan(self.rules, state, position, keys, row[state], in_row, len(states), cross)

    def _keys(self, root: Cursor, masked: Bools, size: int, state: Ints, position: Ints) -> Ints:
        """Keys [K] of what a step from each state draws, in the root's block or the next one.

        Supposed that no step between the root and the state is one that `redraw` tells apart.

        Parameters
        ----------
        masked
            bool [S, k], of both blocks; the root's has `size` positions.
        state, position
            [K].
        """
        if self.noise is None:
            return np.zeros_like(position)
        keys = np.empty_like(position)
        new = position >= self.canvas.answer(root.block).stop
        for rows, block, again in (
            (~new, masked[:, :size], redraw(self.settings, root)),
            (new, masked[:, size:], 0),
        ):
            committed = torch.from_numpy((~block).sum(1)[state[rows]])
            at = torch.from_numpy(position[rows])
            keys[rows] = self.noise.keys(committed, again, at).numpy()
        return keys


def _cross_pairs(ids: Ints, masked: Bools, number: Ints) -> Ints:
    """Positions [2, T] by `number`: at a state and at one that extends it, masked at both.

    All arguments are [S, k]; `number` is negative where a position is not read.
    """
    if len(ids) < 2 or not ids.size:
        return np.empty((2, 0), np.int64)
    held, free = ids.T, masked.T  # positions first: NumPy is slow where the last axis is short
    extends = ((held[:, :, None] == held[:, None]) | free[:, :, None]).all(0)
    np.fill_diagonal(extends, False)
    of, by = extends.nonzero()
    wanted = masked & (number >= 0)
    pair, at = (index[:_MOST_PAIRS] for index in (wanted[of] & wanted[by]).nonzero())
    return np.array((number[of[pair], at], number[by[pair], at]))


@dataclass(frozen=True)
class ReadPlan:
    """Which positions of which states are read in a forward, ascending by state.

    Attributes
    ----------
    rules
        How they are read.
    state, position, keys
        int64 [K]; the last of their noise, any numbers at temperature 0.
    row, in_row
        int64 [K], where in the forward.
    states
        Number of states.
    cross_pairs
        int64 [2, T] by number of the position (0 to K - 1), see `RowRequest`.
    """

    rules: Rules
    state: Ints
    position: Ints
    keys: Ints
    row: Ints
    in_row: Ints
    states: int
    cross_pairs: Ints

    def attach(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with its `RowRequest`.

        Cross pairs span rows, so the first row carries them all.
        """
        edges = self.row.searchsorted(np.arange(len(rows) + 1))
        found = []
        for k, row in enumerate(rows):
            mine = slice(edges[k], edges[k + 1])
            at, keys = torch.from_numpy(self.in_row[mine]), torch.from_numpy(self.keys[mine])
            cross_pairs = torch.from_numpy(self.cross_pairs if k == 0 else self.cross_pairs[:, :0])
            request = RowRequest(at, self.rules, keys, cross_pairs)
            found.append(replace(row, request=request))
        return found

    def collect(self, outputs: Sequence[RowOutput]) -> ReadResults:
        """What was read of those rows."""
        found = [output.readout for output in outputs if output.readout is not None]
        table = torch.cat([readout.table for readout in found])
        edges = self.state.searchsorted(np.arange(self.states + 1))
        return ReadResults(self, edges, table, found[0].cross_logits.numpy())


@dataclass(frozen=True)
class ReadResults:
    """What was read of a forward's states, on the host.

    Attributes
    ----------
    edges
        int64 [S + 1], where in the plan each state begins.
    table
        int64 [K, C], see `Rules.table`.
    by_pair
        float64 [T, J], see `Readout.cross_logits`.
    """

    plan: ReadPlan
    edges: Ints
    table: Tensor
    by_pair: Floats

    def table_rows(self, state: int, positions: Ints, keys: Ints | None = None) -> Tensor | None:
        """The table's rows about positions of a state; None unless all of them were read.

        And with those keys (int64 [M]) of noise, if it matters.
        """
        numbers = self._numbers(state, positions)
        if numbers is None or (keys is not None and (self.plan.keys[numbers] != keys).any()):
            return None
        return torch.from_numpy(self.table.numpy()[numbers])

    def is_number(self, state: int) -> bool:
        """Whether all that was read of a state are numbers."""
        return is_number(self.table[self.edges[state] : self.edges[state + 1]])

    def cross_logits(
        self,
        source: int,
        states: Ints,
        positions: Ints,
        tokens: Ints,
        gather: Callable[..., Floats],
    ) -> tuple[Floats, Floats] | None:
        """What states say of tokens that are likely at another; see `Evaluation.cross_logits`."""
        numbers = self._numbers(source, positions)
        if numbers is None:
            return None
        table, plan = self.table.numpy(), self.plan
        facts = (numbers, plan.cross_pairs, plan.state, self.by_pair, states, tokens)
        return log_total(self.table)[numbers], gather(table, FIRST, *facts)

    def _numbers(self, state: int, positions: Ints) -> Ints | None:
        """Where the table speaks of positions of a state; None unless of all of them."""
        known = self.plan.position[self.edges[state] : self.edges[state + 1]]
        at = known.searchsorted(positions)
        if not len(known) or (known.take(at, mode="clip") != positions).any():
            return None
        numbers: Ints = self.edges[state] + at
        return numbers
