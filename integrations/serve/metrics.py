"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from spiffy.runtime.decode import Task

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_TOGETHER = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server; every one is described by its help text."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"spiffy_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests answered.", "path", "status")
        self.answers = counter("answers", "Answers decoded, and those that failed.", "result")
        self.cancelled = counter("cancelled", "Answers given up because nobody waited any more.")
        self.tokens = counter("tokens", "Tokens of prompts and of answers.", "of")
        self.forwards = counter("forwards", "Forwards of the model, shared ones once.")
        self.nfe = counter("nfe", "Forwards as each answer counts them, shared ones for each.")
        self.positions = counter("positions", "Positions computed.")
        self.steps = counter("steps", "Denoising steps.")
        self.drafts = counter("drafts", "Drafts verified.")
        self.accepted = counter("accepted", "Drafts that came true: forwards saved.")
        self.halvings = counter(
            "halvings", "Times that a forward's drafts did not fit into memory."
        )
        self.verified = counter(
            "verified", "Answers compared with plain decoding in idle time.", "result"
        )
        self.running = Gauge("spiffy_running", "Answers being decoded.", registry=registry)
        self.waiting = Gauge("spiffy_waiting", "Answers that wait.", registry=registry)
        self.together = Histogram(
            "spiffy_together", "Answers that share a forward.", buckets=_TOGETHER, registry=registry
        )
        self.seconds = Histogram(
            "spiffy_request_seconds",
            "Seconds from a request's head to the end of its response.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )

    def forward(self, together: int) -> None:
        """Count a forward."""
        self.forwards.inc()
        self.together.observe(together)

    def ended(self, task: Task, ids: Sequence[int] | None) -> None:
        """Count an answer; its token ids, or None if it failed."""
        stats = task.stats
        self.answers.labels("failed" if ids is None else "decoded").inc()
        self.tokens.labels("prompts").inc(len(task.prompt))
        self.tokens.labels("answers").inc(len(ids or ()))
        self.nfe.inc(stats.nfe)
        self.positions.inc(stats.positions_computed)
        self.steps.inc(stats.steps)
        self.drafts.inc(stats.drafted)
        self.accepted.inc(stats.accepted)
        self.halvings.inc(stats.halvings)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)
