"""Jobs: what is computed in one folder of cells, as commands, and how one is run to its end. Imports nothing heavy.

What a folder holds says what is left to do, so that a campaign killed at any moment goes on with what is missing. A
lock that the system drops with the process keeps two campaigns from one folder: the second waits, then finds it done.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

State = Literal["waiting", "begun", "running", "failed", "done"]
BAD_INPUT = 2  # exit code of train.py and evaluate.py where the user must mend something: another try is no use
POLL = 0.02  # seconds between two looks at a command
_LIBC = ctypes.CDLL(None)
ROOT = Path(__file__).resolve().parents[2]
APART = ("beds", "campaign", "credit", "plan", "replay.py", "report")  # of aipo/, what changes no number of a run
SCRIPTS = {"training": "train.py", "evaluation": "evaluate.py"}
What = Literal["training", "evaluation"]


def source_version(what: What, root: Path = ROOT) -> str:
    """Of our source that such a command executes: a hundredth of a second."""
    found = hashlib.sha256((root / SCRIPTS[what]).read_bytes())
    for path in sorted((root / "aipo").rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[1] not in APART and "/." not in name.as_posix() and path.is_file():  # no editor's lock or copy
            found.update(b"\0" + name.as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Work:
    """A command, and the file that is there when it has succeeded. It is planned for ``source``; empty: for any."""

    what: What
    command: tuple[str, ...]
    result: str
    source: str = ""

    @property
    def done(self) -> bool:
        return Path(self.result).is_file()


@dataclass(frozen=True)
class Job:
    """What one folder of cells needs, in order. ``facts`` go into ``cell.json``, from which times are estimated.

    A training ends after ``steps``, or before that once it has generated ``tokens``.
    """

    key: str
    name: str
    folder: str
    work: tuple[Work, ...]
    environment: dict[str, str]
    gpus: int
    retries: int
    steps: int
    keep_model: bool
    tokens: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return Path(self.folder)

    @property
    def missing(self) -> list[Work]:
        """What is left to do. A model that was not kept is trained again for an evaluation that is missing."""
        left = [work for work in self.work if not work.done]
        training = [work for work in self.work if work.what == "training"]
        wanted = any(work.what == "evaluation" for work in left) or self.keep_model
        if training and wanted and training[0].done and not (self.place / "final").is_dir():
            return [training[0], *left]
        return left

    @property
    def again(self) -> bool:
        """Whether what was trained is to be trained once more, since its model is gone."""
        return any(work.what == "training" and work.done for work in self.missing)

    @property
    def reached(self) -> int:
        """The step that its metrics have come to; 0 where it is trained again."""
        if self.again:
            return 0
        with suppress(OSError, ValueError, IndexError):
            with (self.place / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                lines = [line for line in file.read().split(b"\n")[:-1] if line]
            return int(json.loads(lines[-1])["step"])
        return 0

    @property
    def last(self) -> int:
        """The step that it will end with, as far as its steps until now say."""
        from aipo.record.jsonl import read_jsonl  # imported here: both bring torch
        from aipo.record.progress import last_step

        log = read_jsonl(self.place / "metrics.jsonl") if self.tokens and self.reached else []
        return last_step(self.steps, self.tokens, self.reached, sum(line.get("rollout/tokens") or 0 for line in log))

    def state(self) -> State:
        if not self.missing:
            return "done"
        if self._busy():
            return "running"
        if (self.place / "failed.json").is_file():
            return "failed"
        return "begun" if self.reached else "waiting"

    def lock(self) -> FileLock:
        return FileLock(self.place.with_name(f".{self.place.name}.lock"))

    def claim(self) -> None:
        """Note what is wanted of the model, before anything runs: while it is, no campaign removes it."""
        self.place.mkdir(parents=True, exist_ok=True)
        wanted = [Path(work.result) for work in self.work if work.what == "evaluation" and not work.done]
        for result in wanted + [self.place / "keep"] * self.keep_model:
            result.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{result}.wanted").touch()

    def _busy(self) -> bool:
        return _held(Path(self.lock().lock_file))


def _held(lock: Path) -> bool:
    """Whether a process has it. It is taken for a moment, so a command that is about to start must not be asked for."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True


def run_job(
    job: Job, *, environment: Mapping[str, str] = {}, stopped: Callable[[], bool] = lambda: False
) -> Literal["done", "failed", "stopped"]:
    """Do what is missing, each command tried again ``retries`` times. Its output goes to ``cell.log``.

    ``stopped`` is asked all the time; once it says yes, the command is told to end, which saves a checkpoint.
    """
    job.claim()
    lock = job.lock()
    while True:
        try:
            held = lock.acquire(timeout=0.2)
            break
        except Timeout:  # another campaign computes it
            if stopped():
                return "stopped"
    with held:
        while any(_held(Path(work.result).with_name(".lock")) for work in job.work):
            if stopped():  # what train.py and evaluate.py hold: a run that outlives a killed campaign ends its step
                return "stopped"
            time.sleep(0.2)
        _settle(job)
        try:
            return _run(job, {**os.environ, **job.environment, **environment}, stopped)
        finally:
            _settle(job)


def _run(job: Job, environment: dict[str, str], stopped: Callable[[], bool]) -> Literal["done", "failed", "stopped"]:
    (job.place / "failed.json").unlink(missing_ok=True)
    failed: list[dict[str, Any]] = []
    for work in job.missing:
        tries = job.retries
        if stopped():
            return "stopped"
        while (code := _do(job, work, environment, stopped)) or not work.done:
            if stopped():
                return "stopped"
            if tries == 0 or code == BAD_INPUT:
                failed.append({"code": code, "what": work.what, "last": _last_words(job)})
                break
            tries -= 1
        if failed and work.what == "training":
            break
    if failed:
        _note(job.place / "failed.json", failed[0])
        return "failed"
    if all(wanted.with_suffix("").exists() for wanted in job.place.rglob("*.wanted")):
        for heavy in ("final", "exported", "checkpoints"):  # gigabytes; numbers stay
            _remove(job.place / heavy)
    return "done"


def _remove(folder: Path) -> None:
    """It first loses its name, so that half of one never looks like a whole."""
    doomed = folder.with_name(f".tmp-delete-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # that a kill has left
    with suppress(OSError):
        os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _put_aside(metrics: Path, result: Path) -> None:
    """The figures of a run that is trained again. Its metrics also stay: from a checkpoint it goes on with them."""
    with suppress(FileNotFoundError):
        shutil.copyfile(metrics, f"{metrics}.earlier")
    os.replace(result, f"{result}.earlier")  # last: as long as it is there, so are the metrics


def _settle(job: Job) -> None:
    """Figures that were put aside come back, unless the run came to its end again. Other campaigns have them."""
    for work in (work for work in job.work if work.what == "training"):
        for path in (job.place / "metrics.jsonl", Path(work.result)):
            earlier = Path(f"{path}.earlier")
            if work.done:
                earlier.unlink(missing_ok=True)
            elif earlier.exists():
                os.replace(earlier, path)


def _do(job: Job, work: Work, environment: dict[str, str], stopped: Callable[[], bool]) -> int:
    """Run one command; its exit code, negative for a signal."""
    with (job.place / "cell.log").open("ab") as log:
        log.write(f"$ {' '.join(work.command)}\n".encode())
        if work.source not in ("", source_version(work.what)):  # its results would lie under the key of other code
            log.write(b"error: the code was changed since this was planned: start the campaign again\n")
            return BAD_INPUT
        log.flush()
        began, fresh = time.monotonic(), not (job.place / "checkpoints" / "latest").exists()
        if work.done and work.what == "training":  # but its model is gone: all again
            _put_aside(job.place / "metrics.jsonl", Path(work.result))
        process = subprocess.Popen(
            work.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            preexec_fn=_end_with_parent,
            start_new_session=True,
        )  # fmt: skip
        told = False
        while (code := process.poll()) is None:
            if stopped() and not told:
                process.terminate()
                told = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
    if code == 0 and fresh and work.what == "training":
        _note(job.place / "cell.json", job.facts | {"seconds": time.monotonic() - began, "cores": cores()})
    return code


def _end_with_parent() -> None:
    """A campaign that is killed takes its runs along; they save first."""
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def cores() -> int:
    return len(os.sched_getaffinity(threading.get_native_id()))


def _last_words(job: Job) -> str:
    """The last line of its last command that says what went wrong, in any case the last."""
    with (job.place / "cell.log").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    begun = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1)  # an earlier try says nothing
    lines = lines[begun + 1 :]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:300]


def _note(path: Path, content: Any) -> None:
    """Of a folder of cells, whose lock is held: no other writes there."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(content) + "\n")
    os.replace(temporary, path)


def failure(job: Job) -> str:
    """Why a job failed, in a line."""
    found = json.loads((job.place / "failed.json").read_text())
    return f"{found['what']} ended with {found['code']}: {found['last']} ({job.folder}/cell.log)"


def save_jobs(jobs: list[Job], folder: Path) -> Path:
    """A file named by its content: a list that waits in a queue is never written over by another."""
    from aipo.record.checkpoints import write_atomically  # imported here: it brings torch

    text = json.dumps([asdict(job) for job in jobs])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"jobs-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    write_atomically(path, f"{text}\n")
    return path


def load_jobs(path: Path) -> list[Job]:
    return TypeAdapter(list[Job]).validate_json(path.read_bytes())
