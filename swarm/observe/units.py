"""Quantities as text."""

from __future__ import annotations


def size_text(size: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # above that, rounding gives 1000, which belongs to the next unit
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def count(number: int, noun: str) -> str:
    """A number with its noun: '1 node', '2 nodes', '3 fetches', '4 retries'."""
    plural = f"{noun}es" if noun.endswith("h") else f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
