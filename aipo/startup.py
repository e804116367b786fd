"""The start of a process, which is importing for the most part."""

from __future__ import annotations

import gc
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
