"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spiffy.runtime.decode import Stats, Task

GONE = 499  # the status, as nginx counts it, of a response that nobody waits for
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
        self.last_forward = Gauge(
            "spiffy_last_forward_timestamp_seconds",
            "When the last forward ended, else when this began, in seconds since 1970.",
            registry=registry,
        )
        self.last_forward.set_to_current_time()
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
        self.last_forward.set_to_current_time()
        self.together.observe(together)

    def ended(self, task: Task, ids: Sequence[int] | None) -> None:
        """Count an answer; its token ids, or None if it failed."""
        self.answers.labels("failed" if ids is None else "decoded").inc()
        self.tokens.labels("prompts").inc(len(task.prompt))
        self.tokens.labels("answers").inc(len(ids or ()))
        self._spent(task.stats)

    def gave_up(self, task: Task) -> None:
        """Count an answer that nobody waits for any more."""
        self.cancelled.inc()
        self._spent(task.stats)

    def _spent(self, stats: Stats) -> None:
        self.nfe.inc(stats.nfe)
        self.positions.inc(stats.positions_computed)
        self.steps.inc(stats.steps)
        self.drafts.inc(stats.drafted)
        self.accepted.inc(stats.accepted)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)


class Counted:
    """Counts requests by path and status, and their seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = GONE, monotonic()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:  # answered further out
            status = 500 if status == GONE else status
            raise
        finally:
            # Paths that are no route would make as many labels as somebody cares to send.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(monotonic() - began)
