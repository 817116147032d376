"""Comparing answers that were given with plain decoding's."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

from spiffy.runtime.decode import Task
from spiffy.runtime.generate import collect

_LOG = logging.getLogger("spiffy")


class Answer(NamedTuple):
    """What of an answer is compared: all its states would take a lot of memory while it waits."""

    ids: list[int]
    text: str


def compared(ours: Answer, plain: Task) -> Literal["same", "different", "failed"]:
    """What became of comparing an answer with one that was decoded plainly."""
    if plain.error is not None:
        _LOG.warning("an answer could not be compared with plain decoding: %s", plain.error)
        return "failed"
    output = collect(plain)
    if ours == (output.token_ids, output.text):
        return "same"
    pairs = enumerate(zip(ours.ids, output.token_ids, strict=False))
    shorter = min(len(ours.ids), len(output.token_ids))
    at = next((k for k, (one, other) in pairs if one != other), shorter)
    _LOG.warning("an answer is not plain decoding's: they part at token %d", at)
    return "different"
