"""Is the final answer of a response equal to the gold answer?

Model output is hostile input, so everything that has to be *understood* is parsed by Math-Verify in worker
processes with a hard limit on time and memory; a worker that breaks a limit is killed and replaced. What can be
read off the text (no answer, equal strings, plain integers, letters) is decided here, without a worker.

A worker is this very file run as a script. It starts as a fresh interpreter, never as a fork of the trainer
(which holds torch threads, vLLM and DeepSpeed), and unlike multiprocessing's ``spawn`` it does not import the
caller's main module again: that works from a script without a main guard, from stdin and from a notebook, and
keeps torch out of the workers. So this file imports nothing but the standard library at its top.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

MAX_CHARS = 2000  # a longer answer is compared as text only: no real one comes near, and parsing is not linear
STARTUP_SECONDS = 120.0  # a worker imports sympy in half a second; generous, because a loaded machine is slow


class Verdict(Enum):
    """What became of one answer; everything but ``CORRECT`` scores 0."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMED_OUT = "timed_out"
    KILLED = "killed"  # the worker died of its memory limit or a crash (a MemoryError that sympy caught is WRONG)

    @property
    def correct(self) -> bool:
        return self is Verdict.CORRECT


def is_correct(gold: str, response: str, *, kind: str = "math", timeout: float = 5.0) -> bool:
    """Whether the final answer of ``response`` equals ``gold``.

    Args:
        gold: the answer, with or without ``\\boxed{}`` or dollar signs; for ``kind="choice"`` a letter.
        response: the whole completion; see :func:`extract_answer` for what counts as its answer.
        timeout: seconds of work for one answer; the first call also pays for starting a worker.

    No content of ``gold`` or ``response`` raises: what cannot be parsed, takes too long or too much memory is
    ``False``. Raises ValueError for an unknown ``kind`` and RuntimeError if no worker can be started at all.
    """
    return _default_verifier().submit(gold, response, kind, timeout=timeout).result().correct


# --- text: linear-time, in the caller's process ---------------------------------------------------------------

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace belongs to the content
_ANSWER_LINE = re.compile(r"^[ \t*_#>-]*(?:final[ \t]+)?answer[ \t*_]*:[ \t*_]*(.*)$", re.IGNORECASE | re.MULTILINE)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_LETTER = re.compile(
    r"(?:\\[a-z]++|[\s{(\[$*_])*+"  # wrapping: \text{, (, $, **; possessive, so that \alpha is no answer a
    r"(?:([A-Z])(?=[\s}\])$*_]*(?:$|[.,:;(-]))|([A-Z])(?=[)\]])|([a-z])(?=[\s})\]$*_.]*$))"  # B · B) text · b
)
_BASE = re.compile(r"\w+_\{?(\d+)\}?")


def after_thinking(response: str) -> str | None:
    """The text after the last ``</think>``, all of it without one, None if a thinking block was never closed."""
    tail = response.rpartition("</think>")[2]
    return None if "<think>" in tail else tail


def extract_answer(response: str, kind: str = "math") -> str | None:
    """The final answer as written, or None. Linear in the length of ``response``.

    Only the text after the thinking block counts. math: the last ``\\boxed{}``, which must be complete (a
    truncated last box is no answer, whatever stood before it), or without any box the last line
    ``Answer: ...``. choice: the capital letter in whichever of the two stands last.
    """
    if kind not in ("math", "choice"):
        raise ValueError(f"kind must be 'math' or 'choice', not {kind!r}")
    text = after_thinking(response)
    if text is None:
        return None
    box, line = _last(_BOX, text), _last(_ANSWER_LINE, text)
    if box and (kind == "math" or line is None or box.start() > line.start()):
        answer = _box_content(text, box.end())
    else:
        answer = line.group(1).rstrip(" \t\r*_.") if line else None
    if answer is None:
        return None
    return _letter(answer) if kind == "choice" else _bare(answer) or None


def last_box(text: str) -> str | None:
    """The content of the last ``\\boxed{}``; None if there is none or it is not closed."""
    box = _last(_BOX, text)
    return _box_content(text, box.end()) if box else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _box_content(text: str, start: int) -> str | None:
    """From just behind an opening brace to its partner; None if it has none."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def _bare(answer: str) -> str:
    """Without surrounding white space and math delimiters."""
    answer = answer.strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1].replace("\\$", ""):
        answer = answer[1:-1].strip()
    return answer


def _letter(text: str) -> str | None:
    match = _LETTER.match(text)
    return match.group(match.lastindex).upper() if match and match.lastindex else None


def _bare_gold(gold: str) -> str:
    box = _BOX.match(gold.strip())
    content = _box_content(gold.strip(), box.end()) if box else None
    return _bare(gold if content is None else content)


def _judge_as_text(gold: str, answer: str, kind: str) -> Verdict | None:
    """The verdict where the text settles it, else None. ``gold`` and ``answer`` are bare."""
    if kind == "choice":
        return Verdict.CORRECT if _letter(gold) == answer else Verdict.WRONG
    if gold == answer:
        return Verdict.CORRECT if gold else Verdict.WRONG
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):  # any number of digits, exactly
        return Verdict.CORRECT if _integer(gold) == _integer(answer) else Verdict.WRONG
    if max(len(gold), len(answer)) > MAX_CHARS or _different_by_notation(gold, answer):
        return Verdict.WRONG
    return None


def _integer(text: str) -> tuple[bool, str]:
    """Sign and digits without leading zeros: no conversion, which is quadratic, and no float, which rounds."""
    digits = text.lstrip("+-").lstrip("0")
    return text.startswith("-") and digits != "", digits


def _different_by_notation(gold: str, answer: str) -> bool:
    """Pairs that Math-Verify calls equal although their notation says that they are not."""
    if ("%" in gold) != ("%" in answer):  # it takes 18 % for 18, and 1000 % for 10
        return True
    if {_brackets(gold), _brackets(answer)} == {"set", "tuple"}:  # it takes {1, 2} for (1, 2)
        return True
    bases = [match.group(1) for match in map(_BASE.fullmatch, (gold, answer)) if match]
    return len(bases) == 2 and bases[0] != bases[1]  # it drops the subscript of 2516_8


def _brackets(text: str) -> str | None:
    text = text.replace("\\left", "").replace("\\right", "").strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set" if "," in text and "(" not in text else None  # {(1, 2)} is one solution in a set
    if text.startswith("(") and text.endswith(")"):
        return "tuple" if "," in text and "{" not in text else None
    return None


# --- the pool ---------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    gold: str
    answer: str
    timeout: float
    future: Future[Verdict]


class _Worker:
    """One killable process that compares one pair at a time."""

    def __init__(self, memory_mb: int) -> None:
        self.connection, theirs = Pipe()
        # A session of its own, so that Ctrl-C and signals to the trainer's group stay with the trainer.
        # -P keeps this folder off the import path; the fixed hash seed makes sympy's choices reproducible.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__, str(theirs.fileno()), str(memory_mb)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        self._ready = False

    def judge(self, job: _Job) -> Verdict:
        if not self._ready:  # the time to start is not the answer's
            self._await_ready()
        try:
            self.connection.send_bytes(json.dumps([job.gold, job.answer]).encode())
            if not self.connection.poll(job.timeout):
                return Verdict.TIMED_OUT
            return Verdict(self.connection.recv_bytes().decode())
        except (EOFError, OSError):
            return Verdict.KILLED

    def _await_ready(self) -> None:
        try:
            self._ready = self.connection.poll(STARTUP_SECONDS) and self.connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            self._ready = False
        if not self._ready:
            raise RuntimeError(
                f"the verifier's worker did not start (exit code {self.process.poll()}); is math-verify installed?"
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Verifier:
    """A pool of workers. Start-up is lazy; ``stats`` counts the verdicts so far. Thread-safe.

    Args:
        workers: processes, each on at most one core.
        timeout: seconds for one answer.
        memory_mb: address space of a worker in MiB.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory_mb: int = 1024) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.timeout = timeout
        self.stats: Counter[Verdict] = Counter()
        self._memory_mb = memory_mb
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._workers: list[_Worker | None] = [None] * workers
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, gold: str, response: str, kind: str = "math", *, timeout: float | None = None) -> Future[Verdict]:
        """Judge one response in the background. The future holds a verdict, or a RuntimeError if no worker starts."""
        future: Future[Verdict] = Future()
        answer = extract_answer(response, kind)
        gold = _bare_gold(gold)
        verdict = Verdict.NO_ANSWER if answer is None else _judge_as_text(gold, answer, kind)
        if verdict is not None or answer is None:
            self._resolve(future, verdict or Verdict.NO_ANSWER)
            return future
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier is closed")
            if not self._threads:
                self._start_threads()
            self._jobs.put(_Job(gold, answer, self.timeout if timeout is None else timeout, future))
        return future

    def verify_all(self, items: Iterable[tuple[str, str, str]]) -> list[Verdict]:
        """Verdicts for ``(gold, response, kind)``, in their order."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def close(self) -> None:
        """Kill the workers. Futures still queued are cancelled, running ones fail. May be called twice."""
        with self._lock:
            self._closed = True
            running = [worker for worker in self._workers if worker is not None]
        try:
            while job := self._jobs.get_nowait():
                job.future.cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)
        for worker in running:
            worker.process.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_threads(self) -> None:
        # Daemons: a trainer that dies of an exception must not wait for the answers still queued.
        for slot in range(len(self._workers)):
            thread = threading.Thread(target=self._serve, args=(slot,), name=f"verifier-{slot}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, slot: int) -> None:
        """Feed one worker, and replace it whenever it was killed."""
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                verdict = self._worker(slot).judge(job)
                if verdict in (Verdict.TIMED_OUT, Verdict.KILLED):
                    self._drop(slot)
                    self._worker(slot)  # starts now, so that it is ready for the next answer
            except Exception as error:  # no worker can be started: whoever waits for the verdict has to know
                job.future.set_exception(error)
            else:
                self._resolve(job.future, verdict)
        self._drop(slot)

    def _worker(self, slot: int) -> _Worker:
        worker = self._workers[slot]
        if worker is None or worker.process.poll() is not None:  # poll: it may have died while idle
            with self._lock:
                if self._closed:
                    raise RuntimeError("the verifier is closed")
                worker = self._workers[slot] = _Worker(self._memory_mb)
        return worker

    def _drop(self, slot: int) -> None:
        worker, self._workers[slot] = self._workers[slot], None
        if worker is not None:
            worker.kill()

    def _resolve(self, future: Future[Verdict], verdict: Verdict) -> None:
        with self._lock:
            self.stats[verdict] += 1
        future.set_result(verdict)


_default: Verifier | None = None
_default_lock = threading.Lock()


def _default_verifier() -> Verifier:
    global _default
    with _default_lock:
        if _default is None:
            _default = Verifier()
            atexit.register(_default.close)
        return _default


def _forget_default() -> None:
    """A forked child has the pool's pipes but not its threads: it makes a pool of its own."""
    global _default, _default_lock
    if _default is not None:
        atexit.unregister(_default.close)
    _default, _default_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_default)


# --- inside a worker --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # the rollouts of one question share their gold
def _parse(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # Boxed: bare LaTeX often does not parse. LaTeX only: Math-Verify's other reader ends in Python's eval.
    # No timeouts: theirs is SIGALRM, which sympy can block; the parent process has the better one.
    return parse(rf"\boxed{{{answer}}}", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True)


def _equal(gold: str, answer: str) -> bool:
    from math_verify import verify

    return bool(verify(_parse(gold), _parse(answer), timeout_seconds=None, raise_on_error=True))


def _limit_process(memory_mb: int) -> None:
    import ctypes
    import resource

    for ignored in (signal.SIGINT, signal.SIGTERM):  # a batch system sends SIGTERM to every process of a job
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the trainer
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(connection: Connection, memory_mb: int) -> None:
    """Answer pairs until the parent hangs up."""
    import logging

    logging.disable(logging.CRITICAL)
    _limit_process(memory_mb)
    _equal(r"\frac{1}{2}", "0.5")  # loads all of sympy that is needed; a broken installation shows here
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    connection.send_bytes(b"ready")
    while True:
        try:
            gold, answer = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            verdict = Verdict.CORRECT if _equal(gold, answer) else Verdict.WRONG
        except MemoryError:
            os._exit(1)  # what is left of this process is not to be trusted; the parent starts another
        except Exception:  # sympy raises every kind of error on nonsense, RecursionError included
            verdict = Verdict.WRONG
        connection.send_bytes(verdict.value.encode())


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])), int(sys.argv[2]))
