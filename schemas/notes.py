"""Notes: what users should know although nothing is wrong, one line each, once."""

from __future__ import annotations

import logging
from functools import lru_cache

from spiffy.schemas.errors import printable

_LOG = logging.getLogger("spiffy")


@lru_cache(maxsize=1024)
def note(text: str) -> None:
    """Say something once per process: on standard error, unless logging is set up otherwise."""
    _LOG.warning("note: %s", printable(text))
