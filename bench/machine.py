"""The machine of a measurement, as text and as part of a file name."""

from __future__ import annotations

from aipo.record.machine import machine

__all__ = ["machine", "slug"]


def slug() -> str:
    """:func:`machine` as part of a file name."""
    words = machine().replace("(R)", "").replace("(TM)", "").lower().split()
    return "-".join("".join(c for c in word if c.isalnum()) for word in words)
