"""While transformers loads: one load at a time, quiet, and errors in one line."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said

# transformers changes its own classes, torch's default dtype and its log level while it loads, and
# puts them back: two loads at once would put back what the other had changed.
_ONE_LOAD = threading.RLock()


@contextmanager
def loading(name: str, failure: str = "weights cannot be loaded") -> Iterator[None]:
    """Read weights quietly, one tensor at a time, and turn what goes wrong into one line."""
    with quiet_transformers(), _one_tensor_at_a_time():
        try:
            yield
        except SpiffyError:
            raise
        except Exception as error:  # what safetensors and transformers raise has no end
            reason = said(error)
            raise SpiffyError(f"{name}: {failure}: {reason}") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load reports, no bars: we raise instead, in one line. One at a time (`_ONE_LOAD`)."""
    with _ONE_LOAD:
        level = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Without transformers' loader threads.

    They run ahead of the merging of experts and would hold most of a mixture twice.
    """
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
