"""Drafts chosen at run time: the states that the acceptance model finds most probable."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.draft.acceptance import TOKEN_RANKS, AcceptanceWeights
from spiffy.runtime.draft.candidates import Candidates
from spiffy.runtime.draft.ngrams import Floats
from spiffy.runtime.draft.outlook import Outlook
from spiffy.runtime.draft.search import fastest_search
from spiffy.runtime.step.canvas import Cursor


class Vocabulary(Protocol):
    """What choosing drafts by an acceptance model has to know of a model."""

    @property
    def mask_token_id(self) -> int:
        """Token id of the mask."""
        ...

    @property
    def eos_token_ids(self) -> Collection[int]:
        """Token ids that end an answer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        ...


class AcceptanceDrafter:
    """Drafts the states that an acceptance model finds most probable at the root at hand.

    Parameters
    ----------
    weights
        The acceptance model.
    budget
        Most drafts per forward.
    asks_rejected
        Whether rejected drafts are asked too.

    Attributes
    ----------
    cutoff
        How many of the drafts are worth their cost, from their probabilities (float64 [k],
        descending); all of them, unless somebody says otherwise.
    """

    token_ranks = TOKEN_RANKS

    def __init__(
        self,
        weights: AcceptanceWeights,
        budget: int,
        model: Vocabulary,
        asks_rejected: bool = True,
    ) -> None:
        self.weights = weights
        self.budget = budget
        self.cutoff: Callable[[Floats], int] = len
        self.asks_rejected = asks_rejected
        self.mask_token_id = model.mask_token_id
        self.eos_token_ids = np.array(sorted(model.eos_token_ids), dtype=np.int64)
        self.vocab_size = model.vocab_size
        self._search = fastest_search()
        self._prepared = self._search.prepare(weights)

    def outlook(self, root: Cursor, candidates: Candidates) -> Outlook:
        """Lay out the root for the acceptance model."""
        outlook: Outlook = self._laid_out(Outlook.at, root, candidates)
        return outlook

    def _laid_out(self, lay_out: Callable[..., Any], root: Cursor, candidates: Candidates) -> Any:
        return lay_out(
            root.ids.numpy(),
            candidates.positions.numpy(),
            candidates.tokens.numpy(),
            candidates.log_p.numpy(),
            candidates.fresh.numpy(),
            mask_token_id=self.mask_token_id,
            eos_token_ids=self.eos_token_ids,
            vocab=self.vocab_size,
            rejected=candidates.rejected,
        )

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        if not len(candidates.positions) or room < 1:
            return root.ids.new_empty((0, len(root.ids)))
        known = self._laid_out(self._search.lay_out, root, candidates)
        choice, p = self._search.expand(self._prepared, known, self.budget, room)
        drafts = (known.positions, known.tokens, choice[: self.cutoff(p)])
        return torch.from_numpy(self._search.fill_in(root.ids.numpy(), *drafts))
