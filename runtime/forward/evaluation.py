"""What a forward says about the states that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.forward.readout import on_device
from spiffy.runtime.forward.request import Ints, Reader, ReadResults
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step.reading import Reading, Rules, likeliest, reading_of

Floats = NDArray[np.float64]


class Window(NamedTuple):
    """Where a forward tells about one state, for `length` positions from position `start` on.

    That is in a row's hidden states ([query, hidden]), from number `first` on.
    """

    row: Tensor
    first: int
    start: int
    length: int

    @property
    def hidden(self) -> Tensor:
        """Hidden states [length, hidden]."""
        return self.row[self.first : self.first + self.length]

    def covers(self, span: range) -> bool:
        """Whether it reaches over all positions of `span`."""
        return self.start <= span.start and span.stop <= self.start + self.length


@dataclass(frozen=True)
class Evaluation:
    """What a forward says about the root (state 0) and the drafts.

    Attributes
    ----------
    windows
        Where each state lies, the root first.
    reader
        How it is read.
    results
        What was read in the forward itself; of anything else logits are computed on demand.
    precomputed
        Positions and logits [M, vocab] by state, of those passed through the head beforehand.
    """

    model: DiffusionLM
    windows: Sequence[Window]
    reader: Reader
    results: ReadResults | None = None
    precomputed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def reading(self, state: int, positions: Tensor, keys: Tensor | None = None) -> Reading:
        """What is known of a state's positions (int64 [M], ascending).

        Parameters
        ----------
        keys
            int64 [M] on the host, see `choose`; without, it does not matter which tokens are drawn.
        """
        rules = self.reader.rules
        table = None
        if self.results is not None:
            wanted = None if keys is None else keys.numpy()
            table = self.results.table_rows(state, positions.numpy(), wanted)
        if table is None and self.reader.on_host:
            return Reading.of(self.logits(state, positions).cpu(), positions, rules, keys)
        if table is None:
            table = self._table(rules, state, positions, keys)

        def top(count: int) -> tuple[Tensor, Tensor]:
            known = table
            if rules.ranks < min(count, self.model.vocab_size):  # nobody said that so many matter
                known = self._table(replace(rules, ranks=count), state, positions)
            return likeliest(known, count)

        return reading_of(table, positions, top)

    def knows_root(self) -> bool:
        """Whether the model computed numbers for the root, as far as they are at hand."""
        if self.results is not None:
            return self.results.is_number(0)
        return bool(self.windows[0].hidden.isfinite().all())

    def logits(self, state: int, positions: Tensor) -> Tensor:
        """Logits [M, vocab] of a state's positions (int64 [M])."""
        known = self.precomputed.get(state)
        if known is not None and torch.equal(known[0], positions):
            return known[1]
        return self.model.head(self._hidden(state, positions))

    def precompute(self, wanted: Mapping[int, Tensor]) -> None:
        """Pass several states through the output head at once, because the walk may come to them.

        Reading a large head costs more than multiplying a few rows more with it.

        Parameters
        ----------
        wanted
            Masked positions (int64 [M]) by state.
        """
        hidden = [self._hidden(state, positions) for state, positions in wanted.items()]
        logits = torch.split(self.model.head(torch.cat(hidden)), [len(part) for part in hidden])
        for (state, positions), part in zip(wanted.items(), logits, strict=True):
            self.precomputed[state] = positions, part

    def cross_logits(
        self,
        source: int,
        states: Ints,
        positions: Tensor,
        tokens: Tensor,
        log_p: Floats,
        gather: Callable[..., Floats],
    ) -> tuple[Floats, Floats] | None:
        """What other states say about tokens that are likely at state `source`.

        Parameters
        ----------
        states
            [R] states that hold all that `source` does.
        positions, tokens, log_p
            int64 [M], masked at `source`; int64 [M, J], and their log-probabilities there.
        gather
            `Search.cross_logits_of`, for what was read in the forward itself.

        Returns
        -------
        (log_total [M], logits [R, M, J]): the logarithm of all tokens' weights (the exponentiated
        logits) at `source`; what the states say, any numbers where they are not masked. None if the
        head cannot be read for single tokens (`DiffusionLM.head_of`).
        """
        if self.results is not None:
            where, which = positions.numpy(), tokens.numpy()
            return self.results.cross_logits(source, states, where, which, gather)
        windows = [self.windows[state] for state in (source, *states.tolist())]
        rows = [self.model.rows_of(positions, window.start) for window in windows]
        *at, tokens = on_device((*rows, tokens), self.model.device)
        hidden = [window.hidden[mine] for window, mine in zip(windows, at, strict=True)]
        logits = self.model.head_of(torch.stack(hidden), tokens)
        if logits is None:
            return None
        known, *others = logits.cpu().double().numpy()
        return known[:, 0] - log_p[:, 0], np.stack(others)

    def _hidden(self, state: int, positions: Tensor) -> Tensor:
        """Hidden states [M, hidden] that speak of positions."""
        window = self.windows[state]
        return window.hidden[self.model.rows_of(positions, window.start)]

    def _table(
        self, rules: Rules, state: int, positions: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """What the device reads, see `Rules.table`."""
        window = self.windows[state]
        parts = [self.model.rows_of(positions, window.start)]
        at, *own = on_device(parts if keys is None else [*parts, keys], self.model.device)
        logits = self.model.head(window.hidden.index_select(0, at))
        return rules.table(logits, *own).cpu()
