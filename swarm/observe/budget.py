"""Bounds on the bytes of pages: the writer keeps rows until a budget is spent, so that no reader refuses the rest.

A node knows thousands of members, real or invented, each with texts of its own choice. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
COMMA_BYTES = 2  # between two rows


def size(value: object) -> int:
    """Bytes of a value as JSON in UTF-8."""
    return len(msgspec.json.encode(value))


def within(rows: Iterable[T], bytes_max: int, *, first: Callable[[T], Any]) -> list[T]:
    """The rows that fit into `bytes_max`, in their order; those with the smallest `first` are kept."""
    sized = [(row, size(row) + COMMA_BYTES) for row in rows]
    if sum(row_bytes for _, row_bytes in sized) <= bytes_max:
        return [row for row, _ in sized]
    kept: set[int] = set()
    for number in sorted(range(len(sized)), key=lambda number: first(sized[number][0])):
        bytes_max -= sized[number][1]
        if bytes_max < 0:
            break
        kept.add(number)
    return [row for number, (row, _) in enumerate(sized) if number in kept]


def items_within(table: Mapping[str, T], bytes_max: int, *, first: Callable[[T], Any]) -> dict[str, T]:
    """As `within`, of the items of a table by their values."""
    return dict(within(table.items(), bytes_max, first=lambda item: first(item[1])))
