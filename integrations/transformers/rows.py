"""The rows of a batch: their prompts, where their answers end, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)
from transformers.utils import ModelOutput

from spiffy.runtime.decode import Task, decoded
from spiffy.schemas import SpiffyError


@dataclass
class DraftedOutput(ModelOutput):  # type: ignore[misc]
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes
    ----------
    sequences
        int64 [batch, length]: prompts as they were given, answers, padding.
    tokens_per_forward
        float32 [batch]: tokens of each answer over its forwards.
    forwards, positions_computed, steps
        int64 [batch]: model forwards, positions that they ran, denoising steps.
    """

    sequences: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    forwards: Tensor | None = None
    positions_computed: Tensor | None = None
    steps: Tensor | None = None


def prompts_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Rows int64 [length] without their padding, which may be on the left only."""
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise SpiffyError(
            f"attention_mask of shape {[*attention_mask.shape]} does not fit input_ids of shape "
            f"{[*input_ids.shape]}"
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():  # isin takes no bool
        raise SpiffyError("attention_mask holds other values than 0 and 1")
    prompts = []
    for number, (ids, seen) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        kept = int(seen.sum())
        if not kept:
            raise SpiffyError(f"row {number}: its attention_mask leaves no token")
        if not seen[len(ids) - kept :].all():
            raise SpiffyError(
                f"row {number}: padding must be on the left: give the tokenizer padding_side='left'"
            )
        prompts.append(ids[len(ids) - kept :])
    return prompts


class Row:
    """A row of the batch: its task, and where its answer ends.

    Parameters
    ----------
    given
        int64 [length]: the row as it came, padding included, which criteria see too.
    longest
        Most tokens of the answer.
    asked
        Stopping criteria.
    """

    def __init__(self, task: Task, given: Tensor, longest: int, asked: Sequence[Any]) -> None:
        self.task = task
        self.given = given
        self.asked = asked
        self._seen = self._streamed = 0
        self._end, self._is_ended = longest, False
        if asked:
            task.until = self._ends

    def _ends(self, answer: list[int]) -> bool:
        """Whether a criterion ends the answer, asked for every token that is new."""
        answer = answer[: self._end]
        fresh = range(self._seen + 1, len(answer) + 1)
        self._seen = max(self._seen, len(answer))
        sequence = torch.cat([self.given, self.given.new_tensor(answer)])[None]
        before = sequence.shape[1] - len(answer)
        for count in fresh:
            # The time is asked for once a block, whose tokens are there by then.
            timed = count == len(answer)
            for criterion in self.asked:
                if isinstance(criterion, MaxTimeCriteria) and not timed:
                    continue
                if bool(torch.as_tensor(criterion(sequence[:, : before + count], None)).all()):
                    self._end, self._is_ended = count, True
                    return True
        return self._is_ended

    def answer(self) -> list[int]:
        """Ids of the answer in finished blocks, as far as it goes."""
        if not self.task.path:
            return []
        cursor = self.task.path[-1]
        ids = decoded(self.task, cursor.ids, self.task.canvas.span(cursor.block).start)
        if self.asked and cursor.finished:  # the last block's tokens were not asked about
            self._ends(ids)
        return ids[: self._end]

    def fresh(self) -> Iterator[list[int]]:
        """Tokens of the answer that came since the last call, if any."""
        ids = self.answer()
        if len(ids) > self._streamed:
            yield ids[self._streamed :]
            self._streamed = len(ids)


def asked_criteria(criteria: Sequence[Any], generation_config: Any) -> list[Any]:
    """Stopping criteria but those that transformers made of length and end tokens: we know them."""
    ends = getattr(generation_config, "_eos_token_tensor", None)

    def is_ours(criterion: Any) -> bool:
        if isinstance(criterion, MaxLengthCriteria):
            return bool(criterion.max_length == generation_config.max_length)
        if not isinstance(criterion, EosTokenCriteria) or ends is None:
            return False
        return torch.equal(criterion.eos_token_id.cpu(), ends.cpu())

    return [criterion for criterion in criteria if not is_ours(criterion)]


def output_of(rows: Sequence[Row], pad: int | None, as_dict: bool) -> Tensor | DraftedOutput:
    """Prompts and answers in one int64 [batch, length], or `DraftedOutput`, which has it too."""
    answers = [row.answer() for row in rows]
    longest = max(map(len, answers))
    sequences = torch.stack(
        [
            torch.cat([row.given, row.given.new_tensor([*ids, *[pad] * (longest - len(ids))])])
            for row, ids in zip(rows, answers, strict=True)
        ]
    )
    if not as_dict:
        return sequences
    stats = [row.task.stats for row in rows]
    count = sequences.new_tensor
    forwards = count([each.nfe for each in stats])
    return DraftedOutput(
        sequences=sequences,
        tokens_per_forward=count([*map(len, answers)]) / forwards,
        forwards=forwards,
        positions_computed=count([each.positions_computed for each in stats]),
        steps=count([each.steps for each in stats]),
    )
