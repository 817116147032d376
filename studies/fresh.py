"""What earlier runs have left on the machine, left out: `auto` starts knowing nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def forgetting_costs() -> Iterator[None]:
    """Let `auto` measure afresh; in earlier runs the machine may have had other work to do, too."""
    before = os.environ.get("SPIFFY_CACHE")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SPIFFY_CACHE"] = scratch
        try:
            yield
        finally:
            del os.environ["SPIFFY_CACHE"]
            if before is not None:
                os.environ["SPIFFY_CACHE"] = before
