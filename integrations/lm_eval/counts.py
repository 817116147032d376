"""What the answers to a task took, as the harness's results hold it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spiffy.schemas.records import COUNTS

if TYPE_CHECKING:
    from spiffy.runtime.generate import Output


@dataclass
class Counts:
    """What the answers to one task took, and which of them were compared with plain decoding's.

    Attributes
    ----------
    answers
        Decoded here; those from the harness's cache cost nothing.
    seconds
        Wall-clock time of decoding them, `verified` not counted.
    budgets
        With budget "auto": forwards by what was chosen for them.
    verified, differing
        How many answers were decoded plainly too, and the documents whose answers differ.
    verified_nfe, plain_nfe
        Forwards that the verified answers took, with drafts and plainly.
    """

    answers: int = 0
    tokens: int = 0
    nfe: int = 0
    positions_computed: int = 0
    steps: int = 0
    accepted: int = 0
    seconds: float = 0.0
    budgets: Counter[str] = field(default_factory=Counter)
    verified: int = 0
    differing: list[int] = field(default_factory=list)
    verified_nfe: int = 0
    plain_nfe: int = 0

    def add(self, output: Output) -> None:
        """Count one answer."""
        stats = output.stats
        self.answers += 1
        self.tokens += len(output.token_ids)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(stats, name))
        self.budgets.update(stats.budgets)

    def record(self) -> dict[str, Any]:
        """As the results hold it."""
        content: dict[str, Any] = {
            "answers": self.answers,
            "tokens": self.tokens,
            **{name: getattr(self, name) for name in COUNTS},
            "seconds": round(self.seconds, 6),
            "steps_per_forward": self.steps / self.nfe if self.nfe else None,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
        }
        if self.budgets:
            content["forwards_by_budget"] = dict(self.budgets)
        if self.verified:
            content["verified"] = {
                "answers": self.verified,
                "identical": self.verified - len(self.differing),
                "differing_doc_ids": self.differing,
                "nfe": self.verified_nfe,
                "plain_nfe": self.plain_nfe,
            }
        return content
