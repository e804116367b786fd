"""Is the final answer of a response equal to the gold answer?

Model output is hostile input, so everything that has to be *understood* is parsed in worker processes
(:mod:`aipo.verify.equality`) with a hard limit on time and memory; a worker that breaks a limit is killed and replaced.
What can be read off the text (:mod:`aipo.verify.answers`: no answer, equal strings, plain numbers, letters) is decided
here. A reward function of the user's runs in the same workers under the same limits (:meth:`Verifier.call`).

A worker is :mod:`aipo.verify.worker` run with ``-m``. It starts as a fresh interpreter, never as a fork of the trainer
(which holds torch threads, vLLM and DeepSpeed), and unlike multiprocessing's ``spawn`` it does not import the caller's
main module again: that works from a script without a main guard, from stdin and from a notebook, and keeps torch out of
the workers. So both modules import at their top nothing but the standard library and what imports no more than that.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from multiprocessing import Pipe
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from aipo.problems.problem import Problem
from aipo.verify.answers import (
    bare_gold,
    choice_letter,
    extract_answer,
    lists_several,
    settle,
)

REMEMBERED = 4096  # verdicts: the rollouts of one question often give the same answer
PATIENCE = 20.0  # seconds of the clock for one of CPU time, at least a minute: then a worker is stopped or swapped out
STARTUP_SECONDS = 120.0  # a worker imports sympy in half a second; generous, because a loaded machine is slow


class Verdict(Enum):
    """What became of one answer; the last two are no verdict on it."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMED_OUT = "timed_out"
    KILLED = "killed"  # the worker died of its memory limit or a crash

    @property
    def correct(self) -> bool:
        return self is Verdict.CORRECT


Outcome = Verdict | float
"""what became of one answer: a verdict, or the number that a reward function gave it"""


class FunctionError(Exception):
    """A reward function could not be imported, raised, or returned no number; says what and where."""


def is_correct(gold: str, response: str, *, kind: str = "math", timeout: float = 5.0, lenient: bool = False) -> bool:
    """Whether the final answer of ``response`` equals ``gold``.

    Args:
        gold: the answer, with or without ``\\boxed{}`` or dollar signs; for ``kind="choice"`` a letter.
        response: the whole completion; see :func:`extract_answer` for what counts as its answer.
        timeout: seconds of CPU time for one answer; the first call also pays for starting a worker.
        lenient: take the last formula or number of a response that has neither a box nor an ``Answer:`` line.

    No content of ``gold`` or ``response`` raises: what cannot be parsed, takes too long or too much memory is
    ``False``. Raises ValueError for an unknown ``kind`` and RuntimeError if no worker can be started at all.
    """
    return _default_verifier().submit(gold, response, kind, timeout=timeout, lenient=lenient).result().correct


def _judge_as_text(gold: str, answer: str | None, kind: str) -> Verdict | None:
    """The verdict where the text settles it, else None. ``gold`` and ``answer`` are bare."""
    if answer is None:
        return Verdict.NO_ANSWER
    equal = choice_letter(gold) == answer if kind == "choice" else settle(gold, answer)
    return None if equal is None else Verdict.CORRECT if equal else Verdict.WRONG


# --- the pool ---------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """``request``: equal, gold, answer; or call, function, problem as JSON, completion; or import, function."""

    request: tuple[str, ...]
    timeout: float
    future: Future[Any]  # of a Verdict, or of an Outcome where a function is called


class _Worker:
    """One killable process that does one job at a time."""

    def __init__(self, memory_mb: int) -> None:
        self.connection, theirs = Pipe()
        # A session of its own, so that Ctrl-C and signals to the trainer's group stay with the trainer.
        # -P keeps the current folder off the import path; the fixed hash seed makes sympy's choices reproducible.
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "aipo.verify.worker", str(theirs.fileno()), str(memory_mb)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path},
        )
        theirs.close()

    def judge(self, job: _Job) -> Outcome:
        """Raises FunctionError for a function that did."""
        try:
            self.connection.send_bytes(json.dumps([job.request, job.timeout]).encode())
            if not self.connection.poll(max(PATIENCE * job.timeout, 60.0)):
                return Verdict.TIMED_OUT
            reply = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return Verdict.TIMED_OUT if self.end() == -signal.SIGPROF else Verdict.KILLED
        if "error" in reply:
            raise FunctionError(reply["error"])
        return reply["score"] if "score" in reply else Verdict.CORRECT if reply["equal"] else Verdict.WRONG

    def await_ready(self) -> None:
        try:
            ready = self.connection.poll(STARTUP_SECONDS) and self.connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            raise RuntimeError(
                f"the verifier's worker did not start (exit code {self.process.poll()}); is math-verify installed?"
            )

    def end(self) -> int:
        """Kill what is left of it, with what a reward function started there; how it ended."""
        if self.process.returncode is None:  # not waited for: its number is still its own
            with suppress(ProcessLookupError, PermissionError):  # macOS: none but a zombie is left
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def kill(self) -> None:
        self.end()
        self.connection.close()


class Verifier:
    """A pool of workers. Thread-safe.

    Args:
        workers: processes at most, each on at most one core; one starts where an answer would have to wait for it.
        timeout: seconds of CPU time for one answer, so that a busy machine changes no verdict.
        memory_mb: address space of a worker in MiB.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory_mb: int = 1024) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.timeout = timeout
        self._memory_mb = memory_mb
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._pending: dict[tuple[tuple[str, ...], float], Future[Any]] = {}
        self._known: OrderedDict[tuple[str, ...], tuple[Verdict, float]] = OrderedDict()  # and the timeout
        self._workers: list[_Worker | None] = [None] * workers
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(
        self, gold: str, response: str, kind: str = "math", *, timeout: float | None = None, lenient: bool = False
    ) -> Future[Verdict]:
        """Judge one response in the background. The future holds a verdict, or a RuntimeError if no worker starts.

        Equal answers to equal golds are judged once: while the first is under way the others wait for its verdict.
        """
        future: Future[Verdict] = Future()
        gold = bare_gold(gold)
        answer = extract_answer(response, kind, lenient=lenient, several=kind == "math" and lists_several(gold))
        verdict = _judge_as_text(gold, answer, kind)
        if verdict is None and answer is not None:
            job = _Job(("equal", gold, answer), self.timeout if timeout is None else timeout, future)
            with self._lock:
                verdict, within = self._known.get(job.request, (None, 0.0))
                if verdict is Verdict.TIMED_OUT and job.timeout > within:
                    verdict = None
                first = future if verdict else self._enqueue(job)
            if first is not future:
                first.add_done_callback(lambda done: self._follow(done, future))
        if verdict is not None:
            future.set_result(verdict)
        return future

    def call(self, function: str, problem: Problem, completion: str) -> Future[Outcome]:
        """``function(problem, completion)`` in a worker; ``function`` is ``package.module:name``.

        The future holds its number; TIMED_OUT or KILLED; or a FunctionError if it raised or returned something else.
        What the import of its module takes does not count as time of an answer.
        """
        future: Future[Outcome] = Future()
        with self._lock:
            first = self._enqueue(
                _Job(("call", function, json.dumps(asdict(problem)), completion), self.timeout, future)
            )
        if first is not future:
            first.add_done_callback(lambda done: self._follow(done, future))
        return future

    def check(self, function: str) -> None:
        """Raises FunctionError if it cannot be imported in a worker."""
        with self._lock:
            done = self._enqueue(_Job(("import", function), self.timeout, Future()))
        if done.result() in (Verdict.TIMED_OUT, Verdict.KILLED):
            raise FunctionError(f"the process that imports it died (it may take {self._memory_mb} MiB)")

    def _enqueue(self, job: _Job) -> Future[Any]:
        """The future that will know the verdict: the job's own, or that of the same job already under way."""
        if self._closed:
            raise RuntimeError("the verifier is closed")
        first = self._pending.setdefault((job.request, job.timeout), job.future)
        if first is job.future:
            if len(self._threads) < min(len(self._workers), len(self._pending)):
                self._start_thread()
            self._jobs.put(job)
        return first

    @staticmethod
    def _follow(done: Future[Any], future: Future[Any]) -> None:
        if done.cancelled():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            if error := done.exception():
                future.set_exception(error)
            else:
                future.set_result(done.result())

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

    def _start_thread(self) -> None:
        # A daemon: a trainer that dies of an exception must not wait for the answers still queued.
        slot = len(self._threads)
        thread = threading.Thread(target=self._serve, args=(slot,), name=f"verifier-{slot}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, slot: int) -> None:
        """Feed one worker, and replace it whenever it was killed."""
        while True:
            with suppress(Exception):  # ready before an answer waits for it; what is wrong here shows again below
                self._worker(slot)
            job = self._jobs.get()
            if job is None:
                break
            verdict: Outcome | None = None
            settled = False
            try:
                if job.future.set_running_or_notify_cancel():
                    worker = self._worker(slot)
                    verdict = worker.judge(job)
                    # CPU time says something of the answer; the clock and a crash may say something of the machine
                    settled = job.request[0] == "equal" and (
                        verdict in (Verdict.CORRECT, Verdict.WRONG) or worker.process.returncode == -signal.SIGPROF
                    )
                    if verdict in (Verdict.TIMED_OUT, Verdict.KILLED):
                        self._drop(slot)
            except Exception as error:  # no worker can be started: whoever waits for the verdict has to know
                self._forget(job)
                job.future.set_exception(error)
            else:
                self._forget(job, verdict if settled and isinstance(verdict, Verdict) else None)
                if verdict is not None:
                    job.future.set_result(verdict)
        self._drop(slot)

    def _forget(self, job: _Job, verdict: Verdict | None = None) -> None:
        """The job is no longer under way; a verdict that is given is remembered."""
        with self._lock:
            self._pending.pop((job.request, job.timeout), None)
            if verdict is not None:
                self._known[job.request] = verdict, job.timeout
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)

    def _worker(self, slot: int) -> _Worker:
        worker = self._workers[slot]
        if worker is None or worker.process.poll() is not None:  # poll: it may have died while idle
            self._drop(slot)
            with self._lock:
                if self._closed:
                    raise RuntimeError("the verifier is closed")
                worker = self._workers[slot] = _Worker(self._memory_mb)
            try:
                worker.await_ready()
            except RuntimeError:
                self._drop(slot)
                raise
        return worker

    def _drop(self, slot: int) -> None:
        worker, self._workers[slot] = self._workers[slot], None
        if worker is not None:
            worker.kill()


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
