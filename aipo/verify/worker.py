"""Inside a worker process of the verifier's pool (:mod:`aipo.verify.pool`): one job at a time, within limits."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from numbers import Real
from operator import attrgetter
from typing import Any

from aipo.problems.problem import Problem
from aipo.startup import imports

RewardFunction = Callable[[Problem, str], float]
"""The user's ``reward.function``: a problem and the whole completion as text -> a finite number; 1 or more is right.

It must depend on its arguments alone. What it raises ends the run; where it hangs or crashes there is no verdict.
"""

# One of each shape: loads all of sympy that is needed, and the parser learns its grammar from them.
_WARM_UP = [(r"2\sqrt{2}", r"\sqrt{8}"), (r"x^2 - \frac{x}{2}", "x(x - 0.5)"), ("y = 2x + 1", "2x - y = -1")]


def work(connection: Connection, memory_mb: int) -> None:
    """Do jobs until the parent hangs up: see ``_Job`` of the pool for what is asked, and here for the replies."""
    logging.disable(logging.CRITICAL)
    _limit_process(memory_mb)
    with imports():
        from aipo.verify.equality import equal

        if not all(equal(*pair) for pair in _WARM_UP):
            raise RuntimeError("math-verify does not read what it used to read")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    connection.send_bytes(b"ready")
    functions: dict[str, RewardFunction] = {}
    while True:
        try:
            (what, *arguments), seconds = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        reply: dict[str, Any]
        try:
            if what != "equal" and arguments[0] not in functions:  # before the timer: an import takes its time
                functions[arguments[0]] = _imported(arguments[0])
            signal.setitimer(signal.ITIMER_PROF, seconds)  # the kernel counts CPU time and sends SIGPROF
            if what == "equal":
                reply = {"equal": _no_error(equal, *arguments)}
            else:
                reply = {"score": 0.0 if what == "import" else _score(functions[arguments[0]], *arguments[1:])}
        except MemoryError:
            os._exit(1)  # what is left of this process is not to be trusted; the parent starts another
        except Exception as error:
            reply = {"error": _told(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(reply).encode())


def _limit_process(memory_mb: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM):  # a batch system sends SIGTERM to every process of a job
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the trainer
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _no_error(equal: Callable[[str, str], bool], gold: str, answer: str) -> bool:
    try:
        return equal(gold, answer)
    except MemoryError:
        raise
    except Exception:  # sympy raises every kind of error on nonsense, RecursionError included
        return False


def _imported(name: str) -> RewardFunction:
    module, _, path = name.partition(":")
    function: RewardFunction = attrgetter(path)(import_module(module))
    if not callable(function):
        raise TypeError(f"{path} is not a function but {type(function).__name__}")
    return function


def _score(function: RewardFunction, problem: str, completion: str) -> float:
    fields = json.loads(problem)
    score = function(Problem(**fields | {"options": tuple(fields["options"])}), completion)
    if not isinstance(score, Real) or not math.isfinite(score):
        raise TypeError(f"it returned {score!r:.80}, which is not a finite number")
    return float(score)


def _told(error: Exception) -> str:
    """What was raised, in one line, with where."""
    said = " ".join(str(error).split())[:300]
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}{said and ': '}{said} ({last.filename}, line {last.lineno})"


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])), int(sys.argv[2]))
