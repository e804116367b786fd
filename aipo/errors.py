"""The kinds of error that say what to do, and how a command ends by one."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec

from aipo.startup import legible

P = ParamSpec("P")


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; the launcher prints it and exits with code 2."""


class TrainingError(Exception):
    """Training cannot go on; says why and what to try. Nothing that was saved is lost. Exit code 1."""


def expanded(path: str, key: str) -> Path:
    """The path with its ``~``; UserError, naming ``key``, where that user has no home, as in many containers."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key}: {path}: no such home: set HOME, or give {key} a path without ~") from None


def tell_launcher(text: str) -> None:
    """Put the error where torchrun looks for it, which ends its summary with it."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        when = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # of a full disk, which may be the error: it is still printed
            Path(report).write_text(json.dumps({"message": {"message": text, "extraInfo": when}}))


def exit_code(main: Callable[P, int]) -> Callable[P, int]:
    """The main function of a command: 2 where it raises UserError, which is printed."""

    @functools.wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> int:
        legible()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return command
