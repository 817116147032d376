"""The harness's own command, run with models that verify a share of their answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spiffy.schemas import SpiffyError

if TYPE_CHECKING:
    from spiffy.integrations.lm_eval.model import SpiffyLM


@dataclass
class Launch:
    """What the models that the harness makes are told, and these models."""

    verify_share: float
    models: list[SpiffyLM]


current: ContextVar[Launch | None] = ContextVar("launch", default=None)


@contextmanager
def launched(verify_share: float) -> Iterator[list[SpiffyLM]]:
    """Verify that share of what models decode that the harness makes meanwhile; yields these."""
    launch = Launch(verify_share, [])
    token = current.set(launch)
    try:
        yield launch.models
    finally:
        current.reset(token)


class _Complaints(logging.Filter):
    """Keeps what the harness says that it could not save, which it takes no further.

    It hears a logger that lets everything through, and lets through what that one would have: of
    such warnings the harness itself is silent with LMEVAL_LOG_LEVEL=ERROR.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.said: list[str] = []
        self._logger, self._level = logger, logger.level

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a warning of that kind."""
        if record.getMessage().startswith("Could not save"):
            self.said.append(record.getMessage())
        above = self._logger.parent or logging.root
        return record.levelno >= (self._level or above.getEffectiveLevel())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what is said meanwhile."""
        self._logger.addFilter(self)
        self._logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            self._logger.setLevel(self._level)
            self._logger.removeFilter(self)


def _is_ours(error: Exception) -> bool:
    """Whether it came through code of ours that the harness called."""
    at = error.__traceback__
    while at is not None and (at := at.tb_next) is not None:  # the first is what calls the harness
        if str(at.tb_frame.f_globals.get("__name__")).startswith("spiffy."):
            return True
    return False


def run_harness() -> list[str]:
    """The harness's own command, with the arguments of this process; what it could not save.

    Raises
    ------
    SpiffyError
        If one of them is wrong.
    """
    from lm_eval.__main__ import cli_evaluate

    complaints = _Complaints(logging.getLogger("lm_eval.loggers.evaluation_tracker"))
    try:
        with complaints.listening():
            cli_evaluate()
    except SpiffyError:
        raise
    except (
        Exception
    ) as error:  # bad tasks and data raise many kinds, of the harness's libraries too
        if _is_ours(error):
            raise
        told = isinstance(error, ValueError | TypeError | OSError)
        reason = " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())
        raise SpiffyError(f"lm-evaluation-harness: {reason}") from None
    return complaints.said
