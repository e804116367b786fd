"""The start of a process, which is importing for the most part."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Around imports: a sixth of their time goes into looking for garbage, which nothing is that a module makes."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def legible() -> None:
    """A terminal that has no letter for something shows a question mark, and the command goes on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
