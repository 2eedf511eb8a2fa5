"""The project's one cache: a bounded mapping that drops what was used least recently."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, ItemsView, Iterator, MutableMapping, ValuesView
from typing import Any, Generic, TypeVar

__all__ = ["Kept"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(MutableMapping[K, V], Generic[K, V]):
    """Values by key, at most ``limit``; reading one counts as use, going through all of them does not.

    Threads may make a value twice; one is kept. A copy, or what comes from a pickle, is empty.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, key: K) -> V:
        with self._lock:
            value = self._values[key]
            self._values.move_to_end(key)
            return value

    def get(self, key: K, default: Any = None) -> Any:
        with self._lock:
            if key not in self._values:
                return default
            self._values.move_to_end(key)
            return self._values[key]

    def __setitem__(self, key: K, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.limit:
                self._values.popitem(last=False)

    def put(self, key: K, value: V) -> V:
        """Keeps ``value``, and returns it."""
        self[key] = value
        return value

    def __delitem__(self, key: K) -> None:
        with self._lock:
            del self._values[key]

    def drop(self, dead: Callable[[V], bool]) -> None:
        """Drops the values of which ``dead`` is true."""
        with self._lock:
            for key in [key for key, value in self._values.items() if dead(value)]:
                del self._values[key]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def _snapshot(self) -> OrderedDict[K, V]:
        with self._lock:
            return self._values.copy()

    def __iter__(self) -> Iterator[K]:
        return iter(self._snapshot())

    def values(self) -> ValuesView[V]:
        return self._snapshot().values()

    def items(self) -> ItemsView[K, V]:
        return self._snapshot().items()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.limit,)
