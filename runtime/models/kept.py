"""What is learned of a module, kept for as long as the module lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import RLock
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_MOST = 16  # per module

T = TypeVar("T")


class KeptPerModule(Generic[T]):
    """A few things per module, by key: of more than 16 the longest unused go. For all threads."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, dict[Hashable, T]] = WeakKeyDictionary()
        self._lock = RLock()

    def get(self, module: nn.Module, key: Hashable, make: Callable[[], T], anew: bool = False) -> T:
        """What is kept by this key, made now if it is not there, or is wanted `anew`."""
        with self._lock:
            kept = self._kept.setdefault(module, {})
            found = make() if anew or key not in kept else kept[key]
            kept.pop(key, None)
            kept[key] = found  # used last
            while len(kept) > _MOST:
                del kept[next(iter(kept))]
            return found
