"""Argument checks shared by the model builders."""

from __future__ import annotations


def positive_int(name: str, value: object) -> int:
    """Return `value` as an int; TypeError unless it is an integer, ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return value
