"""How numba compiles: without the interpreter's lock, once per machine, IEEE arithmetic.

What it has kept stays as it was when this file changes: change the files that use it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

_Function = Callable[..., Any]
_KEPT = {"cache": True, "nogil": True, "error_model": "numpy"}

compiled: Callable[[_Function], _Function] = njit(**_KEPT)
#: Numbers are added in any order, several at a time.
compiled_sum: Callable[[_Function], _Function] = njit(**_KEPT, fastmath={"reassoc", "contract"})
