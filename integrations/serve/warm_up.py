"""Before the first request: what is slow once is done, and some of what is learned is learned."""

from __future__ import annotations

import logging
from time import perf_counter

from spiffy.integrations.serve.engine import Engine
from spiffy.runtime.budget.predict import auto_profile
from spiffy.runtime.decode import Task, run
from spiffy.schemas.errors import is_of_one_decode, said

_LOG = logging.getLogger("spiffy")

_PLAIN_SECONDS = 1.0
_DRAFTING_SECONDS = 2.0
_MEASURABLE_SECONDS = 0.1  # of a plain forward: measuring takes a dozen of several times that
_LEAST = 2  # forwards: the first one is the slow one


def warm_up(engine: Engine, prompt: str) -> None:
    """Decode a prompt plainly, then with drafts, for a few seconds; before the engine begins.

    The first forwards of a process take longer than all others, and how many drafts pay is not
    known yet: whoever asked first would pay for both. With budget "auto", what forwards cost here
    is measured too unless it is known, and remembered for the next server. Nothing of it is in the
    engine's metrics. A prompt that cannot be decoded is no reason not to serve others: it is
    logged. A policy that fails is one: it would fail every request, so its error is raised.
    """
    try:
        plain = engine.task(prompt, drafts=False)
        fastest = _decode(engine, plain, _PLAIN_SECONDS)
        if engine.graph is None or not engine.graph.nodes:
            return
        if engine.is_auto and fastest < _MEASURABLE_SECONDS:
            auto_profile(engine.task(prompt, drafts=False), engine.graph)
        until = perf_counter() + _DRAFTING_SECONDS
        while (left := until - perf_counter()) > 0:
            _decode(engine, engine.task(prompt), left)
    except Exception as problem:
        if not is_of_one_decode(problem):
            raise
        _LOG.warning("warming up: %s", said(problem))


def _decode(engine: Engine, task: Task, limit: float) -> float:
    """Decode for about `limit` seconds, at least a few forwards; seconds of the fastest one."""
    started = before = perf_counter()
    seconds: list[float] = []
    for _ in run(engine.model, [task]):
        now = perf_counter()
        seconds.append(now - before)
        if now - started > limit and len(seconds) >= _LEAST:
            break
        before = now
    return min(seconds)
