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


class _Complaints(logging.Handler):
    """Keeps what the harness says that it could not save, which it takes no further."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning of that kind."""
        if record.getMessage().startswith("Could not save"):
            self.said.append(record.getMessage())


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

    logger, complaints = logging.getLogger("lm_eval.loggers.evaluation_tracker"), _Complaints()
    logger.addHandler(complaints)
    try:
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
    finally:
        logger.removeHandler(complaints)
    return complaints.said
